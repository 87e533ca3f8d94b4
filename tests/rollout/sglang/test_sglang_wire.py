from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.rollout.positions import MediaTokens, prompt_positions
from copd_megatron.rollout.sglang import pixels, wire
from copd_megatron.rollout.types import Media, Prompt, Rollout, Sampling

TOKENS = wire.Tokens(vocabulary=20, media=MediaTokens(image=4, video=3, merge=2))
SAMPLING = Sampling(max_new_tokens=3, stop_token_ids=(1,), n=2)
VERSION = "run/text/7"
PROMPT = Prompt("p", "text", (8, 9, 10, 11), "", "exact", "")
ROLLOUT = Rollout(PROMPT, (5, 6, 1), torch.zeros(3), "stop", 7, "")


def sample_reply(ids: Any = (5, 6, 1), reason: str = "stop", **changes: Any) -> dict[str, Any]:
    meta = {
        "prompt_tokens": 4,
        "weight_version": VERSION,
        "weight_versions": [{"version": VERSION, "start": 0, "end": 3}],
        "finish_reason": {"type": reason},
        "output_token_logprobs": [[-0.5 * place, token, None] for place, token in enumerate(ids)],
    }
    return {"output_ids": list(ids), "meta_info": {**meta, **changes}}


def base64(values: Any, dtype: Any) -> str:
    return b64encode(np.asarray(values, dtype).tobytes()).decode()


def score_reply(**changes: Any) -> dict[str, Any]:
    meta = {
        "prompt_tokens": 7,
        "weight_version": VERSION,
        "input_token_logprobs": [[None, 11, None], [-0.5, 5, None], [-1.5, 6, None], [-2.5, 1, None]],
        "input_top_logprobs_val_flat_b64": base64([-0.5, -1, -0.1, -1.5, -0.2, -2.5], np.float32),
        "input_top_logprobs_idx_flat_b64": base64([5, 2, 3, 6, 2, 1], np.int32),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": [3, 2],
        "input_top_logprobs_null_prefix": 1,
    }
    return {"output_ids": [], "meta_info": {**meta, **changes}}


def read_sample(reply: Any) -> wire.Sampled:
    return wire.read_sample(reply, PROMPT, SAMPLING, VERSION, TOKENS)


def read_scores(reply: Any) -> wire.Scored:
    return wire.read_scores(reply, ROLLOUT, 2, VERSION, TOKENS)


def test_a_sample_is_read() -> None:
    sampled = read_sample(sample_reply())
    assert (sampled.token_ids, sampled.finish) == ((5, 6, 1), "stop")
    assert sampled.logprobs.tolist() == [0.0, -0.5, -1.0]
    assert sampled.logprobs.dtype == torch.float32
    assert read_sample(sample_reply((5, 6, 7), "length")).finish == "length"
    assert read_sample(sample_reply((5, 6, 1), "length")).finish == "stop"


def test_scores_are_read() -> None:
    scored = read_scores(score_reply())
    assert scored.logprobs.tolist() == [-0.5, -1.5, -2.5]
    assert scored.top_ids.tolist() == [[5, 2], [3, 6], [2, 1]]
    assert scored.top_logprobs.tolist() == [
        [-0.5, -1],
        [pytest.approx(-0.1), -1.5],
        [pytest.approx(-0.2), -2.5],
    ]
    assert scored.top_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "no meta_info"),
        ([], "no meta_info"),
        ({"output_ids": [1]}, "no meta_info"),
        (sample_reply(prompt_tokens=3), "the server read 3 tokens, it was sent 4"),
        (sample_reply(image_tokens=2), "saw 2 image tokens, the student 0"),
        (sample_reply(video_tokens=2), "saw 2 video tokens, the student 0"),
        (sample_reply(()), "0 tokens with 0"),
        ({**sample_reply(), "output_ids": None}, "no list"),
        ({**sample_reply(), "output_ids": [5, 6]}, "2 tokens with 3"),
        ({**sample_reply(), "output_ids": [5, 7, 1]}, "other tokens"),
        ({**sample_reply(), "output_ids": [5, "6", 1]}, "no list|tokens with"),
        (sample_reply((5, 20, 1)), "other tokens"),
        (sample_reply((5, -1, 1)), "other tokens"),
        (sample_reply(output_token_logprobs=[[0.0, 5], [None, 6], [0.0, 1]]), "cannot be read|is nan"),
        (sample_reply(output_token_logprobs=[[0.0, 5], [float("nan"), 6], [0.0, 1]]), "is nan"),
        (sample_reply(output_token_logprobs=[[0.0, 5], [], [0.0, 1]]), "cannot be read"),
        (sample_reply((5, 6), "abort"), "2 of 3 tokens, ended by 'abort'"),
        (sample_reply((5, 6), "length"), "2 of 3 tokens"),
        (sample_reply((5, 6, 7, 8), "length"), "4 of 3 tokens"),
        (sample_reply((1, 6, 1)), "3 of 3 tokens"),
        (sample_reply((5, 6, 7), "stop"), "ended at token 7, which is none of the stop tokens"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused(reply: Any, reason: str) -> None:
    with pytest.raises(wire.BadReply, match=reason):
        read_sample(reply)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (score_reply(prompt_tokens=4), "the server read 4 tokens, it was sent 7"),
        (score_reply(input_token_logprobs=None), "scores of no list"),
        (score_reply(input_token_logprobs=[[None, 11], [-0.5, 5]]), "scores of 2 tokens, expected 4"),
        (score_reply(input_token_logprobs=[[None, 11], [-1, 5], [-1, 5], [-1, 1]]), "other tokens"),
        (score_reply(input_token_logprobs=[[None, 11], [None, 5], [-1, 6], [-1, 1]]), "is NaN|cannot be read"),
        (score_reply(input_token_logprobs=[[None, 11], [float("nan"), 5], [-1, 6], [-1, 1]]), "is NaN"),
        (score_reply(input_top_logprobs_val_flat_b64=None), "cannot be read"),
        (score_reply(input_top_logprobs_val_flat_b64="!!"), "cannot be read"),
        (score_reply(input_top_logprobs_val_flat_b64=base64([-1.0], np.float32)), "expected"),
        (score_reply(input_top_logprobs_idx_flat_b64=base64([5, 2, 3, 6, 2, 20], np.int32)), "outside the vocabulary"),
        (score_reply(input_top_logprobs_val_flat_b64=base64([np.nan] * 6, np.float32)), "is NaN"),
        (score_reply(input_top_logprobs_val_flat_b64_dtype="float16"), "not float32 and int32"),
        (score_reply(input_top_logprobs_shape=[2, 3]), "of shape"),
        (score_reply(input_top_logprobs_null_prefix=2), "behind 2"),
    ],
)
def test_scores_that_cannot_be_used_are_refused(reply: Any, reason: str) -> None:
    with pytest.raises(wire.BadReply, match=reason):
        read_scores(reply)


@pytest.mark.parametrize("read", [read_sample, read_scores])
def test_answers_of_other_weights_are_told_from_the_rest(read: Callable[[Any], Any]) -> None:
    reply = sample_reply if read is read_sample else score_reply
    for changes in (
        {"weight_version": "default", "weight_versions": None},
        {"weight_versions": [{"version": VERSION}, {"version": "run/text/8"}]},
    ):
        with pytest.raises(wire.StaleServer):
            read(reply(**changes))


def test_the_last_id_of_the_vocabulary_comes_back_as_zero() -> None:
    """sglang takes it for part of an image (tokenizer_manager.py); its score is right all the same."""
    rollout = Rollout(PROMPT, (5, 19, 1), torch.zeros(3), "stop", 7, "")
    reply = score_reply(input_token_logprobs=[[None, 11], [-0.5, 5], [-1.5, 0], [-2.5, 1]])
    assert wire.read_scores(reply, rollout, 2, VERSION, TOKENS).logprobs.tolist() == [-0.5, -1.5, -2.5]


def test_scores_without_top_tokens_and_with_the_whole_vocabulary() -> None:
    assert wire.read_scores(score_reply(), ROLLOUT, 0, VERSION, TOKENS).top_ids.shape == (3, 0)
    assert wire.scoring_request(ROLLOUT, {}, 1000, TOKENS)["top_logprobs_num"] == 20


def test_a_row_for_the_token_before_the_response_is_left_out_if_it_is_there() -> None:
    changes = {
        "input_top_logprobs_val_flat_b64": base64([-9, -9, -0.5, -1, -0.1, -1.5, -0.2, -2.5], np.float32),
        "input_top_logprobs_idx_flat_b64": base64([9, 9, 5, 2, 3, 6, 2, 1], np.int32),
        "input_top_logprobs_shape": [4, 2],
        "input_top_logprobs_null_prefix": 0,
    }
    assert read_scores(score_reply(**changes)).top_ids.tolist() == [[5, 2], [3, 6], [2, 1]]


def test_a_server_that_saw_fewer_images_or_more_is_told_apart() -> None:
    media = Media(torch.zeros(8, 12), torch.tensor([[1, 2, 4]]))
    seeing = Prompt("p", "image", (8, 4, 4, 11), "", "exact", "", media)
    assert wire.read_sample(sample_reply(image_tokens=2), seeing, SAMPLING, VERSION, TOKENS).finish == "stop"
    for seen in (None, 0, 1, 3):
        with pytest.raises(wire.BlindServer, match=f"saw {seen or 0} image tokens, the student 2"):
            wire.read_sample(sample_reply(image_tokens=seen), seeing, SAMPLING, VERSION, TOKENS)


def test_a_server_that_dropped_the_video_is_told_apart() -> None:
    media = Media(torch.zeros(24, 12), torch.tensor([[1, 2, 4], [2, 2, 4]]), videos=(1,), seconds=(1.0,))
    seeing = Prompt("p", "video", (8, 4, 4, 9, 3, 3, 10, 3, 3), "", "exact", "", media)

    def read(**seen: Any) -> wire.Sampled:
        reply = sample_reply(prompt_tokens=9, **seen)
        return wire.read_sample(reply, seeing, SAMPLING, VERSION, TOKENS)

    assert read(image_tokens=2, video_tokens=4).finish == "stop"
    with pytest.raises(wire.BlindServer, match="saw 0 video tokens, the student 4"):
        read(image_tokens=2)
    with pytest.raises(wire.BlindServer, match="saw 6 image tokens, the student 2"):
        read(image_tokens=6)


def test_the_places_of_images_are_those_of_their_tokens() -> None:
    media = Media(torch.zeros(24, 12), torch.tensor([[1, 2, 4], [1, 4, 4]]))
    prompt = Prompt("p", "image", (8, 4, 4, 9, 4, 4, 4, 4, 11), "", "exact", "", media)
    fields = wire.media_fields(prompt, TOKENS, VERSION)
    assert fields.keys() == {"image_data"}
    sent = pixels.decode(fields["image_data"][0])
    assert sent.offsets == ((1, 2), (4, 7))
    assert (sent.weights, sent.seconds) == (VERSION, ())
    assert wire.media_fields(PROMPT, TOKENS, VERSION) == {}


@pytest.mark.parametrize(
    ("tokens_per_second", "ids", "offsets"),
    [
        (None, (8, 3, 3, 9, 3, 3, 4, 7, 3, 11), ((1, 2), (4, 5), (8, 8))),
        (2.0, (8, 3, 3, 3, 3, 4, 7, 3, 11), ((1, 2), (3, 4), (7, 7))),
    ],
    ids=["frames apart", "one block"],
)
def test_videos_are_sent_frame_by_frame(
    tokens_per_second: float | None, ids: tuple[int, ...], offsets: tuple[tuple[int, int], ...]
) -> None:
    tokens = wire.Tokens(20, MediaTokens(4, 3, 2, tokens_per_second))
    pixel_values = torch.arange(24.0)[:, None].expand(24, 12)
    grids = torch.tensor([[2, 2, 4], [1, 2, 2], [1, 2, 2]])
    media = Media(pixel_values, grids, videos=(0, 2), seconds=(1.0, 0.5))
    fields = wire.media_fields(Prompt("p", "video", ids, "", "exact", "", media), tokens, VERSION)
    image, video = (pixels.decode(fields[name][0]) for name in ("image_data", "video_data"))
    assert image.pixel_values[:, 0].tolist() == [16, 17, 18, 19]
    assert video.pixel_values[:, 0].tolist() == [*range(16), *range(20, 24)]
    assert video.grid_thw.tolist() == [[1, 2, 4], [1, 2, 4], [1, 2, 2]]
    assert (video.offsets, video.seconds) == (offsets, (1.0, 1.0, 0.5))
    assert video.positions is None, "they come once"
    assert image.positions is not None
    assert torch.equal(image.positions, prompt_positions(ids, media, tokens.media))


def test_scoring_begins_one_token_before_the_response() -> None:
    request = wire.scoring_request(ROLLOUT, {}, 2, TOKENS)
    assert request["input_ids"] == [8, 9, 10, 11, 5, 6, 1]
    assert request["logprob_start_len"] == 3
    assert request["sampling_params"]["max_new_tokens"] == 0
