"""benchmarks/gpu/real_cascades.py: its figures are right on a GPU in virtual time, its page is its results'."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import cascade_live as live  # noqa: E402
import cascade_models as models  # noqa: E402
import cascade_page as pages  # noqa: E402
import gpu_preemption as preemption  # noqa: E402
import real_cascades as bench  # noqa: E402

from fake_cuda import MS, STEP_SHARE  # noqa: E402
from made_cascade_run import mixed_run  # noqa: E402
from slosched.cascade.outcome import read_outcome  # noqa: E402
from slosched.cascade.summary import summarise  # noqa: E402
from slosched.core.scheduler.cascades import uniform  # noqa: E402
from slosched.gpu_profile import ModelProfile  # noqa: E402
from slosched.workloads.cascades import load_cascade  # noqa: E402
from test_cuda_preemption import LONG_NS, Rig  # noqa: E402

STEPS = 10
STEP_NS = round(LONG_NS * STEP_SHARE / STEPS)


class FakeModels(models.Models):
    """The bed on the rig of the tests, whose long program runs in steps."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.device = rig, rig.device
        times = {1: LONG_NS, 2: LONG_NS}
        profile = ModelProfile(
            "long", times, 1, 1, steps=STEPS, step_ns=dict.fromkeys(times, STEP_NS)
        )
        self.backend: Any = SimpleNamespace(
            _driver=rig.driver,
            _exec_stream=rig.driver.stream(-2),
            _programs={"long": rig.long, "short": rig.short},
            _profiles={"long": (profile, 0, 0)},
        )
        self.notes, self.ids = [], {"long": 0, "short": 1}
        self._ops, self._actions = 1000, 1000


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModels]:
    rig = Rig(steps=STEPS)
    for module in (preemption, models):
        monkeypatch.setattr(module, "now_ns", rig.clock)
        monkeypatch.setattr(module, "URGENT", "short")
    monkeypatch.setattr(models, "IMAGE", "output")
    yield FakeModels(rig)


def test_steps_parts_and_whole_passes_are_timed(bed: FakeModels) -> None:
    parts = models.part_times(bed, "long", 1)
    assert parts["step_ns"] == pytest.approx(STEP_NS, rel=0.01)
    assert parts["begin_ns"] + parts["finish_ns"] == pytest.approx(
        LONG_NS - STEPS * STEP_NS, rel=0.1
    )
    steps = models.step_times(bed, "long", 1, 2 * STEP_NS)
    assert steps["n"] == 200 and steps["error_p99"] == pytest.approx(-0.5, abs=0.01)
    passes = models.whole_passes(bed, "long", 1, LONG_NS)
    assert len(passes["ns"]) == 3 and abs(passes["error_worst"]) < 0.02


def test_answers_are_compared_alone_interrupted_and_with_a_direct_pass(bed: FakeModels) -> None:
    found = models.compare_answers(bed, "long", 1, 3)
    assert (found["images"], found["equal"], found["beside_equal"]) == (3, 3, 3)
    assert found["interrupted"] == 3 and found["worst"] == 0 and found["apart_mean"] > 0


def test_what_there_is_no_time_for_is_left_out(bed: FakeModels) -> None:
    (turbo, *_) = models.SUBJECTS
    assert models.batches_within(turbo, 1000, 1.0) == (1, 2, 4, 8, 16)
    assert models.batches_within(turbo, 46, 1.0) == (1, 2, 4, 8)
    assert models.batches_within(turbo, 46, 2.0) == ()
    bed.prepare = lambda name, batches, within_s: bed.backend._profiles["long"][0]  # type: ignore[method-assign]
    subject = models.Subject("long", "sdturbo", "heavy", turbo.plans)
    found = models.measure(bed, subject, (1, 2), lambda: 0.0)
    assert "parts" not in found and "step_times of batch 1" in found["left_out"]
    found = models.measure(bed, subject, (1, 2), lambda: 100.0)
    assert found["left_out"] == [] and found["published_ns"]["1"] == 1780 * MS
    assert found["parts"].keys() == {"1", "2"} and found["answers"]["1"]["images"] == 3


def test_what_is_in_the_results_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = bench.Results(tmp_path, "a GPU", None)
    results.left_out("model/diffusion/sdxl")
    results.put("live/setup", {**_setup(), "old": True})
    for policy, preempt in live.RUNS[1:]:
        results.put(live.run_key(policy, preempt), _row(tmp_path))
    again = bench.Results(tmp_path, "another GPU", None)
    assert again.document["runs"] == ["a GPU", "another GPU"]
    made: list[Any] = []

    def run(policy: str, preempt: bool, setup: dict[str, Any]) -> dict[str, Any]:
        made.append((policy, setup["old"]))
        return _row(tmp_path)

    fake = SimpleNamespace(
        seconds=70,
        make_references=lambda: None,
        start=dict,
        setup=lambda results: _setup(),
        run=run,
    )
    live.measure(fake, again, lambda: 60.0, lambda text: None)  # type: ignore[arg-type]
    assert made == [] and "live/CLIPPER-LIGHT" in again.document["left_out"]
    live.measure(fake, again, lambda: 500.0, lambda text: None)  # type: ignore[arg-type]
    assert made == [("CLIPPER-LIGHT", True)]
    assert "live/CLIPPER-LIGHT" not in again.document["left_out"]
    text = (tmp_path / "real_cascades.md").read_text(encoding="utf-8")
    assert "- model/diffusion/sdxl: no time was left" in text
    assert "| CASCADE --preempt |" in text and "random weights" in text


def _setup() -> dict[str, Any]:
    times = {"1": 100 * MS, "2": 200 * MS}
    return {
        "programs": ["light", "heavy"],
        "times_ns": {"light": times, "heavy": times},
        "slo_ns": 5000 * MS,
        "trace": "curve:1-2qps:70",
    }


def _row(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    if not run.exists():
        mixed_run(run)
    row = {"compared": vars(live.Compared(light=1, light_worst=0.5)), "client": {}}
    outcome = read_outcome(run)
    summary = summarise(outcome, load_cascade("sdturbo").quality).as_dict()
    return row | {"summary": summary, "latency_ns": live.latencies(outcome), "gpu": {"busy": 0.5}}


def test_a_served_image_counts_by_its_stage_and_is_told_from_another_prompts() -> None:
    right = {"light": np.zeros((len(live.PROMPTS), 2)), "heavy": np.ones((len(live.PROMPTS), 2))}
    right["heavy"][1] = 3
    found = live.Compared()
    live._count(found, "heavy", np.array([2.9, 3.0]), 1, right)
    assert (found.heavy, found.mixed) == (1, 0) and found.heavy_worst == pytest.approx(0.1)
    live._count(found, "heavy", np.array([2.9, 3.0]), 0, right)
    assert (found.heavy, found.mixed) == (2, 1)


def test_known_requests_are_deferred_by_turns() -> None:
    spec = load_cascade("sdturbo")
    users = live.user_ids(spec.seed)
    scores = [spec.scores.score_at(uniform(spec.seed, user)) for user in users]
    assert max(scores[::2]) < 0.001 < np.mean(scores[1::2]) and len(set(users)) == len(users)


@pytest.mark.skipif(not pages.RESULTS.exists(), reason="nothing was measured yet")
def test_the_committed_page_is_that_of_the_results() -> None:
    document = json.loads(pages.RESULTS.read_text(encoding="utf-8"))
    assert pages.page(document) == pages.PAGE.read_text(encoding="utf-8")


def test_parts_that_there_are_not_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--out", "nowhere", "--parts", "models,rest"])
    assert "choose from models, live" in capsys.readouterr().err
