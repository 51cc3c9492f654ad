"""Help, errors and completion: named values, groups, one style of error, a hint for a misspelt name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from slosched.cli.app import app


def commands() -> Iterator[tuple[str, Any]]:
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner:
            yield from ((f"{name} {each}", inner[each]) for each in inner)
        else:
            yield name, command
    yield "client slo-exp-1", root.commands["client"].get_command(None, "slo-exp-1")


NAMES = [name for name, _ in commands()]


def help_of(name: str) -> str:
    result = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="slosched")
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", NAMES)
def test_values_have_names_and_not_types(name: str) -> None:
    said = help_of(name)
    assert re.findall(r"<(?:str|int|float|path|Path|file|list)\b.*", said) == []
    usage = said.partition("\n\n")[0]
    assert "{" not in usage and "[[" not in usage


@pytest.mark.parametrize("name", NAMES)
def test_a_default_is_said_once_and_in_full(name: str) -> None:
    said = " ".join(help_of(name).split())
    assert "Default . " not in said
    for option in re.split(r" (?=--?[a-z])", said):
        assert not re.search(r"Default\b.*\[default:", option), option


@pytest.mark.parametrize("name", ["", "functions", "plot", "state", "cascade digits", "exp"])
def test_what_a_command_does_is_not_cut_off(name: str) -> None:
    assert (
        re.findall(r"^.*[^.]\.\.\.$", help_of(name).partition("Commands:")[2], re.MULTILINE) == []
    )


def test_the_commands_stand_by_what_they_are_for() -> None:
    said = help_of("")
    assert "\nServe:\n" in said and "\nPublished experiments:\n" in said
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert len(re.findall(rf"^  {name}  ", said, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("controller", "--schedule-ahead DURATION"),
        ("controller", "--workers HOST:PORT,..."),
        ("worker", "--weights-cache SIZE"),
        ("simulate", "--jitter DURATION"),
        ("client max-rate", "--window DURATION"),
        ("client slo-exp-1", "--duration DURATION"),
        ("functions simulate", "--workers N "),
    ],
)
def test_durations_sizes_and_addresses_are_called_so(name: str, shown: str) -> None:
    assert shown in help_of(name)


@pytest.mark.parametrize("name", ["controller", "worker", "simulate", "compare", "max-rate"])
def test_many_options_stand_in_groups(name: str) -> None:
    headings = re.findall(r"^([A-Z][A-Za-z ]+):$", help_of(name), re.MULTILINE)
    assert len(headings) >= 3 and len(set(headings)) == len(headings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulat"], "unknown command 'simulat' (did you mean simulate?); known: "),
        (["client", "slo-exp1"], "unknown workload 'slo-exp1' (did you mean slo-exp-1?)"),
        (["plot", "fig77", "x"], "unknown figure 'fig77' (did you mean fig7?)"),
        (["status", "--foo"], "no such option: --foo; see slosched status --help"),
        (["--foo"], "no such option: --foo; see slosched --help"),
        (["controller"], "missing argument 'TYPE'; see slosched controller --help"),
        (["simulate", "--gpus", "x", "INFER5", "y"], "invalid value for '--gpus'"),
    ],
)
def test_every_error_is_one_line_of_one_style(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, words, prog_name="slosched")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"slosched: error: {said}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "offered"),
    [("slosched si", "simulate"), ("slosched client zi", "zipf"), ("slosched plot --he", "--help")],
)
def test_a_shell_completes_commands_workloads_and_options(line: str, offered: str) -> None:
    env = os.environ | {
        "_SLOSCHED_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "slosched"], env=env, capture_output=True, text=True, timeout=60
    )
    assert offered in done.stdout.split() and done.stderr == ""


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in help_of("")
