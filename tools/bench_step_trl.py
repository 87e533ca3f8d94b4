"""The peer's half of `tools/bench_step.py`: TRL's GRPO and distillation trainers on the same tiny text model.

    python tools/bench_step_trl.py MODEL --prompts prompts.json --steps 6 --tokens 16 --group 8

MODEL is a Hugging Face folder of a Qwen3-VL; its language model is taken (for text alone, interleaved M-RoPE is plain
rotary embedding, so Qwen3's class computes the same). Every response has exactly `--tokens` tokens. Prints one JSON
object with the seconds of each step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.weights.hf import HfFolder

declare_torchvision_schemas()  # before transformers and TRL are imported
# ruff: noqa: E402
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer


def text_model(folder: Path) -> Qwen3ForCausalLM:
    """The language model inside a Qwen3-VL folder."""
    source = HfFolder(folder)
    text = source.config["text_config"]
    rope = {"rope_type": "default", "rope_theta": text["rope_parameters"]["rope_theta"]}
    kept = {key: value for key, value in text.items() if key not in ("rope_parameters", "rope_scaling", "model_type")}
    model = Qwen3ForCausalLM(Qwen3Config(**kept, rope_parameters=rope, tie_word_embeddings=False)).float()
    prefix = "model.language_model."
    renamed = {
        f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: source.tensor(name)
        for name in source.names()
        if name.startswith((prefix, "lm_head"))
    }
    model.load_state_dict(renamed)
    return model


class Clock(TrainerCallback):
    """Seconds of every optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer draws and generates inside the step."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self.seconds.append(time.perf_counter() - self._start)


def shared_settings(out: str, steps: int, tokens: int, rows: int) -> dict[str, Any]:
    """One optimizer step per rollout batch, fp32, no logging, saving or reporting."""
    return {
        "output_dir": out,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-4,
        "max_completion_length": tokens,
        "generation_kwargs": {"min_new_tokens": tokens},
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "shuffle_dataset": False,
        "seed": 0,
    }


def main() -> None:
    """Time both trainers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of prompt texts, one batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    prompts: list[str] = json.loads(arguments.prompts.read_text())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = len(prompts) * arguments.group
    result: dict[str, Any] = {"prompt_tokens": [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]}

    with tempfile.TemporaryDirectory() as out:
        settings = shared_settings(out, arguments.steps, arguments.tokens, rows)
        clock = Clock()
        GRPOTrainer(
            model=text_model(arguments.model),
            reward_funcs=lambda completions, **_: [float(len(set(text)) % 2) for text in completions],
            args=GRPOConfig(**settings, num_generations=arguments.group, beta=0.0),
            train_dataset=Dataset.from_dict({"prompt": prompts * arguments.steps}),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
        result["grpo"] = clock.seconds

        clock = Clock()
        repeated = [prompt for prompt in prompts for _ in range(arguments.group)]
        DistillationTrainer(
            model=text_model(arguments.model),
            teacher_model=text_model(arguments.model),
            args=DistillationConfig(**settings, beta=0.0),
            train_dataset=Dataset.from_dict({"prompt": repeated * arguments.steps}),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
        result["opd"] = clock.seconds
    print(json.dumps(result))


if __name__ == "__main__":
    main()
