"""What identifies a base model without reading all of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_SAMPLES = 64
_BLOCK = 64 * 1024


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256, in hexadecimal, of a Hugging Face folder's configuration, tokenizer, templates and weights.

    Of each weight file: its name, its size, and 64 blocks of 64 KiB spread evenly over it, the header (names and
    shapes) among them; a smaller file is read whole. Training changes nearly every number of a model, so another
    model of the same shape differs in every block. README and other texts do not count.
    """
    total = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.suffix == ".safetensors":
            content = _sampled(file)
        elif file.suffix in (".json", ".jinja") or file.name in ("merges.txt", "vocab.txt"):
            content = file.read_bytes()
        else:
            continue
        total.update(f"{file.name}\x1f{file.stat().st_size}\x1f{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def _sampled(file: Path) -> bytes:
    size = file.stat().st_size
    if size <= _SAMPLES * _BLOCK:
        return file.read_bytes()
    parts = []
    with open(file, "rb") as content:
        for number in range(_SAMPLES):
            content.seek(number * (size - _BLOCK) // (_SAMPLES - 1))
            parts.append(content.read(_BLOCK))
    return b"".join(parts)
