"""The command line, wired together: which command lives in which file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from slosched.cli import (
    ask,
    awake,
    azure_trace,
    bound,
    cascade,
    client,
    compare,
    controller,
    demo,
    doctor,
    exp,
    experiment,
    explain,
    functions,
    fuzz,
    gateway,
    keys,
    max_rate,
    plan,
    plot,
    profile,
    report,
    share,
    simulate,
    simulate_calls,
    state,
    trace,
    validate,
    worker,
)
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.positional import PositionalCommand
from slosched.version import __version__

#: The commands by what they are for, in the order in which a newcomer meets them.
_SECTIONS = {
    "Begin": ("demo", "doctor"),
    "Serve": ("worker", "controller", "gateway", "keys", "state", "awake"),
    "Ask and operate": (
        "client",
        "call",
        "functions",
        "models",
        "status",
        "unload",
        "drain",
    ),
    "After a run": ("report", "explain", "plot", "trace"),
    "Measure and simulate": (
        "simulate",
        "compare",
        "max-rate",
        "plan",
        "bound",
        "fuzz",
        "profile",
        "validate",
        "azure-trace",
    ),
    "Published experiments": ("experiment", "cascade", "share", "exp"),
}
_ORDER = [name for section in _SECTIONS.values() for name in section]


# Plain help: typer's boxes cost 0.1 s at each start and break the examples' lines.
class _Root(SloschedGroup):
    """The commands in sections."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, _ORDER))
        for heading, names in _SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (f"{name:<{width}}", self.commands[name].get_short_help_str(limit=200))
                        for name in names
                    ]
                )


app = SloschedTyper(
    cls=_Root,
    name="slosched",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slosched {__version__}")
        raise typer.Exit


@app.callback()
def slosched(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """A deadline scheduler for GPU inference: predict, plan ahead, start on time, refuse at once.

    Three kinds of process speak ZeroMQ: workers (port 12345) run models on GPUs, a controller (port
    12346) decides what each GPU does and when, and clients send requests that carry a deadline.

    Durations are written 250us, 2.9ms, 30s. A bare number is in seconds everywhere, except in
    Clockwork's positional options of the controller (schedule_ahead, default_slo, max_exec): ns.

    \b
    See it work, on whatever this machine has (about three minutes):
      slosched demo

    \b
    By hand, each command in its own terminal:
      slosched worker --device emulated --gpus 6
      slosched controller INFER5 --workers 127.0.0.1:12345 --schedule-ahead 5ms
      slosched client slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 30
      slosched plot fig7 slosched-runs/<run>
    """


app.command("worker", short_help="Run a worker: one or more GPUs, real or emulated.")(worker.worker)
app.command(
    "controller",
    cls=controller.ControllerCommand,
    short_help="Run the controller that plans every inference.",
)(controller.controller)
app.command("gateway", short_help="Serve the Open Inference Protocol, as Triton does.")(
    gateway.gateway
)
app.add_typer(
    client.app,
    name="client",
    options_metavar="[host:port]",
    short_help="Send load or one request to a controller.",
)
app.command("models", short_help="List the models of a controller.")(ask.models)
app.command("status", short_help="Show a controller's state.")(ask.status)
app.add_typer(functions.app, name="functions", short_help="The functions that workers run.")
functions.app.command("simulate")(simulate_calls.simulate)
app.command("call", short_help="Call a function of the workers.")(functions.call)
app.command("unload", short_help="Unload a model from the workers.")(ask.unload)
app.command("drain", short_help="Take a worker out of use, or back.")(ask.drain)
app.add_typer(keys.app, name="keys", short_help="Make the cluster's join key.")
app.command("profile", short_help="Measure models on a device.")(profile.profile)
app.command("simulate", cls=PositionalCommand, short_help="Run a workload in virtual time.")(
    simulate.simulate
)
app.command(
    "compare", cls=PositionalCommand, short_help="Several schedulers on the same arrivals."
)(compare.compare)
app.command("max-rate", short_help="The highest rate at which an SLO holds, in virtual time.")(
    max_rate.max_rate_simulated
)
app.command("bound", cls=PositionalCommand, short_help="What no scheduler can exceed.")(bound.bound)
app.command("plan", short_help="How many GPUs a mix of models needs.")(plan.plan)
app.command("experiment", short_help="All runs of a published figure, on many hosts.")(
    experiment.experiment
)
app.add_typer(cascade.app, name="cascade", short_help="Model cascades: DiffServe's experiments.")
app.add_typer(
    share.app,
    name="share",
    short_help="Models that share one GPU: Deft's and HotCarbon's experiments.",
)
app.add_typer(
    exp.app, name="exp", short_help="Faasm's experiments: sgd, matrices, inference, cold starts."
)
app.add_typer(state.app, name="state", short_help="The store that functions share state through.")
app.add_typer(plot.app, name="plot", short_help="Draw a published figure from run directories.")
app.command("report", short_help="Write the results of a run as one HTML page.")(report.report)
app.command("explain", short_help="Why a request was refused, failed or late.")(explain.explain)
app.command("trace", short_help="Write a run as a trace for Perfetto.")(trace.trace)
app.command(
    "validate", cls=PositionalCommand, short_help="Run a workload live and simulated, and compare."
)(validate.validate)
app.command("azure-trace", short_help="Write a synthetic trace for the azure workloads.")(
    azure_trace.azure_trace
)
app.command("fuzz", short_help="Random clusters under random faults.")(fuzz.fuzz)
app.command("awake", short_help="Keep this host's cores from halting.")(awake.awake)
app.command("doctor", short_help="Check whether this machine can keep deadlines.")(doctor.doctor)
app.command("demo", short_help="Run everything on this machine, and check it.")(demo.demo)
