"""Records to rows of a log, many at a time.

A row is numbers with tabs between them. msgspec writes numbers as JSON several times faster than format
strings do, and JSON's brackets and commas are replaced in the whole text at once: no number contains one. A
name may contain commas, so these have a stand-in meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec

#: A row before it is text. A float is given as `short` makes it, a name as `name_cell` does.
Cells = tuple[int | msgspec.Raw, ...]

#: Stands for a comma in a name: a name has no control characters.
_COMMA = b"\x1f"

_encode = msgspec.json.Encoder().encode


@lru_cache(maxsize=1024)
def short(value: float) -> msgspec.Raw:
    """Six significant digits, as a C++ stream prints a float; enough to tell SLO steps apart."""
    return msgspec.Raw(f"{value + 0.0:g}".encode())  # 0, also of a -0.0 that came first


@lru_cache(maxsize=1024)
def name_cell(name: str) -> msgspec.Raw:
    """A name of printable characters, for `named_rows_of`; "" is an empty cell."""
    return msgspec.Raw(name.encode().replace(b",", _COMMA))


def named_rows_of(cells: Sequence[Cells]) -> bytes:
    """As `rows_of`, where cells are names as well."""
    return rows_of(cells).replace(_COMMA, b",")


def rows_of(cells: Sequence[Cells]) -> bytes:
    """The rows with newlines between them, none at the end."""
    return _encode(cells)[2:-2].replace(b"],[", b"\n").replace(b",", b"\t")
