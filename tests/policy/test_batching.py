"""Packing: nothing lost, nothing mixed up, prompts and their pictures computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from copd_megatron.errors import ConfigError
from copd_megatron.policy.batching import NATIVE, Packed, Sample, pack
from copd_megatron.rollout.types import Media, Prompt, Rollout, TeacherScores

IMAGE, VIDEO = 7, 70


def prompt(uid: str, *token_ids: int, media: Media | None = None) -> Prompt:
    return Prompt(uid, "text", token_ids, answer="", verifier="exact", text="", media=media)


def picture(value: float, patches: int = 4) -> Media:
    return Media(torch.full((patches, 6), value), torch.tensor([[1, 2, patches // 2]]))


def sample(question: Prompt, *token_ids: int, source: int = NATIVE, advantage: float = 0.0, top_k: int = 0) -> Sample:
    logprobs = -torch.tensor(token_ids, dtype=torch.float32)
    teacher = None
    if source != NATIVE:
        ids = torch.tensor(token_ids)[:, None].expand(-1, top_k)
        teacher = TeacherScores("peer", 3, 2 * logprobs, ids, -ids.float())
    rollout = Rollout(question, token_ids, logprobs, "stop", policy_version=3, text="", teacher=teacher)
    return Sample(rollout, source, advantage)


def positions(question: Prompt) -> torch.Tensor:
    """Three axes that differ, with the largest position not at the end."""
    time = torch.arange(len(question.token_ids))
    return torch.stack([time, time.flip(0) + 5, time])


def packed(samples: list[Sample], max_tokens: int = 1000, **options) -> Packed:
    counts = options.pop("counts", {s.source: sum(o.source == s.source for o in samples) for s in samples})
    return pack(samples, max_tokens, counts, positions, (IMAGE, VIDEO), **options)


def groups(count: int, size: int, prompt_tokens: int = 5) -> list[Sample]:
    """`size` responses of 1 to `size` tokens to each of `count` prompts; every token id occurs once."""
    fresh = iter(range(10, 100_000))
    samples = []
    for number in range(count):
        question = prompt(f"p{number}", *(next(fresh) for _ in range(prompt_tokens)))
        samples += [sample(question, *(next(fresh) for _ in range(length + 1))) for length in range(size)]
    return samples


def test_every_response_can_be_read_back_from_its_micro_batch() -> None:
    samples = groups(6, 4)
    result = packed(samples, max_tokens=40)
    assert sorted(index for members in result.order for index in members) == list(range(len(samples)))
    for batch, members in zip(result.microbatches, result.order, strict=True):
        segments = batch.segments
        prompts = torch.split(batch.token_ids[: segments.prompt_lengths.sum()], segments.prompt_lengths.tolist())
        inputs = torch.split(batch.token_ids[segments.prompt_lengths.sum() :], segments.response_lengths.tolist())
        for row, index in enumerate(members):
            rollout = samples[index].rollout
            assert tuple(prompts[segments.prompt_of[row]].tolist()) == rollout.prompt.token_ids
            assert tuple(inputs[row].tolist()) == rollout.token_ids[:-1]
            mine = batch.sequence == row
            assert tuple(batch.targets[mine].tolist()) == rollout.token_ids
            assert torch.equal(batch.signals.engine_logprobs[mine], rollout.logprobs)
            predecessors = (rollout.prompt.token_ids[-1], *rollout.token_ids[:-1])
            assert tuple(batch.token_ids[batch.logit_index[mine]].tolist()) == predecessors


def test_responses_continue_behind_the_largest_position_of_their_prompt() -> None:
    short, long = prompt("a", 10, 11), prompt("b", 12, 13, 14, 15)
    batch = packed([sample(short, 20, 21, 22), sample(long, 30), sample(long, 31, 32)]).microbatches[0]
    assert torch.equal(batch.position_ids[:, :2], positions(short))
    assert torch.equal(batch.position_ids[:, 2:6], positions(long))
    assert batch.position_ids[:, 6:].tolist() == [[7, 8, 9]] * 3  # 6 and 8 are the prompts' largest positions


def test_weights_sum_to_one_per_source_over_all_ranks() -> None:
    question = prompt("a", 1, 2)
    ranks = [
        [sample(question, 3, 4, 5), sample(question, 3, source=0)],
        [sample(question, 3), sample(question, 4, 5), sample(question, 6, 6, 6, 6, source=0)],
    ]
    counts = {NATIVE: 3, 0: 2}
    total = {NATIVE: 0.0, 0: 0.0}
    for samples in ranks:
        for batch in packed(samples, counts=counts).microbatches:
            for source in total:
                total[source] += float(batch.signals.weight[batch.signals.source == source].sum())
            for row in range(int(batch.sequence.max()) + 1):  # every sequence of a source has the same say
                mine = batch.sequence == row
                source = int(batch.signals.source[mine][0])
                assert float(batch.signals.weight[mine].sum()) == pytest.approx(1 / counts[source])
    assert total == pytest.approx({NATIVE: 1.0, 0: 1.0})


def test_advantage_and_source_follow_their_tokens() -> None:
    question = prompt("a", 1, 2)
    samples = [sample(question, 3, 4, advantage=0.5), sample(question, 5, advantage=-2.0)]
    signals = packed(samples).microbatches[0].signals
    assert signals.advantage.tolist() == [0.5, 0.5, -2.0]
    assert signals.source.tolist() == [NATIVE] * 3
    assert signals.teacher_logprobs is None
    assert signals.old_logprobs is None


def test_prompt_and_pictures_of_a_group_are_packed_once() -> None:
    pictured = prompt("a", 1, IMAGE, 2, media=picture(1.0))
    other = prompt("b", IMAGE, 3, 4, media=picture(2.0))
    plain = prompt("c", 5, 6)
    samples = [sample(q, 8, IMAGE, 9) for q in (pictured, other, pictured, plain, pictured)]
    result = packed(samples)
    (batch,) = result.microbatches
    assert batch.segments.prompt_lengths.tolist() == [3, 3, 2]
    assert batch.segments.prompt_of.tolist() == [0, 0, 0, 1, 2]
    assert batch.pixel_values is not None
    assert batch.grid_thw is not None
    assert batch.visual_index is not None
    assert batch.pixel_values[:, 0].tolist() == [1.0] * 4 + [2.0] * 4
    assert batch.grid_thw.tolist() == [[1, 2, 2], [1, 2, 2]]
    assert batch.visual_index.tolist() == [1, 3], "a sampled image token has no patch"
    assert result.tokens == 8 + 5 * 2
    assert result.unshared_tokens == 3 * 5 + 5 + 4


def test_images_and_videos_fill_the_tokens_of_both_in_order() -> None:
    media = Media(torch.arange(12.0)[:, None], torch.tensor([[2, 2, 2], [1, 2, 2]]), videos=(0,), seconds=(1.0,))
    batch = packed([sample(prompt("a", 1, VIDEO, 2, VIDEO, IMAGE, media=media), VIDEO, 4)]).microbatches[0]
    assert batch.visual_index is not None
    assert batch.visual_index.tolist() == [1, 3, 4]


def test_text_only_micro_batches_carry_no_pictures() -> None:
    batch = packed([sample(prompt("a", IMAGE, 2), 3)]).microbatches[0]
    assert (batch.pixel_values, batch.grid_thw, batch.visual_index) == (None, None, None)


def test_same_name_with_another_picture_is_another_prompt() -> None:
    one, other = (prompt("a", 1, IMAGE, media=picture(value)) for value in (1.0, 2.0))
    again = prompt("a", 1, IMAGE, media=picture(1.0))
    batch = packed([sample(one, 3), sample(other, 4), sample(again, 5)]).microbatches[0]
    slow, fast = (replace(one, media=replace(picture(1.0), videos=(0,), seconds=(seconds,))) for seconds in (1.0, 2.0))
    assert packed([sample(slow, 3), sample(fast, 3), sample(one, 3)]).tokens == 6, "no two of them are the same"
    assert batch.segments.prompt_of.tolist() == [0, 0, 1]
    assert batch.targets.tolist() == [3, 5, 4]


@pytest.mark.parametrize("max_tokens", [20, 33, 64, 1000])
def test_budget_holds_and_groups_that_fit_stay_together(max_tokens: int) -> None:
    result = packed(groups(8, 4), max_tokens)
    assert all(batch.segments.tokens <= max_tokens for batch in result.microbatches)
    for members in result.order:
        assert {index // 4 for index in members} == {index // 4 for index in members if index % 4 == 0}
        assert len(members) % 4 == 0
    assert len(result.microbatches) <= -(-result.tokens // max_tokens) * 2


def test_micro_batches_are_of_about_equal_size() -> None:
    question = [prompt(f"p{n}", *range(10 + n)) for n in range(20)]
    sizes = [batch.segments.tokens for batch in packed([sample(q, 1) for q in question], 110).microbatches]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 4


def test_group_over_the_budget_is_split_and_its_prompt_repeated() -> None:
    question = prompt("a", *range(10))
    samples = [sample(question, *range(6)) for _ in range(5)]
    result = packed(samples, max_tokens=20)
    assert result.order == [[0, 1], [2, 3], [4]]
    assert [batch.segments.prompt_lengths.tolist() for batch in result.microbatches] == [[10]] * 3
    assert result.tokens == 3 * 10 + 5 * 5


def test_sequence_over_the_budget_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"a: a prompt of 10 tokens and a response of 6 .* at least 15"):
        packed([sample(prompt("a", *range(10)), *range(6))], max_tokens=14)
    assert packed([sample(prompt("a", *range(10)), *range(6))], max_tokens=15).tokens == 15


def test_packing_depends_on_the_samples_alone() -> None:
    first, second = (packed(groups(9, 3), max_tokens=30) for _ in range(2))
    assert first.order == second.order
    for one, other in zip(first.microbatches, second.microbatches, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


def test_teacher_scores_stand_beside_their_tokens_and_zeros_beside_native_ones() -> None:
    question = prompt("a", 1, 2)
    samples = [sample(question, 3, 4), sample(question, 5, 6, source=1, top_k=2)]
    signals = packed(samples).microbatches[0].signals
    assert signals.source.tolist() == [NATIVE, NATIVE, 1, 1]
    assert signals.teacher_logprobs is not None
    assert signals.teacher_top_ids is not None
    assert signals.teacher_top_logprobs is not None
    assert signals.teacher_logprobs.tolist() == [0, 0, -10, -12]
    assert signals.teacher_top_ids.tolist() == [[0, 0], [0, 0], [5, 5], [6, 6]]
    assert signals.teacher_top_logprobs.tolist() == [[0, 0], [0, 0], [-5, -5], [-6, -6]]


def test_old_logprobs_follow_their_samples_through_the_reordering() -> None:
    samples = groups(6, 3)
    old = [float(index) + torch.arange(len(s.rollout.token_ids)) / 100 for index, s in enumerate(samples)]
    result = packed(samples, max_tokens=20, old_logprobs=old)
    assert len(result.microbatches) > 1
    for batch, members in zip(result.microbatches, result.order, strict=True):
        assert batch.signals.old_logprobs is not None
        assert torch.equal(batch.signals.old_logprobs, torch.cat([old[index] for index in members]))


def test_by_source_no_micro_batch_mixes_and_scores_may_still_be_missing() -> None:
    samples = [sample(prompt(f"q{number}", 1, 2), *range(1, 4 + number), source=number % 3 - 1) for number in range(9)]
    bare = [replace(each, rollout=replace(each.rollout, teacher=None)) for each in samples]
    counts = {NATIVE: 3, 0: 3, 1: 3}
    packed = pack(bare, 20, counts, positions, IMAGE, by_source=True)
    sources = [batch.signals.source.unique().tolist() for batch in packed.microbatches]
    assert sources == sorted(sources)
    assert {source for found in sources for source in found} == {NATIVE, 0, 1}
    assert all(len(found) == 1 for found in sources)
    assert sorted(index for members in packed.order for index in members) == list(range(9))
    for batch, members in zip(packed.microbatches, packed.order, strict=True):
        assert batch.targets.tolist() == [token for index in members for token in bare[index].rollout.token_ids]
    with pytest.raises(ValueError, match="carries no teacher scores"):
        pack(bare, 20, counts, positions, IMAGE)


def test_contradictory_samples_are_refused_by_name() -> None:
    question = prompt("a", 1, 2)
    good = sample(question, 3, 4)
    with pytest.raises(ValueError, match="a: 2 response tokens but 1 log-prob"):
        packed([replace(good, rollout=replace(good.rollout, logprobs=torch.zeros(1)))])
    with pytest.raises(ValueError, match="a: source 0 is a teacher"):
        packed([replace(good, source=0)])
    with pytest.raises(ValueError, match="not in counts"):
        packed([good], counts={0: 1})
    with pytest.raises(ValueError, match="at least one token"):
        packed([sample(question)])
    with pytest.raises(ValueError, match="differ in top-k"):
        packed([sample(question, 3, source=0, top_k=2), sample(question, 3, source=1, top_k=4)])
    scored = sample(question, 3, 4, source=0, top_k=2)
    with pytest.raises(ValueError, match="scored 2 of 1 tokens"):
        packed([replace(scored, rollout=replace(scored.rollout, token_ids=(3,), logprobs=torch.zeros(1)))])


def test_no_samples_make_no_micro_batches() -> None:
    assert packed([]).microbatches == []
