"""Rows of fields as aligned text, as TSV and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
_NONE = "-"


def columns(rows: Rows) -> list[str]:
    """The fields of the rows, in the order in which they first appear."""
    return list(dict.fromkeys(str(field) for row in rows for field in row))


def shown(value: Any) -> str:
    """A value as people read it: 4 significant digits, thousands separated, "-" for None and NaN."""
    if hasattr(value, "tolist"):  # numpy's
        value = value.tolist()
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return _NONE if math.isnan(value) else str(value)
        if value == 0 or 1e-3 <= abs(value) < 1000:
            return f"{value:.4g}"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3e}"
    return " ".join(str(value).split())


def table_text(rows: Rows) -> str:
    """Aligned columns: numbers to the right, texts to the left. A line that says so without rows."""
    names = columns(rows)
    if not names:
        return "(no rows)"
    cells = [[shown(row.get(name)) for name in names] for row in rows]
    right = [all(_is_number(row.get(name)) for row in rows) for name in names]
    widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [names, *cells]
    )


def tsv_text(rows: Rows) -> str:
    """Values in full, in columns parted by tabs, below a line of headings."""
    names = columns(rows)
    lines = ["\t".join(names)]
    lines += ["\t".join(_exact(row.get(name)) for name in names) for row in rows]
    return "\n".join(lines) + "\n"


def markdown_text(rows: Rows) -> str:
    """The table for a page of Markdown."""
    names = columns(rows)
    if not names:
        return "(no rows)"
    lines = [_marked(names), "|" + "---|" * len(names)]
    return "\n".join([*lines, *(_marked([shown(row.get(name)) for name in names]) for row in rows)])


def _marked(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _exact(value: Any) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return " ".join(str(value).split())


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, int | float) or hasattr(value, "tolist")
