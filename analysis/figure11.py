"""Figure 11: how much load one controller carries, by the number of emulated GPUs. Live only.

    .venv/bin/python analysis/figure11.py [--scale published] [--tables]

What a controller can carry is a question about CPU time, which virtual time does not have. So
worker, controller and client run as processes on this machine, and **share its cores**: on two cores the
three saturate them together, at a few thousand requests/s. That is a lower bound of what a controller
with cores of its own carries (the published one had 18, on a machine of its own), and it means something only
if nothing else runs: the table says the load average before.

Quick: N of 1 to 8, the load grows to at most 9,600 requests/s, steps and windows of 2 s, one trial.
Published: N of 10 to 150, `azure_scalability_exp N 0.1 4 1.5 60 4`, three trials of ten minutes.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[11])
