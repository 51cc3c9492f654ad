"""The options of every experiment that runs the network: its size, whose it is, and where it runs."""

from __future__ import annotations

from typing import Annotated

from slosched.faasm.inference.choices import DEVICES, NETWORKS, SIZES
from slosched.options import Option

Size = Annotated[
    str,
    Option(
        one_of=tuple(SIZES),
        help="full: MobileNet v1 1.0 224 and pictures of the original's size; small: pictures of 224 x 224; "
        "micro: a tiny network for trials.",
    ),
]
Network = Annotated[
    str,
    Option(
        one_of=NETWORKS,
        help="timm's mobilenetv1_100, or a module of its own of that plan; auto takes timm where it is "
        "installed. Weights are random.",
    ),
]
Device = Annotated[str, Option(one_of=DEVICES, help="Where the network runs.")]
