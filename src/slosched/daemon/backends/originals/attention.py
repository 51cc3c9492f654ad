"""Attention whose keys and values of earlier tokens lie in caches of fixed size, so that it can be captured.

Caches are (batch, heads, places, width of a head), a view of the state of a run in steps (stepped.py), and are
written in place. Every row of a batch is at the same token. Modules have the names of transformers' ones, so
that their weights can be loaded.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def split(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, tokens, width) as (batch, heads, tokens, width of a head)."""
    return states.reshape(*states.shape[:-1], heads, -1).transpose(1, 2)


def merged(states: torch.Tensor) -> torch.Tensor:
    """The opposite of `split`."""
    return states.transpose(1, 2).flatten(2)


def cached(
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    caches: torch.Tensor,
    at: torch.Tensor,
) -> torch.Tensor:
    """What one token attends to: its own key and value, which are put into `caches` at `at`, and those before.

    `query` and `new` are (batch, heads, 1, width of a head); `caches` are (2, batch, heads, places, width of a
    head), keys and values; `at` is int64 (1,).
    """
    keys, values = caches
    keys.index_copy_(2, at, new[0])
    values.index_copy_(2, at, new[1])
    seen = torch.arange(keys.shape[2], device=at.device) <= at
    return functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen[None, None, None]
    )


def causal(
    query: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor], caches: torch.Tensor
) -> torch.Tensor:
    """The same for the first tokens of a run, which see those before them: (batch, heads, tokens, ...)."""
    keys, values = caches
    tokens = query.shape[2]
    keys[:, :, :tokens] = new[0]
    values[:, :, :tokens] = new[1]
    return functional.scaled_dot_product_attention(query, new[0], new[1], is_causal=True)


def rotated(states: torch.Tensor, sine: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
    """`states` (batch, heads, tokens, width of a head), turned in their first values (GPT-J): each pair by the
    angle of its position. `sine` and `cosine` are (tokens, half of the values that turn).
    """
    turning = 2 * sine.shape[-1]
    # Not repeat_interleave, which has asked the host for the number of repeats.
    sine, cosine = (
        each.to(states.dtype)[..., None].expand(*each.shape, 2).flatten(-2)
        for each in (sine, cosine)
    )
    first, rest = states[..., :turning], states[..., turning:]
    pairs = first.reshape(*first.shape[:-1], -1, 2)
    crossed = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return torch.cat((first * cosine + crossed * sine, rest), dim=-1)


def scaled(layers: nn.Module, inside: tuple[str, ...], factor: float) -> None:
    """Multiply the weights of the linear layers of `layers` whose names end with one of `inside`."""
    with torch.no_grad():
        for name, module in layers.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(inside):
                module.weight.mul_(factor)


def settle(
    tokens: nn.Embedding, positions: nn.Embedding | None, norm: nn.LayerNorm, branches: float
) -> float:
    """Make what is decoded with random weights the same in every precision and batch size.

    The token's embedding outweighs what the layers add to it, so the likeliest next token is ahead of all
    others by far more than rounding, where otherwise two near ones would change places. `branches` are added
    in all. Returns the factor of the weights that end each branch.
    """
    width = tokens.embedding_dim
    with torch.no_grad():
        tokens.weight.mul_(width**0.5)
        if positions is not None:
            positions.weight.mul_(0.3 * width**0.5)
        norm.weight.fill_(width**-0.5)
    return float(0.5 * branches**-0.5)
