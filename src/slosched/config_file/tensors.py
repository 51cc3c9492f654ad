"""Tables of tensors in TOML files: [models.NAME.inputs.INPUT] and [models.NAME.outputs.OUTPUT]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from slosched.errors import InvalidConfig
from slosched.signature import BYTES, MOST_TENSORS, Tensor
from slosched.units import parse_bytes

#: The keys of a tensor's table, for an error about one.
_TENSOR_KEYS = (
    'it has shape, as [-1] or [3, 224, 224] (one request), dtype, as "int64", and where they are needed pad '
    "(a number) and max_bytes"
)


class _TensorTable(msgspec.Struct, forbid_unknown_fields=True):
    """What [models.NAME.inputs.INPUT] says, and [models.NAME.outputs.OUTPUT] without `pad`."""

    shape: list[int]
    dtype: str = "float32"
    pad: float = 0
    max_bytes: int | str = 0


def tensors_of(
    where: str, tables: Mapping[str, Any], pads: dict[str, float] | None = None
) -> tuple[Tensor, ...]:
    """The tensors that the tables describe, in the order of the file. The pads of inputs go into `pads`."""
    found = []
    if len(tables) > MOST_TENSORS:
        raise InvalidConfig(
            f"{where}: {len(tables)} tables, and at most {MOST_TENSORS} are possible"
        )
    for name, table in tables.items():
        place = f"{where}, {name!r}"
        if not name.isprintable():
            raise InvalidConfig(f"{place}: a name must be printable")
        try:
            read = msgspec.convert(table, _TensorTable)
            max_bytes = read.max_bytes
            size = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
            tensor = msgspec.convert([name, read.dtype, read.shape, size], Tensor)
        except (msgspec.ValidationError, InvalidConfig) as error:
            raise InvalidConfig(f"{place}: {error}; {_TENSOR_KEYS}") from None
        least = 4 * math.prod(read.shape)
        if read.dtype == BYTES and size < least and min(read.shape, default=1) > 0:
            raise InvalidConfig(
                f"{place}: BYTES need max_bytes, such as '64KiB': the size of all elements together, with "
                f"4 bytes for the length of each, so at least {least}, not {size}"
            )
        if read.pad and pads is not None:
            pads[name] = read.pad
        found.append(tensor)
    return tuple(found)
