"""The models of triton_models.py for slosched's worker on the CPU, and the worker's file that offers them.

A worker imports this module from the folder of its file.
"""

from __future__ import annotations

import time

import torch
from torch import nn

#: As in triton_models.py, which cannot be imported here.
SLOW_S = 0.05

WORKER = """
[models.pair]
factory = "torch_models:Pair"
[models.pair.inputs.left]
shape = [4]
dtype = "float32"
[models.pair.inputs.right]
shape = [4]
dtype = "int32"

[models.spare]
factory = "torch_models:Pair"
[models.spare.inputs.left]
shape = [4]
dtype = "float32"
[models.spare.inputs.right]
shape = [4]
dtype = "int32"

[models.shout]
factory = "torch_models:Shout"
[models.shout.inputs.texts]
shape = [2]
dtype = "BYTES"
max_bytes = 256
[models.shout.outputs.loud]
shape = [2]
dtype = "BYTES"
max_bytes = 256

[models.slow]
factory = "torch_models:Slow"
[models.slow.inputs.input]
shape = [1]
dtype = "float32"
"""


class Pair(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": left + right, "difference": left - right}


class Shout(nn.Module):
    def forward(self, texts: list[list[bytes]]) -> dict[str, object]:
        return {"loud": [[text.decode(errors="replace").upper() for text in row] for row in texts]}


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW_S)
        return x + 0
