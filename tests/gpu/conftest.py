"""Tests on a real GPU: skipped where there is none. All of them: `pytest tests/gpu`, under five minutes."""

from __future__ import annotations

from pathlib import Path

import pytest


def _gpu_here() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if ours and not _gpu_here():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))
