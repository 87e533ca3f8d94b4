"""What a merge has to bring together, per tensor and per layer: a JSON file and a picture of layers × modules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from copd_megatron.files import atomic_path, write_atomic
from copd_megatron.weights.merge.recipe import Recipe

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.(?P<module>.+)$")
_CELL_WIDTH, _CELL_HEIGHT = 0.13, 0.2  # inches


def write_report(
    path: Path, measured: Mapping[str, dict[str, Any]], base: str, inputs: Sequence[str], recipe: Recipe
) -> None:
    """Write `path` (JSON) and beside it, as .png, a map of the distances from the base and of sign conflicts.

    `measured` has the result of `measure.measure` by tensor. Tensors outside layers are layers of their own.
    """
    layers: dict[str, list[dict[str, Any]]] = {}
    for name, facts in sorted(measured.items()):
        layers.setdefault(layer_of(name), []).append(facts)
    tensors = {name: summary([facts]) for name, facts in sorted(measured.items())}
    content = {
        "base": base,
        "inputs": list(inputs),
        "recipe": asdict(recipe),
        "layers": {layer: summary(parts) for layer, parts in layers.items()},
        "tensors": tensors,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    picture = heat_map(tensors, inputs)
    if picture is not None:
        with atomic_path(path.with_suffix(".png")) as temporary:
            temporary.write_bytes(picture)


def layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; the name itself outside layers."""
    found = _LAYER.match(name)
    return f"{found['stack']}.{found['number']}" if found else name


def summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of tensors taken together: elements; per input the distance from the base (L2) and that relative to the base's
    length; the cosine between each two inputs' changes; the share of elements in which their signs conflict.

    None stands for what is not defined: a share of length 0, the direction of no change.
    """
    count = len(parts[0]["products"])
    elements = sum(part["elements"] for part in parts)
    base = math.sqrt(sum(part["base"] for part in parts))
    products = [[sum(part["products"][i][j] for part in parts) for j in range(count)] for i in range(count)]
    lengths = [math.sqrt(max(products[i][i], 0.0)) for i in range(count)]
    return {
        "elements": elements,
        "distance": lengths,
        "relative": [length / base if base else None for length in lengths],
        "cosine": {
            f"{i + 1}-{j + 1}": products[i][j] / lengths[i] / lengths[j] if lengths[i] and lengths[j] else None
            for i in range(count)
            for j in range(i + 1, count)
        },
        "conflicts": sum(part["conflicts"] for part in parts) / elements if elements else 0.0,
    }


def heat_map(tensors: Mapping[str, Mapping[str, Any]], inputs: Sequence[str]) -> bytes | None:
    """A PNG: for each stack of layers a row of maps, module × layer: each input's relative distance from the base, and
    the share of elements in conflict. None if there are no layers."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from copd_megatron.observe.plot_style import literal, png, style

    stacks: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for name, facts in tensors.items():
        if found := _LAYER.match(name):
            module = found["module"].removesuffix(".weight")
            stacks.setdefault(found["stack"], {})[module, int(found["number"])] = facts
    if not stacks:
        return None
    distances = [value for cells in stacks.values() for cell in cells.values() for value in cell["relative"] if value]
    top = max(distances, default=1.0)
    norm = LogNorm(max(min(distances, default=0.1), top * 1e-4), max(top, 1e-30) * 1.0001)
    rows = {stack: sorted({module for module, _ in cells}) for stack, cells in stacks.items()}
    columns = len(inputs) + (len(inputs) > 1)
    most = max(layer for cells in stacks.values() for _, layer in cells) + 1
    width = 3.2 + columns * max(2.6, most * _CELL_WIDTH)
    heights = [max(len(modules), 2) * _CELL_HEIGHT + 0.75 for modules in rows.values()]
    with style():
        figure = Figure(figsize=(width, sum(heights) + 1.2), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row", height_ratios=heights)
        for number, (stack, modules) in enumerate(rows.items()):
            cells = stacks[stack]
            layers = max(layer for _, layer in cells) + 1
            for column, axis in enumerate(grid[number]):
                conflict = column == len(inputs)
                values = [[_value(cells.get((module, layer)), column, conflict) for layer in range(layers)]
                          for module in modules]  # fmt: skip
                scale: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0, "cmap": "magma"}
                picture = axis.imshow(
                    values, aspect="auto", **(scale if conflict else {"norm": norm, "cmap": "viridis"})
                )
                axis.set_facecolor("#BBBBBB")
                axis.grid(visible=False)
                axis.set_yticks(range(len(modules)), [literal(module) for module in modules], fontsize=8)
                axis.set_xticks(range(0, layers, max(1, math.ceil(layers / 10))))
                axis.tick_params(axis="x", labelsize=8)
                axis.set_xlabel(f"layer of {literal(stack)}", fontsize=9)
                if number == 0:
                    axis.set_title("signs in conflict" if conflict else literal(_short(inputs[column])), fontsize=10)
                if number == len(rows) - 1:
                    label = "share of elements" if conflict else "‖input − base‖ / ‖base‖"
                    figure.colorbar(picture, ax=grid[:, column], location="bottom", label=label, shrink=0.9, aspect=30)
        figure.suptitle("What is merged: changes from the base, by module and layer (grey: none)", fontsize=11)
        return png(figure)


def _value(facts: Mapping[str, Any] | None, column: int, conflict: bool) -> float:
    if facts is None:
        return math.nan
    value = facts["conflicts"] if conflict else facts["relative"][column]
    return math.nan if value is None or (value == 0 and not conflict) else float(value)


def _short(label: str) -> str:
    return label if len(label) <= 34 else "…" + label[-33:]
