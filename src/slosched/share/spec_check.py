"""What an experiment of shared GPUs must satisfy, whichever front door described it."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

from slosched.core.share.tuner import tunable
from slosched.errors import InvalidConfig
from slosched.output_files import utf8
from slosched.share_spec import Arriving, Clients, Job, Mode, Run, ShareSpec
from slosched.units import NS_PER_MS, NS_PER_S

#: Bounds that no real experiment meets; a slip of a key or a generated file may.
MOST_JOBS = 64
_MOST_REPEATS = 1000
_MOST_BATCH = 65536
_MOST_SIDE = 16384
_MOST_CONCURRENCY = 1024
_LONGEST_LINGER_NS = 10 * NS_PER_MS
_LONGEST_NS = 7 * 24 * 3600 * NS_PER_S

_LONGEST_SHOWN = 100

#: A device's label is a folder of results. A model of a library is written timm/NAME, a tiny one tiny:4:2.
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._+:-]{0,99})?")
_DEVICE = re.compile(r"cuda:\d{1,3}|cpu|emulated")
#: Modes in which a program of the user's can stand beside ours: it has a process of its own there.
COMMAND_MODES = (Mode.EXCLUSIVE, Mode.TM, Mode.MPS)


def check_spec(spec: ShareSpec) -> ShareSpec:
    """Return `spec` if it can be run. Raises InvalidConfig with the job and the field that is wrong."""
    if not spec.jobs:
        raise InvalidConfig("no jobs: name at least one model, such as bert-1")
    if len(spec.jobs) > MOST_JOBS:
        raise InvalidConfig(f"{len(spec.jobs)} jobs; at most {MOST_JOBS} are possible")
    if not spec.modes:
        raise InvalidConfig(f"modes: name at least one of {', '.join(Mode)}")
    for what, values in (
        ("job", [job.name for job in spec.jobs]),
        ("mode", [str(mode) for mode in spec.modes]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise InvalidConfig(f"the {what} {twice[0]} is named twice")
    if not _DEVICE.fullmatch(spec.device):
        raise InvalidConfig(f"device must be cuda:N, cpu or emulated, not {spec.device!r}")
    if not _LABEL.fullmatch(spec.label):
        raise InvalidConfig(
            f"the device's label {shown(spec.label)} may hold letters, digits and . _ + - only (at most 100): "
            "results lie in a folder of that name"
        )
    _whole("repeats", spec.repeats, 1, _MOST_REPEATS)
    _whole("seed", spec.seed, 0, 2**63 - 1)
    _whole("least_jobs", spec.least_jobs, 0, 10**6)
    _time("duration", spec.duration_ns, NS_PER_MS)
    if not 0 <= spec.linger_ns <= _LONGEST_LINGER_NS:
        raise InvalidConfig(
            f"linger must be within 0..{_LONGEST_LINGER_NS // NS_PER_MS}ms, as the GPU does nothing meanwhile, "
            f"not {spec.linger_ns / NS_PER_MS:g}ms"
        )
    for name in ("idle", "cool_down"):
        _time(name, getattr(spec, f"{name}_ns"), 0)
    _time("power_every", spec.power_every_ns, NS_PER_MS)
    for name in ("prepare_within", "finish_within"):
        _time(name, getattr(spec, f"{name}_ns"), NS_PER_S)
    _text("profile", spec.profile)
    for job in spec.jobs:
        try:
            _check_job(job)
            _check_clients(job.clients)
        except InvalidConfig as error:
            raise InvalidConfig(f"job {job.name}: {error}") from None
    _check_commands(spec)
    graphs = [job.name for job in spec.jobs if job.run is Run.GRAPHS]
    if graphs and Mode.GATE in spec.modes:
        raise InvalidConfig(
            f"job {graphs[0]}: run = graphs has no gate, which stops eager models between their modules; take "
            "mode preempt for graphs, or mode gate with run = eager (--run eager)"
        )
    return spec


def shown(value: object) -> str:
    """`value` for an error about it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def unused_name(wanted: str, taken: list[str] | set[str]) -> str:
    """`wanted` as a job's name: with _ for what a name cannot hold, and with a number where it is taken."""
    wanted = _as_name(wanted) or "job"
    if wanted not in taken:
        return wanted
    numbered = (f"{wanted}_{number}" for number in itertools.count(2))
    return next(name for name in numbered if name not in taken)


def _as_name(text: str) -> str:
    """`text` with _ for the characters that a job's name cannot hold; empty if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._+-")[:80]


def command_job(words: tuple[str, ...], taken: list[str] | set[str]) -> Job:
    """A program of the user's as a job, named after its file. Raises InvalidConfig without a program."""
    if not words or not words[0].strip():
        raise InvalidConfig("no COMMAND behind --; write it as -- python train.py")
    model = _as_name(Path(words[0]).name) or "command"
    return Job(name=unused_name(model, taken), model=model, command=words)


def _check_job(job: Job) -> None:
    if not _MODEL.fullmatch(job.model):
        raise InvalidConfig(
            f"model {shown(job.model)} is not a model's name, such as bert, resnet50 or timm/vit_base"
        )
    _whole("batch", job.batch, 1, _MOST_BATCH)
    height, width = job.size
    if (height, width) != (0, 0):
        _whole("the height of size", height, 1, _MOST_SIDE)
        _whole("the width of size", width, 1, _MOST_SIDE)
    _whole("priority", job.priority, 0, 1000)
    _whole("count", job.count, 0, 10**9)
    _whole("warmups", job.warmups, 0, 10**4)
    _whole("thread_percentage", job.thread_percentage, 0, 100)
    _time("start_after", job.start_after_ns, 0)
    _time("slo", job.slo_ns, 0)
    _number("slo_times_solo", job.slo_times_solo, 0, 10**6)
    _whole("every of boundary", job.boundary.every, 1, 10**9)
    _whole("depth of boundary", job.boundary.depth, 1, 10**6)
    for word in job.command:
        _text("a word of the command", word)
    if job.slo_ns and job.slo_times_solo:
        raise InvalidConfig("give slo or slo_times_solo, not both")
    if job.boundary.tuned and not tunable(job.boundary):
        raise InvalidConfig(
            f"a tuned boundary is of kind segment, sync or event, not {job.boundary.kind}: the tuner "
            "chooses how many segments or modules lie between two"
        )


def _check_clients(clients: Clients) -> None:
    _time("think", clients.think_ns, 0)
    _whole("concurrency", clients.concurrency, 1, _MOST_CONCURRENCY)
    kind = clients.arriving
    if kind in (Arriving.POISSON, Arriving.GAMMA, Arriving.CONSTANT):
        if not 0 < clients.rate_per_s <= 10**6:
            raise InvalidConfig(
                f"{kind} arrivals need rate_per_s above 0 (at most 1000000), not {clients.rate_per_s:g}"
            )
    elif clients.rate_per_s:
        raise InvalidConfig(f"rate_per_s goes with open loops; the arrivals are {kind}")
    if kind is Arriving.GAMMA and not 0.01 <= clients.cv <= 100:
        raise InvalidConfig(f"cv must be within 0.01..100, not {clients.cv:g}")
    if kind is Arriving.TRACE:
        if not clients.trace:
            raise InvalidConfig("trace arrivals need trace, a list of rising times in s")
        _check_trace(clients.trace)
    elif clients.trace:
        raise InvalidConfig(f'trace goes with arriving = "trace"; the arrivals are {kind}')
    if kind is not Arriving.CLOSED and (clients.think_ns or clients.concurrency != 1):
        raise InvalidConfig(f"think and concurrency go with closed loops; the arrivals are {kind}")


def _check_trace(trace: tuple[float, ...]) -> None:
    before = 0.0
    for number, time_s in enumerate(trace, start=1):
        if not (math.isfinite(time_s) and before <= time_s <= _LONGEST_NS / NS_PER_S):
            raise InvalidConfig(
                f"time {number} of trace is {time_s:g}; times are in s from 0 and never fall"
            )
        before = time_s


def _check_commands(spec: ShareSpec) -> None:
    commands = [job.name for job in spec.jobs if job.command]
    wrong = [mode for mode in spec.modes if mode not in COMMAND_MODES]
    if commands and wrong:
        raise InvalidConfig(
            f"{commands[0]} is a program of its own, which {wrong[0]} cannot hold: that mode needs the model "
            f"in a slosched process; choose from {', '.join(COMMAND_MODES)}"
        )
    if commands and len(commands) == len(spec.jobs):
        raise InvalidConfig("name a model beside the COMMAND, such as bert-1")


def _text(what: str, value: str) -> None:
    """Results say what ran, as UTF-8; a path of other bytes cannot be in them."""
    if utf8(value) != value or "\0" in value:
        raise InvalidConfig(
            f"{what} must be UTF-8, not {shown(value)}; give it a name of plain characters"
        )


def _whole(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidConfig(f"{what} must be a whole number within {least}..{most}, not {value}")


def _number(what: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # and NaN is not
        raise InvalidConfig(f"{what} must be within {least:g}..{most:g}, not {value!r}")


def _time(what: str, value_ns: int, least_ns: int) -> None:
    if not least_ns <= value_ns <= _LONGEST_NS:
        least = f"{least_ns / NS_PER_S:g}s"
        raise InvalidConfig(
            f"{what} must be within {least}..{_LONGEST_NS // NS_PER_S}s, not {value_ns / NS_PER_S:g}s"
        )
