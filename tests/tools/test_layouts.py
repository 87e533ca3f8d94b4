"""Every parallel layout computes what one process does; `make layouts` prints the same as a table."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what one process makes of them."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    for kinds in layouts.MODELS.values():
        for kind in kinds:
            layouts.make_model(folder / kind, kind)
    for name in layouts.REFERENCES.values():
        layouts.run_row(folder, name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in layouts.ROWS if name not in layouts.REFERENCES.values()])
def test_layout_computes_what_one_process_does(work: Path, name: str) -> None:
    layouts.run_row(work, name)
    for quantity, difference in layouts.differences(work, name).items():
        if difference is None:
            assert quantity == "gradients"
            assert layouts.ROWS[name].optimizer, "only sharded gradients are not compared"
        else:
            assert difference <= layouts.TOLERANCES[quantity], quantity


def test_a_difference_is_seen(tmp_path: Path) -> None:
    def results(last: float) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([1.0, 1.0, 1.0, last]) for name in ("logprobs", "gradients/w", "weights/w")}

    for kind in layouts.MODELS["dense"]:
        for name in ("one process", "CP2"):
            save_file(results(1.0), tmp_path / f"{name}.{kind}.safetensors")
    assert layouts.differences(tmp_path, "CP2") == {"logprobs": 0.0, "gradients": 0.0, "weights": 0.0}
    save_file(results(1.1), tmp_path / "CP2.untied.safetensors")
    found = layouts.differences(tmp_path, "CP2")
    assert found["gradients"] == pytest.approx(0.05)
    assert found["weights"] == found["logprobs"] == pytest.approx(0.1)


def test_a_failing_rank_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)TP2: rank \d of 2 ended with status 1.*tied"):
        layouts.run_row(tmp_path, "TP2")
