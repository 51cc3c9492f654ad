"""Figure 9: a cluster under a trace of function invocations on thousands of models.

    .venv/bin/python analysis/figure9.py [--scale published] [--live] [--tables]

Published: 6 GPUs, 4,026 models, `azure 8` (about 9,600 requests/s), 8 hours. Quick: 3 GPUs, 793 models,
3,600 requests/s, one second for each minute of the trace, 60 s. The trace is synthetic unless
AZURE_TRACE_DIR names the data set; models are those of the profile zoo61.
"""

from __future__ import annotations

from recipes import main

from slosched.experiment.figures import FIGURES

if __name__ == "__main__":
    main(FIGURES[9])
