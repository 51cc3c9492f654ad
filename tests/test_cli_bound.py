"""`slosched bound` and `slosched compare --bound`, as they are called."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slosched.analysis.bounded import hold_against
from slosched.cli.app import app
from slosched.errors import InvalidConfig

pytest.importorskip("scipy")

#: Two copies on one GPU, nearly too much for it, for 0.3 s at each of two SLOs.
WORDS = ("slo-exp-1", "resnet50_v2", "2", "poisson", "350", "3", "6", "2", "mul", "0.3")
SMALL = ("--gpus", "1", "--profile", "fig7")
QUICK = ("--windows", "2", "--window-length", "80ms", "--width", "4")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def test_the_table_has_a_row_for_each_step() -> None:
    result = invoke("bound", *WORDS, *SMALL, *QUICK)
    assert result.exit_code == 0, result.output
    title, headings, *rows = result.stdout.splitlines()
    assert "any scheduler on 1 GPU(s) (fig7), seed 0" in title
    assert "upper bound %" in headings and "achievable %" in headings
    assert [row.split()[0] for row in rows[:2]] == ["3x", "6x"]
    assert "first 300ms of each step, in time for the client" in rows[2]
    assert "estimated from 2 windows of 80ms" in rows[3]
    assert "bounds: step 1/2" in result.stderr


def test_json_has_everything_and_is_the_same_each_time() -> None:
    args = ("bound", *WORDS, *SMALL, *QUICK, "--json", "--seed", "3")
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["lead_ns"], document["tail_ns"]) == (400_000, 400_000)
    assert document["gpus"] == {"fig7": 1} and document["seed"] == 3
    for step in document["steps"]:
        assert step["achievable"] <= step["best_upper"] <= step["capacity"] <= 1
    assert invoke(*args).stdout == result.stdout


def test_the_controllers_deadlines_leave_out_the_clients_ways() -> None:
    args = ("bound", *WORDS, *SMALL, *QUICK, "--json", "--latency", "1ms,2ms,300us,100us")
    document = json.loads(invoke(*args, "--judge", "controller").stdout)
    assert (document["lead_ns"], document["tail_ns"]) == (300_000, 100_000)
    clients = json.loads(invoke(*args).stdout)
    assert (clients["lead_ns"], clients["tail_ns"]) == (1_300_000, 2_100_000)
    assert clients["steps"][0]["achievable"] < document["steps"][0]["achievable"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("spam", "resnet50_v2", "--duration", "1s"), "closed loops"),
        ((*WORDS, "--inputs"), "leave out --inputs"),
        ((*WORDS, "--exec-sigma", "0.01"), "exec times must be known"),
        ((*WORDS, "--faults", "random"), "leave out --faults"),
        ((*WORDS, "--judge", "me"), "unknown judge 'me'; known: client, controller"),
        ((*WORDS, "--span", "0"), "--span"),
        ((*WORDS, "--grid", "4ms"), "--grid"),
        (("slo-exp-1", "resnet50_v2"), "takes"),
        ((*WORDS, "--profile", "v100:4"), "--gpus says 6"),
    ],
)
def test_what_has_no_bounds_says_so_and_exits_with_2(args: tuple[str, ...], said: str) -> None:
    result = invoke("bound", *args)
    assert result.exit_code == 2 and said in result.stderr, result.output


def test_what_the_bounds_leave_out_is_said() -> None:
    result = invoke("bound", *WORDS, *SMALL, *QUICK, "--jitter", "50us", "--windows", "0")
    assert result.exit_code == 0 and "the bounds leave out --jitter" in result.stderr


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def no_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "scipy":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    result = invoke("bound", *WORDS, *SMALL)
    assert result.exit_code == 3 and "slosched[bound]" in result.stderr


def test_compare_holds_every_policy_against_the_bounds(tmp_path: Path) -> None:
    args = (
        "compare",
        "INFER5,FIFO",
        *WORDS,
        *SMALL,
        "--seeds",
        "1",
        "--bound",
        "--out",
        str(tmp_path),
    )
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    assert "of achievable %" in result.stdout and "upper bound" in result.stdout
    bounds = json.loads((tmp_path / "compare.json").read_text())["bounds"]
    assert [step["index"] for step in bounds["steps"]] == [0, 1] and bounds["seed"] == 0
    policies = {(each["policy"], each["step"]): each for each in bounds["policies"]}
    assert list(policies) == [("INFER5", 0), ("INFER5", 1), ("FIFO", 0), ("FIFO", 1)]
    for each in policies.values():
        assert each["of_upper"] <= each["of_achievable"] <= 1.0, each
    assert policies["INFER5", 0]["of_achievable"] > 0.93 > policies["FIFO", 0]["of_achievable"]
    assert (tmp_path / "compare.png").is_file()


def test_compare_says_before_it_runs_that_there_are_no_bounds(tmp_path: Path) -> None:
    out = tmp_path / "never"
    args = ("--bound", "--duration", "1s", "--seeds", "1", "--out", str(out))
    result = invoke("compare", "INFER5", "spam", "resnet50_v2", *args)
    assert result.exit_code == 2 and "closed loops" in result.stderr and not out.exists()


def test_a_run_of_other_requests_is_no_match(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = invoke("simulate", "EDF", *WORDS, *SMALL, "--out", str(out))
    assert run.exit_code == 0, run.output
    bound = {"index": 0, "slo": "3x", "start_ns": 0, "span_ns": 10**8, "requests": 5}
    with pytest.raises(InvalidConfig, match="the bound is for 5"):
        hold_against({"EDF": out}, [bound], first_ns=0)
