"""Tables of measurements in the documentation, between markers: <!-- NAME: begin --> and <!-- NAME: end -->."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.files import write_atomic


def put(doc: Path, name: str, text: str) -> None:
    """Put `text` between the markers called `name` in `doc`; SystemExit if they are not there once each."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = doc.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{doc} must have {begin!r} and {end!r} once each")
    before, rest = content.split(begin)
    write_atomic(doc, f"{before}{begin}\n{text}{end}{rest.split(end)[1]}")
