"""What can be chosen: rungs, sizes, networks, devices. Plain data; nothing is imported.

The ladder of cold starts:

    L0  warm: code and weights are where they are used
    L1  the weights are in host memory (pinned, for a GPU) and are copied to where they are used
    L2  the same from pageable memory; on a CPU there is no difference to L1
    L3  the process is there, and code and weights are not: they are built, and read from the file
    L4  a new process: an interpreter, torch, a context on the GPU, and L3
    L5  a new container; it is not measured here, since nothing here starts containers
"""

from __future__ import annotations

WARM = "L0"
#: What a live process can do to itself.
LIVE_RUNGS = ("L1", "L2", "L3")
#: Cold starts under load.
RUNGS = ("L1", "L3", "L4")
#: size -> (multiplier of the channels, pixels of the network's input, rows and columns of a picture).
SIZES = {
    "micro": (0.25, 32, (40, 36)),
    "small": (1.0, 224, (224, 224)),
    "full": (1.0, 224, (606, 517)),  # the original's picture has 940,650 bytes, with its header
}
NETWORKS = ("auto", "own", "timm")
DEVICES = ("cpu", "cuda")
DASK = "dask"
#: Systems in the order in which they are measured, and what each is.
ABOUT = {
    "slosched": "a worker with warm slots, which calls share; its scheduler refuses what cannot be in time",
    "process": "a process per instance, one request at a time; a cold one at L4 is a real restart",
    "container": "a process per instance whose cold starts are EMULATED: the model is dropped (L3) and the "
    "start of a container slept for (mean COLD_START_DELAY_MS, deviation half of it)",
    "loop": "one loop in the process that sends: no system at all",
    DASK: "Dask's distributed with a process for each instance",
}
SYSTEMS = tuple(ABOUT)
