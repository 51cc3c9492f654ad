"""GPT-2 and GPT-J as they generate: the prompt first, then a token in each step, greedily."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from slosched.daemon.backends.originals.attention import (
    cached,
    causal,
    merged,
    rotated,
    scaled,
    settle,
    split,
)
from slosched.daemon.backends.originals.designs import TextDesign
from slosched.daemon.backends.stepped import Stepped

_EPSILON = 1e-5


class _Attention(nn.Module):
    """`at` None: of the first tokens. Rotation is (sine, cosine) of the tokens' positions, if there is one."""

    def __init__(self, design: TextDesign) -> None:
        super().__init__()
        self.heads = design.heads

    def forward(
        self,
        states: torch.Tensor,
        caches: torch.Tensor,
        at: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        query, key, value = (split(each, self.heads) for each in self.projected(states))
        if rotation is not None:
            query, key = rotated(query, *rotation), rotated(key, *rotation)
        new = (key, value)
        found = causal(query, new, caches) if at is None else cached(query, new, caches, at)
        return self.out(merged(found))

    def projected(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def out(self, states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _Joint(_Attention):
    """GPT-2's: one layer gives queries, keys and values."""

    def __init__(self, design: TextDesign) -> None:
        super().__init__(design)
        self.c_attn = nn.Linear(design.width, 3 * design.width)
        self.c_proj = nn.Linear(design.width, design.width)

    def projected(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.c_attn(states).chunk(3, dim=-1)  # type: ignore[no-any-return]

    def out(self, states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(states)  # type: ignore[no-any-return]


class _Apart(_Attention):
    """GPT-J's: a layer for each, without biases."""

    def __init__(self, design: TextDesign) -> None:
        super().__init__(design)
        self.k_proj = nn.Linear(design.width, design.width, bias=False)
        self.v_proj = nn.Linear(design.width, design.width, bias=False)
        self.q_proj = nn.Linear(design.width, design.width, bias=False)
        self.out_proj = nn.Linear(design.width, design.width, bias=False)

    def projected(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(states), self.k_proj(states), self.v_proj(states)

    def out(self, states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(states)  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, design: TextDesign, first: str, second: str) -> None:
        super().__init__()
        self._first, self._second = first, second
        setattr(self, first, nn.Linear(design.width, 4 * design.width))
        setattr(self, second, nn.Linear(4 * design.width, design.width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = functional.gelu(getattr(self, self._first)(states), approximate="tanh")
        return getattr(self, self._second)(wide)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, design: TextDesign) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(design.width, eps=_EPSILON)
        self.side_by_side = bool(design.rotary)
        if self.side_by_side:
            self.attn: _Attention = _Apart(design)
            self.mlp = _Mlp(design, "fc_in", "fc_out")
        else:
            self.attn = _Joint(design)
            self.ln_2 = nn.LayerNorm(design.width, eps=_EPSILON)
            self.mlp = _Mlp(design, "c_fc", "c_proj")

    def forward(
        self,
        states: torch.Tensor,
        caches: torch.Tensor,
        at: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        normed = self.ln_1(states)
        attended = self.attn(normed, caches, at, rotation)
        if self.side_by_side:
            return states + attended + self.mlp(normed)  # type: ignore[no-any-return]
        states = states + attended
        return states + self.mlp(self.ln_2(states))  # type: ignore[no-any-return]


class TextModel(Stepped):
    """Token ids, int64 (batch, prompt), to `tokens`, int64 (batch, length - prompt), the generated ones; and to
    `last`, float32 (batch, width), what the last of them was chosen by.

    The prompt gives the first token, and each step another.
    """

    sine: torch.Tensor
    cosine: torch.Tensor

    def __init__(self, design: TextDesign) -> None:
        super().__init__()
        self.design = design
        self.steps = design.length - design.prompt - 1
        self.wte = nn.Embedding(design.vocabulary, design.width)
        self.wpe = None if design.rotary else nn.Embedding(design.positions, design.width)
        self.h = nn.ModuleList(_Block(design) for _ in range(design.layers))
        self.ln_f = nn.LayerNorm(design.width, eps=_EPSILON)
        self.lm_head = nn.Linear(design.width, design.vocabulary) if design.rotary else None

    def settle(self) -> None:
        """Called once there are weights: see attention.settle. GPT-J's next token is then the one behind."""
        design = self.design
        factor = settle(self.wte, self.wpe, self.ln_f, 2 * design.layers)
        scaled(self.h, ("c_proj", "out_proj", "fc_out"), factor)
        if self.lm_head is not None:
            with torch.no_grad():
                self.lm_head.weight[1:] = self.wte.weight[:-1]
                self.lm_head.weight[:1] = self.wte.weight[-1:]

    def add_tables(self) -> None:
        """Called once the model is not on "meta": the sines and cosines of positions (GPT-J)."""
        rotary = self.design.rotary
        if rotary:
            speeds = 10_000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
            angles = torch.arange(self.design.cached, dtype=torch.float64)[:, None] * speeds
            self.register_buffer("sine", angles.sin().float())
            self.register_buffer("cosine", angles.cos().float())

    def begin(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """The state: all tokens, int64 (batch, length); the place of the last one that is known, int64
        (batch,); `last`; and keys and values of each layer, (batch, 2, layers, heads, places, width of a head).
        """
        design, rows = self.design, len(tokens)
        shape = (2, design.layers, design.heads, design.cached, design.width // design.heads)
        caches = torch.zeros((rows, *shape), dtype=self.wte.weight.dtype, device=tokens.device)
        places = torch.arange(design.prompt, device=tokens.device)
        token, last = self._next(self._run(tokens, caches, places, None))
        later = design.length - design.prompt - 1
        known = torch.cat((tokens, token, tokens.new_zeros((rows, later))), dim=1)
        return known, torch.full_like(token[:, 0], design.prompt), last, caches

    def step(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known, place, _, caches = state
        at = place[:1]
        token, last = self._next(self._run(known.index_select(1, at), caches, at, at))
        # More steps than there are leave the last place as it is, and write nothing else.
        after = (place + 1).clamp(max=self.design.length - 1)
        known.index_copy_(1, after[:1], token)
        return known, after, last, caches

    def finish(self, *state: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": state[0][:, self.design.prompt :], "last": state[2]}

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Those of the next token, for each of normalised `states` (..., width)."""
        if self.lm_head is not None:
            return self.lm_head(states)  # type: ignore[no-any-return]
        return functional.linear(states, self.wte.weight)

    def _run(
        self,
        tokens: torch.Tensor,
        caches: torch.Tensor,
        places: torch.Tensor,
        at: torch.Tensor | None,
    ) -> torch.Tensor:
        """The last of `tokens` (batch, tokens), which stand at `places`, behind all layers: (batch, width)."""
        states = self.wte(tokens)
        if self.wpe is not None:
            states = states + self.wpe(places)
            rotation = None
        else:
            rotation = (self.sine.index_select(0, places), self.cosine.index_select(0, places))
        by_layer = caches.movedim(0, 2)  # (2, layers, batch, ...)
        for number, block in enumerate(self.h):
            states = block(states, by_layer[:, number], at, rotation)
        return self.ln_f(states[:, -1])  # type: ignore[no-any-return]

    def _next(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits(states).argmax(-1, keepdim=True), states.float()
