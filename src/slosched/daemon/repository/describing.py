"""What one version is: one of model.pt2, model.safetensors (or its index and the files that this lists) with
config.json, and a factory in model.toml, of a module or for CuPy.

model.toml has one table, [model], with the keys of a worker file's [models.NAME]; beside another kind it says
what that file does not know. The names of the files are fixed, so no key names one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slosched.config import ModelSource
from slosched.config_file import model_source
from slosched.daemon.backends.safetensors_index import INDEX_SUFFIX, shards_of
from slosched.daemon.repository.scanning import Found
from slosched.errors import InvalidConfig
from slosched.text_files import toml_of, toml_text

PT2, SAFETENSORS, CONFIG, TOML = "model.pt2", "model.safetensors", "config.json", "model.toml"
INDEX = SAFETENSORS + INDEX_SUFFIX
MOST_TOML_BYTES = 64 * 1024
MOST_CONFIG_BYTES = 1024 * 1024
MOST_INDEX_BYTES = 16 * 1024 * 1024
#: Keys of [models.NAME] that name files, or code elsewhere.
_NOT_HERE = ("pt2", "safetensors", "config", "transformers")
#: Keys that name a function of a file of the version: one that makes a module, and one for CuPy.
_FACTORIES = ("factory", "cupy")
_TEXT_INPUTS = ("input_ids", "attention_mask")
#: Length classes of a checkpoint for texts whose model.toml says none.
_TEXT_LENGTHS = (32, 128, 512)
#: What configs call the longest text.
_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len")

#: Reads a file of the version's folder, with a bound in bytes.
Read = Callable[[str, int], bytes]


def name_of(folder: str) -> str:
    """ "NAME:VERSION" of NAME/VERSION."""
    return folder.replace("/", ":")


def described(found: Found, place: Path, read: Read) -> ModelSource:
    """Where the model of a version comes from; `place` is the version's folder, for paths and errors.

    Raises InvalidConfig for a folder that is not exactly one kind, and OSError.
    """
    table = _table(read(TOML, MOST_TOML_BYTES)) if TOML in found.files else {}
    files = [file for file in (PT2, SAFETENSORS, INDEX) if file in found.files]
    made_by = [key for key in _FACTORIES if key in table]
    kinds = [*files, *(f"{key} in {TOML}" for key in made_by)]
    if len(kinds) > 1:
        raise InvalidConfig(f"it has both {kinds[0]} and {kinds[1]}: keep one of them")
    if not kinds and TOML not in found.files:
        raise InvalidConfig(
            f"it has none of {PT2}, {SAFETENSORS} or {INDEX} (with {CONFIG}), and {TOML} with a factory"
        )
    if files and files[0] != PT2 and CONFIG not in found.files:
        raise InvalidConfig(f"{files[0]} needs {CONFIG} beside it, as save_pretrained writes both")
    if PT2 in files:
        table["pt2"] = PT2
    elif files:
        if files[0] == INDEX:
            _check_shards(read(INDEX, MOST_INDEX_BYTES), found)
        table |= {"safetensors": files[0], "config": CONFIG}
        table |= _inputs_by(_config(read(CONFIG, MOST_CONFIG_BYTES)), table)
    else:
        _check_factory(table, found, *made_by)
    try:
        return model_source(place / TOML, name_of(found.folder), table)
    except InvalidConfig as error:
        begin = f"{place / TOML}, model {name_of(found.folder)!r}: "
        raise InvalidConfig(
            str(error).replace(begin, "").replace("models.NAME.", "model.")
        ) from None


def weights_of(source: ModelSource, read: Read) -> list[str]:
    """The files of weights that a load of a version reads; none for a factory. Raises InvalidConfig."""
    name = Path(source.pt2 or source.safetensors).name
    if name == INDEX:
        return shards_in(read(INDEX, MOST_INDEX_BYTES))
    return [name] if name else []


def _table(data: bytes) -> dict[str, Any]:
    values = toml_of(toml_text(data, TOML), TOML)
    table = values.pop("model", None)
    if not isinstance(table, dict) or values:
        raise InvalidConfig(f"{TOML} has one table, [model], and nothing beside it")
    for key in _NOT_HERE:
        if key in table:
            raise InvalidConfig(
                f"{TOML} has {key}: the files of a version have fixed names, so leave it out"
            )
    return table


def _check_shards(index: bytes, found: Found) -> None:
    for shard in shards_in(index):
        if shard not in found.files:
            raise InvalidConfig(f"{INDEX} lists {shard!r}, and there is no such file beside it")


def shards_in(index: bytes) -> list[str]:
    """The names of the files that an index lists. Raises InvalidConfig."""
    try:
        text = index.decode()
    except UnicodeDecodeError:
        raise InvalidConfig(f"{INDEX} is not UTF-8 text") from None
    return [*shards_of(text, INDEX)]


def _check_factory(table: dict[str, Any], found: Found, key: str = "factory") -> None:
    named = table.get(key)
    if not isinstance(named, str):
        raise InvalidConfig(f'{TOML} alone needs factory = "module:function", of a file beside it')
    module = named.partition(":")[0]
    if module not in found.modules:
        raise InvalidConfig(
            f"{key} {named!r}: there is no {module.replace('.', '/')}.py in the version's folder; a module "
            "there may import installed packages"
        )


def _config(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{CONFIG} is not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise InvalidConfig(f"{CONFIG} is not a JSON object, as transformers' config.json is")
    return values


def _inputs_by(config: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a checkpoint whose model.toml says none: an image by its size, or else a text."""
    if "input_shape" in table or "inputs" in table:
        return {}
    side, channels = config.get("image_size"), config.get("num_channels", 3)
    if type(side) is int and type(channels) is int and side > 0 < channels:
        return {"input_shape": [channels, side, side]}
    stated = [config[key] for key in _LONGEST if key in config]
    longest = next((n for n in stated if type(n) is int and n > 0), _TEXT_LENGTHS[-1])
    lengths = [each for each in _TEXT_LENGTHS if each <= longest] or [longest]
    inputs = {name: {"shape": [-1], "dtype": "int64"} for name in _TEXT_INPUTS}
    return {"inputs": inputs, "lengths": table.get("lengths", lengths)}
