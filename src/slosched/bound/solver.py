"""Linear programmes for HiGHS, which scipy brings. The one file that imports scipy, and only when used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.errors import MissingPackage

Integers = NDArray[np.int64]

#: HiGHS' own words for these: done, and out of time.
_OPTIMAL, _LIMIT = 0, 1


def check_scipy() -> None:
    """Raises MissingPackage if scipy is not installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise MissingPackage(
            "bounds need scipy; install it with: pip install 'slosched[bound]'"
        ) from None


@dataclass
class Programme:
    """Maximise `gains` . x over x within 0..`upper`, with rows  sum(coefficient x) <= or = right.

    Columns and rows are added in blocks; entries name their row and column by number.
    """

    gains: list[NDArray[np.float64]] = field(default_factory=list)
    upper: list[NDArray[np.float64]] = field(default_factory=list)
    columns: int = 0
    right: dict[bool, list[NDArray[np.float64]]] = field(
        default_factory=lambda: {False: [], True: []}
    )
    rows: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    entries: dict[bool, list[tuple[Integers, Integers, NDArray[np.float64]]]] = field(
        default_factory=lambda: {False: [], True: []}
    )

    def add_columns(self, count: int, *, gain: float, upper: float) -> int:
        """`count` more variables; returns the number of the first."""
        first = self.columns
        self.gains.append(np.full(count, gain))
        self.upper.append(np.full(count, upper))
        self.columns += count
        return first

    def add_rows(self, right: Sequence[float] | NDArray[np.float64], *, equal: bool = False) -> int:
        """A row for each right-hand side; returns the number of the first among rows of its sort."""
        first = self.rows[equal]
        values = np.asarray(right, dtype=np.float64)
        self.right[equal].append(values)
        self.rows[equal] += len(values)
        return first

    def put(
        self, rows: Integers, columns: Integers, coefficient: float, *, equal: bool = False
    ) -> None:
        """`coefficient` stands at each of these places; what is put twice adds up."""
        values = np.full(len(rows), coefficient)
        self.entries[equal].append((rows, columns, values))

    @property
    def size(self) -> int:
        """Coefficients that are not 0: what time and memory go with."""
        return sum(len(rows) for each in self.entries.values() for rows, _, _ in each)

    def solve(self, *, time_limit_s: float) -> float | None:
        """The maximum; None if it was not found within the time.

        Raises MissingPackage without scipy.
        """
        if not self.columns:
            return 0.0
        check_scipy()
        from scipy.optimize import linprog

        outcome = linprog(
            -np.concatenate(self.gains),
            A_ub=self._matrix(False),
            b_ub=self._right(False),
            A_eq=self._matrix(True),
            b_eq=self._right(True),
            bounds=np.stack([np.zeros(self.columns), np.concatenate(self.upper)], axis=1),
            method="highs-ipm",  # several times as fast here as simplex
            options={"time_limit": time_limit_s},
        )
        if outcome.status == _OPTIMAL:
            return float(-outcome.fun)
        if outcome.status == _LIMIT:
            return None
        raise AssertionError(f"HiGHS could not solve a bound: {outcome.message}")

    def _matrix(self, equal: bool) -> Any:
        from scipy.sparse import csr_array

        blocks = self.entries[equal]
        if not blocks:
            return None
        rows, columns, values = (np.concatenate([b[i] for b in blocks]) for i in range(3))
        return csr_array((values, (rows, columns)), shape=(self.rows[equal], self.columns))

    def _right(self, equal: bool) -> NDArray[np.float64] | None:
        return np.concatenate(self.right[equal]) if self.entries[equal] else None
