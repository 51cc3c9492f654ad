"""`slosched keys`: files that the processes of a cluster share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import say

app = SloschedTyper(cls=SloschedGroup, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def keys() -> None:
    """Make the keys of a cluster."""


@app.command("join")
def join(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to write it; must not exist.")
    ],
) -> None:
    """Write a join key: 32 random bytes in a file that only you can read.

    Copy it to each host by a way that you trust, and give it to the controller and to the workers that register
    with --join-key FILE. It never crosses the network.

    \b
    Example:
      slosched keys join cluster.key
    """
    from slosched.join_key import write_join_key

    write_join_key(file)
    say(f"{file}: a join key for --join-key of the controller and its workers")
