"""Functions that workers run: the number of primes below n, counted in parts by calls of their own.

A worker offers them with `slosched worker --functions primes` in this folder; call_primes.py calls them.
"""

from itertools import pairwise

import numpy as np

import slosched


def small_primes() -> np.ndarray:
    """The primes below 100,000. It runs once per worker, and each call sees its product as ctx.init."""
    is_prime = np.ones(100_000, dtype=bool)
    is_prime[:2] = False
    for n in range(2, 317):
        is_prime[n * n :: n] = False
    return np.flatnonzero(is_prime)


def size_class(start: int, stop: int) -> int:
    """Durations are forecast for each order of magnitude of a part apart."""
    return min(len(str(stop - start)), 15)


@slosched.function(init=small_primes, slo="2s", expected="5ms", size=size_class)
def primes_in(ctx: slosched.Context, start: int, stop: int) -> int:
    """The number of primes from start to stop, without stop; stop is below 10 billion."""
    is_prime = np.ones(stop - start, dtype=bool)
    is_prime[: max(0, 2 - start)] = False
    for prime in ctx.init:
        if prime * prime >= stop:
            break
        first = max(prime * prime, -(-start // prime) * prime)
        is_prime[first - start :: prime] = False
    return int(is_prime.sum())


@slosched.function(slo="10s")
async def primes_below(ctx: slosched.Context, n: int, parts: int = 8) -> int:
    """The number of primes below n. While it awaits the parts, it takes no slot."""
    bounds = [n * part // parts for part in range(parts + 1)]
    calls = [ctx.chain(primes_in, start, stop) for start, stop in pairwise(bounds)]
    return sum(await slosched.gather(*calls))
