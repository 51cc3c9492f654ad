"""`slosched client [host:port] ...`: workloads, single requests, and questions to a controller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slosched.cli.ask import Json, controller_address, infer, models, status
from slosched.cli.guard import SloschedGroup
from slosched.cli.positional import PositionalCommand
from slosched.cli.values import LOCAL_CONTROLLER, inputs_enabled, looks_like_address, one_address
from slosched.errors import InvalidConfig, SloschedError, UnknownName


class ClientGroup(SloschedGroup):
    """`client [host:port] WORKLOAD ...`: takes an optional leading address off the arguments.

    Clockwork's client has the address first, always; typer's groups know only options there.
    """

    noun = "workload"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            if looks_like_address(args[0]):
                ctx.obj, args = one_address(args[0]), args[1:]
            elif ":" in args[0] or (len(args) > 1 and args[1] in self.commands):
                raise InvalidConfig(
                    f"{args[0]!r} is no host:port; write the controller's address as "
                    f"{LOCAL_CONTROLLER}, or leave it out"
                )
        return list(super().parse_args(ctx, args))

    def unknown(self, ctx: Any, name: str) -> SloschedError:
        from slosched.workloads import WORKLOADS

        *others, last = sorted(set(self.list_commands(ctx)) - set(WORKLOADS))
        error = UnknownName(self.noun, name, list(WORKLOADS))
        return InvalidConfig(
            f"{error} ({', '.join(others)} and {last} are commands beside the workloads)"
        )


app = typer.Typer(
    cls=ClientGroup,
    name="client",
    rich_markup_mode=None,
    no_args_is_help=True,
    subcommand_metavar="WORKLOAD|infer|models|status [ARGS]...",
)


@app.callback()
def client() -> None:
    """Drive load against a controller, or ask it something.

    The controller's address (host:port) comes first. Left out, it is 127.0.0.1:12346.

    \b
    Examples:
      slosched client slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 30
      slosched client cluster02:12346 slo-exp-1 resnet50_v2 4 fixed-rate 100 10ms 100ms 10ms add 3
      slosched client infer resnet50_v2 cat.jpg --slo 25ms
    """


_SloExp1 = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL COPIES DIST RATE SLO-START SLO-END SLO-FACTOR SLO-OP PERIOD",
        hidden=True,  # the text of the command explains them
    ),
]
_Inputs = Annotated[
    bool | None,
    typer.Option(
        "--inputs/--no-inputs",
        help="Send an input with each request, or let the worker make them. Default: send, unless "
        "CLOCKWORK_DISABLE_INPUTS=1.",
    ),
]
_Seed = Annotated[int, typer.Option(min=0, help="Chooses the arrivals and the inputs.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory for client_log.tsv and the manifest; a run in it is never overwritten. "
        "Default ./slosched-runs/<time>-slo-exp-1."
    ),
]


@app.command("slo-exp-1", cls=PositionalCommand)
def slo_exp_1(
    ctx: typer.Context,
    args: _SloExp1,
    inputs: _Inputs = None,
    seed: _Seed = 0,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Sweep the SLO over copies of one model, with an open loop (Clockwork, Figure 7).

    Requests go out when they are due, whatever became of earlier ones. All start with SLO-START; every
    PERIOD the SLO is multiplied by SLO-FACTOR, or grows by it, until it would pass SLO-END. The client
    then ends by itself. Ctrl-C ends it early and leaves a valid partial run.

    \b
      MODEL       a model's name, for example resnet50_v2
      COPIES      number of instances of the model, each with its own stream of arrivals
      DIST        poisson or fixed-rate
      RATE        requests/s in total, over all copies
      SLO-START   first SLO: a multiple of the model's batch-1 time (1, 2.9), or a duration (10ms)
      SLO-END     last SLO, included; written as SLO-START is
      SLO-FACTOR  what changes it: a number, or a duration to add to a duration
      SLO-OP      mul or add
      PERIOD      time between changes; a bare number is in seconds

    \b
    Examples:
      slosched client slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 30      # 12 steps, 360 s
      slosched client slo-exp-1 resnet50_v2 4 poisson 100 2 32 2 mul 7           # 2 4 8 16 32
      slosched client slo-exp-1 resnet50_v2 4 poisson 100 10ms 100ms 10ms add 3s
    """
    from slosched.cli.sweep import run_sweep
    from slosched.workloads import parse_workload

    spec = parse_workload("slo-exp-1", args)
    code = run_sweep(
        controller_address(ctx, None),
        spec,
        inputs=inputs_enabled(inputs),
        seed=seed,
        out=out,
        json=json,
    )
    raise typer.Exit(code)


app.command("infer")(infer)
app.command("models")(models)
app.command("status")(status)
