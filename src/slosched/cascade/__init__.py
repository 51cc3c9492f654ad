"""Experiments with model cascades as one command: one run, many runs compared, and what they came to.

`run.py` makes one run in virtual time or in real time, `compare.py` a table of policies and seeds,
`presets.py` names their settings. `outcome.py` reads a run directory, and `summary.py`, `artifact_logs.py`,
`bound.py` and `drawing.py` work from that alone. `published_transforms.py` has what the artifact's own
plotter does to its logs.
"""
