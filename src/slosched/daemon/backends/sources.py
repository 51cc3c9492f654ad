"""What a worker offers: the zoo, libraries' models, and those of its own config: a factory, an exported
program, a folder of transformers, weights beside a config.

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
from slosched.daemon.backends.exported_files import read_program
from slosched.daemon.backends.formats import in_format, takes_images
from slosched.daemon.backends.libraries import library_spec, library_specs
from slosched.daemon.backends.pretrained import from_safetensors, in_folder
from slosched.daemon.backends.zoo import ZOO, KnowsInputs, ModelSpec, import_zoo, taking
from slosched.errors import ExtensionError, InvalidConfig, MissingPackage
from slosched.signature import ONLY_INPUT, VARIES, Tensor, described

#: What transformers' models with a head call their answer; taken if there is one and nothing else is named.
_LOGITS = "logits?"
#: What status says of a model whose answers the operator lets depend on padding.
_PADDING = "padding changes answers"


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
        nothing = not left and not config.repository
        if nothing or any(_of_zoo(source) for source in config.models):
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
    if source.transformers:
        source = in_folder(source)
    spec = _zoo_spec(source) if _of_zoo(source) else _spec_in_float32(source)
    if source.channels_last and not takes_images(spec):
        raise InvalidConfig(
            f"model {source.name!r}: channels_last is for inputs of (channels, height, width), not "
            f"{spec.input_shape}"
        )
    if source.score:
        spec = replace(spec, score=source.score)
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
    given = given or source.transformers
    return not given and not source.name.startswith(LIBRARY_PREFIXES)


def _zoo_spec(source: ModelSource) -> ModelSpec:
    spec = ZOO.get(canonical_model(source.name))
    if spec is None:
        raise InvalidConfig(
            f"model {source.name!r}: say where it comes from: factory, pt2, transformers, safetensors or cupy; "
            f"or name one of the zoo: {', '.join(ZOO)}"
        )
    _refuse_inputs(source, spec)
    if source.input_shape not in ((), spec.input_shape):
        raise InvalidConfig(
            f"model {source.name!r}: the zoo's takes {list(spec.input_shape)}, not "
            f"{list(source.input_shape)}; leave input_shape out"
        )
    return taking(spec, spec.takes, source.lengths) if source.lengths else spec


def _refuse_inputs(source: ModelSource, spec: ModelSpec) -> None:
    if source.inputs:
        raise InvalidConfig(
            f"model {source.name!r}: it takes {described(spec.takes)}; leave the tables of inputs out"
        )


def _spec_in_float32(source: ModelSource) -> ModelSpec:
    build: Callable[[], nn.Module]
    if source.factory:
        build = lambda: _from_factory(source)  # noqa: E731
    elif source.pt2:
        build = lambda: _from_export(source)  # noqa: E731
    elif source.safetensors:
        build = lambda: from_safetensors(source)  # noqa: E731
        if not (source.output or source.outputs):
            source = replace(source, output=_LOGITS)
    else:
        return _of_library(source)
    spec = ModelSpec(
        name=source.name,
        build=build,
        input_shape=source.input_shape,
        input_dtype=source.input_dtype,
        random_weights=False,
        output=source.output,
        outputs=source.outputs,
        lengths=source.lengths,
        pads=source.pads,
        padding_changes_answers=source.padding_changes_answers,
        labels=(_PADDING,) if source.padding_changes_answers else (),
    )
    return taking(spec, source.inputs) if source.inputs else spec


def _of_library(source: ModelSource) -> ModelSpec:
    spec = library_spec(source.name)
    _refuse_inputs(source, spec)
    if source.lengths:
        taking(spec, spec.takes, source.lengths)  # raises: the shapes of images are fixed
    if source.input_shape and spec.inputs:
        raise InvalidConfig(
            f"model {source.name!r}: it takes {described(spec.takes)}; leave input_shape out"
        )
    shape = source.input_shape or spec.input_shape
    return replace(spec, input_shape=shape, output=source.output, outputs=source.outputs)


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
        with Path(source.pt2).open("rb") as file:
            program = read_program(file)
    except Exception as error:
        raise InvalidConfig(
            f"model {source.name!r}: {source.pt2} is not an exported program: {error}"
        ) from None
    return Exported(program, source.name)  # its mode was fixed by the export


class Exported(KnowsInputs):
    """An exported program, called as any other module; its inputs are read from it.

    Raises InvalidConfig for a program with an input that is not a tensor.
    """

    def __init__(self, program: torch.export.ExportedProgram, name: str) -> None:
        super().__init__()
        self.program = program.module()
        arguments, keywords = _children(program.call_spec.in_spec)
        self._positional = arguments.num_children
        made = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        values: list[Any] = [made.get(str(key)) for key in program.graph_signature.user_inputs]
        leaves = [*_children(arguments), *_children(keywords)]
        plain = len(leaves) == len(values) and all(leaf.is_leaf() for leaf in leaves)
        if not plain or not all(isinstance(value, torch.Tensor) for value in values):
            raise InvalidConfig(
                f"model {name!r}: its program takes other things than tensors ({program.call_spec.in_spec}); "
                "export a module whose forward takes one tensor for each parameter"
            )
        names = [str(each) for each in program.graph_signature.user_inputs[: self._positional]]
        self.inputs = tuple(
            _input_of(key, value)
            for key, value in zip([*names, *(keywords.context or ())], values, strict=True)
        )

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        given = [
            *arguments,
            *(keywords[tensor.name] for tensor in self.inputs[len(arguments) :]),
        ]
        names = [tensor.name for tensor in self.inputs[self._positional :]]
        rest = dict(zip(names, given[self._positional :], strict=True))
        return self.program(*given[: self._positional], **rest)


def _children(tree: Any) -> list[Any]:
    """The parts of a torch TreeSpec, which torch before 2.9 has as an attribute."""
    method = getattr(tree, "children", None)
    return list(method() if callable(method) else tree.children_specs)


def _input_of(name: str, value: torch.Tensor) -> Tensor:
    """One input of a program, without its batch; a dimension of -1 is one that is not fixed there."""
    shape = tuple(int(each) if isinstance(each, int) else VARIES for each in value.shape[1:])
    return Tensor(name, str(value.dtype).removeprefix("torch."), shape)


#: What errors of models say that want more, or other, inputs than they are given.
_WANTS_MORE = re.compile(
    r"missing \d+ required (positional|keyword-only) argument"
    r"|You (have to|must|need to) (specify|provide|pass)|(decoder_)?inputs_embeds|pytree|tree ?spec"
    r"|(input_ids|inputs_embeds|decoder_\w+|pixel_values) (is|are|must|cannot)",
    re.IGNORECASE,
)
_WANTS_OTHERS = re.compile(r"unexpected keyword argument|multiple values for argument")
_WANTS_INDICES = re.compile(r"argument #1 'indices' to have one of", re.IGNORECASE)
_ONE_ADVICE = "if that is not what it takes, correct input_shape (of one request) and input_dtype"
_SEVERAL_ADVICE = (
    "if that is not what it takes, correct shape (of one request) and dtype in the tables of its inputs, or "
    "lengths"
)


class Described(Protocol):
    """What the operator said of a model's inputs: a ModelSpec, say."""

    @property
    def name(self) -> str: ...

    @property
    def takes(self) -> tuple[Tensor, ...]: ...


def explain_forward_error(error: BaseException, spec: Described) -> str:
    """Why the model of `spec` does not run, and what to do, in one sentence or two for the operator.

    For whatever a forward of a made-up batch raised: it needs further inputs, others, other numbers or another
    shape than the worker's file says.
    """
    what = f"{type(error).__name__}: {error}".strip().rstrip(":")
    takes = spec.takes
    short_form = len(takes) == 1 and takes[0].name == ONLY_INPUT and not takes[0].varies
    extents = ", ".join(["batch", *map(str, takes[0].shape)])
    given = f"one tensor of {takes[0].dtype} ({extents})" if short_form else described(takes)
    text, begin = str(error), f"model {spec.name!r} does not run on {given}"
    tables = f"[models.{spec.name}.inputs.INPUT]"
    if isinstance(error, TypeError | ValueError) and _WANTS_MORE.search(text):
        return (
            f"{begin}: it wants more inputs ({what}). Give each of its inputs a table {tables} with shape and "
            "dtype, by the names of forward's parameters; -1 in a shape is a dimension that varies"
        )
    if isinstance(error, TypeError) and _WANTS_OTHERS.search(text):
        return (
            f"{begin}: its forward does not take these names ({what}). The names of the tables {tables} must "
            "be those of forward's parameters"
        )
    if _WANTS_INDICES.search(text):
        where = (
            'input_dtype = "int64"' if short_form else 'dtype = "int64" in the table of that input'
        )
        return f"{begin}: it takes indices, such as tokens ({what}); set {where}"
    return f"{begin} ({what}); {_ONE_ADVICE if short_form else _SEVERAL_ADVICE}"
