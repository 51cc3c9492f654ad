"""How exec times of a real run were spread, for a simulation to draw from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slosched.codes import ActionType
from slosched.errors import InvalidConfig
from slosched.telemetry import action_log

_QUANTILES = 201
#: Fewer inferences of one model and batch size say nothing about their usual time.
_FEWEST = 20


def exec_quantiles(run_dir: Path) -> tuple[float, ...]:
    """Quantiles of exec time / usual exec time (the median of its GPU, model and batch size).

    `run_dir` has an action log, or is one. All GPUs, models and sizes are pooled. The result fits
    EmulationNoise.exec_quantiles. Raises MalformedLog, InvalidConfig for a log with too few inferences.
    """
    path = run_dir / action_log.FILE_NAME if run_dir.is_dir() else run_dir
    log = action_log.read_action_log(path)
    ran = (log["action_type"] == int(ActionType.INFER)) & (log["status"] == 0)
    ran &= log["worker_exec_duration"] > 0
    keys = np.stack([log[name][ran] for name in ("worker_id", "gpu_id", "model_id", "batch_size")])
    durations = log["worker_exec_duration"][ran].astype(np.float64)
    order = np.lexsort(keys)
    borders = np.flatnonzero(np.any(np.diff(keys[:, order], axis=1), axis=0)) + 1
    groups = np.split(durations[order], borders)
    factors = [times / np.median(times) for times in groups if len(times) >= _FEWEST]
    if not factors:
        raise InvalidConfig(
            f"{path} has no {_FEWEST} inferences of one model and batch size that ended well; take a "
            "longer run"
        )
    shares = np.linspace(0.0, 1.0, _QUANTILES)
    found = np.quantile(np.concatenate(factors), shares)
    return tuple(round(float(value), 6) for value in found)
