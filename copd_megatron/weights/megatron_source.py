"""The Hugging Face tensors of a Megatron distributed checkpoint, one after the other.

Neither the model nor a process group is made: the family's table says which part of which entry holds a parameter, and
only that part is read, whatever the layout that saved it. Checkpoints of a training run can be read too; what they hold
beside the model is left alone.

The checkpoint's index is a pickle, which can run code when it is read. It is read only under a manifest of ours whose
checksums hold for every file, or if the caller says that the checkpoint is to be trusted.
"""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from copd_megatron.errors import WeightsError
from copd_megatron.files import checksum
from copd_megatron.policy.manifest import MANIFEST, problem, read_manifest
from copd_megatron.weights.crew import ALONE, Crew
from copd_megatron.weights.families.row import Padded
from copd_megatron.weights.form import ModelForm
from copd_megatron.weights.mapping import listed
from copd_megatron.weights.sharded import Place, numbered, places

HF_FILES = "hf"
MARKER = "metadata.json"
INDEX = ".metadata"
OPTIMIZER = "optimizer."
"""In the names of entries that belong to training, not to the model."""

Value = TypeVar("Value")


class MegatronSource:
    """A distributed checkpoint of a model that the policy knows.

    `base` is the Hugging Face folder that gives configuration, tokenizer and processor, by default the checkpoint's own
    `hf/`. With `trust` a checkpoint without a valid manifest is read too. The processes of `crew` share the reading
    that the checksums take; with more than one, the constructor is collective.

    Raises WeightsError if the checkpoint is damaged, incomplete, not to be trusted or of another model than config.json
    describes.
    """

    def __init__(self, path: Path, base: Path | None = None, trust: bool = False, crew: Crew = ALONE) -> None:
        self.path = Path(path)
        self.form = self.path / HF_FILES if base is None else Path(base)
        crew.together(self._refuse_incomplete)
        if not trust:
            crew.together(lambda: self._refuse_untrusted(crew))
        crew.together(self._open)

    def _open(self) -> None:
        """Read the index, and find the model of config.json in it."""
        self._model = ModelForm(self.form)
        self.config: dict[str, Any] = self._model.config
        self._reader = FileSystemReader(self.path)
        self._index = self._explained(self._reader.read_metadata)
        self._explained(lambda: self._reader.set_up_storage_reader(self._index, is_coordinator=True))
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._refuse_foreign_files()
        self._chunks: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self._places = [self._found(place) for place in places(self._model.table) if place.entry.row.exported]
        self._refuse_other_model()
        self._place_of = {name: place for place in self._places for name in place.entry.hf}
        self._shape_of: dict[str, torch.Size] = {}
        for place in self._places:
            self._shape_of |= self._fitting_shapes(place)
        self._last: tuple[Place, dict[str, torch.Tensor]] | None = None

    def names(self) -> list[str]:
        """Names of all tensors, in the order in which reading them is cheapest."""
        return list(self._place_of)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor; nothing but the index is read."""
        self._placed(name)
        return self._shape_of[name]

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor; nothing but the index is read."""
        return self._tensors[self._placed(name).key].properties.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`. It may be a view of what the next call for another row lets go."""
        place = self._placed(name)
        if self._last is None or self._last[0] is not place:
            self._last = None  # its memory is needed for the next
            parts = self._explained(lambda: place.entry.row.joint.split(self._read(place)))
            self._last = place, dict(zip(place.entry.hf, parts, strict=True))
        return self._last[1][name]

    def padding(self) -> int:
        """Rows that the vocabulary has beyond that of config.json, so that tensor parallelism could divide it."""
        return max(
            self._tensors[place.key].size[0] - place.entry.row.joint.rows
            for place in self._places
            if isinstance(place.entry.row.joint, Padded)
        )

    # ------------------------------------------------------------------ reading

    def _read(self, place: Place) -> torch.Tensor:
        """The full Megatron tensor at `place`."""
        stored = self._tensors[place.key]
        depth = len(place.index)
        sizes = torch.Size((1,) * depth + tuple(stored.size[depth:]))
        wanted = ChunkStorageMetadata(torch.Size((*place.index, *(0,) * (len(sizes) - depth))), sizes)
        part = TensorStorageMetadata(stored.properties, stored.size, self._overlapping(place))
        items = create_read_items_for_chunk_list(place.key, part, [wanted])
        if sum(prod(item.lengths) for item in items) != prod(sizes):
            raise WeightsError(f"{self.path}: cannot be read, it holds only a part of {place.key}")
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        self._reader.read_data(LoadPlan(items), _Into(target))
        return target.reshape(sizes[depth:])

    def _overlapping(self, place: Place) -> list[ChunkStorageMetadata]:
        """The chunks in which the tensor at `place` lies: with thousands of experts, looking at all takes long."""
        chunks = self._tensors[place.key].chunks
        if not place.index:
            return chunks
        if place.key not in self._chunks:
            self._chunks[place.key] = defaultdict(list)
            for chunk in chunks:
                for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    self._chunks[place.key][layer].append(chunk)
        return self._chunks[place.key][place.index[0]]

    def _placed(self, name: str) -> Place:
        if name not in self._place_of:
            near = difflib.get_close_matches(name, self._place_of, n=1)
            raise WeightsError(f"{self.path}: there is no tensor {name}{f'; did you mean {near[0]}?' if near else ''}")
        return self._place_of[name]

    def _shapes(self, place: Place) -> dict[str, torch.Size]:
        """The shapes of the Hugging Face tensors at `place` by their names."""
        full = torch.empty(self._tensors[place.key].size[len(place.index) :], device="meta")
        parts = place.entry.row.joint.split(full)
        return {name: part.shape for name, part in zip(place.entry.hf, parts, strict=True)}

    # ------------------------------------------------------------------ what is refused

    def _refuse_incomplete(self) -> None:
        """WeightsError unless this looks like a finished checkpoint of the kind that can be read here."""
        if not (self.path / MARKER).is_file():
            raise WeightsError(f"{self.path}: is not a complete Megatron checkpoint, there is no {MARKER}")
        if not self.form.is_dir():
            raise WeightsError(f"{self.path}: has no {HF_FILES}/ folder; name the model's Hugging Face folder as base")
        try:
            backend = json.loads((self.path / MARKER).read_text()).get("sharded_backend")
        except (OSError, ValueError, AttributeError) as error:
            raise WeightsError(f"{self.path / MARKER}: cannot be read ({error}); the checkpoint is damaged") from error
        if backend != "torch_dist":
            raise WeightsError(f"{self.path}: is saved as {backend!r}; expected a checkpoint of the kind 'torch_dist'")

    def _refuse_untrusted(self, crew: Crew) -> None:
        """WeightsError unless there is a manifest and this process's share of the files has its checksums."""
        wrong = problem(self.path)
        files = {} if wrong else read_manifest(self.path) or {}
        for name in islice(sorted(files), crew.rank, None, crew.size):
            if checksum(self.path / name) != files[name]["sha256"]:
                wrong = f"{name} differs from its checksum in {MANIFEST}"
        if wrong is None and INDEX not in files:
            wrong = f"{MANIFEST} does not list {INDEX}"
        if wrong:
            raise WeightsError(
                f"{self.path}: cannot be read safely: {wrong}. Its index is a pickle, which can run foreign code. If "
                "you know where the checkpoint comes from, and that it has not been changed on the way, add --trust"
            )

    def _refuse_foreign_files(self) -> None:
        files = {str(info.relative_path) for info in self._index.storage_data.values()}
        if outside := sorted(name for name in files if Path(name).name != name):
            raise WeightsError(f"{self.path}: its index names files outside the folder: {listed(outside)}")
        if missing := sorted(name for name in files if not (self.path / name).is_file()):
            raise WeightsError(f"{self.path}: is incomplete, it lacks the files {listed(missing)}")

    def _found(self, place: Place) -> Place:
        """`place`, or the one that the entry has where layers that are all alike were not stacked."""
        other = numbered(place.entry)
        return other if place.key not in self._tensors and other.key in self._tensors else place

    def _refuse_other_model(self) -> None:
        keys = {place.key for place in self._places}
        advice = f"it is of another model than {self.form / 'config.json'}, or incomplete"
        if missing := sorted(keys - self._tensors.keys()):
            raise WeightsError(f"{self.path}: the checkpoint lacks {listed(missing)}; {advice}")
        if extra := sorted(key for key in self._tensors.keys() - keys if OPTIMIZER not in key):
            raise WeightsError(f"{self.path}: the model has no place for {listed(extra)}; {advice}")
        for place in self._places:
            found = tuple(self._tensors[place.key].size[: len(place.stack)])
            if found != place.stack:
                raise WeightsError(f"{self.path}: has {found[0]} layers of {place.key}, not {place.stack[0]}; {advice}")

    def _fitting_shapes(self, place: Place) -> dict[str, torch.Size]:
        """`_shapes`; WeightsError if they are not those of config.json's model."""
        shapes: dict[str, torch.Size] = {}
        try:
            shapes = self._shapes(place)
            wrong = self._model.misfit(place.entry, {name: tuple(shape) for name, shape in shapes.items()})
        except (RuntimeError, ValueError) as error:
            wrong = f"{place.key} {list(self._tensors[place.key].size)} cannot be divided ({error})"
        if wrong:
            raise WeightsError(f"{self.path}: is not of the model that config.json describes: {wrong}")
        return shapes

    def _explained(self, work: Callable[[], Value]) -> Value:
        """Turn whatever torch raises over a file it cannot read into a WeightsError."""
        try:
            return work()
        except WeightsError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise WeightsError(
                f"{self.path}: cannot be read ({type(error).__name__}: {reason}); it is damaged: write it again"
            ) from error


class _Into(DefaultLoadPlanner):
    """Reads one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where the part that `read_item` brings belongs."""
        target = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: `tensor` is a part of the target."""
