"""`python -m slosched` and the `slosched` command."""

from __future__ import annotations

from slosched.cli.guard import guarded


def main() -> None:
    """Run the command line on sys.argv. Ends in SystemExit; see `cli/guard.py` for the codes."""

    def run() -> None:
        from slosched.cli.app import app

        app(prog_name="slosched")

    guarded(run)


if __name__ == "__main__":
    main()
