"""Make, or find in the cache, the base model of the mini configs.

    python tools/mini_base.py --seed 0 [--experts 4] [--video | --conflict]

A tiny real Qwen3-VL, dense or with experts, is built from the seed and cold-started by `copd sft` on demonstrations of
mixed quality, which takes a minute or two: of text and images, with `--video` of videos too, with `--conflict` where
the right rules about images are others than in text. The result is kept under a hash of everything it depends on;
`.cache/mini_base/seed_0`, `experts4_seed_0`, `video_seed_0` or `conflict_seed_0` points to it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "mini"
VARIANTS = {
    "video": "demonstrations of videos too (base_video.yaml)",
    "conflict": "every operation has another right rule about images (base_conflict.yaml)",
}
SOURCES = [*sorted((ROOT / "copd_megatron" / "data" / "mini").glob("*.py")), ROOT / "copd_megatron" / "sft.py"]


def content_hash(seed: int, experts: int, config: Path) -> str:
    """What the base depends on: seed, experts, recipe, mini suite."""
    digest = hashlib.sha256(f"{seed} {experts}".encode())
    for source in (config, *SOURCES):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Make the base unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0, help="experts per layer (default 0: one MLP)")
    variants = parser.add_mutually_exclusive_group()
    for name, what in VARIANTS.items():
        variants.add_argument(f"--{name}", action="store_const", dest="variant", const=name, help=what)
    parser.add_argument("--cache", type=Path, default=Path(".cache/mini_base"))
    arguments = parser.parse_args()

    config = CONFIGS / (f"base_{arguments.variant}.yaml" if arguments.variant else "base.yaml")
    target = arguments.cache / content_hash(arguments.seed, arguments.experts, config)
    if not (target / "config.json").exists():
        from copd_megatron.config import load_config
        from copd_megatron.data.mini.model import ModelSize, build
        from copd_megatron.sft import SftSettings, launch

        raw = arguments.cache / f"{target.name}.untrained"
        shutil.rmtree(raw, ignore_errors=True)
        build(raw, seed=arguments.seed, size=ModelSize(experts=arguments.experts))
        launch(load_config(config, [f"seed={arguments.seed}", f"model={raw}", f"out={target}"], SftSettings))
        shutil.rmtree(raw)
    kind = (f"{arguments.variant}_" if arguments.variant else "") + (
        f"experts{arguments.experts}_" if arguments.experts else ""
    )
    pointer = arguments.cache / f"{kind}seed_{arguments.seed}"
    temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}")
    temporary.symlink_to(target.name)
    os.replace(temporary, pointer)
    print(f"base: {pointer} -> {target.name}")


if __name__ == "__main__":
    main()
