"""Put the results of a comparison into the documentation, exactly as `copd compare` has written them.

    copd compare configs/compare/drift.yaml --table && python tools/comparison_doc.py runs/compare/drift

The tables and notes of `compare.md` go between the markers <!-- NAME: begin --> and <!-- NAME: end --> of `--doc`, NAME
being the comparison's; its plots into `--images`, `compare.json` into `--json`.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import doc_table

IMAGE = re.compile(r"!\[(\w+)\]\(plots/(\w+\.png)\)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of the comparison, its `out`")
    parser.add_argument("--doc", type=Path, default=Path("docs/comparison.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/images/comparison"))
    parser.add_argument("--json", type=Path, default=Path("docs/benchmarks/comparison"))
    parser.add_argument("--plots", nargs="*", help="which plots; by default all that there are")
    given = parser.parse_args()
    name = given.comparison.name
    result = given.comparison / "compare.md"
    if not result.exists():
        raise SystemExit(f"{result} is not there: run `copd compare` of this comparison first")
    lines = result.read_text().split("\n\n")[1:]  # without the title
    kept = []
    given.images.mkdir(parents=True, exist_ok=True)
    for part in lines:
        if (image := IMAGE.fullmatch(part.strip())) is None:
            kept.append(re.sub(r"^## ", "#### ", part))
            continue
        title, file = image.groups()
        if given.plots is None or title in given.plots:
            shutil.copyfile(given.comparison / "plots" / file, given.images / f"{name}_{file}")
            folder = given.images.relative_to(given.doc.parent)
            kept.append(f"![{title} of {name}]({folder}/{name}_{file})")
    doc_table.put(given.doc, name, "\n\n".join(part.strip() for part in kept) + "\n")
    given.json.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(given.comparison / "compare.json", given.json / f"{name}.json")


if __name__ == "__main__":
    main()
