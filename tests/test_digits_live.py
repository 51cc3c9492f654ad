"""The cascade of digits served live: its trace, its commands, and what the kept answers are worth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from slosched.cascade.digits import models  # noqa: E402
from slosched.cascade.digits.data import Images  # noqa: E402
from slosched.cascade.digits.kept import Kept, compared, read_kept, worth  # noqa: E402
from slosched.cascade.digits.live import Trace, capacity_per_s  # noqa: E402
from slosched.cascade.digits.report import served_text  # noqa: E402
from slosched.cascade.digits.served import Yardstick, one_thread, requests_of  # noqa: E402
from slosched.cascade_spec import CascadeSpec, ScoreCurve, StageSpec  # noqa: E402
from slosched.cli.app import app  # noqa: E402
from slosched.cli.guard import guarded  # noqa: E402
from slosched.codes import Verdict  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402
from slosched.units import NS_PER_MS, NS_PER_S  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Tests run beside others: more threads would wait for one another."""
    with one_thread():
        yield


def test_a_trace_rises_from_a_fifth_of_its_peak_and_falls_again() -> None:
    trace = Trace(peak=0.5, duration_s=100, capacity_per_s=400)
    times = trace.at_ns()
    assert trace.peak_per_s == 200 and (np.diff(times) >= 0).all()
    assert times[0] >= 0 and times[-1] < 100 * NS_PER_S
    by_tenth = np.histogram(times, 10, (0, 100 * NS_PER_S))[0] / 10
    assert by_tenth[4:6] == pytest.approx([195, 195], rel=0.1)
    assert by_tenth[[0, 9]] == pytest.approx([45, 45], rel=0.25)
    assert times.tolist() == trace.at_ns().tolist()
    assert times.tolist() != Trace(0.5, 100, 400, seed=1).at_ns().tolist()


def test_capacity_is_that_of_full_heavy_batches() -> None:
    light = StageSpec("light", {1: NS_PER_MS, 8: 2 * NS_PER_MS})
    heavy = StageSpec("heavy", {1: 50 * NS_PER_MS, 8: 100 * NS_PER_MS})
    scores = ScoreCurve((0.0, 1.0), (0.0, 1.0))
    spec = CascadeSpec("digits", light, heavy, NS_PER_S, scores)
    assert capacity_per_s(spec, 3) == 240


# ------------------------------------------------------------------------------------- kept answers


#: Answers that the heavy program gives here, which take the time of 50 steps.
_HEAVY = 32


@pytest.fixture(scope="module")
def answers() -> tuple[Images, Images]:
    """The light answers to 160 requests, and the heavy ones to the first of them."""
    labels, seeds = (torch.from_numpy(each) for each in requests_of(160, _FIRST))
    with torch.inference_mode():
        by_light = models.light()(labels, seeds)["answer"].numpy()
        by_heavy = models.heavy()(labels[:_HEAVY], seeds[:_HEAVY])["answer"].numpy()
    return by_light, by_heavy


_FIRST = 70_000


def kept_of(answers: tuple[Images, Images], count: int, *, heavy: int, missed: int = 0) -> Kept:
    """Answers as a run would have kept them: the first `heavy` by that program, the last `missed` none."""
    labels, seeds = requests_of(count, _FIRST)
    given = answers[0][:count].copy()
    given[:heavy] = answers[1][:heavy]
    places = np.arange(count)
    stage = np.where(places < heavy, 1, 0)
    verdict = np.where(places < heavy, int(Verdict.HEAVY), int(Verdict.ACCEPTED))
    met = places < count - missed
    stage[~met], verdict[~met] = -1, 0
    return Kept(
        labels=labels[:, 0],
        seeds=seeds[:, 0],
        met=met,
        stage=stage,
        verdict=verdict,
        latency_ns=np.where(met, places * NS_PER_MS, -1),
        late_ns=np.zeros(count, np.int64),
        answers=given * met[:, None, None, None],
    )


def test_what_answers_are_worth_is_measured_on_as_many_of_each_run(
    answers: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.cascade.digits.kept._BOOTSTRAPS", 5)
    one, other = kept_of(answers, 160, heavy=32), kept_of(answers, 160, heavy=0, missed=50)
    few = kept_of(answers, 32, heavy=32)
    found = worth({"one": one, "other": other, "few": few})
    assert found["one"]["violations"] == 0 and found["other"]["violation_ratio"] == 50 / 160
    assert found["one"]["light_share"] == 0.8 and found["other"]["light_share"] == 1
    assert found["one"]["frechet_answers"] == found["other"]["frechet_answers"] == 110
    assert found["one"]["frechet"] > 0 < found["other"]["frechet_error"]
    assert "frechet" not in found["few"] and found["few"]["accuracy"] > 0.9
    assert found["one"]["latency_ms"]["p50"] == pytest.approx(79.5)
    for each in found.values():
        assert each["largest_difference"] < 1e-4 and each["compared"] >= 32
    document = {
        "requests": 160,
        "duration_s": 10.0,
        "workers": 2,
        "slo_ns": 360 * NS_PER_MS,
        "peak_per_s": 20.0,
        "peak": 1.0,
        "capacity_per_s": 20.0,
        "policies": found,
    }
    text = served_text(document)
    assert "| other | 0.3125 | 1.000 |" in text and "| few | 0.0000 | 0.000 | 0.000 | - |" in text
    assert "Distances are of 110 answers" in text


def test_an_answer_of_another_request_is_noticed(answers: tuple[Images, Images]) -> None:
    kept = kept_of(answers, 8, heavy=4)
    assert compared(kept)["largest_difference"] < 1e-4
    kept.answers[[0, 1]] = kept.answers[[1, 0]]
    assert compared(kept)["largest_difference"] > 0.3


def test_a_run_without_an_answer_has_no_quality(answers: tuple[Images, Images]) -> None:
    found = worth({"none": kept_of(answers, 5, heavy=0, missed=5)})["none"]
    assert found["violations"] == 5 and found["compared"] == 0 and "accuracy" not in found
    assert found["latency_ms"]["p99"] is None


def test_a_wrong_file_of_answers_is_named(tmp_path: Path) -> None:
    labels = np.zeros(1, np.int64)
    with pytest.raises(InvalidConfig, match="is not a file of answers"):
        read_kept(tmp_path / "none.npz", labels, labels)
    np.savez(tmp_path / "other.npz", met=np.ones(1, bool))
    with pytest.raises(InvalidConfig, match="is not a file of answers"):
        read_kept(tmp_path / "other.npz", labels, labels)


def test_the_yardstick_looks_at_whole_levels(answers: tuple[Images, Images]) -> None:
    ink = answers[0]
    rounded = np.asarray(np.round(ink * 16) / 16, np.float32)
    yardstick = Yardstick()
    assert np.array_equal(yardstick.see(ink).features, yardstick.see(rounded).features)


# ---------------------------------------------------------------------------------------- commands


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and message of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: app(["cascade", "digits", *words], prog_name="slosched"))
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def test_wrong_options_are_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    code, text = failure(capsys, "serve", "--out", out, "--policies", "fifo")
    assert code == 2 and "fifo" in text and "clipper-light" in text
    code, text = failure(capsys, "serve", "--out", out, "--policies", "cascade,CASCADE")
    assert code == 2 and "named twice" in text
    code, text = failure(capsys, "serve", "--out", out, "--measured", str(tmp_path))
    assert code == 2 and "digits.toml is not there" in text and "digits measure --out" in text
    (tmp_path / "file").write_text("")
    for command in ("measure", "serve", "train"):
        code, text = failure(capsys, command, "--out", str(tmp_path / "file"))
        assert code == 2 and "file" in text
    code, text = failure(capsys, "measure", "--out", out, "--weights", str(tmp_path))
    assert code == 2 and "no weights of the student" in text
    assert not Path(out).exists()


@pytest.mark.processes
def test_digits_are_served_live_and_every_answer_is_kept(tmp_path: Path) -> None:
    from slosched.cascade.digits.files import HEAVY, LIGHT
    from slosched.cascade.digits.live import run_live

    heavy = {1: 80 * NS_PER_MS, 8: 400 * NS_PER_MS}
    spec = CascadeSpec(
        name="digits",
        light=StageSpec(LIGHT, {1: 2 * NS_PER_MS, 8: 4 * NS_PER_MS}),
        heavy=StageSpec(HEAVY, heavy),
        slo_ns=3 * NS_PER_S,
        scores=ScoreCurve((0.0, 1.0), (0.0, 1.0)),
        live_scores=True,
    )
    trace = Trace(peak=0.7, duration_s=2.0, capacity_per_s=capacity_per_s(spec, 1))
    kept = run_live(spec, trace, tmp_path, workers=1, policies=["CASCADE"])["CASCADE"]
    found = worth({"CASCADE": kept})["CASCADE"]
    assert len(kept) == len(trace.at_ns()) > 5
    assert found["compared"] > 0 and found["largest_difference"] < 1e-4
    assert (kept.stage >= 0).all() and found["accuracy"] > 0.8
    text = (tmp_path / "cascade" / "logs" / "client.log").read_text()
    assert f"{len(kept)} requests" in text
    manifest = json.loads((tmp_path / "cascade" / "run" / "manifest.json").read_text())
    assert manifest["complete"]
