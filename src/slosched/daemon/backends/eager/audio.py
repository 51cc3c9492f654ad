"""Whisper as HotCarbon-24 runs it: 30 s of speech, encoded, and a text of fixed length, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slosched.daemon.backends.eager.building import built
from slosched.daemon.backends.eager.model import EagerModel, dtype_of, generator
from slosched.daemon.backends.zoo import import_transformers
from slosched.share_spec import Job

_MELS, _FRAMES = 80, 3000
#: Tokens of the answer. Random weights give no end of a text; 7 s of speech have about this number.
_ANSWER_TOKENS = 32
#: Start of a text, English, to be transcribed, without times.
_PROMPT = (50258, 50259, 50359, 50363)

_WHISPER_SMALL = {
    "d_model": 768,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
_TINY = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 50,
}


class Whisper(EagerModel):
    """whisper-small, float32: a random spectrogram (80, 3000) to 32 tokens. The spectrogram is given, where the
    original's pipeline computes it on the CPU in each request.
    """

    note = "a random spectrogram of 30 s, and 32 tokens in a greedy loop of our own"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        transformers = import_transformers()
        config = transformers.WhisperConfig(**(_TINY if small else _WHISPER_SMALL))
        self._dtype = dtype_of(job.dtype, torch.float32)
        self.module: Any = built(
            "whisper",
            lambda: transformers.WhisperForConditionalGeneration(config),
            device,
            self._dtype,
        )
        self._device = device
        frames = 2 * config.max_source_positions  # the second convolution halves them: 3000
        shape = (job.batch, _MELS, frames)
        self._speech = torch.randn(shape, generator=generator(seed)).to(self._dtype)
        self._prompt = torch.tensor([_PROMPT]).expand(job.batch, -1).contiguous()

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        speech = self._speech.to(self._device)
        ids = self._prompt.to(self._device)
        states = (self.module.model.encoder(speech).last_hidden_state,)
        text, kept = [], None
        for _ in range(_ANSWER_TOKENS):
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
