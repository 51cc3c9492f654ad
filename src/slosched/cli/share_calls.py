"""What `slosched share` calls to run an experiment, and what it reads of the results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slosched.errors import InvalidConfig
from slosched.output_files import check_output, make_folder, write_file
from slosched.share.spec_check import shown
from slosched.share_spec import ShareSpec
from slosched.text_files import reading

if TYPE_CHECKING:
    from slosched.share.figures import RunMetrics
    from slosched.share.outputs import Summary

_PIDS = "models_pid.json"


def check_models(spec: ShareSpec) -> None:
    """Raise UnknownName for a model that no real device can run, and InvalidConfig for a program that is not
    there, before any process is started."""
    from slosched.daemon.backends.job_models import can_capture, made_by

    if spec.device == "emulated":  # its profile knows the models
        return
    for job in spec.jobs:
        if job.command and shutil.which(job.command[0]) is None:
            raise InvalidConfig(
                f"there is no program {shown(job.command[0])} behind --; give its path, or a name in PATH"
            )
        if not job.command and not can_capture(job):
            made_by(job.model)


def check_deft_logs(logs: Iterable[Path]) -> None:
    """Make the folders of Deft's logs. Raises InvalidConfig if one of `logs` could not be written later."""
    for log in logs:
        make_folder(log.parent)
        check_output(log)


def mix_dir(spec: ShareSpec, out: Path) -> Path:
    """The folder of all modes of the mix, which HotCarbon names as the place of its results."""
    from slosched.share.result_paths import mix_path

    return out / spec.label / mix_path(spec.jobs)


def summaries(directories: Iterable[Path]) -> list[Summary]:
    """The summaries of the runs in `directories`. Raises InvalidConfig for a file that is not one."""
    from slosched.share.outputs import SUMMARY, read_summary

    files = [directory / SUMMARY for directory in dict.fromkeys(directories)]
    return [read_summary(file) for file in files if file.is_file()]


def copy_deft_logs(
    spec: ShareSpec, directories: Iterable[Path], logs: Sequence[Path]
) -> list[Path]:
    """Copy each job's CSV of the first run that has them all to where Deft writes it, with models_pid.json.

    Returns the files. Deft replaces what an earlier run left there, and so does this. Raises InvalidConfig if a
    file cannot be written.
    """
    if not logs:
        return []
    from slosched.share.deft_files import stem

    for directory in directories:
        sources = [directory / f"{stem(job)}.csv" for job in spec.jobs[: len(logs)]]
        if not all(source.is_file() for source in sources):
            continue
        copies = list(zip(sources, logs, strict=True))
        if (directory / _PIDS).is_file():
            folders = dict.fromkeys(log.parent for log in logs)
            copies += [(directory / _PIDS, folder / _PIDS) for folder in folders]
        for source, target in copies:
            with reading(source, "the latencies"):
                content = source.read_bytes()
            write_file(target, content)
        return [target for _, target in copies]
    return []


def run_and_measure(
    spec: ShareSpec,
    out: Path,
    *,
    solo: bool,
    resume: bool,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> list[RunMetrics]:
    """Run `spec` into `out`; return the figures of its runs. Raises SloschedError."""
    from slosched.share.experiment import run_experiment

    outcome = run_experiment(spec, out, solo=solo, resume=resume, say=say, stopped=stopped)
    return [summary.metrics for summary in summaries(run.directory for run in outcome.runs)]


def simulate_and_measure(
    spec: ShareSpec, out: Path, *, say: Callable[[str], None]
) -> list[RunMetrics]:
    """Run `spec` in virtual time into `out`; return the figures of its runs. Raises SloschedError."""
    from slosched.share.simulate import simulate

    return [summary.metrics for summary in summaries(simulate(spec, out, say=say).paths)]
