"""Without `rejected_answers` no light answer below the threshold is given; and how much is deferred."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_rig import CascadeRig
from cascade_runs import CascadeRun, run, spec_of
from scheduler_rig import MS
from slosched.cascade_spec import CascadeOptions
from slosched.codes import Code, Verdict
from slosched.errors import InvalidConfig

STRICT = CascadeOptions(fixed_threshold=0.5, rejected_answers=False)
BY_THE_CLOCK = {"FORCED", "INSTEAD", "OUTRANKED"}


@pytest.mark.parametrize("policy", ["CASCADE", "INFER5"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_rejected_answer_is_given_only_where_the_options_say_so(
    policy: str, strict: bool
) -> None:
    """The heavy program takes 20 ms, and 10 are left."""
    options = STRICT if strict else CascadeOptions(fixed_threshold=0.5)
    rig = CascadeRig(policy, options=options)
    request = rig.ask(slo_ms=12)
    rig.run("small", 0.1)
    rig.now_ns += 30 * MS
    rig.beat()
    rig.step()
    reply = rig.reply(request)
    if strict:
        assert reply.code != Code.OK and Verdict.FORCED not in rig.verdicts(request)
    else:
        assert reply.code == Code.OK and rig.verdicts(request) == [Verdict.FORCED]


def test_an_accepted_answer_is_given_in_any_case() -> None:
    rig = CascadeRig("CASCADE", options=STRICT)
    request = rig.ask(slo_ms=12)
    rig.run("small", 0.9)
    assert rig.reply(request).code == Code.OK and rig.verdicts(request) == [Verdict.ACCEPTED]


def violations(made: CascadeRun) -> float:
    return 1 - float(made.requests["deadline_met"].mean())


def test_the_more_is_deferred_the_more_heavy_answers_and_the_more_refusals(tmp_path: Path) -> None:
    shares = []
    for part in (1.0, 1.4):
        spec = spec_of(
            "CASCADE", "fixed_12", seconds=40, rejected_answers=False, deferred_part=part
        )
        made = run(spec, tmp_path / str(part))
        assert not BY_THE_CLOCK & made.verdicts.keys()
        answered = made.codes["OK"]
        shares.append((made.verdicts["HEAVY"] / answered, violations(made)))
    (heavy, lost), (more_heavy, more_lost) = shares
    assert more_heavy > heavy and more_lost > lost + 0.02


@pytest.mark.parametrize("part", [0.0, 11.0])
def test_a_part_that_makes_no_sense_is_refused(part: float) -> None:
    with pytest.raises(InvalidConfig, match="deferred_part"):
        CascadeOptions(deferred_part=part)
