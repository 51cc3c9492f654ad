"""A worker with models of several inputs and of any length, beside a plain one, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from msgspec import structs

import cpu_models
from slosched.config import ModelSource, WorkerConfig
from slosched.daemon.backends import reference_forward
from slosched.daemon.worker import WorkerServer
from slosched.messages import InferResult, LoadModelResult
from slosched.signature import Tensor, joined, split
from worker_rig import BareController

LENGTHS = (8, 24, 64)
TOKENS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int64", (-1,)))
PAIR = (
    Tensor("image", "float32", (3, 5)),
    Tensor("place", "int16", ()),
    Tensor("on", "bool", (7,)),
)
MODELS = (
    ModelSource("pooled", factory="cpu_models:Pooled", inputs=TOKENS, lengths=LENGTHS),
    ModelSource("pairs", factory="cpu_models:Pairs", inputs=PAIR),
    ModelSource("bert_masked", lengths=(16, 48)),
)
DIRECT = {"pooled": cpu_models.Pooled().eval(), "pairs": cpu_models.Pairs().eval()}
PLAIN = "resnet_tiny"
_INCARNATIONS = count(1)


@contextmanager
def worker(device: str, models: tuple[ModelSource, ...] = MODELS) -> Iterator[BareController]:
    """A controller of a worker on `device` that offers `models`."""
    config = WorkerConfig(
        device=device, port=0, bind="127.0.0.1", models=models, weights_cache_bytes=2 * 2**30
    )
    with WorkerServer(config) as server:
        controller = BareController(server.port)
        try:
            controller.hello(next(_INCARNATIONS))
            yield controller
        finally:
            controller.close()


def request(name: str, lengths: tuple[int, ...], draw: np.random.Generator) -> dict[str, Any]:
    """Inputs of one request by name."""
    if name == "pairs":
        image = draw.random((3, 5), dtype=np.float32)
        place = np.asarray(draw.integers(0, 99), np.int16)
        return {"image": image, "place": place, "on": draw.random(7) < 0.5}
    if name == PLAIN:
        return {"x": draw.random((3, 64, 64), dtype=np.float32)}
    length = int(min(lengths[-1], 1 + draw.exponential(lengths[-1] / 3)))
    words, ids, mask = (
        (1000, "ids", "mask") if name == "pooled" else (30_000, "input_ids", "attention_mask")
    )
    return {ids: draw.integers(0, words, length), mask: np.ones(length, np.int64)}


def direct(name: str, arrays: dict[str, Any]) -> list[Any]:
    """The outputs for one request, by a forward pass on the CPU at its own length."""
    if name == PLAIN:
        return [reference_forward(name, arrays["x"])]
    if name not in DIRECT:
        return [reference_forward(name, arrays)]
    given = {key: torch.from_numpy(array.copy())[None] for key, array in arrays.items()}
    with torch.inference_mode():
        found = DIRECT[name](**given)
    outputs = found.values() if isinstance(found, dict) else found
    return [each[0].numpy() for each in outputs]


def check_answers(
    controller: BareController, loaded: dict[str, LoadModelResult], answers: int, tolerance: float
) -> None:
    """Ask `answers` requests in batches of mixed lengths, and compare each output with a direct pass."""
    draw, compared = np.random.default_rng(5), 0
    while compared < answers:
        name = str(draw.choice(list(loaded)))
        model, model_id = loaded[name], list(loaded).index(name)
        lengths = tuple(each.length for each in model.length_classes)
        size = int(draw.integers(1, max(model.batch_sizes) + 1))
        asked = [request(name, lengths, draw) for _ in range(size)]
        own = tuple(len(next(iter(each.values()))) for each in asked) if lengths else ()
        frames = [bytes(joined([a.tobytes() for a in each.values()])) for each in asked]
        message = controller.infer_message(size, sizes=tuple(map(len, frames)), model_id=model_id)
        if lengths:
            fitting = [length for length in lengths if length >= max(own)]
            message = structs.replace(message, length=int(draw.choice(fitting)), lengths=own)
        controller.send(message, *frames)
        result, found = controller.receive()
        assert isinstance(result, InferResult), result
        assert result.output_sizes == tuple(map(len, found)) and len(found) == size
        gives = model.outputs or (Tensor("output", model.output_dtype, model.output_shape),)
        for place, (arrays, frame) in enumerate(zip(asked, found, strict=True)):
            length = own[place] if own else 0
            parts = split(gives, length, frame)
            for tensor, part, wanted in zip(gives, parts, direct(name, arrays), strict=True):
                answer = np.frombuffer(part, tensor.dtype).reshape(tensor.shape_at(length))
                assert answer.shape == wanted.shape, (name, tensor)
                if answer.dtype.kind != "f":
                    assert (answer == wanted).all(), (name, tensor)
                    continue
                error = np.abs(answer - wanted).max() / max(np.abs(wanted).max(), 1e-6)
                assert error < tolerance, (name, tensor, length, message.length, error)
        compared += size


def load_all(controller: BareController, names: tuple[str, ...]) -> dict[str, LoadModelResult]:
    return {name: controller.load(name, model_id) for model_id, name in enumerate(names)}
