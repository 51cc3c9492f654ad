"""`slosched demo`: the whole system on one machine, with no flags."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from shutil import which
from typing import Annotated

import typer

from slosched.cli.demo_answers import check_answers, write_models
from slosched.cli.demo_gateway import QUESTION, ask_by_http, chosen
from slosched.cli.demo_sweeps import (
    start_controller,
    start_worker,
    sweep_emulated,
    sweep_real,
)
from slosched.cli.output import say, warn
from slosched.errors import MissingPackage
from slosched.experiment.children import Children, ended_by_signals
from slosched.output_files import write_file
from slosched.units import format_share

#: The models of phase 1, as a repository, and what came of their answers.
_MODELS, _ANSWERS = "models", "answers"


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
            help="Run phases 1 and 2, with real models. Default yes, if torch is there.",
        ),
    ] = True,
) -> None:
    """Run everything on this machine: trained models, a sweep of a real one, and one of six emulated GPUs.

    Phase 1 serves three trained models from a folder, on the device that is there (a GPU, else the CPU): the
    pitch of tones, the meaning of sentences, and digits. It compares their answers with a direct forward pass
    and with the truth. Phase 2 sweeps the SLO of a ResNet on that device from 1 to 100 times the model's time,
    and phase 3 that of six emulated V100s. Tables are printed; the folder of models, figures, telemetry and the
    processes' logs stay in a directory that is named at the end. Only free ports of 127.0.0.1 are used, and
    every process that is started is ended.

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
    found, again = _answers_in(directory)
    lines += found
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
    last = quote(str(runs[-1]))
    lines += [
        "",
        "next",
        *_path_line(),
        f"  slosched report {last}    # the last sweep's results, as a page",
        f"  slosched explain {last}   # why requests were refused",
        *again,
        "  README.md, 'Serve your model under a deadline', then docs/will_my_model_make_it.md",
        "",
        f"figures, telemetry and logs are in {directory}",
    ]
    return "\n".join(lines)


def _path_line() -> list[str]:
    """How to find `slosched` where the shell does not, as after `make demo`."""
    if which("slosched"):
        return []
    return [f'  export PATH="{Path(sys.executable).parent}:$PATH"    # where slosched is']


def _answers_in(directory: Path) -> tuple[list[str], list[str]]:
    """What phase 1 found, and how to serve its models again; nothing if it was left out."""
    answers = directory / _ANSWERS
    if not answers.is_dir():
        return [], []
    document = json.loads((answers / "answers.json").read_text(encoding="utf-8"))
    worker = f"slosched worker --repository {quote(str(directory / _MODELS))}"
    controller = "slosched controller INFER5 --workers 127.0.0.1:12345"
    again = [f"  {worker} & {controller} & slosched gateway"]
    found = document["found"]
    if document["by_http"]:
        found.append(document["by_http"])
        question = quote(str(answers / QUESTION))
        again.append(
            f"  curl localhost:8000/v1/infer/{document['asked']} -d @{question}   # asks that gateway"
        )
    return [f"  {line}" for line in found], again


def _run_phases(directory: Path, seconds: float, *, real: bool) -> list[Path]:
    runs = [_real_phases(directory, seconds)] if real else []
    runs.append(sweep_emulated(directory / "emulated", seconds))
    _draw(runs, directory / "figures")
    return runs


def _real_phases(directory: Path, seconds: float) -> Path:
    """Phases 1 and 2, with one worker; return the directory of the sweep."""
    device = _device()
    say(f"\nphase 1: trained models, from a folder, on {device}; are their answers true?")
    models = write_models(directory / _MODELS)
    run = directory / "real"
    run.mkdir()
    with Children() as children:
        options = ("--repository", str(directory / _MODELS)) if models else ()
        worker = start_worker(children, ("--device", device, *options), run)
        if models:
            answers = directory / _ANSWERS
            controller, address = start_controller(children, worker, answers)
            repository = directory / _MODELS
            found = check_answers(address, repository, models, device)
            by_http = ask_by_http(children, address, answers, repository, models, device)
            document = {"found": found, "by_http": by_http, "asked": chosen(models).name}
            write_file(answers / "answers.json", json.dumps(document, indent=2).encode())
            children.end(controller)
        return sweep_real(children, worker, device, run, seconds)


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
            f"phases 1 and 2 are left out: {' and '.join(missing)} not installed "
            "(pip install slosched[torch,models]); phase 3 needs neither"
        )
    return not missing


def _device() -> str:
    """The device of the real models, found without importing torch: "cuda:0" or "cpu"."""
    from slosched.daemon.backends.devices import count_gpus

    return "cuda:0" if count_gpus() and not version("torch").endswith("+cpu") else "cpu"


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
