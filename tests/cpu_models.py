"""Models as people write them, and as they should not: for the tests of the CPU's answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import torch
from torch import nn


class Slice(nn.Module):
    """Answers with a view of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:4]


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x.relu_()


class Counter(nn.Module):
    """Its buffer counts its runs, and the answer shows it."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x * 2 + self.runs


class Replaces(nn.Module):
    """Puts a new tensor in its buffer's place."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs = self.runs + 1
        return x * 2


class Weights(nn.Module):
    """Answers with a view of its own weights, which it changes: every answer is the loaded ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(64.0).reshape(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table[:] += 1
        return self.table[: len(x)] - self.table[: len(x)] + x[:, :1]


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x * 2


class Pooled(nn.Module):
    """Means over tokens that a mask shows, and what each token is: two inputs, two outputs, one that varies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(21)
        self.table = nn.Embedding(1000, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.table(ids) * mask[:, :, None]
        return {"mean": tokens.sum(1) / mask.sum(1, keepdim=True), "tokens": tokens.cumsum(1)}


class Unmasked(nn.Module):
    """Its answer depends on how far its input is padded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


class Pairs(nn.Module):
    """Three inputs of three dtypes and fixed shapes; a tuple."""

    def forward(
        self, image: torch.Tensor, place: torch.Tensor, on: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return image.flatten(1) * place.float()[:, None], on.logical_not()


class Halves(nn.Module):
    """Its output is half as long as its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2]


class Shouts(nn.Module):
    """Texts to texts, and their lengths."""

    def forward(self, texts: list[list[bytes]]) -> dict[str, object]:
        return {
            "loud": [[text.decode().upper() for text in row] for row in texts],
            "sizes": torch.tensor([[len(text) for text in row] for row in texts]),
        }


class Swapped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)


class Squeezed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).squeeze()


class Centred(nn.Module):
    """Depends on the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Exits(nn.Module):
    """Wants to end its process for inputs above 1, which none that is made up holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1).any()):
            sys.exit(3)
        return x * 2


def training() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))


class _Triggered(nn.Module):
    """Doubles its input; an input above 1, which none that is made up holds, makes it do something else."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1).any()):
            self.act()
        return x * 2


class _SaysNothing(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def _raise(error: BaseException) -> None:
    raise error


def _fork() -> None:
    os.fork()  # both go on, and both answer


def _leave_others() -> None:
    """Start a process that leaves the group and would print for ever, and end."""
    if os.fork() == 0:
        os.setsid()
        for _ in range(6000):
            print("still here", flush=True)  # noqa: T201
            time.sleep(0.01)
        os._exit(0)
    os._exit(5)


def _flood() -> None:
    for line in range(200_000):
        print(f"line {line}\x1b[31m" + "x" * 100)  # noqa: T201
    print("y" * 10_000_000)  # noqa: T201


def _kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def _scribble() -> None:
    """Write into every descriptor that is a socket."""
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            socket.socket(fileno=os.dup(fd)).send(b"\xc1 nonsense")


#: What a model does for an input above 1, by name.
ACTS: dict[str, Callable[[], object]] = {
    "leaves": lambda: sys.exit(3),
    "exits": lambda: os._exit(3),
    "aborts": os.abort,
    "segfaults": lambda: ctypes.string_at(0),
    "kills": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "leaves_others": _leave_others,
    "forks": _fork,
    "floods": _flood,
    "scribbles": _scribble,
    "sleeps": lambda: time.sleep(2),
    "hangs": lambda: time.sleep(3600),
    "no_memory": lambda: _raise(MemoryError()),
    "interrupts": lambda: _raise(KeyboardInterrupt()),
    "long_words": lambda: _raise(ValueError("z" * 10_000_000)),
    "no_words": lambda: _raise(_SaysNothing()),
    "kills_parent": lambda: _kill_parent(),
    "recurses": lambda: _recurse(0),
}


def _recurse(depth: int) -> int:
    return _recurse(depth + 1)


def _model_of(act: Callable[[], object]) -> Callable[[], nn.Module]:
    return lambda: _Triggered(act).eval()


for _name, _act in ACTS.items():
    globals()[_name] = _model_of(_act)


def ends_when_built() -> nn.Module:
    os._exit(4)


def hangs_when_built() -> nn.Module:
    time.sleep(3600)
    raise AssertionError


def ends_when_run() -> nn.Module:
    return _Ends().eval()


class _Ends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os._exit(6)


class Slow(nn.Module):
    """Each forward takes a second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(1.0)
        return x * 2
