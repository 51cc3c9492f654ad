"""Figure 7 on several GPUs of one host, beside the simulator, in one command, in less than nine minutes.

    python3 benchmarks/gpu/several_gpus.py --out DIR                      # all GPUs: 1, 2, 4, or 6 of 8
    python3 benchmarks/gpu/several_gpus.py --gpus 1 --out DIR             # the first one
    python3 benchmarks/gpu/several_gpus.py --out DIR --rows profile,kill
    python3 benchmarks/gpu/several_gpus.py --emulated 2 --scale 0.1 --out DIR      # a dry run, without a GPU
    python3 benchmarks/gpu/several_gpus.py --simulate DIR/several_gpus.json        # afterwards, without a GPU
    python3 benchmarks/gpu/several_gpus.py --table                        # several_gpus.md from the results

Each row is written as soon as it is measured; a row that is there already (in DIR, or in --resume FILE) is not
measured again. One that fails says why, and the others go on; one that no longer fits the budget is skipped
and said. All processes are ended. several_gpus.md says what the rows are.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import exact_answers
import exact_bare
import exact_table
import row_bench
import several_bare
import several_cold
import several_kill
import several_sweeps
import several_table
from exact_rig import Rig, Row, Settings, read_profile
from row_bench import Plan
from several_bare import with_loads
from several_rig import SeveralRig
from several_sweeps import Run

from slosched.config_file import write_profile
from slosched.daemon.backends.devices import count_gpus
from slosched.output_files import write_file

#: How many GPUs of a host are used: the most of these that it has.
NUMBERS = (6, 4, 2, 1)
_LIMIT_S = 45.0  # beyond what a sweep needs: the workers may have to be started anew
#: What other rows leave to the last simulations.
_KEPT_S = 30.0
_SMI_S = 15.0


def _row_of(run: Run) -> Row:
    return lambda rig: several_sweeps.live(rig, run)


def _plan_of(run: Run) -> Plan:
    return Plan(_row_of(run), run.needs_s, run.needs_s + _LIMIT_S)


def ordered_rows() -> dict[str, Plan]:
    """Every row, the most telling first. Simulations run in the background; the last row waits for them."""
    rows = {
        "profile": Plan(exact_bare.profile, 40, 150),
        "lateness": Plan(several_bare.lateness, 25, 90),
        "loads": Plan(several_bare.loads, 22, 60),
        **{run.name: _plan_of(run) for run in several_sweeps.FIRST},
        "kill": Plan(several_kill.kill, 42, 100),
    }
    first, rest = several_sweeps.SECOND[:3], several_sweeps.SECOND[3:]
    rows |= {run.name: _plan_of(run) for run in first}
    rows["cold"] = Plan(several_cold.cold, 35, 90)
    rows |= {run.name: _plan_of(run) for run in rest}
    rows["answers"] = Plan(exact_answers.answers, 60, 140)
    rows["simulated"] = Plan(several_sweeps.judge, 1, 3600, kept_s=_KEPT_S)
    return rows


ROWS = ordered_rows()


class Bench(row_bench.Bench):
    """The rows of this program, and the profile that they measured as a file."""

    NAME = "several_gpus"

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        super().__init__(options, settings)
        self.judged: dict[str, Any] | None = None  # by an earlier command
        self.topology = "" if settings.emulated else topology()

    @property
    def plans(self) -> Mapping[str, Plan]:
        return ROWS

    def page(self, document: Mapping[str, Any]) -> str:
        return several_table.page(document)

    def take_up(self) -> None:
        """Runs that were added since are to be judged: only the simulations of the others are kept."""
        super().take_up()
        self.judged = self.rows.pop("simulated", None)

    def document(self) -> dict[str, Any]:
        """All that is known so far; what was judged before stands until it is judged again."""
        document = super().document() | {"topology": self.topology}
        if self.judged is not None:
            document["rows"].setdefault("simulated", self.judged)
        return document

    def open_rig(self) -> Rig:
        judged = {} if self.judged is None else self.judged["figures"]["runs"]
        return SeveralRig(self.settings, self.work / "logs", self.rows, judged)

    def write(self) -> None:
        super().write()
        if "profile" in self.rows:
            measured = read_profile(self.rows["profile"]["figures"]["profile"])
            profile = with_loads(measured, self.rows, self.settings.model)
            file = self.options.out / f"{self.NAME}.profile.toml"
            write_profile(file, profile, replacing=True)


def simulate_results(path: Path) -> None:
    """Judge the runs in `path`, a several_gpus.json, simulating what is not simulated yet; no GPU is needed.

    The file and the page beside it are brought up to date. Raises BadResults for another kind of file.
    """
    document = exact_table.read_results(path)
    rows, given = document["rows"], document["settings"]
    settings = Settings(
        device=given["device"],
        profile=given["profile"],
        scale=given["scale"],
        worker_options=tuple(given["worker_options"]),
        config=None,
        model=given["model"],
        gpus=given["gpus"],
    )
    judged = rows.pop("simulated", {"figures": {"runs": {}}})
    with (
        tempfile.TemporaryDirectory(prefix="slosched-simulated-") as directory,
        SeveralRig(settings, Path(directory), rows, judged["figures"]["runs"]) as rig,
    ):
        found = several_sweeps.judge(rig)
    rows["simulated"] = {**judged, **found}
    document["skipped"].pop("simulated", None)
    document["failed"].pop("simulated", None)
    write_file(path, (json.dumps(document, indent=1) + "\n").encode())
    write_file(path.with_suffix(".md"), several_table.page(document).encode())


def topology() -> str:
    """How the GPUs are linked, as nvidia-smi draws it; "" without it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_SMI_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).strip()


def number_of_gpus(there: int) -> int:
    """How many GPUs of a host with `there` are used; 0 of none."""
    return next((number for number in NUMBERS if number <= there), 0)


def settings_of(options: argparse.Namespace, gpus_there: int) -> Settings:
    """What is measured on. Raises ValueError for more GPUs than there are."""
    emulated = options.emulated is not None
    gpus = options.emulated if emulated else options.gpus or number_of_gpus(gpus_there)
    if gpus < 1:
        raise ValueError("this host has no GPU; --emulated N emulates some")
    if not emulated and gpus > gpus_there:
        raise ValueError(f"--gpus {gpus}, but this host has {gpus_there}")
    return Settings(
        device="emulated" if emulated else "cuda",
        profile=options.profile,
        scale=options.scale,
        worker_options=tuple(options.worker_options.split()),
        config=options.config,
        model=options.model,
        gpus=gpus,
        own_cpus=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="how many GPUs, from cuda:0 (default: 6, 4, 2 or 1)"
    )
    parser.add_argument("--emulated", type=int, metavar="N", help="N emulated GPUs instead")
    parser.add_argument(
        "--simulate",
        type=Path,
        metavar="FILE",
        help="only simulate what a several_gpus.json lacks, and judge; needs no GPU",
    )
    row_bench.add_options(parser, Bench.NAME, ROWS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.simulate is not None:
        simulate_results(options.simulate.resolve())
        return 0
    row_bench.check_options(parser, options, ROWS)
    if options.table:
        results = several_table.RESULTS
        document = exact_table.read_results(results) if results.exists() else None
        write_file(several_table.PAGE, several_table.page(document).encode())
        return 0
    try:
        settings = settings_of(options, 0 if options.emulated is not None else count_gpus())
    except ValueError as error:
        parser.error(str(error))
    row_bench.place_files(options)
    return row_bench.run_and_print(Bench(options, settings))


if __name__ == "__main__":
    sys.exit(main())
