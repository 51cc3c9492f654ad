"""Random weights for large networks, fast: drawing 2.6 billion normal numbers takes torch minutes.

One block of numbers is drawn from a seed and copied over and over. Its length is prime, so that no two rows of
a matrix begin at the same place of it.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

#: A prime just below 2**20.
_BLOCK = 1_048_573
_NORMS = (nn.GroupNorm, nn.LayerNorm)


def filled(
    module: nn.Module, name: str, dtype: torch.dtype = torch.float32, *, gain: float = 1.0
) -> nn.Module:
    """`module`, which was made on the device "meta", on the CPU, in eval mode and in `dtype`. Its weights are
    drawn from a seed made of `name`.

    Weights of convolutions, linear layers and embeddings are normal, with the variance gain / (inputs of one
    output), which keeps the scale of what passes; biases are 0, and norms change nothing. A buffer
    `position_ids` counts. Raises TypeError for a network with other tensors, which would be left undefined.
    """
    # Not `module.to`, by which diffusers warns of modules that a checkpoint would keep in float32.
    module = nn.Module.to(module, dtype).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    block = torch.randn(_BLOCK, generator=generator)
    at = 0
    with torch.no_grad():
        for path, owner in module.named_modules():
            if isinstance(owner, nn.BatchNorm2d):
                owner.reset_parameters()  # and the statistics
                continue
            for key, parameter in owner.named_parameters(recurse=False):
                if key == "bias":
                    parameter.zero_()
                elif isinstance(owner, _NORMS):
                    parameter.fill_(1.0)
                elif key == "weight" and parameter.ndim > 1:
                    at = _tile(parameter, block, at, (gain / parameter[0].numel()) ** 0.5)
                else:
                    raise TypeError(f"{name}: no rule for the parameter {path}.{key}")
            for key, buffer in owner.named_buffers(recurse=False):
                if key != "position_ids":
                    raise TypeError(f"{name}: no rule for the buffer {path}.{key}")
                buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def _tile(parameter: torch.Tensor, block: torch.Tensor, at: int, scale: float) -> int:
    """Fill `parameter` with `scale` times the numbers of `block` from `at` on, over and over. Returns where in
    the block the next parameter begins.
    """
    flat = parameter.view(-1)
    done = 0
    while done < len(flat):
        piece = min(len(flat) - done, _BLOCK - at)
        torch.mul(block[at : at + piece], scale, out=flat[done : done + piece])
        done, at = done + piece, (at + piece) % _BLOCK
    return at
