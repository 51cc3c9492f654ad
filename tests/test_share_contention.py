"""The contention model against the published mixes, and what must hold of it for any jobs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slosched.errors import InvalidConfig
from slosched.share.contention import Party, rates
from slosched.share.published_figures import hotcarbon_sets
from slosched.share.solos import Profile, Solo, load_profile, own_profiles
from slosched.share_spec import Job, Mode

_PROFILES = {"a6000-tm": "a6000", "a6000-mps": "a6000", "4090-tm": "4090", "4090-mps": "4090"}


def _errors(mode: Mode, size: int) -> list[float]:
    """|predicted STP - published STP| of each published mix of `size` models."""
    errors = []
    for published in hotcarbon_sets():
        if (published.mode == "tm") != (mode is Mode.TM):
            continue
        profile = load_profile(_PROFILES.get(published.name, "a100"))
        for run in published.runs:
            if len(run.models) == size:
                jobs = [Job(name=model, model=model) for model in run.models]
                predicted = sum(rates([profile.party(job) for job in jobs], mode))
                assert run.stp is not None
                errors.append(abs(predicted - run.stp))
    return errors


@pytest.mark.parametrize(
    ("mode", "size", "mixes", "most"),
    [
        (Mode.TM, 2, 17, 0.035),
        (Mode.TM, 3, 10, 0.06),
        (Mode.MPS, 2, 10, 0.065),
        (Mode.MPS, 3, 4, 0.14),
    ],
)
def test_the_published_mixes_within_the_error_that_the_module_states(
    mode: Mode, size: int, mixes: int, most: float
) -> None:
    errors = _errors(mode, size)
    assert len(errors) == mixes
    assert fmean(errors) <= most


PARTIES = st.builds(
    Party,
    gpu_share=st.floats(0.05, 1),
    burst=st.floats(0.5, 20),
    press=st.floats(0, 4),
    fills=st.floats(0.1, 1),
    priority=st.integers(0, 2),
    thread_percentage=st.sampled_from([0, 10, 50, 100]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(PARTIES, min_size=1, max_size=4), st.sampled_from([Mode.TM, Mode.MPS, Mode.STREAMS])
)
def test_rates_are_shares_and_do_not_depend_on_the_order(parties: list[Party], mode: Mode) -> None:
    found = rates(parties, mode)
    assert all(0 < rate <= 1 for rate in found)
    assert rates(parties, mode) == found
    backwards = rates(parties[::-1], mode)[::-1]
    assert backwards == pytest.approx(found, abs=1e-6)


def test_a_job_alone_has_its_solo_rate_and_company_slows_it() -> None:
    job = Party(gpu_share=0.9, burst=4, press=1)
    for mode in (Mode.TM, Mode.MPS, Mode.STREAMS):
        assert rates([job], mode) == (1.0,)
        assert all(rate < 1 for rate in rates([job, job], mode))


def test_equal_jobs_that_fill_the_gpu_halve_it_under_time_slicing() -> None:
    full = Party(gpu_share=1, burst=100, press=1)
    assert rates([full, full], Mode.TM) == pytest.approx((0.5, 0.5), abs=0.02)


def test_priority_and_thread_percentage() -> None:
    low, high = (
        Party(gpu_share=0.9, burst=4, press=2),
        Party(gpu_share=0.9, burst=4, press=2, priority=1),
    )
    even = rates([low, low], Mode.STREAMS)
    slow, quick = rates([low, high], Mode.STREAMS)
    assert quick > even[0] > slow
    capped = Party(gpu_share=0.9, burst=4, press=2, thread_percentage=25)
    assert rates([capped], Mode.MPS)[0] < 0.4
    assert rates([capped], Mode.TM) == (1.0,)  # the driver's time slices do not know it
    assert rates([capped, low], Mode.MPS)[1] > rates([low, low], Mode.MPS)[1]


# --------------------------------------------------------------------------------- profiles


def test_own_profiles_say_their_device_and_how_they_were_measured() -> None:
    assert own_profiles() == ("4090", "a100", "a6000", "h200")
    for name in own_profiles():
        profile = load_profile(name)
        assert profile.device
        assert "measured" in profile.measured or "published" in profile.measured
        assert {"bert", "whisper", "gpt", "diffusion"} <= {solo.model for solo in profile.solos}
    assert load_profile("").device == load_profile("h200").device


def test_other_batches_and_sizes_are_scaled_and_say_so() -> None:
    solo = Solo(model="m", latency_ms=10, gpu_share=0.5)
    profile = Profile(device="d", measured="m", solos=(solo,))
    assert profile.of(Job(name="a", model="m")) is solo
    twice = profile.of(Job(name="a", model="m", batch=2))
    assert (twice.latency_ms, twice.gpu_share) == (10, 1.0)  # the GPU takes the host's time
    eight = profile.of(Job(name="a", model="m", batch=8))
    assert eight.latency_ms == 40
    assert "scaled by 8" in eight.note
    h200 = load_profile("h200")
    large = h200.of(Job(name="a", model="fasterrcnn_resnet50_fpn", size=(1440, 2560)))
    small = h200.of(Job(name="a", model="fasterrcnn_resnet50_fpn", size=(720, 1280)))
    assert large.latency_ms > small.latency_ms
    assert h200.of(Job(name="a", model="tiny:4:2.5")).latency_ms == 10


@pytest.mark.parametrize("model", ["tiny:x", "tiny:1:2:3", "tiny::"])
def test_wrong_tiny_models(model: str) -> None:
    with pytest.raises(InvalidConfig, match="tiny"):
        load_profile("").of(Job(name="a", model=model))


def test_wrong_profiles_say_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path
    with pytest.raises(InvalidConfig, match="no solo profile 'nowhere'"):
        load_profile("nowhere")
    with pytest.raises(InvalidConfig, match="no finished exclusive run"):
        load_profile(str(folder))
    file = folder / "p.toml"
    for text, message in (
        ("x", "p.toml"),
        ("device = 'd'\nmeasured = 'm'\nsolos = [{model = 'm', latency_ms = 0}]", "above 0"),
        ("device = 'd'\nmeasured = 'm'\nsolos = [{model = 'm', latency_ms = nan}]", "above 0"),
        ("device = 'd'\nmeasured = 'm'\nsolos = [{model = 'm', latency = 1}]", "latency"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidConfig, match=message):
            load_profile(str(file))
    with pytest.raises(InvalidConfig, match="no solo run of 'unheard'"):
        load_profile("").of(Job(name="a", model="unheard"))
