"""`slosched client [host:port] ...`: workloads, single requests, and questions to a controller."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slosched.cli.ask import Inputs, Json, controller_address, drain, infer, models, status, unload
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.max_rate import max_rate_live
from slosched.cli.positional import PositionalCommand
from slosched.cli.values import (
    LOCAL_CONTROLLER,
    duration_ns,
    inputs_enabled,
    looks_like_address,
    one_address,
)
from slosched.cli.workload import announce_trace, is_spec, workload_of
from slosched.errors import InvalidConfig, SloschedError, UnknownName
from slosched.extensions import is_target, outside_row

if TYPE_CHECKING:
    from slosched.workloads import Workload
    from slosched.workloads.registry import Kind

_HELP_COLUMNS = 100


class ClientGroup(SloschedGroup):
    """`client [host:port] WORKLOAD ...`: takes an optional leading address off the arguments.

    Clockwork's client has the address first, always; typer's groups know only options there. Each
    workload of the registry is a command, and so is each TOML file that describes one.
    """

    noun = "workload"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        commands = self.list_commands(ctx)
        if args and not (args[0] in commands or args[0].startswith("-") or is_spec(args[0])):
            next_is_workload = len(args) > 1 and (args[1] in commands or is_spec(args[1]))
            if looks_like_address(args[0]):
                ctx.obj, args = one_address(args[0]), args[1:]
            elif next_is_workload or (":" in args[0] and not is_target(args[0])):
                raise InvalidConfig(
                    f"{args[0]!r} is not a host:port; write the controller's address as "
                    f"{LOCAL_CONTROLLER}, or leave it out"
                )
        return list(super().parse_args(ctx, args))

    def list_commands(self, ctx: Any) -> list[str]:
        from slosched.workloads import WORKLOAD_KINDS

        return [*WORKLOAD_KINDS.names(), *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from slosched.workloads import WORKLOAD_KINDS

        if is_spec(cmd_name):
            return _spec_command(cmd_name)
        if cmd_name in self.commands or not (is_target(cmd_name) or cmd_name in WORKLOAD_KINDS):
            return super().get_command(ctx, cmd_name)
        kind = WORKLOAD_KINDS.get(cmd_name)
        return workload_command(cmd_name, _metavar(kind), _help(kind, cmd_name), kind.parse)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The workloads and the commands beside them, each with its whole summary."""
        from slosched.workloads import WORKLOAD_KINDS, WORKLOADS

        rows = [(name, kind.summary) for name, kind in WORKLOADS.items()]
        with formatter.section("Workloads (WORKLOAD --help says what each takes)"):
            formatter.write_dl(rows)
        rows = [
            outside_row(each, each.thing.summary if each.thing else "")
            for each in WORKLOAD_KINDS.outside()
        ]
        if rows:
            with formatter.section("Workloads of other packages"):
                formatter.write_dl(rows)
        rows = [
            (name, command.get_short_help_str(limit=200)) for name, command in self.commands.items()
        ]
        with formatter.section("Other commands"):
            formatter.write_dl(rows)

    def unknown(self, ctx: Any, name: str) -> SloschedError:
        from slosched.workloads import WORKLOAD_KINDS

        *others, last = sorted(self.commands)
        error = UnknownName(self.noun, name, WORKLOAD_KINDS.names())
        return InvalidConfig(
            f"{error} ({', '.join(others)} and {last} are commands beside the workloads, and a "
            "file.toml may describe one)"
        )


app = SloschedTyper(
    cls=ClientGroup,
    name="client",
    rich_markup_mode=None,
    no_args_is_help=True,
    subcommand_metavar="WORKLOAD|FILE.toml|COMMAND [ARGS]...",
)


@app.callback()
def client() -> None:
    """Send load or a question to a controller.

    The controller's address (host:port) comes first. Left out, it is 127.0.0.1:12346. A TOML file may
    stand for a workload and its values.

    \b
    Examples:
      slosched client slo-exp-1 resnet50_v2 12 poisson 600 1 100 1.5 mul 30
      slosched client cluster02:12346 slo-exp-1 resnet50_v2 4 fixed-rate 100 10ms 100ms 10ms add 3
      slosched client workloads/fig7.toml --seed 2
      slosched client infer resnet50_v2 cat.jpg --slo 25ms
    """


app.command("infer")(infer)
app.command("max-rate", short_help="The highest rate at which an SLO holds.")(max_rate_live)
app.command("models")(models)
app.command("status")(status)
app.command("unload")(unload)
app.command("drain")(drain)


# ----------------------------------------------------------------------------------- workloads

_Seed = Annotated[int, typer.Option(min=0, help="Chooses the arrivals and the inputs.")]
_Duration = Annotated[
    str | None,
    typer.Option(
        help="End after this long (30s; a bare number is in seconds). Default: when the workload "
        "ends, or at Ctrl-C if it never does."
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory for client_log.tsv and the manifest; a run in it is never overwritten. "
        "Default ./slosched-runs/<time>-<workload>."
    ),
]
_Name = Annotated[
    str,
    typer.Option(
        "--name",
        help="Name of this client at the controller. Default: the workload's name.",
        show_default=False,
    ),
]
_Weight = Annotated[
    float,
    typer.Option(
        help="Weight of its requests relative to others' weight of 1, at least 0.01; above 1 only "
        "if the controller's operator allows it (docs/fairness.md)."
    ),
]


def workload_command(
    name: str, metavar: str, text: str, make: Callable[[Sequence[str]], Workload]
) -> Any:
    """Return the command `name` that runs the workload which `make` makes of its values.

    `metavar` names the values in the usage line; `text` is the help.
    """

    def run(
        ctx: typer.Context,
        args: Any = None,
        inputs: Inputs = None,
        seed: _Seed = 0,
        duration: _Duration = None,
        out: _Out = None,
        name: _Name = "",
        weight: _Weight = 1.0,
        json: Json = False,
    ) -> None:
        from slosched.cli.run import run_live

        workload = make(args or [])
        announce_trace(workload)
        ends_ns = None if duration is None else duration_ns("--duration", duration)
        code = run_live(
            controller_address(ctx, None),
            workload,
            inputs=inputs_enabled(inputs),
            seed=seed,
            duration_ns=ends_ns,
            out=out,
            json=json,
            name=name,
            weight=weight,
        )
        raise typer.Exit(code)

    # The help's text explains the values, so the argument itself is not listed.
    argument = typer.Argument(metavar=metavar, hidden=True)
    run.__annotations__["args"] = Annotated[list[str] | None, argument]
    one = typer.Typer(rich_markup_mode=None, add_completion=False)
    one.command(name, cls=PositionalCommand, help=text)(run)
    return typer.main.get_command(one)


def _metavar(kind: Kind) -> str:
    return " ".join(p.name if p.default is None else f"[{p.name}]" for p in kind.parameters)


def _help(kind: Kind, name: str) -> str:
    """The help of the command `name`, which runs the workload, from what the registry says of it."""
    blocks = [kind.summary]
    if kind.text:
        blocks.append(kind.text)
    if kind.parameters:
        width = max(len(p.name) for p in kind.parameters)
        lines = ["\b"]
        for p in kind.parameters:
            default = "" if p.default is None else f" (default {p.default or 'none'})"
            lines += textwrap.wrap(
                p.help + default,
                _HELP_COLUMNS - 2,
                initial_indent=f"  {p.name:<{width}}  ",
                subsequent_indent=" " * (width + 4),
            )
        blocks.append("\n".join(lines))
    if kind.examples:
        examples = [f"  slosched client {name} {text}".rstrip() for text in kind.examples]
        blocks.append("\n".join(["\b", "Examples:", *examples]))
    return "\n\n".join(blocks)


def _spec_command(path: str) -> Any:
    text = f"Run the workload that {path} describes."
    return workload_command(path, "", text, lambda args: workload_of([path, *args]))
