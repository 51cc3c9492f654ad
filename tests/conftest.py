"""What every test run begins with; and tests/gpu is skipped where there is no GPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell that runs `make check &` in a script lets its children ignore Ctrl-C, and their children inherit that:
# the tests which send SIGINT would wait for an end that cannot come. A handler, however, is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _gpu_here() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # All of them: `pytest tests/gpu`, under five minutes.
    folder = Path(__file__).parent / "gpu"
    on_gpu = [item for item in items if folder in item.path.parents]
    if on_gpu and not _gpu_here():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))
