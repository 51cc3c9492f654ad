"""The protocol's names of dtypes, beside numpy's, which models' signatures have."""

from __future__ import annotations

from slosched.signature import BYTES

#: The protocol's name by numpy's. In a model's config it stands behind TYPE_, and BYTES are TYPE_STRING.
OF_NUMPY = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
    BYTES: "BYTES",
}
TO_NUMPY = {theirs: ours for ours, theirs in OF_NUMPY.items()}
#: Bytes of an element; BYTES have none.
SIZES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
    "BF16": 2,
}


def config_type(datatype: str) -> str:
    """Its name in a model's config."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
