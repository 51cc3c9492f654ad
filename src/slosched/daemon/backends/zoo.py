"""The zoo: models that every torch worker offers by name, built from transformers' configs alone.

Weights are random, because none travel with this package, and drawn from a seed made of the name: every
copy, process and machine has the same ones, so a served output can be compared with a direct forward.
Nothing is downloaded. Operators add models of their own in the worker's config (sources.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from slosched.errors import InvalidConfig, MissingPackage
from slosched.signature import MOST_TENSORS, ONLY_INPUT, VARIES, Tensor, signature_error


@dataclass(frozen=True)
class ModelSpec:
    """How to make one model. Shapes are those of one request, without the batch dimension.

    `build` returns a module in eval mode on the CPU that maps its inputs (batch, *shape) to outputs (batch,
    *shape): an only input by position, several by name. `inputs` are named; without them there is one, of
    `input_shape` and `input_dtype`, which otherwise repeat the first one's at the greatest of `lengths`.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    random_weights: bool = True
    input_high: int = 0  # integer inputs that a worker makes up lie in 0..input_high-1
    labels: tuple[str, ...] = ()
    channels_last: bool = (
        False  # its inputs, of (channels, height, width), are wanted in that format
    )
    output: str = ""  # which of several outputs is the answer: its key, attribute or index
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()  # those to answer with; empty: as `output` says, or all
    lengths: tuple[int, ...] = ()  # the length classes, ascending; empty: no dimension varies
    pads: Mapping[str, float] = field(
        default_factory=dict
    )  # what inputs are padded with, if not with 0
    padding_changes_answers: bool = False  # it is accepted that the answer depends on the class
    score: str = ""  # which of the outputs is a judge's score: its key, attribute or index

    @property
    def takes(self) -> tuple[Tensor, ...]:
        """The inputs, whether they are named or not."""
        return self.inputs or (Tensor(ONLY_INPUT, self.input_dtype, self.input_shape),)


def taking(
    spec: ModelSpec, inputs: Sequence[Tensor], lengths: Sequence[int] | None = None
) -> ModelSpec:
    """`spec` with these inputs, and these length classes if they are given. Raises InvalidConfig."""
    chosen = spec.lengths if lengths is None else tuple(lengths)
    wrong = signature_error(inputs, spec.outputs, chosen)
    if not 1 <= len(inputs) <= MOST_TENSORS:
        wrong = f"{len(inputs)} inputs; a model has 1 to {MOST_TENSORS}"
    if wrong:
        raise InvalidConfig(f"model {spec.name!r}: {wrong}")
    longest = max(chosen, default=0)
    return replace(
        spec,
        inputs=tuple(inputs),
        lengths=chosen,
        input_shape=inputs[0].shape_at(longest),
        input_dtype=inputs[0].dtype,
    )


class KnowsInputs(nn.Module):
    """A module that says itself what it takes, as an exported program does."""

    inputs: tuple[Tensor, ...] = ()


def import_transformers() -> Any:
    """The transformers package. Raises MissingPackage."""
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage(
            f"the zoo's models need transformers ({error}): pip install 'slosched[torch,models]'"
        ) from None
    return transformers


def seeded(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Call `make` with torch's generator seeded by `name`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        return make().eval()


def import_zoo() -> None:
    """Import every module that a zoo model needs: seconds in which the interpreter is held.

    A worker calls this before it is ready, so that no heartbeat waits for it later. Raises
    MissingPackage.
    """
    transformers = import_transformers()
    for name in _CLASSES:  # naming a class imports the file behind it
        getattr(transformers, name)
    _whisper_encoder_class()


_CLASSES = (
    "ResNetConfig",
    "ResNetForImageClassification",
    "MobileNetV2Config",
    "MobileNetV2ForImageClassification",
    "ViTConfig",
    "ViTForImageClassification",
    "BertConfig",
    "BertForSequenceClassification",
    "GPT2Config",
    "GPT2LMHeadModel",
    "WhisperConfig",
)


# A CUDA graph holds no step that waits for a value on the device. Attention masks are where
# transformers takes such steps, so no model here is given one to look at: "sdpa" needs none for attention
# over everything; GPT-2's is made once, and that of a text of any length from its mask, both in the four
# dimensions that are passed on unseen.
_ATTENTION = "sdpa"


# -------------------------------------------------------------------------------- networks


def _resnet(name: str, depths: list[int], sizes: list[int], layer: str, stem: int) -> nn.Module:
    transformers = import_transformers()
    config = transformers.ResNetConfig(
        embedding_size=stem, depths=depths, hidden_sizes=sizes, layer_type=layer, num_labels=1000
    )
    return seeded(name, lambda: _calm(transformers.ResNetForImageClassification(config)))


def _calm(model: Any) -> nn.Module:
    # He et al.'s initialisation doubles the variance in each residual block, and nothing undoes it here,
    # since the running statistics are those of an untrained network. Half the scale at the end of each
    # block, and less in stages of many blocks, keeps the logits near 1, and the outputs of two inputs
    # 0.008 and more apart, so that a comparison with a tolerance of 1e-4 tells right from wrong. So it
    # does in float16, which is off by a fifteenth of that or less; bfloat16 is off by up to half of it.
    for stage in model.resnet.encoder.stages:
        scale = 0.5 * min(1.0, (6 / len(stage.layers)) ** 0.5)
        for block in stage.layers:
            last = [m for m in block.layer.modules() if isinstance(m, nn.BatchNorm2d)][-1]
            nn.init.constant_(last.weight, scale)
    network: nn.Module = model
    return network


def _mobilenet_v2(name: str) -> nn.Module:
    transformers = import_transformers()
    config = transformers.MobileNetV2Config(num_labels=1000)
    return seeded(name, lambda: _lively(transformers.MobileNetV2ForImageClassification(config)))


def _lively(model: nn.Module) -> nn.Module:
    # The library's 0.02 for every weight leaves logits of 1e-22 without trained statistics. He's scale
    # keeps the signal; residual blocks are calmed as in `_calm`.
    blocks: list[Any] = list(model.modules())
    for layer in blocks:
        if isinstance(getattr(layer, "convolution", None), nn.Conv2d):
            weight = layer.convolution.weight
            gain = 1.0 if layer.activation is None else 2.0
            nn.init.normal_(weight, std=(gain / weight[0].numel()) ** 0.5)
    for block in blocks:
        if getattr(block, "use_residual", False):
            nn.init.constant_(block.reduce_1x1.normalization.weight, 0.5)
    return model


def _vit(name: str) -> nn.Module:
    transformers = import_transformers()
    config = transformers.ViTConfig(num_labels=1000, attn_implementation=_ATTENTION)
    return seeded(name, lambda: transformers.ViTForImageClassification(config))


def _bert(name: str, **sizes: int) -> nn.Module:
    transformers = import_transformers()
    config = transformers.BertConfig(num_labels=2, attn_implementation=_ATTENTION, **sizes)
    return seeded(name, lambda: transformers.BertForSequenceClassification(config))


class _MaskedBert(nn.Module):
    """BERT for texts of any length: token ids and a mask (batch, tokens), 1 where there is a token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        dtype = self.model.dtype
        hidden = (attention_mask == 0).to(dtype) * torch.finfo(dtype).min
        tokens = input_ids.shape[1]
        unseen = hidden[:, None, None, :].expand(-1, 1, tokens, -1)
        return self.model(input_ids, attention_mask=unseen)


class _LastLogits(nn.Module):
    """GPT-2's prefill: token ids (batch, tokens) to the logits of the token that comes next."""

    causal: torch.Tensor

    def __init__(self, model: Any, tokens: int) -> None:
        super().__init__()
        self.model = model
        causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.transformer(
            token_ids, attention_mask=self.causal, use_cache=False
        ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden[:, -1])
        return logits


def _gpt2(name: str, tokens: int) -> nn.Module:
    transformers = import_transformers()
    config = transformers.GPT2Config(attn_implementation=_ATTENTION)
    return seeded(name, lambda: _LastLogits(transformers.GPT2LMHeadModel(config), tokens))


class _EncodedSpeech(nn.Module):
    """Whisper's encoder: a log-mel spectrogram (batch, 80, 3000) to the states of every 100th frame of
    its output (batch, 15, width): two seconds apart. All of them would be 3 MB for each request.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        # As they come, the two convolutions say little beside the encoded positions: the outputs of two
        # inputs were 0.17 apart, and bfloat16 alone was off by 0.04. With He's scale they are 2 apart.
        for convolution in (encoder.conv1, encoder.conv2):
            nn.init.kaiming_normal_(convolution.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.encoder(features).last_hidden_state
        return states[:, ::100]


def _whisper_encoder_class() -> Any:
    import_transformers()
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder


def _whisper(name: str) -> nn.Module:
    """The encoder of the size "base": 6 layers, width 512, 20.6 million parameters."""
    config = import_transformers().WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        attn_implementation=_ATTENTION,
    )
    return seeded(name, lambda: _EncodedSpeech(_whisper_encoder_class()(config)))


# ------------------------------------------------------------------------------------ specs


def _resnet_spec(
    name: str, depths: list[int], sizes: list[int], layer: str, *, stem: int = 64, pixels: int = 224
) -> ModelSpec:
    return ModelSpec(
        name,
        lambda: _resnet(name, depths, sizes, layer, stem),
        (3, pixels, pixels),
        labels=("image",),
    )


def _text_spec(name: str, build: Callable[[], nn.Module], tokens: int, words: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        build=build,
        input_shape=(tokens,),
        input_dtype="int64",
        input_high=words,
        labels=("text",),
    )


def _masked_spec(name: str, model: str, words: int) -> ModelSpec:
    ids, mask = (Tensor(each, "int64", (VARIES,)) for each in ("input_ids", "attention_mask"))
    spec = ModelSpec(
        name=name,
        build=lambda: _MaskedBert(_bert(model)).eval(),
        input_shape=(),
        input_high=words,
        labels=("text",),
    )
    return taking(spec, (ids, mask), _TEXT_LENGTHS)


#: The length classes of texts, unless the worker's file says others; BERT's positions end there.
_TEXT_LENGTHS = (64, 128, 256, 512)
_BASIC = [64, 128, 256, 512]
_BOTTLENECK = [256, 512, 1024, 2048]
_BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}

ZOO: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _resnet_spec("resnet18", [2, 2, 2, 2], _BASIC, "basic"),
        _resnet_spec("resnet50", [3, 4, 6, 3], _BOTTLENECK, "bottleneck"),
        _resnet_spec("resnet101", [3, 4, 23, 3], _BOTTLENECK, "bottleneck"),
        _resnet_spec("resnet152", [3, 8, 36, 3], _BOTTLENECK, "bottleneck"),
        _resnet_spec("resnet_tiny", [1, 1, 1, 1], [32, 64, 128, 256], "basic", stem=32, pixels=64),
        ModelSpec(
            "mobilenet_v2", lambda: _mobilenet_v2("mobilenet_v2"), (3, 224, 224), labels=("image",)
        ),
        ModelSpec("vit_base", lambda: _vit("vit_base"), (3, 224, 224), labels=("image",)),
        _text_spec("bert_base", lambda: _bert("bert_base"), 128, 30_000),
        _text_spec("bert_large", lambda: _bert("bert_large", **_BERT_LARGE), 128, 30_000),
        _masked_spec("bert_masked", "bert_base", 30_000),
        _text_spec("gpt2", lambda: _gpt2("gpt2", 64), 64, 50_000),
        ModelSpec("whisper", lambda: _whisper("whisper"), (80, 3000), labels=("audio",)),
    )
}
