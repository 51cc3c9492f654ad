"""`slosched gateway`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from slosched.cli.config_options import Options, takes_options, values_of
from slosched.cli.output import Announcer
from slosched.gateway_config import GatewayConfig

_Config = Annotated[
    Path | None, typer.Option(help="A gateway.toml; options on the command line override it.")
]


@takes_options(GatewayConfig)
def gateway(*, options: Options, config: _Config = None) -> None:
    """Serve the Open Inference Protocol: Triton's clients talk to a controller through it.

    A request has an SLO: its parameter `timeout` in microseconds, else the header (gRPC: metadata)
    slosched-slo as 25ms, else the RPC's deadline, else the controller's default. One that cannot be in
    time is refused at once, with 503 or UNAVAILABLE.

    It may start before its controller, and several may run beside each other. SIGTERM or Ctrl-C
    answers what runs and exits 0; SIGHUP reads the tokens again. docs/gateway.md has the rest.

    \b
    Examples:
      slosched gateway                                   # HTTP on port 8000, gRPC on 8001, this host alone
      slosched gateway --controller gpu01:12346 --bind 0.0.0.0 --tls-cert chain.pem --tls-key key.pem
      slosched gateway --tokens tokens.toml --model-control explicit --load digits,pitch
      curl 'localhost:8000/v1/infer/digits?slo=25ms' -d '{"inputs": {"image": [0.1, 0.2]}}'
    """
    base = GatewayConfig()
    if config is not None:
        base = _from_file(config, base)
    resolved = replace(base, **values_of(GatewayConfig, options))
    from slosched.fronts.gateway import run_gateway

    raise typer.Exit(run_gateway(resolved, announce=Announcer()))


def _from_file(file: Path, base: GatewayConfig) -> GatewayConfig:
    """`base` with what the file says; the files that it names are relative to it. Raises InvalidConfig."""
    from slosched.config_file import with_table
    from slosched.text_files import read_toml

    found = with_table(str(file), base, read_toml(file, "")[1])
    named: dict[str, Any] = {
        field: str(file.parent / path)
        for field in ("tls_cert", "tls_key", "tokens")
        if (path := getattr(found, field))
    }
    return replace(found, **named)
