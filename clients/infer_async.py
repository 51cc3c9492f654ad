"""Many requests at once: those that cannot be in time are refused early, and tried once more.

A refusal says how much time was left until the deadline, so a retry waits and does not spin.

Usage: python infer_async.py [host:port] [model] [requests]
"""

import asyncio
import sys
from collections import Counter

import slosched


async def one(client: slosched.AsyncClient, model: slosched.Model) -> str:
    """Ask; after a refusal ask again when the first deadline has passed. Return what happened."""
    try:
        await client.infer(model, slo="25ms")
        return "answered"
    except slosched.DeadlineExceeded as refused:
        assert isinstance(refused.reply, slosched.Inference)
        await asyncio.sleep(refused.reply.remaining_s)
    try:
        await client.infer(model, slo="25ms")
        return "answered at the second try"
    except slosched.DeadlineExceeded:
        return "refused twice"


async def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:12346"
    name = sys.argv[2] if len(sys.argv) > 2 else "resnet50_v2"
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 50
    async with slosched.connect(address, name="infer_async") as client:
        [model] = await client.load(name)
        await client.infer(model, slo="10s")  # brings the weights onto a GPU
        outcomes = await asyncio.gather(*(one(client, model) for _ in range(count)))
    for outcome, times in Counter(outcomes).most_common():
        print(f"{times:5} {outcome}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except slosched.SloschedError as error:
        sys.exit(f"error: {error}")
