"""Calls that wait when the last worker that could run them is lost."""

from __future__ import annotations

from chains_rig import CallRig
from slosched.codes import Code
from slosched.core.scheduler.interface import SendFailed


def test_a_call_that_waited_for_a_worker_that_is_lost_says_so() -> None:
    rig = CallRig.serving()
    began, waited = rig.call(slo_ms=100_000), rig.call(slo_ms=100_000)
    rig.step()
    call = rig.one()
    rig.handle(SendFailed(rig.worker_of(call), call))
    rig.steps()
    assert "was lost while it had" in rig.reply(began).reason
    reply = rig.reply(waited)
    assert reply.code == Code.TIMED_OUT
    assert "is connected any more; the call had not begun" in reply.reason
    assert "no slot came free" not in reply.reason
