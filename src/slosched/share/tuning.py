"""Tuned boundaries in an experiment: what is measured of a job before it shares, and what is chosen from it.

An eager job is measured in a process of its own, which is prepared and serves nothing: its pieces, what a
boundary of its kind costs, and its kernels (daemon/backends/eager/measuring.py). That is not a part of the run
alone, since a model that can be captured runs alone as graphs, and since the profiler of kernels slows what
comes after it. A job whose graphs are cut (mode preempt) is tuned by its member, behind the cutting; what
interrupts it goes there with the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from slosched.core.share.tuner import tunable, tuning_of, urgent_of
from slosched.output_files import write_file
from slosched.share.run import EMULATED, measure_alone, unavailable
from slosched.share.session import Say, Stopped
from slosched.share_spec import (
    BoundaryKind,
    Job,
    Mode,
    Pieces,
    Prepared,
    Run,
    RunResult,
    ShareSpec,
    Tuning,
    Urgent,
)

#: Where the pieces of a job lie, beside its runs alone.
_FILE = "pieces-{kind}.json"
#: Modes without a gate, in which these kinds bound what an eager model has in flight.
_BOUNDING_MODES = (Mode.TM, Mode.MPS, Mode.STREAMS)
_BOUNDING_KINDS = (BoundaryKind.SYNC, BoundaryKind.EVENT)
_UNITS = {BoundaryKind.SEGMENT: "groups of 8 modules"}


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A file of pieces: of which job under which source they are."""

    digest: str
    pieces: Pieces


@dataclass
class TunedJobs:
    """The jobs of one mode: `spec` has the chosen boundaries, `urgent` is for those that the member tunes."""

    spec: ShareSpec
    tunings: dict[int, Tuning] = field(default_factory=dict)
    urgent: dict[int, Urgent] = field(default_factory=dict)

    def noted(self, result: RunResult) -> RunResult:
        """`result` with what was chosen before it, beside what its members chose."""
        change = msgspec.structs.replace
        jobs = []
        for each in result.jobs:
            tuning, prepared = self.tunings.get(each.job), each.prepared
            if tuning is not None and prepared is not None:
                each = change(each, prepared=change(prepared, tuning=tuning))
            jobs.append(each)
        return change(result, jobs=tuple(jobs))


class BoundaryTuner:
    """Chooses the boundaries of an experiment. `digest_of` says of what a job's pieces are made.

    `folder_of` is the folder of a job's runs alone. With `resume`, pieces that are there are kept.
    """

    def __init__(
        self,
        spec: ShareSpec,
        *,
        digest_of: Callable[[Job], str],
        folder_of: Callable[[int], Path],
        resume: bool,
        say: Say,
        stopped: Stopped,
    ) -> None:
        self._spec, self._digest_of, self._folder_of = spec, digest_of, folder_of
        self._resume, self._say, self._stopped = resume, say, stopped
        self._pieces: dict[Job, Pieces | None] = {}

    def tuned(
        self,
        mode: Mode,
        *,
        slo_ns: Mapping[int, int],
        exec_ns: Mapping[int, int],
        solos: Mapping[int, RunResult],
    ) -> TunedJobs:
        """The jobs as they shall run in `mode`. What cannot be measured keeps its own boundary, and is told.

        Virtual time tunes by its profiles (share/virtual.py). Raises Interrupted.
        """
        spec = self._spec
        found = TunedJobs(spec)
        if spec.device == EMULATED or unavailable(spec, mode):
            return found
        places = dict(enumerate(spec.jobs))
        jobs = list(spec.jobs)
        for place, job in places.items():
            if job.command or not tunable(job.boundary):
                continue
            if mode is not Mode.PREEMPT and not _bounds(mode, job, solos.get(place)):
                continue
            urgent = urgent_of(
                places, place, exec_ns=exec_ns, slo_ns=slo_ns, equals=mode is Mode.PREEMPT
            )
            if urgent is None:
                self._say(f"{mode}: {job.name} is not tuned: no job has a higher priority")
            elif mode is Mode.PREEMPT:
                found.urgent[place] = urgent
            else:
                pieces = self._measured(place)
                if pieces is None:
                    continue
                unit = _UNITS.get(job.boundary.kind, "modules")
                boundary, tuning = tuning_of(job, pieces, urgent, unit=unit)
                jobs[place] = msgspec.structs.replace(job, boundary=boundary)
                if tuning is not None:
                    found.tunings[place] = tuning
                    self._say(f"{mode}: {tuning_line(job.name, tuning)}")
        found.spec = msgspec.structs.replace(spec, jobs=tuple(jobs))
        return found

    def _measured(self, place: int) -> Pieces | None:
        """The pieces of the job at `place`, measured once in an experiment. None: they cannot be had."""
        spec = self._spec
        job = to_measure(spec.jobs[place])
        kind = msgspec.structs.replace(job, name="job")
        if kind in self._pieces:
            return self._pieces[kind]
        file = self._folder_of(place) / _FILE.format(kind=job.boundary.kind)
        digest = self._digest_of(kind)
        pieces = _read(file, digest) if self._resume else None
        if pieces is None:
            self._say(f"tuning {job.name}: measuring its boundaries")
            logs = self._folder_of(place) / "logs"
            prepared, why = measure_alone(
                spec, place, job, logs, say=self._say, stopped=self._stopped
            )
            pieces = prepared.pieces if isinstance(prepared, Prepared) else None
            if pieces is None:
                why = why or "its member measured nothing"
                self._say(f"warning: {job.name} is not tuned, and keeps its boundary: {why}")
            else:
                kept = Kept(digest=digest, pieces=pieces)
                write_file(file, msgspec.json.encode(kept) + b"\n")
        self._pieces[kind] = pieces
        return pieces


def to_measure(job: Job) -> Job:
    """The job as it is measured: alone and eager, with the kind of its boundary."""
    boundary = msgspec.structs.replace(job.boundary, every=1, depth=2, tuned=False)
    plain = Job(name=job.name, model=job.model)
    return msgspec.structs.replace(
        plain,
        batch=job.batch,
        size=job.size,
        dtype=job.dtype,
        run=Run.EAGER,
        warmups=job.warmups,
        boundary=boundary,
    )


def _bounds(mode: Mode, job: Job, solo: RunResult | None) -> bool:
    """True if the boundary of `job` does something in `mode`, where the job runs eager."""
    if job.run is Run.GRAPHS:
        return False
    if mode is Mode.GATE:
        return True
    runs = [each.prepared.runs for each in solo.jobs if each.prepared] if solo else []
    graphs = job.run is not Run.EAGER and Run.GRAPHS in runs
    return mode in _BOUNDING_MODES and job.boundary.kind in _BOUNDING_KINDS and not graphs


def tuning_line(name: str, tuning: Tuning) -> str:
    """What was chosen for the job `name`, why, and what Deft's closed form gives."""
    flight = f", {tuning.depth} in flight" if tuning.depth > 1 else ""
    every = f"every {tuning.every} of {tuning.pieces} {tuning.unit}"
    text = f"{name}: a boundary after {every}{flight}: {tuning.why}"
    if not tuning.deft_every:
        return text
    in_pieces = f"{tuning.deft_every:.3g} {tuning.unit}"
    if not tuning.deft_launches:
        return f"{text}; Deft's N* = {in_pieces} (kernels were not counted)"
    launches = f"{tuning.deft_launches:.3g} launches (of its 13 values {tuning.deft_best})"
    return f"{text}; Deft's N* = {launches}, here {in_pieces}"


def _read(file: Path, digest: str) -> Pieces | None:
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    return kept.pieces if kept.digest == digest else None
