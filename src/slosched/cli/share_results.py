"""`slosched share` on what runs left behind: both originals' results and ours, compared and drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import beside, print_json, say, table_text, warn
from slosched.cli.share_table import run_line, runs_table
from slosched.cli.values import duration_ns, names
from slosched.errors import InvalidConfig
from slosched.output_files import check_folder
from slosched.units import NS_PER_S

if TYPE_CHECKING:
    from slosched.analysis.drawn import Drawn
    from slosched.analysis.share_points import Mixes
    from slosched.share.figures import RunMetrics
    from slosched.share.imported import Imported
    from slosched.share.published_figures import PublishedSet

#: A folder of Deft's logs has few.
_MOST_LOGS = 64


def _print(drawn: Drawn, *, json: bool) -> None:
    if json:
        print_json({"files": [str(file) for file in drawn.files], **drawn.numbers})
        return
    say(f"{drawn.text}\n")
    for file in drawn.files:
        say(f"wrote {file}")


def plot_jct(
    *,
    model_a: Annotated[
        Path,
        typer.Option(
            "--model-A-jct-log",
            metavar="FILE",
            help="CSV of model A's requests.",
            show_default=False,
        ),
    ],
    model_b: Annotated[
        Path,
        typer.Option(
            "--model-B-jct-log",
            metavar="FILE",
            help="CSV of model B's requests.",
            show_default=False,
        ),
    ],
    save_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the picture.", show_default=False)
    ] = Path(),
    all_rows: Annotated[
        bool,
        typer.Option(
            "--all-rows", help="With the first row of each file, which is Deft's warm-up."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Draw the latency of two models against time, as Deft does: jct_vs_t.jpg.

    The files are Deft's, or those of `slosched share run`. This needs matplotlib: pip install slosched[plot].

    \b
    Examples:
      slosched share plot-jct --model-A-jct-log logs/model_A.csv --model-B-jct-log logs/model_B.csv
      slosched share plot-jct --model-A-jct-log a.csv --model-B-jct-log b.csv --save-dir figures
    """
    from slosched.analysis.share_figures import draw_jct

    check_folder(save_dir)
    _print(draw_jct(model_a, model_b, save_dir, first_row=all_rows), json=json)
    if not (all_rows or json):
        say("the first row of each file is left out: Deft's warm-up (--all-rows draws it)")


def plot(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of runs: an --out, a sweep, or a part of it."),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the figures. Default: figures/ in it."),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            metavar="KIND,...",
            help="Kinds of figures, as their files' names begin: latencies, modes, methods, trade-off, knob, "
            "overhead, dedicated, mixes, jct, lanes, queue, segments, power. Default: all.",
            show_default=False,
        ),
    ] = "",
    singles: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            metavar="N",
            help="Runs that get figures of their own (jct, lanes, queue, segments, power).",
        ),
    ] = 8,
    json: Json = False,
) -> None:
    """Draw all figures that the runs below a folder allow, and say what was left out.

    Latency against time, distributions, a run's lanes with its pauses, how many requests wait, the times
    between boundaries, power with its phases; throughput, p99 and energy by mode; shared against dedicated
    GPUs; trade-off of a high and a low model, inflation and SLO misses by method, overhead by boundaries;
    published mixes beside ours. This needs matplotlib: pip install slosched[plot].

    \b
    Examples:
      slosched share plot results
      slosched share plot sweep-sweep-sync --out figures
      slosched share plot results --only modes,lanes --singles 30
    """
    if not directory.is_dir():
        raise InvalidConfig(f"{directory} is not a directory; give a folder of runs")
    from slosched.share.drawing import draw_all

    files = draw_all(
        directory, out or directory / "figures", say=beside, singles=singles, only=names(only)
    )
    if json:
        print_json({"files": [str(file) for file in files]})
        return
    for file in files:
        say(f"wrote {file}")


# ------------------------------------------------------------------------------------------ import


_Window = Annotated[
    str | None,
    typer.Option(
        help="HotCarbon's power: the end of pwr.csv that counts. Default 120s, or what our summary says.",
        show_default=False,
    ),
]
_Gpus = Annotated[
    int,
    typer.Option(
        min=0,
        max=64,
        help="GPUs whose rows pwr.csv has in turn. Default: by their times.",
        show_default=False,
    ),
]
_Gpu = Annotated[int, typer.Option(min=0, max=63, help="Which of these GPUs is meant.")]


def import_(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Deft's logs, or a tree of HotCarbon's results."),
    ],
    *,
    window: _Window = None,
    gpus: _Gpus = 0,
    gpu: _Gpu = 0,
    all_rows: Annotated[
        bool,
        typer.Option("--all-rows", help="Deft's logs with their first row, which is the warm-up."),
    ] = False,
    json: Json = False,
) -> None:
    """Read the results of Deft or HotCarbon-24, and print them as our own runs are printed.

    A tree of HotCarbon's has tput.csv somewhere below it (results/4090-tm); runs of one model in it are what
    the others are compared with. A folder of Deft's has a CSV for each model, or logs with "JCT" lines.

    \b
    Examples:
      slosched share import hotcarbon-24/results/a6000-mps
      slosched share import hotcarbon-24/results/five-min-a100-pwr --window 300s --gpus 4
      slosched share import gpu-tester/logs
    """
    if not directory.is_dir():
        raise InvalidConfig(f"{directory} is not a directory; give a folder of results")
    from slosched.share.outputs import SUMMARY, read_summary

    if (directory / SUMMARY).is_file():
        _print_runs([read_summary(directory / SUMMARY).metrics], json=json)
        return
    logs = _deft_logs(directory)
    if logs:
        _print_deft(directory, logs, all_rows=all_rows, json=json)
        return
    runs = _imported([directory], window, gpus, gpu)
    if json:
        _print_json(runs)
        return
    say(imported_table(runs))


def _deft_logs(directory: Path) -> dict[str, Path]:
    """The logs of Deft's in a folder, by the models' names."""
    from slosched.share.deft_files import HEADER

    found: dict[str, Path] = {}
    for path in sorted([*directory.glob("*.csv"), *directory.glob("*.log")]):
        try:
            with path.open("rb") as file:
                start = file.read(4096)
        except OSError:
            continue
        if start.startswith((HEADER.encode(), b"JCT ")) or b"\nJCT " in start:
            found.setdefault(path.stem, path)
        if len(found) > _MOST_LOGS:
            raise InvalidConfig(
                f"{directory} has more than {_MOST_LOGS} logs; name a folder of one run"
            )
    return found


def _print_deft(directory: Path, logs: dict[str, Path], *, all_rows: bool, json: bool) -> None:
    from slosched.share.importers import deft_metrics

    if not json:
        say(f"{directory}: {len(logs)} logs in Deft's format")
    _print_runs([deft_metrics(logs, drop_first=not all_rows)], json=json)


def _print_runs(runs: Sequence[RunMetrics], *, json: bool) -> None:
    if json:
        _print_json(runs)
        return
    if table := runs_table(runs):
        say(table)
    for run in runs:
        say(run_line(run, runs))


def _print_json(runs: Sequence[Imported] | Sequence[RunMetrics]) -> None:
    import msgspec

    print_json([msgspec.to_builtins(run) for run in runs])


def _imported(
    directories: Sequence[Path], window: str | None, gpus: int, gpu: int
) -> list[Imported]:
    from slosched.share.importers import read_hotcarbon

    window_s = None if window is None else duration_ns("--window", window) / NS_PER_S
    runs = [
        run
        for directory in directories
        for run in read_hotcarbon(directory, window_s=window_s, gpus=gpus, gpu=gpu)
    ]
    for run in runs:
        for problem in run.problems:
            warn(f"{run.path}: {problem}")
    return runs


def imported_table(runs: Sequence[Imported]) -> str:
    """A row for each model of each run."""
    headings = ["device", "mode", "mix", "model", "req/s", "p50 ms", "p99 ms", "vs solo"]
    headings += ["W", "STP", "energy ratio"]
    rows = []
    for run in runs:
        for place, job in enumerate(run.jobs):
            first = place == 0
            rows.append(
                [
                    *((run.label, run.mode, _mix(run)) if first else ("", "", "")),
                    f"{job.model}-{job.batch}",
                    *map(_number, (job.throughput_per_s, job.p50_ms, job.p99_ms, job.normalized)),
                    *map(_number, (run.watts, run.stp, run.energy_ratio) if first else (None,) * 3),
                ]
            )
    return table_text(headings, rows)


def _mix(run: Imported) -> str:
    return "+".join(job.model if job.batch == 1 else f"{job.model}-{job.batch}" for job in run.jobs)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


# ----------------------------------------------------------------------------------------- compare


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Folders of results, ours or HotCarbon's.", show_default=False
        ),
    ],
    *,
    published: Annotated[
        str,
        typer.Option(
            metavar="NAME,...|all|none",
            help="Published results beside them: a6000-tm, a6000-mps, 4090-tm, 4090-mps, a100-tm.",
        ),
    ] = "all",
    window: _Window = None,
    gpus: _Gpus = 0,
    gpu: _Gpu = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the figure. Default: no figure.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare mixes then and now: STP and energy ratio, by device and mode.

    Both are relative to the same device alone, so that an A6000 of 2024 and a GPU of today can stand in one
    table; latencies and power cannot. Repeats are averaged.

    \b
    Examples:
      slosched share compare results --out figures
      slosched share compare results --published a6000-mps,a6000-tm
      slosched share compare hotcarbon-24/results/a6000-tm results --published none
    """
    if out is not None:
        check_folder(out)
    sets = _published(published)
    series = _series(_imported(directories, window, gpus, gpu), sets)
    mixes = sorted(
        {mix for each in series for mix in each.values}, key=lambda mix: (mix.count("+"), mix)
    )
    if not any(not each.published for each in series):
        raise InvalidConfig(
            "no run has two models or more and the same models alone; STP and energy ratio need both"
        )
    if json:
        print_json(
            {each.name: {mix: list(pair) for mix, pair in each.values.items()} for each in series}
        )
    else:
        rows = [
            (mix, each.name, *map(_number, each.values[mix]))
            for mix in mixes
            for each in series
            if mix in each.values
        ]
        say(table_text(["mix", "where", "STP", "energy ratio"], rows))
    if out is None:
        return
    from slosched.analysis.share_points import draw_mixes

    drawn = draw_mixes(series, out, "then_and_now", title="Sharing one GPU, then and now")
    if not json:
        for file in drawn.files:
            say(f"wrote {file}")


def _published(text: str) -> list[PublishedSet]:
    from slosched.share.published_figures import hotcarbon_set, hotcarbon_sets

    if text == "all":
        return list(hotcarbon_sets())
    return [] if text == "none" else [hotcarbon_set(name) for name in names(text)]


def _series(runs: Sequence[Imported], sets: Sequence[PublishedSet]) -> list[Mixes]:
    """STP and energy ratio by mix: of the published sets, then of each device and mode of `runs`."""
    from slosched.analysis.share_points import Mixes

    ours: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        if len(run.jobs) < 2 or run.stp is None:
            continue
        mix = "+".join(sorted(_mix(run).split("+")))
        ratio = math.nan if run.energy_ratio is None else run.energy_ratio
        ours.setdefault(f"{run.label} {run.mode}", {}).setdefault(mix, []).append((run.stp, ratio))
    shown = {mix for by_mix in ours.values() for mix in by_mix}
    series = []
    for each in sets:
        values = {
            "+".join(sorted(run.models)): (
                run.stp,
                math.nan if run.energy_ratio is None else run.energy_ratio,
            )
            for run in each.runs
            if len(run.models) > 1
        }
        values = {mix: pair for mix, pair in values.items() if mix in shown}
        if values:
            series.append(Mixes(f"{each.device} {each.mode} (published)", values, published=True))
    for name, by_mix in ours.items():
        series.append(
            Mixes(
                name,
                {
                    mix: (_mean(v[0] for v in vs), _mean(v[1] for v in vs))
                    for mix, vs in by_mix.items()
                },
            )
        )
    return series


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
