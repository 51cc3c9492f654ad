"""A cascade as the TOML file from which `load_cascade` makes an equal one: for the processes of a live run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from slosched.cascade_spec import CascadeSpec, StageSpec
from slosched.output_files import write_file

_SCORES_FILE = "scores.csv"
_STATIC = ("threshold", "light_gpus", "heavy_gpus", "light_batch", "heavy_batch")


def write_cascade(spec: CascadeSpec, folder: Path) -> Path:
    """Write `spec` into `folder`, its recorded scores beside it; return the TOML file's path.

    Raises as `write_file` does.
    """
    if spec.recorded:
        write_file(folder / _SCORES_FILE, _scores_text(spec).encode())
    path = folder / f"{spec.name}.toml"
    write_file(path, cascade_text(spec).encode())
    return path


def cascade_text(spec: CascadeSpec) -> str:
    """The file's text."""
    lines = [
        f'name = "{_escaped(spec.name)}"',
        f'slo = "{spec.slo_ns}ns"',
        f'judge = "{spec.judge_ns}ns"',
        f"threshold = {spec.threshold!r}",
        f"live_scores = {str(spec.live_scores).lower()}",
        f"passes_output = {str(spec.passes_output).lower()}",
        f"seed = {spec.seed}",
        *_stage("light", spec.light),
        *_stage("heavy", spec.heavy),
        "[scores]",
        f"thresholds = {_numbers(spec.scores.thresholds)}",
        f"deferred = {_numbers(spec.scores.deferred)}",
    ]
    if spec.recorded:
        lines.append(f'recorded = "{_SCORES_FILE}"')
    if spec.quality is not None:
        lines += [
            "[quality]",
            f"light_share = {_numbers(spec.quality.light_shares)}",
            f"fid = {_numbers(spec.quality.fids)}",
        ]
    if spec.static_plan:
        lines += ["[static]", f"gpus = {spec.static_gpus}"]
        plan = dict(zip(_STATIC, spec.static_plan, strict=True))
        lines.append(f"threshold = {plan.pop('threshold')!r}")
        lines += [f"{key} = {int(value)}" for key, value in plan.items()]
    return "\n".join(lines) + "\n"


def _stage(name: str, stage: StageSpec) -> list[str]:
    return [
        f"[{name}]",
        f'model = "{_escaped(stage.model)}"',
        f'weights = "{stage.weights_bytes}B"',
        f'load = "{stage.weights_ns}ns"',
        f"steps = {stage.steps}",
        f"[{name}.exec]",
        *_times(stage.exec_ns),
        *([f"[{name}.step]", *_times(stage.step_ns)] if stage.step_ns else []),
    ]


def _times(exec_ns: Mapping[int, int]) -> list[str]:
    return [f'{batch} = "{ns}ns"' for batch, ns in exec_ns.items()]


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(repr(float(value)) for value in values)}]"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _scores_text(spec: CascadeSpec) -> str:
    """The artifact's form: P(fake) = 1 - score by prompt, from 0. Scores differ by 1e-16 at most."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("content_id", "light"))
    writer.writerows((place, 1 - score) for place, score in enumerate(spec.recorded))
    return text.getvalue()
