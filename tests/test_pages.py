"""The pages that answer a newcomer's first questions are run as they are written.

A block of `console` has commands behind "$ " and what they print. A line "..." stands for any lines; in lines
between, "…" stands for any text. Simulations print the same each time, so the rest is compared as it is.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from slosched.codes import Code
from slosched.telemetry.reason_log import Reason
from test_readme import blocks, served, slosched, table_of

DOCS = Path(__file__).parent.parent / "docs"
SIMULATED = ("replay_my_arrivals", "why_refused", "my_own_policy")


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def sessions(text: str) -> list[tuple[str, str]]:
    """(command, what it prints) of each console block, in order."""
    found = []
    for block in blocks(text, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed))
    return found


def run(command: str, directory: Path) -> str:
    words = shlex.split(command)
    arguments: Sequence[str] = (
        slosched(command) if words[0] == "slosched" else [sys.executable, *words[1:]]
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("CLOCKWORK_")}
    done = subprocess.run(
        arguments, cwd=directory, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def pattern(printed: str) -> str:
    lines = []
    for line in printed.splitlines(keepends=True):
        if line.strip() == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(".*".join(re.escape(part) for part in line.split("…")))
    return "".join(lines)


@pytest.mark.parametrize("name", SIMULATED)
def test_a_simulated_page_prints_what_it_says(name: str, tmp_path: Path) -> None:
    text = page(name)
    for program in blocks(text, "python"):
        file = re.match(r"# (\w+\.py)", program)
        assert file is not None
        (tmp_path / file[1]).write_text(program)
    for command in [c for block in blocks(text, "sh") for c in block.splitlines()]:
        run(command, tmp_path)
    shown = sessions(text)
    assert shown
    for command, printed in shown:
        said = run(command, tmp_path)
        assert re.fullmatch(pattern(printed), said), f"{command} prints now:\n{said}"


def test_the_policy_of_the_page_is_the_example_packages() -> None:
    package = Path(__file__).parent.parent / "clients" / "example_package"
    (program,) = blocks(page("my_own_policy"), "python")
    assert program == "# my_policy.py\n" + (package / "slosched_example" / "policy.py").read_text()
    (entry_points,) = blocks(page("my_own_policy"), "toml")
    assert entry_points in (package / "pyproject.toml").read_text()


@pytest.mark.processes
@pytest.mark.torch
def test_will_my_model_make_it_is_four_commands_that_work(tmp_path: Path) -> None:
    text = page("will_my_model_make_it")
    (tmp_path / "my_model.py").write_text(blocks(text, "python")[0])
    (tmp_path / "worker.toml").write_text(blocks(text, "toml")[0])
    profile, simulate, max_rate, worker, controller, live = (
        line.replace("--device auto", "--device cpu")
        for block in blocks(text, "sh")
        for line in block.splitlines()
    )
    assert "wrote mine.toml" in run(profile, tmp_path)
    said = run(simulate, tmp_path)
    assert "SLO 25ms: 99 % in time (client), with 99 % confidence" in said
    assert "holds" in run(max_rate, tmp_path)
    with served(tmp_path, worker, controller, "worker ready", "joined: 1 GPU(s)") as here:
        address = f"127.0.0.1:{here.controller_port}"
        shorter = live.replace("client ", f"client {address} ", 1).replace(" 300 30", " 300 3")
        assert "300/s" in here.run(slosched(shorter))


def test_the_telemetry_page_has_the_columns_of_the_reasons() -> None:
    section = page("telemetry").partition("## request_reasons.jsonl\n")[2]
    assert [row[0] for row in table_of(section, "column")] == list(Reason._fields)


def test_every_code_that_a_controller_decides_has_advice() -> None:
    from slosched.analysis.explain import _ADVICE
    from slosched.codes import REJECTIONS

    assert set(REJECTIONS) | {Code.CANCELLED} <= set(_ADVICE)
