"""The cascade of digits as files of the product: a cascade file from what was measured, and a worker's
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slosched.cascade.cascade_file import cascade_text
from slosched.cascade.digits.models import heavy, light
from slosched.cascade.digits.networks import parameters_of
from slosched.cascade.digits.routing import JUDGE
from slosched.cascade_spec import CascadeSpec, QualityCurve, ScoreCurve, StageSpec
from slosched.output_files import write_file
from slosched.units import NS_PER_MS

NAME = "digits"
LIGHT, HEAVY = "digits-light", "digits-heavy"
CASCADE_FILE, WORKER_FILE = f"{NAME}.toml", "worker.toml"
#: The SLO, in exec times of both programs one after the other at batch size 1.
_SLO_FACTOR = 6
#: The share that the file's own threshold defers.
_DEFERRED = 0.5

_ABOUT = """\
# The cascade of digits, as `slosched cascade digits measure` measured it. The judge runs within the light
# program, and its scores are live: f(t) below says how they were distributed.
"""
_ABOUT_QUALITY = """\
# Frechet distances in the features of the package's own classifier of digits, measured with the judge's
# choice. The key is that of every cascade's file; FIDs have other features
# and do not compare with these.
"""

WORKER_TEXT = f"""\
# Both programs of the cascade of digits (docs/digits.md): slosched worker --config worker.toml
torch_threads = 1

[models.{LIGHT}]
factory = "slosched.cascade.digits.models:light"
score = "score"

[models.{LIGHT}.inputs.label]
shape = [1]
dtype = "int64"

[models.{LIGHT}.inputs.seed]
shape = [1]
dtype = "int64"

[models.{HEAVY}]
factory = "slosched.cascade.digits.models:heavy"

[models.{HEAVY}.inputs.label]
shape = [1]
dtype = "int64"

[models.{HEAVY}.inputs.seed]
shape = [1]
dtype = "int64"
"""


def cascade_of(document: Mapping[str, Any], *, slo_ns: int | None = None) -> CascadeSpec:
    """The cascade that a measurement describes. The default SLO is six times both programs alone, in whole
    tens of ms."""
    times = {key: dict(found) for key, found in document["exec_ns"].items()}
    scores = ScoreCurve(**{key: tuple(found) for key, found in document["scores"].items()})
    curve = document["curves"][JUDGE][::-1]  # by the light share
    tens = round(_SLO_FACTOR * (times["light"][1] + times["heavy"][1]) / (10 * NS_PER_MS))
    return CascadeSpec(
        name=NAME,
        light=StageSpec(LIGHT, times["light"], weights_bytes=4 * parameters_of(light())),
        heavy=StageSpec(HEAVY, times["heavy"], weights_bytes=4 * parameters_of(heavy())),
        slo_ns=slo_ns or max(1, tens) * 10 * NS_PER_MS,
        scores=scores,
        quality=QualityCurve(
            tuple(round(1 - each["heavy_share"], 6) for each in curve),
            tuple(each["frechet"] for each in curve),
        ),
        threshold=scores.threshold_for(_DEFERRED),
        live_scores=True,
    )


def write_files(spec: CascadeSpec, folder: Path) -> list[Path]:
    """Write the cascade's file and the worker's into `folder`; return their paths. Raises as `write_file`
    does.
    """
    text = _ABOUT + cascade_text(spec).replace("[quality]\n", f"{_ABOUT_QUALITY}[quality]\n")
    paths = [folder / CASCADE_FILE, folder / WORKER_FILE]
    for path, content in zip(paths, (text, WORKER_TEXT), strict=True):
        write_file(path, content.encode())
    return paths
