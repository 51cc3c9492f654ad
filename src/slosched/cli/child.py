"""What a child of experiment/children.py runs: `python -m slosched.cli.child PARENT ARGUMENTS`."""

from __future__ import annotations

import os
import signal
import sys

from slosched.child_processes import end_with_parent
from slosched.cli.guard import guarded


def main(parent: int, arguments: list[str]) -> None:
    """The command line with `arguments`, ended by the kernel when the process `parent` dies."""
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(1)

    def run() -> None:
        from slosched.cli.app import app

        app(arguments, prog_name="slosched")

    sys.argv = ["slosched", *arguments]
    guarded(run)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
