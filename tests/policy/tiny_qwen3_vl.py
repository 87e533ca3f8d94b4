"""A tiny random Qwen3-VL in transformers, conversations with it, and the plain way to pack them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from plain_inputs import plain_inputs

from copd_megatron.policy import layout, platform
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.packed import MicroBatch, Segments, Signals
from copd_megatron.rollout.positions import MediaTokens, continuation_positions, prompt_positions
from copd_megatron.rollout.types import Media

platform.prepare()
platform.declare_torchvision_schemas()

VOCAB, START, END, IMAGE, VIDEO = 53, 48, 49, 50, 51
MERGE = 2
PATCH_FEATURES = 3 * 2 * 4 * 4


def config(tied: bool = True, deepstack: Sequence[int] = (0,), vocab: int = VOCAB) -> Any:
    """The configuration of a model with 1.4 million parameters."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 384,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": list(deepstack),
            "num_position_embeddings": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )


def moe_config(dense: Sequence[int] = (), experts: int = 4, deepstack: Sequence[int] = (0, 1), **text: Any) -> Any:
    """The configuration of a model like `config`'s, with experts in all layers but `dense`."""
    from transformers import Qwen3VLMoeConfig

    like = config(tied=False, deepstack=deepstack).to_dict()
    parts = {
        part: {key: value for key, value in like[part].items() if key != "model_type"}
        for part in ("text_config", "vision_config")
    }
    parts["text_config"] |= {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": list(dense),
        **text,
    }
    return Qwen3VLMoeConfig(
        **parts,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def reference(hf_config: Any, seed: int = 0) -> Any:
    """transformers' model; weights are large enough, norms and biases random, so that every one of them matters."""
    import transformers

    kind = type(hf_config).__name__.removesuffix("Config")
    task = "ForConditionalGeneration" if hasattr(hf_config, "vision_config") else "ForCausalLM"
    with torch.random.fork_rng():
        model = getattr(transformers, kind + task)(hf_config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(mean, 0.05 if parameter.dim() > 1 else 0.1, generator=generator)
    return model.eval()


@contextmanager
def alone(seed: int = 0) -> Iterator[Layout]:
    """Megatron's process groups for a process of its own."""
    layout.initialize(Layout(), seed)
    try:
        yield Layout()
    finally:
        layout.shutdown()


@dataclass(frozen=True)
class Video:
    """A video of `frames` × `rows` × `columns` patches, each frame of which lasts so many `seconds`."""

    frames: int
    rows: int
    columns: int
    seconds: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """A prompt with its media and the responses sampled from it; `tokens_per_second` as in `MediaTokens`."""

    prompt: list[int]
    responses: list[list[int]]
    media: Media | None = None
    tokens_per_second: float | None = None

    @property
    def tokens(self) -> MediaTokens:
        return MediaTokens(IMAGE, VIDEO, MERGE, self.tokens_per_second)


def conversation(
    seed: int,
    words: int,
    responses: Sequence[int],
    items: Sequence[tuple[int, int, int] | Video] = (),
    tokens_per_second: float | None = None,
) -> Conversation:
    """`words` random text tokens, with images (frames, rows, columns of patches) and videos among them; responses of
    the given lengths. Without `tokens_per_second` each frame of a video stands apart, behind a text."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(0, 40, (length,), generator=generator).tolist()

    prompt = text(2)
    for item in items:
        if isinstance(item, tuple):
            frames, rows, columns = item
            prompt += [START, *[IMAGE] * (frames * rows * columns // MERGE**2), END, *text(1)]
            continue
        frame = [VIDEO] * (item.rows * item.columns // MERGE**2)
        if tokens_per_second is None:
            for _ in range(item.frames):
                prompt += [*text(2), START, *frame, END]
        else:
            prompt += [START, *frame * item.frames, END, *text(1)]
    prompt += text(words - 2)
    answers = [text(length) for length in responses]
    if not items:
        return Conversation(prompt, answers)
    grid = torch.tensor([item if isinstance(item, tuple) else (item.frames, item.rows, item.columns) for item in items])
    pixels = torch.randn(int(grid.prod(dim=1).sum()), PATCH_FEATURES, generator=generator)
    videos = {number: item.seconds for number, item in enumerate(items) if isinstance(item, Video)}
    return Conversation(prompt, answers, Media(pixels, grid, tuple(videos), tuple(videos.values())), tokens_per_second)


def pack(conversations: Sequence[Conversation], signals: Signals | None = None) -> MicroBatch:
    """One micro-batch of all `conversations`, token by token as `MicroBatch` describes it."""
    tokens: list[int] = []
    positions, starts = [], []
    for each in conversations:
        starts.append(len(tokens))
        tokens += each.prompt
        positions.append(prompt_positions(each.prompt, each.media, each.tokens))
    prompts = list(positions)
    logit_index: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    prompt_of: list[int] = []
    for index, each in enumerate(conversations):
        for response in each.responses:
            logit_index += [starts[index] + len(each.prompt) - 1]
            logit_index += range(len(tokens), len(tokens) + len(response) - 1)
            targets += response
            sequence += [len(prompt_of)] * len(response)
            prompt_of.append(index)
            tokens += response[:-1]
            positions.append(continuation_positions(prompts[index], len(response) - 1))
    media = [each.media for each in conversations if each.media is not None]
    token_ids = torch.tensor(tokens)
    return MicroBatch(
        token_ids=token_ids,
        position_ids=torch.cat(positions, dim=1),
        segments=Segments(
            torch.tensor([len(each.prompt) for each in conversations]),
            torch.tensor([len(answer) - 1 for each in conversations for answer in each.responses]),
            torch.tensor(prompt_of),
        ),
        logit_index=torch.tensor(logit_index),
        targets=torch.tensor(targets),
        sequence=torch.tensor(sequence),
        signals=signals if signals is not None else _no_signals(len(targets)),
        pixel_values=torch.cat([each.pixel_values for each in media]) if media else None,
        grid_thw=torch.cat([each.grid_thw for each in media]) if media else None,
        visual_index=((token_ids == IMAGE) | (token_ids == VIDEO)).nonzero().flatten() if media else None,
    )


def _no_signals(tokens: int) -> Signals:
    zeros = torch.zeros(tokens)
    return Signals(source=zeros.long(), weight=zeros, advantage=zeros, engine_logprobs=zeros)


def reference_logits(model: Any, conversations: Sequence[Conversation]) -> torch.Tensor:
    """transformers' logits [R, V] of all response tokens, every sequence computed whole and on its own."""
    rows = []
    for each in conversations:
        for response in each.responses:
            output = model(**plain_inputs(model, each.prompt, each.media, response))
            rows.append(output.logits[0, len(each.prompt) - 1 : -1])
    return torch.cat(rows)


def token_loss(logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """A loss in which every response token counts differently."""
    weight = torch.linspace(-1.0, 2.0, len(batch.targets))
    logprobs = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return (weight * logprobs).sum()
