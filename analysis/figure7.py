"""Figure 7: how low can the SLO go? Six GPUs, the published six runs, drawn in both forms.

    .venv/bin/python analysis/figure7.py [--scale published] [--live] [--tables]

N = 12 and 48 copies of ResNet-50, R = 600, 1,200 and 2,400 requests/s, SLO 1 to 100 times b1 by 1.5.
Published steps last 30 s (live: 36 minutes in all), quick ones 4 s (live: 5 minutes). Inputs are off.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[7])
