"""A whole experiment: each job alone, then all together in each mode, and the files of each run.

    <out>/<label>/<mix>/<mix with batches>/<mode>/r<repeat>/    run.json, spec.json and what follows from them
    .../logs/                                                  what the models' processes printed

A run that is there already under the same spec, package source and versions is kept, unless something went
wrong in it. Whatever happens, what was measured is written, and everything that was started is ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from slosched.errors import InvalidConfig
from slosched.output_files import make_folder, write_file
from slosched.share.about import gpus_here, versions
from slosched.share.hotcarbon_files import check_trees
from slosched.share.job_figures import alone_of
from slosched.share.job_figures import solo_job as solo_result
from slosched.share.outputs import SUMMARY, read_summary, write_run
from slosched.share.result_paths import LAYOUTS, RUN, SPEC, mode_name, run_path
from slosched.share.run import distinct, run_alone, run_mode, solo_job
from slosched.share.session import Interrupted, Say, Stopped
from slosched.share.spec_check import check_spec
from slosched.share.tuning import BoundaryTuner, tuning_line
from slosched.share_spec import Arriving, Job, Mode, RunResult, ShareSpec, Status
from slosched.sim.run import source_digest
from slosched.telemetry.source import file_sha256
from slosched.units import NS_PER_MS, NS_PER_S

LOGS = "logs"
#: The digest of all that a run was made of, in its `about`.
_DIGEST = "experiment_sha256"
_SAME = "equal to that of its run alone"
#: The exit code where a job or a mode did not go as it should.
SOMETHING_FAILED = 1


class RunEnded(msgspec.Struct, frozen=True, kw_only=True):
    """One run of an experiment. `status` is by job name; `kept`: it was there already."""

    directory: Path
    mode: Mode
    repeat: int
    status: dict[str, Status]
    unavailable: str = ""
    kept: bool = False
    stopped: bool = False

    @property
    def fine(self) -> bool:
        """True if each job ended as it should, or the machine lacks the mode."""
        if self.unavailable:
            return True
        return not self.stopped and all(each is Status.OK for each in self.status.values())


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What an experiment came to. `paths` are the files that were written; `runs` has kept runs too."""

    runs: tuple[RunEnded, ...]
    paths: tuple[Path, ...]
    stopped: bool = False

    @property
    def statuses(self) -> dict[str, Status]:
        """The worst status of each job over all runs that the machine can do."""
        worst: dict[str, Status] = {}
        for run in self.runs:
            for name, status in run.status.items():
                if not run.unavailable and worst.get(name, Status.OK) is Status.OK:
                    worst[name] = status
        return worst

    @property
    def error_code(self) -> int:
        """0 if all went well. A mode that the machine lacks counts only if it lacks all of them."""
        together = [run for run in self.runs if run.mode is not Mode.EXCLUSIVE] or self.runs
        nothing = not any(not run.unavailable for run in together)
        wrong = self.stopped or nothing or not all(run.fine for run in self.runs)
        return SOMETHING_FAILED if wrong else 0


class _Experiment:
    """What the runs of one experiment have in common."""

    def __init__(
        self,
        spec: ShareSpec,
        out: Path,
        *,
        layout: str,
        deft_compat: bool,
        resume: bool,
        say: Say,
        stopped: Stopped,
    ) -> None:
        self.spec, self.out = spec, out
        self.layout, self.deft_compat, self.resume = layout, deft_compat, resume
        self.say, self.stopped = say, stopped
        self.ended: list[RunEnded] = []
        self.paths: list[Path] = []
        self.cut_short = False
        self.tuner = BoundaryTuner(
            spec,
            digest_of=lambda job: self._digest(Mode.EXCLUSIVE, 0, {-1: job}),
            folder_of=lambda place: (out / solo_path(spec, place, 0)).parent,
            resume=resume,
            say=say,
            stopped=stopped,
        )

    # ----------------------------------------------------------------------------------- alone

    def solos(self, repeat: int) -> dict[int, RunResult]:
        """The run of each job alone, by its place; those that the machine cannot do are left out."""
        found: dict[int, RunResult] = {}
        for place, places in distinct(self.spec.jobs).items():
            if self.over:
                break
            result = self._solo(place, repeat)
            if result is not None and not result.unavailable:
                found.update(dict.fromkeys(places, result))
        return found

    def _solo(self, place: int, repeat: int) -> RunResult | None:
        spec = self.spec
        directory = self.out / solo_path(spec, place, repeat)
        # A run alone serves every mix that has the job; only open loops draw by the job's place.
        closed = spec.jobs[place].clients.arriving is Arriving.CLOSED
        job = msgspec.structs.replace(solo_job(spec.jobs[place]), name="job")
        digest = self._digest(Mode.EXCLUSIVE, repeat, {-1 if closed else place: job})
        kept = self._kept(directory, digest, Mode.EXCLUSIVE, place)
        if kept is not None:
            self._complete(directory, kept, {place: kept})
            return kept
        logs = directory / LOGS
        try:
            result = run_alone(spec, place, repeat, logs, say=self.say, stopped=self.stopped)
        except Interrupted as error:
            self._interrupted(error)
            return None
        return self._write(directory, result, {place: result}, digest)

    # -------------------------------------------------------------------------------- together

    def together(self, mode: Mode, repeat: int, solos: Mapping[int, RunResult]) -> None:
        """All jobs under `mode`; nothing is run where it is there already."""
        spec = self.spec
        deadlines, expected = from_solos(spec.jobs, solos)
        directory = self.out / run_path(spec, spec.jobs, mode, repeat)
        # The solos are part of it: deadlines come from them.
        digest = self._digest(mode, repeat, dict(enumerate(spec.jobs)), solos)
        kept = self._kept(directory, digest, mode)
        if kept is not None:
            self._complete(directory, kept, solos)
            return
        loop = "closed" if _closed(spec) else "open"
        self.say(f"Running {loop} loop experiment for {mode_name(mode, spec.jobs)}")
        try:
            tuned = self.tuner.tuned(mode, slo_ns=deadlines, exec_ns=expected, solos=solos)
            [result] = run_mode(
                tuned.spec,
                mode,
                repeat,
                directory / LOGS,
                say=self.say,
                stopped=self.stopped,
                deadlines=deadlines,
                expected=expected,
                urgent=tuned.urgent,
            )
        except Interrupted as error:
            self._interrupted(error)
            return
        result = tuned.noted(result)
        answers = compared_answers(spec.jobs, result, solos)
        for name, words in answers.items():
            if words != _SAME:
                self.say(f"warning: {mode}: {name}: {words}")
        if answers:
            about = {f"answer of {name}": words for name, words in answers.items()}
            result = msgspec.structs.replace(result, about={**result.about, **about})
        self._write(directory, result, solos, digest)

    # --------------------------------------------------------------------------------- keeping

    @property
    def over(self) -> bool:
        """True if it was stopped: no further run begins."""
        return self.cut_short or self.stopped()

    def _interrupted(self, error: Interrupted) -> None:
        self.cut_short = True
        self.say(str(error))

    def _digest(
        self,
        mode: Mode,
        repeat: int,
        jobs: Mapping[int, Job],
        solos: Mapping[int, RunResult] | None = None,
    ) -> str:
        """A digest of all that a run's figures follow from, but this machine."""
        spec = self.spec
        same = msgspec.structs.replace(
            spec, jobs=tuple(jobs.values()), modes=(mode,), label="", repeats=1
        )
        profile = Path(spec.profile)
        made_of = {
            "spec": msgspec.to_builtins(same),
            "places": list(jobs),
            "repeat": repeat,
            "source": source_digest(),
            "versions": versions(),
            "profile": file_sha256(profile) if spec.profile and profile.is_file() else "",
            "solos": {
                str(place): solo.about.get(_DIGEST, "") for place, solo in (solos or {}).items()
            },
        }
        return hashlib.sha256(msgspec.json.encode(made_of, order="deterministic")).hexdigest()

    def _kept(
        self, directory: Path, digest: str, mode: Mode, place: int | None = None
    ) -> RunResult | None:
        """The run that is there, if it is the same and nothing went wrong in it."""
        if not self.resume:
            return None
        try:
            result = msgspec.json.decode((directory / RUN).read_bytes(), type=RunResult)
        except (OSError, msgspec.MsgspecError, InvalidConfig):
            return None
        if place is not None:
            result = _as_job(result, place)
        ended = self._ended(directory, result, kept=True)
        if result.about.get(_DIGEST) != digest or not ended.fine or result.unavailable:
            return None
        gpu = result.about.get("gpu", "")
        if gpu and (names := gpus_here()) and gpu not in names:
            self.say(f"{mode}: run again: the one that is there is of {gpu}")
            return None
        self.say(f"{mode}: kept from before: {directory}")
        self.ended.append(ended)
        return result

    def _ended(self, directory: Path, result: RunResult, *, kept: bool) -> RunEnded:
        jobs = self.spec.jobs
        return RunEnded(
            directory=directory,
            mode=result.mode,
            repeat=result.repeat,
            status={jobs[e.job].name: e.status for e in result.jobs if e.job < len(jobs)},
            unavailable=result.unavailable,
            kept=kept,
            stopped="stopped" in result.about,
        )

    def _complete(self, directory: Path, result: RunResult, solos: Mapping[int, RunResult]) -> None:
        """Write what follows from a kept run where it is missing: it was killed, or other files are wanted."""
        try:
            there = read_summary(directory / SUMMARY).deft_compat is self.deft_compat
        except InvalidConfig:
            there = False
        if not there or self.layout != LAYOUTS[0]:
            self._write_files(directory, result, solos)

    def _write(
        self,
        directory: Path,
        result: RunResult,
        solos: Mapping[int, RunResult],
        digest: str,
    ) -> RunResult:
        result = msgspec.structs.replace(result, about={**result.about, _DIGEST: digest})
        self.ended.append(self._ended(directory, result, kept=False))
        self._write_files(directory, result, solos)
        self._tell(directory, result)
        return result

    def _write_files(
        self, directory: Path, result: RunResult, solos: Mapping[int, RunResult]
    ) -> None:
        """The run itself first: all other files follow from it."""
        for name, what in ((RUN, result), (SPEC, self.spec)):
            write_file(directory / name, msgspec.json.encode(what) + b"\n")
            self.paths.append(directory / name)
        self.paths += write_run(
            directory,
            self.spec,
            result,
            solos,
            layout=self.layout,
            deft_compat=self.deft_compat,
            results_root=self.out,
        )

    def _tell(self, directory: Path, result: RunResult) -> None:
        if result.unavailable:
            why = result.unavailable.removeprefix(f"{result.mode}: ")
            self.say(f"{result.mode}: unavailable: {why}")
            return
        for each in result.jobs:
            name = self.spec.jobs[each.job].name
            number = sum(1 for row in each.requests if not row.warmup)
            text = f"{result.mode}: {name}: {each.status}, {number} requests"
            self.say(f"{text}: {each.reason}" if each.reason else text)
            tuning = each.prepared.tuning if each.prepared is not None else None
            if tuning is not None and (result.mode is Mode.PREEMPT or "virtual" in result.about):
                self.say(f"{result.mode}: {tuning_line(name, tuning)}")
        self.say(f"{result.mode}: written to {directory}")


def run_experiment(
    spec: ShareSpec,
    out: Path,
    *,
    layout: str = "slosched",
    deft_compat: bool = False,
    solo: bool = True,
    resume: bool = True,
    say: Say,
    stopped: Stopped,
) -> Outcome:
    """Run each distinct job alone, then all jobs in each mode, `repeats` times; write all files below `out`.

    Without `solo`, jobs run alone only if EXCLUSIVE is among the modes, and what is given as times of the solo
    latency has no SLO. `stopped` is asked ten times a second: what was measured by then is written. Raises
    InvalidConfig for a spec that cannot be run or an `out` that cannot be written.
    """
    check_spec(spec)
    make_folder(out)
    if layout == "hotcarbon":
        check_trees(spec, out)
    run = _Experiment(
        spec, out, layout=layout, deft_compat=deft_compat, resume=resume, say=say, stopped=stopped
    )
    for repeat in range(spec.repeats):
        solos: dict[int, RunResult] = {}
        if (solo or Mode.EXCLUSIVE in spec.modes) and not run.over:
            solos = run.solos(repeat)
        for mode in spec.modes:
            if mode is not Mode.EXCLUSIVE and not run.over:
                run.together(mode, repeat, solos)
    cut_short = run.over or any(each.stopped for each in run.ended)
    return Outcome(runs=tuple(run.ended), paths=tuple(run.paths), stopped=cut_short)


def from_solos(
    jobs: tuple[Job, ...], solos: Mapping[int, RunResult]
) -> tuple[dict[int, int], dict[int, int]]:
    """SLOs and expected times of a request in ns, by job, as far as the solo runs tell.

    The SLO is the absolute one, or the multiple of the mean latency alone, by which Deft's figures judge.
    """
    deadlines, expected = {}, {}
    for place, job in enumerate(jobs):
        alone = alone_of(place, solos[place]) if place in solos else None
        if alone is not None:
            expected[place] = round(alone.busy_s * NS_PER_S)
        if job.slo_ns:
            deadlines[place] = job.slo_ns
        elif job.slo_times_solo and alone is not None:
            deadlines[place] = round(job.slo_times_solo * alone.mean_ms * NS_PER_MS)
    return deadlines, expected


def _closed(spec: ShareSpec) -> bool:
    """True if every job is in a closed loop; HotCarbon has no other."""
    return all(job.clients.arriving is Arriving.CLOSED for job in spec.jobs)


def compared_answers(
    jobs: tuple[Job, ...], result: RunResult, solos: Mapping[int, RunResult]
) -> dict[str, str]:
    """Whether each job's answer is that of its run alone, by name; only where both have one.

    Captured models and eager ones differ in their last bits, so only runs of one kind are compared.
    """
    found = {}
    for each in result.jobs:
        solo = solo_result(each.job, solos[each.job]) if each.job in solos else None
        mine, alone = each.prepared, solo.prepared if solo is not None else None
        if mine is None or alone is None or not mine.answer or not alone.answer:
            continue
        if mine.runs is alone.runs:
            words = (
                _SAME if mine.answer == alone.answer else "its answer is not that of its run alone"
            )
            found[jobs[each.job].name] = words
    return found


def _as_job(result: RunResult, place: int) -> RunResult:
    """The run of one job alone as that of the job at `place`; in another mix its place may be another."""
    change = msgspec.structs.replace
    if len(result.jobs) != 1 or result.jobs[0].job == place:
        return result
    only = result.jobs[0]
    moved = change(
        only,
        job=place,
        requests=tuple(change(row, job=place) for row in only.requests),
        interruptions=(),
        prepared=None if only.prepared is None else change(only.prepared, job=place),
    )
    return change(result, jobs=(moved,))


def solo_path(spec: ShareSpec, place: int, repeat: int) -> Path:
    """Where the run of a job alone lies, below the output folder: shared by all mixes that have the job.

    Jobs of one model and batch that differ otherwise, as in size, have a folder each, named with a digest.
    """
    job = solo_job(spec.jobs[place])
    path = run_path(spec, [job], Mode.EXCLUSIVE, repeat)
    plain = Job(name=job.name, model=job.model, batch=job.batch)
    if job == solo_job(plain):
        return path
    named = msgspec.structs.replace(job, name="job")
    digest = hashlib.sha256(msgspec.json.encode(named, order="deterministic")).hexdigest()[:8]
    label, mix, batch, *rest = path.parts
    return Path(label, mix, f"{batch}@{digest}", *rest)
