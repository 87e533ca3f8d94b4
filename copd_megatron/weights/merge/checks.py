"""What is refused before any work is done: models that do not belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.weights.merge.sources import Source

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)
_LISTED = 20


def check_models(base: Source, inputs: Sequence[Source]) -> None:
    """Raise WeightsError unless all are models of one architecture, vocabulary and shape, in formats that can be
    averaged. Only headers and configurations are read."""
    for source in inputs:
        _check_architecture(base, source)
        _check_tensors(base, source)
    for source in (base, *inputs):
        for name in base.names():
            dtype = source.form(name).dtype
            if base.form(name).dtype.is_floating_point and dtype not in MERGEABLE:
                raise WeightsError(
                    f"{source.label}: tensor {name} is {dtype}, which cannot be averaged; "
                    f"expected one of {', '.join(map(str, MERGEABLE))}"
                )


def check_vocabularies(base: Path, inputs: Sequence[Path]) -> None:
    """Raise WeightsError if a folder's tokenizer.json gives other numbers to tokens than the base's.

    A folder without one, which cannot be compared, is taken for one with the base's.
    """
    reference = base / "tokenizer.json"
    if not reference.is_file():
        return
    expected: dict[str, Any] | None = None
    for folder in inputs:
        file = folder / "tokenizer.json"
        if not file.is_file() or file.read_bytes() == reference.read_bytes():
            continue
        expected = _vocabulary(reference) if expected is None else expected
        found = _vocabulary(file)
        if found != expected:
            other = sorted(token for token in found.keys() | expected if found.get(token) != expected.get(token))
            raise WeightsError(
                f"{file}: its vocabulary differs from that of {reference} in {len(other)} tokens, such as "
                f"{', '.join(map(repr, other[:5]))}; rows of the embeddings would not belong together"
            )


def _check_architecture(base: Source, source: Source) -> None:
    for key in ("model_type", "architectures"):
        mine, theirs = source.config.get(key), base.config.get(key)
        if mine != theirs:
            raise WeightsError(
                f"{source.label}: config.json has {key} {mine!r}, the base {base.label} has {theirs!r}; "
                "only models of one base can be merged"
            )
    mine, theirs = _vocabulary_size(source.config), _vocabulary_size(base.config)
    if mine != theirs:
        raise WeightsError(
            f"{source.label}: a vocabulary of {mine} tokens, the base {base.label} has {theirs}; "
            "only models of one vocabulary can be merged"
        )


def _check_tensors(base: Source, source: Source) -> None:
    mine, theirs = set(source.names()), set(base.names())
    lines = [f"  {name}: missing" for name in sorted(theirs - mine)]
    lines += [f"  {name}: not in the base" for name in sorted(mine - theirs)]
    lines += [
        f"  {name}: shape {list(source.form(name).shape)}, in the base {list(base.form(name).shape)}"
        for name in sorted(mine & theirs)
        if source.form(name).shape != base.form(name).shape
    ]
    if lines:
        shown = lines[:_LISTED] + ([f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])
        raise WeightsError(
            f"{source.label}: has other tensors than the base {base.label}; only models of one base can be merged\n"
            + "\n".join(shown)
        )


def _vocabulary_size(config: dict[str, Any]) -> Any:
    text = config.get("text_config")
    return (text if isinstance(text, dict) else config).get("vocab_size")


def _vocabulary(file: Path) -> dict[str, Any]:
    """Numbers of tokens; empty for a kind of tokenizer that has none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content.get("model", {}).get("vocab", {})
        tokens = dict(model) if isinstance(model, dict) else {token: number for number, (token, _) in enumerate(model)}
        return tokens | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise WeightsError(f"{file}: is not a tokenizer ({type(error).__name__}: {error})") from error
