"""The zoo: models that every torch worker offers by name, built from transformers' configs alone.

Weights are random, because none travel with this package, and drawn from a seed made of the name: every
copy, process and machine has the same ones, so a served output can be compared with a direct forward.
Nothing is downloaded. Operators add models of their own in the worker's config (sources.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slosched.errors import MissingPackage

#: Batch sizes that a torch worker measures and offers, up to what the controller asks for.
BATCH_CLASSES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class ModelSpec:
    """How to make one model. Shapes are those of one request, without the batch dimension.

    `build` returns a module in eval mode on the CPU that maps one input tensor (batch, *input_shape)
    to one output tensor (batch, *output_shape), or to something with `logits`.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    random_weights: bool = True
    input_high: int = 0  # integer inputs that a worker makes up lie in 0..input_high-1
    labels: tuple[str, ...] = ()


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


def _resnet(name: str, depths: list[int], sizes: list[int], layer: str, stem: int) -> nn.Module:
    transformers = import_transformers()
    config = transformers.ResNetConfig(
        embedding_size=stem, depths=depths, hidden_sizes=sizes, layer_type=layer, num_labels=1000
    )
    return seeded(name, lambda: _calm(transformers.ResNetForImageClassification(config)))


def _calm(model: nn.Module) -> nn.Module:
    # He et al.'s initialisation doubles the variance in each residual block, and nothing undoes it here,
    # since the running statistics are those of an untrained network. Half the scale at the end of each
    # block keeps the logits below 1, and the outputs of two inputs 0.01 and more apart, so that a
    # comparison with a tolerance of 1e-4 tells right from wrong.
    for block in model.modules():
        if hasattr(block, "shortcut") and isinstance(block.layer, nn.Module):
            last = [m for m in block.layer.modules() if isinstance(m, nn.BatchNorm2d)][-1]
            nn.init.constant_(last.weight, 0.5)
    return model


def _bert(name: str) -> nn.Module:
    transformers = import_transformers()
    config = transformers.BertConfig(num_labels=2, attn_implementation="eager")
    return seeded(name, lambda: transformers.BertForSequenceClassification(config))


def _resnet_spec(
    name: str, depths: list[int], sizes: list[int], layer: str, *, stem: int = 64, pixels: int = 224
) -> ModelSpec:
    return ModelSpec(
        name,
        lambda: _resnet(name, depths, sizes, layer, stem),
        (3, pixels, pixels),
        labels=("image",),
    )


ZOO: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _resnet_spec("resnet18", [2, 2, 2, 2], [64, 128, 256, 512], "basic"),
        _resnet_spec("resnet50", [3, 4, 6, 3], [256, 512, 1024, 2048], "bottleneck"),
        _resnet_spec(
            "resnet_tiny", [1, 1, 1, 1], [32, 64, 128, 256], "basic", stem=32, pixels=64
        ),
        ModelSpec(
            "bert_base", lambda: _bert("bert_base"), (128,), "int64", input_high=30_000,
            labels=("text",),
        ),
    )
}  # fmt: skip


def output_tensor(output: Any) -> torch.Tensor:
    """The tensor to answer with: the output itself, its `logits`, or the first of several; float32.

    Raises TypeError if there is none.
    """
    if not isinstance(output, torch.Tensor):
        output = getattr(output, "logits", None) if hasattr(output, "logits") else output[0]
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}, no tensor")
    return output.float() if output.is_floating_point() else output
