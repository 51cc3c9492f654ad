"""`slosched exp inference-latency`: MobileNet at low load, by the share of cold starts and by their rung.

After Faasm (USENIX ATC'20, section 6.3, the CDFs of figure 7; experiments.tf-lat of its repository): one
instance, one connection with a think time of U[0, 5 ms].
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
from slosched.faasm.inference.load import Arrivals, Closed
from slosched.faasm.inference.options import LatencyOptions
from slosched.units import NS_PER_MS

Options = LatencyOptions
__all__ = ["Options", "check", "report", "run", "settings_of"]


def run(options: LatencyOptions, frame: Frame) -> None:
    """Measure each system under each rule and rung.

    Raises MissingPackage without torch, and WrongAnswer once all is recorded.
    """
    options = options.at_scale(frame.scale)
    systems = systems_of(options, frame.say)
    by_system = {name: settings_of(options, frame.scale, name) for name in systems}
    frame.expect({each.key: each.expected_s for cells in by_system.values() for each in cells})

    def arrivals(setting: Setting) -> Arrivals:
        return Closed(connections=1, think_ns=options.think_ns, seed=options.seed)

    with planned(options) as plan:
        campaign = Campaign(options, frame, plan)
        for name, settings in by_system.items():
            campaign.measure(name, settings, arrivals)
    if any(each.get("wrong") for each in frame.records()):
        report(options, frame)
    check_answers(frame)


def settings_of(options: LatencyOptions, scale: str, name: str) -> list[Setting]:
    """The cells of a system. slosched has one more where its SLO is too short for a new process."""
    found = [
        Setting(
            system=name,
            loop="closed",
            rule=rule,
            rung=rung,
            duration_ns=options.lasts_ns(scale, rule, length_of(name, rung)),
            slo_ns=options.timeout_ns,
            fields={"think_ms": options.think_ns / NS_PER_MS, "connections": 1},
            connections=1,
            think_ns=options.think_ns,
        )
        for rule in options.rules
        for rung in rungs_of(name, rule, options)
    ]
    if name == "slosched" and "L4" in options.rungs and options.slo_ns < options.timeout_ns:
        found += [
            Setting(
                system=name,
                loop="slo",
                rule=rule,
                rung="L4",
                duration_ns=options.lasts_ns(scale, rule, WARM_LENGTH),
                slo_ns=options.slo_ns,
                fields={"think_ms": options.think_ns / NS_PER_MS, "connections": 1},
                connections=1,
                think_ns=options.think_ns,
                label=f" slo={options.slo_ns / NS_PER_MS:g}ms",
            )
            for rule in options.rules[1:2]
        ]
    return found


#: Refused requests take no time, so that the run need not be as long as those of L4.
WARM_LENGTH = "L0"


def report(options: LatencyOptions, frame: Frame) -> None:
    """Tables and the CDFs, from the records alone."""
    options = options.at_scale(frame.scale)
    summary.show_latency(frame)
