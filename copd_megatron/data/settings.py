"""Settings of a data source: where the rows are and which field means what."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from copd_megatron.data.options import AnswerBy
from copd_megatron.data.template import slots
from copd_megatron.errors import ConfigError
from copd_megatron.rewards import known


class FieldMap(BaseModel):
    """Names of the fields of a row. A dotted name reaches into a field: `reward_model.ground_truth`. A text with names
    in braces is put together from fields: `videos/{video ID}.mp4`; `{}` stands for itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt: str | None = None
    """The question as a text; `prompt` unless `messages` is given. Put together from fields it can show the options
    and say how to answer: "{question}\\n{options}\\nReason step by step …"; lines that stay empty are left out."""
    messages: str | None = None
    """The conversation as a list of `{role, content}`, instead of `prompt`; content is a text, or a list of text,
    image and video parts. If the assistant has the last word, that is the demonstration."""
    images: str | tuple[str, ...] | None = None
    """An image or a list of images, null where a row has none: paths relative to the data file's folder, bytes, or
    the images of a Hugging Face data set. Several fields: one image each, or null. Unset: the data set has no
    images."""
    videos: str | None = None
    """A video or a list of videos, null where a row has none: files beside the data file, or their bytes. With
    `video_fps`, a video is a list of frames, given as images are. Unset: the data set has no videos."""
    video_fps: str | None = None
    """The rate of the frames that `videos` lists, in frames per second: a number, or a list of one per video."""
    answer: str | None = "answer"
    """The gold answer, a text or a number. null: the rows have none, as in a supervised cold start."""
    options: str | None = None
    """Options of a multiple choice, null or empty where a row is none: a list, a mapping of labels, or the text of a
    Python list. The gold answer becomes the label (A, B, …), and in a `prompt` put together from fields, this one shows
    a labelled line per option."""
    verifier: str | None = None
    """The name of the verifier, where rows differ in it; else `verifier` of the source."""
    response: str | None = None
    """A demonstration for the supervised cold start."""
    uid: str | None = None
    """A name of the row, for messages; unset: file and line."""

    @model_validator(mode="after")
    def _one_question(self) -> FieldMap:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("give either `prompt` or `messages`, not both")
        if self.video_fps is not None and self.videos is None:
            raise ValueError("`video_fps` is the rate of frames: say with `videos` which field has them")
        return self

    def columns(self) -> dict[str, tuple[str, ...]]:
        """The fields that each of these settings reads."""
        given = {option: value for option, value in self if value is not None}
        if self.messages is None:
            given.setdefault("prompt", "prompt")
        several = {option: (value,) if isinstance(value, str) else value for option, value in given.items()}
        return {
            option: tuple(name for one in names for name in slots(one) or (one,)) for option, names in several.items()
        }


class VideoSettings(BaseModel):
    """How frames are taken from videos: uniformly, as transformers' processor of Qwen3-VL does."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fps: float = Field(default=2.0, gt=0)
    """Frames taken per second of video."""
    min_frames: int = Field(default=4, ge=2)
    """At least so many are taken, of a shorter video all."""
    max_frames: int = Field(default=768, ge=2)
    """At most so many are taken."""
    max_pixels: int = Field(default=200_000_000, ge=1)
    """Videos whose taken frames have more pixels in all are refused."""
    max_bytes: int = Field(default=2**30, ge=1)
    """Larger video files are refused before they are opened."""

    @model_validator(mode="after")
    def _some_frames(self) -> VideoSettings:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}")
        return self


class SourceSettings(BaseModel):
    """One data set: a JSONL or Parquet file, or anything that `datasets` opens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """A file, a folder, or the name of a data set on the Hugging Face hub."""
    format: Literal["auto", "jsonl", "parquet", "datasets"] = "auto"
    """How to read it; `auto` goes by the file name's ending."""
    name: str | None = None
    """Configuration of a hub data set, for example `main`."""
    split: str | None = None
    """Split of a data set, for example `train` or `train[:1000]`; may be left out if there is only one."""
    fields: FieldMap = FieldMap()
    """Which field of a row means what."""
    verifier: str | None = None
    """The verifier of all rows, see `copd_megatron.rewards`."""
    answer_by: AnswerBy = "label"
    """How the gold answer names one of `fields.options`: by its label (A, B, …) or by its text."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be used: stop and say why, or leave it out and count it."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many usable rows."""
    image_placeholder: str = "<image>"
    """Where this stands in a text, the row's next image goes; images without a place go before the first user's text.
    With `{}` for a number, `<image {}>`, it is the image of that number, counted from 1 and by the fields where
    `fields.images` names several. Empty: texts have no placeholders."""
    video_placeholder: str = "<video>"
    """The same for videos."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Images, and frames of videos, with more pixels are refused before they are decoded."""
    video: VideoSettings = VideoSettings()
    """How frames are taken from videos."""

    @field_validator("verifier")
    @classmethod
    def _known_verifier(cls, name: str | None) -> str | None:
        try:
            if name is not None:
                known(name)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return name

    @model_validator(mode="after")
    def _one_verifier(self) -> SourceSettings:
        if self.verifier is not None and self.fields.verifier is not None:
            raise ValueError("give either `verifier` or `fields.verifier`, not both")
        if self.fields.answer is not None and self.verifier is None and self.fields.verifier is None:
            raise ValueError("answers need a verifier: give `verifier`, or `fields.verifier` if rows differ in it")
        if self.answer_by == "text" and self.fields.options is None:
            raise ValueError("answer_by = text names an option: say with `fields.options` which field has them")
        return self
