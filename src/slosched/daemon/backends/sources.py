"""What a worker offers: the zoo, libraries' models, and those of its own config: a factory, an exported
program, weights beside a config.

Only the operator's config leads here. Nothing that comes over the network is imported or opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from slosched import discovery
from slosched.config import LIBRARY_PREFIXES, ModelSource, WorkerConfig, canonical_model
from slosched.daemon.backends.formats import in_format, takes_images
from slosched.daemon.backends.libraries import library_spec, library_specs
from slosched.daemon.backends.pretrained import from_safetensors
from slosched.daemon.backends.zoo import ZOO, ModelSpec, import_zoo
from slosched.errors import ExtensionError, InvalidConfig, MissingPackage

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

    Raises InvalidConfig for a path that is not a file, a shape that is not the model's, or a
    channels_last that it cannot have; MissingPackage; UnknownName for a name that is neither the zoo's
    nor its library's.
    """
    for path in (source.pt2, source.safetensors, source.config):
        if path and not Path(path).is_file():
            raise InvalidConfig(f"model {source.name!r}: there is no file {path}{_beside(path)}")
    spec = _zoo_spec(source) if _of_zoo(source) else _spec_in_float32(source)
    if source.channels_last and not takes_images(spec):
        raise InvalidConfig(
            f"model {source.name!r}: channels_last is for inputs of (channels, height, width), not "
            f"{spec.input_shape}"
        )
    return in_format(spec, source.dtype, channels_last=source.channels_last)


def _beside(path: str) -> str:
    """What the path could have meant: a folder was given, or its weights are in several files."""
    given = Path(path)
    if given.is_dir():
        return "; that is a folder: name the file in it"
    index = given.with_name(given.name + ".index.json")
    return f"; its weights are in several files: name {index.name}" if index.is_file() else ""


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
        build = lambda: from_safetensors(source)  # noqa: E731
        if not source.output:
            source = replace(source, output=_LOGITS)
    else:
        spec = library_spec(source.name)
        return replace(
            spec, input_shape=source.input_shape or spec.input_shape, output=source.output
        )
    return ModelSpec(
        name=source.name,
        build=build,
        input_shape=source.input_shape,
        input_dtype=source.input_dtype,
        random_weights=False,
        output=source.output,
    )


def imported(source: ModelSource, named: str) -> Any:
    """The function that `named`, "package.module:function", names. Raises InvalidConfig.

    A module that is not installed is looked for beside the worker's file, last of all, so that no file there
    takes the place of an installed one.
    """
    folder = source.folder
    beside = f"; looked beside the worker's file, too, in {folder}" if folder else ""
    try:
        return discovery.imported(named, folder, looked_in=beside)
    except ExtensionError as error:
        raise InvalidConfig(
            f"model {source.name!r}: {named!r} {error}; write package.module:function"
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
            f"model {source.name!r}: {source.pt2} is not an exported program: {error}"
        ) from None
    module: nn.Module = program.module()  # its mode was fixed by the export
    return module


#: What errors of models say that want more, or another kind of, input than one tensor of numbers.
_WANTS_MORE = re.compile(
    r"missing \d+ required (positional|keyword-only) argument"
    r"|You (have to|must|need to) (specify|provide|pass)|(decoder_)?inputs_embeds|pytree|tree ?spec"
    r"|(input_ids|inputs_embeds|decoder_\w+|pixel_values) (is|are|must|cannot)",
    re.IGNORECASE,
)
_WANTS_INDICES = re.compile(r"argument #1 'indices' to have one of", re.IGNORECASE)
_SHAPE_ADVICE = "if that is not what it takes, correct input_shape (of one request) and input_dtype"


class Described(Protocol):
    """What the operator said of a model's inputs: a ModelSpec, say."""

    @property
    def name(self) -> str: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def input_dtype(self) -> str: ...


def explain_forward_error(error: BaseException, spec: Described) -> str:
    """Why the model of `spec` does not run, and what to do, in one sentence or two for the operator.

    For whatever a forward of a made-up batch raised: it needs further inputs, other numbers or another
    shape than the worker's file says.
    """
    what = f"{type(error).__name__}: {error}".strip().rstrip(":")
    given = f"one tensor of {spec.input_dtype} (batch, {', '.join(map(str, spec.input_shape))})"
    text = str(error)
    if isinstance(error, TypeError | ValueError) and _WANTS_MORE.search(text):
        return (
            f"model {spec.name!r} does not run on {given}: it wants more inputs ({what}). A request is one "
            "tensor of one fixed shape: wrap the model in a module whose forward takes one tensor, and "
            "makes the others or splits them off it, and name it as a factory"
        )
    if _WANTS_INDICES.search(text):
        return (
            f"model {spec.name!r} does not run on {given}: it takes indices, such as tokens ({what}); set "
            'input_dtype = "int64"'
        )
    return f"model {spec.name!r} does not run on {given} ({what}); {_SHAPE_ADVICE}"
