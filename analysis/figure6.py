"""Figure 6: one GPU and more models than its memory holds; one more becomes active each second.

    .venv/bin/python analysis/figure6.py [--scale published] [--live] [--tables]

A V100's 1,376 pages hold 196 copies of ResNet-50. Published: 3,600 major models after 300 s of the
minor one alone, 65 minutes. Quick: 300 major models after 5 s.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[6])
