"""Where daemons listen, and the key that they share."""

from __future__ import annotations

from typing import Annotated

from slosched.options import ADDRESSES, Option

#: Clockwork's client and worker ports.
WORKER_PORT = 12345
CONTROLLER_PORT = 12346

Bind = Annotated[
    str,
    Option(
        help="Address to listen on, as 127.0.0.1, ::1 or :: (all).",
        metavar="ADDRESS",
        panel=ADDRESSES,
    ),
]

JoinKey = Annotated[
    str,
    Option(
        help="File with the cluster's join key (`slosched keys join FILE` writes one), the same for "
        "controller and workers. Needed for workers that register from another host.",
        metavar="FILE",
        panel=ADDRESSES,
    ),
]
