"""One run of an experiment: its directory, its cells, and what it prints, writes and must clear up.

    DIR/manifest.json     options, scale, seeds, versions, machine, when it ran, how it ended
    DIR/results.jsonl     the records of each cell (frame_results.py)
    DIR/run.log           the lines of progress, with the time of day
    DIR/raw/              what an experiment keeps beside its records
    DIR/billing/          samples of the host and of the run's processes (billing.py)
    DIR/tables/           each table as text and as TSV
    DIR/figures/          figures
    DIR/report.md         all of it on one page: what is replaced, the machine, tables, figures

An experiment is a module with

    def run(options: Options, frame: Frame) -> None        # measures: cells and records
    def report(options: Options, frame: Frame) -> None     # tables and figures, from frame.records() alone

    def check(options: Options) -> None                    # raises what a run would end by, before it begins

and `report` may be left out where `run` makes the tables itself, and `check`. A cell is made once:

    for workers in options.workers:
        with frame.cell(f"shared workers={workers}") as cell:
            if cell:                                        # false where the run directory has it
                with frame.bill() as bill:
                    ...
                cell.row({"workers": workers, "wall_s": wall_s, **bill.record()})
    frame.table("sgd", [...])
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slosched.clock import now_ns
from slosched.errors import InvalidConfig
from slosched.faasm.billing import Billing
from slosched.faasm.billing_gpu import GpuMemory, uuids_here
from slosched.faasm.frame_leaks import LeakCheck
from slosched.faasm.frame_results import RESULTS, Record, append_cell, read_results
from slosched.faasm.frame_tables import table_text, tsv_text
from slosched.faasm.names import REPLACED
from slosched.output_files import make_folder, utf8, write_file
from slosched.units import NS_PER_S

SCALES = ("quick", "published")
LOG = "run.log"
_TABLES, _FIGURES, _RAW, _BILLING = "tables", "figures", "raw", "billing"
#: A name also names files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")
_LONGEST_KEY = 200
#: The estimate of a run's time counts as much as this part of the run would, or that many seconds.
_WEIGHT_OF_ESTIMATE, _MOST_WEIGHT_S = 0.1, 120.0

#: Prints a line.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """A table of the report. `note` says what was emulated, or what the numbers are worth."""

    name: str
    rows: tuple[Mapping[str, Any], ...]
    note: str = ""


class Cell:
    """One configuration that is being made; false if it is not to be made."""

    def __init__(self, key: str, wanted: bool) -> None:
        self.key = key
        self._wanted = wanted
        self._records: list[Record] = []

    def __bool__(self) -> bool:
        return self._wanted

    def row(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is written with the others when the cell ends."""
        if not self._wanted:
            raise InvalidConfig(f"the cell {self.key!r} is there already; ask `if cell:` before")
        self._records.append(dict(record))

    @property
    def records(self) -> Sequence[Record]:
        return self._records


class Frame:
    """What an experiment gets. Made by `open_run` (frame_run.py), or by `for_report` from a directory.

    `name` is the experiment's, `scale` one of SCALES, and `namespace` begins the names of state that no other
    run has. Without `leaks` nothing is made: every cell is false, and tables and figures are made again.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        scale: str,
        namespace: str = "",
        say: Say = print,
        show: Say = print,
        leaks: LeakCheck | None = None,
    ) -> None:
        self.directory, self.name, self.scale, self.namespace = directory, name, scale, namespace
        self._say, self._show, self._leaks = say, show, leaks
        self._cells = read_results(directory / RESULTS)
        self._open: Cell | None = None
        self._lock = threading.RLock()
        self._expected: Mapping[str, float] = {}
        self._expected_ns, self._expected_of_made_s = 0, 0.0
        self._namespaces = 0
        self._gpus: tuple[str, ...] = ()
        self._gpu_idle_bytes = 0
        self.tables: list[Table] = []
        self.figures: list[Path] = []

    # ------------------------------------------------------------------------------------- cells

    @property
    def measures(self) -> bool:
        """Whether cells are made. False for `slosched exp report`."""
        return self._leaks is not None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say which cells the run will have, and for each key about how long it takes on a usual machine.

        That is printed before the first one. Behind each, progress tells what is left: the estimate of the
        others, scaled as the time of those made so far was to its estimate.
        """
        self._expected, self._expected_ns, self._expected_of_made_s = seconds, now_ns(), 0.0
        left = [key for key in seconds if key not in self._cells]
        if self.measures and left:
            self.say(
                f"{len(left)} of {len(seconds)} cells are to be made: about "
                f"{_duration(sum(seconds[key] for key in left))}, by an estimate"
            )

    @contextmanager
    def cell(self, key: str) -> Iterator[Cell]:
        """The cell `key`: true if it must be made, false if the run directory has it.

        Its records are written when the block ends without an error. Cells are made one after the other.
        """
        if not key or len(key) > _LONGEST_KEY or not key.isprintable():
            raise InvalidConfig(
                f"a cell's key is 1 to {_LONGEST_KEY} printable characters, not {key!r}"
            )
        if self._open is not None:
            raise InvalidConfig(f"the cell {key!r} begins within {self._open.key!r}")
        cell = Cell(key, self.measures and key not in self._cells)
        if not cell:
            yield cell
            return
        self.say(f"{self._place()}{key}")
        began_ns = now_ns()
        self._open = cell
        try:
            yield cell
        finally:
            self._open = None
        self._expected_of_made_s += self._expected.get(key, 0.0)
        self._write(cell, now_ns() - began_ns)

    def _write(self, cell: Cell, wall_ns: int) -> None:
        if not cell.records:
            raise InvalidConfig(f"the cell {cell.key!r} ended without a record")
        with self._lock:
            # As a later run reads them, so that a report says the same in both.
            written = append_cell(self.directory / RESULTS, cell.key, cell.records)
            self._cells[cell.key] = written
        self.say(f"{cell.key}: done in {wall_ns / NS_PER_S:.1f} s{self._left()}")

    def row(self, key: str, record: Mapping[str, Any]) -> None:
        """Add a record to the open cell `key`; outside of a cell it is one of its own, and written at once."""
        with self._lock:
            if self._open is not None:
                if self._open.key != key:
                    raise InvalidConfig(f"a record of {key!r} within the cell {self._open.key!r}")
                self._open.row(record)
                return
        with self.cell(key) as cell:
            if cell:
                cell.row(record)

    @property
    def cells(self) -> Sequence[str]:
        """The keys of the complete cells, in the order in which they ended."""
        return [*self._cells]

    def has(self, key: str) -> bool:
        """Whether the cell `key` is complete."""
        return key in self._cells

    def records(self, key: str | None = None) -> list[Record]:
        """The records of all complete cells in the order in which they ended, or those of the cell `key`.

        Each has the field "key" beside what was written.
        """
        if key is not None:
            return [*self._cells.get(key, ())]
        return [record for records in self._cells.values() for record in records]

    def _place(self) -> str:
        number = len(self._cells) + 1
        count = len(self._expected)
        return f"[{number}/{max(count, number)}] " if count else f"[{number}] "

    def _left(self) -> str:
        expected_s = sum(self._expected.values())
        left_s = sum(each for key, each in self._expected.items() if key not in self._cells)
        if not left_s:
            return ""
        # What lies between cells (starts of engines, above all) counts, too. The estimate keeps some weight,
        # so that one quick or slow cell at the start does not decide.
        gone_s = (now_ns() - self._expected_ns) / NS_PER_S
        weight_s = min(_WEIGHT_OF_ESTIMATE * expected_s, _MOST_WEIGHT_S)
        times = (gone_s + weight_s) / (self._expected_of_made_s + weight_s)
        return f"; about {_duration(times * left_s)} left"

    # ----------------------------------------------------------------------------- what it prints

    def say(self, line: str) -> None:
        """Print a line of progress, and keep it in run.log."""
        with self._lock:
            self._say(line)
            self._log(line)

    def _log(self, line: str) -> None:
        if not self.measures:
            return
        time = datetime.fromtimestamp(now_ns() / NS_PER_S).astimezone().strftime("%H:%M:%S")
        try:
            with (self.directory / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time} {utf8(line)}\n")
        except OSError:  # a full disk: records fail with the reason
            return

    def table(self, name: str, rows: Iterable[Mapping[str, Any]], *, note: str = "") -> Path:
        """Print a table, write it as tables/NAME.txt and NAME.tsv, and put it into the report.

        The columns are the fields of the rows, in the order in which they first appear. `note` stands below,
        and says what was emulated. Without rows nothing is made but the files' headings.
        """
        _check_name(name)
        table = Table(name, tuple(rows), note)
        self.tables = [each for each in self.tables if each.name != name] + [table]
        text = table_text(table.rows)
        end = f"\n{note}" if note else ""
        place = self.directory / _TABLES
        write_file(place / f"{name}.tsv", tsv_text(table.rows).encode())
        write_file(place / f"{name}.txt", f"{name}\n\n{text}{end}\n\n{REPLACED}\n".encode())
        self._show(f"{name}\n{text}{end}\n")
        return place / f"{name}.txt"

    def figure(self, name: str) -> Path:
        """The path of the figure `name`, without a suffix: a drawing writes NAME.png and NAME.pdf there.

        The report shows NAME.png.
        """
        _check_name(name)
        make_folder(self.directory / _FIGURES)
        path = self.directory / _FIGURES / name
        if path not in self.figures:
            self.figures.append(path)
        return path

    # ------------------------------------------------------------------------- what it may use

    def raw(self, name: str) -> Path:
        """The path of a file of raw records, in a folder that is there. An existing one is the caller's to
        replace."""
        _check_name(name)
        make_folder(self.directory / _RAW)
        return self.directory / _RAW / name

    def new_namespace(self, store: str = "embedded") -> str:
        """A name for state that nothing has used. The namespace must be gone from `store` when the run ends."""
        if self._leaks is not None:
            self._leaks.watch_store(store)
        self._namespaces += 1
        return f"{self.namespace}-{self._namespaces}"

    def bill_gpus(self) -> None:
        """Have all bills from now on have the memory of the GPUs that CUDA shows, if there are any.

        To be called before the experiment uses one.
        """
        if not self.measures:
            return
        self._gpus = uuids_here()
        with closing(GpuMemory(self._gpus)) as cards:
            self._gpu_idle_bytes = cards.used(()).by_card
        if not self._gpus:
            self.say("memory of GPUs is not billed: neither CUDA nor NVML shows one here")

    def bill(self, **options: Any) -> Billing:
        """Samples of what the run's processes use, for `with`; see billing.Billing. Files go to billing/."""
        if self._gpus:
            options = {"gpus": self._gpus, "gpu_idle_bytes": self._gpu_idle_bytes, **options}
        key = self._open.key if self._open is not None else "run"
        folder = self.directory / _BILLING
        make_folder(folder)
        stem = re.sub(r"[^A-Za-z0-9._+=-]+", "_", key)[:80].strip("._") or "cell"
        number = 1
        while (folder / f"{stem}.{number}.tsv").exists():
            number += 1
        return Billing(files=folder / f"{stem}.{number}", **options)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{name[:100]!r} does not name a file: letters, digits, '.', '_', '+' and '-', at most 80"
        )
