"""Figure 8: six GPUs, deadlines in the foreground, closed loops in the background.

    .venv/bin/python analysis/figure8.py [--scale published] [--live] [--tables]

Foreground: 6 copies of ResNet-50, 200 requests/s in total, SLO 1 to 100 times b1 by 1.5. Background
(copies, requests outstanding to each): none, (12, 16), (48, 4), without an SLO to speak of (one day).
Published steps last 30 s, quick ones 6 s.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[8])
