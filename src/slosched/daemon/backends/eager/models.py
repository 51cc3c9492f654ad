"""The models that run eagerly, by name. Importing this imports neither torch nor a library of models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from slosched.errors import InvalidConfig, UnknownName
from slosched.share_spec import Job

if TYPE_CHECKING:
    import torch

    from slosched.daemon.backends.eager.model import EagerModel

_ROOM = "slosched.daemon.backends.eager."
_VISION = "vision:Vision"
#: More rows than any of these models can take in one request.
_MOST_ROWS = 65_536


_DETECTORS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
_SEGMENTERS = (
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
_CLASSIFIERS = ("resnet18", "resnet50", "resnet101", "resnet152", "vit_b_16", "vit_l_16")

#: Where each is made, `module:class`. Other names of torchvision, `timm/NAME` and `diffusion/NAME` run, too.
ENTRIES: dict[str, str] = {
    "diffusion": "diffusion:Diffusion",  # SDXL, float16: 50 steps with guidance, 1024x1024, decoder
    "whisper": "audio:Whisper",  # whisper-small, float32: 30 s of speech to 32 tokens
    "bert": "language:Bert",  # bert-large with its head for masked words, float32, 11 tokens
    "gpt": "language:GptJ",  # GPT-J-6B, float16: 10 tokens continued up to 100
    "gpt2": "language:Gpt2",  # GPT-2, float32: 10 tokens continued up to 100
    "bloom-560m": "language:Bloom",  # BLOOM, float32: 10 tokens continued up to 100
    "codegen-350M-mono": "language:CodeGen",  # CodeGen, float32: the same
    **dict.fromkeys(_DETECTORS, _VISION),
    **dict.fromkeys(_SEGMENTERS, _VISION),
    **dict.fromkeys(_CLASSIFIERS, _VISION),
    "tiny": "tiny:Tiny",  # layers of a chosen time, for tests: tiny:LAYERS:MS
    "tiny-conv": "tiny:TinyConv",  # four small convolutions, for tests
    "tiny-gpt": "language:TinyGpt",  # a text of two small layers, for tests
}

#: Names that mean one model whatever follows: Deft calls these by the sizes of their checkpoints.
_BEGINNINGS = {
    "bloom": "bloom-560m",
    "codegen": "codegen-350M-mono",
    "diffusion/": "diffusion",
}


def open_model(job: Job, device: torch.device, seed: int, *, small: bool = False) -> EagerModel:
    """The model of `job` on `device`. `small`: with few and narrow layers, to try its code without a GPU.

    Raises UnknownName, InvalidConfig and MissingPackage.
    """
    if not 1 <= job.batch <= _MOST_ROWS:
        raise InvalidConfig(f"job {job.name!r}: a batch of {job.batch}; it is 1 to {_MOST_ROWS}")
    module, _, name = made_by(job.model).partition(":")
    make: Callable[..., EagerModel] = getattr(importlib.import_module(_ROOM + module), name)
    return make(job, device, seed, small=small)


def made_by(model: str) -> str:
    """Where `model` is made. Raises UnknownName for what no library can have, or one of these names misspelt.

    Whether a library has the name is known when it is opened.
    """
    bare = model.removeprefix("originals/").partition(":")[0]
    for start, name in _BEGINNINGS.items():
        if bare.startswith(start):
            return ENTRIES[name]
    if bare in ENTRIES and (bare == "tiny" or ":" not in model):
        return ENTRIES[bare]
    if model.startswith(("torchvision/", "timm/")):
        return _VISION
    unknown = UnknownName("model", model, list(ENTRIES))
    if "did you mean" in str(unknown) or not model.replace("/", "").replace("_", "").isalnum():
        raise unknown
    return _VISION
