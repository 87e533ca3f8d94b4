"""Several sources as one."""

from copd_megatron.config.branches import BranchConfig, BranchData, DataConfig, MiniData
from copd_megatron.data.capability import Mixture, first, open_capability


def test_sources_take_turns_until_each_is_used_up():
    mixture = Mixture([["a0", "a1", "a2", "a3"], ["b0"], ["c0", "c1"]])
    assert len(mixture) == 7
    assert [mixture[index] for index in range(7)] == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]


def test_branch_on_all_data_has_every_example_of_each():
    parts = tuple(BranchData(mini=MiniData(modality=modality)) for modality in ("text", "image"))
    branch = BranchConfig(name="mixed", data=BranchData(mixture=parts))
    capability = open_capability(branch, DataConfig(mini_size=50), seed=0, test_size=5)
    assert capability.name == "mixed"
    assert len(capability.train) == 100
    assert {example.uid.split("/")[1] for example in first(capability.train, 100)} == {"text", "image"}
    assert [example.uid.split("/")[1] for example in first(capability.validation, 4)] == ["text", "image"] * 2
    assert capability.benchmarks == ()
