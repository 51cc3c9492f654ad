"""Figure 10: how far predictions were off in the run of Figure 9, whose runs it takes.

    .venv/bin/python analysis/figure10.py [--scale published] [--live] [--tables]

In a simulation the errors are those that were put in: execs vary by 0.3 % (NOISE in experiment/simulated.py),
and what is shown is how much of it the estimators and the plan let through. --live shows what a machine adds.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[10])
