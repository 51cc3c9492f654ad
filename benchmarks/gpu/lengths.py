"""Texts of 5 to 512 tokens on one GPU: length classes beside padding everything to the longest.

    benchmarks/gpu/lengths.py --out DIR                                   # on cuda:0, about four minutes
    benchmarks/gpu/lengths.py --out DIR --device emulated --profile P     # does it work?
    benchmarks/gpu/lengths.py --table                                     # lengths.md from the results

BERT with token ids and a mask, log-normal lengths, an open loop at rising rates and one SLO, in three forms:
one class of 512 tokens (padded), a queue for each of the classes 64, 128, 256 and 512 (apart), and batches
that may hold several of these (mixed, the default). Meanwhile a second client sends texts of known answers,
which are compared with a direct forward pass in float32. Beside each row stands the simulator with that GPU's
profile.
DIR gets lengths.json, lengths.md, and the profile. A machine needs what exact_time.sh says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import numpy as np
from measured_on import measured_on
from numpy.typing import NDArray

from slosched.clients.aio import AsyncClient, connect
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.errors import SloschedError
from slosched.experiment.children import Children
from slosched.gpu_profile import GpuProfile
from slosched.output_files import write_file
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.lengths import Lengths
from slosched.workloads.mix import MixEntry, mix

MODEL = "bert_masked"
LENGTHS = Lengths(median=60, sigma=1.0, least=5, most=512)
CLASSES = (64, 128, 256, 512)
#: Each way: its length classes, and whether batches may hold several of them.
WAYS = {"padded": ((512,), True), "apart": (CLASSES, False), "mixed": (CLASSES, True)}
#: Parts of the rate that full batches would carry, each request in its own class.
LOADS = (0.2, 0.5, 0.8, 1.1)
#: Texts of known answers, and how many a second are asked.
TEXTS, TEXTS_PER_S = 64, 40
_MAX_BATCH = 16
_READY_S, _REFERENCES_S = 300.0, 120.0
#: How far an answer in float16 may be from one in float32, of its largest value.
_TOLERANCE = 3e-2
_SEED = 3

RESULTS = Path(__file__).resolve().parent.parent / "results" / "lengths.json"
PAGE = Path(__file__).resolve().parent / "lengths.md"

Array = NDArray[Any]


@dataclass
class Row:
    """One rate in one way. Shares are the client's, of what was sent."""

    way: str
    rate_per_s: float
    sent: int = 0
    in_time: float = 0.0
    p99_ms: float = 0.0
    simulated: float = 0.0
    compared: int = 0
    wrong: int = 0
    worst: float = 0.0
    examples: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------ answers


def texts() -> list[dict[str, Array]]:
    """Inputs of known answers, of every length class."""
    generator, draws = np.random.default_rng(_SEED), LENGTHS.draws(_SEED)
    found = []
    for _ in range(TEXTS):
        length = next(draws)
        ids = generator.integers(0, 30_000, length)
        found.append({"input_ids": ids, "attention_mask": np.ones(length, np.int64)})
    return found


def write_references(path: Path, device: str) -> None:
    """The answers to `texts`, by a direct forward pass in float32 at their own length, into `path`."""
    import torch

    from slosched.daemon.backends.zoo import ZOO

    torch.backends.cuda.matmul.allow_tf32 = False
    model = ZOO[MODEL].build().to(device)
    answers = {}
    with torch.inference_mode():
        for place, inputs in enumerate(texts()):
            given = {name: torch.from_numpy(a)[None].to(device) for name, a in inputs.items()}
            found = model(**given)
            logits = found["logits"] if "logits" in found else next(iter(found.values()))
            answers[str(place)] = logits[0].float().cpu().numpy()
    np.savez(path, **answers)


async def compare_answers(
    client: AsyncClient, references: Path | None, row: Row, stop: asyncio.Event
) -> None:
    """Ask the texts in turn until `stop`, and compare what is answered in time (not what is emulated)."""
    (model,) = await client.load(MODEL)
    asked, wanted = texts(), None if references is None else np.load(references)
    place, waiting = 0, set()

    async def ask(number: int) -> None:
        answer = await client.infer(model, asked[number], slo="500ms")
        if not answer.ok or wanted is None:
            return
        output = next(iter(answer.outputs.values()))
        right = wanted[str(number)]
        off = float(np.abs(output - right).max() / max(np.abs(right).max(), 1e-6))
        row.compared += 1
        row.worst = max(row.worst, off)
        if output.shape != right.shape or not off < _TOLERANCE:
            row.wrong += 1
            row.examples = [*row.examples, f"text {number}: {off:.3g}"][:5]

    async def quietly(number: int) -> None:
        with suppress(SloschedError):  # refused or too late: there is nothing to compare
            await ask(number)

    while not stop.is_set():
        task = asyncio.ensure_future(quietly(place % TEXTS))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
        place += 1
        await asyncio.sleep(1 / TEXTS_PER_S)
    await asyncio.gather(*waiting)


# -------------------------------------------------------------------------------------- serving


@contextmanager
def served(options: argparse.Namespace, folder: Path, way: str) -> Iterator[str]:
    """The address of a controller over one worker that serves the model in this way."""
    classes, mixes = WAYS[way]
    folder.mkdir()
    config = folder / "worker.toml"
    write_file(
        config,
        f'[models.{MODEL}]\nlengths = {list(classes)}\ndtype = "{options.dtype}"\n'.encode(),
    )
    where = ["--bind", "127.0.0.1", "--port", "0"]
    emulated = options.device == "emulated"
    given = ["--profile", str(options.profile)] if emulated else ["--config", str(config)]
    with Children() as children:
        worker = children.start(
            "worker", ["worker", "--device", options.device, *where, *given], folder / "worker.log"
        )
        port = children.wait_ready(worker, within_s=_READY_S)
        controller = children.start(
            "controller",
            [
                *("controller", "INFER5", "--workers", f"127.0.0.1:{port}", *where),
                *("--max-batch", str(_MAX_BATCH), "--http-port", "-1"),
                *("--log-dir", str(folder / "run")),
                "--mix-lengths" if mixes else "--no-mix-lengths",
            ],
            folder / "controller.log",
        )
        yield f"127.0.0.1:{children.wait_ready(controller, within_s=60.0)}"


async def measure(address: str, row: Row, options: argparse.Namespace, folder: Path) -> None:
    """Run the open loop of `row` beside the client that compares answers."""
    entry = f"{MODEL}:1:{row.rate_per_s}:{options.slo_ms}ms::{LENGTHS.text}"
    command = [sys.executable, "-m", "slosched", "client", address, "mix", entry]
    command += [
        f"{options.seconds}s",
        "--json",
        "--out",
        str(folder / f"client-{row.rate_per_s:.0f}"),
    ]
    stop = asyncio.Event()
    async with connect(address, timeout_s=_READY_S) as client:
        comparing = asyncio.ensure_future(compare_answers(client, options.references, row, stop))
        try:
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            try:
                printed, _ = await asyncio.wait_for(process.communicate(), _READY_S)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        finally:
            stop.set()
        await comparing
    found = json.loads(printed)
    (step,) = found["steps"]
    row.sent, row.in_time = step["sent"], step["in_time"] / max(1, step["sent"])
    row.p99_ms = (step.get("latency_p99_ns") or 0) / NS_PER_MS


# ------------------------------------------------------------------------------ the simulator


def only(profile: GpuProfile, classes: tuple[int, ...]) -> GpuProfile:
    """The profile with these length classes of the model alone."""
    model = profile.model(MODEL)
    times = {length: model.exec_ns_at[length] for length in classes}
    chosen = replace(model, exec_ns=times[max(times)], exec_ns_at=times)
    return replace(profile, models={MODEL: chosen})


def simulated(profile: GpuProfile, row: Row, options: argparse.Namespace) -> float:
    """The client's share in time, in virtual time, with the same arrivals."""
    classes, mixes = WAYS[row.way]
    entry = MixEntry(MODEL, 1, row.rate_per_s, (0.0, options.slo_ms * NS_PER_MS), lengths=LENGTHS)
    spec = SimSpec(
        workload=mix([entry], options.seconds * NS_PER_S),
        scheduler=SchedulerConfig(mix_lengths=mixes, max_batch=_MAX_BATCH),
        profiles=(only(profile, classes),),
        gpus=1,
    )
    return simulate(spec).satisfaction


def capacity_per_s(profile: GpuProfile) -> float:
    """Requests/s of full batches, each request in the shortest class that takes it."""
    times = profile.model(MODEL).exec_ns_at
    draws = LENGTHS.draws(_SEED)
    total_ns = 0.0
    for _ in range(2000):
        length = next(draws)
        table = times[min(each for each in times if each >= length)]
        total_ns += min(ns / batch for batch, ns in table.items() if batch <= _MAX_BATCH)
    return 2000 * NS_PER_S / total_ns


def measured_profile(options: argparse.Namespace) -> GpuProfile:
    """The profile of the GPU, measured now unless it was given."""
    if options.profile is not None:
        return load_profile(options.profile)
    path = options.out / "lengths-profile.toml"
    command = [sys.executable, "-m", "slosched", "profile", MODEL, "--device", options.device]
    command += ["--dtype", options.dtype, "--out", str(path)]
    subprocess.run(command, check=True, timeout=_READY_S)
    return load_profile(path)


# --------------------------------------------------------------------------------------- the page


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    given, rows = document["settings"], [Row(**each) for each in document["rows"]]
    where = given["device"]
    if given["profile"]:
        where += f" with the profile {given['profile']}"
    lines = [
        "# Texts of 5 to 512 tokens on one GPU",
        "",
        f"Written by [lengths.py](lengths.py): {MODEL}, {given['dtype']}, {where}, log-normal lengths "
        f"({LENGTHS.text}: median, sigma, least, most), SLO {given['slo_ms']} ms, {given['seconds']} s a row. "
        "Per cent in time by the client. Full batches, each request in its own class, would be "
        f"{document['capacity_per_s']:,.0f} requests/s. *padded*: every text to 512 tokens; *apart*: a queue "
        "for each length class; *mixed*: batches may hold several classes (the default).",
        "",
        "| requests/s | way | in time | simulated | p99 ms | answers compared | wrong | largest difference |",
        "| --: | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {row.rate_per_s:,.0f} | {row.way} | {100 * row.in_time:.2f} % | {100 * row.simulated:.2f} % | "
        f"{row.p99_ms:.1f} | {row.compared:,} | {row.wrong} | {100 * row.worst:.4f} % |"
        for row in sorted(rows, key=lambda each: (each.rate_per_s, list(WAYS).index(each.way)))
    ]
    return "\n".join([*lines, "", f"*{document['measured_on']}.*"]) + "\n"


def run(options: argparse.Namespace, work: Path) -> list[Row]:
    profile = measured_profile(options)
    capacity = capacity_per_s(profile)
    print(f"full batches: {capacity:,.0f} requests/s", flush=True)
    if options.device != "emulated":
        options.references = work / "references.npz"
        command = [sys.executable, __file__, "--references", str(options.references)]
        command += ["--device", options.device, "--out", str(options.out)]
        subprocess.run(command, check=True, timeout=_REFERENCES_S)
    rows: list[Row] = []
    document: dict[str, Any] = {
        "settings": {
            "device": options.device,
            "profile": options.profile.name if options.profile else "",
            "dtype": options.dtype,
            "slo_ms": options.slo_ms,
            "seconds": options.seconds,
        },
        "measured_on": measured_on(options.device, options.commit),
        "capacity_per_s": capacity,
    }
    for way in WAYS:
        with served(options, work / way, way) as address:
            for load in LOADS:
                row = Row(way, round(load * capacity))
                asyncio.run(measure(address, row, options, work / way))
                row.simulated = simulated(profile, row, options)
                rows.append(row)
                print(row, flush=True)
                document["rows"] = [asdict(each) for each in rows]
                text = json.dumps(document, indent=1) + "\n"
                write_file(options.out / "lengths.json", text.encode())
                write_file(options.out / "lengths.md", page(document).encode())
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Length classes beside padding, on one GPU.")
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument("--table", action="store_true", help="only write lengths.md from results/")
    parser.add_argument("--commit", default="", help="what was measured, outside a checkout")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--profile", type=Path, help="of the GPU; default: measured now")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slo-ms", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--references", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.references is not None:
        write_references(options.references, options.device)
        return 0
    if options.table:
        document = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_file(PAGE, page(document).encode(), replacing=True)
        return 0
    if options.out is None:
        parser.error("--out is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        rows = run(options, Path(work))
    wrong = sum(row.wrong for row in rows)
    return 1 if wrong and options.device != "emulated" else 0


if __name__ == "__main__":
    sys.exit(main())
