"""The process that looks at a repository, beside a worker whose loop has no time for it.

It writes a listing to its standard output whenever there is news, as MessagePack behind its length in four
bytes, and ends when its standard input does, which is when its worker ends.
"""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import msgspec

from slosched.clock import now_ns
from slosched.config import ModelSource
from slosched.daemon.repository.beneath import open_below, read_below, root_of
from slosched.daemon.repository.describing import PT2, described, weights_of
from slosched.daemon.repository.listing import Listing
from slosched.daemon.repository.looks import Looks
from slosched.daemon.repository.scanning import Found, in_words, look_at
from slosched.daemon.repository.whole import check_safetensors, check_zip
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

_EVERY_NS = NS_PER_S
#: A look at a large repository takes long: no more than this part of a core goes into looking.
_SHARE = 20
_NICE = 10
#: By then any file has rested for long enough.
_LATE_NS = 2**62


def main(folder: str) -> None:
    """Look until standard input ends."""
    os.nice(_NICE)
    looks = Looks(lambda found: _described(folder, found))
    while True:
        begin_ns = now_ns()
        listing = _looked(looks, folder)
        if listing is not None:
            _write(msgspec.msgpack.encode(listing))
        took_ns = now_ns() - begin_ns
        pause_ns = max(_EVERY_NS, _SHARE * took_ns)
        if select.select([sys.stdin], [], [], pause_ns / NS_PER_S)[0]:
            return  # nothing is ever written to it: this is its end


def list_once(folder: str) -> Listing:
    """What `folder` holds now, also what has just been written. Raises InvalidConfig if it cannot be read."""
    try:
        with root_of(folder) as root:
            look = look_at(root)
    except OSError as error:
        raise InvalidConfig(f"repository {folder} cannot be read: {in_words(error)}") from None
    return Looks(lambda found: _described(folder, found)).take(look, now_ns=_LATE_NS) or Listing()


def _looked(looks: Looks, folder: str) -> Listing | None:
    try:
        with root_of(folder) as root:
            return looks.take(look_at(root), now_ns=now_ns())
    except (OSError, InvalidConfig) as error:
        return looks.unreadable(f"the repository cannot be read: {in_words(error)}")


def _described(folder: str, found: Found) -> ModelSource:
    def read(file: str, most_bytes: int) -> bytes:
        try:
            with root_of(folder) as root:
                return read_below(root, f"{found.folder}/{file}", most_bytes=most_bytes)
        except InvalidConfig as error:
            raise InvalidConfig(f"{file}: {error}") from None
        except OSError as error:
            raise InvalidConfig(f"cannot read {file}: {in_words(error)}") from None

    source = described(found, Path(folder, found.folder), read)
    with root_of(folder) as root:
        for file in weights_of(source, read):
            fd = open_below(root, f"{found.folder}/{file}")
            try:
                (check_zip if file == PT2 else check_safetensors)(fd, file)
            finally:
                os.close(fd)
    return source


def _write(frame: bytes) -> None:
    data = memoryview(len(frame).to_bytes(4, "big") + frame)
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BrokenPipeError:  # the worker is gone
        os._exit(0)
