"""`slosched worker`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.model_options import ChannelsLast, Dtype, Libraries
from slosched.cli.output import Announcer
from slosched.cli.values import check_device, given, library_names, size_bytes
from slosched.config import WORKER_PORT, WorkerConfig

Bind = Annotated[
    str | None,
    typer.Option(help="Address to listen on, as 127.0.0.1, ::1 or :: (all). Default 0.0.0.0."),
]
_Port = Annotated[
    int | None,
    typer.Option(
        help="Port to listen on; the first of several for several real GPUs. "
        f"Default {WORKER_PORT}; 0 takes a free one."
    ),
]
_Device = Annotated[
    str | None,
    typer.Option(
        help="auto, cuda:N, cpu or emulated. Default auto: every GPU of the host, else the CPU."
    ),
]
_Gpus = Annotated[
    int | None,
    typer.Option(
        help="Number of GPUs. Emulated: all behind one address, default 1. Real: one process each, "
        "on consecutive ports, default all."
    ),
]
_Config = Annotated[
    Path | None, typer.Option(help="A worker.toml; options on the command line override it.")
]
_Profile = Annotated[
    str | None,
    typer.Option(
        help="The profile of an emulated GPU: a built-in one, or a TOML file of `slosched "
        "profile`. "
        "Default v100."
    ),
]
_WeightsCache = Annotated[
    str | None,
    typer.Option(
        help="GPU memory for weights, for example 10GiB. Default: the profile's, or four fifths of "
        "the free memory."
    ),
]
_HostCache = Annotated[
    str | None,
    typer.Option(
        help="Pinned host memory for models' weights, for example 8GiB; a model that does not fit "
        "is not prepared. Default: as much as the models need."
    ),
]
_HostImages = Annotated[
    int | None,
    typer.Option(
        help="Pinned copies of each model's weights, shared by its instances, so that loads come from "
        "different memory. Default 1."
    ),
]
_TorchThreads = Annotated[
    int | None, typer.Option(help="CPU threads of one inference on the device cpu. Default 1.")
]
_Cpu = Annotated[
    int | None,
    typer.Option(
        help="Keep the loop on this core; with several real GPUs, theirs are this one and the next. "
        "Other threads may run elsewhere. Default -1: any core."
    ),
]
_BusyPoll = Annotated[
    bool | None,
    typer.Option(
        "--busy-poll/--sleep",
        help="Busy-poll in the loop of a real GPU: a request to an idle worker is served about 0.1 "
        "ms sooner, at the cost of a whole core. Default --sleep.",
    ),
]
_Gc = Annotated[
    str | None,
    typer.Option(
        help="When garbage is collected: idle (when nothing is due for 5 ms), auto (as Python does by "
        "itself) or off (never; memory may grow). Default idle."
    ),
]


def worker(
    port: _Port = None,
    bind: Bind = None,
    device: _Device = None,
    gpus: _Gpus = None,
    config: _Config = None,
    profile: _Profile = None,
    weights_cache: _WeightsCache = None,
    dtype: Dtype = None,
    channels_last: ChannelsLast = None,
    libraries: Libraries = None,
    host_cache: _HostCache = None,
    host_images: _HostImages = None,
    torch_threads: _TorchThreads = None,
    cpu: _Cpu = None,
    busy_poll: _BusyPoll = None,
    gc: _Gc = None,
) -> None:
    """Run a worker: it executes what a controller plans, each action at its exact time.

    One line says when it is ready. SIGTERM or Ctrl-C finishes what runs, answers the rest and exits 0.
    Without a GPU and without torch, `--device emulated` stands in for GPUs: inferences take the time
    that the profile says and compute nothing.

    Each real GPU is served by a process of its own, which is started again if it ends by itself (a GPU that
    is lost, a crash, a bug): at once, and then after longer pauses, at most 8 times in 10 minutes. A model
    that ended its process twice is put aside: it is not offered any more until you start the command again.

    \b
    Examples:
      slosched worker                                  # the device that is there, port 12345
      slosched worker --device emulated --gpus 6       # six V100s in one process
      slosched worker --device cuda:1 --port 12346
      slosched worker --dtype float16 --channels-last  # half the weights, and faster images
      slosched worker --libraries torchvision,timm     # and then: slosched client infer timm/resnet10t
      slosched worker --config worker.toml             # own models; see daemon/worker.toml
    """
    base = WorkerConfig()
    if config is not None:
        from slosched.config_file import load_worker_config

        base = load_worker_config(config, base)
    cache_bytes = None if weights_cache is None else size_bytes("--weights-cache", weights_cache)
    host_bytes = None if host_cache is None else size_bytes("--host-cache", host_cache)
    resolved = replace(
        base,
        **given(
            port=port,
            bind=bind,
            device=device,
            gpus=gpus,
            profile=profile,
            weights_cache_bytes=cache_bytes,
            dtype=dtype,
            channels_last=channels_last,
            libraries=None if libraries is None else library_names(libraries),
            host_cache_bytes=host_bytes,
            host_images=host_images,
            torch_threads=torch_threads,
            cpu=cpu,
            busy_poll=busy_poll,
            gc=gc,
        ),
    )
    check_device(resolved.device, "auto", "cuda:N", "cpu", "emulated")
    raise typer.Exit(_serve(resolved, gpus))


def _serve(config: WorkerConfig, gpus: int | None) -> int:
    announce = Announcer()
    if config.device in ("cpu", "emulated"):
        from slosched.daemon.worker import run_worker

        return run_worker(config, announce=announce)
    from slosched.daemon.supervisor import run_workers

    return run_workers(config, announce=announce, gpus=gpus)
