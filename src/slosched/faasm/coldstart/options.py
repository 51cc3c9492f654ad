"""What `slosched exp coldstart` takes. Nothing heavy is imported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Self

from msgspec import Meta

from slosched.faasm.inference.network_options import Device, Network, Size
from slosched.field_types import check_types
from slosched.options import Option


@dataclass(frozen=True, kw_only=True)
class ColdstartOptions:
    """Raises InvalidConfig when it is made with what cannot be."""

    size: Size = "full"
    network: Network = "auto"
    device: Device = "cpu"
    repeats: Annotated[
        int,
        Meta(ge=0, le=1000),
        Option(
            help="Starts on each rung. Default 5 at scale quick, 50 at published; new processes a third of it."
        ),
    ] = 0
    instances: Annotated[
        int,
        Meta(ge=0, le=256),
        Option(
            help="Instances at a time, whose memory is measured. Default 4 at scale quick, 16 at published."
        ),
    ] = 0
    fill: Annotated[
        int,
        Meta(ge=0, le=1000),
        Option(
            help="The most instances that are started at a time to try how many fit; fewer where memory is "
            "short. Forks: 8 times as many. Default 8 at scale quick, 64 at published."
        ),
    ] = 0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1), Option(help="Seed of weights and pictures.")] = 7

    def __post_init__(self) -> None:
        check_types(self)

    def at_scale(self, scale: str) -> Self:
        """With what the scale says in place of what was not given."""
        quick = scale == "quick"
        return dataclasses.replace(
            self,
            repeats=self.repeats or (5 if quick else 50),
            instances=self.instances or (4 if quick else 16),
            fill=self.fill or (8 if quick else 64),
        )
