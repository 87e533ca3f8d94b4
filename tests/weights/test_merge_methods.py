"""What each merge method is, on tensors in memory: definition and symmetries; and no bit depends on slices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_models import merged, stream
from torch import Tensor

from copd_megatron.weights.merge import sphere, trim
from copd_megatron.weights.merge.recipe import METHODS
from copd_megatron.weights.merge.stream import BLOCK, Workspace, order_of

ANY_NUMBER = [method for method in METHODS if method != "slerp"]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _family(count: int, size: int = 2000, by: float = 0.1) -> tuple[Tensor, list[Tensor]]:
    base = _random(0, size)
    return base, [base + by * _random(seed, size) for seed in range(1, count + 1)]


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_one_model_give_that_model(method: str) -> None:
    base, (tuned,) = _family(1)
    result = merged(method, base, [tuned, tuned.clone()], density=1.0)
    assert torch.allclose(result, tuned, rtol=1e-6, atol=float(base.abs().max()) * 2**-23)


@pytest.mark.parametrize("method", METHODS)
def test_what_no_branch_has_changed_stays(method: str) -> None:
    base = _random(0, 500)
    assert torch.allclose(merged(method, base, [base, base.clone()]), base, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [method for method in ANY_NUMBER if not method.startswith("dare")])
def test_order_of_inputs_does_not_matter(method: str) -> None:
    base, inputs = _family(3)
    weights = [0.2, 0.5, 0.3]
    results = [
        merged(method, base, [inputs[i] for i in order], weights=[weights[i] for i in order], density=0.4)
        for order in itertools.permutations(range(3))
    ]
    assert all(torch.allclose(result, results[0], rtol=1e-6, atol=1e-6) for result in results)


@given(
    values=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([0.3, 0.25, -0.7]), min_size=4, max_size=4),
)
def test_canonical_order_leaves_nothing_to_the_order_given(values: list[list[float]], weights: list[float]) -> None:
    pairs = list(zip(map(torch.tensor, values), weights, strict=False))
    found = []
    for order in itertools.permutations(pairs):
        tensors, own = [tensor for tensor, _ in order], [weight for _, weight in order]
        canonical = order_of(stream(tensors[0], tensors), own)
        inputs, shares = [tensors[i] for i in canonical], [own[i] for i in canonical]
        found.append(merged("linear", tensors[0], inputs, weights=shares, normalise=False))
    assert all(torch.equal(result + 0.0, found[0] + 0.0) for result in found)


@pytest.mark.parametrize("method", METHODS)
def test_size_of_slices_does_not_change_a_bit(method: str) -> None:
    base, inputs = _family(2, 5 * BLOCK + 77)
    results = [merged(method, base, inputs, chunk, density=0.3) for chunk in (BLOCK, 2 * BLOCK, 8 * BLOCK)]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_slices_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="expected a multiple"):
        Workspace(1000)


def test_task_scales_the_sum_of_changes() -> None:
    base, inputs = _family(3)
    result = merged("task", base, inputs, weights=[1.0, 0.5, -0.25], normalise=False, scale=0.4)
    expected = base + 0.4 * (1.0 * (inputs[0] - base) + 0.5 * (inputs[1] - base) - 0.25 * (inputs[2] - base))
    assert torch.allclose(result, expected, atol=1e-6)


def test_ties_keeps_the_largest_and_lets_the_heavier_sign_prevail() -> None:
    base = torch.zeros(6)
    first = torch.tensor([5.0, -4.0, 0.1, 3.0, 0.2, 0.0])
    second = torch.tensor([3.0, 6.0, -0.1, 0.3, -2.0, 0.0])
    result = merged("ties", base, [first, second], weights=[1.0, 1.0], density=0.5)
    # Kept: 5, −4, 3 of the first and 3, 6, −2 of the second. Means over those that agree.
    assert result.tolist() == [4.0, 6.0, 0.0, 3.0, -2.0, 0.0]
    weighted = merged("ties", base, [first, second], weights=[2.0, 1.0], density=0.5)
    assert weighted.tolist() == pytest.approx([13 / 3, -4.0, 0.0, 3.0, -2.0, 0.0])
    summed = merged("ties", base, [first, second], weights=[1.0, 1.0], density=0.5, normalise=False, scale=2.0)
    assert summed.tolist() == [16.0, 12.0, 0.0, 6.0, -4.0, 0.0]


@pytest.mark.parametrize("distinct", [3, 50, 10**6])
@pytest.mark.parametrize("density", [0.0001, 0.25, 0.999])
def test_exactly_the_largest_changes_are_kept_and_of_equal_ones_the_first(distinct: int, density: float) -> None:
    size = 3 * BLOCK + 11
    source = torch.Generator().manual_seed(distinct)
    magnitudes = torch.randint(1, distinct + 1, (size,), generator=source) / distinct * 1e-3
    delta = magnitudes * (torch.randint(0, 2, (size,), generator=source) * 2 - 1)
    (cut,) = trim.cuts(stream(torch.zeros(size), [delta], BLOCK), density)
    kept = delta.clone()
    for part in kept.split(BLOCK):
        cut.apply(part)
    count = max(1, int(density * size))
    first = torch.sort(delta.abs(), descending=True, stable=True).indices[:count]
    expected = torch.zeros_like(delta)
    expected[first] = delta[first]
    assert torch.equal(kept, expected)


def test_unchanged_elements_may_be_among_those_kept() -> None:
    delta = torch.tensor([0.0, 2.0, 0.0, -1.0])
    (cut,) = trim.cuts(stream(torch.zeros(4), [delta]), 0.75)
    kept = delta.clone()
    cut.apply(kept)
    assert torch.equal(kept, delta)


def test_dare_divides_what_it_keeps_by_the_density() -> None:
    base, inputs = _family(1)
    result = merged("dare_linear", base, inputs, density=0.25)
    change, tuned = result - base, inputs[0] - base
    kept = change != 0
    assert torch.allclose(change[kept], 4 * tuned[kept], atol=1e-5)
    assert abs(float(kept.float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(base))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_of_one_model_is_unbiased(method: str) -> None:
    base, inputs = _family(1, 500)
    draws, total = 400, torch.zeros(500)
    for seed in range(draws):
        chance = [torch.Generator().manual_seed(seed)]
        total += merged(method, base, inputs, density=0.5, normalise=False, generators=chance) - base
    tuned = inputs[0] - base
    # δ/p with probability p has the standard deviation |δ| √(1/p − 1), here |δ|.
    assert ((total / draws - tuned).abs() <= 5 * tuned.abs() / math.sqrt(draws) + 1e-5).all()


def test_dare_ties_sums_the_kept_changes_of_the_prevailing_sign() -> None:
    base = torch.zeros(4)
    inputs = [torch.tensor([1.0, -3.0, 2.0, -1.0]), torch.tensor([2.0, 1.0, -5.0, -1.0])]
    result = merged("dare_ties", base, inputs, weights=[1.0, 1.0], density=1.0, normalise=False)
    assert result.tolist() == [3.0, -3.0, -5.0, -2.0]


def test_slerp_keeps_the_length_of_inputs_that_have_the_same() -> None:
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    result = merged("slerp", torch.zeros(2), [first, second], weights=[2 / 3, 1 / 3])
    assert result.tolist() == pytest.approx([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)])


def test_slerp_of_opposites_is_their_average() -> None:
    first = torch.tensor([1.0, 1.0])
    assert merged("slerp", torch.zeros(2), [first, -first], weights=[0.75, 0.25]).tolist() == [0.5, 0.5]


def test_multislerp_points_where_the_mean_direction_does_and_has_the_mean_length() -> None:
    base, inputs = _family(3)
    deltas = torch.stack(inputs).double() - base.double()
    alpha = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    lengths = deltas.norm(dim=1)
    mean = (alpha / lengths) @ deltas
    expected = base + mean / mean.norm() * (alpha @ lengths)
    result = merged("multislerp", base, inputs, weights=alpha.tolist())
    assert torch.allclose(result.double(), expected, atol=1e-6)


def test_karcher_mean_has_no_tangent_left() -> None:
    points = _random(3, 4, 6).double()
    lengths, alpha = points.norm(dim=1), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    coefficients = torch.tensor(sphere.karcher(points @ points.T, alpha.tolist()), dtype=torch.float64)
    mean = coefficients @ points
    assert float(mean.norm()) == pytest.approx(float(alpha @ lengths))
    mean, units = mean / mean.norm(), points / lengths[:, None]
    cosines = units @ mean
    logarithms = (cosines.acos() / (1 - cosines**2).sqrt())[:, None] * (units - cosines[:, None] * mean)
    assert float((alpha @ logarithms).norm()) < 1e-10


def test_karcher_of_two_is_slerp_of_directions() -> None:
    first, second = _random(1, 50), _random(2, 50)
    second = second / second.norm() * first.norm()
    both = [merged(method, torch.zeros(50), [first, second], weights=[0.3, 0.7]) for method in ("slerp", "karcher")]
    assert torch.allclose(*both, atol=1e-5)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_an_input_of_length_zero_counts_for_the_length_alone(method: str) -> None:
    zero, other = torch.zeros(3), torch.tensor([1.0, 2.0, 2.0])
    result = merged(method, torch.zeros(3), [zero, other], weights=[0.5, 0.5])
    assert result.tolist() == pytest.approx([0.5, 1.0, 1.0])


def test_inner_products_are_taken_in_double_precision() -> None:
    # Each product is 1, and 2²⁵ + 1 of them are more than float32 can count by ones.
    row = torch.ones(1)
    products = sphere.InnerProducts(1)
    products.add([torch.tensor([2.0**13])])
    products.add([row])
    assert float(products.total("x")[0, 0]) == 2.0**26 + 1
