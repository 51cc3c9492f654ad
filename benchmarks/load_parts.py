"""The parts that put load on a cluster: sweep, single, issue-delay, inputs."""

from __future__ import annotations

from dataclasses import dataclass

from cluster import PROFILE, Load, serving
from targets import INPUTS_SHARE, ISSUE_DELAY_P99_MS
from windows import SETTLE_NS, Recorder, Window

from slosched.units import NS_PER_MS, NS_PER_S

GPUS = 6
COPIES = 12
FACTOR = 1.5
SWEEP_RATES = (600, 1200, 2400)
SWEEP_STEPS = 7  # 1.5 to 17.1 times the model's own time
INPUT_RATES = (50, 100, 200, 300, 400, 500, 600, 800, 1000, 1200)
_SETTLE_S = SETTLE_NS / NS_PER_S


@dataclass(frozen=True)
class Settings:
    """How much is measured. `window_s` is one SLO step; `repeats` counts each window's repetitions."""

    repeats: int = 3
    window_s: float = 5.0
    quick: bool = False


def sweep(recorder: Recorder, settings: Settings) -> None:
    """Six GPUs, 12 copies, slo-exp-1 from 1.5x to 17.1x at three rates."""
    rates = SWEEP_RATES[:1] if settings.quick else SWEEP_RATES
    steps = 3 if settings.quick else SWEEP_STEPS
    for rate in rates:
        for repeat in range(settings.repeats):
            with serving(recorder.new_directory(f"sweep-{rate}"), gpus=GPUS) as cluster:
                load = Load(
                    rate=rate,
                    copies=COPIES,
                    slo_start=f"{FACTOR}",
                    slo_end=f"{FACTOR**steps:.9g}",
                    slo_factor=f"{FACTOR}",
                    period_s=settings.window_s,
                    steps=steps,
                    seed=repeat,
                )
                recorder.record(cluster, load, repeat=repeat)


def single_linear(recorder: Recorder, settings: Settings) -> None:
    """As `single`, on the device that the peers were measured with: any batch size, nothing padded."""
    single(recorder, settings, profile="v100-linear")


def single(recorder: Recorder, settings: Settings, *, profile: str = PROFILE) -> None:
    """One GPU, one model, 600 requests/s, SLO 25 ms and 10 ms."""
    for repeat in range(settings.repeats):
        with serving(
            recorder.new_directory(f"single-{profile}"), gpus=1, profile=profile
        ) as cluster:
            for slo in ("25ms", "10ms"):
                load = _steady(600, slo, settings.window_s, copies=1, seed=repeat)
                recorder.record(cluster, load, repeat=repeat)


def issue_delay(recorder: Recorder, settings: Settings) -> None:
    """How late the client sends at 2,400 requests/s to six GPUs."""
    with serving(recorder.new_directory("issue-delay"), gpus=GPUS) as cluster:
        for repeat in range(settings.repeats):
            load = _steady(2400, "100ms", settings.window_s, seed=repeat)
            recorder.record(cluster, load, repeat=repeat)


def inputs(recorder: Recorder, settings: Settings) -> None:
    """Rates with an input of 602 kB in each request, upwards until one does not hold."""
    rates = INPUT_RATES[:2] if settings.quick else INPUT_RATES
    with serving(recorder.new_directory("inputs"), gpus=GPUS) as cluster:
        for rate in rates:
            windows: list[Window] = []
            for repeat in range(settings.repeats):
                load = _steady(rate, "100ms", settings.window_s, inputs=True, seed=repeat)
                windows += recorder.record(cluster, load, repeat=repeat)
            clean = [window for window in windows if not window.void]
            if clean and not any(holds(window) for window in clean):
                return


def holds(window: Window) -> bool:
    """True if the rate was sent on time and served in time."""
    on_time = window.issue_delay_p99_ns < ISSUE_DELAY_P99_MS * NS_PER_MS
    return on_time and window.in_time >= INPUTS_SHARE * window.sent


def _steady(
    rate: float, slo: str, window_s: float, *, copies: int = COPIES, inputs: bool = False, seed: int
) -> Load:
    return Load(
        rate=rate,
        copies=copies,
        slo_start=slo,
        slo_end=slo,
        period_s=window_s + _SETTLE_S,
        inputs=inputs,
        seed=seed,
    )
