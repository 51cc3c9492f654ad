"""What fuzz.py's requests are made of: models, their inputs, and values, right and wrong."""

from __future__ import annotations

import random
from typing import Any

from http_cases import LETTERS
from triton_models import TYPES

#: The region that both servers have, its POSIX key and its size in bytes.
REGION, REGION_KEY, REGION_BYTES = "fuzzed", "/slosched_fuzzed", 4096

#: The models: datatype and dims of each input, and the names of the outputs. -1: any length up to 16.
MODELS: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], tuple[str, ...]]] = {
    "pair": ({"left": ("FP32", (4,)), "right": ("INT32", (4,))}, ("sum", "difference")),
    "grid": ({"input": ("FP32", (2, 2))}, ("output",)),
    "shout": ({"texts": ("BYTES", (2,))}, ("loud",)),
    "seen": ({"ids": ("INT64", (-1,)), "mask": ("INT64", (-1,))}, ("seen", "shown")),
    "types": (
        {name: (datatype, (2,)) for name, datatype in TYPES.items()},
        tuple(f"same_{name}" for name in TYPES),
    ),
}
MOST_BATCH, MOST_LENGTH = 16, 16
DATATYPES = (*LETTERS, "BYTES", "UINT64", "BF16", "FP8", "fp32", "", "TYPE_FP32", "STRING")
_TEXTS = ("", "a", "straße", "日本", 'quo"te', "back\\slash", "\n\t", "x" * 90)
_BOUNDS = {"UINT8": (0, 255), "INT8": (-128, 127), "INT16": (-(2**15), 2**15 - 1)}

#: Values of JSON that stand where others belong.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 1.0, 1.5, -0.0, 1e300),
    *(2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30),
    *("", "1", "a", "true", "\x00", "é", [], [1], [[1]], {}, {"a": 1}, [None], "x" * 300),
)


def elements(draw: random.Random, datatype: str, count: int, *, small: bool = False) -> list[Any]:
    """`count` elements; `small` whole numbers, with which each way of computing is exact."""
    if datatype == "BYTES":
        return [draw.choice(_TEXTS) for _ in range(count)]
    if datatype == "BOOL":
        return [draw.random() < 0.5 for _ in range(count)]
    if datatype.startswith("FP"):
        return [draw.randrange(-800, 800) / 4 for _ in range(count)]
    low, high = _BOUNDS.get(datatype, (-1000, 1000) if small else (-(2**63), 2**63 - 1))
    return [draw.choice((low, high, 0, draw.randint(low, high))) for _ in range(count)]


class Filled:
    """One right inference: a model, and for each input its shape and its elements."""

    def __init__(self, draw: random.Random) -> None:
        self.model = draw.choice([*MODELS])
        inputs, self.outputs = MODELS[self.model]
        self.rows = draw.choice((1, 1, 1, 2, 3, MOST_BATCH))
        length = draw.choice((1, 2, 4, 5, MOST_LENGTH))
        self.inputs: dict[str, tuple[str, list[int], list[Any]]] = {}
        for name, (datatype, dims) in inputs.items():
            shape = [self.rows, *(length if each == -1 else each for each in dims)]
            count = 1
            for each in shape:
                count *= each
            small = self.model != "types"
            self.inputs[name] = (datatype, shape, elements(draw, datatype, count, small=small))
