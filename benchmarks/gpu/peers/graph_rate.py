"""ResNet-50 as plain CUDA graphs, back to back: what the GPU gives without any server. Prints one JSON object.

`graph_rate.py DEVICE`: for each batch size ns per replay of 300 in a row, and the spread of single replays.
"""

from __future__ import annotations

import importlib
import json
import sys
from statistics import median
from typing import Any

from peer_model import MAX_BATCH, resnet50

SIZES = (1, 2, 4, 8, MAX_BATCH)
_IN_A_ROW = 300


def measure(device: str) -> dict[str, Any]:
    torch: Any = importlib.import_module("torch")
    model = resnet50(device)
    found: dict[str, Any] = {"back_to_back_ns": {}, "alone_ns": {}, "torch": torch.__version__}
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for size in SIZES:
            images = torch.rand(size, 3, 224, 224, device=device, dtype=torch.float16)
            images = images.to(memory_format=torch.channels_last)
            for _ in range(3):
                model(images)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outputs = model(images).logits
            for _ in range(50):
                graph.replay()
            stream.synchronize()
            found["back_to_back_ns"][size] = _timed(torch, stream, graph, _IN_A_ROW) / _IN_A_ROW
            alone = [_timed(torch, stream, graph, 1) for _ in range(100)]
            found["alone_ns"][size] = {"p50": median(alone), "max": max(alone)}
            del outputs
    return found


def _timed(torch: Any, stream: Any, graph: Any, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    for _ in range(replays):
        graph.replay()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e6


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
