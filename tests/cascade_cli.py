"""`slosched cascade` within a test's own process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from slosched.cli.app import app

#: A trace of 8 s for 4 GPUs.
SHORT = ("--trace", "fixed_4", "--workers", "4", "--duration", "8s")


def ran(*words: str) -> Result:
    return CliRunner().invoke(app, ["cascade", *words])


def done(*words: str) -> Result:
    result = ran(*words)
    assert result.exit_code == 0, result.output
    return result
