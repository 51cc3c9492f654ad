"""Where results lie, and how models, mixes and modes are spelled there.

<out>/<label>/<mix>/<mix with batches>/<mode>/r<repeat>/      ours
<results>/<label>/<mix>/<mix with batches>/                   HotCarbon's own; its modes share the files
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from slosched.share.hotcarbon import MPS_UNCAPPED
from slosched.share_spec import Job, Mode, RunResult, ShareSpec

#: The files of a run from which all others follow, and the layouts in which those are written.
RUN, SPEC = "run.json", "spec.json"
LAYOUTS = ("slosched", "hotcarbon")
#: Characters of a folder's name: a file system has 255 bytes, and the folder of a run alone adds a digest.
_LONGEST = 200


def jobs_of(spec: ShareSpec, result: RunResult) -> list[Job]:
    """The jobs that are in `result`: all of the spec, or the one that ran alone."""
    return [spec.jobs[each.job] for each in result.jobs]


def mix_path(jobs: Sequence[Job]) -> Path:
    """diffusion-whisper/diffusion-1_whisper-1, in the jobs' order. A library's name has _ for its slash.

    What is longer than a folder's name may be ends in a digest of the whole.
    """
    models = [job.model.replace("/", "_") for job in jobs]
    batches = (f"{model}-{job.batch}" for model, job in zip(models, jobs, strict=True))
    return Path(_within_names("-".join(models))) / _within_names("_".join(batches))


def _within_names(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 13]}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run_path(spec: ShareSpec, jobs: Sequence[Job], mode: Mode, repeat: int) -> Path:
    """The folder of one run, below the output folder."""
    return Path(spec.label) / mix_path(jobs) / mode.value / f"r{repeat}"


def mode_name(mode: Mode, jobs: Sequence[Job]) -> str:
    """The mode as HotCarbon's files spell it: MPS without a limit of threads is mps-uncap."""
    if mode is Mode.MPS:
        return Mode.MPS.value if any(job.thread_percentage for job in jobs) else MPS_UNCAPPED
    return mode.value


def column_names(jobs: Sequence[Job]) -> list[str]:
    """HotCarbon's columns: 0_diffusion-1, 1_whisper-1."""
    return [f"{place}_{job.model}-{job.batch}" for place, job in enumerate(jobs)]
