from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from tiny_qwen3_vl import config, reference

from copd_megatron.policy import platform

platform.prepare()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="substitutions are made where there is no CUDA")


def test_cuda_devices_named_by_megatron_are_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device == torch.device("cpu")
    assert torch.tensor([1.0], device="cuda:0").device == torch.device("cpu")
    assert torch.empty(1, device=torch.cuda.current_device()).device == torch.device("cpu")
    assert torch.ones(1).cuda() is not None
    assert platform.device() == torch.device("cpu")
    assert platform.backend() == "gloo"
    assert not platform.has_transformer_engine()


def test_other_devices_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").device == torch.device("meta")
    assert torch.zeros(2).device == torch.device("cpu")


def test_device_contexts_still_work() -> None:
    with torch.device("meta"):
        assert torch.zeros(2).device == torch.device("meta")
        assert torch.empty(2, device="cuda").device == torch.device("cpu")


def test_types_have_cuda_names_only_inside_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))

    with platform._cuda_type_names():
        assert parameter.type() == "torch.cuda.FloatTensor"
        assert parameter.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert parameter.type(torch.float64).dtype == torch.float64

    assert parameter.type() == "torch.FloatTensor"


def test_streams_and_events_of_cuda_do_nothing() -> None:
    stream = torch.cuda.Stream()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.synchronize()

    assert torch.cuda.current_stream() != stream


def test_token_counts_leave_the_dispatcher_as_numbers_of_the_host() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    counts = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 1]), as_numpy=True)

    assert not torch.is_tensor(counts)
    assert counts.tolist() == [3, 1]
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 1])))
    assert token_dispatcher.maybe_move_tensor_to_cpu(7) == 7
    assert moe_utils.te_general_gemm is None


def test_preparing_twice_changes_nothing() -> None:
    before = torch.zeros, torch.cuda.current_device, torch.Tensor.cuda

    platform.prepare()

    assert (torch.zeros, torch.cuda.current_device, torch.Tensor.cuda) == before


def test_transformers_still_generates_and_learns() -> None:
    model = reference(config())
    ids = torch.tensor([[1, 2, 3, 4]])

    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True)
    model(input_ids=ids, labels=ids).loss.backward()

    assert generated.shape[1] > 4
    assert model.lm_head.weight.grad.isfinite().all()


@pytest.mark.slow
def test_importing_the_policy_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import copd_megatron.policy.qwen3_vl, copd_megatron.weights.mapping"],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )

    assert (done.stdout, done.stderr) == ("", "")


def test_torchvision_can_be_imported_after_its_schemas_are_declared() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        platform.declare_torchvision_schemas()
        platform.declare_torchvision_schemas()
        from transformers.image_utils import load_image

    assert callable(load_image)


def test_a_stage_keeps_what_it_sends_where_nothing_else_does() -> None:
    """gloo reads a tensor after `isend` has returned; megatron-core would have freed it by then."""
    from copd_megatron.policy.layout import Layout
    from copd_megatron.policy.qwen3_vl.transformer import transformer

    config = transformer(Layout(), "fp32", "none", num_layers=1, hidden_size=8, num_attention_heads=1)
    assert not config.deallocate_pipeline_outputs
