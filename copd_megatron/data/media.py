"""Images of a row: which references to files are allowed, and how they become RGB pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from copd_megatron.data.row import BadRow

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded. Some of Pillow's other formats start external programs."""


@dataclass(frozen=True)
class Unread:
    """Stands for an image or a video that a table holds, while only its presence matters."""


Reference = str | bytes | Image.Image | Unread
"""A path, the bytes of a file, or a picture."""


_A = {"image": "an image", "frame": "a frame of a video", "video": "a video"}


@dataclass(frozen=True)
class Folders:
    """Where image files may be: relative paths are resolved in `base` (None: there are no files, only bytes), absolute
    ones must be inside of a `trusted` folder, which the data set's own loader has filled."""

    base: Path | None
    trusted: tuple[Path, ...] = ()


def checked_reference(value: Any, folders: Folders, kind: str = "image") -> Reference:
    """What a row gives as an image, a frame or a video file (`kind` says which), without `datasets`' dictionary around
    it. Opens nothing. Raises BadRow."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = content if content is not None else path
    if isinstance(value, Unread | bytes | Image.Image):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow("path", f"{_A[kind]} must be a path or bytes, found {repr(value)[:80]}")
    if "://" in value or value.startswith("data:"):
        raise BadRow("path", f"{kind} {value[:200]!r} is a URL; download it and give a path relative to the data file")
    if ".." in PurePath(value).parts or "\0" in value:
        raise BadRow("path", f"{kind} {value[:200]!r} leads out of the data file's folder")
    if PurePath(value).is_absolute():
        if not any(PurePath(value).is_relative_to(folder) for folder in folders.trusted):
            raise BadRow(
                "path", f"{kind} {value[:200]!r} is an absolute path; give it relative to the data file's folder"
            )
    elif folders.base is None:
        raise BadRow("path", f"{kind} {value[:200]!r}: this data set has no folder of files, only bytes can be read")
    return value


def open_image(reference: Reference, folders: Folders, max_pixels: int) -> Image.Image:
    """The decoded picture: RGB, upright, transparency on white. Raises BadRow."""
    name = repr(reference) if isinstance(reference, str) else "in the row"
    if isinstance(reference, Unread):
        raise BadRow("image", f"image {name} was not read")
    try:
        if isinstance(reference, Image.Image):
            return _decoded(reference, name, max_pixels)
        content = BytesIO(reference) if isinstance(reference, bytes) else located(reference, folders, "image")
        with Image.open(content, formats=FORMATS) as image:
            return _decoded(image, name, max_pixels)
    except UnidentifiedImageError as error:
        raise BadRow("image", f"image {name} is none of {', '.join(FORMATS)}, or damaged") from error
    except Image.DecompressionBombError as error:
        raise BadRow("image", f"image {name} has far more than max_pixels {max_pixels} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadRow("image", f"image {name} cannot be decoded: {error}") from error


def located(path: str, folders: Folders, kind: str) -> Path:
    """The file at a checked reference. Raises BadRow if it is not there."""
    found = Path(path) if folders.base is None else folders.base / path  # an absolute path stays what it is
    if not found.is_file():
        raise BadRow("path", f"{kind} {path!r}: no such file{'' if folders.base is None else f' in {folders.base}'}")
    return found


def _decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise BadRow(
            "image", f"image {name} has {image.width} x {image.height} pixels; the limit max_pixels is {max_pixels}"
        )
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    elif image.mode.startswith("I;16"):  # Pillow would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
