"""Between Hugging Face folders and Megatron distributed checkpoints, bit by bit.

    copd convert to-megatron base/ base_megatron/
    copd convert to-hf base_megatron/ base_again/

One process holds the whole model; the checkpoint can be loaded on any layout. It keeps the Hugging Face folder's
configuration, tokenizer and processor under `hf/`, so that nothing else is needed for the way back. Checkpoints of a
training run can be converted too: what they hold beside the model is left alone.

Megatron's metadata is pickled: convert only checkpoints that you trust.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.policy import checkpoint
from copd_megatron.policy.layout import Layout, initialize, shutdown
from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model
from copd_megatron.policy.qwen3_vl.config import Precision
from copd_megatron.weights import mapping
from copd_megatron.weights.hf import SHARD_BYTES, HfFolder, copy_model_files, refuse_content, whole_folder, write_folder

from megatron.core import dist_checkpointing  # isort: skip - after copd_megatron.policy, which prepares the platform
from torch.distributed.checkpoint.api import CheckpointException  # isort: skip

logger = logging.getLogger(__name__)

HF_FILES = "hf"
MARKER = "metadata.json"
_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_EMBEDDING = "embedding.word_embeddings.weight"


def to_megatron(hf_dir: Path, ckpt_dir: Path, overwrite: bool = False) -> None:
    """Write the Hugging Face folder `hf_dir` as a Megatron distributed checkpoint (torch_dist).

    Raises WeightsError, and leaves `ckpt_dir` as it is, if the folder is damaged, of a model the policy does not know,
    neither all float32 nor all bfloat16, or if `ckpt_dir` has content and `overwrite` is off.
    """
    source = HfFolder(hf_dir)
    precision = _precision_of(source)
    with whole_folder(ckpt_dir, marker=MARKER, overwrite=overwrite) as folder, _single_process():
        models = build_model(hf_dir, Layout(), precision)
        mapping.to_megatron(dict(source.tensors()), models)
        with _explained(f"{ckpt_dir}: could not be written", "it is as it was before"):
            checkpoint.write_tensors(_sharded(models), folder)
        (folder / HF_FILES).mkdir()
        copy_model_files(hf_dir, folder / HF_FILES)
    logger.info("wrote %s as a Megatron checkpoint (%s) to %s", hf_dir, precision, ckpt_dir)


def to_hf(
    ckpt_dir: Path,
    hf_dir: Path,
    base: Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model in a Megatron distributed checkpoint as a Hugging Face folder.

    Configuration, tokenizer and processor come from the folder `base`, by default from the checkpoint's own `hf/`.
    Raises WeightsError if there is neither, or if the checkpoint is incomplete, damaged or of another model.
    """
    form = ckpt_dir / HF_FILES if base is None else base
    if not (ckpt_dir / MARKER).is_file():
        raise WeightsError(f"{ckpt_dir}: is not a complete Megatron checkpoint, there is no {MARKER}")
    if not form.is_dir():
        raise WeightsError(f"{ckpt_dir}: has no {HF_FILES}/ folder; name the model's Hugging Face folder as base")
    refuse_content(hf_dir, "config.json", overwrite)
    unreadable, unfit = f"{ckpt_dir}: cannot be read", "it is damaged, or not of the model that config.json describes"
    with _single_process():
        with _explained(unreadable, unfit):
            precision = _precision_in(ckpt_dir)
        models = build_model(form, Layout(), precision)
        with _explained(unreadable, unfit):
            models[0].load_state_dict(dist_checkpointing.load(_sharded(models), str(ckpt_dir))["model"])
        write_folder(hf_dir, mapping.to_hf(models), form, max_shard_bytes, overwrite)
    logger.info("wrote the Megatron checkpoint %s as a Hugging Face folder to %s", ckpt_dir, hf_dir)


@contextmanager
def _single_process() -> Iterator[None]:
    initialize(Layout())
    try:
        yield
    finally:
        shutdown()


def _sharded(models: list[Qwen3VLModel]) -> dict[str, object]:
    return {"model": models[0].sharded_state_dict()}


def _precision_of(folder: HfFolder) -> Precision:
    formats = {folder.dtype(name) for name in folder.names()}
    if len(formats) > 1 or not formats <= _PRECISIONS.keys():
        found = ", ".join(sorted(map(str, formats)))
        expected = " or ".join(map(str, _PRECISIONS))
        raise WeightsError(f"{folder.path}: tensors are {found}; expected all of them to be {expected}")
    return _PRECISIONS[formats.pop()]


def _precision_in(ckpt_dir: Path) -> Precision:
    """Of the model in a checkpoint, whose optimizer may have another."""
    tensors = dist_checkpointing.load_tensors_metadata(str(ckpt_dir))
    if _EMBEDDING not in tensors:
        raise WeightsError(f"{ckpt_dir}: holds no {_EMBEDDING}, so it is not a checkpoint of a policy")
    dtype = tensors[_EMBEDDING].dtype
    if dtype not in _PRECISIONS:
        raise WeightsError(f"{ckpt_dir}: its model is {dtype}; expected {' or '.join(map(str, _PRECISIONS))}")
    return _PRECISIONS[dtype]


@contextmanager
def _explained(what: str, consequence: str) -> Iterator[None]:
    """Turn whatever megatron-core and torch raise over a file they cannot read or write into a WeightsError."""
    try:
        yield
    except WeightsError:
        raise
    except (Exception, CheckpointException) as error:
        # torch wraps what happened on each rank; here there is one.
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = (str(causes[0]).strip().splitlines() or [""])[0]
        raise WeightsError(f"{what} ({type(causes[0]).__name__}: {reason}); {consequence}") from error
