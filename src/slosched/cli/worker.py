"""`slosched worker`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.config_options import Options, takes_options, values_of
from slosched.cli.output import Announcer
from slosched.config import WorkerConfig

_Config = Annotated[
    Path | None, typer.Option(help="A worker.toml; options on the command line override it.")
]


@takes_options(WorkerConfig)
def worker(*, options: Options, config: _Config = None) -> None:
    """Run a worker: it executes what a controller plans, each action at its exact time.

    One line says when it is ready. SIGTERM or Ctrl-C finishes what runs, answers the rest and exits 0.
    Without a GPU and without torch, `--device emulated` stands in for GPUs: inferences take the time
    that the profile says and compute nothing. With --functions, and no device, number of GPUs, libraries,
    models or repository, it runs functions alone: it takes no GPU and needs no torch.

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
      slosched worker --repository models              # models/NAME/VERSION/model.pt2; see docs/repository.md
      slosched worker --functions my_functions --slots 4   # functions alone, in 4 slots: no torch, no GPU
      slosched worker --controller gpu01:12346 --join-key cluster.key    # no list at the controller needed
    """
    base = WorkerConfig()
    if config is not None:
        from slosched.config_file import load_worker_config

        base = load_worker_config(config, base)
    resolved = replace(base, **values_of(WorkerConfig, options))
    if _functions_alone(resolved, options, config):
        resolved = replace(resolved, device="none")
        Announcer()(
            "functions alone, without models and GPUs; --device auto serves models beside them"
        )
    if resolved.join_key:
        from slosched.join_key import read_join_key

        read_join_key(resolved.join_key)  # before a GPU's process is started
    raise typer.Exit(_serve(resolved, options["gpus"]))


def _functions_alone(resolved: WorkerConfig, options: Options, file: Path | None) -> bool:
    """Whether there are functions, and nothing says that models or GPUs are wanted beside them."""
    others = (
        options["device"],
        options["gpus"],
        resolved.libraries or None,
        resolved.models or None,
        resolved.repository or None,
    )
    if not resolved.functions or any(each is not None for each in others):
        return False
    if file is None:
        return True
    from slosched.config_file import load_worker_config

    # What the file says is the same over every base; what it does not say is the base's.
    base = replace(WorkerConfig(), device="emulated")
    return load_worker_config(file, base).device == base.device and resolved.device == "auto"


def _serve(config: WorkerConfig, gpus: int | None) -> int:
    from slosched.daemon.backends.opening import DEVICES, device_kind, device_name

    kind = device_kind(config.device)  # an unknown device is refused before anything starts
    announce = Announcer()
    origin = DEVICES.origin(device_name(config.device))
    if origin is not None:
        announce(f"device {config.device}: {origin.target} of {origin.text}")
    if not kind.process_each:
        from slosched.daemon.worker import run_worker

        return run_worker(config, announce=announce)
    from slosched.daemon.supervisor import run_workers

    return run_workers(config, announce=announce, gpus=gpus)
