"""Inferences as the protocol has them, in whichever form they travel."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from slosched.transport.codec import Frame


class NamedTensor(msgspec.Struct, frozen=True, gc=False):
    """One tensor: `data` has its elements in C order, little endian; those of BYTES behind four bytes of size.

    `shape` includes the batch, where the model has one (fronts/descriptions.py).
    """

    name: str
    datatype: str  # the protocol's: FP32, INT64, BYTES
    shape: tuple[int, ...]
    data: Frame


class RegionPart(msgspec.Struct, frozen=True, gc=False):
    """A part of a shared memory region (fronts/regions.py)."""

    region: str
    offset: int
    byte_size: int


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """One output that the client asks for by name, and the place where it wants it; None: in the answer."""

    name: str
    part: RegionPart | None = None
    binary: bool = False  # HTTP alone: behind the JSON, and not in it


class Asked(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One inference. Without `wanted` all outputs are; `slo_ns` 0 is the controller's default.

    The memory of the inputs must not change until its end.
    """

    model: str
    version: str = ""
    id: str = ""
    inputs: tuple[NamedTensor, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    slo_ns: int = 0


class Answered(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The answer to an Asked. Outputs that were wanted in a region have no data, and their place by name.

    `latency_ns` is from the call of `Service.begin` to its end, and `in_time` says whether that is within the
    SLO.
    """

    model: str
    version: str
    id: str
    outputs: tuple[NamedTensor, ...]
    in_regions: Mapping[str, RegionPart] = {}
    slo_ns: int = 0
    latency_ns: int = 0
    in_time: bool = True
