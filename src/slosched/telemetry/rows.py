"""Records to rows of a log, many at a time.

A row is numbers with tabs between them. msgspec writes numbers as JSON several times faster than format
strings do, and JSON's brackets and commas are replaced in the whole text at once: no number contains one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec

#: A row before it is text. A float is given as `short` makes it.
Cells = tuple[int | msgspec.Raw, ...]

_encode = msgspec.json.Encoder().encode


@lru_cache(maxsize=1024)
def short(value: float) -> msgspec.Raw:
    """Six significant digits, as a C++ stream prints a float; enough to tell SLO steps apart."""
    return msgspec.Raw(f"{value + 0.0:g}".encode())  # 0, also of a -0.0 that came first


def rows_of(cells: Sequence[Cells]) -> bytes:
    """The rows with newlines between them, none at the end."""
    return _encode(cells)[2:-2].replace(b"],[", b"\n").replace(b",", b"\t")
