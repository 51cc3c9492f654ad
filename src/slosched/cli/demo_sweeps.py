"""The demo's sweeps of the SLO: of a real model, and of six emulated GPUs; and the processes that serve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slosched.cli.demo_answers import LOAD_S, OutputsDiffer, compare
from slosched.cli.output import say, warn
from slosched.errors import SloschedError
from slosched.experiment.children import Child, Children
from slosched.units import NS_PER_S, format_duration

if TYPE_CHECKING:
    from slosched.clients.tensors import Array
    from slosched.messages import ModelInfo

_STEPS = 12  # of the published sweep, 1 100 1.5 mul
_UTILISATION = 0.5
_MOST_REQUESTS_PER_S = 1000.0
_WORKER_READY_S = 120.0  # torch alone may take 30 s to import from a cold disk
_CONTROLLER_READY_S = 20.0
_CHECKED_INPUTS = 4
_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")


@dataclass(frozen=True)
class Sweep:
    """What a client sends: `copies` of `model`, `rate` requests/s in all, with made-up inputs or without."""

    model: str
    copies: int
    rate: float
    inputs: bool


def sweep_real(
    children: Children, worker: str, device: str, directory: Path, seconds: float
) -> Path:
    """Sweep the SLO of a ResNet on the device that `worker` has, after a check of its outputs."""
    model, copies = ("resnet50", 12) if device.startswith("cuda") else ("resnet_tiny", 3)
    say(f"\nphase 2: a sweep of the SLO; {model} in torch on {device}, {copies} copies")
    # A controller of its own for the check keeps its requests out of the sweep's telemetry.
    checking, address = start_controller(children, worker, directory / "check")
    info = check_outputs(address, model, device)
    children.end(checking)
    _, controller = start_controller(children, worker, directory)
    rate = min(_MOST_REQUESTS_PER_S, _UTILISATION * NS_PER_S / info.b1_ns)
    rate = float(f"{rate:.2g}")
    say(
        f"profiled b1 is {format_duration(info.b1_ns)}, so {rate:g} requests/s: about "
        f"{100 * rate * info.b1_ns / NS_PER_S:.0f} % of the device without batching"
    )
    sweep = Sweep(model, copies, rate, inputs=True)
    run_sweep(children, sweep, controller, directory, seconds)
    print_tables(directory)
    return directory


def sweep_emulated(directory: Path, seconds: float) -> Path:
    """The same sweep on six emulated GPUs, with processes of its own."""
    say("\nphase 3: the same sweep on six emulated V100s, 12 copies of resnet50_v2, 600 requests/s")
    say("(inputs off: on one machine they would measure its memory, not the scheduler)")
    directory.mkdir()
    with Children() as children:
        device = ("--device", "emulated", "--gpus", "6", "--profile", "v100")
        worker = start_worker(children, device, directory)
        _, controller = start_controller(children, worker, directory)
        sweep = Sweep("resnet50_v2", 12, 600, inputs=False)
        run_sweep(children, sweep, controller, directory, seconds)
    print_tables(directory)
    return directory


def start_worker(children: Children, options: tuple[str, ...], directory: Path) -> str:
    """Start a worker on a free port; return its address."""
    arguments = ["worker", *options, *_LOOPBACK]
    child = children.start("worker", arguments, directory / "worker.log")
    return f"127.0.0.1:{children.wait_ready(child, within_s=_WORKER_READY_S)}"


def start_controller(children: Children, worker: str, directory: Path) -> tuple[Child, str]:
    """Start a controller on a free port with its telemetry in `directory`; return its address too."""
    directory.mkdir(exist_ok=True)
    arguments = ["controller", "INFER5", "--workers", worker, *_LOOPBACK, "--http-port", "-1"]
    arguments += ["--schedule-ahead", "5ms", "--log-dir", str(directory)]
    child = children.start("controller", arguments, directory / "controller.log")
    return child, f"127.0.0.1:{children.wait_ready(child, within_s=_CONTROLLER_READY_S)}"


def run_sweep(
    children: Children, sweep: Sweep, controller: str, directory: Path, seconds: float
) -> None:
    """Run the sweep in a client process, whose progress bar is ours; print its verdict."""
    arguments = ["client", controller, "slo-exp-1", sweep.model, str(sweep.copies), "poisson"]
    arguments += [f"{sweep.rate:g}", "1", "100", "1.5", "mul", f"{seconds / _STEPS:.3f}"]
    arguments += ["--inputs" if sweep.inputs else "--no-inputs", "--json", "--out", str(directory)]
    summary = directory / "client.json"
    client = children.start("client", arguments, summary, stdout=summary)
    deadline = int((seconds + LOAD_S + 60) / 0.5)
    for _ in range(deadline):
        code = children.wait(client, 0.5)
        if code is not None:
            break
        children.check()
    else:
        raise SloschedError(f"the sweep did not end within {seconds + LOAD_S + 60:.0f} s")
    children.forget(client)
    if code != 0:
        raise SloschedError(f"the client ended with exit code {code}; its error stands above")
    document: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    say(f"{document['sent']} requests; {document['verdict']}")
    for warning in document["warnings"]:
        warn(warning)


def print_tables(directory: Path) -> None:
    from slosched.analysis.tables import render_text, summarise_steps

    say("\n" + render_text(summarise_steps(directory)))


def check_outputs(controller: str, model: str, device: str) -> ModelInfo:
    """Compare answers with a direct forward pass here; return what the controller says of the model."""
    import asyncio

    import numpy as np

    from slosched.daemon.backends import reference_forward

    info, inputs, outputs = asyncio.run(_ask_for_outputs(controller, model))
    wanted = [
        np.asarray(reference_forward(model, given)).reshape(got.shape)
        for given, got in zip(inputs, outputs, strict=True)
    ]
    how = compare(model, outputs, wanted, device)
    say(f"{model}: {len(inputs)} answers equal a direct forward pass {how} (random weights)")
    return info


async def _ask_for_outputs(
    controller: str, model: str
) -> tuple[ModelInfo, list[Array], list[Array]]:
    import numpy as np

    from slosched.clients.aio import connect

    async with connect(controller, name="slosched demo") as client:
        [loaded] = await client.load(model, timeout_s=LOAD_S)
        generator = np.random.default_rng(0)
        inputs, outputs = [], []
        for _ in range(_CHECKED_INPUTS):
            given = generator.standard_normal(loaded.input_shape).astype(loaded.input_dtype)
            answer = await client.infer(loaded, given, slo=5.0)
            if answer.output is None:
                raise OutputsDiffer(f"model {model} answered without an output")
            inputs.append(given)
            outputs.append(answer.output)
        return loaded.info, inputs, outputs
