"""The same experiment in real time: a worker with emulated GPUs, a controller and a client on 127.0.0.1.

live_real.py has workers with real models in the place of that one.

Each is a process of its own, started by its command line and ended here, whatever happens. Every wait has
an end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from slosched.cascade.cascade_file import write_cascade
from slosched.cascade.run import LOGS, Experiment, Report, finish
from slosched.clock import now_ns
from slosched.config_file import write_profile
from slosched.errors import InvalidConfig
from slosched.experiment.children import Child, ChildFailed, Children, ended_by_signals
from slosched.output_files import write_file
from slosched.telemetry.run_dir import claim_run_dir
from slosched.units import NS_PER_S

_READY_S = 60.0
_JOINED_S = 60.0
#: Loading, the last answers and leaving, beyond the length of the trace.
_CLIENT_EXTRA_S = 120.0
_POLL_S = 0.25

Show = Callable[[str], None]


def run_live(
    experiment: Experiment,
    out: Path,
    *,
    show: Show = lambda line: None,
    published: bool = False,
) -> Report:
    """Run `experiment` in real time into `out`, and make all files of it. `show` gets lines of progress.

    Raises ChildFailed if a process does not start, fails or does not end in time, InvalidConfig for settings
    that only virtual time has.
    """
    check_live(experiment)
    directory = free_directory(out)
    live = Live(experiment, directory, show)
    with ended_by_signals(), Children() as children:
        live.run(children)
    return finish(experiment, directory, kind="live", published=published)


def check_live(experiment: Experiment) -> None:
    """Raise InvalidConfig for settings that only virtual time has."""
    if experiment.faults is not None:
        raise InvalidConfig("--faults break things in virtual time; leave --live out")


def free_directory(out: Path) -> Path:
    """A directory without a run: `out`, or a numbered one in it. The controller claims it for itself."""
    directory = claim_run_dir(out)
    (directory / "manifest.json").unlink()
    return directory


class Live:
    """The processes of one experiment, in `directory`."""

    #: Requests bring no inputs, and answers no outputs.
    inputs = False
    client_extra_s = _CLIENT_EXTRA_S

    def __init__(self, experiment: Experiment, directory: Path, show: Show) -> None:
        self._experiment = experiment
        self._directory = directory
        self._logs = directory / LOGS
        self._settings = directory / "settings"
        self._show = show

    def run(self, children: Children) -> None:
        """From the first process to the last; the controller ends first, so that it writes everything."""
        self._logs.mkdir(parents=True, exist_ok=True)
        cascade = write_cascade(self._experiment.spec(), self._settings)
        ports = self.start_workers(children)
        controller = self._start_controller(children, ports, cascade)
        port = children.wait_ready(controller, within_s=_READY_S)
        self._await_joined(children, controller, len(ports))
        self._show(
            f"the controller is ready on port {port}, {self._experiment.workers} GPUs joined"
        )
        client = self._start_client(children, port, cascade)
        self._follow(children, client)
        children.end(controller)

    def start_workers(self, children: Children) -> list[int]:
        """The ports of the workers, which are ready. Raises ChildFailed."""
        profile = self._settings / "profile.toml"
        write_profile(profile, self._experiment.spec().profile(), replacing=True)
        words = ["worker", "--device", "emulated", "--gpus", str(self._experiment.workers)]
        words += ["--profile", str(profile), "--bind", "127.0.0.1", "--port", "0"]
        words += ["--preempt"] * self._experiment.preempt
        if self._experiment.exec_sigma:
            noise = profile.with_name("worker.toml")
            text = f"[noise]\nseed = {self._experiment.seed}\nexec_sigma = {self._experiment.exec_sigma!r}\n"
            write_file(noise, text.encode())
            words += ["--config", str(noise)]
        worker = children.start("worker", words, self._logs / "worker.log")
        return [children.wait_ready(worker, within_s=_READY_S)]

    def controller_words(self) -> list[str]:
        """What the controller needs to know beyond the cascade and the policy."""
        return []

    def _start_controller(self, children: Children, ports: list[int], cascade: Path) -> Child:
        options = self._settings / "controller.toml"
        scheduler = self._experiment.scheduler(self._experiment.spec())
        write_file(options, options_text(asdict(scheduler.cascade)).encode())
        workers = ",".join(f"127.0.0.1:{port}" for port in ports)
        words = ["controller", self._experiment.policy, "--workers", workers]
        words += ["--cascade", str(cascade), "--config", str(options)]
        words += ["--bind", "127.0.0.1", "--port", "0", "--http-port", "-1"]
        words += ["--max-gpus", str(scheduler.max_gpus), "--log-dir", str(self._directory)]
        words += ["--preempt"] * self._experiment.preempt
        words += self.controller_words()
        return children.start("controller", words, self._logs / "controller.log")

    def _await_joined(self, children: Children, controller: Child, workers: int) -> None:
        until_ns = now_ns() + int(_JOINED_S * NS_PER_S)
        while controller.text().count(" joined: ") < workers:
            if now_ns() > until_ns:
                whose = "the worker" if workers == 1 else f"one of {workers} workers"
                raise ChildFailed(
                    f"{whose} did not join the controller within {_JOINED_S:.0f} s: "
                    f"{controller.last_line()}",
                    controller,
                )
            children.wait(controller, _POLL_S)
            children.check()

    def _start_client(self, children: Children, port: int, cascade: Path) -> Child:
        experiment = self._experiment
        words = ["client", f"127.0.0.1:{port}", "cascade", str(cascade), experiment.trace]
        words += ["--seed", str(experiment.seed), "--json"]
        words += ["--no-inputs"] * (not self.inputs)
        if experiment.duration_ns is not None:
            words += ["--duration", f"{experiment.duration_ns}ns"]
        words += ["--out", str(self._directory)]
        return children.start("client", words, self._logs / "client.log")

    def _follow(self, children: Children, client: Child) -> None:
        ends_ns = self._experiment.workload().duration_ns or 0
        if self._experiment.duration_ns is not None:
            ends_ns = min(ends_ns, self._experiment.duration_ns)
        follow(children, client, ends_ns / NS_PER_S + self.client_extra_s, self._show)


def follow(
    children: Children, client: Child, within_s: float, show: Show = lambda line: None
) -> None:
    """Wait for the client's end, and see that the others serve; `show` gets its lines of progress.

    Raises ChildFailed if a process fails, or the client does not end within `within_s`.
    """
    until_ns = now_ns() + int(within_s * NS_PER_S)
    shown = ""
    while (code := children.wait(client, _POLL_S)) is None:
        children.check()
        if (line := client.last_line()) != shown and " in time so far " in line:
            shown = line
            show(line)
        if now_ns() > until_ns:
            raise ChildFailed(f"the client did not end within {within_s:.0f} s", client)
    if code != 0:
        raise ChildFailed(
            f"the client ended with exit code {code}: {client.last_line()} (all of it: {client.log})",
            client,
            code,
        )
    children.forget(client)


def options_text(options: dict[str, object]) -> str:
    """CascadeOptions as the table [cascade] of a controller's file."""
    lines = ["[cascade]"]
    for name, value in options.items():
        if name.endswith("_ns"):
            name, value = name.removesuffix("_ns"), f'"{value}ns"'
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, str):
            value = f'"{value}"'
        lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"
