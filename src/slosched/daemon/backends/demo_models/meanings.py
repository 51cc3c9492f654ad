"""Sentences of which it is known which two mean nearly the same, and their token ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.daemon.backends.demo_models.folders import sentence_weights

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trio:
    """A sentence, `near` with nearly the same meaning in other words, `far` with its words and another one."""

    sentence: str
    near: str
    far: str


TRIOS = (
    Trio(
        "How do I reset my password?",
        "I forgot my login and need a new one.",
        "How do I reset my kitchen clock?",
    ),
    Trio(
        "The stock market fell sharply today.",
        "Shares dropped a lot on the exchange.",
        "The child fell sharply from the wall today.",
    ),
    Trio(
        "A man is eating food.",
        "Someone is having a meal.",
        "A man is driving a car.",
    ),
    Trio(
        "The doctor told her to rest for a week.",
        "She was advised by her physician to stay in bed for some days.",
        "The doctor bought a new car last week.",
    ),
)


def sentences() -> tuple[str, ...]:
    """All sentences of TRIOS, one after the other."""
    return tuple(text for trio in TRIOS for text in (trio.sentence, trio.near, trio.far))


def tokens_of(text: str) -> dict[str, Tokens]:
    """The inputs for a sentence: `input_ids` and `attention_mask`, (tokens,) each. Raises MissingPackage."""
    ids = np.array(_tokenizer(sentence_weights()).encode(text).ids, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer
