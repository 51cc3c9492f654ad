"""`slosched demo`: the whole system on one machine, with no flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.output import say, warn
from slosched.errors import MissingPackage, SloschedError
from slosched.experiment.children import Child, Children, ended_by_signals
from slosched.units import NS_PER_S, format_duration, format_share

if TYPE_CHECKING:
    from slosched.clients.tensors import Array
    from slosched.messages import ModelInfo

_STEPS = 12  # of the published sweep, 1 100 1.5 mul
_UTILISATION = 0.5
_MOST_REQUESTS_PER_S = 1000.0
_WORKER_READY_S = 120.0  # torch alone may take 30 s to import from a cold disk
_CONTROLLER_READY_S = 20.0
_LOAD_S = 180.0
_CHECKED_INPUTS = 4
_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")


@dataclass(frozen=True)
class _Sweep:
    model: str
    copies: int
    rate: float
    inputs: bool


class OutputsDiffer(SloschedError):
    """What came back over the network is not what the model computes."""


def demo(
    seconds: Annotated[float, typer.Option(min=6, help="Length of each sweep, in seconds.")] = 60.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to make. Default ./slosched-runs/demo-<time>."),
    ] = None,
    real: Annotated[
        bool,
        typer.Option(
            "--real/--no-real",
            help="Run the first phase, with a real model. Default yes, if torch is there.",
        ),
    ] = True,
) -> None:
    """Run everything on this machine: a real model, then six emulated GPUs.

    Phase 1 serves a real torch model on the device that is there (a GPU, else the CPU with a small
    ResNet), checks its outputs against a direct forward pass, and sweeps the SLO from 1 to 100 times the
    model's time. Phase 2 does the same sweep on six emulated V100s. Tables are printed; figures,
    telemetry and the processes' logs stay in a directory that is named at the end. Only free ports of
    127.0.0.1 are used, and every process that is started is ended.

    \b
    Examples:
      slosched demo
      slosched demo --seconds 12 --no-real
    """
    directory = _make_directory(out)
    say(f"everything goes to {directory}")
    try:
        with ended_by_signals():
            runs = _run_phases(directory, seconds, real=real and _torch_is_there())
    except BaseException:
        warn(f"demo interrupted; partial results are in {directory}")
        raise
    say(_closing(runs, directory))


def _closing(runs: list[Path], directory: Path) -> str:
    """Whether all worked and each sweep counts, and what to do next."""
    lines = ["", "verdict"]
    invalid = False
    for run in runs:
        document = json.loads((run / "client.json").read_text(encoding="utf-8"))
        share = format_share(document["satisfaction_client_from_scheduled_send"])
        line = f"  {run.name:<9} {document['sent']} requests, {share} in time for the client; "
        invalid |= not document["valid"]
        lines.append(line + ("the sweep counts" if document["valid"] else "the sweep is INVALID"))
    if invalid:
        lines += [
            "  INVALID: the client sent late, so the numbers say more about this machine than about slosched.",
            "  All parts work. Close other programs, or ask `slosched doctor`, and run the demo again.",
        ]
    else:
        lines.append(
            "  All parts work. The first steps of a sweep cannot be met: there the SLO is the model's time."
        )
    lines += [
        "",
        "next",
        f"  slosched report {runs[-1]}    # the last sweep's results, as a page",
        f"  slosched explain {runs[-1]}   # why requests were refused",
        "  README.md, 'Serve your model under a deadline', then docs/will_my_model_make_it.md",
        "",
        f"figures, telemetry and logs are in {directory}",
    ]
    return "\n".join(lines)


def _run_phases(directory: Path, seconds: float, *, real: bool) -> list[Path]:
    runs = [_real_phase(directory / "real", seconds)] if real else []
    runs.append(_emulated_phase(directory / "emulated", seconds))
    _draw(runs, directory / "figures")
    return runs


def _make_directory(out: Path | None) -> Path:
    from slosched.errors import RunDirectoryInUse
    from slosched.output_files import check_not_stdout, write_error

    if out is not None:
        check_not_stdout(out)
    directory = out or Path("slosched-runs") / f"demo-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        directory.mkdir(parents=True, exist_ok=out is None)
    except FileExistsError:
        raise RunDirectoryInUse(f"{directory} exists already; choose another --out") from None
    except OSError as error:
        raise write_error(
            f"cannot make {directory}: {error.strerror}; choose --out", error
        ) from None
    return directory


def _torch_is_there() -> bool:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        say(
            f"phase 1 is left out: {' and '.join(missing)} not installed "
            "(pip install slosched[torch,models]); phase 2 needs neither"
        )
    return not missing


# ------------------------------------------------------------------------------------- phases


def _real_phase(directory: Path, seconds: float) -> Path:
    device = _device()
    model, copies = ("resnet50", 12) if device.startswith("cuda") else ("resnet_tiny", 3)
    say(f"\nphase 1: {model} in torch on {device}, {copies} copies")
    directory.mkdir()
    with Children() as children:
        worker = _start_worker(children, ("--device", device), directory)
        # A controller of its own for the check keeps its requests out of the sweep's telemetry.
        checking, address = _start_controller(children, worker, directory / "check")
        info = _check_outputs(address, model, device)
        children.end(checking)
        _, controller = _start_controller(children, worker, directory)
        rate = min(_MOST_REQUESTS_PER_S, _UTILISATION * NS_PER_S / info.b1_ns)
        rate = float(f"{rate:.2g}")
        say(
            f"profiled b1 is {format_duration(info.b1_ns)}, so {rate:g} requests/s: about "
            f"{100 * rate * info.b1_ns / NS_PER_S:.0f} % of the device without batching"
        )
        sweep = _Sweep(model, copies, rate, inputs=True)
        _run_sweep(children, sweep, controller, directory, seconds)
    _print_tables(directory)
    return directory


def _emulated_phase(directory: Path, seconds: float) -> Path:
    say("\nphase 2: the same sweep on six emulated V100s, 12 copies of resnet50_v2, 600 requests/s")
    say("(inputs off: on one machine they would measure its memory, not the scheduler)")
    directory.mkdir()
    with Children() as children:
        device = ("--device", "emulated", "--gpus", "6", "--profile", "v100")
        worker = _start_worker(children, device, directory)
        _, controller = _start_controller(children, worker, directory)
        sweep = _Sweep("resnet50_v2", 12, 600, inputs=False)
        _run_sweep(children, sweep, controller, directory, seconds)
    _print_tables(directory)
    return directory


def _device() -> str:
    """The device of phase 1, found without importing torch: "cuda:0" or "cpu"."""
    from slosched.daemon.backends.devices import count_gpus

    return "cuda:0" if count_gpus() and not version("torch").endswith("+cpu") else "cpu"


def _start_worker(children: Children, options: tuple[str, ...], directory: Path) -> str:
    """Start a worker on a free port; return its address."""
    arguments = ["worker", *options, *_LOOPBACK]
    child = children.start("worker", arguments, directory / "worker.log")
    return f"127.0.0.1:{children.wait_ready(child, within_s=_WORKER_READY_S)}"


def _start_controller(children: Children, worker: str, directory: Path) -> tuple[Child, str]:
    """Start a controller on a free port with its telemetry in `directory`; return its address too."""
    directory.mkdir(exist_ok=True)
    arguments = ["controller", "INFER5", "--workers", worker, *_LOOPBACK, "--http-port", "-1"]
    arguments += ["--schedule-ahead", "5ms", "--log-dir", str(directory)]
    child = children.start("controller", arguments, directory / "controller.log")
    return child, f"127.0.0.1:{children.wait_ready(child, within_s=_CONTROLLER_READY_S)}"


def _run_sweep(
    children: Children, sweep: _Sweep, controller: str, directory: Path, seconds: float
) -> None:
    """Run the sweep in a client process, whose progress bar is ours; print its verdict."""
    arguments = ["client", controller, "slo-exp-1", sweep.model, str(sweep.copies), "poisson"]
    arguments += [f"{sweep.rate:g}", "1", "100", "1.5", "mul", f"{seconds / _STEPS:.3f}"]
    arguments += ["--inputs" if sweep.inputs else "--no-inputs", "--json", "--out", str(directory)]
    summary = directory / "client.json"
    client = children.start("client", arguments, summary, stdout=summary)
    deadline = int((seconds + _LOAD_S + 60) / 0.5)
    for _ in range(deadline):
        code = children.wait(client, 0.5)
        if code is not None:
            break
        children.check()
    else:
        raise SloschedError(f"the sweep did not end within {seconds + _LOAD_S + 60:.0f} s")
    children.forget(client)
    if code != 0:
        raise SloschedError(f"the client ended with exit code {code}; its error stands above")
    document: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    say(f"{document['sent']} requests; {document['verdict']}")
    for warning in document["warnings"]:
        warn(warning)


def _print_tables(directory: Path) -> None:
    from slosched.analysis.tables import render_text, summarise_steps

    say("\n" + render_text(summarise_steps(directory)))


def _draw(runs: list[Path], out: Path) -> None:
    from slosched.analysis.fig7 import plot_fig7

    try:
        files = plot_fig7(runs, out)
    except MissingPackage as error:
        say(f"\nno figure: {error}")
        return
    say("")
    for file in files:
        say(f"wrote {file}")


# ------------------------------------------------------------------------------ checking outputs


def _check_outputs(controller: str, model: str, device: str) -> ModelInfo:
    """Compare answers with a direct forward pass here; return what the controller says of the model."""
    import asyncio

    info, inputs, outputs = asyncio.run(_ask_for_outputs(controller, model))
    import numpy as np

    from slosched.daemon.backends import reference_forward

    errors = []
    for given, got in zip(inputs, outputs, strict=True):
        wanted = np.asarray(reference_forward(model, given)).reshape(got.shape)
        errors.append(np.max(np.abs(got - wanted)) / (np.max(np.abs(wanted)) or 1.0))
    worst = float(np.max(errors))  # numpy's, which a NaN survives
    # A GPU may multiply in TF32, which keeps 10 bits; the reference is computed on the CPU.
    allowed = 2e-2 if device.startswith("cuda") else 1e-3
    if not worst <= allowed:
        raise OutputsDiffer(
            f"outputs of {model} differ from a direct forward pass by {worst:.2g} of their largest "
            f"value; at most {allowed:g} is rounding"
        )
    how = f"to within {worst:.1g} of their largest value" if worst else "to the last bit"
    say(
        f"outputs checked: {len(inputs)} answers equal a direct forward pass {how} (random weights)"
    )
    return info


async def _ask_for_outputs(
    controller: str, model: str
) -> tuple[ModelInfo, list[Array], list[Array]]:
    import numpy as np

    from slosched.clients.aio import connect

    async with connect(controller, name="slosched demo") as client:
        [loaded] = await client.load(model, timeout_s=_LOAD_S)
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
