"""The same model behind mosec: batches of up to 16, or what came within 2 ms, one worker process.

`mosec_server.py --address 127.0.0.1 --port N`, with PEER_DEVICE and PEER_PROFILE in the environment: mosec
parses the command line itself, and starts this file again for its worker. mosec needs the wheels mosec,
defspec, offapi and msgspec.
"""

from __future__ import annotations

import importlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import mosec  # type: ignore[import-not-found]
from peer_model import MAX_BATCH, make

WAIT_MS = 2


class Resnet50(mosec.Worker):  # type: ignore[misc]
    """One process with the model."""

    def __init__(self) -> None:
        super().__init__()
        self._run = make(os.environ["PEER_DEVICE"], os.environ["PEER_PROFILE"])

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: Any) -> bytes:
        return b"{}"

    def forward(self, data: list[Any]) -> list[Any]:
        self._run(len(data))
        return data


def binary() -> Path | None:
    """mosec's program, in a package that was unpacked into a folder rather than installed; None: installed."""
    beside = Path(mosec.__file__).resolve().parent.parent
    places = [beside / "bin" / "mosec", *beside.glob("mosec-*.data/scripts/mosec")]
    found = next((place for place in places if place.is_file()), None)
    if found is None or os.access(found, os.X_OK):
        return found
    copy = Path(tempfile.mkdtemp(prefix="mosec-")) / "mosec"
    shutil.copyfile(found, copy)
    copy.chmod(copy.stat().st_mode | stat.S_IXUSR)
    return copy


def main() -> None:
    unpacked = binary()
    if unpacked is not None:
        runtime: Any = importlib.import_module("mosec.runtime")
        runtime.get_mosec_path = lambda: unpacked
    server = mosec.Server()
    server.append_worker(Resnet50, num=1, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    server.run()


if __name__ == "__main__":
    main()
