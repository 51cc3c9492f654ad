"""What drawing a figure gives: the files, the numbers in them, and the same numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Drawn:
    """A figure. `numbers` are what was drawn, fit for JSON; `text` is a human-readable table of them."""

    files: list[Path]
    numbers: dict[str, Any]
    text: str


def plain(value: Any) -> Any:
    """Return `value` fit for JSON: NaN becomes None, numpy's numbers become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    return value


def columns_text(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in aligned columns; the first to the left, the others to the right."""
    cells = [list(headings), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else _rounded(value)


def _rounded(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)
