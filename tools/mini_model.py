"""Write a tiny, untrained, real Qwen3-VL as a Hugging Face folder.

python tools/mini_model.py OUT --seed 0 [--hidden 256 --layers 8 …]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from copd_megatron.data.mini.model import ModelSize, build
from copd_megatron.errors import CopdError


def main() -> None:
    """Parse the sizes, build, print what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    for size in fields(ModelSize):
        several = isinstance(size.default, tuple)
        parser.add_argument(
            f"--{size.name.replace('_', '-')}",
            type=int if several else type(size.default),
            nargs="*" if several else None,
            default=size.default,
            help=f"default {size.default}",
        )
    given = vars(parser.parse_args())
    out, seed = given.pop("out"), given.pop("seed")
    try:
        parameters = build(out, seed, ModelSize(**{**given, "deepstack": tuple(given["deepstack"])}))
    except CopdError as error:
        sys.exit(f"mini_model: {error}")
    print(f"{out}: Qwen3-VL with {parameters / 1e6:.2f} M parameters from seed {seed}")


if __name__ == "__main__":
    main()
