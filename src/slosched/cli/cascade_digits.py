"""`slosched cascade digits ...`: the small cascade whose scores are live and whose quality is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import beside, print_json, say, table_text, warn
from slosched.cli.values import duration_ns, one_address
from slosched.errors import InvalidConfig
from slosched.output_files import check_folder, write_file
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

if TYPE_CHECKING:
    from slosched.cascade_spec import CascadeSpec

app = SloschedTyper(cls=SloschedGroup, name="digits", rich_markup_mode=None, no_args_is_help=True)

_Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of weights that `train` wrote. Default: those of the package.",
        show_default=False,
    ),
]


@app.callback()
def digits() -> None:
    """A small cascade that draws digits: its scores are live, and its quality is measured.

    The heavy program is a diffusion model of 8x8 digits in 50 steps, the light one its student in one step,
    with a judge. Trained weights come with the package; train makes them again. measure says what the judge
    is worth, serve runs the cascade under load (docs/digits.md). Needs slosched[digits].

    \b
    Examples:
      slosched cascade digits measure --out measured
      slosched cascade digits serve --measured measured --out served
      slosched cascade digits serve --quick --out quick
      slosched cascade digits train --out weights
    """


@app.command("train")
def train(
    *,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the weights and weights.json.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Chooses everything that is drawn.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A few steps each, to see that it works; no good images."),
    ] = False,
    json: Json = False,
) -> None:
    """Train the teacher, its student, the judge and the classifier, on a CPU in one thread.

    Takes about four minutes. The same seed gives the same weights on the same machine with the same
    versions; on another one they may differ, first in the last bits.

    \b
    Examples:
      slosched cascade digits train --out weights
      slosched cascade digits train --out other --seed 1
    """
    from slosched.cascade.digits.training import Recipe, quick_recipe
    from slosched.cascade.digits.training import train as train_all

    check_folder(out)
    document = train_all(out, quick_recipe(seed) if quick else Recipe(seed=seed), show=beside)
    if json:
        print_json(document)
        return
    rows = [
        [name, found["parameters"], found["bytes"], found["sha256"][:12]]
        for name, found in document["files"].items()
    ]
    say(table_text(["file", "weights", "bytes", "sha256"], rows))
    say(f"written to {out}")


@app.command("measure")
def measure(
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report and the files.")],
    requests: Annotated[
        int, typer.Option(min=200, max=100_000, help="Requests that both programs answer.")
    ] = 6000,
    weights: _Weights = None,
    json: Json = False,
) -> None:
    """Answer requests with both programs, and measure quality and cost of each way to route them.

    Writes report.md and report.json, curves.png and samples.png (need slosched[plot]), digits.toml, the
    cascade's file with what was measured, and worker.toml. The Frechet distance is in the features of the
    package's own classifier of digits: it differs from FID, and compares with other
    distances of the same number of answers only.

    \b
    Examples:
      slosched cascade digits measure --out measured
      slosched cascade digits measure --requests 500 --weights weights --out quick
    """
    from slosched.cascade.digits.measure import measure as measure_all
    from slosched.cascade.digits.report import report_text, write_report

    check_folder(out)
    document, served = measure_all(requests, weights=weights, show=beside)
    files, problem = write_report(document, served, out)
    if problem:
        warn(f"no figures: {problem}")
    if json:
        print_json({**document, "files": [str(file) for file in files]})
        return
    say(report_text(document))
    for file in files:
        say(f"wrote {file}")


@app.command("serve")
def serve(
    *,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the runs, a folder for each policy.")
    ],
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that `measure` wrote on this machine. Default: 400 requests are measured first.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        str, typer.Option(metavar="POLICY,...", help="Policies of cascades, a run each.")
    ] = "cascade,diffserve,clipper-light,clipper-heavy",
    workers: Annotated[
        int,
        typer.Option(min=1, max=64, metavar="N", help="Number of workers, one CPU thread each."),
    ] = 2,
    peak: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=100,
            help="Highest rate of the trace, as a part of what the workers answer with the heavy program "
            "alone.",
        ),
    ] = 1.0,
    duration: Annotated[str, typer.Option(help="Length of the trace.")] = "60s",
    slo: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Default: that of the cascade's file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses arrivals and labels.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A trace of 10 s.")] = False,
    json: Json = False,
) -> None:
    """Serve the cascade live under load, keep every answer, and measure what was answered.

    Workers with the CPU device, a controller and a client run as processes on 127.0.0.1, once for each policy
    and on the same trace, whose rate rises from a fifth of its peak and falls again. The weights are those
    of the package. Some answers are compared with a direct forward of the same program.

    \b
    Examples:
      slosched cascade digits serve --measured measured --out served
      slosched cascade digits serve --quick --policies cascade --out quick
    """
    from slosched.cascade.digits.kept import worth
    from slosched.cascade.digits.live import Trace, capacity_per_s, described, run_live
    from slosched.cascade.digits.report import served_text
    from slosched.cascade.run import write_json

    check_folder(out)
    slo_ns = None if slo is None else duration_ns("--slo", slo)
    length_ns = 10 * NS_PER_S if quick else duration_ns("--duration", duration)
    names = _policies(policies)
    spec = _measured(measured, slo_ns)
    trace = Trace(peak, length_ns / NS_PER_S, capacity_per_s(spec, workers), seed)
    say(
        f"{workers} workers, SLO {format_duration(spec.slo_ns)}, trace with a peak of "
        f"{trace.peak_per_s:.1f}/s, "
        f"{peak:g} of their capacity of {trace.capacity_per_s:.1f}/s with the heavy program alone"
    )
    kept = run_live(spec, trace, out, workers=workers, policies=names, show=beside)
    found = worth(kept)
    document = {**described(trace, workers, spec), "policies": found}
    write_json(out / "served.json", document)
    write_file(out / "served.md", served_text(document).encode())
    if json:
        print_json(document)
        return
    say(served_text(document))
    say(f"written to {out}")


def _measured(folder: Path | None, slo_ns: int | None) -> CascadeSpec:
    """The cascade's file of `folder`, or what is measured now; with `slo_ns` as its SLO. Raises
    InvalidConfig.
    """
    from dataclasses import replace

    from slosched.cascade.digits.files import CASCADE_FILE, cascade_of
    from slosched.workloads.cascades import load_cascade

    if folder is None:
        from slosched.cascade.digits.measure import measure as measure_all

        document, _ = measure_all(400, show=beside)
        return cascade_of(document, slo_ns=slo_ns)
    path = folder / CASCADE_FILE
    if not path.is_file():
        raise InvalidConfig(
            f"{path} is not there; `slosched cascade digits measure --out {folder}` writes it"
        )
    spec = load_cascade(path)
    return spec if slo_ns is None else replace(spec, slo_ns=slo_ns)


def _policies(text: str) -> tuple[str, ...]:
    """The policies' TYPEs. Raises InvalidConfig, UnknownName."""
    from slosched.cli.cascade_experiment import policy_type

    names = tuple(policy_type(each.strip()) for each in text.split(","))
    if len(set(names)) < len(names):
        raise InvalidConfig(f"--policies {text!r}: a policy is named twice")
    return names


@app.command("client", hidden=True)
def client(
    address: Annotated[str, typer.Argument(metavar="host:port", help="The controller's address.")],
    model: Annotated[str, typer.Argument(help="Name of the model or the cascade.")],
    *,
    requests: Annotated[Path, typer.Option(metavar="FILE.npz", help="Times and inputs.")],
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="File for the answers.")],
) -> None:
    """Send requests of a file at their times, and keep all answers. serve starts this as a process.

    The file has at_ns, the times in ns, and an array for each of the model's inputs.

    \b
    Example:
      slosched cascade digits client 127.0.0.1:12346 digits --requests requests.npz --out answers.npz
    """
    import asyncio

    from slosched.clients.keeping import keep_answers, read_requests, write_answers

    given = read_requests(requests)
    columns = asyncio.run(keep_answers(one_address(address), model, given))
    write_answers(out, columns)
    late_ms = columns["late_ns"].max() / NS_PER_MS
    say(
        f"{len(given)} requests, {int(columns['met'].sum())} in time; sends up to {late_ms:.1f} ms late"
    )
