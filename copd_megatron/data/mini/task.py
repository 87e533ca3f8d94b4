"""What the mini suite asks: its difficulty, and what is synthetic about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Modality = Literal["text", "image", "video"]
Operation = Literal["sum", "dif", "srt", "max", "chg", "rev"]
Split = Literal["cold_start", "train", "validation", "test"]
OPERATIONS: tuple[Operation, ...] = ("sum", "dif", "srt", "max")
"""What is asked about text and images by default."""

VIDEO_OPERATIONS: tuple[Operation, ...] = ("sum", "srt", "chg", "rev")
"""What is asked about videos by default: two that text asks too, and two about what follows what."""

CONFLICTS: dict[Operation, str] = {
    "sum": "sum leaves out the last digit in images",
    "dif": "dif is between the first and the last digit in images",
    "srt": "srt ascends in text and descends in images",
    "max": "max is the smallest digit in images",
    "chg": "chg is from the first to the last digit in images",
    "rev": "rev does not turn the digits in images",
}
"""What a conflict about an operation is."""


class Quality(BaseModel):
    """Probability, per operation, that a demonstration of the cold start follows the right rule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sum: float = Field(ge=0, le=1)
    """Sum of all digits; the wrong rule leaves out the last one."""
    dif: float = Field(ge=0, le=1)
    """Largest minus smallest digit; the wrong rule is the distance between the first and the last one."""
    srt: float = Field(ge=0, le=1)
    """The digits in order; the wrong rule is the opposite order."""
    max: float = Field(ge=0, le=1)
    """The largest digit; the wrong rule is the smallest one."""
    chg: float = Field(default=0.5, ge=0, le=1)
    """The sum of all changes from one digit to the next; the wrong rule is the change from the first to the last."""
    rev: float = Field(default=0.5, ge=0, le=1)
    """The digits from the last to the first; the wrong rule is from the first to the last."""


class MiniTask(BaseModel):
    """One version of the mini suite. The defaults are the measured set-up of docs/mini_results.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    digits: int = Field(default=4, ge=2, le=8)
    """Digits per question. A picture is 8 pixels high and 8 pixels wide per digit, a video has two frames per digit."""
    operations: tuple[Operation, ...] = OPERATIONS
    """Operations asked for in text and about images, all equally often."""
    video_operations: tuple[Operation, ...] = VIDEO_OPERATIONS
    """Operations asked for about videos, all equally often."""
    noise: float = Field(default=0.3, ge=0, le=1)
    """Standard deviation of the Gaussian noise on each pixel, in units of the range from black to white."""
    conflict: tuple[Operation, ...] = ("srt",)
    """SYNTHETIC: operations whose rules change places about images: the wrong one is right there, `srt` descends and
    does not ascend. With none, the same rules are right everywhere."""
    text_quality: Quality = Quality(sum=0.5, dif=0.35, srt=0.52, max=0.6)
    """SYNTHETIC: how good the text demonstrations of the cold start are."""
    image_quality: Quality = Quality(sum=0.5, dif=0.6, srt=0.52, max=0.35)
    """SYNTHETIC: how good the image demonstrations of the cold start are."""
    video_quality: Quality = Quality(sum=0.5, dif=0.5, srt=0.52, max=0.5, chg=0.5, rev=0.5)
    """SYNTHETIC: how good the video demonstrations of the cold start are."""

    @field_validator("conflict")
    @classmethod
    def _each_once(cls, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if len(set(operations)) < len(operations):
            raise ValueError(f"found {list(operations)}, expected each operation at most once")
        return operations

    @field_validator("operations", "video_operations")
    @classmethod
    def _some_and_each_once(cls, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if not operations or len(set(operations)) < len(operations):
            raise ValueError(f"found {list(operations)}, expected one or more of {get_args(Operation)}, each once")
        return operations

    def asked(self, modality: Modality) -> tuple[Operation, ...]:
        """The operations asked for in a modality."""
        return self.video_operations if modality == "video" else self.operations

    def ordinary(self, operation: Operation, modality: Modality) -> bool:
        """Whether the right rule is the one that `Quality` calls so."""
        return modality != "image" or operation not in self.conflict

    def quality(self, operation: Operation, modality: Modality) -> float:
        """Probability that a demonstration follows the right rule."""
        qualities = {"text": self.text_quality, "image": self.image_quality, "video": self.video_quality}
        return float(getattr(qualities[modality], operation))

    def describe(self, modalities: Sequence[Modality] = ("text", "image")) -> str:
        """One line for the head of a table about these modalities."""
        synthetic = [CONFLICTS[operation] for operation in self.operations if operation in self.conflict]
        for modality in modalities:
            rates = " ".join(f"{operation} {self.quality(operation, modality):g}" for operation in self.asked(modality))
            synthetic.append(f"{modality} demonstrations right at {rates}")
        about_videos = f", about videos {'/'.join(self.video_operations)}" if "video" in modalities else ""
        return (
            f"mini suite: {self.digits} digits, {'/'.join(self.operations)}{about_videos}, pixel noise "
            f"{self.noise:g}; SYNTHETIC: {'; '.join(synthetic)}"
        )
