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

[models.types]
factory = "torch_models:Types"
[models.types.inputs.truth]
shape = [2]
dtype = "bool"
[models.types.inputs.uint8]
shape = [2]
dtype = "uint8"
[models.types.inputs.int8]
shape = [2]
dtype = "int8"
[models.types.inputs.int16]
shape = [2]
dtype = "int16"
[models.types.inputs.int64]
shape = [2]
dtype = "int64"
[models.types.inputs.float16]
shape = [2]
dtype = "float16"
[models.types.inputs.float64]
shape = [2]
dtype = "float64"

[models.seen]
factory = "torch_models:Seen"
lengths = [4, 16]
[models.seen.inputs.ids]
shape = [-1]
dtype = "int64"
[models.seen.inputs.mask]
shape = [-1]
dtype = "int64"

[models.grid]
factory = "torch_models:Grid"
[models.grid.inputs.input]
shape = [2, 2]
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


class Types(nn.Module):
    def forward(
        self,
        truth: torch.Tensor,
        uint8: torch.Tensor,
        int8: torch.Tensor,
        int16: torch.Tensor,
        int64: torch.Tensor,
        float16: torch.Tensor,
        float64: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        return {
            "same_truth": truth.clone(),
            "same_uint8": uint8.clone(),
            "same_int8": int8.clone(),
            "same_int16": int16.clone(),
            "same_int64": int64.clone(),
            "same_float16": float16.clone(),
            "same_float64": float64.clone(),
        }


class Seen(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"seen": (ids * mask).cumsum(1), "shown": mask.sum(1, keepdim=True)}


class Grid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()
