"""`slosched exp inference-throughput`: MobileNet under growing load, by the share of cold starts.

After Faasm (USENIX ATC'20, section 6.3, figure 7; experiments.tf-tpt of its repository). The capacity of
each system under each rule comes first: a closed loop without think times. Then an open loop (Poisson) at
fractions of it, and a closed one with 100 connections and the original's think times.
"""

from __future__ import annotations

from slosched.faasm.frame import Frame
from slosched.faasm.inference import summary
from slosched.faasm.inference.campaign import (
    Campaign,
    Setting,
    check,
    check_answers,
    length_of,
    planned,
    rungs_of,
    systems_of,
)
from slosched.faasm.inference.load import Arrivals, Closed, Open
from slosched.faasm.inference.measures import capacity_of
from slosched.faasm.inference.options import ThroughputOptions
from slosched.units import NS_PER_MS, NS_PER_S

Options = ThroughputOptions
__all__ = ["Options", "check", "report", "run", "settings_of"]
_QUICK_CAPACITY_NS = 2 * NS_PER_S
#: Requests on their way for each instance while the capacity is measured.
_DEPTH = 2


def run(options: ThroughputOptions, frame: Frame) -> None:
    """Measure each system. Raises MissingPackage without torch, and WrongAnswer once all is recorded."""
    options = options.at_scale(frame.scale)
    systems = systems_of(options, frame.say)
    by_system = {name: settings_of(options, frame.scale, name) for name in systems}
    frame.expect({each.key: each.expected_s for cells in by_system.values() for each in cells})

    def arrivals(setting: Setting) -> Arrivals | str:
        if setting.loop == "open":
            [found] = frame.records(_capacity_key(setting.system, setting.rule, setting.rung))
            capacity = capacity_of(found)
            if not capacity:
                return f"{setting.system} answered nothing while its capacity was measured"
            return Open(
                rate_per_s=capacity * float(setting.fields["fraction"]),
                duration_ns=setting.duration_ns,
                seed=options.seed,
            )
        return Closed(connections=setting.connections, think_ns=setting.think_ns, seed=options.seed)

    with planned(options) as plan:
        campaign = Campaign(options, frame, plan)
        for name, settings in by_system.items():
            campaign.measure(name, settings, arrivals)
    if any(each.get("wrong") for each in frame.records()):
        report(options, frame)
    check_answers(frame)


def _capacity_key(system: str, rule: str, rung: str) -> str:
    return f"{system} capacity cold={rule} {rung}"


def settings_of(options: ThroughputOptions, scale: str, name: str) -> list[Setting]:
    """The cells of a system: for each rule and rung its capacity first."""
    found: list[Setting] = []
    for rule in options.rules:
        for rung in rungs_of(name, rule, options):
            found += _settings(options, scale, name, rule, rung)
    return found


def _settings(
    options: ThroughputOptions, scale: str, name: str, rule: str, rung: str
) -> list[Setting]:
    length = length_of(name, rung)
    lasts_ns = options.lasts_ns(scale, length)
    found = [
        Setting(
            system=name,
            loop="capacity",
            rule=rule,
            rung=rung,
            duration_ns=_QUICK_CAPACITY_NS if scale == "quick" else 20 * NS_PER_S,
            slo_ns=options.timeout_ns,
            fields={"connections": _DEPTH * options.workers},
            connections=_DEPTH * options.workers,
            think_ns=0,
        )
    ]
    found += [
        Setting(
            system=name,
            loop="open",
            rule=rule,
            rung=rung,
            duration_ns=lasts_ns,
            slo_ns=options.slo_ns,
            fields={"fraction": fraction},
            label=f" at={fraction:g}",
        )
        for fraction in options.fractions
    ]
    found += [
        Setting(
            system=name,
            loop="closed",
            rule=rule,
            rung=rung,
            duration_ns=options.lasts_ns(scale, length, think_ns),
            slo_ns=options.slo_ns,
            fields={"think_ms": think_ns / NS_PER_MS, "connections": options.connections},
            connections=options.connections,
            think_ns=think_ns,
            label=f" think={think_ns / NS_PER_MS:.10g}ms",
        )
        for think_ns in options.thinks_ns
    ]
    return found


def report(options: ThroughputOptions, frame: Frame) -> None:
    """Tables and figures, from the records alone."""
    summary.show_throughput(frame)
