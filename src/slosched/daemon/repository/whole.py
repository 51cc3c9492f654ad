"""Whether a file of weights is all there: a copy that pauses looks like one that has ended.

The end of a ZIP file lists its parts, and the head of a safetensors file says how long the file is. No more of
either is read.
"""

from __future__ import annotations

import json
import os
import struct

from slosched.errors import InvalidConfig

_END_SIGNATURE = b"PK\x05\x06"
_END = struct.Struct("<4s4H2LH")
#: The comment behind the end of a ZIP file is at most this long.
_COMMENT_AT_MOST = 65_535
_IN_ZIP64 = 2**32 - 1
#: A longer head is that of no model that fits into memory; it is left to the load.
_HEAD_AT_MOST = 16 << 20


def check_zip(fd: int, name: str) -> None:
    """Raise InvalidConfig unless the ZIP file behind `fd` has its end, and OSError."""
    size = os.fstat(fd).st_size
    tail_at = max(0, size - _END.size - _COMMENT_AT_MOST)
    tail = os.pread(fd, size - tail_at, tail_at)
    at = tail.rfind(_END_SIGNATURE)
    if at < 0 or at + _END.size > len(tail):
        raise InvalidConfig(
            f"{name} is not a whole ZIP file, as torch.export.save writes it; it may not be copied yet"
        )
    *_, listing_bytes, listing_at, _ = _END.unpack_from(tail, at)
    if _IN_ZIP64 not in (listing_bytes, listing_at) and listing_at + listing_bytes > tail_at + at:
        raise InvalidConfig(f"{name} lacks what its end lists; it may not be copied yet")


def check_safetensors(fd: int, name: str) -> None:
    """Raise InvalidConfig unless the file behind `fd` is as long as its head says, and OSError."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise InvalidConfig(f"{name} is not a whole file of safetensors; it may not be copied yet")
    if length > _HEAD_AT_MOST:
        return
    try:
        head = json.loads(os.pread(fd, length, 8))
        ends = [value["data_offsets"][1] for key, value in head.items() if key != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise InvalidConfig(f"{name} does not begin as a file of safetensors does") from None
    if size != wanted:
        raise InvalidConfig(f"{name} has {size:,} of {wanted:,} bytes; it may not be copied yet")
