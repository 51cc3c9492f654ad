"""What an experiment leaves beside its runs: figureN.json with all numbers, and figureN.md with the table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn, plain
from slosched.experiment.figures import Figure, Part
from slosched.output_files import utf8_document, write_file
from slosched.telemetry.manifest import describe_host
from slosched.version import __version__


def document(
    figure: Figure,
    parts: Sequence[Part],
    drawn: Drawn,
    *,
    kind: str,
    scale: str,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The figure's numbers and what they came from. `kind` is "live" or "simulated"; `more` is added."""
    return {
        "figure": figure.number,
        "kind": kind,
        "scale": scale,
        "version": __version__,
        "host": {k: v for k, v in describe_host().items() if k != "hostname"},
        "runs": [part.described() for part in parts],
        "numbers": _without(plain(drawn.numbers), (*figure.left_out, "run")),
        **more,
    }


def write_result(
    document: Mapping[str, Any], figure: Figure, drawn: Drawn, place: Path, *, made_by: str
) -> list[Path]:
    """Write the numbers as JSON and the table as text into `place`; return both paths.

    `made_by` ends the text: how long it took, and the command. Raises InvalidConfig, OutOfResources.
    """
    stem = f"figure{figure.number}"
    host = document["host"]
    text = (
        f"# Figure {figure.number}, {document['kind']}, scale {document['scale']}\n\n"
        f"{figure.text}\n\n```\n{drawn.text}\n```\n\n"
        f"slosched {__version__}, {host['cpu_model']}, {host['cpu_usable']} CPUs, Python "
        f"{host['python']}; {made_by}.\n"
    )
    files = [place / f"{stem}.json", place / f"{stem}.md"]
    write_file(files[0], _compact(document).encode())
    write_file(files[1], text.encode())
    return files


def _without(value: Any, left_out: Sequence[str]) -> Any:
    """`value` less the keys `left_out`; numbers in six digits."""
    if isinstance(value, dict):
        return {k: _without(v, left_out) for k, v in value.items() if k not in left_out}
    if isinstance(value, list):
        return [_without(item, left_out) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value


def _compact(document: Mapping[str, Any]) -> str:
    """JSON with one line for each list of numbers, so that a table of windows can be read."""
    text = json.dumps(utf8_document(document), indent=1)
    flat = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return flat + "\n"
