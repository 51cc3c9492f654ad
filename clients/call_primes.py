"""Call functions: inline, on workers that this program starts, or on those of a controller.

Usage: python call_primes.py [local|slosched|dask|host:port] [n]
"""

import sys

import primes

import slosched
import slosched.engines


def on_a_controller(address: str, n: int) -> int:
    """One call of a client, which may also be refused: there are others."""
    with slosched.Client(address, name="call_primes") as client:
        answer = client.call_answer(primes.primes_below, n)
        print(answer.explain())
        answer.raise_for_code()
        found: int = answer.value
        return found


def on_an_engine(name: str, n: int) -> int:
    """The same function on an engine, which is opened for this program alone."""
    with slosched.engines.open(name, functions=["primes"]) as engine:
        found: int = engine.call(primes.primes_below, n).result(timeout_s=60)
        return found


def main() -> None:
    where = sys.argv[1] if len(sys.argv) > 1 else "local"
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    found = on_a_controller(where, n) if ":" in where else on_an_engine(where, n)
    print(f"{found:,} primes below {n:,}")


if __name__ == "__main__":
    try:
        main()
    except slosched.CallFailed as failed:
        sys.exit(f"{failed}")  # with the traceback of the function, if it raised
    except slosched.SloschedError as error:
        sys.exit(f"error: {error}")
