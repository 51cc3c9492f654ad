"""What describes an experiment of `slosched share` on the command line: files, models, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import typer

from slosched.cli.config_options import Options, with_parameters
from slosched.cli.help import SloschedCommand
from slosched.cli.values import duration_ns
from slosched.core.share.tuner import tunable
from slosched.errors import InvalidConfig
from slosched.share_spec import Job, Policy, Run, ShareSpec, Stop

#: Where the words behind -- are kept while the others are read.
_COMMAND = "slosched.command"
#: The heading of these options in --help.
_PANEL = "The experiment"
#: What results call these devices where no label is given.
_LABELS = {"cpu": "cpu", "emulated": "emulated"}


class TakesCommand(SloschedCommand):
    """A command behind whose arguments `-- COMMAND` may stand: a program of the user's, word by word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            ctx.meta[_COMMAND] = tuple(args[place + 1 :])
            args = args[:place]
        return list(super().parse_args(ctx, args))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL-BATCH...",
        help="Models with their batch sizes, such as diffusion-1 whisper-1; a model may stand twice.",
        show_default=False,
    ),
]


def _option(kind: Any, help: str, *flags: str, metavar: str | None = None, **more: Any) -> Any:
    option = typer.Option(
        *flags, help=help, metavar=metavar, show_default=False, rich_help_panel=_PANEL, **more
    )
    return cast(Any, Annotated)[kind | None, option]


_HINTS: dict[str, Any] = {
    "file": _option(
        Path,
        "An experiment: Deft's JSON as it is, or a .toml (docs/share.md).",
        "-f",
        "--file",
        metavar="FILE",
    ),
    "device_type": _option(
        str, "What results call the device: any label.", "--device-type", metavar="LABEL"
    ),
    "device_id": _option(int, "The GPU's number.", "--device-id", min=0, max=999),
    "device": _option(
        str, "cuda:N, cpu or emulated. Default cuda:0.", metavar="cuda:N|cpu|emulated"
    ),
    "modes": _option(
        str,
        "How the models share, one after the other: exclusive, tm, mps (or mps-uncap), streams, preempt, gate. "
        "Default mps-uncap,tm.",
        "--modes",
        "--mode",
        metavar="MODE,...",
    ),
    "duration": _option(
        str, "Length of a run, once all models are loaded (20s). Default 120s.", metavar="DURATION"
    ),
    "policy": _option(
        str, "Which model goes first where one lane serves several.", metavar="|".join(Policy)
    ),
    "linger": _option(
        str,
        "Mode preempt, policy priority: wait this long for the next request of a higher model before a lower "
        "one goes on (100us; at most 10ms). Default 0.",
        metavar="DURATION",
    ),
    "run_as": _option(
        str,
        "Models as CUDA graphs, as plain calls of torch, or as graphs where possible. Default auto; "
        "Deft's files: eager.",
        "--run",
        metavar="|".join(Run),
    ),
    "tuned": _option(
        bool,
        "Let the tuner choose how far apart the boundaries are of each model that another one interrupts.",
        "--tuned",
    ),
    "stop": _option(
        str, "What runs at the end of a run ends and counts, or does not.", metavar="|".join(Stop)
    ),
    "repeats": _option(int, "Runs of each mode. Default 1.", min=1),
    "seed": _option(int, "Chooses arrivals, weights and inputs. Default 0.", min=0),
    "idle": _option(
        str, "Measure the idle GPU for this time before each run. Default 3s.", metavar="DURATION"
    ),
    "cool_down": _option(str, "Rest between two runs. Default 2s.", metavar="DURATION"),
    "power_interval": _option(
        str, "Time between two samples of the power. Default 50ms.", metavar="DURATION"
    ),
    "profile": _option(
        str,
        "Emulated GPUs: models alone on a100, a6000, 4090 or h200, by a file, or in a finished run.",
        metavar="NAME|FILE|DIR",
    ),
}
#: Options that are durations, and the field of the spec that each sets.
_DURATIONS = {
    "duration": "duration_ns",
    "linger": "linger_ns",
    "idle": "idle_ns",
    "cool_down": "cool_down_ns",
    "power_interval": "power_every_ns",
}
_MAY_BE_0 = ("linger", "idle", "cool_down")


@dataclass(frozen=True, kw_only=True)
class Described:
    """An experiment, what was wrong with its file and, for Deft's, where Deft would write each job's CSV."""

    spec: ShareSpec
    warnings: tuple[str, ...] = ()
    deft_logs: tuple[Path, ...] = ()


def describes_experiment(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options that describe an experiment; its parameter `asked` gets them, by name."""
    return with_parameters(command, _HINTS, {}, into="asked", make=dict)


def described(ctx: typer.Context, models: list[str] | None, asked: Options) -> Described:
    """The experiment that files, models, options and `-- COMMAND` describe. Raises InvalidConfig."""
    from slosched.share.spec_check import check_spec, command_job

    found = _base(models or [], asked)
    changes = _changes(asked, found.spec)
    jobs = found.spec.jobs
    run_as = _one_of("--run", asked["run_as"], Run)
    if run_as is not None:
        jobs = tuple(
            job if job.command else msgspec.structs.replace(job, run=run_as) for job in jobs
        )
    if asked["tuned"]:
        jobs = all_tuned(jobs)
    if _COMMAND in ctx.meta:
        jobs = (*jobs, command_job(ctx.meta[_COMMAND], [job.name for job in jobs]))
    spec = check_spec(msgspec.structs.replace(found.spec, jobs=jobs, **changes))
    return Described(spec=spec, warnings=found.warnings, deft_logs=found.deft_logs)


def all_tuned(jobs: tuple[Job, ...]) -> tuple[Job, ...]:
    """The jobs, with tuned boundaries where another one may interrupt them. Raises InvalidConfig if none is.

    Those of the highest priority are left as they are, unless all have one priority.
    """
    highest = max(job.priority for job in jobs)
    levels = len({job.priority for job in jobs})
    found = []
    for job in jobs:
        boundary = msgspec.structs.replace(job.boundary, tuned=True)
        interrupted = levels == 1 or job.priority < highest
        if interrupted and not job.command and tunable(boundary):
            job = msgspec.structs.replace(job, boundary=boundary)
        found.append(job)
    if not any(job.boundary.tuned for job in found):
        raise InvalidConfig(
            "--tuned: no model of low priority has boundaries that can be tuned; give it a boundary of kind "
            "segment, sync or event"
        )
    return tuple(found)


def _base(models: list[str], asked: Options) -> Described:
    """The experiment without the options' changes."""
    from slosched.share.deft_config import read_deft
    from slosched.share.hotcarbon import model_jobs
    from slosched.share.spec_file import read_spec

    file: Path | None = asked["file"]
    if file is None:
        if not models:
            raise InvalidConfig(
                "no models: name them with their batch sizes, such as diffusion-1 whisper-1, or a file with -f"
            )
        return Described(spec=ShareSpec(jobs=model_jobs(models)))
    if models:
        raise InvalidConfig(
            f"{models[0]}: -f {file} has the models; name either the file or models, not both"
        )
    if file.suffix.lower() == ".toml":
        return Described(spec=read_spec(file))
    found = read_deft(file)
    return Described(spec=found.spec, warnings=found.warnings, deft_logs=found.logs)


def _changes(asked: Options, base: ShareSpec) -> dict[str, Any]:
    """The fields of the spec that the options set."""
    from slosched.share.hotcarbon import parse_modes

    changes: dict[str, Any] = {
        field: duration_ns(f"--{name.replace('_', '-')}", asked[name], may_be_0=name in _MAY_BE_0)
        for name, field in _DURATIONS.items()
        if asked[name] is not None
    }
    for name in ("repeats", "seed", "profile"):
        if asked[name] is not None:
            changes[name] = asked[name]
    for name, kind in (("policy", Policy), ("stop", Stop)):
        value = _one_of(f"--{name}", asked[name], kind)
        if value is not None:
            changes[name] = value
    if asked["modes"] is not None:
        changes["modes"] = parse_modes(asked["modes"])
    device = _device(asked)
    if device is not None:
        changes["device"] = device
    if asked["device_type"] is not None:
        changes["label"] = asked["device_type"]
    else:
        changes["label"] = labelled(base, device or base.device)
    return changes


def labelled(spec: ShareSpec, device: str = "") -> str:
    """The label of `spec`; where it has none, that of `device` (empty: its own)."""
    none = ShareSpec(jobs=()).label
    return spec.label if spec.label != none else label_of(device or spec.device)


def label_of(device: str) -> str:
    """What results call a device that has no label."""
    return _LABELS.get(device, ShareSpec(jobs=()).label)


def _device(asked: Mapping[str, Any]) -> str | None:
    by_number = None if asked["device_id"] is None else f"cuda:{asked['device_id']}"
    device: str | None = asked["device"]
    if device == "cuda":
        device = by_number or "cuda:0"
    if device and by_number and device.startswith("cuda:") and device != by_number:
        raise InvalidConfig(
            f"--device {device} and --device-id {asked['device_id']} contradict each other"
        )
    return device or by_number


def _one_of(option: str, text: str | None, kind: Any) -> Any:
    if text is None:
        return None
    if text not in list(kind):
        raise InvalidConfig(f"{option} must be one of {', '.join(kind)}, not {text!r}")
    return kind(text)
