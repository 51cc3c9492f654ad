"""Random clusters that serve a cascade under random faults: nothing breaks, and service comes back."""

from __future__ import annotations

import pytest

from slosched.core.scheduler.policies import CASCADE_POLICIES
from slosched.sim.fuzz import run_seed

_SEEDS = 5


@pytest.mark.parametrize("policy", CASCADE_POLICIES)
@pytest.mark.parametrize("seed", range(_SEEDS))
def test_a_cascade_survives_the_faults_of_a_seed(policy: str, seed: int) -> None:
    outcome = run_seed(seed, policy=policy)
    assert not outcome.failure
    assert outcome.sent > 0
