"""Models of libraries, where the worker's config names the library: classifiers of torchvision and timm,
diffusion models that are built with diffusers, and those of published sharing experiments.

Only names of the library's own list are ever built: a name that a client sends is looked up, and never
imported or fetched. Weights are random, drawn from a seed made of the name; nothing is downloaded.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from slosched.daemon.backends.diffusion import diffusion_specs
from slosched.daemon.backends.originals import originals_specs
from slosched.daemon.backends.zoo import ModelSpec, seeded
from slosched.errors import MissingPackage, UnknownName

#: One request, where a library does not say more.
_IMAGE = (3, 224, 224)


def library_specs(library: str) -> dict[str, ModelSpec]:
    """The models of `library`, one of LIBRARIES, by the name that a worker offers: LIBRARY/NAME.

    Imports the library. Raises MissingPackage if it is not installed or does not fit this torch.
    """
    if library == "diffusion":
        return diffusion_specs()
    if library == "originals":
        return originals_specs()
    package = _imported(library)
    if library == "torchvision":  # without `module` it lists detectors and segmenters, too
        return {
            f"torchvision/{name}": _spec(f"torchvision/{name}", package.get_model, _IMAGE)
            for name in package.list_models(module=package)
        }
    return {
        f"timm/{name}": _spec(f"timm/{name}", package.create_model, _timm_shape(package, name))
        for name in package.list_models()
    }


def library_spec(name: str) -> ModelSpec:
    """The one model `name`, LIBRARY/NAME. Raises MissingPackage or UnknownName."""
    library = name.partition("/")[0]
    specs = library_specs(library)
    if name not in specs:
        raise UnknownName(f"model of {library}", name, list(specs))
    return specs[name]


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(
            "torchvision.models" if library == "torchvision" else library
        )
    except (ImportError, RuntimeError) as error:  # the latter: built for another torch
        raise MissingPackage(
            f"the models of {library} need it, and it is not installed or does not fit this torch "
            f"({error}): pip install {library}, or leave it out"
        ) from None


def _timm_shape(timm: Any, name: str) -> tuple[int, ...]:
    """What a model is trained on. Those without a config of their own take what timm's default is."""
    known = timm.get_pretrained_cfg(name)
    return _IMAGE if known is None else tuple(known.input_size)


def _spec(name: str, make: Any, input_shape: tuple[int, ...]) -> ModelSpec:
    def build() -> nn.Module:
        return seeded(name, lambda: make(name.partition("/")[2]))

    return ModelSpec(name, build, input_shape, labels=("image",))
