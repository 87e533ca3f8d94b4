"""Results of a comparison in the documentation: what `copd compare` has written, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "comparison_doc.py"
RESULT = """# Comparison small

What the numbers are.

| method | text |
| --- | ---: |
| CoPD | 50.0 |

## What each model has cost

| method | updates |
| --- | ---: |
| CoPD | 240 |

![accuracy](plots/accuracy.png)

![drift](plots/drift.png)
"""


def put(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    places = [f"--{name}={folder / path}" for name, path in {"doc": "c.md", "images": "i", "json": "j"}.items()]
    command = [sys.executable, str(TOOL), str(folder / "small"), *places, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tables_stand_between_the_markers_and_files_beside_them(tmp_path: Path) -> None:
    (tmp_path / "small" / "plots").mkdir(parents=True)
    for name in ("accuracy", "drift"):
        (tmp_path / "small" / "plots" / f"{name}.png").write_text(name)
    (tmp_path / "small" / "compare.md").write_text(RESULT)
    (tmp_path / "small" / "compare.json").write_text("{}")
    doc = tmp_path / "c.md"
    doc.write_text("before\n<!-- small: begin -->\nNot measured.\n<!-- small: end -->\nafter\n")
    done = put(tmp_path, "--plots", "drift")
    assert done.returncode == 0, done.stderr
    text = doc.read_text()
    assert text.startswith("before\n<!-- small: begin -->\nWhat the numbers are.\n\n| method | text |")
    assert "| CoPD | 50.0 |\n\n#### What each model has cost\n\n| method | updates |" in text
    assert text.endswith("![drift of small](i/small_drift.png)\n<!-- small: end -->\nafter\n")
    assert "Not measured" not in text
    assert [file.name for file in (tmp_path / "i").iterdir()] == ["small_drift.png"]
    assert (tmp_path / "j" / "small.json").read_text() == "{}"


def test_a_comparison_that_has_not_been_run_is_refused(tmp_path: Path) -> None:
    done = put(tmp_path)
    assert done.returncode == 1
    assert "compare.md is not there: run `copd compare` of this comparison first" in done.stderr
