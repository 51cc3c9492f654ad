"""numba, which compiles the loops of this experiment; asked for when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from slosched.errors import MissingPackage

F = TypeVar("F", bound=Callable[..., Any])

try:
    import numba
except ImportError as error:
    raise MissingPackage(
        f"the experiment sgd needs numba ({error}): pip install 'slosched[faasm]'"
    ) from error

VERSION = str(numba.__version__)


def compiled(function: F) -> F:
    """`function` as machine code, which is kept beside its file for the next process.

    Floating point is as strict as in Python: nothing is reordered or contracted, so results are equal to
    those of the same loop in Python, bit by bit. Other threads run meanwhile.
    """
    return cast(F, numba.njit(cache=True, nogil=True, fastmath=False)(function))
