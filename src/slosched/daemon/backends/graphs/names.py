"""What the names of jobs' models stand for, and which of them can be captured. Nothing here needs torch."""

from __future__ import annotations

import re

from slosched.share_spec import Job, Run

#: The short names of the published experiments, and the models of libraries that they mean.
LIBRARY_NAMES = {
    "diffusion": "diffusion/sdxl",
    "whisper": "originals/whisper",
    "bert": "originals/bert",
    "gpt": "originals/gpt",
    "gpt2": "originals/gpt2",
}
_PREFIXES = ("originals/", "diffusion/", "timm/")
_TORCHVISION = "torchvision/"
#: torchvision's classification and segmentation models, whose work depends on no values. Those of detection
#: keep as many boxes as they find, so they cannot be captured.
_FIXED = re.compile(
    r"(alexnet|convnext_\w+|densenet\d+|efficientnet_\w+|googlenet|inception_v3|maxvit_t|mnasnet\w+"
    r"|mobilenet_v[23]\w*|regnet_\w+|resne[x]?t\w+|wide_resnet\w+|shufflenet_\w+|squeezenet\w+|swin_\w+"
    r"|vgg\w+|vit_[blh]_\d+)"
)
_SEGMENTATION = re.compile(r"(deeplabv3_\w+|fcn_resnet\w+|lraspp_\w+)")
#: The zoo's (backends/zoo.py), which only torch can import.
_ZOO = ("resnet_tiny", "vit_base", "bert_base", "bert_large", "bert_masked")


def can_capture(job: Job) -> bool:
    """True if the model of `job` is known to run as CUDA graphs, or the job says so: its preparation then finds
    out.
    """
    if job.command:
        return False
    if job.run is Run.GRAPHS:
        return True
    name = LIBRARY_NAMES.get(job.model, job.model)
    return name.startswith(_PREFIXES) or name in _ZOO or bool(torchvision_name(name))


def torchvision_name(name: str) -> str:
    """The name in torchvision.models; empty if `name` is none of a model that can be captured."""
    bare = name.removeprefix(_TORCHVISION)
    return bare if _FIXED.fullmatch(bare) or is_segmentation(bare) else ""


def is_segmentation(bare: str) -> bool:
    """True for torchvision's segmentation models, by their bare names."""
    return bool(_SEGMENTATION.fullmatch(bare))
