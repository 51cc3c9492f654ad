"""Exact time on a GPU, measured in one command, in less than nine minutes.

    python3 benchmarks/gpu/exact_time.py --device cuda:0 --out DIR        # everything
    python3 benchmarks/gpu/exact_time.py --device cuda:0 --out DIR --rows profile,lateness
    python3 benchmarks/gpu/exact_time.py --device emulated --scale 0.1 --out DIR     # a dry run, without a GPU
    python3 benchmarks/gpu/exact_time.py --table                          # exact_time.md from the results

Each row is written to the work folder as soon as it is measured, and to DIR/exact_time.json; a row that is
there already (or in --resume FILE) is not measured again. One that fails says why, and the others go on; one
that no longer fits the budget is skipped and said. All processes are ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import exact_answers
import exact_bare
import exact_cold
import exact_live
import exact_peers
import exact_sweep
import exact_table
import row_bench
from exact_rig import Row, Settings
from row_bench import Plan

from slosched.output_files import write_file


def _sweep_at(rate: int) -> Row:
    return lambda rig: exact_sweep.live(rig, rate)


#: In the order of importance, which is also the one that starts the fewest workers.
ROWS: dict[str, Plan] = {
    "graphs": Plan(exact_peers.graphs, 20, 100),
    "profile": Plan(exact_bare.profile, 25, 150),
    "lateness": Plan(exact_bare.lateness, 15, 60),
    "prediction": Plan(exact_live.prediction, 18, 60),
    "client_overhead": Plan(exact_live.client_overhead, 17, 60),
    "goodput": Plan(exact_live.goodput, 24, 75),
    "answers": Plan(exact_answers.answers, 60, 140),
    "slo_exp_600": Plan(_sweep_at(600), 57, 90),
    "slo_exp_1200": Plan(_sweep_at(1200), 57, 90),
    "slo_exp_2400": Plan(_sweep_at(2400), 57, 90),
    "cold": Plan(exact_cold.cold, 48, 140),
    "slo_exp_1": Plan(exact_sweep.judge, 5, 90),
    "peer_slosched": Plan(exact_peers.of_slosched, 62, 110),
    "peer_asyncio": Plan(exact_peers.of_asyncio, 32, 90),
    "peer_mosec": Plan(exact_peers.of_mosec, 36, 100),
}


class Bench(row_bench.Bench):
    """The rows of this program."""

    NAME = "exact_time"

    @property
    def plans(self) -> Mapping[str, Plan]:
        return ROWS

    def page(self, document: Mapping[str, Any]) -> str:
        return exact_table.page(document)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or emulated (default cuda:0)")
    row_bench.add_options(parser, Bench.NAME, ROWS)
    options = parser.parse_args(arguments)
    row_bench.check_options(parser, options, ROWS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.table:
        document = exact_table.read_results(exact_table.RESULTS)
        write_file(exact_table.PAGE, exact_table.page(document).encode())
        return 0
    settings = Settings(
        device=options.device,
        profile=options.profile,
        scale=options.scale,
        worker_options=tuple(options.worker_options.split()),
        config=options.config,
        model=options.model,
    )
    row_bench.place_files(options)
    return row_bench.run_and_print(Bench(options, settings))


if __name__ == "__main__":
    sys.exit(main())
