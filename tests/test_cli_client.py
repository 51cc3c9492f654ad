"""`slosched client` with and without an address; the questions to a controller as text and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slosched.cli.ask
import slosched.cli.run
import slosched.clients.one_shot
from slosched.cli.app import app
from slosched.clients.inference import Inference, Model, Unloaded
from slosched.clients.one_shot import OneShot
from slosched.errors import DeadlineExceeded, InvalidRequest
from slosched.loadgen.results import RunResult, StepResult
from slosched.messages import InferReply, ModelInfo
from slosched.workloads import WORKLOADS, Workload

SEED = ["slo-exp-1", "resnet50_v2", "12", "poisson", "600", "1", "100", "1.5", "mul", "30"]
INFO = ModelInfo(
    model_id=7,
    name="resnet50",
    copy=0,
    batch_sizes=(1, 2),
    b1_ns=2_600_000,
    weights_ns=8_330_000,
    weights_bytes=102_160_300,
    input_shape=(3, 224, 224),
    input_dtype="float32",
    output_shape=(1000,),
    output_dtype="float32",
    gpus_resident=2,
    clients=1,
    random_weights=True,
    labels=(),
)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What run_live was asked to do, one entry for each call."""
    calls: list[dict[str, Any]] = []

    def run_live(address: str, spec: Workload, **more: Any) -> int:
        calls.append({"address": address, "spec": spec, **more})
        return 0

    monkeypatch.setattr(slosched.cli.run, "run_live", run_live)
    monkeypatch.delenv("CLOCKWORK_DISABLE_INPUTS", raising=False)
    return calls


def sweep(sweeps: list[dict[str, Any]], *args: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["client", *args])
    assert result.exit_code == 0, result.output
    return sweeps.pop()


# ---------------------------------------------------------------------------------- slo-exp-1


def test_both_forms_of_the_seeds_command(sweeps: list[dict[str, Any]]) -> None:
    without = sweep(sweeps, *SEED)
    with_address = sweep(sweeps, "cluster02:12399", *SEED)
    assert without["address"] == "127.0.0.1:12346"
    assert with_address["address"] == "cluster02:12399"
    assert without["spec"] == with_address["spec"]
    assert len(without["spec"].steps()) == 12
    assert without["spec"].duration_ns == 360 * 10**9


def test_options_may_follow_or_precede_the_values(sweeps: list[dict[str, Any]]) -> None:
    after = sweep(sweeps, *SEED, "--no-inputs", "--seed", "3", "--out", "x", "--json")
    before = sweep(
        sweeps, "slo-exp-1", "--no-inputs", "--seed=3", "--out", "x", "--json", *SEED[1:]
    )
    assert after == before
    assert (after["inputs"], after["seed"], after["out"], after["json"]) == (
        False,
        3,
        Path("x"),
        True,
    )


def test_the_environment_turns_inputs_off(
    sweeps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(sweeps, *SEED)["inputs"] is True
    monkeypatch.setenv("CLOCKWORK_DISABLE_INPUTS", "1")
    assert sweep(sweeps, *SEED)["inputs"] is False
    assert sweep(sweeps, *SEED, "--inputs")["inputs"] is True


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["slo-exp-9", "1"],
            "unknown workload 'slo-exp-9' (did you mean slo-exp-2?); known: ",
        ),
        (
            ["slo-exp-9", "1"],
            "(drain, infer, max-rate, models, status and unload are commands beside the workloads, and a file",
        ),
        (["127.0.0.1:12346", "spa"], "unknown workload 'spa'"),
        (["cluster02", *SEED], "'cluster02' is not a host:port"),
        (["cluster02:port", *SEED], "'cluster02:port' is not a host:port"),
        (["cluster02:70000", *SEED], "1..65535"),
        (SEED[:-1], "takes 9 values, not 8"),
        ([*SEED, "1"], "takes 9 values, not 10"),
        ([*SEED[:4], "-600", *SEED[5:]], "rate must be a finite number > 0, not -600"),
        ([*SEED[:3], "pareto", *SEED[4:]], "unknown distribution 'pareto'"),
        ([*SEED[:8], "div", "30"], "unknown slo-op 'div'"),
        ([*SEED[:9], "-.5"], "negative"),
        ([*SEED[:5], "nan", *SEED[6:]], "slo-start"),
        ([*SEED, "--sed", "3"], "--seed"),
        (["infer", "m", "--slo", "-5ms"], "--slo: '-5ms' is negative"),
    ],
)
def test_what_is_wrong_is_named(sweeps: list[dict[str, Any]], args: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["client", *args])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not sweeps


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_each_workload_is_a_command_that_explains_itself(
    name: str, sweeps: list[dict[str, Any]]
) -> None:
    kind = WORKLOADS[name]
    text = CliRunner().invoke(app, ["client", name, "--help"]).stdout
    one_line = " ".join(text.split())
    assert " ".join(kind.summary.split()) in one_line
    for parameter in kind.parameters:
        assert f"\n    {parameter.name} " in text
        assert parameter.default is None or f"(default {parameter.default or 'none'})" in one_line
    for example in kind.examples:
        assert f"slosched client {name} {example}".rstrip() in text
    assert "Traceback" not in text


def test_the_workloads_are_listed_with_their_whole_summaries() -> None:
    one_line = " ".join(CliRunner().invoke(app, ["client", "--help"]).stdout.split())
    for kind in WORKLOADS.values():
        assert f"{kind.name} {' '.join(kind.summary.split())}" in one_line
    assert "infer Send one request" in one_line


def test_a_file_is_a_workload(sweeps: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    names = [parameter.key for parameter in WORKLOADS["slo-exp-1"].parameters]
    lines = [f'{key} = "{value}"' for key, value in zip(names, SEED[1:], strict=True)]
    file.write_text("\n".join(['workload = "slo-exp-1"', *lines]))
    asked = sweep(sweeps, "cluster02:12399", str(file), "--duration", "60", "--seed", "2")
    assert asked["spec"] == sweep(sweeps, *SEED)["spec"]
    assert asked["address"] == "cluster02:12399" and asked["seed"] == 2
    assert asked["duration_ns"] == 60 * 10**9
    assert sweep(sweeps, *SEED, "--duration", "250ms")["duration_ns"] == 250_000_000


def sweep_result(**changed: Any) -> RunResult:
    step = StepResult(
        index=0,
        slo="2x",
        group="",
        slo_factor=2.0,
        slo_ns=5_200_000,
        duration_ns=10**9,
        sent=100,
        in_time=90,
        met=95,
        codes={"ok": 95, "timed out": 5},
        latency_p50_ns=3_000_000,
        latency_p99_ns=5_000_000,
        issue_delay_p50_ns=1,
        issue_delay_p99_ns=2,
    )
    fields: dict[str, Any] = {
        "workload": "w",
        "steps": (step,),
        "complete": True,
        "problem": "",
        "issue_delay_p50_ns": 1,
        "issue_delay_p99_ns": 2,
        "inputs": False,
        "random_weights": True,
        "elapsed_ns": 10**9,
        "run_dir": Path("runs/1"),
    }
    return RunResult(**{**fields, **changed})


def test_a_run_that_sent_nothing_does_not_count_as_valid_in_words() -> None:
    nothing = sweep_result(steps=())
    assert nothing.verdict == "nothing was sent"
    cut = sweep_result(steps=(), complete=False, problem="stopped")
    assert cut.verdict == cut.as_dict()["verdict"] == "nothing was sent (stopped)"
    assert sweep_result().verdict.startswith("valid: ")


def run_with(monkeypatch: pytest.MonkeyPatch, result: RunResult, *args: str) -> Any:
    async def run_workload(*given: Any, **more: Any) -> RunResult:
        return result

    monkeypatch.setattr(slosched.cli.run, "run_workload", run_workload)
    return CliRunner().invoke(app, ["client", *SEED, *args])


def test_a_sweep_prints_both_judgements(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_with(monkeypatch, sweep_result())
    assert result.exit_code == 0, result.output
    assert "90.00 % in time (client), 95.00 % met (controller)" in result.stdout
    assert "5 timed out" in result.stdout
    assert "written to runs/1" in result.stdout


def test_a_sweep_as_json_is_nothing_but_json(monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(run_with(monkeypatch, sweep_result(), "--json").stdout)
    assert document["sent"] == 100
    assert document["satisfaction_client_from_scheduled_send"] == 0.9


def test_a_sweep_that_lost_its_controller_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = sweep_result(complete=False, problem="the controller went away")
    result = run_with(monkeypatch, gone)
    assert result.exit_code == 5
    assert "the controller went away" in result.stderr


# ------------------------------------------------------------------------- models and status


def answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def ask(address: str, question: str) -> Any:
        asked.append((address, question))
        return answer

    monkeypatch.setattr(slosched.cli.ask, "_ask", ask)
    return asked


def test_models_as_text_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, ((INFO,), ("resnet50", "resnet18")))
    text = CliRunner().invoke(app, ["models"]).stdout
    assert "2.6ms" in text
    assert "3x224x224 float32" in text
    assert "loadable: resnet50, resnet18" in text
    document = json.loads(CliRunner().invoke(app, ["models", "c:1", "--json"]).stdout)
    assert document["models"][0]["b1_ns"] == 2_600_000
    assert document["models"][0]["input_shape"] == [3, 224, 224]
    CliRunner().invoke(app, ["client", "d:2", "models"])
    assert asked == [("127.0.0.1:12346", "models"), ("c:1", "models"), ("d:2", "models")]


REPORT: dict[str, Any] = {
    "policy": "INFER5",
    "fidelity": "best",
    "ready": True,
    "draining": False,
    "options": {"max_gpus": 6, "schedule_ahead_ns": 5_000_000},
    "requests": {"arrived": 10, "answered": 9, "by_code": {"0 ok": 9}},
    "clients": [{"name": "me", "unanswered": 1}],
    "workers": [
        {
            "worker_id": 0,
            "state": "joined",
            "host": "h",
            "device": "emulated",
            "activity": "",
            "gpus": [{"gpu_id": 0, "pages": 100, "free_pages": 93, "busy_ns": 10**9}],
        },
        {"worker_id": 1, "state": "silent", "gpus": []},
    ],
    "models": [{"name": "resnet50", "state": "loaded", "b1_ns": 2_600_000, "queued": 3}] * 2,
}


def test_status_as_text_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, REPORT)
    text = CliRunner().invoke(app, ["status"]).stdout
    assert "INFER5 (best), ready, 1 of 2 workers joined" in text
    assert "schedule_ahead 5ms" in text
    assert "7/100" in text
    assert "2 copies (2 loaded), b1 2.6ms, 6 queued" in text
    assert json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout) == REPORT


def test_status_of_a_controller_of_another_version_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers(monkeypatch, {"workers": [{}], "models": [{}]})
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------- unload


def unloads(
    monkeypatch: pytest.MonkeyPatch, answer: Unloaded | InvalidRequest
) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def ask(address: str, question: str, model: str, **options: Any) -> Unloaded:
        asked.append((address, question, model, options))
        if isinstance(answer, Unloaded):
            return answer
        raise answer

    monkeypatch.setattr(slosched.cli.ask, "_ask", ask)
    return asked


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Unloaded(3, 1), "3 instances unloaded, 1 kept: other clients use it"),
        (Unloaded(1, 2), "1 instance unloaded, 2 kept: other clients use them"),
        (Unloaded(0, 1_200), "0 instances unloaded, 1,200 kept: other clients use them"),
        (Unloaded(12, 0), "12 instances unloaded"),
    ],
)
def test_unload_says_in_one_line_what_it_came_to(
    monkeypatch: pytest.MonkeyPatch, answer: Unloaded, said: str
) -> None:
    unloads(monkeypatch, answer)
    result = CliRunner().invoke(app, ["unload", "resnet50_v2"])
    assert (result.exit_code, result.stdout) == (0, f"resnet50_v2: {said}\n")
    document = json.loads(CliRunner().invoke(app, ["unload", "resnet50_v2", "--json"]).stdout)
    assert document == {"model": "resnet50_v2", "unloaded": answer.unloaded, "kept": answer.kept}


def test_unload_passes_its_words_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = unloads(monkeypatch, Unloaded(1, 0))
    for words in (
        ["unload", "m"],
        ["unload", "m", "c:1", "--force", "--name", "ops"],
        ["client", "d:2", "unload", "m", "--force"],
    ):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert asked == [
        ("127.0.0.1:12346", "unload", "m", {"name": "", "force": False}),
        ("c:1", "unload", "m", {"name": "ops", "force": True}),
        ("d:2", "unload", "m", {"name": "", "force": True}),
    ]


def test_an_unload_that_is_refused_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    unloads(monkeypatch, InvalidRequest("only operators may", code=6))
    result = CliRunner().invoke(app, ["unload", "m", "--force"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "slosched: error: only operators may\n"


# ------------------------------------------------------------------------------------- infer


def one_shot(code: int, reason: str = "") -> Inference:
    reply = InferReply(
        request_id=1,
        code=code,
        reason=reason,
        model_id=7,
        slo_ns=25_000_000,
        latency_ns=4_000_000,
        deadline_met=code == 0,
        predicted_exec_ns=2_600_000,
    )
    return Inference(Model(INFO, 1), {}, reply, 5_000_000)


def test_infer_passes_its_words_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def infer_once(*args: Any) -> OneShot:
        asked.append(args)
        return OneShot(one_shot(0), ())

    monkeypatch.setattr(slosched.clients.one_shot, "infer_once", infer_once)
    result = CliRunner().invoke(
        app, ["client", "c:1", "infer", "resnet50_v2", "cat.jpg", "--slo", "25ms"]
    )
    assert result.exit_code == 0, result.output
    assert asked == [("c:1", "resnet50_v2", ["cat.jpg"], "25ms")]
    assert "4ms of 25ms" in result.stdout
    document = json.loads(CliRunner().invoke(app, ["client", "infer", "m", "--json"]).stdout)
    assert document["deadline_met"] is True


def test_a_refusal_says_all_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = one_shot(8, "could start in 30ms at the earliest")

    def infer_once(*args: Any) -> OneShot:
        refused.raise_for_code()
        raise AssertionError

    monkeypatch.setattr(slosched.clients.one_shot, "infer_once", infer_once)
    result = CliRunner().invoke(app, ["client", "infer", "m"])
    assert result.exit_code == DeadlineExceeded.exit_code
    assert "could start in 30ms" in result.stdout
    assert result.stdout.count("could start in 30ms") == 1
    said_once = "slosched: error: model 'resnet50': not served, could not start in time (code 8)\n"
    assert result.stderr == said_once
    document = json.loads(CliRunner().invoke(app, ["client", "infer", "m", "--json"]).stdout)
    assert (document["code"], document["remaining_ns"]) == (8, 21_000_000)


def test_a_trace_that_is_made_first_is_announced_by_the_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(*given: Any, **more: Any) -> int:
        return 0

    monkeypatch.delenv("AZURE_TRACE_DIR", raising=False)
    monkeypatch.setattr("slosched.cli.run.run_live", made)
    monkeypatch.setattr("slosched.cli.simulate._run_one", made)
    for command in (["client", "azure_small"], ["simulate", "FIFO", "azure_small"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "slosched: making a synthetic trace" in result.stderr
