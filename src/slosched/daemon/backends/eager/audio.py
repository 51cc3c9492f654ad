"""Whisper as HotCarbon-24 runs it: 30 s of speech, encoded, and a text of fixed length, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slosched.daemon.backends.eager.building import built
from slosched.daemon.backends.eager.model import EagerModel, dtype_of, generator
from slosched.daemon.backends.originals.designs import DESIGNS, SpeechDesign
from slosched.daemon.backends.zoo import import_transformers
from slosched.share_spec import Job


class Whisper(EagerModel):
    """whisper-small, float32: a random spectrogram (80, 3000) to 32 tokens. The spectrogram is given, where the
    original's pipeline computes it on the CPU in each request.
    """

    note = "a random spectrogram of 30 s, and 32 tokens in a greedy loop of our own"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        transformers = import_transformers()
        design: Any = DESIGNS["tiny-whisper" if small else "whisper"]
        config = _config(transformers, design)
        self._dtype = dtype_of(job.dtype, torch.float32)
        self.module: Any = built(
            "whisper",
            lambda: transformers.WhisperForConditionalGeneration(config),
            device,
            self._dtype,
        )
        self._device, self._steps = device, design.steps
        # The second convolution halves the frames.
        shape = (job.batch, design.bands, 2 * design.states)
        self._speech = torch.randn(shape, generator=generator(seed)).to(self._dtype)
        self._prompt = torch.full((job.batch, 1), design.start)

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        speech = self._speech.to(self._device)
        ids = self._prompt.to(self._device)
        states = (self.module.model.encoder(speech).last_hidden_state,)
        text, kept = [], None
        for _ in range(self._steps):
            between()
            found = self.module(
                encoder_outputs=states,
                decoder_input_ids=ids,
                past_key_values=kept,
                use_cache=True,
            )
            kept = found.past_key_values
            ids = found.logits[:, -1:].argmax(-1)
            text.append(ids)
        return [torch.cat(text, dim=1)]


def _config(transformers: Any, design: SpeechDesign) -> Any:
    return transformers.WhisperConfig(
        d_model=design.width,
        encoder_layers=design.layers,
        decoder_layers=design.layers,
        encoder_attention_heads=design.heads,
        decoder_attention_heads=design.heads,
        encoder_ffn_dim=design.inner,
        decoder_ffn_dim=design.inner,
        vocab_size=design.vocabulary,
        num_mel_bins=design.bands,
        max_source_positions=design.states,
        max_target_positions=design.positions,
        decoder_start_token_id=design.start,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    )
