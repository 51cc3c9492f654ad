"""Models from the worker's own config: a factory, an exported program, weights beside a config.

Only the operator's config leads here. Nothing that comes over the network is imported or opened.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slosched.config import ModelSource, canonical_model
from slosched.config_file import LIBRARY_PREFIXES
from slosched.daemon.backends.zoo import ZOO, ModelSpec, import_transformers, seeded
from slosched.errors import InvalidConfig, MissingPackage, UnknownName

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def loadable_specs(sources: tuple[ModelSource, ...]) -> dict[str, ModelSpec]:
    """The zoo and the config's models by canonical name; the config's go before the zoo's."""
    specs = dict(ZOO)
    for source in sources:
        specs[canonical_model(source.name)] = source_spec(source)
    return specs


def source_spec(source: ModelSource) -> ModelSpec:
    """The spec of one of the config's models; nothing is imported or opened yet.

    Raises InvalidConfig for an unknown dtype or a path that is no file.
    """
    if source.dtype not in _DTYPES:
        raise InvalidConfig(
            f"model {source.name!r}: dtype {source.dtype!r} is none of {', '.join(_DTYPES)}"
        )
    for path in (source.pt2, source.safetensors, source.config):
        if path and not Path(path).is_file():
            raise InvalidConfig(f"model {source.name!r}: there is no file {path}")
    build: Callable[[], nn.Module]
    random_weights = False
    if source.factory:
        build = lambda: _from_factory(source)  # noqa: E731
    elif source.pt2:
        build = lambda: _from_export(source)  # noqa: E731
    elif source.safetensors:
        build = lambda: _from_safetensors(source)  # noqa: E731
    elif source.name.startswith(LIBRARY_PREFIXES):
        build, random_weights = (lambda: _from_library(source.name)), True
    elif canonical_model(source.name) in ZOO:
        return ZOO[canonical_model(source.name)]
    else:
        raise InvalidConfig(
            f"model {source.name!r}: say where it comes from: factory, pt2 or safetensors"
        )
    dtype = _DTYPES[source.dtype]
    return ModelSpec(
        source.name,
        lambda: build().to(dtype) if dtype is not torch.float32 else build(),
        source.input_shape,
        source.input_dtype,
        random_weights=random_weights,
        labels=(source.dtype,) if dtype is not torch.float32 else (),
    )


def _from_factory(source: ModelSource) -> nn.Module:
    module_name, _, function = source.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidConfig(
            f"model {source.name!r}: factory {source.factory!r} cannot be imported ({error}); write "
            "package.module:function"
        ) from None
    model = factory()
    if not isinstance(model, nn.Module):
        raise InvalidConfig(
            f"model {source.name!r}: {source.factory} returned a {type(model).__name__}, no nn.Module"
        )
    return model.eval()


def _from_export(source: ModelSource) -> nn.Module:
    try:
        program = torch.export.load(source.pt2)
    except Exception as error:
        raise InvalidConfig(
            f"model {source.name!r}: {source.pt2} is no exported program: {error}"
        ) from None
    module: nn.Module = program.module()  # its mode was fixed by the export
    return module


def _from_safetensors(source: ModelSource) -> nn.Module:
    transformers = import_transformers()
    from safetensors.torch import load_file

    try:
        values: dict[str, Any] = json.loads(Path(source.config).read_text(encoding="utf-8"))
        config = transformers.AutoConfig.for_model(**values)
        model_class = getattr(transformers, values["architectures"][0])
        model: nn.Module = model_class(config)
        missing, unexpected = model.load_state_dict(load_file(source.safetensors), strict=False)
    except Exception as error:
        raise InvalidConfig(
            f"model {source.name!r}: cannot build it from {source.config} and {source.safetensors}: "
            f"{type(error).__name__}: {error}"
        ) from None
    # Counters of training are often left out of a file; a missing weight is another matter.
    lacking = [key for key in missing if not key.endswith("num_batches_tracked")]
    if lacking or unexpected:
        raise InvalidConfig(
            f"model {source.name!r}: {source.safetensors} does not fit its config: lacks "
            f"{lacking[:3] or 'nothing'}, has unknown {list(unexpected)[:3] or 'nothing'}"
        )
    return model.eval()


def _from_library(name: str) -> nn.Module:
    library, _, model = name.partition("/")
    try:
        package = importlib.import_module(
            f"{library}.models" if library == "torchvision" else library
        )
    except ImportError:
        raise MissingPackage(f"model {name!r} needs {library}, which is not installed") from None
    make = package.get_model if library == "torchvision" else package.create_model
    try:
        return seeded(name, lambda: make(model))
    except (ValueError, RuntimeError) as error:
        raise UnknownName(f"{library} model ({error})", model, []) from None
