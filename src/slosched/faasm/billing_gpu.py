"""Memory of GPUs that the processes of a run use, as NVML tells it for each process.

In some containers the driver names processes by numbers that this side does not know, or none. Then what the
cards have in use, less what they had when the bill began, is billed: it is the run's own where the card is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from slosched.errors import InvalidConfig

#: How the memory was told apart: by process, or as what the card has more in use than at the begin.
BY_PROCESS, BY_CARD = "process", "card"
_MOST_GPUS = 64


@dataclass(frozen=True)
class Used:
    """Bytes in use: of the billed processes (None where none of them is named), and of the cards in all."""

    by_process: int | None
    by_card: int


class GpuMemory:
    """Cards by their UUIDs. Raises InvalidConfig for one that does not answer."""

    def __init__(self, uuids: Sequence[str]) -> None:
        self._cards = [_card(uuid) for uuid in uuids]

    def __bool__(self) -> bool:
        return bool(self._cards)

    def used(self, pids: Collection[int]) -> Used:
        """What these processes use now, and all that is in use."""
        total, mine, named = 0, 0, False
        for card in self._cards:
            total += max(0, card.memory_used_bytes())
            for pid, size in card.processes().items():
                if pid in pids:
                    named, mine = True, mine + size
        return Used(mine if named else None, total)

    def close(self) -> None:
        """Let NVML go. Idempotent."""
        for card in self._cards:
            card.close()


def _card(uuid: str) -> Any:
    from slosched.daemon.backends.nvml import Nvml

    card = Nvml(uuid=uuid)
    if card.problem:
        raise InvalidConfig(f"GPU {uuid}: {card.problem}")
    return card


def uuids_here() -> tuple[str, ...]:
    """UUIDs of the GPUs that CUDA shows to this process, in CUDA's order; none without GPUs or NVML.

    No CUDA context is made.
    """
    from slosched.daemon.backends.nvml import Nvml, cuda_bus_id

    found = []
    for ordinal in range(_gpu_count()):
        card = Nvml(pci_bus_id=cuda_bus_id(ordinal))
        if not card.problem and card.uuid:
            found.append(card.uuid)
        card.close()
    return tuple(found)


def _gpu_count() -> int:
    number = ctypes.c_int(0)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
            return 0
    except (OSError, AttributeError):
        return 0
    return min(number.value, _MOST_GPUS)
