"""Options that `slosched worker` and `slosched profile` share: which models, in which precision."""

from __future__ import annotations

from typing import Annotated

import typer

from slosched.config import DTYPES

Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Precision of the weights: {', '.join(DTYPES)}. Default float32. Inputs and outputs "
        "travel as float32 in any case. For models that --config does not name."
    ),
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--no-channels-last",
        help="Memory format of models that take images; with float16, convolutions run faster in it. "
        "For models that --config does not name.",
        show_default=False,
    ),
]
Libraries = Annotated[
    str | None,
    typer.Option(
        help="torchvision, timm or torchvision,timm, where they are installed: their classifiers can be "
        "loaded by name, as torchvision/resnet50 or timm/resnet10t."
    ),
]
