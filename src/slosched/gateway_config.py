"""What a gateway is told. A field is an option (options.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from slosched.addresses import parse_address, parse_bind
from slosched.config import CONTROLLER_PORT
from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, AtLeast1, check_types
from slosched.options import ADDRESSES, ADMISSION, MODELS, Option

#: The ports that clients of the protocol try first.
HTTP_PORT, GRPC_PORT = 8000, 8001
#: Whether a request loads a model, or only `load`.
MODEL_CONTROL = ("on-demand", "explicit")


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """A gateway process. Port 0 takes a free one, and -1 leaves that side out.

    Without `tokens` every client may ask for everything.
    """

    controller: Annotated[
        str,
        Option(
            help="The controller's address for clients. Default {default}.",
            metavar="HOST:PORT",
            panel=ADDRESSES,
        ),
    ] = f"127.0.0.1:{CONTROLLER_PORT}"
    bind: Annotated[
        str,
        Option(
            help="Address to listen on. Default {default}: this host alone.",
            metavar="ADDRESS",
            panel=ADDRESSES,
        ),
    ] = "127.0.0.1"
    http_port: Annotated[
        int,
        Meta(ge=-1, le=65535),
        Option(
            help="Port for HTTP. Default {default}; 0 takes a free one, -1: none.", panel=ADDRESSES
        ),
    ] = HTTP_PORT
    grpc_port: Annotated[
        int,
        Meta(ge=-1, le=65535),
        Option(
            help="Port for gRPC. Default {default}; 0 takes a free one, -1: none.", panel=ADDRESSES
        ),
    ] = GRPC_PORT
    tls_cert: Annotated[
        str,
        Option(
            help="PEM file with the certificate chain; with --tls-key both ports speak TLS. Default: no TLS.",
            metavar="FILE",
            panel=ADDRESSES,
        ),
    ] = ""
    tls_key: Annotated[
        str,
        Option(
            help="PEM file with the private key of --tls-cert. Default: no TLS.",
            metavar="FILE",
            panel=ADDRESSES,
        ),
    ] = ""
    tokens: Annotated[
        str,
        Option(
            help="TOML file of bearer tokens, each with a name, a weight and quotas, which each gateway counts "
            "for itself; other clients get 401. Default: none is needed.",
            metavar="FILE",
            panel=ADMISSION,
        ),
    ] = ""
    max_request_bytes: Annotated[AtLeast1, Option(help="The largest request.", panel=ADMISSION)] = (
        64 * 1024**2
    )
    max_in_flight: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)],
        Option(
            help="Requests that may wait for an answer at a time; more get 429.", panel=ADMISSION
        ),
    ] = 4096
    max_in_flight_bytes: Annotated[
        AtLeast1,
        Option(
            help="Inputs of these requests together; more get 429.",
            name="max_in_flight_bytes",
            panel=ADMISSION,
        ),
    ] = 1024**3
    max_connections: Annotated[
        Annotated[int, Meta(ge=1, le=100_000)],
        Option(help="HTTP connections at a time, and as many of gRPC.", panel=ADMISSION),
    ] = 1024
    max_memory_bytes: Annotated[
        AtLeast0,
        Option(
            help="Memory of the gateway, beyond which it ends the gRPC connections that hold most of it. "
            "Default {default}: four times --max-in-flight-bytes.",
            panel=ADMISSION,
        ),
    ] = 0
    shared_memory: Annotated[
        bool,
        Option(
            help="Let clients of this host register POSIX shared memory for inputs and outputs.",
            panel=ADMISSION,
        ),
    ] = True
    model_control: Annotated[
        str,
        Option(
            help="on-demand: the first request for a model loads it; explicit: `load` alone does.",
            panel=MODELS,
            one_of=MODEL_CONTROL,
        ),
    ] = "on-demand"
    load: Annotated[
        tuple[str, ...],
        Option(
            help="Models to load at the start. Default: none.", metavar="NAME,...", panel=MODELS
        ),
    ] = ()
    max_models: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)],
        Option(help="Models that clients may have loaded at a time.", panel=MODELS),
    ] = 256

    def __post_init__(self) -> None:
        check_types(self)
        parse_address(self.controller)
        parse_bind(self.bind)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InvalidConfig("--tls-cert and --tls-key go together: give both, or neither")
        if self.http_port == self.grpc_port == -1:
            raise InvalidConfig("--http-port and --grpc-port are both -1: nothing would be served")
        if self.model_control not in MODEL_CONTROL:
            raise InvalidConfig(
                f"model_control {self.model_control!r} is none of {', '.join(MODEL_CONTROL)}"
            )
