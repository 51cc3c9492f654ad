"""A worker with two emulated GPUs, a controller and a client in one program, without any daemon.

Usage: python embedded.py
"""

import asyncio
import sys
import tempfile

import slosched


def quiet(line: str) -> None:
    """Where the daemons' lines for an operator go: nowhere, here."""


async def main() -> None:
    emulated = slosched.WorkerConfig(device="emulated", gpus=2, bind="127.0.0.1", port=0)
    with (
        tempfile.TemporaryDirectory() as log_dir,
        slosched.Worker(emulated, announce=quiet) as worker,
    ):
        config = slosched.ControllerConfig(
            scheduler=slosched.SchedulerConfig(policy="INFER5"),
            workers=(f"127.0.0.1:{worker.port}",),
            bind="127.0.0.1",
            port=0,
            http_port=-1,
            log_dir=log_dir,
        )
        controller = slosched.Controller(config, announce=quiet)
        await controller.start()
        serving = asyncio.create_task(controller.run())
        try:
            async with slosched.connect(f"127.0.0.1:{controller.port}") as client:
                [model] = await client.load("resnet50_v2")
                cold = await client.infer(model, slo="1s")
                warm = await client.infer(model, slo="25ms")
            print(f"first:  {cold.explain()}\nsecond: {warm.explain()}")
        finally:
            controller.stop()
            await serving


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except slosched.SloschedError as error:
        sys.exit(f"error: {error}")
