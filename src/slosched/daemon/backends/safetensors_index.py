"""model.safetensors.index.json: which weights lie in which of several files, as save_pretrained writes it.

The files of an index lie beside it. Nothing here opens one, so a model repository can ask which they are.
"""

from __future__ import annotations

import json
from typing import Any

from slosched.errors import InvalidConfig

INDEX_SUFFIX = ".index.json"
SHARD_SUFFIX = ".safetensors"


def shards_of(index: str, where: str) -> dict[str, set[str]]:
    """The names of the weights in each file that the text of an index lists, by the file's name, sorted.

    `where` names the index in errors. Raises InvalidConfig for what is not an index, for a weight that it lists
    twice, and for a file that does not lie beside it.
    """
    try:
        values = json.loads(index, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{where} is not a JSON file: {error}") from None
    table = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(table, dict) or not table:
        raise InvalidConfig(f'{where} has no "weight_map", as an index of safetensors has')
    shards: dict[str, set[str]] = {}
    for weight, file in table.items():
        if not isinstance(file, str) or not _beside(file):
            raise InvalidConfig(
                f"{where} lists {_short(file)}; only {SHARD_SUFFIX} files beside it are read"
            )
        shards.setdefault(file, set()).add(weight)
    return dict(sorted(shards.items()))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose last value of a name would otherwise count."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has {_short(name)} twice")
        values[name] = value
    return values


def _beside(file: str) -> bool:
    return file.endswith(SHARD_SUFFIX) and not set("/\\\0") & set(file) and file[0] != "."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
