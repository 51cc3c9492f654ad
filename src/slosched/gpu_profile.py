"""How long a model takes on a kind of GPU, how much memory that has, and what disturbs one that is emulated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from typing import Annotated

from msgspec import Meta

from slosched.errors import InvalidConfig, UnknownName
from slosched.field_types import AtLeast0, Shape, check_types
from slosched.options import Option
from slosched.signature import ONLY_INPUT, ONLY_OUTPUT, Tensor, score_error, signature_error

PAGE_BYTES = 16 * 1024 * 1024  # Clockwork: memory_settings.weights_cache_page_size

#: The seeds' names for models, and the zoo's.
ALIASES = {"resnet50_v2": "resnet50", "resnet18_v2": "resnet18"}


def canonical_model(name: str) -> str:
    """Return the zoo's name for `name`: aliases are resolved, other names pass unchanged."""
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class ModelProfile:
    """How long one model takes on one kind of GPU. Shapes are per request, without the batch.

    `inputs` and `outputs` are the signature (signature.py); without them it is one tensor each, by `input_*`
    and `output_*`, which otherwise repeat the first ones at the greatest length. A model with a dimension
    that varies has `exec_ns_at`: exec times by length class and batch size; `exec_ns` are those of the longest.
    `score` names the last output where that is a judge's score: it goes to the controller, not to clients.

    A model of `steps` equal steps has `step_ns`, the time of one by batch size; the rest of its exec time is
    what comes before and after them. With `preempt` its runs are interrupted between two steps.
    """

    name: Annotated[str, Option(in_file=False)]  # the file has it in the heading
    exec_ns: dict[int, int]  # batch size -> exec time
    weights_ns: AtLeast0
    weights_bytes: AtLeast0
    input_shape: Shape = (3, 224, 224)
    input_dtype: str = "float32"
    output_shape: Shape = (1000,)
    output_dtype: str = "float32"
    inputs: Annotated[tuple[Tensor, ...], Option(in_file=False)] = ()
    outputs: Annotated[tuple[Tensor, ...], Option(in_file=False)] = ()
    exec_ns_at: Annotated[dict[int, dict[int, int]], Option(in_file=False)] = field(
        default_factory=dict
    )
    score: str = ""
    steps: AtLeast0 = 0
    step_ns: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_types(self)
            self._settle()
            self._check_steps()
        except InvalidConfig as error:
            raise InvalidConfig(f"model {self.name!r}: {error}") from None
        wrong = signature_error(self.takes, self.gives, self.lengths)
        if self.score and not wrong:
            wrong = score_error(self.outputs, self.score)
        if wrong:
            raise InvalidConfig(f"model {self.name!r}: {wrong}")
        for exec_ns in (self.exec_ns, *self.exec_ns_at.values()):
            if 1 not in exec_ns:
                raise InvalidConfig(f"model {self.name!r}: exec_ns has no batch size 1")
            if any(batch < 1 or ns <= 0 for batch, ns in exec_ns.items()):
                raise InvalidConfig(f"model {self.name!r}: batch sizes and exec times must be > 0")

    def _check_steps(self) -> None:
        if bool(self.steps) != bool(self.step_ns):
            raise InvalidConfig("steps and step_ns, the time of one by batch size, go together")
        if self.steps and self.lengths:
            raise InvalidConfig("a model of steps has no length classes; leave steps out")
        if self.steps and self.step_ns.keys() != self.exec_ns.keys():
            raise InvalidConfig("step_ns must have the batch sizes of exec_ns")
        for batch, ns in self.step_ns.items():
            if ns <= 0 or ns * self.steps > self.exec_ns[batch]:
                raise InvalidConfig(
                    f"step_ns of batch {batch} must be > 0, and {self.steps} steps at most its exec_ns"
                )

    def _settle(self) -> None:
        """Fill in what follows from the rest: the first tensors of the signature, and the longest class."""
        settled: dict[str, object] = {}
        longest = max(self.exec_ns_at, default=0)
        if longest:
            settled["exec_ns_at"] = dict(sorted(self.exec_ns_at.items()))
            settled["exec_ns"] = self.exec_ns_at[longest]
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            if tensors:
                settled[f"{kind}_shape"] = tensors[0].shape_at(longest)
                settled[f"{kind}_dtype"] = tensors[0].dtype
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def takes(self) -> tuple[Tensor, ...]:
        """The inputs, whether the profile names them or not."""
        return self.inputs or (Tensor(ONLY_INPUT, self.input_dtype, self.input_shape),)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        """The outputs, whether the profile names them or not."""
        return self.outputs or (Tensor(ONLY_OUTPUT, self.output_dtype, self.output_shape),)

    @property
    def answers(self) -> tuple[Tensor, ...]:
        """The outputs that a client gets: all but the score."""
        return self.gives[:-1] if self.score else self.gives

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length classes, ascending; empty if no dimension varies."""
        return tuple(self.exec_ns_at)

    def times(self, length: int) -> dict[int, int]:
        """Exec times by batch size, in the length class `length` (0: there is none)."""
        return self.exec_ns_at[length] if length else self.exec_ns

    def interpolated(self) -> ModelProfile:
        """The same model with every batch size up to the largest, its time linear between neighbours.

        For devices that run any size as it comes; without it a batch is padded to the next size listed.
        """
        at = {length: _interpolated(exec_ns) for length, exec_ns in self.exec_ns_at.items()}
        exec_ns, step_ns = _interpolated(self.exec_ns), _interpolated(self.step_ns)
        # Each time is rounded by itself, so that of all steps could be a little more than that of the whole.
        step_ns = {batch: min(ns, exec_ns[batch] // self.steps) for batch, ns in step_ns.items()}
        return replace(self, exec_ns=exec_ns, exec_ns_at=at, step_ns=step_ns)

    def pages(self, page_bytes: int) -> int:
        """Pages of `page_bytes` that the weights take; at least 1."""
        return max(1, ceil(self.weights_bytes / page_bytes))


def _interpolated(exec_ns: dict[int, int]) -> dict[int, int]:
    found = dict(exec_ns)
    for low, high in pairwise(sorted(exec_ns)):
        step_ns = (exec_ns[high] - exec_ns[low]) / (high - low)
        for size in range(low + 1, high):
            found[size] = round(exec_ns[low] + (size - low) * step_ns)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class GpuProfile:
    """One kind of GPU: its weights cache and the models measured on it."""

    name: str
    models: dict[str, ModelProfile]
    weights_cache_bytes: int
    page_bytes: int = PAGE_BYTES
    clock_mhz: int = 1380
    #: With `preempt`: how far apart the boundaries of an exec without steps are, and the exec time up to which
    #: a class is urgent, of a model whose batch of 1 takes no longer.
    boundary_ns: AtLeast0 = 300_000
    urgent_at_most_ns: AtLeast0 = 5_000_000

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


@dataclass(frozen=True)
class EmulationNoise:
    """Seeded disturbances of an emulated GPU. All zero: everything takes what the profile says.

    Exec times are multiplied by a normal factor of mean 1, or by one drawn from `exec_quantiles`: evenly
    spaced quantiles of measured / expected, from the least to the greatest. With `pcie_bytes_per_s`
    copies of inputs and outputs take time, and inputs and weights on their way to a GPU slow each other;
    with `pcie_shared` also those of the other GPUs of the worker.
    """

    seed: int = 0
    # Relative standard deviation of exec times (normal, cut at 3 sigma).
    exec_sigma: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    exec_quantiles: tuple[float, ...] = ()
    stall_probability: Annotated[float, Meta(ge=0, le=1)] = 0.0  # per exec
    stall_ns: Annotated[AtLeast0, Option(name="stall")] = 0
    pcie_bytes_per_s: AtLeast0 = 0
    pcie_shared: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        quantiles = self.exec_quantiles
        if quantiles and (
            len(quantiles) < 2 or quantiles[0] <= 0 or any(a > b for a, b in pairwise(quantiles))
        ):
            raise InvalidConfig(
                "noise: exec_quantiles must be two or more numbers above 0 that never decrease"
            )
        if quantiles and self.exec_sigma:
            raise InvalidConfig("noise: give exec_sigma or exec_quantiles, not both")
        if self.pcie_shared and not self.pcie_bytes_per_s:
            raise InvalidConfig("noise: pcie_shared needs pcie_bytes_per_s")
