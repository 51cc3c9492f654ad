"""How an experiment has slosched open a GPU: for functions, without the cache that models' weights have."""

from __future__ import annotations

#: The GPU of every experiment.
CUDA = "cuda:0"
#: By default it is four fifths of the GPU, which would be billed, and missing for calls.
_WEIGHTS_CACHE = "256MiB"


def gpu_words(device: str = CUDA) -> list[str]:
    """Words for `slosched worker` whose functions run on `device`: one GPU, or an emulated one."""
    return ["--device", device, "--gpus", "1", "--weights-cache", _WEIGHTS_CACHE]
