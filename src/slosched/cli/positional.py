"""Commands whose values are positional, as Clockwork's are: `controller INFER5 host:port 0 6 5000000`.

A number below 0 among them must reach the checks that can say what is wrong with it, so typer is told
to let through what it does not know; a misspelt option is then found here.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

import typer

from slosched.cli.help import SloschedCommand

#: Longer words are not compared with options: a comparison costs the product of both lengths.
_LONGEST = 64
_OPTION = re.compile(r"^--?[A-Za-z]")


class PositionalCommand(SloschedCommand):
    """A command with a variadic last argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ignore_unknown_options = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = list(super().parse_args(ctx, args))
        values = [value for value in ctx.params.values() if isinstance(value, (list, tuple))]
        for text in (text for value in values for text in value):
            if isinstance(text, str) and _OPTION.match(text):
                known = [name for p in self.params for name in p.opts if name.startswith("-")]
                close = get_close_matches(text[:_LONGEST], known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise typer.BadParameter(f"no such option: {text}{hint}", ctx=ctx)
        return rest
