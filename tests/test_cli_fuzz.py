"""slosched fuzz, and faults in slosched simulate, at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli import fuzz
from slosched.cli.app import app
from slosched.sim.fuzz import Outcome, run_case
from slosched.sim.fuzz_case import drawn_spec, with_plan

WORDS = [
    "slo-exp-1",
    "resnet50_v2",
    "2",
    "poisson",
    "200",
    "10",
    "10",
    "2",
    "mul",
    "2",
    "--gpus",
    "2",
]


def test_seeds_that_hold_say_so() -> None:
    result = CliRunner().invoke(app, ["fuzz", "--seeds", "2", "--first", "2"])
    assert result.exit_code == 0, result.output
    assert "2 seeds from 2 on" in result.stdout and "none failed" in result.stdout


def test_two_processes_run_the_same_seeds_and_verbose_tells_each() -> None:
    args = ["fuzz", "--seeds", "3", "--first", "14", "--verbose"]
    alone = CliRunner().invoke(app, args)
    both = CliRunner().invoke(app, [*args, "--jobs", "2"])
    assert alone.exit_code == both.exit_code == 0
    for seed in (14, 15, 16):
        head = next(line for line in alone.stdout.splitlines() if line.startswith(f"seed {seed}:"))
        assert head in both.stdout
    assert "controller: worker 0 on virtual joined" in alone.stdout


def test_a_failing_seed_tells_its_story_and_how_to_run_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_one(seed: int, policy: str | None) -> Outcome:
        spec = drawn_spec(seed, policy=policy)
        failure = "request 7 was answered 2 times" if seed == 21 else ""
        return Outcome(seed, spec, failure, ("0.1 s  controller: so it went",), 10, 1.0, 5)

    monkeypatch.setattr(fuzz, "run_one", run_one)
    result = CliRunner().invoke(app, ["fuzz", "--seeds", "3", "--first", "20", "--policy", "FIFO"])
    assert result.exit_code == 1
    assert "seed 21 FAILED: request 7 was answered 2 times" in result.stdout
    assert "so it went" in result.stdout
    assert "slosched fuzz --seeds 1 --first 21 --policy FIFO --verbose" in result.stdout
    assert "1 failed" in result.stdout


def test_a_type_that_cannot_be_fuzzed_is_refused_with_those_that_can() -> None:
    result = CliRunner().invoke(app, ["fuzz", "--policy", "STRESS"])
    assert result.exit_code == 2
    assert "STRESS" in result.output and "INFER5:paper" in result.output


def test_a_seed_is_the_same_case_whatever_its_faults() -> None:
    spec = drawn_spec(2)
    assert spec.faults is not None
    for seed_spec in (spec, with_plan(spec, spec.faults)):
        assert run_case(2, seed_spec).sent > 20


def test_simulate_takes_a_plan_from_a_file(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[fault]]\nkind = "crash"\ntarget = "worker 1"\nat = "500ms"\nfor = "300ms"\n')
    out = tmp_path / "run"
    args = ["simulate", "INFER5", *WORDS, "--faults", str(plan), "--check", "--out", str(out)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "worker 1 lost" in result.output and "1 fault(s)" in result.stdout
    document = json.loads((out / "manifest.json").read_text())
    assert document["config"]["faults"]["faults"][0]["kind"] == "crash"


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("random:x", "the seed must be a whole number"),
        ("nowhere.toml", "cannot read the fault plan"),
    ],
)
def test_what_is_no_plan_is_refused(faults: str, words: str, tmp_path: Path) -> None:
    args = ["simulate", "INFER5", *WORDS, "--faults", faults, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and words in result.output
