"""Pages of a worker's GPU: a copy that ends after its pages were given away changes nothing."""

from __future__ import annotations

from slosched.core.worker.memory import WeightsCache


def begun(cache: WeightsCache) -> int:
    version = cache.begin_load(7, 3)
    assert version is not None
    return version


def test_a_copy_whose_pages_were_given_away_does_not_complete_the_next_load() -> None:
    cache = WeightsCache(8)
    old = begun(cache)
    assert cache.evict(7) and not cache.finish_load(7, old)
    new = begun(cache)
    assert not cache.finish_load(7, old) and not cache.resident(7)
    assert cache.finish_load(7, new) and cache.version(7) == new


def test_nor_does_its_failure_take_the_pages_of_the_next_load() -> None:
    cache = WeightsCache(8)
    old, new = begun(cache), begun(cache)  # a reload: the old pages go first
    cache.fail_load(7, old)
    assert cache.holds(7) and cache.free_pages == 5
    cache.fail_load(7, new)
    assert not cache.holds(7) and cache.free_pages == 8
