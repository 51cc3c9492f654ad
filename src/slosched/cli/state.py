"""`slosched state`: the store that functions share their state through."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from slosched.cli.ask import Json
from slosched.cli.guard import SloschedGroup
from slosched.cli.help import SloschedTyper
from slosched.cli.output import print_json, say
from slosched.cli.stopping import stopped_by_signals
from slosched.errors import InvalidConfig, SloschedError

app = SloschedTyper(cls=SloschedGroup, no_args_is_help=True, rich_markup_mode=None)

_PORT = 6380
_Store = Annotated[
    str,
    typer.Option(
        metavar="STORE",
        help="redis://HOST:PORT, embedded (shared memory of this host) or embedded:FOLDER.",
    ),
]
_Port = Annotated[int, typer.Option(min=1, max=65535, help="Port of the server on loopback.")]


@app.callback()
def state() -> None:
    """The state that functions share: start a store, see what is in it, remove namespaces.

    Each run has a namespace of its own, and removes it when it ends. A run that was killed leaves its
    namespace in Redis; the next one of that name refuses to start until it is dropped. docs/state.md says more.

    \b
    Example, in two terminals:
      slosched state up
      slosched state list --store redis://127.0.0.1:6380
    """


@app.command("up")
def up(
    port: _Port = _PORT,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep the data there, also when the server ends."),
    ] = None,
) -> None:
    """Start a Redis server on loopback for this host, until Ctrl-C or `slosched state down`.

    It needs the program redis-server (or valkey-server) and the package redis (extra state). For several
    hosts, run a Redis of your own that they reach, and give its address instead.

    \b
    Examples:
      slosched state up
      slosched state up --port 7000 --keep state-data
    """
    from slosched.clock import sleep_ns
    from slosched.functions.state.server import Server

    with stopped_by_signals() as stopping, Server(port, keep=keep) as server:
        say(f"slosched state ready on 127.0.0.1:{port}: --store {server.address}; Ctrl-C ends it")
        while not stopping():
            if server.process.poll() is not None:
                if server.process.returncode in (0, -signal.SIGTERM):
                    say("the Redis server was shut down")
                    raise typer.Exit(0)
                raise SloschedError(
                    f"the Redis server ended with code {server.process.returncode}; start it again"
                )
            sleep_ns(50_000_000)


@app.command("down")
def down(port: _Port = _PORT) -> None:
    """End the server that `slosched state up` started on this host.

    \b
    Example:
      slosched state down
    """
    from slosched.functions.state.redis_store import RedisStore

    store = RedisStore(f"redis://127.0.0.1:{port}")
    if not store.process_id():
        raise InvalidConfig(f"no Redis server answers on port {port}; nothing was ended")
    store.shut_down()
    say(f"ended the Redis server on port {port}")


@app.command("list")
def list_namespaces(*, store: _Store = f"redis://127.0.0.1:{_PORT}", json: Json = False) -> None:
    """List the namespaces of a store with their keys and bytes.

    \b
    Examples:
      slosched state list
      slosched state list --store embedded --json
    """
    from slosched.functions.state.opening import open_store

    opened = open_store(store)
    found = opened.namespaces()
    if json:
        rows = [
            {"namespace": name, "keys": keys, "bytes": size} for name, (keys, size) in found.items()
        ]
        print_json({"store": opened.describe(), "namespaces": rows})
        return
    say(f"{opened.describe()}: {len(found)} namespace(s)")
    for name, (keys, size) in found.items():
        say(f"  {name}: {keys:,} key(s), {size:,} bytes")


@app.command("drop")
def drop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The namespace.")],
    *,
    store: _Store = f"redis://127.0.0.1:{_PORT}",
) -> None:
    """Remove a namespace and all its keys. A run that still uses it fails with "key is gone".

    \b
    Example:
      slosched state drop sgd --store redis://127.0.0.1:6380
    """
    from slosched.functions.state.opening import open_store

    opened = open_store(store)
    if not opened.drop(name):
        known = ", ".join(opened.namespaces()) or "none"
        raise InvalidConfig(f"{opened.describe()} has no namespace {name!r}; there: {known}")
    say(f"dropped {name}")
