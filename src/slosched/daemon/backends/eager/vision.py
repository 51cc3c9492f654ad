"""Image models: torchvision's by name (classification, detection, segmentation), the zoo's and timm's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from slosched.daemon.backends.eager.building import built
from slosched.daemon.backends.eager.model import EagerModel, dtype_of, generator
from slosched.daemon.backends.libraries import library_spec
from slosched.daemon.backends.zoo import ZOO, ModelSpec, import_transformers
from slosched.errors import InvalidConfig, MissingPackage, UnknownName
from slosched.share_spec import Job

#: Height and width where the job names none: of Deft's pictures, of torchvision's segmentation, of ImageNet.
_DETECTED, _SEGMENTED, _CLASSIFIED = (720, 1280), (520, 520), (224, 224)
#: Boxes before and after suppression, for each image. A network of random weights finds any number or none.
_CANDIDATES, _KEPT, _KEPT_MASKS = 1000, 100, 20


class Vision(EagerModel):
    """Any of torchvision's models by the name of its constructor, on one random picture of the job's size.

    Without torchvision the zoo has resnet18, 50, 101 and 152, vit_b_16 and vit_l_16 in the same shapes.
    `timm/NAME`: timm's. Detection's own resizing is to the job's size, so that it changes nothing.
    """

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        self._dtype, self._device = dtype_of(job.dtype, torch.float32), device
        self._listed = False  # detection takes a list of pictures, and answers with one
        shape = self._make(job, small=small)
        picture = torch.rand((job.batch, *shape), generator=generator(seed)).to(self._dtype)
        self._picture = picture.pin_memory() if device.type == "cuda" else picture
        if self._listed:
            self._fix_candidates()

    def _make(self, job: Job, *, small: bool) -> tuple[int, ...]:
        """Make `module`; returns the shape of a picture."""
        name = "resnet_tiny" if small else job.model.removeprefix("torchvision/")
        if name.startswith("timm/"):
            return self._of_spec(library_spec(name), job)
        torchvision = _torchvision()
        if torchvision is None or small:
            return self._of_spec(_without_torchvision(name), job)
        if name not in torchvision.list_models():
            if name in ZOO:
                return self._of_spec(ZOO[name], job)
            raise UnknownName("model", job.model, torchvision.list_models())
        if name in torchvision.list_models(module=torchvision.detection):
            return self._detector(torchvision, name, job)
        segments = name in torchvision.list_models(module=torchvision.segmentation)
        if not segments and name not in torchvision.list_models(module=torchvision):
            raise InvalidConfig(
                f"model {name!r}: of torchvision's models those for classification, detection and "
                "segmentation can be run"
            )
        none: dict[str, Any] = {"weights": None}
        if segments:
            none["weights_backbone"] = None
        height, width = _size(job, _SEGMENTED if segments else _CLASSIFIED)
        if name.startswith("vit_") and job.size != (0, 0):
            if height != width:
                raise InvalidConfig(f"job {job.name!r}: {name} takes square pictures")
            none["image_size"] = height
        self.module = self._built(name, lambda: torchvision.get_model(name, **none))
        self.note = "one random picture"
        if segments:
            self.note += "; the answer is the likeliest class of each pixel"
        return (3, height, width)

    def _of_spec(self, spec: ModelSpec, job: Job) -> tuple[int, ...]:
        if len(spec.input_shape) != 3 or spec.inputs:
            raise InvalidConfig(f"model {spec.name!r} does not take one picture")
        self.module = self._built(spec.name, spec.build)
        self.note = "one random picture; the network is transformers' or timm's"
        height, width = _size(job, (spec.input_shape[1], spec.input_shape[2]))
        if (height, width) != spec.input_shape[1:] and "vit" in spec.name:
            raise InvalidConfig(
                f"job {job.name!r}: {job.model} takes pictures of {spec.input_shape[1]}x"
                f"{spec.input_shape[2]}; leave the size out"
            )
        return (spec.input_shape[0], height, width)

    def _built(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        return built(name, make, self._device, self._dtype)

    # ---------------------------------------------------------------------------- detection

    def _detector(self, torchvision: Any, name: str, job: Job) -> tuple[int, ...]:
        model: Any = self._built(
            name,
            lambda: torchvision.get_model(name, weights=None, weights_backbone=None),
        )
        height, width = _size(job, _DETECTED)
        if job.size != (0, 0):
            transform = model.transform
            if getattr(transform, "fixed_size", None) is not None:
                transform.fixed_size = (width, height)
            else:
                transform.min_size, transform.max_size = (min(job.size),), max(job.size)
        masks = getattr(getattr(model, "roi_heads", None), "mask_predictor", None) is not None
        kept = _KEPT_MASKS if masks else _KEPT
        _head(model).detections_per_img = kept
        for module in model.modules():  # without trained statistics each block doubles the variance
            last: Any = getattr(module, "bn3", getattr(module, "bn2", None))
            if isinstance(getattr(last, "weight", None), torch.Tensor):
                nn.init.constant_(last.weight, 0.5)
        self.module, self._listed = model, True
        self.note = (
            f"one random picture; the score threshold is set so that {_CANDIDATES} boxes are candidates, and "
            f"the best {kept} stay" + ("; masks stay on the device" if masks else "")
        )
        return (3, height, width)

    def _fix_candidates(self) -> None:
        """Set the score threshold, from one run: boxes that pass it are CANDIDATES for each picture."""
        found: list[torch.Tensor] = []
        model: Any = self.module
        heads = getattr(model, "roi_heads", None)
        hooked = model.head if heads is None else heads.box_predictor

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(
                _scores(output, softmax=heads is not None or type(model).__name__ == "SSD")
            )

        _head(model).score_thresh = 0.0  # heads behind it may not take an empty list
        hook = hooked.register_forward_hook(keep)
        try:
            self.run(lambda: None)
        finally:
            hook.remove()
        flat = found[0].float().flatten()
        number = min(len(flat), _CANDIDATES * len(self._picture))
        _head(model).score_thresh = float(torch.topk(flat, number).values[-1])

    # ------------------------------------------------------------------------------ requests

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        pictures = self._picture.to(self._device, non_blocking=True)
        if self._listed:
            return [
                value
                for each in self.module(list(pictures))
                for key, value in each.items()
                if key != "masks"
            ]
        found = self.module(pictures)
        if isinstance(found, torch.Tensor):
            return [found]
        if "out" in found:  # segmentation: (batch, classes, height, width)
            return [found["out"].argmax(1).to(torch.uint8)]
        return [found["logits"]]


def _torchvision() -> Any:
    """torchvision.models; None where it is not installed, or does not fit this torch."""
    with suppress(ImportError, RuntimeError):
        importlib.import_module("torchvision.models.detection")
        importlib.import_module("torchvision.models.segmentation")
        return importlib.import_module("torchvision.models")
    return None


def _without_torchvision(name: str) -> ModelSpec:
    if name in ("vit_b_16", "vit_l_16"):
        return ModelSpec(name, lambda: _vit(large=name == "vit_l_16"), (3, 224, 224))
    if name in ZOO:
        return ZOO[name]
    raise MissingPackage(
        f"model {name!r} is none of our own, and torchvision, which has others, is not installed or does not "
        "fit this torch: pip install torchvision"
    )


def _vit(*, large: bool) -> nn.Module:
    transformers = import_transformers()
    sizes = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    config = transformers.ViTConfig(num_labels=1000, **(sizes if large else {}))
    network: nn.Module = transformers.ViTForImageClassification(config)
    return network


def _size(job: Job, usual: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the job's pictures. Raises InvalidConfig."""
    if job.size == (0, 0):
        return usual
    if not all(32 <= each <= 16384 for each in job.size):
        raise InvalidConfig(
            f"job {job.name!r}: size {job.size[0]}x{job.size[1]}; pictures have 32 to 16384 pixels a side"
        )
    return job.size


def _head(model: Any) -> Any:
    """What holds `score_thresh` and `detections_per_img`: the second stage, or the model of one stage."""
    return getattr(model, "roi_heads", model)


def _scores(output: Any, *, softmax: bool) -> torch.Tensor:
    """The scores of the classes behind the background, or of all where each stands for itself."""
    logits = output[0] if isinstance(output, tuple) else output["cls_logits"]
    if softmax:
        return torch.softmax(logits, dim=-1)[..., 1:]
    scores = torch.sigmoid(logits)
    if not isinstance(output, tuple) and "bbox_ctrness" in output:  # FCOS
        return (scores * torch.sigmoid(output["bbox_ctrness"])).sqrt()
    return scores
