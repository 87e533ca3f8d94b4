"""`pilot.json`, `pilot.md` and `pilot.html`, all from the same result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from copd_megatron.compare.pages import markdown_table
from copd_megatron.compare.statistics import Interval
from copd_megatron.evaluate.suites import describe
from copd_megatron.files import write_atomic
from copd_megatron.observe.plot_style import style
from copd_megatron.observe.report import write_page
from copd_megatron.observe.report_sections import Plots, Section
from copd_megatron.observe.report_tables import ABSENT, Table
from copd_megatron.pilot.analysis import Relation
from copd_megatron.pilot.plots import draw_correlations, draw_gain, draw_rivals, draw_rlvr, unit
from copd_megatron.pilot.results import PilotResult, as_plain, predictors
from copd_megatron.pilot.settings import PilotSettings

FEW = 20
"""Students below which a correlation is said to rest on few."""


def write_pages(study: PilotSettings, result: PilotResult) -> dict[str, Path]:
    """Write the three files and the plots beside them; their paths by kind."""
    out, names, plain = Path(study.out), predictors(study), as_plain(study, result)
    main = str(plain["main"])
    plots = Plots(out / "plots")
    with style():
        gain = plots.keep("gain", draw_gain(result, main, names[main]))
        rivals = plots.keep("rivals", draw_rivals(result, names))
        correlations = plots.keep("correlations", draw_correlations(result, names))
        rlvr = plots.keep("rlvr", draw_rlvr(result, study.overlaps))
    sections = [
        Section("gain", "What was absorbed", ABSORBED, gain, students_table(study, result), notes=(task_of(study),),
                missing=NOTHING),
        Section("correlations", "What predicts it", PREDICTS, correlations, relations_table(result, names),
                notes=tuple(notes_of(result, names)), missing=NOTHING),
        Section("rivals", "Every predictor", DISTANCES.format(study.problems), rivals, distances_table(study, result),
                missing=NOTHING),
        Section("rlvr", "Independent reinforcement learning and the base", RLVR.format(study.problems), rlvr,
                curves_table(result), missing="no model has been measured"),
    ]  # fmt: skip
    files = {kind: out / f"pilot.{kind}" for kind in ("json", "md", "html")}
    title = (
        f"Pilot study {out.name}: {study.teacher.capability} expert of {study.teacher.updates} updates teaches "
        f"{study.student.capability} experts, {study.budget} updates each"
    )
    write_page(files["html"], title, [], sections)
    write_atomic(files["md"], _markdown(title, sections))
    write_atomic(files["json"], json.dumps(plain, indent=1) + "\n")
    return files


NOTHING = "no student has been distilled"
ABSORBED = (
    "(after − before) / (teacher − before), of accuracies on the test problems of the teacher's capability, with 95% "
    "intervals by bootstrap over problems, paired: before, after and teacher on the same ones."
)
PREDICTS = (
    "Pearson's r of each distance, measured before the distillation, with the share absorbed. Over problems: interval "
    "by bootstrap over problems (and seeds, if there are several) with the same students, which is what other problems "
    "would change. Over students: Fisher's interval, for other students like these. Without one: the smallest and "
    "the largest r if any one student is left out. Slope: share absorbed per unit of the distance."
)
DISTANCES = (
    "Of each student from its teacher before the distillation, on {:,} validation problems of the teacher's capability "
    "(of its own, where that is said); 95% intervals by bootstrap over problems. Overlap and symmetric KL on the "
    "student's rollouts, low support and KL on those of the teacher (or base)."
)
RLVR = (
    "Overlap and symmetric KL of experts with the base, on the experts' own rollouts on {:,} validation problems of "
    "their own capability, and KL on the base's; 95% intervals by bootstrap over problems."
)


def task_of(study: PilotSettings) -> str:
    """What the models were tested on, synthetic parts included."""
    config = study.rlvr(study.seeds[0], study.student.capability)
    sampled = "greedy" if config.eval.samples == 1 else f"{config.eval.samples} samples each"
    return f"{describe(config)}; {config.eval.problems:,} test problems, {sampled}; opd.loss {config.opd.loss}."


def students_table(study: PilotSettings, result: PilotResult) -> Table:
    """A row per student, also of those without a gain."""
    rows = []
    for seed in study.seeds:
        for updates in study.student.updates:
            key = seed, updates
            found, gain = result.accuracies.get(key), result.analysis.gains.get(key)
            cells = (ABSENT,) * 3 if found is None else (found.before, found.after, found.teacher)
            why = result.missing.get(key)
            if why is not None:
                absorbed = f"not run: {why}" if why != "not run" else why
            else:
                absorbed = f"teacher not ahead by {study.least_advantage:.0%}" if gain is None else _number(gain, 2)
            rows.append((str(updates), str(seed), *map(_percent, cells), absorbed))
    return Table(
        ("updates of the student", "seed", "before, %", "after, %", "teacher, %", "share absorbed"), tuple(rows)
    )


def relations_table(result: PilotResult, names: Mapping[str, str]) -> Table:
    """A row per predictor, strongest first; those without a correlation last."""
    rows = []
    by_strength = sorted(names, key=lambda name: -abs(line.r) if (line := result.analysis.relations[name].line) else 1)
    for name in by_strength:
        relation = result.analysis.relations[name]
        if (line := relation.line) is None:
            rows.append((names[name], "not defined", *[ABSENT] * 6))
            continue
        bounds = relation.over_problems
        rows.append(
            (
                names[name],
                f"{line.r:+.2f}",
                ABSENT if bounds is None else _bounds((bounds.low, bounds.high)),
                _bounds(relation.over_students),
                _bounds(relation.without_one),
                f"{line.r2:.2f}" if relation.r2 is None else _number(relation.r2, 2),
                f"{line.slope:+.3g}",
                str(line.n),
            )
        )
    header = ("predictor", "r", "over problems", "over students", "without one", "R²", "slope", "students")
    return Table(header, tuple(rows))


def distances_table(study: PilotSettings, result: PilotResult) -> Table:
    """A row per student, a column per predictor."""
    names = predictors(study)
    rows = [
        (str(updates), str(seed), *(_number(values.get(name), 3) for name in names))
        for (seed, updates), values in result.analysis.values.items()
    ]
    header = ("updates of the student", "seed", *(f"{label} ({unit(name)})" for name, label in names.items()))
    return Table(header, tuple(rows))


def curves_table(result: PilotResult) -> Table | None:
    """A row per measured model."""
    rows = [
        (f"{capability}, seed {seed}", str(updates), *(_number(value, 3) for value in _shown(values).values()))
        for (capability, seed), curve in result.curves.items()
        for updates, values in sorted(curve.items())
    ]
    if not rows:
        return None
    first = next(iter(next(iter(result.curves.values())).values()))
    names = {"symkl": "symmetric KL", "kl": "KL(base ‖ expert)"}
    return Table(("expert", "updates", *(names.get(name, name) for name in _shown(first))), tuple(rows))


def notes_of(result: PilotResult, names: Mapping[str, str]) -> list[str]:
    """What must be known to read the correlations."""
    gains = result.analysis.gains.values()
    count, seeds = sum(gain is not None for gain in gains), len({seed for seed, _ in result.analysis.gains})
    notes = [
        f"Students of one seed are one model at several times, not {count} independent ones: the second interval takes "
        "them for independent, and is too narrow by that much. Distances and the share absorbed both change with the "
        "number of updates, so a correlation is no proof of a cause."
    ]
    if count < FEW:
        notes.append(
            f"{count} students: the first interval says how surely *these* were measured, and nothing about others, "
            "and predictors whose second intervals overlap are not told apart."
        )
    resting = [names[name] for name, relation in result.analysis.relations.items() if _rests_on_one(relation)]
    if resting:
        notes.append(f"Without one of the students, r is less than half as large, or turns: {'; '.join(resting)}.")
    if seeds == 1:
        notes.append("One seed: no interval says anything about other seeds.")
    return notes


def _shown(values: Mapping[str, Interval]) -> dict[str, Interval]:
    return {name: value for name, value in values.items() if name != "low_support"}


def _markdown(title: str, sections: list[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", section.caption]
        parts += [markdown_table(section.table)] if section.table else [section.missing]
        parts += ["\n".join(f"- {note}" for note in section.notes)]
        slug = section.slug
        parts += [f"![{section.title}](plots/{slug}.png)"] if section.image else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _rests_on_one(relation: Relation) -> bool:
    if relation.line is None or relation.without_one is None:
        return False
    sign = 1 if relation.line.r > 0 else -1
    return min(sign * r for r in relation.without_one) < abs(relation.line.r) / 2


def _bounds(bounds: tuple[float, float] | None) -> str:
    return ABSENT if bounds is None else f"[{bounds[0]:+.2f}, {bounds[1]:+.2f}]"


def _number(value: Interval | None, digits: int) -> str:
    if value is None:
        return ABSENT
    # A KL of equals is 0 but for rounding, on either side; adding 0 takes the sign from a rounded −0.
    mean, low, high = (f"{round(number, digits) + 0.0:.{digits}f}" for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _percent(value: Interval | str | None) -> str:
    if value is None or isinstance(value, str):
        return ABSENT
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
