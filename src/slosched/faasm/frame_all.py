"""Several experiments one after the other, each in a directory of its own; index.md names them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.faasm.frame import Frame, Say
from slosched.faasm.frame_report import REPORT
from slosched.faasm.frame_run import Order, run_experiment
from slosched.faasm.frame_tables import markdown_text
from slosched.faasm.names import REPLACED
from slosched.output_files import utf8, write_file
from slosched.telemetry.manifest import describe_host, read_manifest
from slosched.units import NS_PER_S

INDEX = "index.md"
#: A table whose name ends so has the paper's claims beside what was found.
CLAIMS = "claims"


@dataclass(frozen=True, kw_only=True)
class End:
    """How one experiment ended. `frame` is None if it failed."""

    experiment: str
    text: str
    wall_s: float
    frame: Frame | None

    @property
    def failed(self) -> bool:
        return self.frame is None


def run_all(orders: Sequence[Order], place: Path, *, say: Say, show: Say) -> list[End]:
    """Run the experiments and write index.md into `place`, also after Ctrl-C.

    An experiment that raises an error of slosched does not end the others. With `resume`, those that were not
    begun are begun. Raises Interrupted, and any other error.
    """
    ends: list[End] = []
    try:
        for order in orders:
            say(f"== {order.experiment} ({len(ends) + 1} of {len(orders)})")
            ends.append(_one(replace(order, begin=True), say=say, show=show))
    finally:
        if ends:
            write_file(place / INDEX, _index(ends, place).encode())
    return ends


def _one(order: Order, *, say: Say, show: Say) -> End:
    began_ns = now_ns()
    frame: Frame | None = None
    continued = False
    try:
        frame = run_experiment(order, say=say, show=show)
        text = f"{len(frame.cells)} cells"
        continued = len(read_manifest(frame.directory).get("sessions") or []) > 1
    except SloschedError as error:
        text = f"failed: {' '.join(str(error).split())}"
        say(f"{order.experiment} {text}")
    wall_s = (now_ns() - began_ns) / NS_PER_S
    since = " since it was continued" if continued else ""
    return End(
        experiment=order.experiment,
        text=f"{text}, {wall_s:.0f} s{since}",
        wall_s=wall_s,
        frame=frame,
    )


def _index(ends: Sequence[End], place: Path) -> str:
    host = describe_host()
    rows = []
    for end in ends:
        report = "" if end.frame is None else f"{_within(end.frame.directory, place)}/{REPORT}"
        link = f"[{end.experiment}]({report})" if report else end.experiment
        rows.append({"experiment": link, "end": end.text})
    parts = [
        "# Faasm's experiments",
        REPLACED,
        f"{host['cpu_model'] or 'unknown CPU'}, {host['cpu_usable']} cores usable, {host['platform']}; "
        f"{sum(end.wall_s for end in ends):.0f} s for these.",
        markdown_text(rows),
    ]
    for end in ends:
        for table in end.frame.tables if end.frame is not None else ():
            if table.name.endswith(CLAIMS) and table.rows:
                parts += [f"## {table.name}", markdown_text(table.rows)]
                parts += [table.note] if table.note else []
    return utf8("\n\n".join(parts) + "\n")


def _within(directory: Path, place: Path) -> str:
    return str(directory.relative_to(place)) if directory.is_relative_to(place) else str(directory)
