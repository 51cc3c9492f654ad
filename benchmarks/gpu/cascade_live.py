"""A real cascade on one GPU for real_cascades.py: a worker, controllers and clients, each a process of its own.

One worker with --preempt serves all runs; each run has a controller and a client of its own, and the same
arrivals, prompts and scores. Meanwhile a second client sends a few requests whose answers are known, and
compares them with a direct pass of the same models in the same precision.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import numpy as np
from exact_bare import FOREVER_NS, BareController
from numpy.typing import NDArray

from slosched.analysis.runs import read_actions
from slosched.cascade.cascade_file import write_cascade
from slosched.cascade.outcome import Outcome, read_outcome
from slosched.cascade.real import Programs, measured_cascade, trace_for, worker_text
from slosched.cascade.summary import summarise
from slosched.cascade_spec import CascadeSpec
from slosched.clients.aio import AsyncClient, connect
from slosched.codes import ActionType, Code
from slosched.core.scheduler.cascades import uniform
from slosched.errors import SloschedError
from slosched.experiment.children import Children
from slosched.gpu_profile import ModelProfile
from slosched.messages import LoadModel, LoadModelResult
from slosched.output_files import write_file
from slosched.units import NS_PER_S
from slosched.verdicts import is_heavy
from slosched.workloads.cascades import load_cascade
from slosched.workloads.prompt_tokens import hashed_tokens

Array = NDArray[Any]
#: Policies in the order in which they run, each with --preempt of its controller.
RUNS = (("CLIPPER-LIGHT", False), ("DIFFSERVE", False), ("CASCADE", True), ("CASCADE", False))
_MAX_BATCH, _MAX_EXEC_NS = 4, 20 * NS_PER_S
_READY_S, _PREPARE_S, _REFERENCES_S, _CLIENT_S = 120.0, 200.0, 150.0, 40.0
#: Requests of known answers: how often one is sent, s, and the number of user ids of either kind.
_EVERY_S, _LOWEST = 2.5, 50
PROMPTS = (
    "a red bicycle in the rain",
    "two dogs on a beach at sunset",
    "a bowl of fruit, oil painting",
    "an old library with tall windows",
)


def cell_name(policy: str, preempt: bool) -> str:
    return policy + (" --preempt" if preempt else "")


def run_key(policy: str, preempt: bool) -> str:
    return f"live/{cell_name(policy, preempt)}"


@dataclass
class Compared:
    """Served answers beside those of a direct pass: by stage, the number of them, and how far off at most.

    `mixed` are those that lie nearer to another prompt's answer than to their own.
    """

    light: int = 0
    heavy: int = 0
    refused: int = 0
    mixed: int = 0
    light_worst: float = 0.0
    heavy_worst: float = 0.0
    light_mean: float = 0.0
    heavy_mean: float = 0.0


# ---------------------------------------------------------------------------------- references


def known_inputs() -> dict[str, Array]:
    """Inputs whose answers are known, (number, *shape) by name."""
    tokens = np.array([hashed_tokens(prompt) for prompt in PROMPTS], np.int32)
    return {"tokens": tokens, "seed": np.arange(1, len(PROMPTS) + 1, dtype=np.int64)[:, None]}


def write_references(path: Path, programs: Programs, config: Path, device: str) -> None:
    """Images of a direct pass of both models, a request at a time, into `path`: (number, 3, height, width)."""
    import torch

    from slosched.config_file import load_worker_config
    from slosched.daemon.backends.sources import worker_specs

    specs, found = worker_specs(load_worker_config(config)), {}
    for stage, name in zip(("light", "heavy"), programs.both(), strict=True):
        began = time.monotonic()
        model = specs[name].build().to(device).eval()
        inputs = {key: torch.from_numpy(array).to(device) for key, array in known_inputs().items()}
        with torch.inference_mode():
            rows = [
                model(**{key: each[row : row + 1] for key, each in inputs.items()})["image"]
                for row in range(len(PROMPTS))
            ]
        found[stage] = torch.cat(rows).float().cpu().numpy()
        del model, rows
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        print(f"  direct pass of {name}: {time.monotonic() - began:.0f} s", flush=True)
    np.savez(path, **found)  # type: ignore[arg-type]


def user_ids(seed: int) -> list[int]:
    """User ids of the known requests, by turns: one whose score is among the lowest, so that it is deferred if
    any is, and any other. `seed` is the cascade's. No prompt of the trace has them.
    """
    free = range(10_000, 20_000)
    lowest = sorted(free, key=lambda user: uniform(seed, user))[:_LOWEST]
    others = [user for user in free if user not in lowest][:_LOWEST]
    return [user for pair in zip(lowest, others, strict=True) for user in pair]


async def compare(
    client: AsyncClient,
    spec: CascadeSpec,
    references: Path,
    found: Compared,
    stop: asyncio.Event,
) -> None:
    """Ask for known answers until `stop`, one every 2.5 s, and compare those that come."""
    known = np.load(references)
    right = {stage: known[stage] for stage in ("light", "heavy")}
    (model,) = await client.load(spec.name)
    inputs, place, users = known_inputs(), 0, user_ids(spec.seed)
    slo_s = spec.slo_ns / NS_PER_S
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _EVERY_S)
        if stop.is_set():
            return
        which, user = place // 2 % len(PROMPTS), users[place % len(users)]
        place += 1
        asked = {key: array[which] for key, array in inputs.items()}
        try:
            answer = await client.infer(model, asked, slo=slo_s, user_id=user, timeout_s=3 * slo_s)
        except SloschedError:
            found.refused += 1
            continue
        by = answer.answered_by
        if by is None or not answer.ok:
            found.refused += 1
            continue
        stage = "heavy" if is_heavy(by.verdict) else "light"
        _count(found, stage, answer.outputs["image"], which, right)


def _count(
    found: Compared, stage: str, image: Array, which: int, right: Mapping[str, Array]
) -> None:
    off = np.abs(right[stage] - image).reshape(len(PROMPTS), -1)
    means = off.mean(axis=1)
    found.mixed += int(means.argmin() != which)
    setattr(found, stage, getattr(found, stage) + 1)
    for key, value in (("worst", off[which].max()), ("mean", means[which])):
        name = f"{stage}_{key}"
        setattr(found, name, max(getattr(found, name), float(value)))


# ------------------------------------------------------------------------------------- serving


class Live:
    """The worker, and what it measured of both models. `device` is a worker's, `programs` names its models."""

    def __init__(
        self,
        work: Path,
        children: Children,
        *,
        device: str,
        programs: Programs,
        cascade: str,
        dtype: str,
        seconds: int,
    ) -> None:
        self.work, self.children, self.device, self.programs = work, children, device, programs
        self.base = load_cascade(cascade)
        self.seconds, self.began = seconds, time.monotonic()
        self.config, self.references = work / "worker.toml", work / "references.npz"
        self.port = 0
        write_file(self.config, worker_text(programs, dtype=dtype).encode())

    def make_references(self) -> None:
        command = [sys.executable, __file__, str(self.references), str(self.config), self.device]
        subprocess.run([*command, *self.programs.both()], check=True, timeout=_REFERENCES_S)

    def start(self) -> dict[str, LoadModelResult]:
        """Start the worker and have both models prepared; what it says of each stage."""
        words = ["worker", "--device", self.device, "--bind", "127.0.0.1", "--port", "0"]
        words += ["--config", str(self.config)]
        if self.device.startswith("cuda"):
            words += ["--preempt", "--weights-cache", "12GiB", "--busy-poll"]
        worker = self.children.start("worker", words, self.work / "worker.log")
        self.port = self.children.wait_ready(worker, within_s=_READY_S)
        found = {}
        with BareController(self.port) as bare:
            bare.hello()
            for number, (stage, name) in enumerate(
                zip(("light", "heavy"), self.programs.both(), strict=True)
            ):
                message = LoadModel(
                    bare.session,
                    bare.action_id(),
                    name=name,
                    model_id=number,
                    copies=1,
                    max_batch=_MAX_BATCH,
                    max_exec_ns=_MAX_EXEC_NS,
                    earliest_ns=0,
                    latest_ns=FOREVER_NS,
                )
                result = bare.ask(message, _PREPARE_S)
                assert isinstance(result, LoadModelResult)
                found[stage] = result
                took = time.monotonic() - self.began
                print(f"  {name} is ready at {took:.0f} s", flush=True)
        return found

    def setup(self, results: Mapping[str, LoadModelResult]) -> dict[str, Any]:
        """What all runs have in common, for the results: times, SLO and trace."""
        spec = self.spec({stage: times_of(each) for stage, each in results.items()})
        return {
            "times_ns": {stage: times_of(each) for stage, each in results.items()},
            "boundaries_ns": {
                stage: dict(zip(map(str, each.batch_sizes), each.boundaries_ns, strict=False))
                for stage, each in results.items()
            },
            "urgent_ns": {stage: each.urgent_ns for stage, each in results.items()},
            "labels": {stage: list(each.labels) for stage, each in results.items()},
            "slo_ns": spec.slo_ns,
            "trace": trace_for(spec, 1, seconds=self.seconds),
            "programs": list(self.programs.both()),
        }

    def spec(self, times: Mapping[str, Mapping[str, int]]) -> CascadeSpec:
        """The cascade with these exec times, by stage and batch size."""
        light, heavy = (
            ModelProfile(name, {int(batch): ns for batch, ns in times[stage].items()}, 1, 1)
            for stage, name in zip(("light", "heavy"), self.programs.both(), strict=True)
        )
        return measured_cascade(self.base, light, heavy)

    @contextmanager
    def controller(self, policy: str, preempt: bool, folder: Path, cascade: Path) -> Iterator[str]:
        """The address of a controller over the worker."""
        with Children() as children:
            words = ["controller", policy, "--workers", f"127.0.0.1:{self.port}"]
            words += ["--cascade", str(cascade), "--bind", "127.0.0.1", "--port", "0"]
            words += ["--http-port", "-1", "--max-batch", str(_MAX_BATCH)]
            words += ["--max-exec", f"{_MAX_EXEC_NS}ns", "--log-dir", str(folder / "run")]
            words += ["--preempt"] * preempt
            child = children.start("controller", words, folder / "controller.log")
            yield f"127.0.0.1:{children.wait_ready(child, within_s=_READY_S)}"
            children.end(child)

    def run(self, policy: str, preempt: bool, setup: Mapping[str, Any]) -> dict[str, Any]:
        """One policy on the trace."""
        spec = self.spec(setup["times_ns"])
        folder = self.work / cell_name(policy, preempt).replace(" ", "")
        folder.mkdir()
        cascade = write_cascade(spec, folder)
        compared = Compared()
        with self.controller(policy, preempt, folder, cascade) as address:
            answer = asyncio.run(
                self._serve(address, spec, cascade, str(setup["trace"]), folder / "run", compared)
            )
        row = counted(folder / "run", spec, self.seconds)
        row |= {"compared": asdict(compared), "client": answer}
        return row

    async def _serve(
        self,
        address: str,
        spec: CascadeSpec,
        cascade: Path,
        trace: str,
        out: Path,
        compared: Compared,
    ) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "slosched",
            "client",
            address,
            "cascade",
            str(cascade),
            trace,
        ]
        command += ["--seed", "0", "--json", "--out", str(out)]
        stop = asyncio.Event()
        async with connect(address, timeout_s=_READY_S) as client:
            comparing = asyncio.ensure_future(
                compare(client, spec, self.references, compared, stop)
            )
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            try:
                printed, errors = await asyncio.wait_for(
                    process.communicate(), self.seconds + _CLIENT_S
                )
            finally:
                stop.set()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                with suppress(SloschedError, TimeoutError):
                    await asyncio.wait_for(comparing, 3 * spec.slo_ns / NS_PER_S + 5)
        if not printed.strip():
            raise SloschedError(f"the client failed: {errors.decode(errors='replace')[-500:]}")
        found: dict[str, Any] = json.loads(printed)
        return {key: found[key] for key in ("complete", "problem") if key in found}


def times_of(result: LoadModelResult) -> dict[str, int]:
    return dict(zip(map(str, result.batch_sizes), result.exec_ns, strict=True))


# ------------------------------------------------------------------------------------ counting


def counted(run_dir: Path, spec: CascadeSpec, seconds: int) -> dict[str, Any]:
    """What a run came to: the summary, latencies, and the part of the time that the GPU was busy."""
    outcome = read_outcome(run_dir)
    summary = summarise(outcome, spec.quality)
    return {
        "summary": summary.as_dict(),
        "latency_ns": latencies(outcome),
        "gpu": busy(run_dir, seconds),
    }


def latencies(outcome: Outcome) -> dict[str, float | None]:
    """Percentiles over the answered requests, ns."""
    took = (outcome.end_ns - outcome.arrival_ns)[outcome.answered]
    return {
        f"p{percent}": float(np.percentile(took, percent)) if len(took) else None
        for percent in (50, 99)
    }


def busy(run_dir: Path, seconds: int) -> dict[str, float]:
    """Exec time over the length of the trace: of all inferences, and of those of each model."""
    log = read_actions(
        run_dir, only=("action_type", "status", "model_id", "worker_exec_duration", "batch_size")
    )
    ran = (log["action_type"] == int(ActionType.INFER)) & (log["status"] == int(Code.OK))
    spent = log["worker_exec_duration"][ran]
    whole_ns = seconds * NS_PER_S
    found = {"busy": float(spent.sum()) / whole_ns, "batches": float(ran.sum())}
    for model in sorted(set(log["model_id"][ran].tolist())):
        of = log["model_id"][ran] == model
        found[f"busy_{model}"] = float(spent[of].sum()) / whole_ns
        found[f"mean_batch_{model}"] = float(log["batch_size"][ran][of].mean())
    return found


def measure(
    live: Live, results: Any, left: Callable[[], float], say: Callable[[str], None]
) -> None:
    """Every run that `results` lacks and that there is time for; `results` is real_cascades.py's."""
    missing = [each for each in RUNS if not results.has(run_key(*each))]
    needs_s = live.seconds + 25
    if not missing:
        return
    if left() < 90 + needs_s:
        for each in missing:
            results.left_out(run_key(*each))
        return
    live.make_references()
    setup = live.setup(live.start())
    if results.has("live/setup"):  # the same arrivals and SLO as of the runs that are there
        setup = results.get("live/setup") | {"measured_again": setup["times_ns"]}
    results.put("live/setup", setup)
    say(f"SLO {setup['slo_ns'] / NS_PER_S:.2f} s, trace {setup['trace']}")
    for policy, preempt in missing:
        if left() < needs_s:
            results.left_out(run_key(policy, preempt))
            continue
        try:
            row = live.run(policy, preempt, setup)
        except Exception as error:  # the other runs are made all the same
            say(f"{cell_name(policy, preempt)} failed: {error!r}")
            results.failed(run_key(policy, preempt), repr(error))
            continue
        results.put(run_key(policy, preempt), row)
        summary = row["summary"]
        say(
            f"{cell_name(policy, preempt)}: violations {summary['violation_ratio']}, heavy "
            f"{summary['heavy']} of {summary['requests']}, {row['compared']}"
        )


if __name__ == "__main__":  # the direct pass, in a process of its own
    _path, _config, _device, _light, _heavy = sys.argv[1:]
    write_references(Path(_path), Programs(_light, _heavy), Path(_config), _device)
