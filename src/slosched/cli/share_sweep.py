"""`slosched share sweep`: many experiments that differ in some keys, run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from slosched.cli.ask import Json
from slosched.cli.output import beside, print_json, say, warn
from slosched.cli.share_calls import check_models, run_and_measure, simulate_and_measure
from slosched.cli.share_log import share_log
from slosched.cli.share_options import label_of, labelled
from slosched.cli.stopping import stopped_by_signals
from slosched.cli.values import duration_ns, names, whole_numbers
from slosched.errors import InvalidConfig, UnknownName
from slosched.output_files import check_folder
from slosched.share_spec import Run

if TYPE_CHECKING:
    from slosched.share.axes import Point
    from slosched.share.figures import RunMetrics
    from slosched.share_spec import ShareSpec


def sweep(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|FILE",
            help="sweep-sync, pairs, hotcarbon or deft-demo; or an experiment as .toml or Deft's JSON.",
            show_default=False,
        ),
    ],
    *,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V,V",
            help="A key of the file and its values, as jobs.0.batch=1,4,8; several: all combinations.",
            show_default=False,
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Models of pairs.", show_default=False)
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Batch sizes of pairs.", show_default=False)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cuda:N|cpu|emulated", help="Default cuda:0, or the file's.", show_default=False
        ),
    ] = None,
    device_type: Annotated[
        str | None,
        typer.Option(
            "--device-type",
            metavar="LABEL",
            help="What results call the device.",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            help="Length of each run. Default: the preset's, or the file's.", show_default=False
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Runs of each mode.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default 0.", show_default=False)] = None,
    run_as: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="|".join(Run),
            help="How models of pairs and hotcarbon run. Default auto.",
            show_default=False,
        ),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A preset with tiny models, in seconds on a CPU.")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="In virtual time, as `slosched share simulate`.")
    ] = False,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw figures/ at the end. Default yes.")
    ] = True,
    no_solo: Annotated[
        bool, typer.Option("--no-solo", help="Without the runs of each model alone.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Run finished points again.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of all points. Default ./sweep-<PRESET or file>."),
    ] = None,
    json: Json = False,
) -> None:
    """Run a preset or all combinations of values, and write a row for each point and mode into sweep.csv.

    Points that are done are not run again, so that Ctrl-C costs the point that runs. With --repeats each
    value has half of a 95 % interval beside it.

    \b
      sweep-sync  Deft's demo with a wait for the GPU after each of 13 numbers of modules
      deft-demo   the same two detectors without a gate, with one, and with bounded queues
      hotcarbon   the 14 mixes of bert, whisper, gpt and diffusion
      pairs       all pairs of --models at --batches

    \b
    Examples:
      slosched share sweep sweep-sync --out sync --repeats 3
      slosched share sweep pairs --models bert,whisper --batches 1,8 --duration 30s
      slosched share sweep mine.toml --vary policy=fcfs,priority,edf --vary jobs.1.clients.rate_per_s=10,20
      slosched share sweep deft-demo --tiny --device cpu
      slosched share sweep hotcarbon --simulate
    """
    points = _points(
        what,
        vary or [],
        given={
            "device": device,
            "label": device_type,
            "duration": duration,
            "repeats": repeats,
            "seed": seed,
        },
        models=models,
        batches=batches,
        run_as=run_as,
        tiny=tiny,
    )
    for point in points:
        if not simulated:
            check_models(point.spec)
    folder = out or Path(f"sweep-{Path(what).stem}")
    check_folder(folder)
    from slosched.share.sweep import run_sweep

    with share_log(beside if json else say) as log:
        with stopped_by_signals() as stopping:

            def run_point(spec: ShareSpec, place: Path) -> Sequence[RunMetrics]:
                if simulated:
                    return simulate_and_measure(spec, place, say=log.follow)
                return run_and_measure(
                    spec,
                    place,
                    solo=not no_solo,
                    resume=not again,
                    say=log.follow,
                    stopped=stopping,
                )

            swept = run_sweep(
                points,
                folder,
                run=run_point,
                say=log.say,
                stopped=stopping,
                resume=not again,
                draw=figures,
            )
            if swept.stopped or stopping():
                warn(
                    f"{swept.left} points are left; the same command with --out {folder} continues"
                )
                raise KeyboardInterrupt
        if json:
            print_json(msgspec.to_builtins(swept, enc_hook=str))
        if swept.failed or swept.left:
            for name, why in swept.failed.items():
                warn(f"{name}: {why}")
            raise typer.Exit(1)
        log.say(f"Run success: results are stored in {swept.table}")


def _models(text: str) -> tuple[str, ...]:
    """The models of "bert,gpt", each once. Raises InvalidConfig."""
    found = names(text)
    if not found:
        raise InvalidConfig(f"--models: {text!r} names no model; write it as bert,gpt")
    for name in found:
        if found.count(name) > 1:
            raise InvalidConfig(f"--models: {name} is named twice")
    return found


def _points(
    what: str,
    vary: Sequence[str],
    *,
    given: dict[str, object],
    models: str | None,
    batches: str | None,
    run_as: str | None,
    tiny: bool,
) -> Sequence[Point]:
    """The points of a preset, or of a file with the axes `vary`. Raises InvalidConfig, UnknownName."""
    from slosched.share.axes import parse_axis, points_of
    from slosched.share.presets import PRESETS, Wanted, preset

    text = given.pop("duration")
    changes = {key: value for key, value in given.items() if value is not None}
    if text is not None:
        changes["duration_ns"] = duration_ns("--duration", str(text))
    if "device" in changes and "label" not in changes:
        changes["label"] = label_of(str(changes["device"]))
    if run_as is not None and run_as not in list(Run):
        raise InvalidConfig(f"--run must be one of {', '.join(Run)}, not {run_as!r}")
    if what in PRESETS:
        if vary:
            raise InvalidConfig(f"{what} has its own points; --vary goes with a file")
        chosen = {
            "models": _models(models) if models is not None else (),
            "batches": whole_numbers("--batches", batches) if batches else (),
            "run": Run(run_as or Run.AUTO),
            "tiny": tiny,
        }
        return preset(what, msgspec.convert({**changes, **chosen}, Wanted)).points
    file = Path(what)
    if file.suffix.lower() not in (".toml", ".json"):
        raise UnknownName("preset", what, [*PRESETS, "FILE.toml"])
    if models or batches or tiny:
        raise InvalidConfig("--models, --batches and --tiny go with a preset, not with a file")
    spec = msgspec.structs.replace(_spec_of(file), **changes)
    spec = msgspec.structs.replace(spec, label=labelled(spec))
    if run_as is not None:
        jobs = tuple(msgspec.structs.replace(job, run=Run(run_as)) for job in spec.jobs)
        spec = msgspec.structs.replace(spec, jobs=jobs)
    axes = dict(parse_axis(each) for each in vary)
    if len(axes) != len(vary):
        raise InvalidConfig("--vary names a key twice; give all its values at once")
    return points_of(spec, axes)


def _spec_of(file: Path) -> ShareSpec:
    from slosched.share.deft_config import read_deft
    from slosched.share.spec_file import read_spec

    if file.suffix.lower() == ".toml":
        return read_spec(file)
    found = read_deft(file)
    for warning in found.warnings:
        warn(warning)
    return found.spec
