"""`slosched cascade profile`, and what `slosched cascade run --real` adds: real models on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Json
from slosched.cli.config_options import Options, with_parameters
from slosched.cli.output import beside, print_json, say
from slosched.cli.values import duration_ns, whole_numbers
from slosched.config import DTYPES
from slosched.errors import InvalidConfig, OutputExists, UnknownName
from slosched.options import MODELS
from slosched.output_files import check_output
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

if TYPE_CHECKING:
    from slosched.cascade.live_real import Machine
    from slosched.cascade.real import Programs
    from slosched.cascade.run import Experiment, Report
    from slosched.cascade_spec import CascadeSpec

_BATCHES = "1,2,4,8"
_PROFILE_SUFFIX = ".profile.toml"

_DeviceText = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="auto, cpu, cuda:N, or cuda for all GPUs that are here."),
]
_Light = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The light model with its judge, as a worker offers it. Default: the cascade's, on a CPU "
        "diffusion/tiny+judge.",
        show_default=False,
    ),
]
_Heavy = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The heavy model. Default: the cascade's, on a CPU diffusion/tiny-guided.",
        show_default=False,
    ),
]
_Batches = Annotated[
    str, typer.Option(help="Batch sizes to measure: a list and ranges. 1 is always among them.")
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help=f"Precision of the weights: {', '.join(DTYPES)}. Default: float16 on a GPU, float32 on a CPU.",
        show_default=False,
    ),
]
_Slo = Annotated[
    str | None,
    typer.Option(
        help="The SLO. Default: the cascade's, scaled as the heavy model's batch of 1 is faster or slower "
        "here.",
        show_default=False,
    ),
]
_Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A worker.toml with both models, if they are your own.",
        show_default=False,
    ),
]


def _of_real(option: Any) -> Any:
    """`option` in the panel of the options of --real."""
    option.rich_help_panel = MODELS
    return option


#: The options of `run` that hold with --real alone.
_HINTS: dict[str, Any] = {
    "real": Annotated[
        bool,
        _of_real(
            typer.Option(
                "--real",
                help="Serve real models on the GPUs of this machine (or its CPU): measure both unless "
                "CASCADE is a measured file, scale the trace to what they can do, and serve it. Weights are "
                "random, scores replayed.",
            )
        ),
    ],
    "device": Annotated[
        str | None,
        _of_real(
            typer.Option(
                "--device",
                metavar="DEVICE",
                help="With --real: auto, cpu, cuda:N, or cuda for all GPUs. Default auto.",
            )
        ),
    ],
    "light": Annotated[
        str | None,
        _of_real(
            typer.Option(
                "--light", metavar="MODEL", help="With --real: the light model, with its judge."
            )
        ),
    ],
    "heavy": Annotated[
        str | None,
        _of_real(typer.Option("--heavy", metavar="MODEL", help="With --real: the heavy model.")),
    ],
    "peak": Annotated[
        str | None,
        _of_real(
            typer.Option(
                "--peak",
                metavar="QPS",
                help="With --real: the highest rate of a trace LOtoHI, which keeps its shape. Default auto: "
                "0.9 of what the published plan is feasible for here. --duration is then the time of the "
                "whole curve, 90s.",
            )
        ),
    ],
    "batches": Annotated[
        str | None,
        _of_real(
            typer.Option(
                "--batches",
                metavar="LIST",
                help=f"With --real: batch sizes to measure. Default {_BATCHES}.",
            )
        ),
    ],
    "dtype": Annotated[
        str | None,
        _of_real(
            typer.Option(
                "--dtype",
                metavar="DTYPE",
                help="With --real: precision of the weights. Default: float16 on a GPU, float32 on a CPU.",
            )
        ),
    ],
    "worker_config": Annotated[
        Path | None,
        _of_real(
            typer.Option(
                "--worker-config",
                metavar="FILE",
                help="With --real: a worker.toml with both models, if they are your own.",
            )
        ),
    ],
}


def takes_real_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` --real and the options that go with it; its parameter `machine` gets them by name."""
    return with_parameters(command, _HINTS, {"real": False}, into="machine", make=dict)


def is_real(given: Options, *, live: bool) -> bool:
    """Whether --real was given. Raises InvalidConfig for what goes with it alone, or not at all."""
    if given["real"]:
        if live:
            raise InvalidConfig("--live has emulated GPUs and --real has real ones: leave one out")
        return True
    for name, value in given.items():
        if value is not None and name != "real":
            flag = f"--{name.replace('_', '-')}"
            raise InvalidConfig(f"{flag} is for real models; give --real too, or leave it out")
    return False


# ------------------------------------------------------------------------------------ measuring


def profile(
    name: Annotated[
        str,
        typer.Argument(
            metavar="CASCADE",
            help="sdturbo, sdxs, sdxlltn, or a file.toml: what scores, quality and SLO are taken from.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.toml",
            help="The measured cascade. Times go to FILE.profile.toml first; what is there is not measured "
            "again.",
        ),
    ],
    device: _DeviceText = "auto",
    light: _Light = None,
    heavy: _Heavy = None,
    batches: _Batches = "1,2,4,8,16",
    dtype: _Dtype = None,
    slo: _Slo = None,
    config: _Config = None,
    json: Json = False,
) -> None:
    """Measure both models of a cascade on this device, and write the cascade's file for it.

    The file has the models' names, times by batch size, steps and weights as `slosched profile` measures
    them, and an SLO that is scaled to them. Scores and quality are taken over from CASCADE, since weights
    are random: a run replays scores, and reads FID off a table. Its comments say what is what. `slosched
    cascade run FILE.toml --real` serves it; without --real its GPUs are emulated. A job that is stopped
    loses nothing but the model that was being measured.

    \b
    Examples:
      slosched cascade profile sdturbo --device cuda:0 --out h200.toml
      slosched cascade profile sdxlltn --batches 1,2,4 --slo 10s --out sdxl.toml
      slosched cascade profile sdturbo --light small+judge --heavy large --config worker.toml --out own.toml
      slosched cascade run h200.toml --workers 16 --trace 4to32
    """
    from slosched.cascade.live_real import measure, write_measured
    from slosched.workloads.cascades import load_cascade

    if out.suffix != ".toml":
        raise InvalidConfig(f"--out {out}: the file of a cascade ends in .toml")
    check_output(out)
    times = out.with_name(out.stem + _PROFILE_SUFFIX)
    if out.exists():
        raise OutputExists(
            f"{out} exists and is not overwritten; choose another name, or remove it (what was measured stays "
            f"in {times})"
        )
    base = load_cascade(name)
    machine = replace(machine_of(device, None, dtype, config), workers=1)
    programs = _programs(base, light, heavy, machine)
    whole_numbers("--batches", batches)
    slo_ns = None if slo is None else duration_ns("--slo", slo)
    gpu = measure(programs, machine, times, batches=batches, logs=_log_folder(out), show=beside)
    spec = write_measured(out, base, programs, gpu, machine, slo_ns=slo_ns)
    if json:
        print_json(_document(spec, out, own=machine.own))
        return
    for line in _lines(spec, base, own=machine.own):
        say(line)
    own = f" --worker-config {config}" if machine.own else ""
    say(f"wrote {out}; serve it: slosched cascade run {out} --real{own}")


def _log_folder(out: Path) -> Path:
    return out.with_name(out.stem + ".logs")


def _lines(spec: CascadeSpec, base: CascadeSpec, *, own: bool) -> list[str]:
    from slosched.cascade.real import note

    lines = []
    for stage, model in (("light", spec.light), ("heavy", spec.heavy)):
        times = ", ".join(f"{b}: {ns / NS_PER_MS:.4g} ms" for b, ns in model.exec_ns.items())
        steps = f" in {model.steps} steps" if model.steps else ""
        lines.append(f"{stage} {model.model}{steps}: {times}")
    lines.append(
        f"SLO {format_duration(spec.slo_ns)} (that of {base.name} is {format_duration(base.slo_ns)})"
    )
    return [*lines, note(spec, own=own)]


def _document(spec: CascadeSpec, out: Path, *, own: bool) -> dict[str, Any]:
    from slosched.cascade.real import note

    stages = {
        stage: {
            "model": model.model,
            "exec_ns": model.exec_ns,
            "steps": model.steps,
            "step_ns": model.step_ns,
            "weights_bytes": model.weights_bytes,
        }
        for stage, model in (("light", spec.light), ("heavy", spec.heavy))
    }
    return {**stages, "slo_ns": spec.slo_ns, "real": note(spec, own=own), "file": str(out)}


# -------------------------------------------------------------------------------------- the run


def machine_of(
    device: str | None, workers: int | None, dtype: str | None, config: Path | None
) -> Machine:
    """The machine as the options say; without them, the GPUs that are here, or else the CPU.

    Raises InvalidConfig, UnknownName.
    """
    from slosched.cascade.live_real import Machine
    from slosched.daemon.backends.devices import count_gpus

    gpus = count_gpus()
    device = device or "auto"
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise UnknownName("device", device, ["auto", "cpu", "cuda", "cuda:0"])
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName("dtype", dtype, list(DTYPES))
    if kind == "cuda" and gpus < (workers or 1):
        raise InvalidConfig(
            f"there are {gpus} GPUs here, fewer than {workers or 1}; take fewer --workers, or --device cpu"
        )
    if workers is None:
        workers = gpus if device == "cuda" else 1
    return Machine(device, workers, dtype or ("float32" if kind == "cpu" else "float16"), config)


def _programs(
    base: CascadeSpec, light: str | None, heavy: str | None, machine: Machine
) -> Programs:
    from slosched.cascade.real import programs_of

    return programs_of(base.name, light=light, heavy=heavy, cpu=machine.device == "cpu")


def serve_real(
    experiment: Experiment, given: Options, directory: Path, workers: int | None
) -> tuple[Experiment, Report]:
    """Measure what is to be measured, scale the trace, and serve it; also the experiment as it was run.

    `workers` None: one for each GPU. Raises InvalidConfig, UnknownName, and as `run_real` does.
    """
    from slosched.cascade.live_real import check_real, run_real

    machine = machine_of(
        given["device"],
        workers,
        given["dtype"],
        given["worker_config"],
    )
    check_real(experiment, machine)
    cascade = _measured(experiment, given, machine, directory)
    experiment = replace(experiment, cascade=cascade, workers=machine.workers)
    experiment = _scaled(experiment, given["peak"])
    experiment.check()
    beside(f"{experiment.spec().name} on {machine.words}, trace {experiment.trace}")
    return experiment, run_real(experiment, directory, machine, show=beside)


def _measured(experiment: Experiment, given: Options, machine: Machine, directory: Path) -> str:
    """The file of the measured cascade: the one that was named, or one that is made in `directory`."""
    from slosched.cascade.live_real import measure, write_measured
    from slosched.workloads.cascades import is_cascade_path, load_cascade

    light, heavy = given["light"], given["heavy"]
    if is_cascade_path(experiment.cascade) and not (light or heavy):
        return experiment.cascade
    base = load_cascade(experiment.cascade)
    programs = _programs(base, light, heavy, machine)
    batches = given["batches"] or _BATCHES
    whole_numbers("--batches", batches)
    directory.mkdir(parents=True, exist_ok=True)
    gpu = measure(
        programs,
        machine,
        directory / f"{base.name}{_PROFILE_SUFFIX}",
        batches=batches,
        logs=directory / "measuring",
        show=beside,
    )
    path = directory / f"{base.name}.toml"
    write_measured(path, base, programs, gpu, machine)
    return str(path)


def _scaled(experiment: Experiment, peak: str | None) -> Experiment:
    """The experiment with a trace that these GPUs can serve. Raises InvalidConfig."""
    from slosched.cascade.real import SECONDS, scaled_trace

    rate = None
    if peak is not None and peak != "auto":
        try:
            rate = float(peak)
        except ValueError:
            rate = 0.0
        if not 0 < rate < 1e6:
            raise InvalidConfig(f"--peak must be a rate in requests/s, or auto, not {peak!r}")
    seconds = SECONDS
    if experiment.duration_ns is not None:
        seconds = max(1, round(experiment.duration_ns / NS_PER_S))
    trace = scaled_trace(
        experiment.trace, experiment.spec(), experiment.workers, peak=rate, seconds=seconds
    )
    if trace is None:
        if peak is not None:
            raise InvalidConfig(
                f"--peak scales a trace LOtoHI, and {experiment.trace} has rates of its own; leave one out"
            )
        return experiment
    return replace(experiment, trace=trace, duration_ns=None)
