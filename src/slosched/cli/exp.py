"""`slosched exp`: Faasm's experiments, by our names and by those of the original's tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from slosched.cli import exp_names, exp_results
from slosched.cli.ask import Json
from slosched.cli.config_options import Options, takes_options, values_of
from slosched.cli.exp_results import LAYOUTS, Layout, check_choice, nothing, print_end
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import beside, print_json, say, warn
from slosched.cli.values import names as list_of
from slosched.cli.values import whole_number
from slosched.command_line import command_rows
from slosched.errors import InvalidConfig, UnknownName
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.faasm.names import VARIABLES
from slosched.options import Row
from slosched.output_files import check_folder

SCALES = ("quick", "published")


class _Experiments(SloschedGroup):
    """Takes the tasks of the original by their names as well: `slosched exp experiments.sgd 10 60000`."""

    noun = "experiment"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not ctx.resilient_parsing and exp_names.is_task(args[0]):
            return super().resolve_command(ctx, [exp_names.TASK, *args])
        return super().resolve_command(ctx, args)


app = SloschedTyper(cls=_Experiments, name="exp", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def exp() -> None:
    """Faasm's experiments (USENIX ATC'20) on slosched's functions, each against its baselines.

    Nothing here is Faasm: a wasm Faaslet is replaced by a warm slot of a worker, a Knative container by a
    process per instance. Each command makes its data, starts what it needs, measures, clears up, checks that
    nothing is left, and writes records, tables, figures and report.md into a directory of its own.

    The tasks of the original are taken by their names, and say what is run instead or why they have no
    effect; `names` and `task --help` list all of them. Its variables are heeded, too: N_WORKERS=4 slosched
    exp sgd, or slosched exp sgd N_WORKERS=4.

    \b
    Examples:
      slosched exp matrices --sizes 1000,2000 --workers 2
      slosched exp sgd --size micro --out sgd
      slosched exp sgd --size micro --out sgd --resume
      slosched exp experiments.sgd --native 4 60000 --micro
      slosched exp report sgd
      slosched exp names
    """


_Scale = Annotated[
    str,
    typer.Option(
        metavar="quick|published",
        help="quick: minutes on two cores. published: the sizes and durations of the paper.",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Directory of the run. One that holds a run gets the new one as run-002. Default "
        "./slosched-runs/<time>-exp-NAME.",
        show_default=False,
    ),
]
_Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in --out: what is done is not made again."),
]
_Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME=VALUE",
        help="Variables of the original, as in the environment: N_WORKERS=4, COLD_START_DELAY_MS=800.",
        show_default=False,
    ),
]


def _register(name: str, page: str) -> None:
    """Make the command of an experiment: the options of all, and its own."""
    try:
        config = _options_of(name)
    except ImportError:
        return  # it is not in this installation; a test asks for all of them

    def command(
        settings: _Settings = None,
        *,
        scale: _Scale = "quick",
        out: _Out = None,
        resume: _Resume = False,
        layout: Layout = "slosched",
        json: Json = False,
        options: Options,
    ) -> None:
        given = {key: value for key, value in options.items() if value is not None}
        _run(
            name,
            config(
                **values_of(config, _from_variables(name, config, given, settings or []) | given)
            ),
            scale=scale,
            out=out,
            resume=resume,
            layout=layout,
            json=json,
        )

    command.__doc__ = f"{EXPERIMENTS[name].summary}\n{page}"
    app.command(name, short_help=EXPERIMENTS[name].summary)(takes_options(config)(command))


def _options_of(name: str) -> Any:
    module, _, attribute = EXPERIMENTS[name].options.partition(":")
    return getattr(import_module(module), attribute)


def _from_variables(
    name: str, config: type, given: Mapping[str, Any], settings: Sequence[str]
) -> dict[str, Any]:
    """What the variables of the original say, by our options; says of each other one that it has no effect.

    Raises InvalidConfig for a setting that is not NAME=VALUE, or whose name the original does not have.
    """
    written: dict[str, str] = {}
    for setting in settings:
        variable, equals, value = setting.partition("=")
        if not equals or variable not in VARIABLES:
            raise InvalidConfig(
                f"{setting!r} is not a variable of the original as NAME=VALUE; known: {', '.join(VARIABLES)}"
            )
        written[variable] = value
    found: dict[str, Any] = {}
    rows = {row.field: row for row in command_rows(config)}
    for variable, about in VARIABLES.items():
        value = written.get(variable) or ("" if about.quiet else os.environ.get(variable, ""))
        if not value:
            continue
        row = next((rows[each] for each in about.fields if each in rows), None)
        if row is None:
            warn(f"{variable}={value}: no effect: {about.why or f'{name} has no option for it'}")
        elif row.name in given:
            warn(f"{variable}={value}: no effect: {row.argument} is given")
        else:
            found[row.name] = _value_of(row, about.written(value))
            warn(f"{variable}={value} is taken as {row.argument} {about.written(value)}")
    return found


def _value_of(row: Row, text: str) -> Any:
    """The value as the command line would have given it to `values_of`."""
    if row.unit or row.plain not in (int, float):
        return text
    return whole_number(row.argument, text) if row.plain is int else float(text)


def _run(
    name: str,
    options: Any,
    *,
    scale: str,
    out: Path | None,
    resume: bool,
    layout: str,
    json: bool,
) -> None:
    check_choice("--scale", scale, SCALES)
    check_choice("--layout", layout, LAYOUTS)
    if resume and out is None:
        raise InvalidConfig("--resume continues the run in a directory; give it as --out DIR")
    if out is not None:
        check_folder(out)
    from slosched.faasm.frame_run import Interrupted, Order, default_out, run_experiment

    order = Order(
        experiment=name,
        options=options,
        scale=scale,
        out=out or default_out(name),
        resume=resume,
        layout=layout,
    )
    try:
        frame = run_experiment(order, say=beside, show=nothing if json else say)
    except Interrupted as stopped:
        warn(f"stopped; the same command with `--out {order.out} --resume` continues")
        raise typer.Exit(128 + stopped.number) from None
    print_end(frame, json=json)


_PAGES = {
    "sgd": """
Workers train one linear SVM on a synthetic set in the shape of Reuters RCV1, or on a file in svmlight's
format, and push their changed weights every --interval updates. What is shared is compared: one copy of
inputs and weights per host, or a copy in each instance; with one worker it is the sequential reference.

\b
Examples:
  slosched exp sgd --size micro --workers 1,2,4 --out sgd
  slosched exp sgd --scale published --out sgd-published
  N_WORKERS=4 slosched exp sgd --data rcv1.svm --modes shared,copies""",
    "matrices": """
Each call multiplies by eight calls on half-size blocks, down to leaves that read blocks of A and B from the
state. It is compared with A @ B, with the same blocks in one process, and with Dask; every product is checked.

\b
Examples:
  slosched exp matrices --sizes 1000,2000 --splits 2 --out matrices
  slosched exp matrices --scale published --systems whole,slots,near --out matrices-published""",
    "inference-latency": """
One client asks for inferences one after the other; every K-th, a share, or each user's first is a cold
start, by the same rule for every system. Latencies are raw: time-outs are counted, nothing is corrected.

\b
Example:
  slosched exp inference-latency --out latency
  COLD_START_DELAY_MS=800 slosched exp inference-latency --scale published --out latency""",
    "inference-throughput": """
Many clients with think times, and open loops at 0.1 to 1.2 times the capacity that each system showed
before. Latencies are raw: time-outs are counted, nothing is corrected.

\b
Examples:
  slosched exp inference-throughput --out throughput""",
    "coldstart": """
Each rung, from a resident program to a new process, is measured on this machine; a container is not.

\b
Examples:
  slosched exp coldstart --out coldstart""",
}
for _name in EXPERIMENTS:
    _register(_name, _PAGES.get(_name, ""))


# ---------------------------------------------------------------------------- tasks, names, reports


@app.command(
    exp_names.TASK, short_help="Run a task of the original by its name.", cls=exp_names.TaskCommand
)
def task(
    words: Annotated[
        list[str],
        typer.Argument(metavar="NAME [WORD]...", help="As behind `inv`.", show_default=False),
    ],
) -> None:
    """Run what a task of the original is here, or say why it has no effect and what to run instead.

    `slosched exp NAME` is the same. Our options may stand behind the task's own words: --scale, --out,
    --size, --layout, --resume, --json.

    \b
    Examples:
      slosched exp task data.reuters-state --micro
      slosched exp experiments.sgd --native 4 60000 --micro --out sgd
      slosched exp tf.upload tf.state
    """
    found = exp_names.understood(words)
    for each in found:
        for note in each.notes:
            say(note)
    for each in found:
        if each.runs:
            beside(f"slosched: {each.task.name} runs: slosched {' '.join(each.runs)}")
            code = app(args=[*each.runs[1:]], prog_name="slosched exp", standalone_mode=False)
            if code:
                raise typer.Exit(code)


@app.command("all", short_help="Run every experiment, one after the other.")
def all_(
    settings: _Settings = None,
    *,
    scale: _Scale = "quick",
    out: _Out = None,
    resume: _Resume = False,
    layout: Layout = "slosched",
    only: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="These alone. Default: every experiment.")
    ] = "",
) -> None:
    """Run every experiment with its default options, each in a folder of DIR; then index.md names them all.

    One that fails does not end the others; the exit code is then not 0. index.md has each experiment's end, and
    the paper's claims beside what was found.

    \b
    Examples:
      slosched exp all --out faasm
      slosched exp all --out faasm --resume
    """
    names_ = list_of(only) or tuple(EXPERIMENTS)
    for name in names_:
        if name not in EXPERIMENTS:
            raise UnknownName("experiment", name, [*EXPERIMENTS])
    check_choice("--scale", scale, SCALES)
    check_choice("--layout", layout, LAYOUTS)
    from slosched.faasm.frame_all import run_all
    from slosched.faasm.frame_run import Interrupted, Order, default_out, options_of

    place = out or default_out("all")
    check_folder(place)
    orders = []
    for name in names_:
        config = options_of(name)
        given = values_of(config, _from_variables(name, config, {}, settings or []))
        orders.append(
            Order(
                experiment=name,
                options=config(**given),
                scale=scale,
                out=place / name,
                resume=resume,
                layout=layout,
            )
        )
    try:
        ends = run_all(orders, place, say=beside, show=say)
    except Interrupted as stopped:
        warn(f"stopped; the same command with `--out {place} --resume` continues")
        raise typer.Exit(128 + stopped.number) from None
    for end in ends:
        say(f"{end.experiment}: {end.text}")
    say(f"written to {place}; index.md names all of it")
    if any(end.failed for end in ends):
        raise typer.Exit(1)


@app.command("names", short_help="What each task and variable of the original is here.")
def names(
    json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of docs/faasm.md.")
    ] = False,
) -> None:
    """List the original's tasks, switches and variables, and what each is here.

    \b
    Example:
      slosched exp names
    """
    if markdown:
        say(exp_names.names_markdown())
        return
    if json:
        print_json(exp_names.names_document())
        return
    say(exp_names.names_text())


app.command("report", short_help="Make tables and figures of a run again.")(exp_results.report)
app.command("pull", short_help="Copy results from another host over SSH.")(exp_results.pull)
