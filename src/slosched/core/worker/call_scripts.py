"""Scripts of emulated calls of functions: plain data, which says what a call does.

A call runs, asks for children, awaits them, and returns, raises or dies. Its arguments are MARK_BYTES here: the
number of the script that it follows, and bytes that tell the call from all others (emulated_calls.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slosched.config import ModelProfile
from slosched.core.worker.emulated import MARK_BYTES
from slosched.core.worker.interface import ModelPrepared, PrepareModel
from slosched.messages import FunctionInfo, Span

_NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Run:
    """Run for `ns`."""

    ns: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Ask for `n` children of `function`, each with `in_bytes` of arguments.

    They follow the scripts `numbers` of the function, in turn. `near` and `near_child` are those of
    ChildRequest.
    """

    function: str
    n: int = 1
    slo_ns: int = 0
    size_class: int = 0
    numbers: tuple[int, ...] = (0,)
    in_bytes: int = 64
    near: str = ""
    near_child: int = -1


@dataclass(frozen=True, slots=True)
class AwaitAll:
    """Await `children` (empty: all so far). One that failed raises here, unless the call catches it."""

    children: tuple[int, ...] = ()
    catch: bool = False


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Take the child of that number back."""

    child: int


@dataclass(frozen=True, slots=True)
class Raise:
    text: str


@dataclass(frozen=True, slots=True)
class Exit:
    """End the call's process."""


@dataclass(frozen=True, slots=True)
class Return:
    """Return a result of `size` bytes."""

    size: int = MARK_BYTES


Step = Run | Chain | AwaitAll | TakeBack | Raise | Exit | Return


@dataclass(frozen=True, slots=True)
class Script:
    """The steps of a call, in order. Behind the last one it returns a result of MARK_BYTES.

    `host_ns` is what its host part takes before them, where its function has such a part.
    """

    steps: tuple[Step, ...] = ()
    host_ns: int = 0

    @property
    def run_ns(self) -> int:
        """How long the call runs in all."""
        return sum(step.ns for step in self.steps if isinstance(step, Run))


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedFunction:
    """A function whose calls follow `scripts`, by the number in their arguments. Others follow the first.

    `cold_ns` is how long it takes to make it ready, which takes `memory_bytes`. `expected_ns` is what it says a
    call takes, before any was measured.
    """

    name: str
    scripts: tuple[Script, ...] = (Script(),)
    info: FunctionInfo = field(default_factory=FunctionInfo)
    cold_ns: int = 1_000_000
    memory_bytes: int = 0
    expected_ns: int = 1_000_000

    def script(self, mark: bytes) -> Script:
        number = int.from_bytes(mark[:_NUMBER_BYTES], "big")
        return self.scripts[number if number < len(self.scripts) else 0]


def mark_of(number: int, identity: bytes) -> bytes:
    """The MARK_BYTES of the arguments of a call that follows script `number`."""
    return number.to_bytes(_NUMBER_BYTES, "big") + identity[: MARK_BYTES - _NUMBER_BYTES].rjust(
        MARK_BYTES - _NUMBER_BYTES, b"\0"
    )


def prepare_function(
    function: EmulatedFunction, effect: PrepareModel, *, now_ns: int
) -> ModelPrepared:
    """Answer a PrepareModel of a function, at once."""
    profile = ModelProfile(
        name=function.name,
        exec_ns={1: max(1, function.expected_ns)},
        weights_ns=function.cold_ns,
        weights_bytes=function.memory_bytes,
        input_shape=(1,),
        input_dtype="uint8",
        output_shape=(1,),
        output_dtype="uint8",
    )
    return ModelPrepared(
        action_id=effect.action_id,
        profile=profile,
        span=Span(now_ns, now_ns + function.cold_ns, function.cold_ns),
        random_weights=False,
        labels=("emulated",),
        function=function.info,
    )
