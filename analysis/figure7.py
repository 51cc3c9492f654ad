"""Figure 7, live: the published six runs on six emulated V100s, drawn in both forms.

    .venv/bin/python analysis/figure7.py [--period 4] [--out slosched-runs/figure7]

N = 12 and 48 copies of ResNet-50, R = 600, 1,200 and 2,400 requests/s, SLO 1 to 100 times b1 by 1.5.
Published steps last 30 s (36 minutes in all); the default of 4 s takes 5 minutes. All processes share
this machine, inputs are off. Leaves runs, figures and `figure7.json` (every step, both views).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from slosched.analysis.fig7 import plot_fig7
from slosched.analysis.runs import open_run
from slosched.analysis.tables import as_json, summarise_run
from slosched.cli.children import Children
from slosched.telemetry.manifest import describe_host, finish_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.version import __version__

COPIES, RATES, STEPS = (12, 48), (600, 1200, 2400), 12
LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")


def run_one(directory: Path, copies: int, rate: int, period_s: float) -> Path:
    """One controller, its worker and one sweep; returns the run directory. Raises ChildFailed."""
    directory.mkdir(parents=True)
    with Children() as children:
        worker = children.start(
            "worker",
            ["worker", "--device", "emulated", "--gpus", "6", *LOOPBACK],
            directory / "worker.log",
        )
        address = f"127.0.0.1:{children.wait_ready(worker, within_s=30)}"
        run = directory / "run"
        controller = children.start(
            "controller",
            [
                "controller",
                "INFER5",
                address,
                "0",
                "6",
                "5000000",
                *LOOPBACK,
                "--log-dir",
                str(run),
            ],
            directory / "controller.log",
        )
        served = f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"
        sweep = f"slo-exp-1 resnet50_v2 {copies} poisson {rate} 1 100 1.5 mul {period_s}"
        client = children.start(
            "client",
            ["client", served, *sweep.split(), "--no-inputs", "--out", str(run)],
            directory / "client.log",
        )
        code = children.wait(client, STEPS * period_s + 120)
        print(f"N={copies}, R={rate}: {client.last_line()}")
        if code != 0:
            sys.exit(f"the client of N={copies}, R={rate} ended with {code}; see {client.log}")
        children.forget(client)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--period", type=float, default=4.0, help="seconds a step (published: 30)")
    parser.add_argument("--out", type=Path, default=Path("slosched-runs/figure7"))
    options = parser.parse_args()
    out = claim_run_dir(options.out)
    settings = {"copies": COPIES, "rates": RATES, "steps": STEPS, "period_s": options.period}
    write_manifest(out, "figure7", settings)
    runs = [
        run_one(out / f"n{copies}-r{rate}", copies, rate, options.period)
        for copies in COPIES
        for rate in RATES
    ]
    for published in (False, True):
        for path in plot_fig7(runs, out, published=published):
            print(f"wrote {path}")
    steps = {run.parent.name: as_json(summarise_run(open_run(run))) for run in runs}
    document = {
        "version": __version__,
        "host": describe_host(),
        "period_s": options.period,
        "runs": steps,
    }
    (out / "figure7.json").write_text(json.dumps(document, indent=1) + "\n")
    finish_manifest(out, {"runs": len(runs)})
    print(f"wrote {out / 'figure7.json'}")


if __name__ == "__main__":
    main()
