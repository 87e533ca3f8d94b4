"""Everything that a plan takes for granted, in one place; printed with every plan, changed with `--assume`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from copd_megatron.config.load import check
from copd_megatron.config.section import Section
from copd_megatron.errors import ConfigError


class Assumptions(Section):
    """Shares are of a peak, sizes in bytes, times in seconds. None of them was measured on a GPU by this project."""

    response_tokens: float = Field(4096.0, gt=0)
    """Mean length of a response before it is cut at rollout.max_new_tokens."""
    response_spread: float = Field(0.8, ge=0)
    """Standard deviation of its logarithm (lengths are log-normal); 0: all alike."""
    text_prompt_tokens: int = Field(512, ge=1)
    """Mean prompt of a branch without images or videos."""
    image_prompt_tokens: int = Field(1536, ge=1)
    """Mean prompt with an image."""
    video_prompt_tokens: int = Field(6144, ge=1)
    """Mean prompt with a video."""
    visual_share: float = Field(0.85, ge=0, le=1)
    """Tokens of such a prompt that stand for patches."""
    frame_tokens: int = Field(256, ge=1)
    """Tokens of one frame of a video."""
    training_efficiency: float = Field(0.40, gt=0, le=1)
    """Matrix products in training, share of the peak (Megatron-Core reports up to 0.47 for whole steps on H100)."""
    expert_efficiency: float = Field(0.25, gt=0, le=1)
    """The same where experts' smaller matrices are multiplied."""
    attention_efficiency: float = Field(0.15, gt=0, le=1)
    """Attention in training, which reads an explicit mask."""
    prefill_efficiency: float = Field(0.45, gt=0, le=1)
    """Engines on given tokens."""
    decode_bandwidth: float = Field(0.6, gt=0, le=1)
    """Engines reading weights and cache, share of the memory's bandwidth."""
    decode_seconds: float = Field(0.003, ge=0)
    """What a decoding step takes beside that."""
    scoring_overhead: float = Field(1.32, ge=1)
    """Scoring to prefill alone; measured on CPUs (docs/sglang.md)."""
    score_bytes: float = Field(76.7, ge=0)
    """Per scored token on the wire beside its top-k (docs/sglang.md: 759 bytes with top 64)."""
    score_entry_bytes: float = Field(32 / 3, ge=0)
    """Per entry of the top-k: an id and a log-probability, in base64."""
    expert_imbalance: float = Field(1.2, ge=1)
    """Tokens of the busiest rank's experts to the mean."""
    link_efficiency: float = Field(0.75, gt=0, le=1)
    """Collectives, share of the links' bandwidth."""
    hand_over_efficiency: float = Field(0.5, gt=0, le=1)
    """Weights on their way to engines, share of rank 0's link."""
    hand_over_seconds: float = Field(2.0, ge=0)
    """Pause, flush, checks and continue of a hand-over."""
    runtime_bytes: float = Field(4e9, ge=0)
    """CUDA context, NCCL's buffers and libraries' workspaces of a training process."""
    fragmentation: float = Field(0.08, ge=0)
    """Memory that torch's allocator holds beyond activations and logits, share of these."""
    engine_share: float = Field(0.85, gt=0, le=1)
    """GPU memory for an engine's weights and cache, where rollout.sglang.args has no mem-fraction-static and the GPU is
    its own; on shared GPUs it gets what is left, and this share of it."""
    engine_asleep_bytes: float = Field(1.5e9, ge=0)
    """What a sleeping engine keeps."""
    disk_bandwidth: float = Field(2e9, gt=0)
    """Bytes per second that a node writes to the shared file system."""
    file_system_bandwidth: float = Field(100e9, gt=0)
    """Bytes per second that the file system takes from all nodes."""
    host_bandwidth: float = Field(20e9, gt=0)
    """Copies from a GPU to host memory."""
    mtbf_gpu_hours: float = Field(50_000.0, gt=0)
    """Hours of one GPU between failures that stop a gang (Llama 3: 419 in 54 days on 16,384 GPUs)."""
    restart_seconds: float = Field(600.0, ge=0)
    """From a failure to the first new update: noticing it, a new process, loading."""
    knee_share: float = Field(0.8, gt=0, le=1)
    """The knee is the last scale whose throughput per GPU is at least this share of the best."""


def assumptions_of(given: Sequence[str]) -> Assumptions:
    """The defaults with `NAME=VALUE` settings. ConfigError names what is wrong."""
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--assume {text}: expected NAME=VALUE, for example response_tokens=8192")
        values[name.strip()] = value.strip()
    return check(values, Assumptions, "--assume")
