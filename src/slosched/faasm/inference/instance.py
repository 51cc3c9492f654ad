"""One instance: a network in a live process, the same code for every system, which can be made cold
(choices.py)."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any, TypedDict

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig
from slosched.faasm.inference.choices import LIVE_RUNGS, WARM
from slosched.faasm.inference.plan import Image, Plan

if TYPE_CHECKING:
    import torch


class Answer(TypedDict):
    """What an instance returns: classes and probabilities, its process, and how long each part took."""

    top: list[int]
    scores: list[float]
    pid: int
    cold_ns: int
    infer_ns: int


class Instance:
    """Loads the plan's network at once. Imports torch."""

    def __init__(self, plan: Plan) -> None:
        from slosched.faasm.inference import network

        self._network_room: Any = network
        self.plan = plan
        self._load()
        self.answer_image(_grey(plan))  # what the first run sets up
        gc.freeze()  # no collection walks through torch, as in the processes of slosched's workers

    def _load(self) -> None:
        room = self._network_room
        made = room.Network(self.plan)
        block = room.read_weights(self.plan)
        self._pageable: torch.Tensor = room.pageable_block(block)
        self._host: torch.Tensor = room.host_block(self._pageable, made.device)
        made.place(room.device_block(self._host, made.device))
        self._made: Any = made

    def make_cold(self, rung: str, pause_ns: int = 0) -> None:
        """Drop what the rung says, and make it again; sleep for `pause_ns` before (an emulated start).

        Raises InvalidConfig for a rung that a live process does not have.
        """
        if pause_ns:
            sleep_ns(pause_ns)
        room = self._network_room
        if rung == "L3":
            del self._made, self._host, self._pageable
            self._load()
        elif rung in ("L1", "L2"):
            device = self._made.device
            source = self._host if rung == "L1" else self._pageable
            self._made.place(room.device_block(source, device))
        elif rung != WARM:
            raise InvalidConfig(
                f"a live process has the rungs {', '.join(LIVE_RUNGS)}, not {rung!r}"
            )

    def answer_image(self, image: Image) -> tuple[list[int], list[float]]:
        top, scores = self._made.answer(image)
        return top, scores

    def answer(self, image: Image, rung: str = WARM, pause_ns: int = 0) -> Answer:
        """Answer the picture, after a cold start of that rung."""
        began_ns = now_ns()
        self.make_cold(rung, pause_ns)
        warm_ns = now_ns()
        top, scores = self.answer_image(image)
        return Answer(
            top=top,
            scores=scores,
            pid=os.getpid(),
            cold_ns=warm_ns - began_ns,
            infer_ns=now_ns() - warm_ns,
        )


def _grey(plan: Plan) -> Image:
    import numpy as np

    return np.full(plan.image_shape, 128, np.uint8)
