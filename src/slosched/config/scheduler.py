"""The options of a scheduler, live and simulated, and the operator's weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from slosched.cascade_spec import CascadeOptions, CascadeSpec
from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast1, check_types
from slosched.options import ADMISSION, SCHEDULER, Option
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

FIDELITIES = ("best", "paper")

#: Rules of which weights go to which GPU; core/scheduler/policies/placements.py has them.
PLACEMENTS = ("gain", "demand", "lru")

#: What a weight may be: above a hundred it would be a queue of its own in all but name.
WEIGHT_RANGE = (0.01, 100.0)
Weight = Annotated[float, Meta(ge=WEIGHT_RANGE[0], le=WEIGHT_RANGE[1])]
CLIENT_WEIGHTS = ("value", "shares")

#: At 1 a request that a forecast gives no chance is refused, above it also some that it gives one. The earliest
#: that costs 0.3 points at most over the policy cases (analysis/early_refusal/early_refusal.md).
EARLY_REFUSAL = 1.0
#: More would leave GPUs idle beside requests that were refused.
MOST_EARLY_REFUSAL = 10.0


def is_weight(value: float) -> bool:
    """True for a number within WEIGHT_RANGE (NaN is none)."""
    return WEIGHT_RANGE[0] <= value <= WEIGHT_RANGE[1]


@dataclass(frozen=True)
class WeightRule:
    """The operator's weight for the clients whose name matches `client` (a pattern with * and ?), or
    for requests with an SLO of at most `slo_max_ns`. Exactly one of the two is given.
    """

    weight: Weight
    client: str = ""
    slo_max_ns: Annotated[int, Meta(ge=0, description="above 0"), Option(name="slo_max")] = 0

    def __post_init__(self) -> None:
        check_types(self)
        if bool(self.client) == bool(self.slo_max_ns):
            raise InvalidConfig("a weight is for either client or slo_max: give one of them")


def _admission(help_: str, *, name: str = "") -> Option:
    """An option about what is accepted."""
    return Option(help=help_, name=name, panel=ADMISSION, in_status=False, simulated=False)


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's options, in the published order.

    None takes the default of the policy, which core/scheduler/policies knows: `resolved(config)` there fills it
    in, and refuses what the policy cannot heed.
    """

    policy: Annotated[str, Option(in_status=False)] = "INFER5"
    generate_inputs: Annotated[
        bool,
        Option(
            help="Generate inputs in the controller for requests without one, to load the network.",
            panel=SCHEDULER,
            simulated=False,
        ),
    ] = False
    max_gpus: Annotated[
        AtLeast1,
        Option(help="Use at most this many GPUs.", panel=SCHEDULER, simulated=False),
    ] = 100
    schedule_ahead_ns: Annotated[
        AtLeast1 | None,
        Option(
            help="How far ahead work is committed to a GPU, at most. A bare number is in seconds. "
            "Default 10ms.",
            panel=SCHEDULER,
        ),
    ] = None
    default_slo_ns: Annotated[
        AtLeast1,
        Option(
            help="The SLO of requests that name none. A bare number is in seconds.", panel=SCHEDULER
        ),
    ] = 100 * NS_PER_MS
    max_exec_ns: Annotated[
        AtLeast1 | None,
        Option(
            help="The longest time of a batch of more than 1. A bare number is in seconds. "
            "Default 25ms (paper: 250ms).",
            panel=SCHEDULER,
        ),
    ] = None
    max_batch: Annotated[
        AtLeast1 | None,
        Option(help="The largest batch. Default 16 (paper: 8).", panel=SCHEDULER),
    ] = None
    fidelity: Annotated[
        str,
        Option(
            help="best, or paper: the published code's behaviour and constants.",
            panel=SCHEDULER,
            one_of=FIDELITIES,
            in_status=False,
        ),
    ] = "best"
    #: The first rule for a client that matches holds. In a file they are [[weights]] beside [scheduler].
    weights: Annotated[
        tuple[WeightRule, ...],
        Option(
            help="What requests are worth under overload (docs/fairness.md): by client, 'batch-*=0.2', and by "
            "SLO, 'slo<=10ms=2'. Default 1 for all.",
            metavar="NAME=WEIGHT,...",
            panel=SCHEDULER,
            in_file=False,
            in_status=False,
        ),
    ] = ()
    #: In a file they are `cascades`, names and files, and the table [cascade] beside [scheduler].
    cascades: Annotated[
        tuple[CascadeSpec, ...],
        Option(
            help="Cascades to serve (docs/cascades.md): built-in names (sdturbo), or TOML files.",
            name="cascade",
            metavar="NAME|FILE,...",
            panel=SCHEDULER,
            in_file=False,
            in_status=False,
        ),
    ] = ()
    cascade: Annotated[
        CascadeOptions, Option(name="cascade_options", in_file=False, in_status=False)
    ] = field(default_factory=CascadeOptions)
    max_client_weight: Annotated[
        Weight,
        Option(
            help="The highest weight that a client without a rule may give itself.",
            panel=SCHEDULER,
            in_status=False,
            simulated=False,
        ),
    ] = 1.0
    client_weights: Annotated[
        str,
        Option(
            help="value: a client's weight is that of each of its requests; shares: its share of the GPUs, "
            "which no other client can take.",
            panel=SCHEDULER,
            one_of=CLIENT_WEIGHTS,
            in_status=False,
        ),
    ] = "value"
    early_refusal: Annotated[
        float,
        Meta(ge=0, le=MOST_EARLY_REFUSAL),
        Option(
            help="How early INFER5 refuses what a forecast of its queue gives no chance: how many times the "
            "wait that is forecast must fit before the deadline; 0: only when it is hopeless "
            "(docs/policy.md).",
            panel=SCHEDULER,
        ),
    ] = EARLY_REFUSAL
    preempt: Annotated[
        bool,
        Option(
            help="INFER5: a request that would be late may interrupt a long inference, on workers with "
            "--preempt, where more is in time then.",
            panel=SCHEDULER,
        ),
    ] = False
    mix_lengths: Annotated[
        bool,
        Option(
            help="INFER5: a batch may hold requests of several length classes of a model, where that takes "
            "less GPU time than batches apart.",
            panel=SCHEDULER,
        ),
    ] = True
    placement: Annotated[
        str,
        Option(
            help="Which weights are loaded over which: gain (requests in time gained for each ms of PCIe), "
            "demand (Clockwork's rule) or lru. Default {default}. Not for paper, nor for a TYPE with its own.",
            panel=SCHEDULER,
            one_of=PLACEMENTS,
        ),
    ] = "gain"
    #: What is accepted (core/scheduler/limits.py); Clockwork's Figures 7 and 8 have SLOs of a day.
    max_slo_ns: Annotated[
        AtLeast1,
        _admission("Refuse requests with a longer SLO."),
    ] = 48 * 3600 * NS_PER_S
    max_requests: Annotated[
        AtLeast1,
        _admission("Maximum number of unanswered requests; further ones are refused."),
    ] = 500_000
    max_client_requests: Annotated[
        AtLeast1, _admission("Maximum number of unanswered requests of one client.")
    ] = 100_000
    max_bytes: Annotated[
        AtLeast1,
        _admission("Maximum total size of the inputs of unanswered requests.", name="max_bytes"),
    ] = 8 * 2**30
    max_client_bytes: Annotated[
        AtLeast1, _admission("The same for one client.", name="max_client_bytes")
    ] = 2 * 2**30
    max_client_loads: Annotated[
        AtLeast1, _admission("Maximum number of waiting loads of one client.")
    ] = 256
    max_instances: Annotated[
        AtLeast1, _admission("Maximum number of model instances, of all names.")
    ] = 200_000
    max_workers: Annotated[
        AtLeast1, _admission("Maximum number of workers, those of --workers included.")
    ] = 1000
    operators: Annotated[
        tuple[str, ...],
        _admission("Names of clients that may unload models that others use, and drain workers."),
    ] = ()
    keep_unused_ns: Annotated[
        AtLeast1, _admission("Unload instances that no client has used for this long.")
    ] = 3600 * NS_PER_S

    def __post_init__(self) -> None:
        check_types(self)
        names = [cascade.name for cascade in self.cascades]
        if len(set(names)) != len(names):
            raise InvalidConfig(f"each cascade needs a name of its own, not {names}")
        if self.default_slo_ns > self.max_slo_ns:
            raise InvalidConfig(
                f"default_slo of {format_duration(self.default_slo_ns)} is above max_slo of "
                f"{format_duration(self.max_slo_ns)}"
            )
