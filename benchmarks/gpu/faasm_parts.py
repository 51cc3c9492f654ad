"""What faasm.py runs, in the order of importance: commands with their limits. Needs no GPU to be read."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command. `needs_s` is what it takes on an H200: it is not begun with less; `limit_s` ends it.

    `experiment` is one of `slosched exp`, with `words` behind its name; without one `words` are pytest's.
    `trial` are words that stand behind the others where there is no GPU.
    """

    words: tuple[str, ...]
    needs_s: float
    limit_s: float
    experiment: str = ""
    trial: tuple[str, ...] = ()
    on_gpu: bool = True


#: A new process on a GPU takes seconds: with a shorter time-out slosched refuses cold requests of L4.
_INFERENCE = ("--systems", "slosched,process,loop", "--timeout", "20s")
_SMALL_INFERENCE = ("--device", "cpu", "--size", "micro", "--duration", "300ms", "--workers", "1")
_GRAPHS = "whole,blocked,local,slot,slots"
_SMALL_MATRICES = ("--sizes", "64", "--splits", "0,1", "--systems", "whole,blocked,local")


def _matrices(kernel: str, sizes: str, splits: str, systems: str, repeats: int) -> tuple[str, ...]:
    return (
        *("--kernel", kernel, "--sizes", sizes, "--splits", splits, "--systems", systems),
        *("--workers", "8", "--repeats", str(repeats)),
    )


PARTS: dict[str, Part] = {
    "functions": Part(words=("tests/gpu/test_functions_on_gpu.py",), needs_s=20, limit_s=100),
    "coldstart": Part(
        experiment="coldstart",
        words=("--device", "cuda", "--repeats", "6", "--instances", "4", "--fill", "40"),
        needs_s=60,
        limit_s=150,
        trial=("--device", "cpu", "--size", "micro", "--fill", "3", "--repeats", "2"),
    ),
    "matrices-torch": Part(
        experiment="matrices",
        words=_matrices("torch", "2000", "0,1,2,3", _GRAPHS, 3),
        needs_s=30,
        limit_s=70,
        trial=_SMALL_MATRICES,
    ),
    "latency": Part(
        experiment="inference-latency",
        words=(*("--device", "cuda", "--cold", "none,5", "--rungs", "L1,L3,L4"), *_INFERENCE),
        needs_s=60,
        limit_s=110,
        trial=(*_SMALL_INFERENCE, "--rungs", "L3"),
    ),
    "throughput": Part(
        experiment="inference-throughput",
        words=(
            *("--device", "cuda", "--workers", "4", "--cold", "none,20%", "--rungs", "L3"),
            *("--fractions", "0.3,0.7,1.1", "--thinks", "500ms", "--duration", "2s", *_INFERENCE),
        ),
        needs_s=70,
        limit_s=120,
        trial=(*_SMALL_INFERENCE, "--fractions", "0.5", "--systems", "process,loop"),
    ),
    "sgd": Part(
        experiment="sgd",
        words=(
            *("--size", "full", "--workers", "1,2,4,8,16", "--modes", "shared,copies"),
            *("--repeats", "1", "--epochs", "5", "--no-count-lost"),
        ),
        needs_s=90,
        limit_s=170,
        trial=("--size", "micro", "--workers", "1,2"),
        on_gpu=False,
    ),
    "matrices-torch-8000": Part(
        experiment="matrices",
        words=_matrices("torch", "8000", "0,2,3", _GRAPHS, 2),
        needs_s=40,
        limit_s=90,
        trial=_SMALL_MATRICES,
    ),
    "matrices-cupy": Part(
        experiment="matrices",
        words=_matrices("cupy", "2000,8000", "2", "whole,blocked,slots", 2),
        needs_s=25,
        limit_s=60,
        trial=(*_SMALL_MATRICES, "--kernel", "numpy"),
    ),
    "matrices-16384": Part(
        experiment="matrices",
        words=_matrices("torch", "16384", "2", "whole,blocked,slots", 1),
        needs_s=80,
        limit_s=140,
        trial=_SMALL_MATRICES,
    ),
}
#: Where there is no GPU: the same claim on the emulated lane.
TRIAL_TESTS = ("tests/test_faasm_matrices_hosts.py", "-k", "lane_of_a_gpu")


def command(part: Part, out: str, *, gpu: bool, resume: bool) -> list[str]:
    """The command line of a part, whose run directory is `out`."""
    if not part.experiment:
        words = part.words if gpu else TRIAL_TESTS
        return [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *words]
    words = (*part.words, *(() if gpu else part.trial))
    return [
        *(sys.executable, "-m", "slosched", "exp", part.experiment, *words, "--out", out),
        *(["--resume"] if resume else []),
    ]
