"""The compile gate: every configuration that ships, compiled ahead of time for GPUs that need not be there.

    python -m copd_kernels.resources                      compare with resources.json; fails if anything has grown
    python -m copd_kernels.resources --write              write resources.json anew
    python -m copd_kernels.resources --only "topk bf16"   of the configurations whose name contains this

Per configuration and architecture: registers per thread, shared memory per block in bytes, and bytes spilled, which
must be 0. A configuration fails if its registers or shared memory are more than 15% above those of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from copd_megatron.files import write_atomic

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (90, 100)
SLACK = 1.15
MEASURES = ("registers", "shared", "spilled")


def compile_one(position: int, architecture: int) -> tuple[str, dict[str, int]]:
    """Name and resources of configuration number `position` for sm_`architecture`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from copd_kernels.device import launch
    from copd_kernels.device.shipped import configurations

    chosen = list(configurations())[position]
    names = chosen.kernel.arg_names
    source = ASTSource(
        fn=chosen.kernel,
        signature={name: chosen.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in chosen.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in chosen.aligned},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"num_warps": launch.WARPS, "maxnreg": chosen.registers}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return chosen.name, _usage(compiled.asm["cubin"]) | {"shared": int(compiled.metadata.shared)}


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory, as NVIDIA's `cuobjdump`, which comes with Triton, reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    if found is None:
        raise RuntimeError(f"{tool} said nothing about registers:\n{output}")
    registers, stack, local = (int(number) for number in found.groups())
    return {"registers": registers, "spilled": stack + local}


def compile_all(only: str = "", jobs: int = 2) -> dict[str, dict[str, dict[str, int]]]:
    """By architecture ("sm_90") and name, the resources of every configuration whose name contains `only`."""
    from copd_kernels.device.shipped import configurations

    positions = [number for number, chosen in enumerate(configurations()) if only in chosen.name]
    work = [(number, architecture) for architecture in ARCHITECTURES for number in positions]
    found: dict[str, dict[str, dict[str, int]]] = {f"sm_{architecture}": {} for architecture in ARCHITECTURES}
    with ProcessPoolExecutor(jobs) as pool:
        for (_, architecture), (name, usage) in zip(work, pool.map(compile_one, *zip(*work, strict=True)), strict=True):
            found[f"sm_{architecture}"][name] = usage
    return found


def grown(found: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What is wrong with `found`: spills, resources above the table's by more than the slack, and names it lacks."""
    problems = []
    for architecture, kernels in found.items():
        for name, usage in kernels.items():
            where = f"{architecture} {name}"
            if usage["spilled"]:
                problems.append(f"{where}: {usage['spilled']} bytes of registers spilled, expected none")
            known = table.get(architecture, {}).get(name)
            if known is None:
                problems.append(f"{where}: not in {TABLE.name}; run `python -m copd_kernels.resources --write`")
                continue
            problems += [
                f"{where}: {measure} {usage[measure]}, more than 15% above the table's {known[measure]}"
                for measure in ("registers", "shared")
                if usage[measure] > known[measure] * SLACK
            ]
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m copd_kernels.resources", description="the kernels' compile gate")
    parser.add_argument("--write", action="store_true", help="write the table anew instead of comparing with it")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write needs every configuration; leave out --only")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    found = compile_all(options.only, options.jobs)
    for architecture, kernels in found.items():
        for name, usage in kernels.items():
            print(architecture, f"{name:50s}", *(f"{measure} {usage[measure]:6d}" for measure in MEASURES))
    if options.write:
        write_atomic(TABLE, json.dumps(found, indent=1, sort_keys=True) + "\n")
        problems = grown(found, found)
    else:
        table = json.loads(TABLE.read_text())
        problems = grown(found, table)
        known = {(a, name) for a, kernels in table.items() for name in kernels}
        gone = known - {(a, name) for a, kernels in found.items() for name in kernels}
        problems += [
            f"{a} {name}: in {TABLE.name}, but no longer shipped" for a, name in sorted(gone) if not options.only
        ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
