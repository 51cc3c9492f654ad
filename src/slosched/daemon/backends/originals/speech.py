"""Whisper as it transcribes: the encoder first, then a token in each step, greedily."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slosched.daemon.backends.originals.attention import cached, merged, scaled, settle, split
from slosched.daemon.backends.originals.designs import SpeechDesign
from slosched.daemon.backends.stepped import Stepped


class _Attention(nn.Module):
    def __init__(self, design: SpeechDesign) -> None:
        super().__init__()
        self.heads = design.heads
        self.k_proj = nn.Linear(design.width, design.width, bias=False)
        self.v_proj = nn.Linear(design.width, design.width)
        self.q_proj = nn.Linear(design.width, design.width)
        self.out_proj = nn.Linear(design.width, design.width)

    def keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return split(self.k_proj(states), self.heads), split(self.v_proj(states), self.heads)

    def query(self, states: torch.Tensor) -> torch.Tensor:
        return split(self.q_proj(states), self.heads)


class _Layer(nn.Module):
    def __init__(self, design: SpeechDesign) -> None:
        super().__init__()
        width = design.width
        self.self_attn, self.encoder_attn = _Attention(design), _Attention(design)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, design.inner), nn.Linear(design.inner, width)

    def forward(
        self, states: torch.Tensor, caches: torch.Tensor, heard: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        """`states` (batch, 1, width); `heard` are the keys and values of what the encoder gave."""
        normed, own = self.self_attn_layer_norm(states), self.self_attn
        found = cached(own.query(normed), own.keys_and_values(normed), caches, at)
        states = states + own.out_proj(merged(found))
        normed, other = self.encoder_attn_layer_norm(states), self.encoder_attn
        keys, values = heard
        found = functional.scaled_dot_product_attention(other.query(normed), keys, values)
        states = states + other.out_proj(merged(found))
        wide = functional.gelu(self.fc1(self.final_layer_norm(states)))
        return states + self.fc2(wide)  # type: ignore[no-any-return]


class SpeechDecoder(nn.Module):
    """The part that gives tokens; `SpeechModel` says what runs when."""

    def __init__(self, design: SpeechDesign) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(design.vocabulary, design.width)
        self.embed_positions = nn.Embedding(design.positions, design.width)
        self.layers = nn.ModuleList(_Layer(design) for _ in range(design.layers))
        self.layer_norm = nn.LayerNorm(design.width)

    def settle(self) -> None:
        """See attention.settle."""
        factor = settle(
            self.embed_tokens, self.embed_positions, self.layer_norm, 3 * len(self.layers)
        )
        scaled(self.layers, ("out_proj", "fc2"), factor)


class SpeechModel(Stepped):
    """Spectrograms, float32 (batch, bands, 2 x states), to `tokens`, int64 (batch, steps); and to `last`,
    float32 (batch, width), what the last of them was chosen by.

    `encoder` is transformers' WhisperEncoder.
    """

    def __init__(self, design: SpeechDesign, encoder: Any, decoder: SpeechDecoder) -> None:
        super().__init__()
        self.design, self.steps = design, design.steps
        self.encoder, self.decoder = encoder, decoder

    def begin(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """The state: the tokens, int64 (batch, 1 + steps), the first one given; the place of the last one that
        is known, int64 (batch,); `last`; keys and values of each layer for what was said, (batch, 2, layers,
        heads, places, width of a head), and for what was heard.
        """
        design, rows, device = self.design, len(features), features.device
        states = self.encoder(features).last_hidden_state
        layers: Any = self.decoder.layers
        pairs = [layer.encoder_attn.keys_and_values(states) for layer in layers]
        heard = torch.stack([torch.stack(each, dim=1) for each in zip(*pairs, strict=True)], dim=1)
        shape = (2, design.layers, design.heads, design.cached, design.width // design.heads)
        caches = torch.zeros((rows, *shape), dtype=states.dtype, device=device)
        known = torch.zeros((rows, 1 + design.steps), dtype=torch.int64, device=device)
        known[:, 0] = design.start
        place = torch.zeros(rows, dtype=torch.int64, device=device)
        last = torch.zeros((rows, design.width), dtype=torch.float32, device=device)
        return known, place, last, caches, heard

    def step(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known, place, _, caches, heard = state
        decoder = self.decoder
        at = place[:1].clamp(max=self.design.steps - 1)
        states = decoder.embed_tokens(known.index_select(1, at)) + decoder.embed_positions(at)
        own, other = caches.movedim(0, 2), heard.movedim(0, 2)
        for number, layer in enumerate(decoder.layers):
            states = layer(states, own[:, number], other[:, number], at)
        last = decoder.layer_norm(states[:, -1])
        logits = functional.linear(last, decoder.embed_tokens.weight)
        # More steps than there are leave the last place as it is, and write nothing else.
        after = (place + 1).clamp(max=self.design.steps)
        known.index_copy_(1, after[:1], logits.argmax(-1, keepdim=True))
        return known, after, last.float(), caches, heard

    def finish(self, *state: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": state[0][:, 1:], "last": state[2]}
