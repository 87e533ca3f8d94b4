"""Students of made-up outcomes: what absorbed how much, what goes with it, and how surely."""

import random
from dataclasses import replace

import pytest

from copd_megatron.pilot.analysis import Quantity, Relation, Student, analyse, value_of


def outcomes(share, problems=400, seed=0):
    """Rewards that are 1 on the easiest problems, in an order of the seed's."""
    order = list(range(problems))
    random.Random(seed).shuffle(order)
    return [(float(rank < round(share * problems)), 1.0) for rank in order]


def noisy(mean, problems=400, spread=0.1, seed="x"):
    draw = random.Random(str(seed))
    return [(draw.gauss(mean, spread) * 5, 5.0) for _ in range(problems)]


def student(updates, gain, overlap, seed=0, before=0.4, teacher=0.8, **changes):
    after = None if gain is None else outcomes(before + gain * (teacher - before), seed=seed)
    given = {
        "seed": seed,
        "updates": updates,
        "before": outcomes(before, seed=seed),
        "after": after,
        "teacher": outcomes(teacher, seed=seed),
        "predictors": {"overlap": Quantity("validation", noisy(overlap, seed=(updates, seed)))},
    }
    return Student(**{**given, **changes})


STUDENTS = [student(0, 0.9, 0.95), student(30, 0.7, 0.9), student(60, 0.5, 0.8), student(120, 0.2, 0.7)]


def test_share_absorbed_is_that_of_the_teachers_advantage():
    found = analyse(STUDENTS, 0.02, 500)
    assert [gain.mean for gain in found.gains.values()] == pytest.approx([0.9, 0.7, 0.5, 0.2])
    for gain in found.gains.values():
        assert gain.low < gain.mean < gain.high
        assert gain.high - gain.low < 0.2
    relation = found.relations["overlap"]
    assert relation.line.n == 4
    assert relation.line.r > 0.95
    assert relation.line.r2 == pytest.approx(relation.line.r**2)
    assert 0.9 < relation.over_problems.low <= relation.line.r <= relation.over_problems.high <= 1
    assert relation.over_students[0] < relation.over_problems.low, "four students say little about others"
    assert 0.9 < relation.without_one[0] <= relation.without_one[1] <= 1
    xs = [x for x, _, _ in relation.band]
    assert (xs[0], xs[-1]) == (
        pytest.approx(found.values[0, 120]["overlap"].mean),
        pytest.approx(found.values[0, 0]["overlap"].mean),
    )
    assert all(low <= relation.line.intercept + relation.line.slope * x <= high for x, low, high in relation.band)


def test_shares_are_paired_by_problem():
    """Before, after and teacher solve nested sets of problems, whose differences vary less than unpaired ones."""
    paired = analyse([student(0, 0.5, 0.9)], 0.02, 1000).gains[0, 0]
    other = replace(student(0, 0.5, 0.9), after=outcomes(0.6, seed=7), teacher=outcomes(0.8, seed=8))
    unpaired = analyse([other], 0.02, 1000).gains[0, 0]
    assert unpaired.high - unpaired.low > 1.2 * (paired.high - paired.low)


def test_interval_over_problems_grows_with_the_noise_of_the_measurement():
    def width(spread):
        given = [
            student(at, gain, 0, predictors={"overlap": Quantity("validation", noisy(1 - at / 100, 50, spread, at))})
            for at, gain in ((0, 0.9), (10, 0.6), (20, 0.5), (30, 0.1))
        ]
        bounds = analyse(given, 0.02, 500).relations["overlap"].over_problems
        return bounds.high - bounds.low

    assert width(0.05) < 0.2 < width(1.0)


def test_students_without_a_gain_take_part_in_no_line():
    ahead = student(200, 0.5, 0.2, before=0.79, teacher=0.8)
    lost = student(300, None, 0.1)
    unmeasured = student(400, 0.9, 0.0, predictors={})
    found = analyse([*STUDENTS, ahead, lost, unmeasured], 0.02, 500)
    assert found.gains[0, 200] is None, "the teacher is ahead by one point"
    assert found.gains[0, 300] is None
    assert found.gains[0, 400].mean == pytest.approx(0.9)
    assert found.values[0, 400] == {}
    assert found.values[0, 300]["overlap"].mean == pytest.approx(0.1, abs=0.02)
    assert found.relations["overlap"].line == analyse(STUDENTS, 0.02, 500).relations["overlap"].line


def test_constant_predictor_predicts_nothing():
    given = [
        student(at, gain, 0, predictors={"overlap": Quantity("validation", [(1.0, 1.0)] * 50)})
        for at, gain in ((0, 0.9), (10, 0.6), (20, 0.1))
    ]
    relation = analyse(given, 0.02, 200).relations["overlap"]
    assert relation == Relation(None, None, None, None, None, ())


def test_two_students_give_no_correlation_and_three_no_interval_for_others():
    assert analyse(STUDENTS[:2], 0.02, 200).relations["overlap"].line is None
    three = analyse(STUDENTS[:3], 0.02, 200).relations["overlap"]
    assert three.line.n == 3
    assert three.over_problems is not None
    assert three.over_students is None
    assert three.without_one is None


def test_no_interval_where_the_advantage_is_within_its_own_noise():
    narrow = [student(at, gain, 0.9 - at / 100, before=0.78, teacher=0.805) for at, gain in ((0, 1.0), (10, 0.4))]
    assert analyse(narrow, 0.02, 500).gains == {(0, 0): None, (0, 10): None}


def test_seeds_that_disagree_widen_the_interval():
    def both(turn):
        first = [student(at, gain, 1 - at / 100) for at, gain in ((0, 0.9), (20, 0.6), (40, 0.3))]
        second = [student(at, turn(gain), 1 - at / 100, seed=1) for at, gain in ((0, 0.9), (20, 0.6), (40, 0.3))]
        return analyse([*first, *second], 0.02, 500).relations["overlap"]

    alike, apart = both(lambda gain: gain), both(lambda gain: 1.2 - gain)
    assert alike.line.n == apart.line.n == 6
    assert alike.over_problems.low > 0.9
    assert (apart.over_problems.low, apart.over_problems.high) == (
        pytest.approx(-1, abs=0.05), pytest.approx(1, abs=0.05))  # fmt: skip


def test_models_on_different_problems_are_refused():
    with pytest.raises(ValueError, match="seed 0, gain: measured on 400 problems, and on 399"):
        analyse([student(0, 0.5, 0.9, after=outcomes(0.5)[1:])], 0.02, 100)


def test_the_same_numbers_come_out_again():
    assert analyse(STUDENTS, 0.02, 200) == analyse(STUDENTS, 0.02, 200)


def test_value_is_per_token_not_per_problem():
    found = value_of(Quantity("validation", [(1.0, 1.0), (0.0, 9.0)]), 0)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == (0, 1)
