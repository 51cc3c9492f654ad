"""The functions of slosched and of Dask that answer pictures. Their module imports no torch; their `init` does.

`classify` is warm, or makes itself cold within its process; a `size` class for each rung lets the scheduler
forecast these apart. On a GPU rung L3 is a function of its own, which builds its network before it asks for the
lane. `classify_new` is rung L4: each call has a new process (reset="reload").
"""

from __future__ import annotations

from typing import Any

import slosched
from slosched.faasm.inference.choices import WARM
from slosched.faasm.inference.instance import Answer, Built, Instance
from slosched.faasm.inference.plan import Image, plan_of_environment

_CLASS_OF = {WARM: 0, "L1": 1, "L2": 2, "L3": 3}


def load() -> Instance:
    """The instance of a process."""
    return Instance(plan_of_environment())


def _class(image: Image, rung: str = WARM) -> int:
    return _CLASS_OF.get(rung, 0)


def _classified(ctx: Any, image: Image, rung: str) -> Answer:
    instance: Instance = ctx.init
    return instance.answer(image, rung)


@slosched.function(init=load, size=_class, expected="30ms")
def classify(ctx: Any, image: Image, rung: str = WARM) -> Answer:
    """Answer a picture on a core of the host."""
    return _classified(ctx, image, rung)


@slosched.function(init=load, expected="2s", reset="reload")
def classify_new(ctx: Any, image: Image) -> Answer:
    """Answer a picture in a process that was started for it."""
    return _classified(ctx, image, WARM)


@slosched.function(init=load, size=_class, expected="5ms", gpu=True)
def classify_gpu(ctx: Any, image: Image, rung: str = WARM) -> Answer:
    """Answer a picture on the GPU."""
    return _classified(ctx, image, rung)


def _rebuilt(ctx: Any, image: Image) -> Built:
    instance: Instance = ctx.init
    return instance.rebuilt()


@slosched.function(init=load, prepare=_rebuilt, expected="10ms", gpu=True)
def classify_rebuilt_gpu(ctx: Any, image: Image) -> Answer:
    """Answer a picture on the GPU by a network that is built for it beside other calls: rung L3."""
    instance: Instance = ctx.init
    return instance.answer_placed(image, ctx.prepared)


@slosched.function(init=load, expected="5s", gpu=True, reset="reload")
def classify_new_gpu(ctx: Any, image: Image) -> Answer:
    """Answer a picture on the GPU, in a process that was started for it."""
    return _classified(ctx, image, WARM)


@slosched.function(init=load, expected="30ms", reset="restore")
def classify_restored(ctx: Any, image: Image) -> Answer:
    """Answer a picture in a new fork of the template."""
    return _classified(ctx, image, WARM)


@slosched.function(expected="1ms")
def nothing(ctx: Any) -> None:
    """The empty function, of a warm process."""


@slosched.function(expected="1ms", reset="restore")
def nothing_restored(ctx: Any) -> None:
    """The empty function, in a new fork of the template."""


@slosched.function(expected="50ms", reset="reload")
def nothing_new(ctx: Any) -> None:
    """The empty function, in a process that was started for it."""
