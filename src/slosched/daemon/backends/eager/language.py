"""Language models of HotCarbon-24 and Deft: bert-large's masked words, and texts of GPT-J, GPT-2 and others.

Token ids are random: no tokenizer's files travel with this package. Random weights give no end of a text, so
each has a fixed length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from slosched.daemon.backends.eager.building import built
from slosched.daemon.backends.eager.model import EagerModel, dtype_of, generator
from slosched.daemon.backends.originals.designs import DESIGNS, TextDesign
from slosched.daemon.backends.zoo import import_transformers
from slosched.share_spec import Job

#: How the tokens of a text are drawn.
_TEMPERATURE, _TOP_K, _TOP_P = 0.7, 50, 0.95

_BLOOM = TextDesign(layers=24, width=1024, heads=16, vocabulary=250_880, positions=2048)
_CODEGEN = TextDesign(layers=20, width=1024, heads=16, vocabulary=51_200, positions=2048, rotary=32)
_SMALL = TextDesign(layers=2, width=32, heads=4, vocabulary=97, positions=64, prompt=4, length=12)
#: The language models that only Deft's configurations name.
_DEFT = {
    "bloom": _BLOOM,
    "codegen": _CODEGEN,
    "tiny-bloom": _SMALL,
    "tiny-codegen": replace(_SMALL, rotary=4),
}


class Bert(EagerModel):
    """bert-large-uncased with its head for masked words: the likeliest word for each of 11 tokens, float32."""

    note = "11 random tokens"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        transformers = import_transformers()
        design: Any = DESIGNS["tiny-bert" if small else "bert"]
        config = transformers.BertConfig(
            hidden_size=design.width,
            num_hidden_layers=design.layers,
            num_attention_heads=design.heads,
            intermediate_size=design.inner,
            vocab_size=design.vocabulary,
        )
        dtype = dtype_of(job.dtype, torch.float32)
        self.module: Any = built(
            "bert", lambda: transformers.BertForMaskedLM(config), device, dtype
        )
        self._device = device
        self._tokens = tokens((job.batch, design.tokens), design.vocabulary, seed)

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        return [self.module(input_ids=self._tokens.to(self._device)).logits.argmax(-1)]


class Text(EagerModel):
    """A causal model that continues 10 tokens up to 100, each drawn at temperature 0.7, top k 50, top p 0.95.

    The draws begin anew with the job's seed in each request, so that all answers are the same.
    """

    name = ""

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        designs = {**DESIGNS, **_DEFT}
        design: Any = designs[f"tiny-{self.name}" if small else self.name]
        dtype = dtype_of(job.dtype, getattr(torch, design.dtype))
        self.module: Any = built(self.name, lambda: self.network(_sizes(design)), device, dtype)
        self._device, self._seed = device, seed
        self._new = design.length - design.prompt
        self._tokens = tokens((job.batch, design.prompt), design.vocabulary, seed)
        self.note = (
            f"{design.prompt} random tokens continued up to {design.length}, in a loop that samples"
        )

    @abstractmethod
    def network(self, sizes: dict[str, Any]) -> Any:
        """transformers' model whose config has these `sizes`."""

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        numbers = generator(self._seed, self._device)
        ids = self._tokens.to(self._device)
        text, kept = [ids], None
        for place in range(self._new):
            if place:
                between()
            found = self.module(input_ids=ids, past_key_values=kept, use_cache=True)
            kept = found.past_key_values
            ids = _drawn(found.logits[:, -1].float(), numbers)
            text.append(ids)
        return [torch.cat(text, dim=1)]


class GptJ(Text):
    """GPT-J-6B in float16: 28 layers, 12 GB."""

    name = "gpt"

    def network(self, sizes: dict[str, Any]) -> Any:
        transformers = import_transformers()
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes))


class Gpt2(Text):
    """GPT-2 of 124 million parameters, float32."""

    name = "gpt2"

    def network(self, sizes: dict[str, Any]) -> Any:
        transformers = import_transformers()
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


class Bloom(Text):
    """BLOOM of 560 million parameters, float32: one of Deft's high jobs."""

    name = "bloom"

    def network(self, sizes: dict[str, Any]) -> Any:
        transformers = import_transformers()
        sizes = {**sizes, "hidden_size": sizes["n_embd"]}
        del sizes["n_embd"], sizes["n_positions"]
        return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))


class CodeGen(Text):
    """CodeGen of 350 million parameters, float32: another of Deft's jobs."""

    name = "codegen"

    def network(self, sizes: dict[str, Any]) -> Any:
        transformers = import_transformers()
        sizes = {**sizes, "n_ctx": sizes["n_positions"]}
        return transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**sizes))


class TinyGpt(Gpt2):
    """GPT-2 with two layers."""

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        super().__init__(job, device, seed, small=True)


def _sizes(design: TextDesign) -> dict[str, Any]:
    """`design` as transformers' configs name it. No token ends a text."""
    sizes: dict[str, Any] = {
        "n_embd": design.width,
        "n_layer": design.layers,
        "n_head": design.heads,
        "n_positions": design.positions,
        "vocab_size": design.vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {**sizes, "rotary_dim": design.rotary} if design.rotary else sizes


def tokens(shape: tuple[int, ...], vocabulary: int, seed: int) -> torch.Tensor:
    """Random token ids of `shape` on the CPU, int64."""
    return torch.randint(0, vocabulary, shape, generator=generator(seed))


def _drawn(logits: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
    """One token for each row of `logits` (batch, words), as (batch, 1)."""
    best, words = torch.topk(logits / _TEMPERATURE, min(_TOP_K, logits.shape[-1]))
    shares = torch.softmax(best, dim=-1)
    # The likeliest words that together have the share top p; the first is always one of them.
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= _TOP_P, 0.0)
    return words.gather(-1, torch.multinomial(shares, 1, generator=numbers))
