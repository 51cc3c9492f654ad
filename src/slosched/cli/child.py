"""What a child of `cli/children.py` runs: `python -m slosched.cli.child PARENT ARGUMENTS`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from slosched.cli.guard import guarded

_PR_SET_PDEATHSIG = 1


def main(parent: int, arguments: list[str]) -> None:
    """Run the command line `slosched ARGUMENTS`; the kernel ends it when the process `parent` dies.

    The child asks for that itself: code between fork and exec is no place for it, once torch has
    started threads in the parent.
    """
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(1)

    def run() -> None:
        from slosched.cli.app import app

        app(arguments, prog_name="slosched")

    sys.argv = ["slosched", *arguments]
    guarded(run)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
