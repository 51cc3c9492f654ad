"""What a worker offers: the zoo, libraries' models, and those of its own config: a factory, an exported
program, weights beside a config.

Only the operator's config leads here. Nothing that comes over the network is imported or opened.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slosched.config import LIBRARY_PREFIXES, ModelSource, WorkerConfig, canonical_model
from slosched.daemon.backends.formats import in_format, takes_images
from slosched.daemon.backends.libraries import library_spec, library_specs
from slosched.daemon.backends.zoo import ZOO, ModelSpec, import_transformers, import_zoo
from slosched.errors import InvalidConfig, MissingPackage

#: What transformers' models with a head call their answer; taken if there is one and nothing else is named.
_LOGITS = "logits?"


def worker_specs(config: WorkerConfig) -> dict[str, ModelSpec]:
    """What a worker of `config` offers, by canonical name; the config's models go before the others.

    The zoo, the models of `config.libraries` (which are imported here) and those that the config names;
    not the ones for CuPy. Raises MissingPackage, UnknownName or InvalidConfig.
    """
    offered = dict(ZOO)
    for library in config.libraries:
        offered.update(library_specs(library))
    specs = {
        name: in_format(spec, config.dtype, channels_last=config.channels_last)
        for name, spec in offered.items()
    }
    for source in config.models:
        if not source.cupy:
            specs[canonical_model(source.name)] = source_spec(source)
    return specs


def open_specs(config: WorkerConfig) -> dict[str, ModelSpec]:
    """`worker_specs`, with everything imported that they need: seconds, before the worker is ready.

    Without transformers a worker whose config names other models offers those. Raises MissingPackage
    where nothing would be left, or where the config names a model of the zoo.
    """
    specs = worker_specs(config)
    try:
        import_zoo()
    except MissingPackage:
        named = {canonical_model(source.name) for source in config.models if not source.cupy}
        left = {name: spec for name, spec in specs.items() if name not in ZOO or name in named}
        if not left or any(_of_zoo(source) for source in config.models):
            raise
        return left
    return specs


def source_spec(source: ModelSource) -> ModelSpec:
    """The spec of one of the config's models. A library's is imported; no file is opened yet.

    Raises InvalidConfig for a path that is no file, a shape that is not the model's, or a
    channels_last that it cannot have; MissingPackage; UnknownName for a name that is neither the zoo's
    nor its library's.
    """
    for path in (source.pt2, source.safetensors, source.config):
        if path and not Path(path).is_file():
            raise InvalidConfig(f"model {source.name!r}: there is no file {path}")
    spec = _zoo_spec(source) if _of_zoo(source) else _spec_in_float32(source)
    if source.channels_last and not takes_images(spec):
        raise InvalidConfig(
            f"model {source.name!r}: channels_last is for inputs of (channels, height, width), not "
            f"{spec.input_shape}"
        )
    return in_format(spec, source.dtype, channels_last=source.channels_last)


def _of_zoo(source: ModelSource) -> bool:
    given = source.factory or source.pt2 or source.safetensors or source.cupy
    return not given and not source.name.startswith(LIBRARY_PREFIXES)


def _zoo_spec(source: ModelSource) -> ModelSpec:
    spec = ZOO.get(canonical_model(source.name))
    if spec is None:
        raise InvalidConfig(
            f"model {source.name!r}: say where it comes from: factory, pt2, safetensors or cupy; or name "
            f"one of the zoo: {', '.join(ZOO)}"
        )
    if source.input_shape not in ((), spec.input_shape):
        raise InvalidConfig(
            f"model {source.name!r}: the zoo's takes {list(spec.input_shape)}, not "
            f"{list(source.input_shape)}; leave input_shape out"
        )
    return spec


def _spec_in_float32(source: ModelSource) -> ModelSpec:
    build: Callable[[], nn.Module]
    if source.factory:
        build = lambda: _from_factory(source)  # noqa: E731
    elif source.pt2:
        build = lambda: _from_export(source)  # noqa: E731
    elif source.safetensors:
        build = lambda: _from_safetensors(source)  # noqa: E731
        if not source.output:
            source = replace(source, output=_LOGITS)
    else:
        spec = library_spec(source.name)
        return replace(
            spec, input_shape=source.input_shape or spec.input_shape, output=source.output
        )
    return ModelSpec(
        source.name,
        build,
        source.input_shape,
        source.input_dtype,
        random_weights=False,
        output=source.output,
    )


def imported(source: ModelSource, named: str) -> Any:
    """The function that `named`, "package.module:function", names. Raises InvalidConfig.

    A module that is not installed is looked for beside the worker's file, last of all, so that no file there
    takes the place of an installed one.
    """
    module_name, _, function = named.partition(":")
    if source.folder and source.folder not in sys.path:
        sys.path.append(source.folder)
    try:
        return getattr(importlib.import_module(module_name), function)
    except (Exception, SystemExit) as error:  # the module's own code may raise anything
        beside = (
            f"; looked beside the worker's file, too, in {source.folder}" if source.folder else ""
        )
        raise InvalidConfig(
            f"model {source.name!r}: {named!r} cannot be imported ({type(error).__name__}: {error})"
            f"{beside}; write package.module:function"
        ) from None


def _from_factory(source: ModelSource) -> nn.Module:
    model = imported(source, source.factory)()
    if not isinstance(model, nn.Module):
        raise InvalidConfig(
            f"model {source.name!r}: {source.factory} returned a {type(model).__name__}, not an nn.Module"
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
    """transformers' own loading, from the two files alone: ties and renamed keys are its business."""
    transformers = import_transformers()
    from safetensors.torch import load_file

    try:
        values: dict[str, Any] = json.loads(Path(source.config).read_text(encoding="utf-8"))
        if not values.get("architectures") or not values.get("model_type"):
            raise InvalidConfig(
                f"model {source.name!r}: {source.config} names no architectures and model_type; add them, as "
                '"architectures": ["BertForSequenceClassification"], or save it with save_pretrained'
            )
        config = transformers.AutoConfig.for_model(**values)
        model_class = getattr(transformers, values["architectures"][0])
        transformers.utils.logging.disable_progress_bar()  # a daemon's output is lines
        model, seen = model_class.from_pretrained(
            None,
            config=config,
            state_dict=load_file(source.safetensors),
            output_loading_info=True,
        )
    except InvalidConfig:
        raise
    except Exception as error:
        raise InvalidConfig(
            f"model {source.name!r}: cannot build it from {source.config} and {source.safetensors}: "
            f"{type(error).__name__}: {error}"
        ) from None
    # Counters of training are often left out of a file; a missing weight is another matter.
    lacking = sorted(k for k in seen["missing_keys"] if not k.endswith("num_batches_tracked"))
    unknown = sorted(seen["unexpected_keys"])
    other = sorted(str(each) for each in seen.get("mismatched_keys", ()))
    if lacking or unknown or other:
        raise InvalidConfig(
            f"model {source.name!r}: {source.safetensors} does not fit its config: lacks "
            f"{lacking[:3] or 'nothing'}, has unknown {unknown[:3] or 'nothing'}, of another shape "
            f"{other[:3] or 'nothing'}"
        )
    network: nn.Module = model.eval()
    return network
