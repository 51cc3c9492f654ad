"""The process that cleans up behind a run whose own process was killed: `python -m slosched.share.cleaning`.

It reads from a Keeper (share/keeper.py) what exists. At the end of its input it ends and removes what is left:
nothing after an orderly end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from slosched.share.keeper import FOLDER, GROUP, MPS
from slosched.share.mps import Mps

#: Members end with their parent; MPS has no clients then.
_MEMBERS_END_S = 0.5


def clean_up(kept: list[tuple[str, str]]) -> None:
    """End and remove what is in `kept`: groups first, folders last."""
    for kind, what in kept:
        if kind == GROUP:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(int(what), signal.SIGKILL)
    if any(kind == MPS for kind, _ in kept):
        threading.Event().wait(_MEMBERS_END_S)
        for kind, what in kept:
            if kind == MPS and Path(what).is_dir():
                Mps(Path(what)).stop()
    for kind, what in kept:
        if kind in (FOLDER, MPS):
            shutil.rmtree(what, ignore_errors=True)


def main() -> None:
    """Read what exists until the input ends, and clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    kept: dict[tuple[str, str], None] = {}
    for line in sys.stdin:
        kind, _, what = line.rstrip("\n").partition(" ")
        if kind.startswith("+"):
            kept[kind[1:], what] = None
        else:
            kept.pop((kind[1:], what), None)
    clean_up(list(kept))


if __name__ == "__main__":
    main()
