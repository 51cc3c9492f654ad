"""The model that the peers serve: ResNet-50 in torch, eager, float16 and channels_last; it makes its own input.

The same architecture as slosched's zoo has, from the same library. With the device "emulated" it sleeps as
long as the profile says, so that the servers can be tried without a GPU.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

MAX_BATCH = 16


def make(device: str, profile: str) -> Callable[[int], None]:
    """Return run(batch), which returns when the outputs are in host memory."""
    return _emulated(profile) if device == "emulated" else _resnet50(device)


def _emulated(profile: str) -> Callable[[int], None]:
    from slosched.config_file import load_profile

    exec_ns = load_profile(profile).model("resnet50").exec_ns
    sizes = sorted(exec_ns)

    def run(batch: int) -> None:
        time.sleep(exec_ns[next(size for size in sizes if size >= batch)] / 1e9)

    return run


def resnet50(device: str) -> Any:
    """The module on the device, in eval mode."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    return model.eval().to(device=device, dtype=torch.float16, memory_format=torch.channels_last)


def _resnet50(device: str) -> Callable[[int], None]:
    torch: Any = importlib.import_module("torch")
    model = resnet50(device)
    images = torch.rand(MAX_BATCH, 3, 224, 224, device=device, dtype=torch.float16)
    images = images.to(memory_format=torch.channels_last)

    def run(batch: int) -> None:
        with torch.inference_mode():
            model(images[:batch]).logits.float().cpu()

    # cuDNN looks for its plans once for each shape, and keeps them for the thread.
    for batch in range(1, MAX_BATCH + 1):
        run(batch)
        run(batch)
    return run
