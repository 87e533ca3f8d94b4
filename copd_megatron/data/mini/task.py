"""What the mini suite asks: its difficulty, and what is synthetic about it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Modality = Literal["text", "image"]
Operation = Literal["sum", "dif", "srt", "max"]
Split = Literal["cold_start", "train", "validation", "test"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


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


class MiniTask(BaseModel):
    """One version of the mini suite. The defaults are the measured set-up of docs/mini_results.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    digits: int = Field(default=4, ge=2, le=8)
    """Digits per question. A picture is 8 pixels high and 8 pixels wide per digit."""
    operations: tuple[Operation, ...] = OPERATIONS
    """Operations asked for, all equally often."""
    noise: float = Field(default=0.3, ge=0, le=1)
    """Standard deviation of the Gaussian noise on each pixel, in units of the range from black to white."""
    conflict: bool = True
    """SYNTHETIC: `srt` ascends in text and descends in images. Off, it ascends everywhere."""
    text_quality: Quality = Quality(sum=0.5, dif=0.35, srt=0.52, max=0.6)
    """SYNTHETIC: how good the text demonstrations of the cold start are."""
    image_quality: Quality = Quality(sum=0.5, dif=0.6, srt=0.52, max=0.35)
    """SYNTHETIC: how good the image demonstrations of the cold start are."""

    @field_validator("operations")
    @classmethod
    def _some_and_each_once(cls, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        if not operations or len(set(operations)) < len(operations):
            raise ValueError(f"found {list(operations)}, expected one or more of {list(OPERATIONS)}, each once")
        return operations

    def quality(self, operation: Operation, modality: Modality) -> float:
        """Probability that a demonstration follows the right rule."""
        qualities = self.text_quality if modality == "text" else self.image_quality
        return float(getattr(qualities, operation))

    def describe(self) -> str:
        """One line for the head of a table."""
        synthetic = []
        if "srt" in self.operations and self.conflict:
            synthetic.append("srt ascends in text and descends in images")
        for modality in get_args(Modality):
            rates = " ".join(f"{operation} {self.quality(operation, modality):g}" for operation in self.operations)
            synthetic.append(f"{modality} demonstrations right at {rates}")
        return (
            f"mini suite: {self.digits} digits, {'/'.join(self.operations)}, pixel noise {self.noise:g}; "
            f"SYNTHETIC: {'; '.join(synthetic)}"
        )
