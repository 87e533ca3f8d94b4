"""Checkpoints of several processes: exact with the optimizer sharded, and loadable by another number of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import SIZE, base_folder, make_samples, new_policy, toy_loss, weights_of, worst_difference

from copd_megatron.data.mini.model import ModelSize, build
from copd_megatron.errors import CopdError
from copd_megatron.policy import async_writer, checkpoint
from copd_megatron.policy import layout as layouts
from copd_megatron.policy.layout import Layout


def train(policy: Any, base: Path, steps: range) -> None:
    """The replicas share the samples of each step."""
    rank, size = layouts.data_parallel_rank(), layouts.data_parallel_size()
    for step in steps:
        policy.update(make_samples(base, prompts=4, group=2, seed=step)[rank::size], toy_loss)


def local_state(policy: Any) -> list[torch.Tensor]:
    """This rank's share of weights and moments."""
    found = [parameter.detach().clone() for parameter in policy.model.module.parameters()]
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [state["step"].clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
    return found


def resume_among_two(base: Path, root: Path, layout: Layout, distributed: bool) -> list[bool]:
    """Save after three updates and go on; load into a new policy and go on; say where the two are equal."""
    layouts.initialize(layout)
    rank = torch.distributed.get_rank()
    policy = new_policy(base, layout, distributed=distributed)
    train(policy, base, range(3))
    checkpoint.save(policy, root / "step_0000003", {"rank": rank})
    checkpoint.save(policy, root / "step_0000004", {"position": 12})
    resumed = new_policy(base, layout, distributed=distributed)
    state = checkpoint.load(resumed, root / "step_0000003")
    train(policy, base, range(3, 4))
    weights = weights_of(policy)
    if rank == 0:
        save_file(weights, root / "four.safetensors")
    train(policy, base, range(4, 6))
    train(resumed, base, range(3, 6))
    pairs = zip(local_state(policy), local_state(resumed), strict=True)
    layouts.shutdown()
    return [
        state == [{"rank": 0}, {"rank": 1}],
        policy.version == resumed.version,
        *(torch.equal(one, two) for one, two in pairs),
    ]


def leave(base: Path, root: Path, layout: Layout) -> None:
    """Save after three updates and make the fourth; rank 0, a replica's leader in any layout, keeps the weights."""
    layouts.initialize(layout)
    policy = new_policy(base, layout, distributed=True)
    train(policy, base, range(3))
    checkpoint.save(policy, root / "step_0000003", {})
    train(policy, base, range(3, 4))
    weights = weights_of(policy)
    if torch.distributed.get_rank() == 0:
        save_file(weights, root / "four.safetensors")


def arrive(base: Path, root: Path, layout: Layout) -> tuple[int, float]:
    """Load and make the fourth update: the version, and on rank 0 the largest difference of the weights."""
    layouts.initialize(layout)
    policy = new_policy(base, layout, distributed=True)
    checkpoint.load(policy, root / "step_0000003")
    train(policy, base, range(3, 4))
    weights = weights_of(policy)
    if torch.distributed.get_rank() != 0:
        return policy.version, 0.0
    return policy.version, worst_difference(weights, load_file(root / "four.safetensors"))


def fail_on_one_rank(base: Path, root: Path) -> str:
    """Rank 1 cannot read its part of the files; what this rank is told."""
    layout = Layout(world=2)
    layouts.initialize(layout)
    policy = new_policy(base, layout)
    if torch.distributed.get_rank() == 1:

        def unreadable(path: Path) -> dict[str, Any]:
            raise OSError(5, "Input/output error", str(path))

        async_writer.describe = unreadable
    try:
        checkpoint.save(policy, root / "step_0000000", {})
    except CopdError as error:
        return str(error)
    return "saved"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("policy") / "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "distributed"),
    [(Layout(world=2), True), (Layout(world=2, tp=2), False), (Layout(world=2, pp=2), False)],
    ids=["data", "tensor", "pipeline"],
)
def test_resumed_gang_equals_one_never_stopped_and_can_change_its_size(
    base: Path, tmp_path: Path, layout: Layout, distributed: bool
) -> None:
    for equal in gang.run(2, resume_among_two, base, tmp_path, layout, distributed):
        assert len(equal) > 30
        assert all(equal)
    layouts.initialize(Layout())
    try:
        alone = new_policy(base, distributed=distributed)
        assert checkpoint.load(alone, tmp_path / "step_0000004") == [{"position": 12}] * 2
        train(alone, base, range(3, 4))  # takes the moments along: from fresh ones the step would be another
        assert worst_difference(weights_of(alone), load_file(tmp_path / "four.safetensors")) < 2e-3
    finally:
        layouts.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(world=2), Layout(world=2, pp=2)),
        (Layout(world=2, pp=2), Layout(world=2)),
        (Layout(world=2, pp=2), Layout(world=2, tp=2)),
        (Layout(world=2, tp=2), Layout(world=2, pp=2)),
    ],
    ids=["data to pipeline", "pipeline to data", "pipeline to tensor", "tensor to pipeline"],
)
def test_moments_move_to_another_layout(base: Path, tmp_path: Path, before: Layout, after: Layout) -> None:
    gang.run(2, leave, base, tmp_path, before)
    results = gang.run(2, arrive, base, tmp_path, after)
    assert [version for version, _ in results] == [4, 4]
    assert max(difference for _, difference in results) < 2e-3


@pytest.mark.slow
def test_failure_of_one_rank_is_everyones(base: Path, tmp_path: Path) -> None:
    for told in gang.run(2, fail_on_one_rank, base, tmp_path):
        assert "could not be written" in told
        assert "Input/output error" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "before", "after"),
    [
        (replace(SIZE, layers=4), Layout(world=2, pp=2, vpp=2), Layout(world=2, cp=2)),
        (replace(SIZE, layers=4), Layout(world=2, cp=2), Layout(world=2, pp=2, vpp=2)),
        (replace(SIZE, experts=4, expert_mlp=24), Layout(world=2, pp=2), Layout(world=2)),
    ],
    ids=["vpp-cp", "cp-vpp", "experts"],
)
def test_moments_of_chunks_and_experts_move_too(tmp_path: Path, size: ModelSize, before: Layout, after: Layout) -> None:
    base = tmp_path / "base"
    build(base, 0, size)
    gang.run(2, leave, base, tmp_path, before)
    (version, difference), _ = gang.run(2, arrive, base, tmp_path, after)
    assert version == 4
    assert difference < 2e-3


def refused(base: Path, root: Path) -> str:
    layouts.initialize(Layout(world=2))
    policy = new_policy(base, Layout(world=2), distributed=True)
    try:
        checkpoint.load(policy, root / "step_0000003")
    except CopdError as error:
        return str(error)
    return "loaded"


@pytest.mark.slow
def test_divided_experts_stay_divided(tmp_path: Path) -> None:
    """megatron-core keeps their moments in an optimizer of their own, which other layouts do not have."""
    base = tmp_path / "base"
    build(base, 0, replace(SIZE, experts=4, expert_mlp=24))
    gang.run(2, leave, base, tmp_path, Layout(world=2, ep=2))
    assert all(
        "was saved with parallel.ep > 1 True, this run has False" in told
        for told in gang.run(2, refused, base, tmp_path)
    )
