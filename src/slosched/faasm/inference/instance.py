"""One instance: a network in a live process, the same code for every system, which can be made cold
(choices.py)."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Built:
    """A network on the host: its code, its weights (pinned for a GPU, and as they were read), and the time."""

    made: Any
    host: torch.Tensor
    pageable: torch.Tensor
    took_ns: int


class Instance:
    """Loads the plan's network at once. Imports torch."""

    def __init__(self, plan: Plan) -> None:
        from slosched.faasm.inference import network

        self._network_room: Any = network
        self.plan = plan
        self._place(self._built())
        self.answer_image(_grey(plan))  # what the first run sets up
        gc.freeze()  # no collection walks through torch, as in the processes of slosched's workers

    def _built(self) -> Built:
        room, began_ns = self._network_room, now_ns()
        made = room.Network(self.plan)
        pageable = room.pageable_block(room.read_weights(self.plan))
        host = room.host_block(pageable, made.device)
        return Built(made, host, pageable, now_ns() - began_ns)

    def _place(self, built: Built) -> None:
        built.made.place(self._network_room.device_block(built.host, built.made.device))
        self._made: Any = built.made
        self._host, self._pageable = built.host, built.pageable

    def rebuilt(self) -> Built:
        """The part of rung L3 that needs no device: drop the network, build it and read its weights again."""
        del self._made, self._host, self._pageable
        return self._built()

    def make_cold(self, rung: str, pause_ns: int = 0) -> None:
        """Drop what the rung says, and make it again; sleep for `pause_ns` before (an emulated start).

        Raises InvalidConfig for a rung that a live process does not have.
        """
        if pause_ns:
            sleep_ns(pause_ns)
        room = self._network_room
        if rung == "L3":
            self._place(self.rebuilt())
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
        return self._answered(image, now_ns() - began_ns)

    def answer_placed(self, image: Image, built: Built) -> Answer:
        """Answer the picture with what `rebuilt` made, once that is on the device."""
        began_ns = now_ns()
        self._place(built)
        return self._answered(image, built.took_ns + now_ns() - began_ns)

    def _answered(self, image: Image, cold_ns: int) -> Answer:
        began_ns = now_ns()
        top, scores = self.answer_image(image)
        return Answer(
            top=top,
            scores=scores,
            pid=os.getpid(),
            cold_ns=cold_ns,
            infer_ns=now_ns() - began_ns,
        )


def _grey(plan: Plan) -> Image:
    import numpy as np

    return np.full(plan.image_shape, 128, np.uint8)
