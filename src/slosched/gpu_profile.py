"""How long a model takes on a kind of GPU, and how much memory that GPU has: what profiler and files say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Annotated

from slosched.errors import InvalidConfig, UnknownName
from slosched.field_types import AtLeast0, Shape, check_types
from slosched.options import Option

PAGE_BYTES = 16 * 1024 * 1024  # Clockwork: memory_settings.weights_cache_page_size

#: The seeds' names for models, and the zoo's.
ALIASES = {"resnet50_v2": "resnet50", "resnet18_v2": "resnet18"}


def canonical_model(name: str) -> str:
    """Return the zoo's name for `name`: aliases are resolved, other names pass unchanged."""
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class ModelProfile:
    """How long one model takes on one kind of GPU. Shapes are per request, without the batch."""

    name: Annotated[str, Option(in_file=False)]  # the file has it in the heading
    exec_ns: dict[int, int]  # batch size -> exec time
    weights_ns: AtLeast0
    weights_bytes: AtLeast0
    input_shape: Shape = (3, 224, 224)
    input_dtype: str = "float32"
    output_shape: Shape = (1000,)
    output_dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            check_types(self)
        except InvalidConfig as error:
            raise InvalidConfig(f"model {self.name!r}: {error}") from None
        if 1 not in self.exec_ns:
            raise InvalidConfig(f"model {self.name!r}: exec_ns has no batch size 1")
        if any(batch < 1 or ns <= 0 for batch, ns in self.exec_ns.items()):
            raise InvalidConfig(f"model {self.name!r}: batch sizes and exec times must be > 0")

    def interpolated(self) -> ModelProfile:
        """The same model with every batch size up to the largest, its time linear between neighbours.

        For devices that run any size as it comes; without it a batch is padded to the next size listed.
        """
        sizes = sorted(self.exec_ns)
        exec_ns = dict(self.exec_ns)
        for low, high in pairwise(sizes):
            step_ns = (self.exec_ns[high] - self.exec_ns[low]) / (high - low)
            for size in range(low + 1, high):
                exec_ns[size] = round(self.exec_ns[low] + (size - low) * step_ns)
        return replace(self, exec_ns=dict(sorted(exec_ns.items())))

    def pages(self, page_bytes: int) -> int:
        """Pages of `page_bytes` that the weights take; at least 1."""
        return max(1, ceil(self.weights_bytes / page_bytes))


@dataclass(frozen=True)
class GpuProfile:
    """One kind of GPU: its weights cache and the models measured on it."""

    name: str
    models: dict[str, ModelProfile]
    weights_cache_bytes: int
    page_bytes: int = PAGE_BYTES
    clock_mhz: int = 1380

    def __post_init__(self) -> None:
        check_types(self)
        if self.page_bytes <= 0 or self.weights_cache_bytes < self.page_bytes:
            raise InvalidConfig(
                f"profile {self.name!r}: the weights cache must hold one page or more"
            )

    @property
    def pages(self) -> int:
        return self.weights_cache_bytes // self.page_bytes

    def model(self, name: str) -> ModelProfile:
        """Return the profile of `name` (an alias is fine). Raises UnknownName."""
        try:
            return self.models[canonical_model(name)]
        except KeyError:
            raise UnknownName("model", name, list(self.models)) from None
