"""`python -m slosched` and the `slosched` command."""

from __future__ import annotations

from slosched.cli.guard import guarded
from slosched.descriptors import COMMAND_NEEDS, open_standard_streams, require_descriptors


def main() -> None:
    """Run the command line on sys.argv. Ends in SystemExit; see `cli/guard.py` for the codes."""

    open_standard_streams()

    def run() -> None:
        require_descriptors(COMMAND_NEEDS)
        from slosched.cli.app import app

        app(prog_name="slosched")

    guarded(run)


if __name__ == "__main__":
    main()
