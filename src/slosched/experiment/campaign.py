"""All live runs of an experiment, one after the other, in one directory; then the figure, and the word Exiting.

    OUT/manifest.json            what the experiment is, and how it ended
    OUT/run.log                  the lines of its progress; the last one is Exiting
    OUT/NAME/                    a run: manifest.json, logs of each process, client.json, run/ (telemetry)
    OUT/figures/                 the figure, its numbers and its table

A run that is complete has a manifest that says so. With `resume` such a run of the same configuration is kept;
one that is not complete is left where it is, and made again in NAME/run-002.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn
from slosched.clock import now_ns
from slosched.errors import InvalidConfig, RunDirectoryInUse, SloschedError
from slosched.experiment.figures import Figure, Part
from slosched.experiment.hosts import Hosts
from slosched.experiment.result import document, write_result
from slosched.experiment.run import RUN, run_part
from slosched.loadgen.results import RunResult
from slosched.telemetry.manifest import finish_manifest, read_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.units import NS_PER_S
from slosched.version import __version__

FIGURES_FOLDER = "figures"
LOG = "run.log"
_KIND, _RUN_KIND = "experiment", "experiment-run"
#: What a run takes beside its sending, before one has been measured: starting, loading, ending, fetching.
_OVERHEAD_S = 15.0

#: Prints a line of progress.
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A figure's live runs on their hosts. `session` names folders on the hosts."""

    figure: Figure
    scale: str
    parts: tuple[Part, ...]
    hosts: Hosts
    out: Path
    session: str
    resume: bool = False
    fewer_gpus: bool = False

    def described(self) -> dict[str, Any]:
        return {
            "figure": self.figure.name,
            "scale": self.scale,
            "configurations": [part.name for part in self.parts],
            "hosts": self.hosts.described(),
        }

    def spec(self, part: Part) -> dict[str, Any]:
        """What a finished run must have been made of to stand for this one."""
        spec = part.described() | {
            "inputs": part.inputs,
            "duration_ns": part.duration_ns,
            "hosts": self.hosts.described(),
            "slosched": __version__,
        }
        made: dict[str, Any] = json.loads(json.dumps(spec))
        return made


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the directory of an experiment for this process and those that it forks.

    Raises RunDirectoryInUse while another process has it.
    """
    log = os.open(out / LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(log)
        raise RunDirectoryInUse(f"another process runs an experiment in {out}") from None
    try:
        yield
    finally:
        os.close(log)  # not unlocked: a process in the background keeps it


def claim(experiment: Experiment) -> None:
    """Make the experiment's directory. Raises RunDirectoryInUse if it holds one and `resume` is not set."""
    if experiment.resume and read_manifest(experiment.out).get("kind") == _KIND:
        return
    if experiment.resume and experiment.out.exists() and any(experiment.out.iterdir()):
        raise InvalidConfig(f"{experiment.out} holds no experiment to resume; choose its --out")
    try:
        claim_run_dir(experiment.out, exclusive=True)
    except RunDirectoryInUse:
        raise RunDirectoryInUse(
            f"{experiment.out} already holds an experiment; --resume continues it, or choose another --out"
        ) from None


def finished(experiment: Experiment, part: Part) -> Path | None:
    """The directory of a complete run of this part; None if there is none.

    Raises InvalidConfig for a complete run of that name which is another one.
    """
    place = experiment.out / part.name
    wanted = experiment.spec(part)
    for directory in (place, *sorted(place.glob("run-*"))):
        manifest = read_manifest(directory)
        if manifest.get("kind") != _RUN_KIND or not manifest.get("complete"):
            continue
        spec = manifest.get("config")
        if spec == wanted:
            return directory
        found = spec if isinstance(spec, dict) else {}
        differ = [key for key in wanted if found.get(key) != wanted[key]]
        raise InvalidConfig(
            f"{directory} is a finished run with another {', '.join(differ) or 'form'}; choose another "
            "--out, or move it away"
        )
    return None


def run_experiment(experiment: Experiment, say: Say) -> Drawn:
    """Make every run that is not there yet, and draw the figure.

    Raises what `run_part` raises, and what drawing raises; the runs that were complete stay.
    """
    began_ns = now_ns()
    kept = {part.name: finished(experiment, part) for part in experiment.parts}
    write_manifest(experiment.out, _KIND, experiment.described())
    clock = _TimeLeft([part for part in experiment.parts if kept[part.name] is None])
    runs: list[Path] = []
    with _ends_in(experiment.out):
        for number, part in enumerate(experiment.parts, start=1):
            label = f"[{number}/{len(experiment.parts)} {part.name}]"
            directory = kept[part.name]
            if directory is not None:
                say(f"{label} is there already and is kept")
            else:
                directory = _make(experiment, part, partial(_labelled, say, label), clock)
            runs.append(directory / RUN)
        drawn = _draw(experiment, runs, began_ns, sum(path is not None for path in kept.values()))
    return drawn


def _labelled(say: Say, label: str, line: str) -> None:
    say(f"{label} {line}")


def _make(experiment: Experiment, part: Part, say: Say, clock: _TimeLeft) -> Path:
    directory = claim_run_dir(experiment.out / part.name)
    write_manifest(
        directory, _RUN_KIND, experiment.spec(part), {"arrivals": part.seed, "inputs": part.seed}
    )
    say(f"{part.workload}; {part.gpus} GPUs, {part.duration_ns / NS_PER_S:.0f} s{clock.left()}")
    clock.begin(part)
    with _ends_in(directory) as outcome:
        result = run_part(
            part,
            experiment.hosts,
            directory,
            session=experiment.session,
            fewer=experiment.fewer_gpus,
            show=lambda line: say(f"{line}{clock.left()}"),
        )
        outcome.update(_outcome(result))
        if not result.complete:
            raise SloschedError(f"the run {part.name} is not complete: {result.problem}")
    clock.end()
    say(f"{result.sent} requests; {result.verdict}; kept in {directory}")
    return directory


def _outcome(result: RunResult) -> dict[str, Any]:
    return {"complete": result.complete, "sent": result.sent, "verdict": result.verdict}


@contextmanager
def _ends_in(directory: Path) -> Iterator[dict[str, Any]]:
    """Complete the manifest of `directory` when the block ends, however it does."""
    outcome: dict[str, Any] = {}
    try:
        yield outcome
    except BaseException as error:
        reason = str(error) or type(error).__name__
        finish_manifest(directory, outcome | {"complete": False, "ended_by": reason})
        raise
    finish_manifest(directory, outcome)


def _draw(experiment: Experiment, runs: Sequence[Path], began_ns: int, kept: int) -> Drawn:
    place = experiment.out / FIGURES_FOLDER
    figure = experiment.figure
    drawn = figure.draw(experiment.parts, runs, experiment.scale, place)
    wall_s = round((now_ns() - began_ns) / NS_PER_S, 1)
    more = {"hosts": experiment.hosts.described(), "runs_reused": kept, "wall_s": wall_s}
    numbers = document(
        figure, experiment.parts, drawn, kind="live", scale=experiment.scale, more=more
    )
    again = f"; {kept} runs were there already" if kept else ""
    made_by = f"it took {wall_s:.0f} s{again}. Made by `slosched experiment {figure.name}`"
    files = write_result(numbers, figure, drawn, place, made_by=made_by)
    return Drawn([*drawn.files, *files], drawn.numbers, drawn.text)


class _TimeLeft:
    """How long the runs that are left will take: what they send for, and the overhead of the last one."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._sending_s = [part.duration_ns / NS_PER_S for part in parts]
        self._overhead_s = _OVERHEAD_S
        self._began_ns = 0
        self._running_s = 0.0

    def begin(self, part: Part) -> None:
        self._began_ns = now_ns()
        self._running_s = self._sending_s.pop(0)

    def end(self) -> None:
        self._overhead_s = max(1.0, self._gone_s() - self._running_s)
        self._began_ns = 0

    def left(self) -> str:
        """ "; 31 min left", for the end of a line."""
        later_s = sum(self._sending_s) + self._overhead_s * len(self._sending_s)
        if self._began_ns:
            later_s += max(0.0, self._running_s + self._overhead_s - self._gone_s())
        if later_s < 100:
            return f"; about {later_s:.0f} s left"
        return f"; about {later_s / 60:.0f} min left"

    def _gone_s(self) -> float:
        return (now_ns() - self._began_ns) / NS_PER_S
