"""Writes the files of one run: Deft's, HotCarbon's and our own, all from a RunResult.

    <job>.csv, <job>.json, models_pid.json            Deft's (share/deft_files.py)
    tput.csv, total_p0.csv .. total_p100.csv, pwr.csv  HotCarbon's (share/hotcarbon_files.py)
    requests.csv, preemptions.csv, power.csv           every request, interruption and sample
    summary.json                                       what was run, on what, and all metrics

Times in our files are in seconds or milliseconds after the begin of the window; `at_ns` is CLOCK_MONOTONIC.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path

import msgspec

from slosched.errors import InvalidConfig
from slosched.output_files import write_file
from slosched.share.carbon import Constants, Footprint, footprint, read_constants
from slosched.share.deft_files import deft_files
from slosched.share.figures import RunMetrics
from slosched.share.hotcarbon_files import append_to_tree, epoch_offset_ns, hotcarbon_files
from slosched.share.job_figures import alone_of, deadline_of
from slosched.share.metrics import metrics_of
from slosched.share.result_paths import LAYOUTS, jobs_of, mix_path, mode_name
from slosched.share_spec import PowerSample, Request, RunResult, ShareSpec, Status
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__

SUMMARY = "summary.json"

_REQUESTS = (
    "job,name,number,arrival_s,start_s,end_s,jct_ms,wait_ms,preempted,paused_ms,device_ms,batch,deadline_s,"
    "met,warmup,cut,wrong_answer,beside_lower"
)
_PREEMPTIONS = "job,name,by,by_name,wanted_s,started_s,resumed_s,preemption_ms,paused_ms,boundary"
_POWER = (
    "t_s,at_ns,watts,watts_average,energy_mj,utilization,memory_utilization,memory_used_bytes,"
    "memory_total_bytes,temperature_c,sm_mhz,pstate,throttle"
)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """summary.json: one run. `about` has versions and the device; `label` is what results call the device.

    `carbon_alone` is that of the same requests alone, on GPUs that count only while they work.
    """

    slosched: str
    label: str
    mix: str
    mode: str
    repeat: int
    seed: int
    status: dict[str, Status]
    unavailable: str
    deft_compat: bool
    about: dict[str, str]
    metrics: RunMetrics
    carbon: Footprint
    carbon_alone: Footprint | None = None
    notes: tuple[str, ...] = ()


def write_run(
    directory: Path,
    spec: ShareSpec,
    result: RunResult,
    solos: Mapping[int, RunResult],
    *,
    layout: str = "slosched",
    deft_compat: bool = False,
    results_root: Path | None = None,
    constants: Constants | None = None,
) -> list[Path]:
    """Write all files of `result` into `directory` and return their paths; without a run, the summary alone.

    With `layout` "hotcarbon" the seven files go into HotCarbon's own tree below `results_root` too, where modes
    append rows; a run that is written again replaces its row. `solos` has the run of each job alone. Raises
    InvalidConfig if a file cannot be written, or the tree holds something else.
    """
    if layout not in LAYOUTS:
        raise InvalidConfig(f"layout must be {' or '.join(LAYOUTS)}, not {layout!r}")
    if layout == "hotcarbon" and results_root is None:
        raise InvalidConfig("HotCarbon's layout needs the folder of its results")
    summary = summary_of(
        spec, result, solos, deft_compat=deft_compat, constants=constants or read_constants()
    )
    files: dict[str, bytes] = {}
    if not result.unavailable:
        files = {
            **deft_files(spec, result, deft_compat=deft_compat),
            **hotcarbon_files(spec, result),
            "requests.csv": _requests_csv(spec, result, solos),
            "preemptions.csv": _preemptions_csv(spec, result),
            "power.csv": _power_csv(result),
        }
    # The last one: where it is, the others are.
    files[SUMMARY] = msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"
    written = []
    if layout == "hotcarbon" and results_root is not None and not result.unavailable:
        tree = results_root / spec.label / mix_path(jobs_of(spec, result))
        written += append_to_tree(tree, spec, result, run_key(result))
    for name, content in files.items():
        write_file(directory / name, content)
        written.append(directory / name)
    return written


def summary_of(
    spec: ShareSpec,
    result: RunResult,
    solos: Mapping[int, RunResult],
    *,
    constants: Constants,
    deft_compat: bool = False,
) -> Summary:
    """What summary.json says of `result`."""
    metrics = metrics_of(spec, result, solos)
    jobs = jobs_of(spec, result)
    carbon, carbon_alone = carbon_of(spec, result, metrics, constants)
    notes = metrics.notes
    if result.unavailable:
        notes = (f"unavailable: {result.unavailable}", *notes)
    return Summary(
        slosched=__version__,
        label=spec.label,
        mix="_".join(f"{job.model}-{job.batch}" for job in jobs),
        mode=mode_name(result.mode, jobs),
        repeat=result.repeat,
        seed=spec.seed,
        status={spec.jobs[each.job].name: each.status for each in result.jobs},
        unavailable=result.unavailable,
        deft_compat=deft_compat,
        about=result.about,
        metrics=metrics,
        carbon=carbon,
        carbon_alone=carbon_alone,
        notes=notes,
    )


def carbon_of(
    spec: ShareSpec, result: RunResult, metrics: RunMetrics, constants: Constants
) -> tuple[Footprint, Footprint | None]:
    """Carbon and cost of the run, and of the same requests alone (None: they did not run alone)."""
    offset_ns = epoch_offset_ns(result.about)
    used = functools.partial(
        footprint,
        names=(result.about.get("gpu", ""), result.about.get("device", ""), spec.label),
        constants=constants,
        begin_epoch_s=(result.begin_ns + offset_ns) / NS_PER_S if offset_ns is not None else None,
    )
    alone_s = metrics.gpu_s_alone
    return (
        used(metrics.energy.joules, metrics.window_s),
        used(metrics.energy_alone_j, alone_s) if alone_s is not None else None,
    )


def read_summary(path: Path) -> Summary:
    """The summary.json at `path`. Raises InvalidConfig if it is not one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidConfig(f"{path} is not a summary of a shared run: {error}") from None


def run_key(result: RunResult) -> str:
    """What tells a run from any other: written again it is the same, run again it is another."""
    text = f"{result.mode.value} {result.repeat} {result.begin_ns} {result.end_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ our own tables


def _requests_csv(spec: ShareSpec, result: RunResult, solos: Mapping[int, RunResult]) -> bytes:
    def rows() -> Iterable[Sequence[object]]:
        for found in result.jobs:
            job = spec.jobs[found.job]
            solo = solos.get(found.job)
            alone = alone_of(found.job, solo) if solo is not None else None
            for row in found.requests:
                due_ns = deadline_of(job, row, alone.mean_ms if alone else None)
                yield _request_cells(result, row, job.name, job.batch, due_ns)

    return _csv(_REQUESTS, rows())


def _request_cells(
    result: RunResult, row: Request, name: str, batch: int, due_ns: int
) -> Sequence[object]:
    return (
        row.job,
        name,
        row.number,
        _after(row.arrived_ns, result),
        _after(row.started_ns, result),
        _after(row.ended_ns, result),
        row.latency_ns / NS_PER_MS,
        (row.started_ns - row.arrived_ns) / NS_PER_MS,
        row.interruptions,
        row.paused_ns / NS_PER_MS,
        row.device_ns / NS_PER_MS if row.device_ns else "",
        batch,
        _after(due_ns, result) if due_ns else "",
        int(row.ended_ns <= due_ns) if due_ns else "",
        int(row.warmup),
        int(row.cut),
        int(row.differs),
        int(row.beside_lower),
    )


def _preemptions_csv(spec: ShareSpec, result: RunResult) -> bytes:
    names = [job.name for job in spec.jobs]
    return _csv(
        _PREEMPTIONS,
        (
            (
                each.job,
                names[each.job],
                each.by,
                names[each.by] if 0 <= each.by < len(names) else "",
                _after(each.wanted_ns, result),
                _after(each.started_ns, result),
                _after(each.resumed_ns, result),
                (each.started_ns - each.wanted_ns) / NS_PER_MS,
                (each.resumed_ns - each.started_ns) / NS_PER_MS,
                each.boundary,
            )
            for found in result.jobs
            for each in found.interruptions
        ),
    )


def _power_csv(result: RunResult) -> bytes:
    return _csv(_POWER, (_power_cells(sample, result) for sample in result.power))


def _power_cells(sample: PowerSample, result: RunResult) -> Sequence[object]:
    measured = (
        sample.watts,
        sample.watts_average,
        sample.energy_mj,
        sample.utilization,
        sample.memory_utilization,
        sample.memory_used,
        sample.memory_total,
        sample.temperature,
        sample.sm_mhz,
        sample.pstate,
        sample.throttle,
    )
    known = ("" if value < 0 else value for value in measured)
    return (_after(sample.at_ns, result), sample.at_ns, *known)


def _after(at_ns: int, result: RunResult) -> float:
    return (at_ns - result.begin_ns) / NS_PER_S


def _csv(header: str, rows: Iterable[Sequence[object]]) -> bytes:
    file = StringIO()
    file.write(header + "\n")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()
