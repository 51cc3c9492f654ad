"""slosched fuzz --calls at the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.core.worker.kinds.call import CallKind


def test_seeds_of_calls_run_and_are_counted() -> None:
    result = CliRunner().invoke(app, ["fuzz", "--calls", "--seeds", "4"])
    assert result.exit_code == 0, result.output
    assert "4 seeds from 0 on" in result.output and "none failed" in result.output


def test_a_seed_that_fails_is_told_with_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls that await and never go on: the first seeds with children show it."""
    monkeypatch.setattr(CallKind, "_ready", lambda self, action, state: None)
    result = CliRunner().invoke(app, ["fuzz", "--calls", "--seeds", "30"])
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "again: slosched fuzz --calls --seeds 1 --first" in result.output


def test_calls_have_a_scheduler_of_their_own() -> None:
    result = CliRunner().invoke(app, ["fuzz", "--calls", "--policy", "FIFO"])
    assert result.exit_code != 0
