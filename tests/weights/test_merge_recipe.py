"""A recipe that cannot be meant is refused before any file is looked at; what is left out has the method's default."""

from __future__ import annotations

import pytest

from copd_megatron.config import RunConfig
from copd_megatron.config.training import MergeConfig
from copd_megatron.errors import ConfigError
from copd_megatron.weights.merge.recipe import METHODS, Recipe


def test_unknown_method_names_what_exists() -> None:
    with pytest.raises(ConfigError, match="'blend' does not exist; there is: linear, slerp, task"):
        Recipe("blend")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"weights": (float("nan"), 1.0)}, "must be finite"),
        ({"weights": (1.0, -1.0)}, "sum to 0"),
        ({"method": "karcher", "weights": (1.0, -0.5)}, "takes no negative weights"),
        ({"method": "ties", "density": 0.0}, "expected more than 0 and at most 1"),
        ({"method": "dare_linear", "density": 1.01}, "expected more than 0 and at most 1"),
        ({"method": "ties", "density": float("nan")}, "expected more than 0 and at most 1"),
        ({"method": "linear", "density": 0.5}, "linear has no use for density"),
        ({"method": "slerp", "scale": 1.0}, "slerp has no use for scale"),
        ({"method": "karcher", "normalise": False}, "karcher has no use for normalise"),
        ({"method": "task", "scale": float("inf")}, "expected a finite number"),
        ({"tensor_weights": (("x*", (1.0, -1.0)),)}, r"merge weights of x\* .* sum to 0"),
    ],
)
def test_unusable_parameters_are_refused(given: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Recipe(**given)


@pytest.mark.parametrize(
    ("recipe", "count", "complaint"),
    [
        (Recipe(), 0, "nothing to merge"),
        (Recipe("slerp"), 3, "slerp merges two models, 3 are given"),
        (Recipe("multislerp"), 1, "two or more"),
        (Recipe(weights=(1.0,)), 2, "merge weights: 1 given for 2 models"),
        (Recipe(tensor_weights=(("x", (1.0,)),)), 2, "weights of x: 1 given for 2 models"),
    ],
)
def test_recipes_for_another_number_of_models_are_refused(recipe: Recipe, count: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        recipe.check_inputs(count)


def test_weights_are_equal_unless_given_and_the_last_pattern_that_matches_counts() -> None:
    assert Recipe().weights_of("x", 4) == (0.25,) * 4
    recipe = Recipe(weights=(3.0, 1.0), tensor_weights=(("a.*", (0.0, 1.0)), ("*.b", (1.0, 0.0))))
    assert [recipe.weights_of(name, 2) for name in ("c", "a.c", "a.b")] == [(3.0, 1.0), (0.0, 1.0), (1.0, 0.0)]


def test_defaults_are_those_of_the_methods() -> None:
    divided = {method for method in METHODS if Recipe(method).divides}
    assert divided == {"linear", "slerp", "ties", "multislerp", "karcher"}
    assert (Recipe("ties").kept, Recipe("ties").factor) == (0.5, 1.0)


BRANCHES = tuple({"name": name, "data": {"mini": {"modality": "text"}}} for name in ("a", "b"))


def test_a_run_merges_linearly_with_equal_weights_unless_told_otherwise() -> None:
    assert RunConfig(base="base", branches=BRANCHES).merge.recipe(["a", "b"], 3) == Recipe(seed=3)


def test_weights_of_a_run_are_given_by_name_of_the_branch() -> None:
    merge = MergeConfig(
        method="ties",
        weights={"b": 0.2, "a": 0.8},
        tensor_weights={"model.visual.*": {"a": 0, "b": 1}},
        density=0.3,
        scale=0.9,
        normalise=False,
    )
    assert merge.recipe(["a", "b"], 1) == Recipe(
        "ties", (0.8, 0.2), (("model.visual.*", (0.0, 1.0)),), normalise=False, density=0.3, scale=0.9, seed=1
    )


@pytest.mark.parametrize(
    ("merge", "complaint"),
    [
        ({"method": "blend"}, "method"),
        ({"weights": {"a": 1.0}}, r"merge.weights: expected one weight for each of \['a', 'b'\], found \['a'\]"),
        (
            {"tensor_weights": {"x.*": {"a": 1, "c": 0}}},
            r"merge.tensor_weights\['x\.\*'\]: expected one weight for each",
        ),
        ({"method": "ties", "density": 2.0}, "density is 2; expected more than 0"),
        ({"density": 0.5}, "linear has no use for density"),
    ],
)
def test_a_run_that_cannot_be_merged_is_not_started(merge: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RunConfig(base="base", branches=BRANCHES, merge=merge)


def test_slerp_is_for_two_branches() -> None:
    third = {"name": "c", "data": {"mini": {"modality": "text"}}}
    with pytest.raises(ValueError, match="slerp merges two models, 3 are given"):
        RunConfig(base="base", branches=(*BRANCHES, third), topology="mesh", merge={"method": "slerp"})
