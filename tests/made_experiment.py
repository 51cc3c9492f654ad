"""An experiment for the tests of the frame: cells that write records, and misbehave on demand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from slosched.clock import sleep_ns
from slosched.faasm import layout
from slosched.faasm.frame import Frame
from slosched.faasm.frame_table import EXPERIMENTS, Experiment
from slosched.field_types import check_types
from slosched.functions.state.state import State
from slosched.options import Option

NAME = "made"
#: Runs `main` in a process whose module path has the folder of the tests.
PROGRAM = "import sys, made_experiment; made_experiment.main(sys.argv[1:])"
#: How a cell misbehaves, and where it notes what it made.
FAULTS = ("", "raise", "wait", "process", "orphan", "memory", "state", "thread")


@dataclass(frozen=True, kw_only=True)
class Options:
    workers: Annotated[tuple[int, ...], Option(help="Numbers of workers.")] = (1, 2, 4)
    cold_delay_ns: Annotated[int, Meta(ge=0), Option(help="Mean of cold starts.")] = 0
    rate: Annotated[float, Option(help="A rate.")] = 1.0
    fault: Annotated[str, Option(help="What goes wrong in the second cell.", one_of=FAULTS)] = ""
    seed: Annotated[int, Option(help="Seed.")] = 3

    def __post_init__(self) -> None:
        check_types(self)


def offer() -> None:
    """Make the experiment known, as a row of the table does."""
    EXPERIMENTS[NAME] = Experiment(
        module=__name__, options=f"{__name__}:Options", published="made_up", summary="Made up."
    )


def run(options: Options, frame: Frame) -> None:
    frame.expect({f"workers={workers}": 1.0 for workers in options.workers})
    for place, workers in enumerate(options.workers):
        with frame.cell(f"workers={workers}") as cell:
            if not cell:
                continue
            note(frame.directory / "made.txt", f"{workers}\n")
            if place == 1:
                _misbehave(options.fault, frame)
            with frame.bill(every_s=0.01) as bill:
                sleep_ns(1_000_000)
            published = layout.sgd(
                "FAASM",
                workers=workers,
                interval=60_000,
                run_ns=2_500_000,
                losses=[(0.5, 0.9), (1.5, 0.4)],
            )
            cell.row(
                {
                    "workers": workers,
                    "value": 10 * workers,
                    layout.PUBLISHED: published,
                    **bill.record(),
                }
            )


def report(options: Options, frame: Frame) -> None:
    rows = [{"workers": each["workers"], "value": each["value"]} for each in frame.records()]
    frame.table("values", rows, note="EMULATED: all of it")
    frame.figure("values").with_name("values.png").write_bytes(b"a picture")


def note(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _misbehave(fault: str, frame: Frame) -> None:
    if fault == "raise":
        raise ValueError("the cell is broken")
    if fault == "wait":
        frame.say("waiting")
        sleep_ns(60_000_000_000)
    if fault == "process":
        note(frame.directory / "left.txt", f"{_sleeper().pid}\n")
    if fault == "orphan":
        program = (
            "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', "
            "'import time; time.sleep(60)'], "
            "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True).pid)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
        )
        note(frame.directory / "left.txt", done.stdout)
    if fault == "memory":
        name = Path("/dev/shm") / f"made-experiment-{os.getpid()}"
        name.write_bytes(b"left")
        note(frame.directory / "left.txt", f"{name}\n")
    if fault == "state":
        kept.append(State(frame.new_namespace(), own=True))
        kept[-1].array("weights", shape=(4,), dtype="float64")


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


#: States that a run leaves open.
kept: list[State] = []


def main(words: Sequence[str]) -> None:
    """`slosched exp`, with the experiment in the table: for tests that need a process (`PROGRAM`)."""
    offer()
    from slosched.cli.app import app

    app(args=["exp", *words], prog_name="slosched")
