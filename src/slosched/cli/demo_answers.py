"""The demo's first question: are answers true? Trained models from a repository, through the whole system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slosched.cli.demo_models import DemoModel, demo_models
from slosched.cli.output import say
from slosched.errors import MissingPackage, SloschedError

if TYPE_CHECKING:
    from slosched.cli.demo_models import Inputs
    from slosched.clients.aio import AsyncClient
    from slosched.clients.inference import Inference
    from slosched.clients.tensors import Array

#: A load measures each batch size; the first import of transformers may come from a cold disk.
LOAD_S = 180.0
#: The SLO of the questions: they are about answers, not about time.
_SLO_S = 10.0
#: Questions that are open at a time: several batches, and too few for overload of a controller on a busy core.
_OPEN = 64
#: Rounding, in shares of an answer's largest value. A GPU may multiply in TF32, which keeps 10 bits; the
#: reference is computed on the CPU.
_ROUNDING, _ROUNDING_OF_GPUS = 1e-3, 2e-2


class OutputsDiffer(SloschedError):
    """What came back over the network is not what the model computes."""


@dataclass(frozen=True)
class Served:
    """A model's answers, and the number of batches that they came from."""

    answers: list[Array]
    batches: int


def write_models(repository: Path) -> list[DemoModel]:
    """Write each model that can be served here into `repository`; say what was made and what is left out."""
    made: list[DemoModel] = []
    for model in demo_models():
        why = model.left_out()
        if why:
            say(f"  {model.name} is left out: {why}")
            continue
        try:
            source = model.write(repository)
        except MissingPackage as error:  # it is there, and cannot be imported
            say(f"  {model.name} is left out: {error}")
            continue
        made.append(model)
        files = sorted(path.name for path in (repository / model.name / "1").iterdir())
        say(f"  {model.name}/1: {', '.join(files)}; {source}")
    return made


def check_answers(
    controller: str, repository: Path, models: Sequence[DemoModel], device: str
) -> list[str]:
    """Ask every model its questions, compare with a direct forward pass and with the truth; say what came out.

    Returns a line for each model, for the verdict. Raises OutputsDiffer or WrongAnswers.
    """
    import asyncio

    served = asyncio.run(_ask_all(controller, models))
    lines = []
    for model, got in zip(models, served, strict=True):
        how = compare(model.name, got.answers, model.direct(repository), device)
        verdict = model.judge(got.answers)
        say(f"{model.name}: {verdict.found}")
        for line in verdict.shown:
            say(f"  {line}")
        count = len(got.answers)
        say(f"  {count} answers, of {got.batches} batches, equal a direct forward pass {how}")
        lines.append(f"{model.name:<9} {verdict.found}")
    return lines


def compare(name: str, got: Sequence[Array], wanted: Sequence[Array], device: str) -> str:
    """How near answers are to those of a direct forward pass, in words. Raises OutputsDiffer."""
    import numpy as np

    errors = [
        np.max(np.abs(one - other)) / (np.max(np.abs(other)) or 1.0)
        for one, other in zip(got, wanted, strict=True)
    ]
    worst = float(np.max(errors))  # numpy's, which a NaN survives
    allowed = _ROUNDING_OF_GPUS if device.startswith("cuda") else _ROUNDING
    if not worst <= allowed:
        raise OutputsDiffer(
            f"outputs of {name} differ from a direct forward pass by {worst:.2g} of their largest value; at "
            f"most {allowed:g} is rounding"
        )
    return f"to within {worst:.1g} of their largest value" if worst else "to the last bit"


async def _ask_all(controller: str, models: Sequence[DemoModel]) -> list[Served]:
    from slosched.clients.aio import connect

    async with connect(controller, name="slosched demo") as client:
        return [await _ask(client, model) for model in models]


async def _ask(client: AsyncClient, model: DemoModel) -> Served:
    """All questions, `_OPEN` at a time, as that number of clients would ask them: they share batches."""
    import asyncio

    [loaded] = await client.load(model.name, timeout_s=LOAD_S)
    turns = asyncio.Semaphore(_OPEN)

    async def answer_to(question: Inputs) -> Inference:
        async with turns:
            return await client.infer(loaded, question, slo=_SLO_S)

    answers = await asyncio.gather(*map(answer_to, model.questions()))
    outputs = []
    for answer in answers:
        if answer.output is None:
            raise OutputsDiffer(f"model {model.name} answered without an output")
        outputs.append(answer.output)
    batches = sum(1 / answer.batch_size for answer in answers if answer.batch_size)
    return Served(outputs, round(batches))
