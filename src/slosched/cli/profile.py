"""`slosched profile`: measure models on a device, for the scheduler and for emulated GPUs."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say, table_text, warn
from slosched.cli.values import size_bytes, whole_number
from slosched.config import GpuProfile, WorkerConfig
from slosched.errors import InvalidConfig
from slosched.units import format_duration

if TYPE_CHECKING:
    from slosched.config import ModelProfile

_Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Names from the zoo, or from --config.")
]
_Device = Annotated[str, typer.Option(help="auto, cuda:N or cpu: what to measure on.")]
_Batches = Annotated[str, typer.Option(help="Batch sizes to measure.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Write a TOML profile here, for `slosched worker --device emulated --profile FILE`. "
        "A file that is there is not overwritten."
    ),
]
_Name = Annotated[
    str | None, typer.Option(help="The profile's name. Default: the file's, or the device.")
]
_WeightsCache = Annotated[str, typer.Option(help="GPU memory for weights to state in the profile.")]
_TorchThreads = Annotated[
    int, typer.Option(min=1, help="CPU threads of one inference on the device cpu.")
]
_Config = Annotated[Path | None, typer.Option(help="A worker.toml that names models of your own.")]


def profile(
    model: _Models,
    device: _Device = "auto",
    batches: _Batches = "1,2,4,8,16",
    out: _Out = None,
    name: _Name = None,
    weights_cache: _WeightsCache = "16GiB",
    torch_threads: _TorchThreads = 1,
    config: _Config = None,
    json: Json = False,
) -> None:
    """Measure how long models take: each batch size, and the transfer of their weights.

    Prints the medians; with --out writes them as a profile. Times are printed with their unit; --json
    and the profile give them in ns.

    \b
    Examples:
      slosched profile resnet50
      slosched profile resnet50 resnet18 --device cuda:0 --out h200.toml
      slosched worker --device emulated --gpus 8 --profile h200.toml
    """
    sizes = _batches(batches)
    cache_bytes = size_bytes("--weights-cache", weights_cache)
    if out is not None and out.exists():
        raise InvalidConfig(f"{out} exists and is not overwritten; choose another name")
    if device == "emulated":
        raise InvalidConfig(
            "an emulated GPU has nothing to measure; take --device auto, cuda:N or cpu"
        )
    base = WorkerConfig()
    if config is not None:
        from slosched.config_file import load_worker_config

        base = load_worker_config(config, base)
    worker = replace(base, device=device, torch_threads=torch_threads)
    from slosched.daemon.profiler import profile_model

    measured = [profile_model(each, worker, sizes, progress=_progress) for each in model]
    gpu = GpuProfile(
        name=name or (out.stem if out is not None else device.replace(":", "")),
        models={each.name: each for each in measured},
        weights_cache_bytes=cache_bytes,
        page_bytes=worker.page_bytes,
    )
    if out is not None:
        _write(out, gpu)
    if json:
        print_json(asdict(gpu))
        return
    say(_table(measured))
    if out is not None:
        say(f"wrote {out}; use it with: slosched worker --device emulated --profile {out}")


def _progress(text: object) -> None:
    warn(str(text))


def _batches(text: str) -> tuple[int, ...]:
    sizes = tuple(whole_number("--batches", part) for part in text.split(",") if part.strip())
    if not sizes or min(sizes) < 1:
        raise InvalidConfig(f"--batches must be whole numbers from 1 up, as 1,2,4, not {text!r}")
    return tuple(sorted({1, *sizes}))


def _write(path: Path, gpu: GpuProfile) -> None:
    from slosched.config_file import dump_profile

    try:
        with open(path, "x", encoding="utf-8") as file:  # noqa: PTH123 - pathlib has no "x"
            file.write(dump_profile(gpu))
    except OSError as error:
        raise InvalidConfig(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None


def _table(models: list[ModelProfile]) -> str:
    rows = [
        (m.name, batch, format_duration(ns), format_duration(ns / batch),
         format_duration(m.weights_ns), f"{m.weights_bytes / 1e6:.1f} MB")
        for m in models
        for batch, ns in sorted(m.exec_ns.items())
    ]  # fmt: skip
    return table_text(("model", "batch", "exec", "per request", "transfer", "weights"), rows)
