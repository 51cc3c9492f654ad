"""A cascade of real models: measured on this machine, and served there by worker, controller and client.

As in live.py each is a process of its own, started by its command line. One worker serves each GPU; on a CPU
the number of workers is what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slosched.cascade.live import Live, Show, free_directory
from slosched.cascade.real import (
    Programs,
    largest_batch,
    measured_cascade,
    measured_text,
    with_notes,
    worker_text,
)
from slosched.cascade.run import Experiment, Report, finish, write_json
from slosched.cascade.summary import SUMMARY
from slosched.cascade_spec import CascadeSpec
from slosched.clock import now_ns
from slosched.config_file import load_profile
from slosched.errors import InvalidConfig, SloschedError
from slosched.experiment.children import ChildFailed, Children, ended_by_signals
from slosched.gpu_profile import GpuProfile
from slosched.output_files import write_file
from slosched.units import NS_PER_S

#: A worker imports torch and opens a GPU; a profile builds, checks and measures two models.
_READY_S, _PROFILE_S = 180.0, 1_800.0
#: Both models are prepared before the first request is sent.
_PREPARE_S = 700.0
_POLL_S = 0.25


@dataclass(frozen=True)
class Machine:
    """Where real models run: `device` "cpu" or "cuda", the number of workers, and the precision of weights.

    `config` is a worker's file that has the models, where they are one's own; None: they are a library's.
    """

    device: str
    workers: int
    dtype: str
    config: Path | None = None

    @property
    def devices(self) -> list[str]:
        """The device of each worker."""
        if self.device == "cpu":
            return ["cpu"] * self.workers
        if ":" in self.device:
            return [self.device]
        return [f"cuda:{number}" for number in range(self.workers)]

    @property
    def own(self) -> bool:
        """Whether the models are the operator's."""
        return self.config is not None

    @property
    def words(self) -> str:
        """The devices in words: "2 x cuda, float16"."""
        return f"{self.workers} x {self.device}, {self.dtype}"


# ------------------------------------------------------------------------------------ measuring


def measure(
    programs: Programs,
    machine: Machine,
    profile: Path,
    *,
    batches: str,
    logs: Path,
    show: Show = lambda line: None,
) -> GpuProfile:
    """Measure both programs on the first device into the file `profile`; what is in it is not measured again.

    It is `slosched profile` in a process of its own; `logs` gets its output. Raises ChildFailed if it fails or
    takes half an hour, InvalidConfig if the file is not a profile.
    """
    found = load_profile(profile.absolute()) if profile.exists() else None
    missing = [name for name in programs.both() if found is None or name not in found.models]
    for name in programs.both():
        if name not in missing:
            show(f"{name} was measured before: {profile}")
    if missing:
        words = ["profile", *missing, "--device", machine.devices[0], "--batches", batches]
        words += ["--out", str(profile), "--resume"]
        words += ["--dtype", machine.dtype]
        words += [] if machine.config is None else ["--config", str(machine.config)]
        logs.mkdir(parents=True, exist_ok=True)
        with ended_by_signals(), Children() as children:
            _follow(children, words, logs / "profile.log", show)
        found = load_profile(profile.absolute())
    assert found is not None
    lacking = [name for name in programs.both() if name not in found.models]
    if lacking:
        raise SloschedError(
            f"{', '.join(lacking)} could not be measured; see {logs / 'profile.log'}"
        )
    return found


def _follow(children: Children, words: list[str], log: Path, show: Show) -> None:
    child = children.start("profile", words, log)
    until_ns = now_ns() + int(_PROFILE_S * NS_PER_S)
    shown = 0
    while (code := children.wait(child, _POLL_S)) is None:
        lines = child.text().splitlines(keepends=True)
        whole = [line.removeprefix("slosched: ").rstrip() for line in lines if line.endswith("\n")]
        for line in whole[shown:]:
            show(line)
        shown = len(whole)
        if now_ns() > until_ns:
            raise ChildFailed(f"the models were not measured within {_PROFILE_S:.0f} s", child)
    children.forget(child)
    if code != 0:
        raise ChildFailed(
            f"the models could not be measured: {child.last_line()} (all of it: {log})", child, code
        )


def write_measured(
    path: Path,
    base: CascadeSpec,
    programs: Programs,
    profile: GpuProfile,
    machine: Machine,
    *,
    slo_ns: int | None = None,
) -> CascadeSpec:
    """Write the file of the measured cascade, which `slosched cascade run` takes, and return what it says.

    Raises InvalidConfig if the programs do not fit together, and as `write_file` does.
    """
    light, heavy = (profile.model(name) for name in programs.both())
    spec = measured_cascade(base, light, heavy, slo_ns=slo_ns)
    text = measured_text(
        spec, base, device=machine.devices[0], dtype=machine.dtype, own=machine.own
    )
    write_file(path, text.encode())
    return spec


# -------------------------------------------------------------------------------------- serving


class LiveReal(Live):
    """The processes of one experiment with real models on `machine`."""

    inputs = True
    client_extra_s = _PREPARE_S

    def __init__(
        self, experiment: Experiment, directory: Path, show: Show, machine: Machine
    ) -> None:
        super().__init__(experiment, directory, show)
        self._machine = machine

    def start_workers(self, children: Children) -> list[int]:
        machine = self._machine
        config = machine.config
        if config is None:
            spec = self._experiment.spec()
            programs = Programs(spec.light.model, spec.heavy.model)
            config = self._settings / "worker.toml"
            write_file(config, worker_text(programs, dtype=machine.dtype).encode())
        workers = []
        for number, device in enumerate(machine.devices):
            words = ["worker", "--device", device, "--bind", "127.0.0.1", "--port", "0"]
            words += ["--config", str(config)]
            # A CPU's worker has no boundaries to interrupt at.
            words += ["--preempt"] * (self._experiment.preempt and device != "cpu")
            workers.append(children.start(f"worker {number}", words, self._log(number)))
        return [children.wait_ready(each, within_s=_READY_S) for each in workers]

    def _log(self, number: int) -> Path:
        return self._logs / ("worker.log" if number == 0 else f"worker-{number}.log")

    def controller_words(self) -> list[str]:
        """No larger batch is prepared than was measured, and none that takes longer than the SLO helps."""
        spec = self._experiment.spec()
        return ["--max-batch", str(largest_batch(spec)), "--max-exec", f"{spec.slo_ns}ns"]


def run_real(
    experiment: Experiment,
    out: Path,
    machine: Machine,
    *,
    show: Show = lambda line: None,
    figures: bool = True,
) -> Report:
    """Serve `experiment`, whose cascade was measured on such a machine, with real models on `machine`.

    The summary says the device and what was not real. Raises as `run_live` does.
    """
    check_real(experiment, machine)
    directory = free_directory(out)
    live = LiveReal(experiment, directory, show, machine)
    with ended_by_signals(), Children() as children:
        live.run(children)
    report = finish(experiment, directory, kind="real", figures=figures)
    document: Mapping[str, Any] = with_notes(
        report.document, experiment.spec(), device=machine.words, own=machine.own
    )
    write_json(directory / SUMMARY, document)
    return replace(report, document=document)


def check_real(experiment: Experiment, machine: Machine) -> None:
    """Raise InvalidConfig for settings that emulated GPUs alone have."""
    if experiment.faults is not None or experiment.exec_sigma:
        raise InvalidConfig("--faults and --exec-sigma are for emulated GPUs; leave --real out")
    if experiment.judge_ns is not None:
        raise InvalidConfig(
            "--preset sets the judge's time, and a real judge takes its own: leave one out"
        )
    if machine.device != "cpu" and ":" in machine.device and machine.workers != 1:
        raise InvalidConfig(f"{machine.device} is one GPU; give --device cuda for several workers")
