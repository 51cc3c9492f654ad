"""HotCarbon-24's command line as an experiment: `--device-type LABEL --device-id N MODEL-BATCH ...`.

Its own four names are diffusion, whisper, bert and gpt with batch 1; here any model and batch may stand there.
A model may be named more than once; its columns are numbered in the result files, as HotCarbon does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from slosched.errors import InvalidConfig, UnknownName
from slosched.share.spec_check import unused_name
from slosched.share_spec import Job, Mode

#: In the order in which HotCarbon runs them.
#: HotCarbon's name of MPS without a limit of threads.
MPS_UNCAPPED = "mps-uncap"
_MODEL_BATCH = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._+:/-]*[A-Za-z0-9._+:/])?)-([0-9]{1,6})")


def model_jobs(texts: Sequence[str]) -> tuple[Job, ...]:
    """The jobs that "diffusion-1 whisper-1" names, in closed loops. Raises InvalidConfig."""
    jobs: list[Job] = []
    for text in texts:
        match = _MODEL_BATCH.fullmatch(text)
        if match is None:
            raise InvalidConfig(
                f"{text[:100]!r} is not MODEL-BATCH; write a model and its batch size, such as diffusion-1"
            )
        model, batch = match[1], int(match[2])
        if batch < 1:
            raise InvalidConfig(f"{text}: the batch size must be at least 1")
        name = unused_name(model, {job.name for job in jobs})
        jobs.append(Job(name=name, model=model, batch=batch))
    return tuple(jobs)


def parse_modes(text: str) -> tuple[Mode, ...]:
    """The modes of "tm,mps-uncap", in that order; each counts once. Raises InvalidConfig, UnknownName."""
    named = [part.strip() for part in text.split(",") if part.strip()]
    if not named:
        raise InvalidConfig(f"no mode in {text!r}; modes are {', '.join(Mode)}")
    found = []
    for name in named:
        plain = Mode.MPS.value if name == MPS_UNCAPPED else name
        if plain not in list(Mode):
            raise UnknownName("mode", name, [*Mode, MPS_UNCAPPED])
        found.append(Mode(plain))
    return tuple(dict.fromkeys(found))
