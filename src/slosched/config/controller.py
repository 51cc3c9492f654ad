"""The options of a controller beside those of its scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from slosched.addresses import parse_address, parse_bind
from slosched.config.listening import CONTROLLER_PORT, Bind, JoinKey
from slosched.config.scheduler import SchedulerConfig
from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, Port, check_types
from slosched.options import ADDRESSES, PROCESSOR, Option


@dataclass(frozen=True)
class ControllerConfig:
    """A controller process. `workers` are "host:port"; others may register."""

    scheduler: SchedulerConfig
    workers: tuple[str, ...] = ()
    port: Annotated[
        Port,
        Option(help="Port for clients. Default {default}; 0 takes a free one.", panel=ADDRESSES),
    ] = CONTROLLER_PORT
    bind: Bind = "0.0.0.0"
    http_port: Annotated[
        int,
        Meta(ge=-1, le=65535),
        Option(
            help="Loopback port of /healthz, /readyz and /status. Default {default}: "
            f"{CONTROLLER_PORT + 1} beside the default --port, else a free one; -1: none.",
            panel=ADDRESSES,
        ),
    ] = 0
    join_key: JoinKey = ""
    cluster_id: Annotated[
        str,
        Option(
            help="Name or number of the cluster. A controller that is started again with the same one takes "
            "over what the workers hold. Default: another one at each start.",
            metavar="ID",
            panel=ADDRESSES,
        ),
    ] = ""
    busy_poll: Annotated[
        bool,
        Option(
            help="Busy-poll: at light load a request is planned about 0.1 ms sooner, at the cost of a whole "
            "core.",
            flag="--busy-poll/--sleep",
            panel=PROCESSOR,
        ),
    ] = False
    io_threads: Annotated[
        int,
        Meta(ge=0, le=16),  # 0: the default that its help names
        Option(
            help="Threads that move inputs and outputs between sockets and memory. Default: 1 on up to 3 CPUs, "
            "else one for every 2, at most 4.",
            panel=PROCESSOR,
        ),
    ] = 0
    log_dir: Annotated[
        str,
        Option(
            help="Directory for the telemetry; a run in it is never overwritten. Default "
            "$CLOCKWORK_LOG_DIR, else ./slosched-runs/<time>-controller.",
            metavar="DIR",
        ),
    ] = ""
    log_bytes: Annotated[
        AtLeast0,  # 0: it grows for ever
        Option(
            help="Rotate each log at this size; the older file becomes NAME.1. Default: no rotation.",
            name="log_size",
        ),
    ] = 0
    log_keep: Annotated[
        AtLeast0, Option(help="With --log-size: number of older files kept of each log.")
    ] = 8

    def __post_init__(self) -> None:
        check_types(self)
        parse_bind(self.bind)
        for worker in self.workers:
            parse_address(worker)
        if len(self.cluster_id) > 128 or not self.cluster_id.isprintable():
            raise InvalidConfig("cluster_id must be at most 128 printable characters")
