"""The batching server that one writes in an afternoon: asyncio, eager torch, no deadlines.

`asyncio_server.py DEVICE PROFILE` says in its ready line at which port. Every POST is one inference; up to 16,
or what came within 2 ms, make a batch; one thread runs them.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

from peer_model import MAX_BATCH, make

WAIT_S = 0.002
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, queue: asyncio.Queue[asyncio.Event]
) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length or b"0"))
            done = asyncio.Event()
            queue.put_nowait(done)
            await done.wait()
            writer.write(REPLY)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def batches(queue: asyncio.Queue[asyncio.Event], device: str, profile: str) -> None:
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    run = await loop.run_in_executor(thread, make, device, profile)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer, queue)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=4096)
    # The form that `Children.wait_ready` looks for.
    port = server.sockets[0].getsockname()[1]
    print(f"slosched peer ready on 127.0.0.1:{port}: a plain asyncio server", flush=True)
    while True:
        batch = [await queue.get()]
        ends_s = loop.time() + WAIT_S
        while len(batch) < MAX_BATCH and (queue.qsize() or loop.time() < ends_s):
            try:
                wait_s = max(0.0, ends_s - loop.time())
                batch.append(
                    queue.get_nowait()
                    if queue.qsize()
                    else await asyncio.wait_for(queue.get(), wait_s)
                )
            except TimeoutError:
                break
        await loop.run_in_executor(thread, run, len(batch))
        for done in batch:
            done.set()


async def main() -> None:
    await batches(asyncio.Queue(), *sys.argv[1:3])


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())
