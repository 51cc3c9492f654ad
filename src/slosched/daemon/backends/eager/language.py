"""Language models as HotCarbon-24 runs them: bert-large's masked words, and texts of GPT-J and GPT-2.

Token ids are random: no tokenizer's files travel with this package. Random weights give no end of a text, so
each has a fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slosched.daemon.backends.eager.building import built
from slosched.daemon.backends.eager.model import EagerModel, dtype_of, generator
from slosched.daemon.backends.zoo import import_transformers
from slosched.share_spec import Job

#: HotCarbon's four prompts have 9 to 13 tokens.
_PROMPT_TOKENS = 11
#: The length of a whole text, as its max_length says, and how its tokens are drawn.
_TEXT_TOKENS = 100
_TEMPERATURE, _TOP_K, _TOP_P = 0.7, 50, 0.95

_SMALL_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
}
_BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_SMALL_GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "vocab_size": 100,
}


class Bert(EagerModel):
    """bert-large-uncased with its head for masked words: the likeliest word for each of 11 tokens, float32."""

    note = "11 random tokens"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        transformers = import_transformers()
        config = transformers.BertConfig(**(_SMALL_BERT if small else _BERT_LARGE))
        dtype = dtype_of(job.dtype, torch.float32)
        self.module: Any = built(
            "bert", lambda: transformers.BertForMaskedLM(config), device, dtype
        )
        self._device = device
        self._tokens = tokens((job.batch, _PROMPT_TOKENS), config.vocab_size, seed)

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        return [self.module(input_ids=self._tokens.to(self._device)).logits.argmax(-1)]


class Text(EagerModel):
    """A causal model that continues 11 tokens up to 100, each drawn at temperature 0.7, top k 50, top p 0.95.

    The draws begin anew with the job's seed in each request, so that all answers are the same.
    """

    note = "11 random tokens continued up to 100, in a loop of our own"
    default_dtype = torch.float32

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        dtype = dtype_of(job.dtype, self.default_dtype)
        self.module: Any = built(
            type(self).__name__, lambda: self._network(small=small), device, dtype
        )
        self._device, self._seed = device, seed
        self._tokens = tokens((job.batch, _PROMPT_TOKENS), self.module.config.vocab_size, seed)

    def _network(self, *, small: bool) -> Any:
        raise NotImplementedError

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        numbers = generator(self._seed, self._device)
        ids = self._tokens.to(self._device)
        text, kept = [ids], None
        for place in range(_TEXT_TOKENS - _PROMPT_TOKENS):
            if place:
                between()
            found = self.module(input_ids=ids, past_key_values=kept, use_cache=True)
            kept = found.past_key_values
            ids = _drawn(found.logits[:, -1].float(), numbers)
            text.append(ids)
        return [torch.cat(text, dim=1)]


class GptJ(Text):
    """GPT-J-6B in float16: 28 layers, 12 GB."""

    default_dtype = torch.float16

    def _network(self, *, small: bool) -> Any:
        transformers = import_transformers()
        sizes = {**_SMALL_GPT, "rotary_dim": 4} if small else {}
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes))


class Gpt2(Text):
    """GPT-2 of 124 million parameters, float32."""

    def _network(self, *, small: bool) -> Any:
        transformers = import_transformers()
        sizes = _SMALL_GPT if small else {}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


class TinyGpt(Gpt2):
    """GPT-2 with two layers of width 16."""

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        super().__init__(job, device, seed, small=True)


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
