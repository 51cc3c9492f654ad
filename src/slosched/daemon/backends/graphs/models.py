"""The models of jobs as CUDA graphs, by name: the same specs as a worker's (backends/sources.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn

from slosched.config import canonical_model
from slosched.daemon.backends.formats import TORCH_DTYPES, dtype_named, in_format
from slosched.daemon.backends.job_models import (
    MODELS,
    is_segmentation,
    library_name,
    torchvision_name,
)
from slosched.daemon.backends.libraries import library_spec
from slosched.daemon.backends.sources import source_spec
from slosched.daemon.backends.zoo import ZOO, ModelSpec, seeded
from slosched.errors import InvalidConfig, UnknownName
from slosched.model_source import ModelSource
from slosched.share_spec import Job

_PIXELS, _SEGMENTED_PIXELS, _INCEPTION_PIXELS = 224, 520, 299


def job_spec(job: Job) -> ModelSpec:
    """The model of `job`, with random weights. Nothing is built yet.

    Raises UnknownName, InvalidConfig (a size or a dtype that it cannot have) and MissingPackage.
    """
    name = library_name(job.model)
    library = name.partition("/")[0]
    if ":" in name:
        return _from_factory(job)
    if library in ("originals", "diffusion"):
        return _of_numbers(job, name)
    bare = torchvision_name(name)
    if bare and (find_spec("torchvision") is not None or name != bare or bare not in ZOO):
        return _of_torchvision(job, bare)
    if library == "timm":
        spec = library_spec(name)
        return _formatted(job, replace(spec, input_shape=_shape(job, spec.input_shape)))
    known = ZOO.get(canonical_model(name))
    if known is None:
        raise UnknownName(
            "model", job.model, [name for name, known in MODELS.items() if known.library] + [*ZOO]
        )
    _refuse_size(job, known.input_shape)
    return _formatted(job, known)


def _of_numbers(job: Job, name: str) -> ModelSpec:
    """One of those whose weights are drawn in their precision: converting billions would take minutes."""
    from slosched.daemon.backends.diffusion.building import build
    from slosched.daemon.backends.originals.building import original_spec
    from slosched.daemon.backends.originals.designs import DESIGNS

    _refuse_size(job, ())
    if name.startswith("originals/"):
        if name.removeprefix("originals/") not in DESIGNS:
            raise UnknownName("model", job.model, [f"originals/{each}" for each in DESIGNS])
        return original_spec(name, dtype_of(job, ""))
    dtype = dtype_of(job, "float16")
    spec = library_spec(name)
    make: Callable[[], nn.Module] = partial(build, name, TORCH_DTYPES[dtype])
    return replace(spec, build=make, labels=(*spec.labels, dtype))


def _of_torchvision(job: Job, bare: str) -> ModelSpec:
    if find_spec("torchvision") is None:
        library_spec(f"torchvision/{bare}")  # says what is missing
    models: Any = importlib.import_module("torchvision.models")
    segments = is_segmentation(bare)
    pixels = _SEGMENTED_PIXELS if segments else _PIXELS
    pixels = _INCEPTION_PIXELS if bare == "inception_v3" else pixels
    shape = _shape(job, (3, pixels, pixels))
    more: dict[str, Any] = {"weights_backbone": None} if segments else {}
    if bare in ("googlenet", "inception_v3"):
        more["init_weights"] = True  # else it warns that this takes long
    if bare.startswith("vit_") and job.size != (0, 0):
        if shape[1] != shape[2]:
            raise InvalidConfig(f"job {job.name!r}: {bare} takes square images, not {job.size}")
        more["image_size"] = shape[1]

    def build() -> nn.Module:
        return seeded(bare, lambda: models.get_model(bare, weights=None, **more))

    spec = ModelSpec(f"torchvision/{bare}", build, shape, labels=("image",))
    return _formatted(job, replace(spec, output="out") if segments else spec)


def _from_factory(job: Job) -> ModelSpec:
    dtype = dtype_of(job, "float32")
    source = ModelSource(
        name=job.model,
        factory=job.model,
        input_shape=_shape(job, (3, _PIXELS, _PIXELS)),
        dtype=dtype,
        channels_last=dtype != "float32",
    )
    return source_spec(source)


def _formatted(job: Job, spec: ModelSpec) -> ModelSpec:
    """In the job's precision; half precisions in the format of images that their kernels want."""
    dtype = dtype_of(job, "float32")
    return in_format(spec, dtype, channels_last=dtype != "float32")


def _shape(job: Job, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    if job.size == (0, 0):
        return otherwise
    if min(job.size) < 1:
        raise InvalidConfig(f"job {job.name!r}: an image of {job.size} has no pixels")
    return (3, *job.size)


def _refuse_size(job: Job, shape: tuple[int, ...]) -> None:
    if job.size not in ((0, 0), shape[1:]):
        raise InvalidConfig(
            f"job {job.name!r}: the size of what {job.model} takes cannot be chosen; leave size out"
        )


def dtype_of(job: Job, published: str) -> str:
    """The precision of the job's weights; `published` where it does not say. Raises InvalidConfig."""
    try:
        return dtype_named(job.dtype) if job.dtype else published
    except InvalidConfig as error:
        raise InvalidConfig(f"job {job.name!r}: {error}") from None
