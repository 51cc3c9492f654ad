"""A model of one's own in a worker's file: [models.NAME] to ModelSource."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slosched.config import ModelSource
from slosched.config_file.tables import Values, build, read_values
from slosched.config_file.tensors import tensors_of
from slosched.errors import InvalidConfig
from slosched.signature import BYTES, ONLY_INPUT, Tensor, described, row_bytes, signature_error

#: What a model of one's own can take.
INPUT_FORMS = (
    "input_shape is the short form, for one tensor of one fixed shape and dtype. A model with several inputs, "
    "or with a dimension that varies, has a table [models.NAME.inputs.INPUT] with shape and dtype for each; "
    "-1 there is a dimension that varies, and lengths = [64, 128] beside it are the lengths that are served"
)
#: The largest message there is (transport/codec.py, which files of configuration do not know).
_INPUT_AT_MOST_BYTES = 64 * 1024 * 1024
INPUT_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_SOURCES = ("factory", "pt2", "transformers", "safetensors", "cupy")


def model_source(file: Path, name: str, table: Any) -> ModelSource:
    """What [models.`name`] of `file` says. Paths in it are relative to the file. Raises InvalidConfig."""
    where = f"{file}, model {name!r}"
    if not isinstance(table, dict):
        raise InvalidConfig(f"{where}: must be a table [models.{name}]")
    shape = table.get("input_shape", [1])
    whole = (
        isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)
    )
    if not whole:
        raise InvalidConfig(
            f"{where}: input_shape must be a list of sizes of at least 1, as [3, 224, 224], not {shape!r}. "
            f"{INPUT_FORMS}"
        )
    tables: dict[str, Any] = {"inputs": dict[str, Any], "outputs": dict[str, Any]}
    values = read_values(where, table | _output(where, table), ModelSource, tables)
    values["pads"] = {}
    for kind in tables:
        values[kind] = tensors_of(f"{where}, {kind}", values.get(kind, {}), values["pads"])
    for key in ("pt2", "transformers", "safetensors", "config"):
        if values.get(key):
            values[key] = str(file.parent / values[key])
    _settle_source(where, values)
    _check_signature(where, values)
    for key in ("factory", "cupy"):
        module, colon, function = values.get(key, ":").partition(":")
        if values.get(key) and not (colon and module and function):
            raise InvalidConfig(
                f"{where}: {key} must be package.module:function, not {values[key]!r}"
            )
    if values.get("factory") or values.get("cupy"):
        values["folder"] = str(file.parent.resolve())
    values["name"] = name
    return build(where, ModelSource, values)


def _settle_source(where: str, values: Values) -> None:
    """Check that one source is given, with what it needs; a folder of safetensors is one of transformers."""
    given = [key for key in _SOURCES if values.get(key)]
    if len(given) > 1:
        raise InvalidConfig(
            f"{where}: exactly one of {', '.join(_SOURCES[:-1])} and {_SOURCES[-1]} must be given, not "
            f"{' and '.join(given)}"
        )
    if values.get("safetensors") and not values.get("config"):
        if not Path(values["safetensors"]).is_dir():
            raise InvalidConfig(
                f"{where}: safetensors needs config, the transformers config.json of it; or name the folder "
                "of both"
            )
        values["transformers"] = values.pop("safetensors")
    if values.get("config") and not values.get("safetensors"):
        raise InvalidConfig(f"{where}: config goes with safetensors alone")


def _check_signature(where: str, values: Values) -> None:
    inputs, lengths = values["inputs"], values.get("lengths", ())
    factory, cupy = values.get("factory"), values.get("cupy")
    if cupy and (inputs or values["outputs"] or values.get("output") or lengths):
        raise InvalidConfig(
            f"{where}: a cupy model takes one array of input_shape and returns one array; leave inputs, "
            "outputs, output and lengths out"
        )
    if inputs and values.get("input_shape"):
        raise InvalidConfig(f"{where}: give input_shape or the tables of inputs, not both")
    if values.get("output") and values["outputs"]:
        raise InvalidConfig(f"{where}: give output or the tables of outputs, not both")
    # The others know their own inputs, or are known by their names.
    needed = factory or cupy or values.get("safetensors")
    needed = needed or (values.get("transformers") and not lengths)
    if needed and not (inputs or values.get("input_shape")):
        raise InvalidConfig(
            f"{where}: input_shape must be given, such as [3, 224, 224] (one request). {INPUT_FORMS}"
        )
    if values.get("input_dtype", "float32") not in INPUT_DTYPES:
        raise InvalidConfig(
            f"{where}: input_dtype {values['input_dtype']!r} is none of {', '.join(INPUT_DTYPES)}"
        )
    one = Tensor(
        ONLY_INPUT, values.get("input_dtype", "float32"), tuple(values.get("input_shape", ()))
    )
    takes = inputs or ((one,) if one.shape else ())
    for tensor in inputs:
        if tensor.dtype not in (*INPUT_DTYPES, BYTES):
            known = ", ".join((*INPUT_DTYPES, BYTES))
            raise InvalidConfig(f"{where}: dtype of input {tensor} is none of {known}")
    wrong = signature_error(takes, values["outputs"], lengths) if takes else ""
    if wrong:
        raise InvalidConfig(f"{where}: {wrong}")
    size = row_bytes(takes, max(lengths, default=0))
    if size > _INPUT_AT_MOST_BYTES:
        at = f" at length {max(lengths)}" if lengths else ""
        raise InvalidConfig(
            f"{where}: an input of {described(takes)}{at} has {size:,} bytes, and at most "
            f"{_INPUT_AT_MOST_BYTES:,} travel; it is the shape of one request, without the batch"
        )


def _output(where: str, table: Mapping[str, Any]) -> dict[str, str]:
    """The key `output` as a text: the name of one of several outputs, or its index."""
    value = table.get("output", "0")
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        wanted = 'must be the name of an output, or its index: "logits" or 0'
    elif isinstance(value, int) and value < 0:
        wanted = "must be at least 0 where it is an index"
    else:
        return {"output": str(value)} if "output" in table else {}
    raise InvalidConfig(f"{where}: output {wanted} (it is {value!r})")
