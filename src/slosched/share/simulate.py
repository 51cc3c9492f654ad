"""`slosched share simulate`: an experiment in virtual time, its files, and how far off it is.

Each mix is predicted from solo profiles: measured ones where the directory of a finished run is given (its
exclusive results), else those of spec.profile (solos.py). Files and folders are those of `share run`, and every
summary says in `about` that nothing ran. With a measured run of the same mix the
difference is reported, per job and in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from slosched.errors import InvalidConfig
from slosched.output_files import make_folder, write_file
from slosched.share.experiment import solo_path
from slosched.share.found_runs import runs_below
from slosched.share.hotcarbon_files import check_trees
from slosched.share.metrics import metrics_of
from slosched.share.outputs import write_run
from slosched.share.result_paths import RUN, SPEC, run_path
from slosched.share.run import distinct
from slosched.share.solos import Profile, load_profile
from slosched.share.virtual import run_mode_virtual
from slosched.share_spec import Mode, RunResult, ShareSpec, Status


class Off(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one run, predicted and measured. `job` is empty for a figure of all jobs.

    `figure`: "throughput /s", "p50 ms", "p99 ms", "STP" or "energy J"; `error` is predicted / measured - 1.
    """

    mode: Mode
    repeat: int
    job: str
    figure: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation came to. `paths`: the folder of each run; `off` is empty without a measured run."""

    paths: tuple[Path, ...]
    results: tuple[RunResult, ...]
    device: str
    measured: str  # how the solo profiles were
    off: tuple[Off, ...] = ()

    @property
    def fine(self) -> bool:
        """True if each job ended as it should; a program of the user's is not simulated."""
        jobs = (each for result in self.results for each in result.jobs)
        return all(each.status in (Status.OK, Status.UNAVAILABLE) for each in jobs)


def simulate(
    spec: ShareSpec,
    out: Path,
    *,
    profile: str = "",
    against: Path | None = None,
    layout: str = "slosched",
    deft_compat: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Simulation:
    """Run `spec` in virtual time and write its files below `out`, as `share run` does.

    `profile`: a profile's name, file, or the directory of measured exclusive runs; else that of the spec.
    `against`: the directory of measured runs of the same jobs. Raises InvalidConfig for a model without a solo
    run, a folder that cannot be written, or an `against` without a run of these jobs.
    """
    make_folder(out)
    if layout == "hotcarbon":
        check_trees(spec, out)
    solos = load_profile(profile or spec.profile)
    for job in spec.jobs:
        if not job.command:
            solos.of(job)  # says what is missing before anything is written
    found = measured_runs(against, spec) if against is not None else {}
    say(f"simulating {len(spec.jobs)} jobs on {solos.device} ({solos.measured})")
    results: list[RunResult] = []
    paths: list[Path] = []
    off: list[Off] = []
    for repeat in range(spec.repeats):
        alone = _alone(spec, repeat, solos)
        modes = [mode for mode in spec.modes if mode is not Mode.EXCLUSIVE]
        runs = [alone[place] for place in distinct(spec.jobs)]
        runs += [run_mode_virtual(spec, mode, repeat, solos=solos) for mode in modes]
        for result in runs:
            folder = out / (
                solo_path(spec, result.jobs[0].job, repeat)
                if result.mode is Mode.EXCLUSIVE
                else run_path(spec, spec.jobs, result.mode, repeat)
            )
            write_file(folder / SPEC, msgspec.json.encode(spec))
            write_file(folder / RUN, msgspec.json.encode(result))
            write_run(
                folder,
                spec,
                result,
                alone,
                layout=layout,
                deft_compat=deft_compat,
                results_root=out,
            )
            paths.append(folder)
            say(f"{result.mode.value} r{repeat}: {folder}")
        off += compare(spec, runs, alone, found)
        results += runs
    return Simulation(
        paths=tuple(paths),
        results=tuple(results),
        device=solos.device,
        measured=solos.measured,
        off=tuple(off),
    )


def _alone(spec: ShareSpec, repeat: int, solos: Profile) -> dict[int, RunResult]:
    """The solo run of each job by its place; equal jobs have one run."""
    runs: dict[int, RunResult] = {}
    for first, places in distinct(spec.jobs).items():
        result = run_mode_virtual(spec, Mode.EXCLUSIVE, repeat, solos=solos, jobs=(first,))
        runs |= dict.fromkeys(places, result)
    return runs


# --------------------------------------------------------------------------------- beside measured runs

Key = tuple[Mode, int, tuple[tuple[str, int, tuple[int, int]], ...]]


def measured_runs(directory: Path, spec: ShareSpec) -> dict[Key, RunResult]:
    """The finished runs below `directory` of the jobs of `spec`, together or alone.

    Raises InvalidConfig if there is none, or one cannot be read.
    """
    runs: dict[Key, RunResult] = {}
    for _, theirs, result in runs_below(directory):
        if not result.unavailable and "virtual" not in result.about:
            runs[_key(theirs, result)] = result
    wanted = set(_mixes(spec))
    fitting = {key: result for key, result in runs.items() if key[2] in wanted}
    if not fitting:
        names = ", ".join(job.name for job in spec.jobs)
        raise InvalidConfig(
            f"{directory} has no measured run of {names}: run them there first (slosched share run)"
        )
    return fitting


def _key(spec: ShareSpec, result: RunResult) -> Key:
    jobs = (spec.jobs[each.job] for each in result.jobs)
    return result.mode, result.repeat, tuple((job.model, job.batch, job.size) for job in jobs)


def _mixes(spec: ShareSpec) -> Iterator[tuple[tuple[str, int, tuple[int, int]], ...]]:
    every = tuple((job.model, job.batch, job.size) for job in spec.jobs)
    yield every
    for each in every:
        yield (each,)


def compare(
    spec: ShareSpec,
    predicted: list[RunResult],
    alone: Mapping[int, RunResult],
    measured: Mapping[Key, RunResult],
) -> list[Off]:
    """Each figure that both a predicted and a measured run have, in the order of the predicted ones.

    STP needs the measured solo runs of the same repeat, or of repeat 0.
    """
    rows: list[Off] = []
    for result in predicted:
        mode, repeat, mix = _key(spec, result)
        found = measured.get((mode, repeat, mix))
        if found is None:
            continue
        found = _placed(found, result)
        ours = metrics_of(spec, result, alone)
        theirs = metrics_of(spec, found, _measured_alone(spec, repeat, measured))
        pairs: list[tuple[str, str, float | None, float | None]] = []
        for a, b in zip(ours.jobs, theirs.jobs, strict=True):
            pairs.append((a.name, "throughput /s", a.throughput_per_s, b.throughput_per_s))
            if a.latency is not None and b.latency is not None:
                pairs.append((a.name, "p50 ms", a.latency.p50_ms, b.latency.p50_ms))
                pairs.append((a.name, "p99 ms", a.latency.p99_ms, b.latency.p99_ms))
        pairs.append(("", "STP", ours.stp, theirs.stp))
        pairs.append(("", "energy J", ours.energy.joules, theirs.energy.joules))
        for job, figure, a_value, b_value in pairs:
            if a_value is None or not b_value:
                continue
            rows.append(
                Off(
                    mode=mode,
                    repeat=repeat,
                    job=job,
                    figure=figure,
                    predicted=a_value,
                    measured=b_value,
                )
            )
    return rows


def _placed(found: RunResult, like: RunResult) -> RunResult:
    """`found` with the places of `like`: both have the same jobs in the same order, of two specs."""
    change = msgspec.structs.replace
    places = {a.job: b.job for a, b in zip(found.jobs, like.jobs, strict=True)}
    jobs = tuple(
        change(
            each,
            job=places[each.job],
            requests=tuple(change(row, job=places[row.job]) for row in each.requests),
            interruptions=tuple(
                change(row, job=places[row.job], by=places.get(row.by, -1))
                for row in each.interruptions
            ),
        )
        for each in found.jobs
    )
    return change(found, jobs=jobs)


def _measured_alone(
    spec: ShareSpec, repeat: int, measured: Mapping[Key, RunResult]
) -> dict[int, RunResult]:
    alone = {}
    for place, job in enumerate(spec.jobs):
        mix = ((job.model, job.batch, job.size),)
        found = measured.get((Mode.EXCLUSIVE, repeat, mix)) or measured.get(
            (Mode.EXCLUSIVE, 0, mix)
        )
        if found is not None:
            alone[place] = found
    return alone


def off_table(off: tuple[Off, ...]) -> str:
    """The differences as text: one row a figure, and the mean absolute error of each figure at the end."""
    if not off:
        return "no measured run of this mix to compare with"
    lines = [f"{'mode':<10}{'job':<20}{'figure':<16}{'predicted':>12}{'measured':>12}{'off':>9}"]
    for row in off:
        where = f"{row.mode.value:<10}{row.job or 'all':<20.19}{row.figure:<16}"
        lines.append(f"{where}{row.predicted:>12.4g}{row.measured:>12.4g}{100 * row.error:>+8.1f}%")
    for figure in dict.fromkeys(row.figure for row in off):
        errors = [abs(row.error) for row in off if row.figure == figure]
        lines.append(
            f"mean of |off|, {figure}: {100 * sum(errors) / len(errors):.1f}% of {len(errors)}"
        )
    return "\n".join(lines)
