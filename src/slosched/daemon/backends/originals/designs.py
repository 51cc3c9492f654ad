"""The numbers of the published models, from general knowledge and without files. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextDesign:
    """A decoder that continues a prompt of `prompt` tokens to `length` tokens in all, prompt included.

    `rotary`: the width of each head that rotates with the position, as in GPT-J, whose attention and MLP also
    work side by side. 0: positions are learned and the two follow one another, as in GPT-2.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    rotary: int = 0
    prompt: int = 10
    length: int = 100
    dtype: str = "float32"

    @property
    def cached(self) -> int:
        """Places in the caches: a multiple of 8, which masks of attention are aligned to."""
        return -(-self.length // 8) * 8


@dataclass(frozen=True, kw_only=True)
class SpeechDesign:
    """An encoder of spectrograms (bands, 2 x states) and a decoder that takes `steps` steps of a token each."""

    layers: int  # of the encoder, and of the decoder
    width: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    bands: int = 80
    states: int = 1500
    start: int = 50258  # the token that the decoder begins with
    steps: int = 32
    dtype: str = "float32"

    @property
    def cached(self) -> int:
        """See TextDesign."""
        return -(-self.steps // 8) * 8


@dataclass(frozen=True, kw_only=True)
class MaskedDesign:
    """An encoder that gives the likeliest token at each of `tokens` places."""

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    tokens: int = 11
    dtype: str = "float32"


Design = TextDesign | SpeechDesign | MaskedDesign

#: EleutherAI/gpt-j-6B, as HotCarbon-24 runs it: float16, 100 tokens with the prompt.
_GPT = TextDesign(
    layers=28,
    width=4096,
    heads=16,
    vocabulary=50_400,
    positions=2048,
    rotary=64,
    dtype="float16",
)
_GPT2 = TextDesign(layers=12, width=768, heads=12, vocabulary=50_257, positions=1024)
#: openai/whisper-small. Random weights say no end, so the number of tokens is fixed.
_WHISPER = SpeechDesign(
    layers=12, width=768, heads=12, inner=3072, vocabulary=51_865, positions=448
)
#: bert-large-uncased with its head for masked tokens; the prompts of the experiment have 9 to 13 tokens.
_BERT = MaskedDesign(layers=24, width=1024, heads=16, inner=4096, vocabulary=30_522)

_TINY = TextDesign(layers=2, width=32, heads=4, vocabulary=97, positions=64, prompt=4, length=12)
#: By the name behind "originals/". The small ones are for tests and for trying things without a GPU.
DESIGNS: dict[str, Design] = {
    "bert": _BERT,
    "gpt": _GPT,
    "gpt2": _GPT2,
    "whisper": _WHISPER,
    "tiny-bert": MaskedDesign(layers=2, width=32, heads=4, inner=64, vocabulary=97),
    "tiny-gpt": TextDesign(
        layers=2, width=32, heads=4, vocabulary=97, positions=64, rotary=4, prompt=4, length=12
    ),
    "tiny-gpt2": _TINY,
    "tiny-whisper": SpeechDesign(
        layers=2,
        width=32,
        heads=4,
        inner=64,
        vocabulary=97,
        positions=64,
        bands=8,
        states=20,
        start=1,
        steps=6,
    ),
}
