"""What `slosched exp matrices` takes. Nothing heavy is imported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, AtLeast1, check_types
from slosched.options import Option

KERNELS = ("numpy", "torch", "cupy")
MOST_SPLITS = 3
#: One array of the state has at most 4 GB, and the product is one.
LARGEST_SIZE = 31_000
_QUICK_SIZES = (100, 1000, 2000)
#: Those of the paper.
_SIZES = (100, *range(1000, 8001, 1000))


@dataclass(frozen=True, kw_only=True)
class MatricesOptions:
    """Raises InvalidConfig when it is made with what cannot be."""

    sizes: Annotated[
        tuple[AtLeast1, ...],
        Option(
            help="Rows of the square matrices, separated by commas. Default at scale quick 100,1000,2000; at "
            "published 100 and 1000 to 8000."
        ),
    ] = ()
    splits: Annotated[
        tuple[AtLeast0, ...],
        Option(
            help="How many times the matrices are quartered, 0 to 3: 1, 9, 73 or 585 calls. Default at scale "
            "quick 0,1,2,3; at published 2."
        ),
    ] = ()
    workers: Annotated[
        int,
        Meta(ge=1, le=16),
        Option(
            help="Slots of one host; and emulated hosts of one slot, where calls are near their blocks."
        ),
    ] = 2
    systems: Annotated[
        tuple[str, ...],
        Option(
            help="Systems to compare, of whole, whole-one-core, blocked, local, slot, slots, dask, near, "
            "anywhere and instances. Default all that can run."
        ),
    ] = ()
    kernel: Annotated[
        str,
        Option(
            help="What multiplies blocks: numpy on the host's slots; torch or cupy on a GPU.",
            one_of=KERNELS,
        ),
    ] = "numpy"
    repeats: Annotated[
        int,
        Meta(ge=0, le=1000),
        Option(help="Products of each configuration. Default 2 at scale quick, 5 at published."),
    ] = 0
    seed: Annotated[
        int, Meta(ge=0, le=2**32 - 1), Option(help="Seed of the values in the matrices.")
    ] = 7

    def __post_init__(self) -> None:
        check_types(self)
        for splits in self.splits:
            if splits > MOST_SPLITS:
                raise InvalidConfig(f"splits are 0 to {MOST_SPLITS}, not {splits}")
        for size in self.sizes:
            check_size(size, max(self.splits, default=0))

    def at_scale(self, scale: str) -> MatricesOptions:
        """With what the scale says in place of what was not given. Raises InvalidConfig."""
        quick = scale == "quick"
        return dataclasses.replace(
            self,
            sizes=tuple(sorted(set(self.sizes))) or (_QUICK_SIZES if quick else _SIZES),
            splits=tuple(sorted(set(self.splits))) or ((0, 1, 2, 3) if quick else (2,)),
            repeats=self.repeats or (2 if quick else 5),
        )


def check_size(size: int, splits: int) -> None:
    """Raise InvalidConfig unless a matrix of that many rows can be split so often."""
    if not 2**splits <= size <= LARGEST_SIZE:
        raise InvalidConfig(
            f"a matrix that is split {splits} times has {2**splits} to {LARGEST_SIZE:,} rows, not {size:,}"
        )
