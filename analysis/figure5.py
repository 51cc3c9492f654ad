"""Figure 5: one GPU, 15 copies of ResNet-50, 16 requests outstanding to each; six SLOs.

    .venv/bin/python analysis/figure5.py [--scale published] [--live] [--tables]

The paper compares Clockwork with Clipper and INFaaS. Here INFER5 stands beside the published code's
behaviour (INFER5:paper) and two reactive schedulers: AIMD batching as Clipper's, and FIFO. Inputs
travel, as published. A live run (--scale published) takes 30 minutes for each of the 24.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[5])
