"""Short and long models served together on one GPU, with --preempt and without, beside the simulator.

    python3 benchmarks/gpu/preemption_live.py --out DIR                    # on cuda:0, ten minutes
    python3 benchmarks/gpu/preemption_live.py --out DIR --mixes 2          # the last mix alone, in five
    python3 benchmarks/gpu/preemption_live.py --out DIR --device emulated --seconds 1 --loads 0.5
    python3 benchmarks/gpu/preemption_live.py --table                      # preemption_live.md from the results

The mixes are those of benchmarks/preemption.py, with real models (long_models.py) whose measured exec times
set the rates. Two workers serve on the GPU, one of them with --preempt; each policy has a controller, and one
client sends a cell's requests in an open loop (no inputs). Meanwhile a second client sends a few requests
whose answers are known, and compares them with a direct forward pass in float32. DIR gets
preemption_live.json and .md; the simulator's columns are computed when the page is made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import numpy as np
import preemption as simulated
from exact_answers import LEAST_TOLERANCE
from exact_bare import FOREVER_NS, BareController
from measured_on import measured_on
from numpy.typing import NDArray
from preemption import Cell, Class, Mix, two_classes

from slosched.clients.aio import AsyncClient, connect
from slosched.config_file import write_profile
from slosched.errors import SloschedError
from slosched.experiment.children import Child, Children
from slosched.gpu_profile import GpuProfile
from slosched.loadgen.results import RunResult
from slosched.messages import LoadModel, LoadModelResult
from slosched.output_files import write_file
from slosched.units import NS_PER_MS

RESULTS = Path(__file__).resolve().parent.parent / "results" / "preemption_live.json"
PAGE = Path(__file__).resolve().parent / "preemption_live.md"
LOADS = (0.3, 0.6, 0.9, 1.2)
#: The worker's name of each class's model, and what its table says.
MODELS = {
    "short": ("short", 'factory = "long_models:short"', "channels_last = true"),
    "long": ("long", 'factory = "long_models:long"'),
    "resnet50": ("resnet50", "channels_last = true"),
    "vit_l": ("middle", 'factory = "long_models:middle"', "urgent = true"),
    "huge": ("huge", 'factory = "long_models:huge"'),
}
#: The mixes as the simulator has them; they are chosen by number.
NOMINAL = (two_classes(0.9), two_classes(0.5), simulated.MIXES[-1])
_MAX_BATCH, _MAX_EXEC_MS = 4, 250
_TOLERANCE = 3e-2
#: Requests of known answers: inputs of each model, and the part of the GPU time that they may take together.
_INPUTS, _COMPARED_SHARE = 3, 0.02
_READY_S, _PREPARE_S, _REFERENCES_S, _CLIENT_S = 120.0, 150.0, 150.0, 60.0

Array = NDArray[Any]


@dataclass
class Row:
    """A mix at a load under a policy, live."""

    mix: int
    load: float
    policy: str
    preempt: bool
    result: dict[str, Any] = field(default_factory=dict)
    compared: int = 0
    wrong: int = 0
    worst: float = 0.0


# ------------------------------------------------------------------------------------- answers


def inputs_of(name: str) -> Array:
    """Inputs of known answers for a model."""
    draw = np.random.default_rng(sum(name.encode()))
    return draw.random((_INPUTS, 3, 224, 224), dtype=np.float32)


def write_references(path: Path, names: Sequence[str], config: Path, device: str) -> None:
    """Answers of direct forward passes in float32, into `path`.

    Raises SystemExit for a model whose answers to different inputs are alike.
    """
    import torch

    from slosched.config_file import load_worker_config
    from slosched.daemon.backends.contract import single_output
    from slosched.daemon.backends.sources import worker_specs

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    specs, found = worker_specs(load_worker_config(config)), {}
    for name in names:
        net = specs[name].build().float().to(device).eval()
        with torch.inference_mode():
            rows = [net(torch.from_numpy(row[None]).to(device)) for row in inputs_of(name)]
        taken = [single_output(row, 1, name=name, take=specs[name].output) for row in rows]
        outputs = [row.float().cpu().numpy().reshape(-1) for row in taken]
        apart = min(
            float(np.abs(a - b).max() / np.abs(a).max())
            for place, a in enumerate(outputs)
            for b in outputs[:place]
        )
        found[name] = np.stack(outputs)
        found[f"{name}/tolerance"] = np.array(min(_TOLERANCE, apart / 3))
        print(f"{name}: answers {apart:.3g} apart", flush=True)
        if apart / 3 < LEAST_TOLERANCE:
            raise SystemExit(f"{name}: its answers to different inputs are alike")
        del net
        torch.cuda.empty_cache()
    np.savez(path, **found)  # type: ignore[arg-type]


async def compare(
    client: AsyncClient, each: Class, references: Path, row: Row, stop: asyncio.Event
) -> None:
    """Ask for known answers of a class until `stop`, seldom, and compare those that come in time."""
    name = MODELS[each.name][0]
    (model,) = await client.load(name)
    known = np.load(references)
    right, tolerance = known[name], float(known[f"{name}/tolerance"])
    asked = inputs_of(name)
    every_s = each.b1_ms / 1000 / (_COMPARED_SHARE / 3)
    place = 0
    while not stop.is_set():
        with suppress(SloschedError):  # refused or late: there is nothing to compare
            answer = await client.infer(model, asked[place % _INPUTS], slo=f"{4 * each.slo_ms:g}ms")
            if answer.ok:
                wanted = right[place % _INPUTS]
                off = float(np.abs(answer.output - wanted).max() / np.abs(wanted).max())
                row.compared += 1
                row.worst = max(row.worst, off)
                row.wrong += not off < tolerance
        place += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), every_s)


# ------------------------------------------------------------------------------------- serving


def config_text() -> str:
    tables = []
    for name, *lines in MODELS.values():
        shape = ["input_shape = [3, 224, 224]"] if any("factory" in line for line in lines) else []
        tables.append("\n".join([f"[models.{name}]", *lines, *shape, 'dtype = "float16"']))
    return "\n\n".join(tables) + "\n"


def emulated_profile() -> GpuProfile:
    """The classes of all mixes with their nominal times, as one GPU under the models' names."""
    models = {}
    for each in (each for classes in simulated.MIXES for each in classes.classes):
        name = MODELS[each.name][0]
        models[name] = replace(each.model, name=name)
    return replace(simulated.MIXES[-1].profile, models=models)


class Bench:
    """The two workers, and what they measured of each model."""

    def __init__(self, options: argparse.Namespace, work: Path, children: Children) -> None:
        self.options, self.work, self.children = options, work, children
        wanted = {each.name for number in options.mixes for each in NOMINAL[number].classes}
        self.models = {key: MODELS[key] for key in MODELS if key in wanted}
        self.emulated = options.device == "emulated"
        self.config, self.profile = work / "worker.toml", work / "profile.toml"
        self.ports: dict[bool, int] = {}  # by --preempt
        self.prepared: dict[bool, dict[str, LoadModelResult]] = {}
        self.references = work / "references.npz"
        self.began = time.monotonic()
        write_file(self.config, config_text().encode())
        write_profile(self.profile, emulated_profile(), replacing=True)

    def make_references(self) -> None:
        command = [sys.executable, __file__, "--references", str(self.references)]
        command += ["--config", str(self.config), "--device", self.options.device]
        command += ["--models", ",".join(name for name, *_ in self.models.values())]
        subprocess.run(command, check=True, timeout=_REFERENCES_S)

    def start(self) -> None:
        """Both workers, one after the other: each measures the models on a GPU of its own."""
        given = (
            ["--profile", str(self.profile)] if self.emulated else ["--config", str(self.config)]
        )
        if not self.emulated:
            given += ["--weights-cache", "12GiB", "--busy-poll"]
        for preempt in (False, True):
            name = "worker-preempt" if preempt else "worker"
            arguments = ["worker", "--device", self.options.device, "--bind", "127.0.0.1"]
            arguments += ["--port", "0", *given, *(["--preempt"] if preempt else [])]
            worker = self.children.start(name, arguments, self.work / f"{name}.log")
            self.ports[preempt] = self.children.wait_ready(worker, within_s=_READY_S)
            self.prepared[preempt] = self._prepare(self.ports[preempt])

    @property
    def notes(self) -> list[str]:
        """What the worker with --preempt says of each model."""
        return [f"{key}: {'; '.join(each.labels)}" for key, each in self.prepared[True].items()]

    def _prepare(self, port: int) -> dict[str, LoadModelResult]:
        """Have every model prepared, and return what the worker says of each class."""
        found = {}
        with BareController(port) as bare:
            bare.hello()
            for number, (key, (name, *_)) in enumerate(self.models.items()):
                message = LoadModel(
                    bare.session,
                    bare.action_id(),
                    name=name,
                    model_id=number,
                    copies=1,
                    max_batch=_MAX_BATCH,
                    max_exec_ns=_MAX_EXEC_MS * NS_PER_MS,
                    earliest_ns=0,
                    latest_ns=FOREVER_NS,
                )
                result = bare.ask(message, _PREPARE_S)
                assert isinstance(result, LoadModelResult)
                found[key] = result
                print(f"  {name} is ready at {time.monotonic() - self.began:.0f} s", flush=True)
        return found

    @contextmanager
    def controller(self, policy: str, preempt: bool, folder: Path) -> Iterator[str]:
        """The address of a controller over the worker with or without --preempt."""
        with Children() as children:
            arguments = ["controller", policy, "--workers", f"127.0.0.1:{self.ports[preempt]}"]
            arguments += ["--bind", "127.0.0.1", "--port", "0", "--http-port", "-1"]
            arguments += ["--max-batch", str(_MAX_BATCH), "--max-exec", f"{_MAX_EXEC_MS}ms"]
            arguments += ["--log-dir", str(folder / "run"), *(["--preempt"] if preempt else [])]
            child: Child = children.start("controller", arguments, folder / "controller.log")
            yield f"127.0.0.1:{children.wait_ready(child, within_s=_READY_S)}"

    def mixes(self) -> dict[int, Mix]:
        """The mixes that are run, with the times that the worker without --preempt measured."""
        found = mixes_of(
            {key: _times(result) for key, result in self.prepared[False].items()},
            {key: _boundaries(result) for key, result in self.prepared[True].items()},
            {key: result.urgent_ns for key, result in self.prepared[True].items()},
        )
        return {number: found[number] for number in self.options.mixes}


def _times(result: LoadModelResult) -> list[list[int]]:
    return [list(each) for each in zip(result.batch_sizes, result.exec_ns, strict=True)]


def _boundaries(result: LoadModelResult) -> list[list[int]]:
    return [list(each) for each in zip(result.batch_sizes, result.boundaries_ns, strict=False)]


def mixes_of(
    times: Mapping[str, list[list[int]]],
    boundaries: Mapping[str, list[list[int]]],
    urgent_ns: Mapping[str, int],
) -> dict[int, Mix]:
    """The mixes of preemption.py with measured `times` and boundaries (ns by batch size) of each class.

    By number, those whose classes were all measured. `urgent_ns` says up to which exec time a class may
    interrupt. A simulated GPU has one time between boundaries: the greatest of the classes' at batch 1.
    """
    found = {}
    for number, nominal in enumerate(NOMINAL):
        if any(each.name not in times for each in nominal.classes):
            continue
        classes = [
            replace(
                each,
                b1_ms=times[each.name][0][1] / NS_PER_MS,
                measured_ns=tuple((batch, ns) for batch, ns in times[each.name]),
            )
            for each in nominal.classes
        ]
        single_ns = [boundaries[each.name][0][1] for each in classes if boundaries[each.name]]
        longest_ns = max(single_ns, default=nominal.boundary_ns)
        found[number] = replace(
            nominal,
            classes=tuple(classes),
            boundary_ns=longest_ns,
            urgent_at_most_ms=max(urgent_ns[each.name] for each in classes) / NS_PER_MS,
        )
    return found


async def run_cell(address: str, mix: Mix, row: Row, bench: Bench, folder: Path) -> None:
    """Send the cell's requests to the controller, beside those whose answers are compared."""
    entries = [
        f"{MODELS[each.name][0]}:1:{row.load * each.part * 1000 / each.b1_ms:.6g}:{each.slo_ms:g}ms"
        for each in mix.classes
    ]
    seconds = bench.options.seconds
    command = [sys.executable, "-m", "slosched", "client", address, "mix", ",".join(entries)]
    command += [f"{seconds:g}s", "--no-inputs", "--json", "--out", str(folder)]
    stop = asyncio.Event()
    async with connect(address, timeout_s=_READY_S) as client:
        comparing = (
            []
            if bench.emulated
            else [
                asyncio.ensure_future(compare(client, each, bench.references, row, stop))
                for each in mix.classes
            ]
        )
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            printed, _ = await asyncio.wait_for(process.communicate(), seconds + _CLIENT_S)
        finally:
            stop.set()
            if process.returncode is None:
                process.kill()
                await process.wait()
            await asyncio.gather(*comparing)
    found = json.loads(printed)
    names = {name: key for key, (name, *_) in MODELS.items()}
    for step in found["steps"]:
        step["group"] = names[step["group"]]
    row.result = found | {"run_dir": None}


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    began = time.monotonic()
    with Children() as children:
        bench = Bench(options, work, children)
        if not bench.emulated:
            bench.make_references()
        bench.start()
        mixes, rows = bench.mixes(), []
        document: dict[str, Any] = {
            "measured_on": measured_on(options.device, options.commit),
            "seconds": options.seconds,
            "loads": options.loads,
            "notes": bench.notes,
            "times_ns": {key: _times(each) for key, each in bench.prepared[False].items()},
            "cut_times_ns": {key: _times(each) for key, each in bench.prepared[True].items()},
            "urgent_ns": {key: each.urgent_ns for key, each in bench.prepared[True].items()},
            "boundaries_ns": {key: _boundaries(each) for key, each in bench.prepared[True].items()},
        }
        for number, mix in mixes.items():
            for policy, preempt in simulated.RUNS:
                folder = work / f"{number}-{policy}{'-preempt' if preempt else ''}"
                folder.mkdir()
                with bench.controller(policy, preempt, folder) as address:
                    for load in options.loads:
                        row = Row(number, load, policy, preempt)
                        asyncio.run(run_cell(address, mix, row, bench, folder / f"{load:g}"))
                        rows.append(row)
                        took = time.monotonic() - began
                        texts = simulated.texts_of(RunResult.from_dict(row.result), mix)
                        print(
                            f"{took:.0f} s: {number} {policy} {preempt} {load:g}: {texts} "
                            f"compared {row.compared} wrong {row.wrong} worst {row.worst:.2g}",
                            flush=True,
                        )
                        document["rows"] = [asdict(each) for each in rows]
                        text = json.dumps(document, indent=1) + "\n"
                        write_file(options.out / "preemption_live.json", text.encode())
    return document


# --------------------------------------------------------------------------------------- the page


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """The results of some runs as Markdown, beside simulations of every cell with the measured times."""
    rows = [row for document in documents for row in document["rows"]]
    compared, wrong = sum(row["compared"] for row in rows), sum(row["wrong"] for row in rows)
    lines = [
        "# Short and long models on one GPU",
        "",
        "Written by [preemption_live.py](preemption_live.py): per cent of the requests in time (controller), "
        "and p99 of the latency in ms. *sim*: the simulator with the measured times and the same arrivals. The "
        "bound is that of [preemption.py](../preemption.py), of all requests together. "
        f"{compared:,} answers were compared with a direct forward pass in float32; {wrong} were wrong.",
    ]
    for document in documents:
        lines += _run_lines(document)
    return "\n".join(lines) + "\n"


def _run_lines(document: Mapping[str, Any]) -> list[str]:
    """One run: what was measured of the models, and its mixes."""
    times, boundaries = document["times_ns"], document["boundaries_ns"]
    live = {
        (each["mix"], each["load"], each["policy"], each["preempt"]): each
        for each in document["rows"]
    }
    seconds = document["seconds"]
    cells = [
        (number, Cell(mix, 1, load, max(1, round(seconds))))
        for number, mix in mixes_of(times, boundaries, document["urgent_ns"]).items()
        for load in document["loads"]
        if any(key[:2] == (number, load) for key in live)
    ]
    jobs = [(cell, policy, preempt) for _, cell in cells for policy, preempt in simulated.RUNS]
    with ProcessPoolExecutor(2) as pool:
        in_virtual_time = dict(zip(jobs, pool.map(simulated.measured, jobs), strict=True))
        bounds = list(pool.map(simulated.bound, [cell for _, cell in cells]))
    lines = ["", f"*{document['measured_on']}; {seconds:g} s a cell.*", ""]
    lines += [
        "| model | exec ms by batch size | in segments | interrupted after at most ms |",
        "| :-- | --: | --: | --: |",
    ]
    for key, measured in times.items():
        whole, cut = (
            ", ".join(f"{batch}: {ns / NS_PER_MS:.3g}" for batch, ns in each)
            for each in (measured, document["cut_times_ns"][key])
        )
        within = ", ".join(f"{batch}: {ns / NS_PER_MS:.2f}" for batch, ns in boundaries[key])
        lines.append(f"| {key} | {whole} | {cut} | {within or '-'} |")
    before: Mix | None = None
    for (number, cell), bound in zip(cells, bounds, strict=True):
        if cell.mix is not before:
            before = cell.mix
            lines += [
                "",
                f"{cell.mix.title}:",
                "",
                "| load | model | INFER5 | sim | INFER5 --preempt | sim | EDF | sim | FIFO | sim | bound |",
                "| --: | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
            ]
        lines += _cell_lines(number, cell, live, in_virtual_time, bound)
    return [*lines, *(f"\n{note}" for note in document["notes"])]


def _cell_lines(
    number: int,
    cell: Cell,
    live: Mapping[tuple[int, float, str, bool], Mapping[str, Any]],
    in_virtual_time: Mapping[tuple[Cell, str, bool], Sequence[str]],
    bound: float,
) -> list[str]:
    columns = []
    for policy, preempt in simulated.RUNS:
        row = live.get((number, cell.load, policy, preempt))
        result = None if row is None else RunResult.from_dict(row["result"])
        missing = ["-"] * len(cell.mix.classes)
        columns.append(missing if result is None else simulated.texts_of(result, cell.mix))
        columns.append(list(in_virtual_time[cell, policy, preempt]))
    return [
        f"| {'' if place else f'{cell.load:g}'} | {each.name} | "
        f"{' | '.join(column[place] for column in columns)} | {'' if place else f'{100 * bound:.1f}'} |"
        for place, each in enumerate(cell.mix.classes)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where preemption_live.json and .md go")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a cell (default 6)")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)), help="with commas")
    numbers = ",".join(str(number) for number in range(len(NOMINAL)))
    parser.add_argument("--mixes", default=numbers, help=f"of {numbers} (default: all)")
    parser.add_argument("--work", type=Path, help="the folder for logs (default: a temporary one)")
    parser.add_argument("--table", action="store_true", help="only write preemption_live.md")
    parser.add_argument("--no-page", action="store_true", help="only preemption_live.json")
    parser.add_argument("--commit", default="", help="what was measured, outside a checkout")
    parser.add_argument("--references", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--models", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.loads = [float(load) for load in options.loads.split(",")]
    chosen = options.mixes.split(",")
    if not set(chosen) <= set(numbers.split(",")):
        parser.error(f"--mixes {options.mixes}: choose from {numbers}, with commas")
    options.mixes = [int(number) for number in chosen]
    if options.references is not None:
        names = options.models.split(",")
        write_references(options.references, names, options.config, options.device)
        return 0
    if options.table:
        documents = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
        write_file(PAGE, page(documents).encode())
        return 0
    if options.out is None:
        parser.error("--out is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        document = run(options, options.work or Path(temporary))
    if not options.no_page:
        write_file(options.out / "preemption_live.md", page([document]).encode())
    return 1 if any(row["wrong"] for row in document["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
