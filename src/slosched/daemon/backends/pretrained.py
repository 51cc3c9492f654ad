"""Checkpoints in the form of transformers' own `save_pretrained`: config.json and safetensors.

transformers' loading does the work, so that tied weights, renamed keys and what a class ignores are its
own rules. It is handed the config and the tensors, never a name or a folder: there is nothing that it
could look up or download, and no code but transformers' own runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slosched.config import ModelSource
from slosched.daemon.backends.safetensors_index import INDEX_SUFFIX, shards_of
from slosched.daemon.backends.zoo import import_transformers
from slosched.errors import InvalidConfig, SloschedError
from slosched.signature import VARIES, Tensor
from slosched.text_files import read_text

#: More names of weights or classes than this are not listed.
_LISTED_AT_MOST = 3
_CLASSES_AT_MOST = 12
#: What a model for texts takes.
_TEXT_INPUTS = ("input_ids", "attention_mask")


def in_folder(source: ModelSource) -> ModelSource:
    """`source`, of a folder that save_pretrained wrote, with the files in it; a text's inputs, unless they are
    given.

    Raises InvalidConfig for a folder that is not such a one.
    """
    folder = Path(source.transformers)
    files = [folder / name for name in ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")]
    weights = [file for file in files if file.is_file()]
    if not (folder / "config.json").is_file() or not weights:
        raise InvalidConfig(
            f"model {source.name!r}: {folder} is not a folder as transformers' save_pretrained writes it: it "
            f"needs config.json, and model.safetensors or {files[1].name}"
        )
    texts = tuple(Tensor(name, "int64", (VARIES,)) for name in _TEXT_INPUTS)
    return replace(
        source,
        transformers="",
        safetensors=str(weights[0]),
        config=str(folder / "config.json"),
        inputs=source.inputs or (() if source.input_shape else texts),
    )


def from_safetensors(source: ModelSource) -> nn.Module:
    """The model of `source.config` with the weights of `source.safetensors`, float32, in eval mode.

    The weights are one file, or several that a model.safetensors.index.json lists. Raises InvalidConfig
    for files that are not such a checkpoint, and names weights that are missing, unknown or of another shape.
    """
    try:
        values = _read_json(source.config)
        _refuse_what_leads_elsewhere(values)
        transformers = import_transformers()
        transformers.utils.logging.disable_progress_bar()  # a daemon's output is lines
        model_class = _model_class(transformers, values)
        config = transformers.AutoConfig.for_model(**values)
        weights = _read_weights(source)
        model, info = _load(model_class, config, weights)
    except InvalidConfig as error:
        raise InvalidConfig(f"model {source.name!r}: {error}") from None
    except SloschedError:
        raise
    except Exception as error:  # two files of others, read by two libraries
        raise InvalidConfig(
            f"model {source.name!r}: cannot build it from {source.config} and {source.safetensors}: "
            f"{type(error).__name__}: {error}"
        ) from None
    misfits = _misfits(info)
    if misfits and not values.get("architectures"):
        raise InvalidConfig(f"model {source.name!r}: {_no_architectures(values['model_type'])}")
    if misfits:
        raise InvalidConfig(
            f"model {source.name!r}: {source.safetensors} does not fit its config: {misfits}"
        )
    return model.eval()


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(read_text(Path(path), "the config"))
    except ValueError as error:
        raise InvalidConfig(f"{path} is not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise InvalidConfig(f"{path} is not a JSON object, as transformers' config.json is")
    return values


def _refuse_what_leads_elsewhere(values: dict[str, Any]) -> None:
    """Some keys of a config make transformers fetch weights or kernels, or need other packages."""
    for key, value in values.items():
        chosen = key.endswith(("attn_implementation", "experts_implementation"))
        if chosen and isinstance(value, str) and not value.replace("_", "").isalnum():
            raise InvalidConfig(
                f"its config takes {key} from {value!r}, which would be downloaded; leave the key out"
            )
        if isinstance(value, dict):
            _refuse_what_leads_elsewhere(value)
    if values.get("use_pretrained_backbone"):
        raise InvalidConfig(
            "its config says use_pretrained_backbone, whose weights would be downloaded; set it to false: "
            "the file has them"
        )
    if values.get("quantization_config"):
        raise InvalidConfig(
            "its config says quantization_config; only plain weights can be served: save it dequantized"
        )


def _model_class(transformers: Any, values: dict[str, Any]) -> Any:
    """The class that the config names; of transformers' own alone."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise InvalidConfig(
            'its config has no "model_type" (such as "bert"); take the config.json that transformers\' '
            "save_pretrained writes"
        )
    named = values.get("architectures")
    if not named:
        return _bare_class(transformers, kind)
    if not (isinstance(named, list) and isinstance(named[0], str)):
        raise InvalidConfig(f'its config says "architectures": {named!r}, not a list of one name')
    found = getattr(transformers, named[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InvalidConfig(
            f'its config names the class {named[0]!r} in "architectures", which transformers '
            f"{transformers.__version__} does not have; code that comes with a checkpoint is never run: "
            "for a class of your own write a factory"
        )
    return found


def _bare_class(transformers: Any, kind: str) -> Any:
    """The class of a model_type without a head, for a config that names none. Raises InvalidConfig."""
    from transformers.models.auto import modeling_auto

    name = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is None:
        raise InvalidConfig(_no_architectures(kind))
    return found


def _no_architectures(kind: str) -> str:
    known = _classes_of(kind)
    return (
        "its config names no architectures, the class that was saved, and the weights are not those of one "
        "without a "
        f'head; save it with save_pretrained, or add "architectures": ["{(known or ["BertForMaskedLM"])[0]}"]'
        + (f"; of model_type {kind!r} are {', '.join(known)}" if known else "")
    )


def _classes_of(kind: str) -> list[str]:
    """transformers' classes for a model_type, sorted."""
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES") and kind in mapping:
            classes = mapping[kind]
            found.update([classes] if isinstance(classes, str) else classes)
    return sorted(found)[:_CLASSES_AT_MOST]


def _read_weights(source: ModelSource) -> dict[str, torch.Tensor]:
    """Every tensor of the file, or of the files that an index lists."""
    path = Path(source.safetensors)
    if not (source.shards or path.name.endswith(INDEX_SUFFIX)):
        return _tensors_of(path)
    weights: dict[str, torch.Tensor] = {}
    for name, listed in shards_of(read_text(path, "the index"), str(path)).items():
        shard = Path(source.shards.get(name, path.parent / name))
        if not shard.is_file():
            raise InvalidConfig(f"{path} lists {name!r}, and there is no such file beside it")
        found = _tensors_of(shard)
        lacking, unlisted = sorted(listed - found.keys()), sorted(found.keys() - listed)
        if lacking or unlisted:
            lacks, has = (each[:_LISTED_AT_MOST] or "nothing" for each in (lacking, unlisted))
            raise InvalidConfig(
                f"{shard} is not the file that {path} lists: it lacks {lacks}, and has {has} beyond what is "
                "listed for it"
            )
        weights |= found
    return weights


def _tensors_of(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InvalidConfig(
            f"{file} is not a whole file of safetensors, or cannot be read: {error}"
        ) from None
    return weights


def _load(
    model_class: Any, config: Any, weights: dict[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, Iterable[Any]]]:
    """The model and what transformers says of the keys."""
    config.return_dict = True
    for part in (config, *(getattr(config, key) for key in getattr(config, "sub_configs", ()))):
        if getattr(part, "use_cache", False):
            part.use_cache = False  # one forward pass for each request: a cache would serve nothing
    loaded: tuple[nn.Module, dict[str, Iterable[Any]]] = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused here by name
        output_loading_info=True,
    )
    return loaded


def _misfits(info: dict[str, Iterable[Any]]) -> str:
    """Which weights are missing, unknown or of another shape, in words; empty if all fit."""
    # Counters of training are often left out of a file; a missing weight is another matter.
    lacking = sorted(k for k in info["missing_keys"] if not k.endswith("num_batches_tracked"))
    unknown = sorted(info["unexpected_keys"])
    other = sorted(
        f"{key} {list(there)} instead of {list(wanted)}"
        for key, there, wanted in info["mismatched_keys"]
    )
    if not (lacking or unknown or other):
        return ""
    lacks, has, differs = (
        each[:_LISTED_AT_MOST] or "nothing" for each in (lacking, unknown, other)
    )
    return f"lacks {lacks}, has unknown {has}, of another shape {differs}"
