"""The originals by name: networks in the published shapes, built from numbers alone, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from slosched.daemon.backends.diffusion.weights import filled
from slosched.daemon.backends.originals.designs import (
    DESIGNS,
    MaskedDesign,
    SpeechDesign,
    TextDesign,
)
from slosched.daemon.backends.originals.speech import SpeechDecoder, SpeechModel
from slosched.daemon.backends.originals.text import TextModel
from slosched.daemon.backends.zoo import ModelSpec, import_transformers, seeded

_PREFIX = "originals/"
_ATTENTION = "sdpa"  # it needs no mask, which transformers would look at on the host


def originals_specs() -> dict[str, ModelSpec]:
    """The originals by the name that a worker offers, "originals/gpt". Builds none of them."""
    return {_PREFIX + name: original_spec(_PREFIX + name) for name in DESIGNS}


def original_spec(name: str, dtype: str = "") -> ModelSpec:
    """The model `name`, "originals/gpt", its weights in `dtype`; empty: that of the published experiment."""
    design = DESIGNS[name.removeprefix(_PREFIX)]
    dtype = dtype or design.dtype
    shape: tuple[int, ...]
    if isinstance(design, SpeechDesign):
        shape, kind, high, label = (design.bands, 2 * design.states), "float32", 0, "audio"
    else:
        tokens = design.tokens if isinstance(design, MaskedDesign) else design.prompt
        shape, kind, high, label = (tokens,), "int64", design.vocabulary, "text"
    build: Callable[[], nn.Module] = partial(build_original, name, getattr(torch, dtype))
    return ModelSpec(
        name=name,
        build=build,
        input_shape=shape,
        input_dtype=kind,
        input_high=high,
        labels=(label, *((dtype,) if dtype != "float32" else ())),
    )


def build_original(name: str, dtype: torch.dtype) -> nn.Module:
    """The model `name` on the CPU, in eval mode, its weights in `dtype` and drawn from a seed made of the name.

    Raises MissingPackage where it needs transformers.
    """
    design = DESIGNS[name.removeprefix(_PREFIX)]
    if isinstance(design, TextDesign):
        return _text(name, design, dtype)
    if isinstance(design, SpeechDesign):
        return _speech(name, design, dtype)
    return seeded(name, lambda: MaskedTokens(_bert(design))).to(dtype)


def _text(name: str, design: TextDesign, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = TextModel(design)
    filled(model, name, dtype)
    model.settle()
    model.add_tables()
    return model.eval()


def _speech(name: str, design: SpeechDesign, dtype: torch.dtype) -> nn.Module:
    encoder = seeded(name, lambda: _heard(speech_encoder(design))).to(dtype)
    with torch.device("meta"):
        decoder = SpeechDecoder(design)
    filled(decoder, name, dtype)
    decoder.settle()
    return SpeechModel(design, encoder, decoder).eval()


def speech_encoder(design: SpeechDesign) -> Any:
    """transformers' encoder of Whisper in these numbers."""
    transformers = import_transformers()
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=design.width,
        encoder_layers=design.layers,
        encoder_attention_heads=design.heads,
        encoder_ffn_dim=design.inner,
        num_mel_bins=design.bands,
        max_source_positions=design.states,
        attn_implementation=_ATTENTION,
    )
    return WhisperEncoder(config)


def _heard(encoder: Any) -> nn.Module:
    # As in the zoo: with the library's own scale the two convolutions say little beside the positions.
    for convolution in (encoder.conv1, encoder.conv2):
        nn.init.kaiming_normal_(convolution.weight)
    network: nn.Module = encoder
    return network


def _bert(design: MaskedDesign) -> Any:
    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=design.vocabulary,
        hidden_size=design.width,
        num_hidden_layers=design.layers,
        num_attention_heads=design.heads,
        intermediate_size=design.inner,
        attn_implementation=_ATTENTION,
    )
    return transformers.BertForMaskedLM(config)


class MaskedTokens(nn.Module):
    """BERT's likeliest token at each place: int64 (batch, tokens) to `tokens`, int64, and `logits`, float32.

    `model` is transformers' BertForMaskedLM. In half precision there are no `tokens`: with random weights two
    of them are often as likely as rounding can tell, and a batch of another size would choose the other.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        best = self.model(token_ids).logits.max(dim=-1)
        found = {"logits": best.values.float()}
        return (
            found if best.values.dtype is not torch.float32 else {"tokens": best.indices, **found}
        )
