"""The models of sharing experiments by name: what makes each eagerly, and what it is as CUDA graphs.

The one table of these names. It is plain data: importing it imports neither torch nor a library of models.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from slosched.errors import UnknownName
from slosched.share_spec import Job, Run


class JobModel(NamedTuple):
    """`eager`: what makes it, `module:class` below backends/eager. `library`: the model of a library that the
    name means where it runs as graphs (backends/libraries.py); empty: none but one of the same name."""

    eager: str
    library: str = ""


_VISION = JobModel("vision:Vision")
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
_CLASSIFIERS = (
    "resnet18",
    "resnet50",
    "resnet101",
    "resnet152",
    "vit_b_16",
    "vit_l_16",
    "mobilenet_v3_small",
)

#: Other names of torchvision, `timm/NAME`, `diffusion/NAME` and (as graphs) `originals/NAME` run, too.
MODELS: dict[str, JobModel] = {
    "diffusion": JobModel("diffusion:Diffusion", "diffusion/sdxl"),  # float16, 50 steps, 1024x1024
    "whisper": JobModel("audio:Whisper", "originals/whisper"),  # whisper-small, 32 tokens
    "bert": JobModel("language:Bert", "originals/bert"),  # bert-large's masked words, 11 tokens
    "gpt": JobModel("language:GptJ", "originals/gpt"),  # GPT-J-6B, float16: 10 tokens up to 100
    "gpt2": JobModel("language:Gpt2", "originals/gpt2"),  # like all others float32
    "bloom-560m": JobModel("language:Bloom"),
    "codegen-350M-mono": JobModel("language:CodeGen"),
    **dict.fromkeys((*_DETECTORS, *_SEGMENTERS, *_CLASSIFIERS), _VISION),
    "tiny": JobModel("tiny:Tiny"),  # for tests: layers of a chosen time, tiny:LAYERS:MS
    "tiny-conv": JobModel("tiny:TinyConv"),
    "tiny-gpt": JobModel("language:TinyGpt"),
}
#: Names that mean one model whatever follows: Deft calls these by the sizes of their checkpoints.
_BEGINNINGS = {"bloom": "bloom-560m", "codegen": "codegen-350M-mono", "diffusion/": "diffusion"}
_LIBRARIES = ("originals/", "diffusion/", "timm/")
_TORCHVISION = "torchvision/"
#: torchvision's classification models, whose work depends on no values, as that of segmentation does not. Those
#: of detection keep as many boxes as they find, so they cannot be captured.
_FIXED = re.compile(
    r"(alexnet|convnext_\w+|densenet\d+|efficientnet_\w+|googlenet|inception_v3|maxvit_t|mnasnet\w+"
    r"|mobilenet_v[23]\w*|regnet_\w+|resne[x]?t\w+|wide_resnet\w+|shufflenet_\w+|squeezenet\w+|swin_\w+"
    r"|vgg\w+|vit_[blh]_\d+)"
)
#: The zoo's (backends/zoo.py), which only torch can import.
_ZOO = ("resnet_tiny", "vit_base", "bert_base", "bert_large", "bert_masked")


def made_by(model: str) -> str:
    """What makes `model` eagerly, `module:class`. Raises UnknownName for what no library can have, or a name of
    the table misspelt.

    Whether a library has the name is known when it is opened.
    """
    bare = model.removeprefix("originals/").partition(":")[0]
    for start, name in _BEGINNINGS.items():
        if bare.startswith(start):
            return MODELS[name].eager
    if bare in MODELS and (bare == "tiny" or ":" not in model):
        return MODELS[bare].eager
    if model.startswith((_TORCHVISION, "timm/")):
        return _VISION.eager
    unknown = UnknownName("model", model, list(MODELS))
    if "did you mean" in str(unknown) or not model.replace("/", "").replace("_", "").isalnum():
        raise unknown
    return _VISION.eager


def library_name(model: str) -> str:
    """The name that graphs are made by: that of the library's model which `model` means, or `model` itself."""
    return (MODELS[model].library if model in MODELS else "") or model


def can_capture(job: Job) -> bool:
    """True if the model of `job` is known to run as graphs, or the job says so: preparing it then finds out."""
    if job.command:
        return False
    if job.run is Run.GRAPHS:
        return True
    name = library_name(job.model)
    return name.startswith(_LIBRARIES) or name in _ZOO or bool(torchvision_name(name))


def torchvision_name(name: str) -> str:
    """The name in torchvision.models; empty if `name` is none of a model that can be captured."""
    bare = name.removeprefix(_TORCHVISION)
    return bare if _FIXED.fullmatch(bare) or is_segmentation(bare) else ""


def is_segmentation(bare: str) -> bool:
    """True for torchvision's segmentation models, by their bare names."""
    return bare in _SEGMENTERS
