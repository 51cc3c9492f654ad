"""Opens a run's directory, runs an experiment in it, and checks that nothing is left behind.

A run never overwrites another: a directory that holds one gets run-002, run-003, ... within it. With `resume`
the newest run in it that is not complete, of the same experiment with the same options, is continued.
"""

from __future__ import annotations

import importlib
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from slosched.analysis.signature import signed
from slosched.clock import monotonic_ns
from slosched.errors import InvalidConfig, MissingPackage
from slosched.faasm.frame import Frame, Say
from slosched.faasm.frame_leaks import LeakCheck, Leaked, watched
from slosched.faasm.frame_report import write_report
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.faasm.layout import write_published
from slosched.faasm.names import REPLACED
from slosched.telemetry.manifest import finish_manifest, read_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.units import NS_PER_S

#: manifest.json of a run says "faasm sgd".
KIND = "faasm"
#: Packages whose versions a run depends on, where they are installed.
_PACKAGES = (
    "numpy",
    "numba",
    "scikit-learn",
    "distributed",
    "redis",
    "torch",
    "timm",
    "cupy-cuda13x",
    "msgspec",
)
LAYOUTS = ("slosched", "faasm")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to run. `options` are the experiment's own. `begin`: where there is nothing to resume, begin."""

    experiment: str
    options: Any
    scale: str
    out: Path
    resume: bool = False
    layout: str = "slosched"
    begin: bool = False

    def config(self) -> dict[str, Any]:
        """Options as the manifest keeps them."""
        made: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.options, enc_hook=str))
        return made


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: what was open is closed on the way out. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_experiment(order: Order, *, say: Say, show: Say) -> Frame:
    """Run the experiment, write its report, and return the frame. `say` prints progress, `show` answers.

    Raises what the experiment raises, Interrupted, RunDirectoryInUse, InvalidConfig for a directory of another
    run, MissingPackage, and Leaked if the run left something behind. The cells that were done stay.
    """
    module = module_of(order.experiment)
    if hasattr(module, "check"):
        module.check(order.options)
    with open_run(order, say=say, show=show) as frame:
        module.run(order.options, frame)
        if hasattr(module, "report"):
            module.report(order.options, frame)
        if order.layout == "faasm":
            _write_layout(frame)
    return frame


def _write_layout(frame: Frame) -> None:
    folders = write_published(frame.records(), frame.directory, frame.directory)
    for folder in folders:
        frame.say(f"wrote {folder}")
    if not folders:
        frame.say(
            f"--layout faasm has no effect: the original's layout has no folders for {frame.name}"
        )


def report_again(directory: Path, *, show: Say, layout: str = "slosched") -> Frame:
    """Make tables, figures and the report of a run again, from its records. Nothing is measured.

    Raises InvalidConfig if `directory` does not hold a run of an experiment.
    """
    manifest = read_manifest(directory)
    name = str(manifest.get("kind", "")).removeprefix(f"{KIND} ")
    if manifest.get("kind") != f"{KIND} {name}" or name not in EXPERIMENTS:
        raise InvalidConfig(
            f"{directory} does not hold a run of `slosched exp`; give its --out, or run-002 in it"
        )
    module = module_of(name)
    try:
        options = msgspec.convert(manifest.get("config"), options_of(name), strict=False)
    except msgspec.ValidationError as error:
        raise InvalidConfig(
            f"{directory}: its options are not those of this version: {error}"
        ) from None
    frame = Frame(directory, name, scale=str(manifest.get("scale")), say=show, show=show)
    if not frame.records():
        raise InvalidConfig(f"{directory} has no complete cell; there is nothing to report")
    with signed(REPLACED):
        getattr(module, "report", module.run)(options, frame)
    write_report(frame, manifest)
    if layout == "faasm":
        _write_layout(frame)
    return frame


def module_of(experiment: str) -> Any:
    """The module of an experiment. Raises MissingPackage if it, or what it needs, is not installed."""
    return _imported(experiment, EXPERIMENTS[experiment].module)


def options_of(experiment: str) -> Any:
    """The class of an experiment's options. Nothing heavy is imported. Raises MissingPackage."""
    module, _, name = EXPERIMENTS[experiment].options.partition(":")
    return getattr(_imported(experiment, module), name)


def _imported(experiment: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing.startswith("slosched."):
            raise MissingPackage(
                f"the experiment {experiment} is not in this installation ({missing})"
            ) from None
        raise MissingPackage(
            f"the experiment {experiment} needs {missing}, which is not installed: "
            "pip install 'slosched[faasm]'"
        ) from None


def seeds_of(options: Any) -> dict[str, int]:
    """The seeds among the options, for the manifest: whole numbers in fields that are called so."""
    names = (each.name for each in fields(options) if "seed" in each.name)
    return {name: value for name in names if isinstance(value := getattr(options, name), int)}


@contextmanager
def open_run(order: Order, *, say: Say, show: Say) -> Iterator[Frame]:
    """The frame of a run whose directory is this process's alone within the block.

    At the end the report is written and the leak check made, also behind an error or Ctrl-C.
    """
    from slosched.experiment.campaign import alone_in

    directory, manifest = _claim(order)
    namespace = f"exp-{order.experiment}-{secrets.token_hex(4)}"
    with alone_in(directory), watched(namespace) as leaks, _signals(), signed(REPLACED):
        _begin(order, directory, manifest)
        frame = Frame(
            directory,
            order.experiment,
            scale=order.scale,
            namespace=namespace,
            say=say,
            show=show,
            leaks=leaks,
        )
        kept = len(frame.cells)
        frame.say(
            f"{order.experiment} at scale {order.scale}, in {directory}; {kept} cells are there already"
        )
        frame.say(REPLACED)
        with _ends(frame, leaks):
            yield frame


@contextmanager
def _ends(frame: Frame, leaks: LeakCheck) -> Iterator[None]:
    """Complete the manifest when the block ends, however it does; leaks fail the run."""
    directory = frame.directory
    error: BaseException | None = None
    try:
        yield
        frame.say("looking for what the run left behind")
        leaks.check()
        if leaks.unknown:
            frame.say(
                f"in shared memory, and perhaps another program's: {', '.join(leaks.unknown)}"
            )
    except BaseException as caught:
        error = caught
        if not isinstance(caught, Leaked):
            try:
                leaks.check()
            except Leaked as leaked:  # the first error says more
                frame.say(str(leaked))
        raise
    finally:
        reason = "" if error is None else str(error) or type(error).__name__
        if isinstance(error, Interrupted):
            reason = signal.Signals(error.number).name
        outcome: dict[str, Any] = {"complete": error is None, "cells": len(frame.cells)}
        finish_manifest(directory, outcome | ({"ended_by": reason} if reason else {}))
        if frame.tables or error is None:
            write_report(frame, read_manifest(directory))
        if reason:
            frame.say(f"ended by {reason}; {len(frame.cells)} cells are kept")


def _claim(order: Order) -> tuple[Path, dict[str, Any]]:
    """The directory, and the manifest of the run that is continued in it ({}: a new one)."""
    if not order.resume:
        return claim_run_dir(order.out), {}
    if order.begin and not order.out.exists():
        return claim_run_dir(order.out), {}
    kind, wanted = f"{KIND} {order.experiment}", order.config()
    runs = [order.out, *sorted(order.out.glob("run-[0-9]*"))]
    found = [(path, read_manifest(path)) for path in runs]
    ours = [(path, each) for path, each in found if each.get("kind") == kind]
    if not ours:
        raise InvalidConfig(
            f"{order.out} holds no run of {order.experiment} to resume; leave --resume out"
        )
    for path, manifest in reversed(ours):
        if manifest.get("config") == wanted and manifest.get("scale") == order.scale:
            return path, manifest
    path, manifest = ours[-1]
    before = manifest.get("config") or {}
    differ = [key for key in sorted({*before, *wanted}) if before.get(key) != wanted.get(key)]
    if manifest.get("scale") != order.scale:
        differ.append("scale")
    raise InvalidConfig(
        f"{path} is a run with another {', '.join(differ)}; "
        "give the same options to resume it, or another --out"
    )


def _begin(order: Order, directory: Path, before: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    sessions = before.get("sessions")
    extra = {
        "run": before.get("run")
        or f"{now.replace(':', '')}-{order.experiment}-{secrets.token_hex(4)}",
        "scale": order.scale,
        "options_at_scale": _at_scale(order),
        "replaced": REPLACED,
        "versions": versions(),
        "layout": order.layout,
        # Each time that the run was begun or continued.
        "sessions": [*(sessions if isinstance(sessions, list) else []), now],
    }
    write_manifest(
        directory, f"{KIND} {order.experiment}", order.config(), seeds_of(order.options), extra
    )


def _at_scale(order: Order) -> dict[str, Any]:
    """The options that a run has, with what the scale says in place of what was not given."""
    if not hasattr(order.options, "at_scale"):
        return order.config()
    return replace(order, options=order.options.at_scale(order.scale)).config()


def versions() -> dict[str, str]:
    """Versions of the packages that measurements depend on, by name. Nothing is imported."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _signals() -> Iterator[None]:
    """Raise Interrupted on the first SIGINT or SIGTERM; one that comes a second later has its usual effect.

    Those that come at once are the same: `timeout` and shells send one to a process and to its group.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first_ns = 0

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first_ns
        if not first_ns:
            first_ns = monotonic_ns()
            raise Interrupted(number)
        if monotonic_ns() - first_ns >= NS_PER_S:
            give_back()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        give_back()


def default_out(experiment: str) -> Path:
    """Where a run goes that is not told: ./slosched-runs/<UTC time>-exp-NAME, or $CLOCKWORK_LOG_DIR."""
    from slosched.telemetry.run_dir import default_log_dir

    return default_log_dir(f"exp-{experiment}")
