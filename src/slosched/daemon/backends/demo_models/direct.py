"""Direct forward passes of the demo's models on the CPU, which share only the model with the serving path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from slosched.daemon.backends.demo_models import pitch, sentences

Array = npt.NDArray[np.float32]


def pitches_of(repository: Path, sounds: Sequence[Array]) -> list[Array]:
    """What pitch/1 of `repository` answers to each sound (1024,): (360,)."""
    model = pitch.with_weights(repository / "pitch" / "1" / "weights.safetensors")
    with _one_thread(), torch.inference_mode():
        return list(model(torch.from_numpy(np.stack(sounds))).numpy())


def vectors_of(questions: Sequence[Mapping[str, npt.NDArray[np.int64]]]) -> list[Array]:
    """What the model of sentences answers to each one's token ids and mask, not padded: (384,)."""
    model = sentences.make()
    with _one_thread(), torch.inference_mode():
        found = [
            model(**{key: torch.from_numpy(value)[None] for key, value in question.items()})
            for question in questions
        ]
    return [each[0].numpy() for each in found]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread, so that what serves beside keeps its cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
