"""Functions of tests/gpu/test_functions_on_gpu.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import slosched
from slosched.clock import now_ns, sleep_ns


def _warm() -> Any:
    import torch

    return torch.zeros(1, device="cuda")


@slosched.function(init=_warm, gpu=True)
def sums(ctx: Any, size: int) -> tuple[int, float]:
    import torch

    return os.getpid(), float(torch.arange(size, device=ctx.init.device, dtype=torch.float64).sum())


@slosched.function(init=_warm, gpu=True, reset="restore")
def adds_in_place(ctx: Any) -> float:
    ctx.init += 1
    return float(ctx.init.item())


@slosched.function(init=_warm, gpu=True)
async def awaits(ctx: Any) -> Any:
    return await ctx.chain("anything")


@slosched.function(init=_warm, gpu=True)
def breaks_context(ctx: Any) -> float:
    import torch

    index = torch.tensor([10**6], device="cuda")
    return float(ctx.init[index].cpu())  # an assertion on the device: the context is lost


def _built(ctx: Any, size: int) -> Any:
    import torch

    return torch.arange(size, dtype=torch.float64), now_ns()


@slosched.function(init=_warm, gpu=True, prepare=_built)
def sums_built(ctx: Any, size: int) -> tuple[int, float, int]:
    numbers, built_ns = ctx.prepared
    return os.getpid(), float(numbers.to("cuda").sum()), built_ns


@slosched.function(init=_warm, gpu=True)
def has_lane(ctx: Any, path: str) -> int:
    """Works on the GPU until the file exists."""
    while not Path(path).exists():
        ctx.init.add_(1).item()
        sleep_ns(1_000_000)
    return now_ns()
