"""`slosched profile`: measure models on a device, for the scheduler and for emulated GPUs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import structs

from slosched.cli.ask import Json
from slosched.cli.config_options import Options, takes_options, values_of
from slosched.cli.output import print_json, say, table_text, warn
from slosched.cli.values import given, size_bytes, whole_numbers
from slosched.config import GpuProfile, WorkerConfig
from slosched.errors import InvalidConfig, OutputExists
from slosched.options import MEMORY, PROCESSOR
from slosched.output_files import check_output
from slosched.units import format_duration

if TYPE_CHECKING:
    from slosched.config import ModelProfile

_WEIGHTS_CACHE_BYTES = 16 * 2**30

_Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="Names from the zoo, from --config or --repository, or of a library, as timm/resnet10t.",
        show_default=False,
    ),
]
_All = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Every model of the zoo and of --config, and the models named here; from libraries, "
        "only the models named.",
    ),
]
_Device = Annotated[str, typer.Option(help="auto, cuda:N or cpu: what to measure on.")]
_Batches = Annotated[
    str,
    typer.Option(
        help="Batch sizes to measure: a list and ranges, as 1-16,32. 1 is always among them."
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Write a TOML profile here, for `slosched worker --device emulated --profile FILE`: after "
        "each model, so that a job which is stopped loses nothing. An existing file is not "
        "overwritten."
    ),
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the file of --out, if it exists: the models in it are not measured again. "
        "Use the same device, batch sizes and precision as before; the file does not record them.",
    ),
]
_Name = Annotated[
    str | None, typer.Option(help="The profile's name. Default: the file's, or the device.")
]
_WeightsCache = Annotated[
    str | None,
    typer.Option(
        help="GPU memory for weights to state in the profile. Default 16GiB.",
        rich_help_panel=MEMORY,
    ),
]
_TorchThreads = Annotated[
    int,
    typer.Option(
        min=1,
        help="CPU threads of one inference on the device cpu.",
        rich_help_panel=PROCESSOR,
    ),
]
_Config = Annotated[Path | None, typer.Option(help="A worker.toml that names models of your own.")]


@takes_options(WorkerConfig, only=("dtype", "channels_last", "libraries", "repository"))
def profile(
    model: _Models = None,
    all_: _All = False,
    *,
    options: Options,
    device: _Device = "auto",
    batches: _Batches = "1,2,4,8,16",
    out: _Out = None,
    resume: _Resume = False,
    name: _Name = None,
    weights_cache: _WeightsCache = None,
    torch_threads: _TorchThreads = 1,
    config: _Config = None,
    json: Json = False,
) -> None:
    """Measure how long models take: each batch size, and the transfer of their weights.

    Prints the medians; with --out writes them as a profile. Times are printed with their unit; --json
    and the profile give them in ns. Progress goes to stderr. A model that fails is reported and the
    others continue; the exit code is then 1.

    \b
    Examples:
      slosched profile resnet50
      slosched profile resnet50 resnet18 --device cuda:0 --out h200.toml
      slosched profile --all --batches 1-16 --dtype float16 --channels-last --out h200.toml --resume
      slosched worker --device emulated --gpus 8 --profile h200.toml
    """
    if not model and not all_:
        raise InvalidConfig(
            "name the models to measure, as in `slosched profile resnet50`, or give --all"
        )
    if device == "emulated":
        raise InvalidConfig(
            "an emulated GPU has nothing to measure: leave --device out to measure on this machine's "
            "GPU, or on its CPU if there is none"
        )
    _check_device(device)
    sizes = tuple(sorted({1, *whole_numbers("--batches", batches)}))
    cache_bytes = None if weights_cache is None else size_bytes("--weights-cache", weights_cache)
    before = _resumed(out) if resume else None
    if out is not None:
        check_output(out)
        if before is None and out.exists():
            raise OutputExists(
                f"{out} exists and is not overwritten; choose another name, or go on with it: --resume"
            )
    worker = replace(
        _worker_config(config),
        device=device,
        torch_threads=torch_threads,
        **values_of(WorkerConfig, options),
    )
    gpu = before or GpuProfile(
        name=out.stem if out is not None else _device_name(device),
        models={},
        weights_cache_bytes=_WEIGHTS_CACHE_BYTES,
        page_bytes=worker.page_bytes,
    )
    gpu = replace(gpu, **given(name=name, weights_cache_bytes=cache_bytes))
    book = _Book(gpu, out, replacing=before is not None)
    failed = _measure(book, worker, model or [], all_, sizes)
    if json:
        print_json(_as_json(book.gpu))
    elif book.gpu.models:
        say(_table(list(book.gpu.models.values())))
        if out is not None:
            say(f"wrote {out}; use it with: slosched worker --device emulated --profile {out}")
    if failed:
        warn(f"{len(failed)} failed: {', '.join(failed)}")
        raise typer.Exit(1)


def _check_device(device: str) -> None:
    """Raise UnknownName for a device that there is not, InvalidConfig for another package's."""
    from slosched.daemon.backends.opening import DEVICES, device_kind, device_name

    device_kind(device)
    origin = DEVICES.origin(device_name(device))
    if origin is not None:
        raise InvalidConfig(
            f"slosched cannot measure the device {device!r} of {origin.text}: the backend says itself how "
            "long its models take"
        )


def _device_name(device: str) -> str:
    """What a profile of `device` is called if nothing else names it."""
    if device == "auto":
        from slosched.daemon.backends.devices import on_cpu

        device = "cpu" if on_cpu(device) else "cuda"
    return device.replace(":", "")


class _Book:
    """The profile so far, and on the disk if there is a file for it."""

    def __init__(self, gpu: GpuProfile, out: Path | None, *, replacing: bool) -> None:
        self.gpu = gpu
        self._out = out
        self._replacing = replacing

    def keep(self, model: ModelProfile) -> None:
        self.gpu = replace(self.gpu, models={**self.gpu.models, model.name: model})
        if self._out is None:
            return
        from slosched.config_file import write_profile

        write_profile(self._out, self.gpu, replacing=self._replacing)
        self._replacing = True


def _measure(
    book: _Book, worker: WorkerConfig, named: list[str], every: bool, sizes: tuple[int, ...]
) -> list[str]:
    """Fill `book`; the names that failed. Raises UnknownName before anything is measured."""
    from slosched.daemon.profiler import Profiler, profile_models

    with Profiler(worker, named) as profiler:
        names = [*(profiler.names if every else ()), *(profiler.canonical(name) for name in named)]
        names = list(dict.fromkeys(names))
        there = [name for name in names if name in book.gpu.models]
        if there:
            warn(f"{len(there)} of {len(names)} measured before: {', '.join(there)}")
        missing = [name for name in names if name not in book.gpu.models]
        return profile_models(profiler, missing, sizes, keep=book.keep, progress=warn)


def _resumed(out: Path | None) -> GpuProfile | None:
    if out is None:
        raise InvalidConfig("--resume needs --out FILE, the profile to go on with")
    from slosched.config_file import load_profile

    # Absolute, so that it is not taken for a built-in profile of that name.
    return load_profile(out.absolute()) if out.exists() else None


def _worker_config(path: Path | None) -> WorkerConfig:
    if path is None:
        return WorkerConfig()
    from slosched.config_file import load_worker_config

    return load_worker_config(path, WorkerConfig())


def _as_json(gpu: GpuProfile) -> dict[str, Any]:
    document = asdict(gpu)
    for model in document["models"].values():
        for kind in ("inputs", "outputs"):
            model[kind] = [structs.asdict(tensor) for tensor in model[kind]]
    return document


def _table(models: list[ModelProfile]) -> str:
    by_length = any(model.lengths for model in models)
    rows = [
        (
            m.name,
            *((length or "",) if by_length else ()),
            batch,
            format_duration(ns),
            format_duration(ns / batch),
            format_duration(m.weights_ns),
            f"{m.weights_bytes / 1e6:.1f} MB",
        )
        for m in models
        for length in m.lengths or (0,)
        for batch, ns in sorted(m.times(length).items())
    ]
    heads = ("model", *(("length",) if by_length else ()), "batch", "exec", "per request")
    return table_text((*heads, "transfer", "weights"), rows)
