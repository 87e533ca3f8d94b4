"""One code path for CPU and GPU: what megatron-core takes for granted of CUDA, given to it by the CPU.

`prepare()` comes before the first import of anything from `megatron`. Where CUDA is available it changes nothing. Each
substitution is one function, whose docstring names what fails without it (megatron-core 0.16.1, torch 2.13).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _device as torch_device

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h): bytes at the heap's end that stay, and size from which a block gets
pages of its own, at most 32 MiB."""

_prepared = False
_torchvision_schemas: torch.library.Library | None = None


def on_gpu() -> bool:
    """Whether the policy runs on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this process keeps its part of the policy."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that moves tensors of `device()`."""
    return "nccl" if on_gpu() else "gloo"


def has_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine's modules; it has none for CPU."""
    return on_gpu() and importlib.util.find_spec("transformer_engine") is not None


def prepare() -> None:
    """Make megatron-core usable in this process. Idempotent; must precede the first import from `megatron`."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    if on_gpu():
        if not has_transformer_engine():
            _router_product()
        return
    _keep_freed_memory()
    for substitute in (
        _no_compilation,
        _current_device,
        _device_literals,
        _moves_to_cuda,
        _synchronisation,
        _streams,
        _generator_state,
    ):
        substitute()
    _import_megatron()
    for substitute in (
        _megatron_generator_state,
        _router_product,
        _token_splits,
        _uneven_parts,
        _optimizer_type_names,
        _adam_state_before_load,
        _adam_step_per_tensor,
    ):
        substitute()


def declare_torchvision_schemas() -> None:
    """Let `transformers` import torchvision where its compiled extension does not load.

    torchvision from PyPI is linked to CUDA: beside a CPU build of torch its extension is left out, and registering
    the shape function of `torchvision::nms` then fails with "operator torchvision::nms does not exist". Declaring the
    two operators is enough: the project calls neither. Idempotent; does nothing where the extension loads.
    """
    global _torchvision_schemas
    found = importlib.util.find_spec("torchvision")
    if _torchvision_schemas is not None or found is None or "torchvision" in sys.modules:
        return
    for folder in found.submodule_search_locations or ():
        for extension in Path(folder).glob("_C*.so"):
            with contextlib.suppress(OSError, RuntimeError):
                torch.ops.load_library(extension)
                return
    _torchvision_schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _torchvision_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the system when they are freed: every activation of every step then starts as
    pages that the system has to clear. Kept, they are as good as those of CUDA's caching allocator. (Another libc
    has no `mallopt`, and stays as it is.)"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 1 << 30)):
        mallopt(parameter, value)


def _no_compilation() -> None:
    """megatron-core compiles what it marks with `jit_fuser`: on a CPU that takes minutes and a C++ compiler."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True  # type: ignore[attr-defined]


def _current_device() -> None:
    """`device=torch.cuda.current_device()` in layers, buffers and p2p: "No CUDA GPUs are available"."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def _device_literals() -> None:
    """`torch.zeros(..., device="cuda")` in schedules, optimizer and checkpoints: "Torch not compiled with CUDA"."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return create

    # torch's device contexts, as in `with torch.device("meta")`, recognise these functions by a cached list; filled
    # after the replacement it would name the wrappers, and transformers would load models with uninitialised buffers.
    torch_device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _moves_to_cuda() -> None:
    """`tensor.cuda()` and `module.cuda()`: "Torch not compiled with CUDA enabled"."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def _synchronisation() -> None:
    """Waiting for the device around p2p and checkpoints: "Torch not compiled with CUDA enabled"."""
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None


class _Stream:
    """A stream or an event where everything happens in order anyway."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    wait_stream = wait_event = synchronize = wait

    def record_event(self, event: Any = None) -> Any:
        return self if event is None else event


def _streams() -> None:
    """The dispatcher of tokens to experts copies their counts on a stream of its own: "torch.cuda.Stream requires CUDA
    support"."""
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[misc,assignment]
    only = _Stream()
    torch.cuda.current_stream = lambda *args, **kwargs: only  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext(stream)  # type: ignore[assignment,return-value]


def _generator_state() -> None:
    """Saved and restored around recomputed layers: "Torch not compiled with CUDA enabled". The CPU's own is meant."""
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]


def _megatron_generator_state() -> None:
    """The tracker of tensor-parallel random states goes past torch's API: `default_generators[idx]` is empty."""
    import megatron.core.tensor_parallel.random as tracked

    tracked._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    tracked._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(tracked.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _router_product() -> None:
    """Without Transformer Engine the router of experts meets a name that was never imported: "name 'te_general_gemm' is
    not defined". None is what it tests for."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _token_splits() -> None:
    """Numbers of tokens per process are made numbers of the host only if they are on CUDA, and stay tensors otherwise:
    "all_to_all_single(): incompatible function arguments"."""
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = dispatcher.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = on_cpu  # type: ignore[attr-defined]


def _uneven_parts() -> None:
    """Processes that share experts' matrices gather as many tokens as each has for them; gloo gathers and scatters
    parts of one size only: "invalid tensor size at index 1"."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_any(part: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return gather(part, group, None, *args)  # type: ignore[no-any-return]
        widest = max(sizes)
        padded = torch.cat([part, part.new_zeros(widest - len(part), *part.shape[1:])])
        parts = gather(padded, group, None, *args).split(widest)
        return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_any(whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return reduce_scatter(whole, group, None, *args)  # type: ignore[no-any-return]
        summed = whole.contiguous().clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed.split(sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_any  # type: ignore[attr-defined]
    mappings._reduce_scatter_along_first_dim = reduce_scatter_any  # type: ignore[attr-defined]


def _import_megatron() -> None:
    """Each of these modules warns on import that Transformer Engine and Apex, which have no CPU version, are absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("distributed", "optimizer", "models.gpt.gpt_layer_specs"):
            importlib.import_module(f"megatron.core.{name}")


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """While it lasts, the type name of a CPU tensor reads as if the tensor were on CUDA."""
    original = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _optimizer_type_names() -> None:
    """Optimizers tell parameters apart by `param.type() == "torch.cuda.FloatTensor"`: "Wrapped parameters must be
    one of ..."."""
    import megatron.core.optimizer.optimizer as optimizers
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    def with_cuda_names(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _cuda_type_names():
                return function(*args, **kwargs)

        return call

    for owner in (Float16OptimizerWithFloat16Params, DistributedOptimizer):
        owner.__init__ = with_cuda_names(owner.__init__)  # type: ignore[method-assign]
    optimizers.clip_grad_by_total_norm_fp32 = with_cuda_names(optimizers.clip_grad_by_total_norm_fp32)


def _adam_state_before_load() -> None:
    """torch's AdamW has no state before its first step: the distributed optimizer asserts when a checkpoint is loaded
    into a fresh one."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_state_dict

    @functools.wraps(original)
    def sharded_state_dict(self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_state, is_loading, *args, **kwargs)

    DistributedOptimizer.sharded_state_dict = sharded_state_dict


def _adam_step_per_tensor() -> None:
    """After a load all parameters share one `step` tensor, which then advances once per parameter: Adam silently
    diverges from the uninterrupted run. (The step is also missing from the saved state: KeyError.)"""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(original)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        original(self, model_param, {**tensors, "step": state["step"]})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
