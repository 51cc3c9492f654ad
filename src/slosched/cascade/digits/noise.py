"""Noise from a seed, computed on the device: each row from its own seed alone, the same in every batch."""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFF_FFFF


def normal(seed: torch.Tensor, count: int) -> torch.Tensor:
    """Standard normal numbers (batch, count), float32, of seeds (batch,), int64; equal seeds give equal rows.

    Box and Muller's transformation of the bits of an integer hash. A generator of torch would give a row that
    depends on its place in the batch, and could not be captured in a CUDA graph.
    """
    pairs = (count + 1) // 2
    place = torch.arange(2 * pairs, device=seed.device, dtype=torch.int64)
    key = _hashed(seed & _MASK) ^ _hashed(((seed >> 32) & _MASK) ^ 0x5BD1_E995)
    bits = _hashed((_hashed(key)[:, None] + place * 0x9E37_79B1) & _MASK)
    uniform = ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-24  # within (0, 1)
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, :pairs]))
    angle = (2 * math.pi) * uniform[:, pairs:]
    both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
    return both[:, :count]


def _hashed(x: torch.Tensor) -> torch.Tensor:
    """A mix of 32 bits, held in int64 (the constants are those of Wellons' lowbias32)."""
    x = _times(x ^ (x >> 16), 0x7FEB_352D)
    x = _times(x ^ (x >> 15), 0x846C_A68B)
    return x ^ (x >> 16)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2^32, in two parts: neither goes beyond 63 bits."""
    low = x * (factor & 0xFFFF)
    high = ((x * (factor >> 16)) & 0xFFFF) << 16
    return (low + high) & _MASK
