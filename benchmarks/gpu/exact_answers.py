"""Row "answers": every answer of a mixed open loop compared with a direct forward pass.

Several architectures at once, a cache that holds half of their weights, random inputs, at low rates and above
what the GPU can do. As a program it does the two parts that need processes of their own:

    exact_answers.py references OUT.npz --config WORKER.toml --dtype float16 --models resnet50,bert_base
    exact_answers.py load ADDRESS REFERENCES.npz --rates 100:5,2000:10 --copies 3 --slo-ms 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from exact_rig import NotHere, Rig, RowFailed, check
from numpy.typing import NDArray

from slosched.clients.aio import AsyncClient, connect
from slosched.clock import now_ns
from slosched.errors import ConnectionLost
from slosched.messages import InferReply
from slosched.units import NS_PER_MS, NS_PER_S

#: Inputs of each model, drawn from for each request.
INPUTS = 48
#: By how much an answer may differ, as a part of the largest value of the right one, by precision; never
#: more than a third of what lies between the answers to two inputs, which must leave room for rounding.
TOLERANCE = {"float32": 5e-3, "float16": 3e-2, "bfloat16": 1e-1}
LEAST_TOLERANCE = 3e-4
_MODELS = ("resnet_tiny", "resnet18", "resnet50", "vit_base", "bert_base", "cupy_mlp")
_CLIENTS = 3
_REFERENCES_S = 90.0
_ANSWERS_S = 120.0
_LOAD_S = 240.0
_DRAIN_S = 20.0
_MOST_WAITING = 8_000

Array = NDArray[Any]


def write_references(
    path: Path, names: list[str], config: Path | None, dtype: str, device: str, seed: int
) -> None:
    """Random inputs of each model and a direct forward pass of them in float32, into `path`.

    Raises SystemExit for a model whose answers to different inputs are too near for a comparison.
    """
    import torch

    from slosched.config import WorkerConfig
    from slosched.config_file import load_worker_config
    from slosched.daemon.backends.sources import worker_specs

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    base = load_worker_config(config) if config is not None else WorkerConfig()
    specs = worker_specs(base)
    arrays: dict[str, Array] = {}
    for name in names:
        if name in specs:
            rows = _rows(
                specs[name].input_shape, specs[name].input_dtype, specs[name].input_high, seed
            )
            found = _direct(specs[name], rows, device)
            labelled = next((label for label in specs[name].labels if label in TOLERANCE), dtype)
        else:
            rows, found = _direct_cupy(name, seed)
            labelled = "float32"
        gaps = [
            np.abs(found[i] - found[j]).max() / max(np.abs(found[i]).max(), 1e-9)
            for i in range(INPUTS)
            for j in range(i)
        ]
        apart = float(min(gaps))
        constant = max(gaps) == 0
        # Another input's answer must never pass for the right one.
        tolerance = TOLERANCE[labelled] if constant else min(TOLERANCE[labelled], apart / 3)
        if tolerance < LEAST_TOLERANCE:
            raise SystemExit(f"{name}: answers to two inputs are only {apart:.3g} apart")
        arrays |= {
            f"{name}/inputs": rows,
            f"{name}/answers": found,
            f"{name}/tolerance": np.array(tolerance),
        }
        nearest = "constant" if constant else f"answers at least {apart:.3g} apart"
        print(f"{name}: {nearest}, tolerance {tolerance:.3g}", flush=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _rows(shape: tuple[int, ...], dtype: str, high: int, seed: int) -> Array:
    draw = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return draw.random((INPUTS, *shape), dtype=np.float32).astype(dtype)
    return draw.integers(0, max(2, high), (INPUTS, *shape)).astype(dtype)


def _direct(spec: Any, rows: Array, device: str) -> Array:
    """Each row alone, in float32, from the weights as they were loaded."""
    import torch

    from slosched.daemon.backends.contract import single_output

    module = spec.build().float().to(device)
    kept = {key: value.clone() for key, value in module.state_dict().items()}
    answers = []
    with torch.inference_mode():
        for row in rows:
            module.load_state_dict(kept)
            batch = torch.from_numpy(row[None].copy()).to(device)
            answers.append(single_output(module(batch), 1, name=spec.name, take=spec.output))
    return torch.cat(answers).float().cpu().numpy().reshape(INPUTS, -1)


def _direct_cupy(name: str, seed: int) -> tuple[Array, Array]:
    import cupy

    from slosched.daemon.backends.cuda.cupy_zoo import CUPY_ZOO

    model = CUPY_ZOO[name]()
    rows = _rows(model.input_shape, model.input_dtype, 2, seed)
    weights = {key: cupy.asarray(value) for key, value in model.weights.items()}
    found = cupy.asnumpy(model.run(weights, cupy.asarray(rows)))
    return rows, found.reshape(INPUTS, -1)


class Comparer:
    """Counts answers, and compares each that was served with its own input's."""

    def __init__(self, references: dict[str, Array]) -> None:
        self.references = references
        self.sent = self.compared = self.wrong = 0
        self.codes: Counter[int] = Counter()
        self.batches: Counter[int] = Counter()
        self.by_model: Counter[str] = Counter()
        self.wrong_by_model: Counter[str] = Counter()
        self.examples: list[str] = []
        self.worst: dict[str, float] = {}

    def take(self, name: str, place: int, reply: InferReply, output: Any) -> None:
        self.codes[reply.code] += 1
        if reply.code != 0:
            return
        self.compared += 1
        self.by_model[name] += 1
        self.batches[reply.batch_size] += 1
        wanted = self.references[f"{name}/answers"]
        size = 0 if output is None else len(output)
        right = wanted[place]
        found = np.frombuffer(output, np.float32) if size == 4 * len(right) else None
        if found is None and size == 8 * len(right):
            found = np.frombuffer(output, np.int64).astype(np.float32)
        error = np.inf
        if found is not None and np.isfinite(found).all():
            error = float(np.abs(found - right).max() / max(np.abs(right).max(), 1e-9))
            self.worst[name] = max(self.worst.get(name, 0.0), error)
        if error <= float(self.references[f"{name}/tolerance"]):
            return
        self.wrong += 1
        self.wrong_by_model[name] += 1
        if len(self.examples) < 10:
            near = -1
            if found is not None:
                near = int(np.abs(wanted - found).max(axis=1).argmin())
            self.examples.append(
                f"{name}, input {place}: {size} bytes, off by {error:.3g}, batch {reply.batch_size}, "
                f"nearest to the answer of input {near}"
            )

    def document(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "compared": self.compared,
            "wrong": self.wrong,
            "codes": dict(self.codes),
            "batches": dict(self.batches),
            "by_model": dict(self.by_model),
            "wrong_by_model": dict(self.wrong_by_model),
            "worst": self.worst,
            "examples": self.examples,
        }


async def _phase(
    client: AsyncClient,
    models: list[Any],
    comparer: Comparer,
    rate: float,
    seconds: float,
    slo_ns: int,
    draw: random.Random,
) -> None:
    due_ns = now_ns()
    end_ns = due_ns + round(seconds * NS_PER_S)
    waiting = 0

    def answered(name: str, place: int) -> Any:
        def on_reply(reply: InferReply, output: Any) -> None:
            nonlocal waiting
            waiting -= 1
            comparer.take(name, place, reply, output)

        return on_reply

    while due_ns < end_ns:
        while due_ns <= now_ns() and due_ns < end_ns:
            due_ns += round(draw.expovariate(rate) * NS_PER_S)
            if waiting >= _MOST_WAITING:
                continue
            model = draw.choice(models)
            place = draw.randrange(INPUTS)
            rows = comparer.references[f"{model.name}/inputs"]
            try:
                client.submit(
                    model,
                    slo_ns=slo_ns,
                    frame=rows[place].tobytes(),
                    on_reply=answered(model.name, place),
                )
            except ConnectionLost:  # more than the sockets take
                continue
            waiting += 1
            comparer.sent += 1
        await asyncio.sleep(0.0005)
    give_up_ns = now_ns() + round(_DRAIN_S * NS_PER_S)
    while waiting and now_ns() < give_up_ns:
        await asyncio.sleep(0.01)
    if waiting:
        raise SystemExit(f"{waiting} requests were not answered within {_DRAIN_S:g} s")


async def load(
    address: str, path: Path, rates: list[tuple[float, float]], copies: int, slo_ns: int, seed: int
) -> dict[str, Any]:
    """Send the phases `rates` (requests/s, seconds) and return what was compared."""
    with np.load(path) as file:
        references = {key: file[key] for key in file.files}
    names = sorted({key.rpartition("/")[0] for key in references})
    comparer = Comparer(references)
    draw = random.Random(seed)
    async with connect(address) as client:
        models = [m for name in names for m in await client.load(name, copies, timeout_s=_LOAD_S)]
        for rate, seconds in rates:
            await _phase(client, models, comparer, rate, seconds, slo_ns, draw)
    return comparer.document()


def added(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what several loads found."""
    total: dict[str, Any] = {"sent": 0, "compared": 0, "wrong": 0, "examples": [], "worst": {}}
    for key in ("codes", "batches", "by_model", "wrong_by_model"):
        counts: Counter[str] = Counter()
        for each in documents:
            counts.update({str(k): v for k, v in each[key].items()})
        total[key] = dict(counts)
    for each in documents:
        for key in ("sent", "compared", "wrong"):
            total[key] += each[key]
        total["examples"] = (total["examples"] + each["examples"])[:10]
        for name, error in each["worst"].items():
            total["worst"][name] = max(error, total["worst"].get(name, 0.0))
    return total


def answers(rig: Rig) -> dict[str, Any]:
    """Row "answers": three clients' mixed load on the rig's worker, its answers compared."""
    if rig.settings.emulated:
        raise NotHere("emulated GPUs compute nothing")
    directory = rig.new_directory("references")
    file = directory / "references.npz"
    options = rig.settings.worker_options
    dtype = options[options.index("--dtype") + 1] if "--dtype" in options else "float32"
    making = [
        sys.executable,
        __file__,
        "references",
        str(file),
        "--models",
        ",".join(_MODELS),
        "--dtype",
        dtype,
        "--device",
        rig.settings.device,
    ]
    subprocess.run(making, check=True, timeout=_REFERENCES_S, stdout=subprocess.DEVNULL)
    seconds = rig.settings.seconds(5)
    rates = f"{100 / _CLIENTS:g}:{seconds:g},{1200 / _CLIENTS:g}:{seconds:g},{4500 / _CLIENTS:g}:{seconds:g}"
    with rig.serving("answers") as served:
        loads = [
            [
                sys.executable,
                __file__,
                "load",
                served.address,
                str(file),
                "--rates",
                rates,
                "--copies",
                "3",
                "--seed",
                str(number),
            ]
            for number in range(_CLIENTS)
        ]
        processes = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in loads]
        try:
            printed = [each.communicate(timeout=_ANSWERS_S)[0] for each in processes]
        finally:
            for each in processes:
                each.kill()
                each.wait(10)
        if any(each.returncode for each in processes):
            raise RowFailed(f"a client failed: {printed}")
    found = added([json.loads(text.strip().splitlines()[-1]) for text in printed])
    if not found["compared"]:
        raise RowFailed("no answer was compared")
    return {
        "figures": found,
        "checks": [
            check(
                "answers compared with a direct forward pass, mixed load",
                found["compared"],
                "",
                ">= 10000",
            ),
            check("answers that were wrong", found["wrong"], "", "<= 0"),
            check(
                "largest difference of a right one, of its largest value",
                100 * max(found["worst"].values()),
                "%",
            ),
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    making = parts.add_parser("references")
    making.add_argument("out", type=Path)
    making.add_argument("--models", required=True)
    making.add_argument("--config", type=Path)
    making.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    making.add_argument("--device", default="cuda:0")
    making.add_argument("--seed", type=int, default=1)
    loading = parts.add_parser("load")
    loading.add_argument("address")
    loading.add_argument("references", type=Path)
    loading.add_argument("--rates", required=True, help="RATE:SECONDS with commas")
    loading.add_argument("--copies", type=int, default=3)
    loading.add_argument("--slo-ms", type=float, default=200.0)
    loading.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.part == "references":
        if options.device == "cpu":
            os.nice(10)  # what runs beside it is measured
        write_references(
            options.out,
            options.models.split(","),
            options.config,
            options.dtype,
            options.device,
            options.seed,
        )
        return 0
    rates = [
        (float(rate), float(seconds))
        for rate, _, seconds in (part.partition(":") for part in options.rates.split(","))
    ]
    slo_ns = round(options.slo_ms * NS_PER_MS)
    found = asyncio.run(
        load(options.address, options.references, rates, options.copies, slo_ns, options.seed)
    )
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
