"""Which network is served, from which weights and on which device. Nothing of torch is imported.

The original's function reads a MobileNet v1 1.0 224 of 16.9 MB and a picture of 940,650 bytes. Ours has a
network of that plan with random weights from a seed, so answers mean nothing and times do; the picture
comes in the request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.child_processes import computing_threads, environment
from slosched.errors import InvalidConfig
from slosched.faasm.inference.choices import SIZES

Image = npt.NDArray[np.uint8]

#: Processes of functions find their Plan under this name, when their `init` runs.
VARIABLE = "SLOSCHED_FAASM_PLAN"
#: Patches of colour along each side of a picture.
_PATCHES = 6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`network` is "own" or "timm", `device` "cpu" or "cuda", `weights` the path of a .npy file.

    `size` is one of SIZES. Calls have `threads` CPU threads each.
    """

    network: str
    size: str
    device: str
    weights: str
    seed: int
    threads: int = 1

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns, channels."""
        rows, columns = SIZES[self.size][2]
        return rows, columns, 3


def plan_of(text: str) -> Plan:
    """The Plan of its `text()`. Raises InvalidConfig."""
    try:
        return msgspec.json.decode(text, type=Plan)
    except msgspec.MsgspecError as error:
        raise InvalidConfig(f"{VARIABLE} does not hold a plan: {error}") from None


def plan_of_environment() -> Plan:
    """The Plan that the experiment gave its processes. Raises InvalidConfig without one."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        raise InvalidConfig(
            f"{VARIABLE} is not set; slosched exp sets it for the processes that it starts"
        )
    return plan_of(text)


@contextmanager
def given(plan: Plan) -> Iterator[None]:
    """Within the block, processes that are started find the plan, and have one core each."""
    with environment({VARIABLE: plan.text()} | computing_threads(plan.threads)):
        yield


def images(plan: Plan, count: int) -> list[Image]:
    """`count` pictures of uint8 (rows, columns, 3), from the plan's seed: patches of colour, and noise."""
    source = np.random.default_rng([plan.seed, 1])
    rows, columns, _ = plan.image_shape
    made = []
    for _ in range(count):
        patches = source.integers(0, 192, (_PATCHES, _PATCHES, 3), dtype=np.uint8)
        down = np.arange(rows) * _PATCHES // rows
        right = np.arange(columns) * _PATCHES // columns
        noise = source.integers(0, 64, plan.image_shape, dtype=np.uint8)
        made.append(np.ascontiguousarray(patches[down][:, right] + noise))
    return made
