"""CREPE in its smallest size: which pitch 64 ms of sound have.

It takes 1,024 samples at 16 kHz, float32, and answers with 360 numbers within 0..1: how likely each pitch is,
in steps of 20 cents from 31.7 Hz up. The architecture is that of Kim, Salamon, Li and Bello, "CREPE: A
convolutional representation for pitch estimation" (ICASSP 2018), section 2, with as many filters as its
authors' size "tiny" has.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

SAMPLES = 1024
PITCHES = 360
_FILTERS = (1, 128, 16, 16, 16, 32, 64)
#: Each convolution's width and stride, and the zeros before and behind that keep the length, strides aside.
_SHAPES = ((512, 4, (254, 254)), *((64, 1, (31, 32)),) * 5)
_LEAST_SPREAD = 1e-10


class Layer(nn.Module):
    """A convolution, what of it is above 0, normalised, and the larger one of each two neighbours."""

    def __init__(
        self, before: int, after: int, width: int, stride: int, zeros: tuple[int, int]
    ) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d(zeros, 0.0)
        self.convolve = nn.Conv1d(before, after, width, stride)
        self.normalise = nn.BatchNorm1d(after, eps=1e-3)
        self.shrink = nn.MaxPool1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shrunk: torch.Tensor = self.shrink(self.normalise(self.convolve(self.pad(x)).relu()))
        return shrunk


class Pitch(nn.Module):
    """From sound (batch, 1024) to pitches (batch, 360). However loud it is, the answer is the same."""

    def __init__(self) -> None:
        super().__init__()
        sizes = zip(_FILTERS[:-1], _FILTERS[1:], _SHAPES, strict=True)
        self.layers = nn.Sequential(*(Layer(before, after, *rest) for before, after, rest in sizes))
        self.classify = nn.Linear(4 * _FILTERS[-1], PITCHES)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        centred = sound - sound.mean(1, keepdim=True)
        spread = centred.std(1, keepdim=True).clamp_min(_LEAST_SPREAD)
        seen = self.layers((centred / spread)[:, None])
        pitches: torch.Tensor = self.classify(seen.transpose(1, 2).flatten(1)).sigmoid()
        return pitches


def make() -> nn.Module:
    """The model with the weights that lie beside this file."""
    return with_weights(Path(__file__).with_name("weights.safetensors"))


def with_weights(path: Path) -> nn.Module:
    """The model with the weights of a file, in eval mode."""
    model = Pitch()
    model.load_state_dict(load_file(path))
    return model.eval()
