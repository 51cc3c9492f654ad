"""The driver's calls on a real GPU."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("cuda.bindings")

from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.driver import OutOfDeviceMemory


@pytest.fixture(scope="module")
def driver() -> CudaDriver:
    return CudaDriver(0)


def finish(driver: CudaDriver, event: object) -> None:
    give_up = time.monotonic() + 10
    while not driver.done(event):
        assert time.monotonic() < give_up


def test_bytes_go_to_the_device_and_back(driver: CudaDriver) -> None:
    there, back = driver.pinned_block(100_000), driver.pinned_block(100_000)
    on_device, copy = driver.device_block(100_000), driver.device_block(100_000)
    assert there.host is not None and back.host is not None
    there.host[:] = np.random.default_rng(1).integers(0, 256, 100_000)
    stream, other = driver.stream(0), driver.stream(-2)
    started, ended, halfway = driver.event(), driver.event(), driver.event()
    driver.record(started, stream)
    driver.copy(on_device.address, there.address, 100_000, stream)
    driver.record(halfway, stream)
    finish(driver, halfway)
    driver.copy(copy.address + 10, on_device.address + 10, 99_990, other)
    driver.copy(back.address + 10, copy.address + 10, 99_990, other)
    driver.record(ended, other)
    finish(driver, ended)
    assert (back.host[10:] == there.host[10:]).all()
    assert 0 < driver.elapsed_ns(started, ended) < 100_000_000
    for block in (there, back, on_device, copy):
        driver.free(block)


def test_memory_that_is_not_there_is_said_and_harms_nothing(driver: CudaDriver) -> None:
    free = driver.free_bytes()
    with pytest.raises(OutOfDeviceMemory, match="could not allocate"):
        driver.device_block(free + (1 << 40))
    block = driver.device_block(1 << 20)
    driver.free(block)
    assert abs(driver.free_bytes() - free) < 1 << 26


def test_an_event_that_was_never_recorded_is_done(driver: CudaDriver) -> None:
    assert driver.done(driver.event())
