"""The zoo's CuPy models: a chain of matrix products, and a multilayer perceptron.

Weights are random, drawn from a seed made of the name. The chain goes through cuBLAS, which CuPy does not
capture; the perceptron's products are kernels of its own, so it runs as a CUDA graph.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from slosched.daemon.backends.cuda.cupy_program import CupyModel, cupy

_CHAIN, _CHAIN_WIDTH = 8, 1024
_LAYERS = (784, 512, 256, 10)

# One warp per output element: lanes stride over the row, so reads of both operands are contiguous.
_LINEAR = r"""
extern "C" __global__
void linear(const float* x, const float* w, const float* bias, float* y,
            int batch, int in, int out, int relu) {
    int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (warp >= batch * out) return;
    const float* row = x + (long long)(warp / out) * in;
    const float* column = w + (long long)(warp % out) * in;
    float sum = 0.f;
    for (int i = lane; i < in; i += 32) sum += row[i] * column[i];
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
    if (lane == 0) {
        sum += bias[warp % out];
        y[warp] = relu && sum < 0.f ? 0.f : sum;
    }
}
"""


def matmul_chain() -> CupyModel:
    """Eight products with 1024 x 1024 matrices, each scaled to keep the size of its input."""
    random = _random("cupy_matmul")
    scale = np.float32(1 / np.sqrt(_CHAIN_WIDTH))
    weights = {
        f"w{i}": random.standard_normal((_CHAIN_WIDTH, _CHAIN_WIDTH), dtype=np.float32) * scale
        for i in range(_CHAIN)
    }

    def run(arrays: Mapping[str, Any], batch: Any) -> Any:
        for i in range(_CHAIN):
            batch = batch @ arrays[f"w{i}"]
        return batch

    return CupyModel(weights, run, (_CHAIN_WIDTH,))


def mlp() -> CupyModel:
    """784-512-256-10 with ReLU between, as MNIST's classic."""
    random = _random("cupy_mlp")
    weights = {}
    for i, (inside, outside) in enumerate(pairwise(_LAYERS)):
        scale = np.float32(np.sqrt(2 / inside))
        weights[f"w{i}"] = random.standard_normal((outside, inside), dtype=np.float32) * scale
        weights[f"b{i}"] = random.standard_normal(outside, dtype=np.float32) * np.float32(0.1)
    kernel = cupy.RawKernel(_LINEAR, "linear")

    def run(arrays: Mapping[str, Any], batch: Any) -> Any:
        last = len(_LAYERS) - 2
        for i in range(last + 1):
            inside, outside = _LAYERS[i], _LAYERS[i + 1]
            result = cupy.empty((len(batch), outside), cupy.float32)
            threads = len(batch) * outside * 32
            kernel(
                (-(-threads // 256),),
                (256,),
                (
                    batch,
                    arrays[f"w{i}"],
                    arrays[f"b{i}"],
                    result,
                    np.int32(len(batch)),
                    np.int32(inside),
                    np.int32(outside),
                    np.int32(i < last),
                ),
            )
            batch = result
        return batch

    return CupyModel(weights, run, (_LAYERS[0],))


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


CUPY_ZOO: dict[str, Callable[[], CupyModel]] = {"cupy_matmul": matmul_chain, "cupy_mlp": mlp}
