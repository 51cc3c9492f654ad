"""Cascades of real models: the measured file, the trace that fits the GPUs, and a run with small models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cascade_cli import done, ran
from slosched.cascade import live_real, real
from slosched.cascade.live_real import Machine
from slosched.cascade.real import Programs
from slosched.cascade_spec import CascadeSpec, StageSpec
from slosched.config_file import load_worker_config, write_profile
from slosched.core.scheduler.policies.published.diffserve.allocator import Problem, allocate
from slosched.errors import InvalidConfig
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.signature import Tensor
from slosched.units import NS_PER_MS as MS
from slosched.workloads.cascade_trace import Day, rates_named
from slosched.workloads.cascades import load_cascade

TURBO = load_cascade("sdturbo")
INPUTS = (Tensor("tokens", "int32", (77,)), Tensor("seed", "int64", (1,)))
IMAGE, SCORE = Tensor("image", "float32", (3, 8, 8)), Tensor("score", "float32", ())


def measured(name: str, times_ms: dict[int, float], **more: Any) -> ModelProfile:
    exec_ns = {batch: round(ms * MS) for batch, ms in times_ms.items()}
    values: dict[str, Any] = {"inputs": INPUTS, "outputs": (IMAGE,)} | more
    return ModelProfile(name, exec_ns, 2 * MS, 10**9, **values)


def light(**more: Any) -> ModelProfile:
    return measured("small", {1: 30, 2: 40, 4: 60}, outputs=(IMAGE, SCORE), score="score", **more)


def heavy(**more: Any) -> ModelProfile:
    return measured("large", {1: 445, 2: 600, 4: 1000}, **more)


# ------------------------------------------------------------------------------------- the spec


def test_a_measured_cascade_has_its_own_times_and_a_scaled_slo(tmp_path: Path) -> None:
    steps = {1: 8 * MS, 2: 11 * MS, 4: 19 * MS}
    spec = real.measured_cascade(TURBO, light(), heavy(steps=50, step_ns=steps))
    assert (spec.light.model, spec.heavy.model) == ("small", "large")
    assert spec.slo_ns == TURBO.slo_ns // 4  # as 445 ms to 1780
    assert spec.judge_ns == 0 and spec.light_ns[4] == 60 * MS
    assert (spec.scores, spec.quality, spec.threshold) == (
        TURBO.scores,
        TURBO.quality,
        TURBO.threshold,
    )
    assert spec.heavy.steps == 50 and spec.heavy.steps_ns[4] == 19 * MS
    assert (
        spec.profile().models["large"].step_ns[3] == 15 * MS
    )  # on emulated GPUs, between its neighbours
    assert spec.static_gpus == 0  # its plan has light batches of 16
    assert real.measured_cascade(TURBO, light(), heavy(), slo_ns=7).slo_ns == 7
    text = real.measured_text(spec, TURBO, device="cuda:0", dtype="float16")
    for words in (
        "Measured on cuda:0 in float16",
        "random weights",
        "replayed scores",
        "tabulated FID",
    ):
        assert words in text
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert load_cascade(path) == spec
    assert "the judge's own scores" in real.note(replace(spec, live_scores=True), own=True)


def test_steps_of_a_stage_must_fit_its_times() -> None:
    assert StageSpec("m", {1: 100}, steps=50).steps_ns == {1: 2}
    for wrong in ({"step_ns": {1: 2}}, {"steps": 50, "step_ns": {2: 2}}, {"steps": 200}):
        with pytest.raises(InvalidConfig, match="step"):
            StageSpec("m", {1: 100}, **wrong)


def test_light_batches_are_urgent_on_emulated_gpus_and_heavy_ones_never() -> None:
    for name in ("sdturbo", "sdxs", "sdxlltn"):
        spec = load_cascade(name)
        profile = spec.profile()
        assert spec.light_ns[1] <= profile.urgent_at_most_ns < spec.heavy.exec_ns[1]
        assert profile.models[spec.heavy.model].steps == 50


def test_programs_that_do_not_fit_together_are_refused() -> None:
    other = measured("large", {1: 445}, outputs=(Tensor("image", "float32", (3, 16, 16)),))
    with pytest.raises(InvalidConfig, match="other outputs"):
        real.measured_cascade(TURBO, light(), other)
    other = measured("large", {1: 445}, inputs=INPUTS[:1])
    with pytest.raises(InvalidConfig, match="other inputs"):
        real.measured_cascade(TURBO, light(), other)
    real.measured_cascade(replace(TURBO, passes_output=True), light(), other)


def test_a_cascade_of_another_name_needs_its_models_named() -> None:
    assert real.programs_of("sdxs").light == "diffusion/sdxs+judge"
    assert real.programs_of("mine", cpu=True).both() == real.TINY
    assert real.programs_of("sdxs", heavy="own").heavy == "own"
    with pytest.raises(InvalidConfig, match="--light and --heavy"):
        real.programs_of("mine", light="own")
    with pytest.raises(InvalidConfig, match="both 'own'"):
        real.programs_of("mine", light="own", heavy="own")


# ------------------------------------------------------------------------------------- the trace


def feasible(spec: CascadeSpec, gpus: int, demand: float) -> bool:
    problem = Problem(
        gpus, demand, spec.light_ns, spec.heavy.exec_ns, spec.scores, slo_ns=spec.slo_ns
    )
    return allocate(problem).feasible


@pytest.mark.parametrize("gpus", [1, 3])
def test_the_highest_demand_is_the_last_that_the_published_plan_can_serve(gpus: int) -> None:
    spec = real.measured_cascade(TURBO, light(), heavy())
    most = real.highest_demand(spec, gpus)
    assert most == pytest.approx(gpus * 4 / 0.06, rel=0.01)  # all light, in batches of 4
    assert feasible(spec, gpus, 0.999 * most) and not feasible(spec, gpus, 1.01 * most)


def test_a_trace_is_scaled_and_keeps_its_shape() -> None:
    spec = real.measured_cascade(TURBO, light(), heavy())
    trace = real.scaled_trace("4to32qps", spec, 1, peak=16, seconds=30)
    assert trace == "curve:2-16qps:30" and rates_named(trace) == Day(2, 16, 30)
    automatic = real.scaled_trace("2to8", spec, 1)
    assert automatic is not None
    rates = rates_named(automatic)
    assert isinstance(rates, Day) and rates.seconds == 90
    assert rates.high_per_s == pytest.approx(0.9 * real.highest_demand(spec, 1), rel=0.001)
    assert rates.low_per_s == pytest.approx(rates.high_per_s / 4, rel=0.001)
    for other in ("fixed_20", "double_2to4", "curve:1-2qps:9", "./trace.txt"):
        assert real.scaled_trace(other, spec, 1) is None
    short = replace(spec, slo_ns=MS)
    with pytest.raises(InvalidConfig, match="--slo"):
        real.trace_for(short, 1)


# ------------------------------------------------------------------------------------- measuring


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shown = tmp_path / "gpu.profile.toml", list[str]()
    asked: list[list[str]] = []

    def follow(children: object, words: list[str], log: Path, show: object) -> None:
        asked.append(words)
        models = {each.name: each for each in (light(), heavy())}
        write_profile(path, GpuProfile("gpu", models, 2**34), replacing=True)

    monkeypatch.setattr(live_real, "_follow", follow)
    write_profile(path, GpuProfile("gpu", {"small": light()}, 2**34), replacing=True)
    programs, machine = Programs("small", "large"), Machine("cuda", 2, "float16")
    for _ in range(2):
        found = live_real.measure(
            programs, machine, path, batches="1,2,4", logs=tmp_path / "logs", show=shown.append
        )
        assert found.models.keys() == {"small", "large"}
    (words,) = asked
    assert words[:4] == ["profile", "large", "--device", "cuda:0"] and "--resume" in words
    assert shown[0] == f"small was measured before: {path}" and len(shown) == 3
    out = tmp_path / "gpu.toml"
    spec = live_real.write_measured(out, TURBO, programs, found, machine)
    assert load_cascade(out) == spec and "cuda:0 in float16" in out.read_text(encoding="utf-8")


def test_workers_have_both_models_and_the_light_one_may_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(real.worker_text(Programs(*real.TINY), dtype="float16"), encoding="utf-8")
    small, large = load_worker_config(path).models
    assert (small.name, large.name) == real.TINY
    assert (small.urgent, large.urgent) == (True, False) and small.dtype == "float16"
    assert Machine("cuda", 2, "float16").devices == ["cuda:0", "cuda:1"]
    assert Machine("cuda:3", 1, "float16").devices == ["cuda:3"]


# ---------------------------------------------------------------------------------- the commands


def error_of(*words: str) -> str:
    result = ran(*words)
    assert result.exit_code in (2, 7), result.output
    return result.stderr


def test_wrong_words_are_refused_before_anything_starts(tmp_path: Path) -> None:
    assert "leave one out" in error_of("run", "sdturbo", "--real", "--live")
    assert "--peak is for real models" in error_of("run", "sdturbo", "--peak", "3")
    assert "unknown device" in error_of("run", "sdturbo", "--real", "--device", "tpu")
    assert "fewer than" in error_of("run", "sdturbo", "--real", "--device", "cuda:0")
    cpu = ("--real", "--device", "cpu")
    assert "for emulated GPUs" in error_of("run", "sdturbo", *cpu, "--exec-sigma", "0.1")
    assert "--preset" in error_of("run", "sdturbo", *cpu, "--preset", "sanity")
    mine = tmp_path / "mine.toml"
    mine.write_text(real.measured_text(TURBO, TURBO, device="cpu", dtype="float32"))
    given = ("run", str(mine), *cpu)
    assert "--peak must be a rate" in error_of(*given, "--peak", "much")
    assert "rates of its own" in error_of(*given, "--peak", "3", "--trace", "fixed_2")
    assert "is not overwritten" in error_of("profile", "sdturbo", "--out", str(mine))
    assert "ends in .toml" in error_of("profile", "sdturbo", "--out", str(tmp_path / "mine"))


WORKER = """
[models.light]
factory = "cascade_parts:Light"
score = "score"
[models.light.inputs.x]
shape = [6]

[models.heavy]
factory = "cascade_parts:Heavy"
[models.heavy.inputs.x]
shape = [6]
"""


@pytest.mark.torch
@pytest.mark.processes
def test_real_models_are_served_and_the_report_says_what_was_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests draw figures, which takes seconds.
    monkeypatch.setattr(live_real, "run_real", partial(live_real.run_real, figures=False))
    judged_models = pytest.importorskip("judged_models")
    shutil.copy(Path(judged_models.__file__), tmp_path / "cascade_parts.py")
    config = tmp_path / "worker.toml"
    config.write_text(WORKER, encoding="utf-8")
    stages = [StageSpec(name, {1: 5 * MS, 2: 6 * MS}) for name in ("light", "heavy")]
    spec = replace(
        TURBO, light=stages[0], heavy=stages[1], judge_ns=0, static_gpus=0, static_plan=()
    )
    mine = tmp_path / "mine.toml"
    mine.write_text(real.measured_text(spec, spec, device="cpu", dtype="float32", own=True))
    out = tmp_path / "out"
    words = ["run", str(mine), "--real", "--device", "cpu", "--worker-config", str(config)]
    words += ["--peak", "20", "--duration", "2s", "--out", str(out), "--json"]
    document = json.loads(done(*words).stdout)
    assert document == document | {"kind": "real", "device": "1 x cpu, float32"}
    assert document["trace"] == "curve:2.5-20qps:2" and document["workers"] == 1
    assert "replayed scores" in document["real"] and "random weights" not in document["real"]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["real"] == document["real"] in summary["quality"]
    counted = document["summary"]
    assert counted["requests"] > 5 and counted["answered"] == counted["requests"]
    assert counted["heavy"] > 0 and counted["light"] + counted["heavy"] == counted["answered"]
