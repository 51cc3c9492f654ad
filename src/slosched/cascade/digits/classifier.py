"""A classifier of digits, trained here in seconds, as an exported program that a worker serves.

It takes `image` (1, 8, 8), ink within 0..1, and answers with the shares of the ten digits, which add up to 1.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slosched.cascade.digits.data import Images, Part, load_digits
from slosched.cascade.digits.networks import SIDE
from slosched.cascade.digits.served import one_thread
from slosched.cascade.digits.training import Recipe, train_classifier
from slosched.clock import now_ns
from slosched.output_files import write_file
from slosched.units import NS_PER_S

Shares = npt.NDArray[np.float32]
#: Steps of training: two seconds on one core, for 98 % of held-out images.
_STEPS = 300
#: The largest batch that the program takes.
_MOST_ROWS = 1024


class Classifier(nn.Module):
    """From ink (batch, 1, 8, 8) to shares (batch, 10)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        shares: torch.Tensor = self.network(image).softmax(1)
        return shares


@dataclass(frozen=True)
class Learnt:
    """The number of images that a classifier learnt from, and how long that took."""

    images: int
    took_s: float


def write_program(path: Path, recipe: Recipe | None = None) -> Learnt:
    """Train a classifier, and write it to `path` as torch.export's program for batches of any size up to 1,024.

    Raises MissingPackage, and what `write_file` raises.
    """
    began_ns = now_ns()
    model = Classifier(train_classifier(recipe or Recipe(classifier_steps=_STEPS))).eval()
    took_s = (now_ns() - began_ns) / NS_PER_S
    example = torch.zeros(2, 1, SIDE, SIDE)
    rows = torch.export.Dim("batch", min=1, max=_MOST_ROWS)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: rows},)), file)
    write_file(path, file.getvalue())
    digits = load_digits()
    return Learnt(len(digits.learn) + len(digits.judge), took_s)


def held_out() -> Part:
    """Images that no classifier learns from, with their labels. Raises MissingPackage."""
    return load_digits().measure


def direct(path: Path, ink: Images) -> Shares:
    """What the program in the file `path` answers to ink (n, 1, 8, 8), by a forward pass here: (n, 10)."""
    with one_thread(), torch.inference_mode():
        model = torch.export.load(path).module()
        starts = range(0, len(ink), _MOST_ROWS)
        parts = [model(torch.from_numpy(ink[at : at + _MOST_ROWS])).numpy() for at in starts]
    return np.concatenate(parts)
