"""`slosched exp` on runs that have ended: reports made again, results of other hosts, how an end is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.output import print_json, say
from slosched.errors import InvalidConfig, UnknownName
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.faasm.names import REPLACED

if TYPE_CHECKING:
    from slosched.faasm.frame import Frame

LAYOUTS = ("slosched", "faasm")
Layout = Annotated[
    str,
    typer.Option(
        metavar="slosched|faasm",
        help="faasm: also the original's folders <user>_<func>/SYSTEM_..._logs, with its file names and keys.",
    ),
]


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory of a run, or run-002 in it.")
    ],
    *,
    layout: Layout = "slosched",
    json: Json = False,
) -> None:
    """Make the tables, the figures and report.md of a run again from its records. Nothing is measured.

    A run that was stopped has what its complete cells allow.

    \b
    Examples:
      slosched exp report sgd
      slosched exp report sgd/run-002 --layout faasm
    """
    check_choice("--layout", layout, LAYOUTS)
    from slosched.faasm.frame_run import report_again

    frame = report_again(directory, show=nothing if json else say, layout=layout)
    print_end(frame, json=json)


def pull(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help="Whose results: sgd, matrices, ...")
    ],
    user: Annotated[str, typer.Argument(metavar="USER", help="The user there.")],
    host: Annotated[
        str, typer.Argument(metavar="HOST", help="The host, or its name in ssh's configuration.")
    ],
    *,
    folder: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="The folder there. Default ~/faasm/<user>_<func>, which `slosched exp EXPERIMENT --layout "
            "faasm --out ~/faasm` writes.",
        ),
    ] = "",
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder here that is new or empty. Default ./faasm-results/HOST/<user>_<func>.",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="FILE", help="A Python there that has slosched.")
    ] = "python3",
    ssh_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A configuration for ssh. Default: its own.", show_default=False
        ),
    ] = None,
) -> None:
    """Copy a result directory of another host over SSH into a new folder here.

    ssh must reach the host without a question. Nothing there is changed, and nothing here is overwritten.

    \b
    Examples:
      slosched exp pull sgd alice cluster02
      slosched exp pull sgd alice cluster02 --folder slosched-runs/sgd --into sgd-of-cluster02
    """
    if experiment not in EXPERIMENTS:
        raise UnknownName("experiment", experiment, [*EXPERIMENTS])
    from slosched.faasm.pull import pull_results

    pulled = pull_results(
        experiment,
        user=user,
        host=host,
        folder=folder,
        into=into,
        python=python,
        ssh_config="" if ssh_config is None else str(ssh_config),
    )
    say(f"{pulled.files} files of {pulled.folder} on {host} are in {pulled.into}")


def print_end(frame: Frame, *, json: bool) -> None:
    """Print where a run's results are, or as JSON its tables."""
    if json:
        tables = {table.name: table.rows for table in frame.tables}
        document = {"directory": str(frame.directory), "replaced": REPLACED, "tables": tables}
        print_json(document)
        return
    say(REPLACED)
    say(f"written to {frame.directory}; report.md has all of it")


def nothing(text: str) -> None:
    """Prints nothing: the answer is JSON."""


def check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise InvalidConfig unless the value of `option` is one of those known."""
    if value not in known:
        raise InvalidConfig(f"{option} must be {' or '.join(known)}, not {value!r}")
