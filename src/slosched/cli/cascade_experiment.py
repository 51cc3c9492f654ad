"""What `slosched cascade run` and `compare` say alike: the experiment, its policies, and where it goes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slosched.cascade_spec import CascadeOptions
from slosched.cli.cascade_options import cascade_options
from slosched.cli.config_options import Options
from slosched.cli.output import warn
from slosched.cli.values import duration_ns
from slosched.errors import InvalidConfig, UnknownName
from slosched.output_files import check_folder

if TYPE_CHECKING:
    from slosched.cascade.presets import Preset, Variant
    from slosched.cascade.run import Experiment
    from slosched.sim.faults import FaultPlan


def experiment_of(
    name: str,
    trace: str,
    workers: int,
    preset: str | None,
    options: Options,
    scores: Path | None,
    duration: str | None,
    exec_sigma: float,
    faults: Path | None,
    published: bool,
) -> Experiment:
    """What `run` and `compare` say alike, with the options of the preset. Raises InvalidConfig, UnknownName."""
    from slosched.cascade.run import Experiment

    settings = _preset(preset)
    experiment = Experiment(
        cascade=name,
        trace=trace,
        workers=workers,
        options=_options(settings.options, options),
        scores=scores,
        judge_ns=settings.judge_ns,
        duration_ns=None if duration is None else duration_ns("--duration", duration),
        exec_sigma=exec_sigma,
        faults=_fault_plan(faults),
    )
    _check_published(experiment, published)
    experiment.workload()  # reads the trace
    _warn_of_few_scores(experiment)
    return experiment


def _options(base: CascadeOptions, given: Options) -> CascadeOptions:
    """`base` with what the command line says. Raises InvalidConfig that names the option."""
    threshold = given.get("fixed_threshold")
    if threshold is not None and not 0 <= threshold <= 1:  # below 0 it would be planned
        raise InvalidConfig(f"--fixed-threshold must be within 0..1, not {threshold:g}")
    try:
        return cascade_options(base, given)
    except UnknownName:
        raise
    except InvalidConfig as error:
        text = str(error)
        for name in given:
            text = re.sub(rf"^{name}\b", f"--{name.replace('_', '-')}", text)
        raise InvalidConfig(text) from None


def _check_published(experiment: Experiment, published: bool) -> None:
    """Before the run: the artifact's transformations are those of its own cascades."""
    from slosched.workloads.cascades import builtin_cascades

    name = experiment.spec().name
    if published and name not in builtin_cascades():
        known = ", ".join(builtin_cascades())
        raise InvalidConfig(
            f"--published is for the artifact's cascades, {known}, and not {name!r}"
        )


def _warn_of_few_scores(experiment: Experiment) -> None:
    """Scores are by prompt: with fewer of them than prompts, they are used again from the first one on."""
    from slosched.workloads.cascade_trace import PROMPTS, CascadeTrace, read_prompts

    known, workload = len(experiment.spec().recorded), experiment.workload()
    if not known or not isinstance(workload, CascadeTrace):
        return
    most = PROMPTS if workload.path is None else max(read_prompts(workload.path).prompts)
    if most > known:
        where = experiment.scores or experiment.cascade
        warn(
            f"{where} has scores of {known} prompts, and the trace asks for prompts up to {most}: those beyond "
            "get the scores of others"
        )


def directory_of(out: Path | None, kind: str) -> Path:
    """Where a command writes. Raises InvalidConfig if that is not a directory."""
    from slosched.telemetry.run_dir import default_log_dir

    directory = out or default_log_dir(kind)
    check_folder(directory)
    for folder in directory.parents:
        if folder.exists():
            check_folder(folder)
            break
    return directory


def _preset(name: str | None) -> Preset:
    """The preset of that name; None: the defaults, and no policies. Raises UnknownName."""
    from slosched.cascade.presets import Preset, preset_named

    return Preset(CascadeOptions(), None, ()) if name is None else preset_named(name)


def policy_type(text: str) -> str:
    """The TYPE of a policy of cascades, whatever its case. Raises UnknownName."""
    from slosched.core.scheduler.policies import CASCADE_POLICIES, POLICY_TYPES

    if ":" in text:  # module:class, of another package
        POLICY_TYPES.get(text)
        return text
    if text.upper() not in CASCADE_POLICIES:
        known = [each.lower() for each in CASCADE_POLICIES]
        raise UnknownName("policy of cascades", text, known)
    return text.upper()


def _fault_plan(path: Path | None) -> FaultPlan | None:
    if path is None:
        return None
    from slosched.sim.fault_file import load_plan

    return load_plan(path)


def variants_of(
    text: str | None, preset: str | None, base: Experiment, given: Options
) -> tuple[Variant, ...]:
    """The policies to compare, over the options of `base`.

    Those of a preset have options of their own, and what is `given` on the command line holds for them too.
    Raises InvalidConfig, UnknownName.
    """
    from slosched.cascade.presets import POLICIES, parse_variants
    from slosched.cascade.run import STATIC

    of_preset = _preset(preset).variants
    if text is None and of_preset:
        return tuple(replace(each, options=_options(each.options, given)) for each in of_preset)
    policies = list(POLICIES)
    if text is None and not base.spec().static_plan:
        policies.remove(STATIC)
        warn(f"{STATIC.lower()} is left out: the cascade has no table [static] with a fixed plan")
    words = ",".join(policies).lower() if text is None else text
    variants = parse_variants(words, base.options)
    for each in variants:
        policy_type(each.policy.lower())
    return variants
