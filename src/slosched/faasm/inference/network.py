"""MobileNet v1 (Howard et al., arXiv 1704.04861, table 1) in torch, with weights that are one block of memory.

The only module of the experiments that imports torch. A network and its weights are apart: `Network` is the
code, `place` gives it a block, so that a cold start can drop the weights alone, or both.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slosched.errors import InvalidConfig
from slosched.faasm.inference.choices import SIZES
from slosched.faasm.inference.plan import Image, Plan
from slosched.output_files import new_file

TOP = 5
#: (channels, stride) of each depthwise separable block.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
_CLASSES = 1001  # as the original's file has
_TIMM = "mobilenetv1_100"


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def check_device(device: str) -> None:
    """Raise InvalidConfig for "cuda" where torch finds no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("torch finds no GPU on this machine; take --device cpu")


def made(plan: Plan) -> nn.Module:
    """The plan's network, with weights on the device "meta": shapes without memory."""
    width = SIZES[plan.size][0]
    with torch.device("meta"):
        if plan.network == "timm":
            import timm

            module: nn.Module = timm.create_model(_TIMM, pretrained=False)
        else:
            module = MobileNet(width)
    return module.eval()


class MobileNet(nn.Sequential):
    """(n, 3, side, side) float32 -> (n, 1001) logits. `width` multiplies the channels."""

    def __init__(self, width: float) -> None:
        def channels(count: int) -> int:
            return max(8, int(count * width))

        layers: list[nn.Module] = [*_convolution(3, channels(32), 3, 2)]
        before = channels(32)
        for count, stride in _BLOCKS:
            after = channels(count)
            layers += _convolution(before, before, 3, stride, groups=before)
            layers += _convolution(before, after, 1, 1)
            before = after
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, _CLASSES)]
        super().__init__(*layers)


def _convolution(
    before: int, after: int, size: int, stride: int, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU6(inplace=True),
    ]


def _weighed(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, tensor) for name, tensor in module.state_dict().items() if tensor.is_floating_point()
    ]


def random_weights(plan: Plan) -> npt.NDArray[np.float32]:
    """Seeded weights of the plan's network in one block: He's for convolutions, plain statistics."""
    source = np.random.default_rng([plan.seed, 0])
    parts = []
    for name, tensor in _weighed(made(plan)):
        shape = tuple(tensor.shape)
        if len(shape) > 1:
            spread = (2.0 / int(np.prod(shape[1:]))) ** 0.5
            part = source.standard_normal(shape, dtype=np.float32) * np.float32(spread)
        elif name.endswith(("running_var", ".weight")):
            part = np.ones(shape, np.float32)
        else:
            part = np.zeros(shape, np.float32)
        parts.append(part.reshape(-1))
    return np.concatenate(parts)


def write_weights(plan: Plan) -> int:
    """Write the plan's weights into its file, and return their bytes. Raises as new_file."""
    block = random_weights(plan)
    with new_file(Path(plan.weights)) as file:
        np.save(file, block, allow_pickle=False)
    return block.nbytes


def read_weights(plan: Plan) -> npt.NDArray[np.float32]:
    """The block in the plan's file. Raises InvalidConfig if it does not hold one."""
    try:
        block: npt.NDArray[np.float32] = np.load(plan.weights, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"cannot read weights from {plan.weights}: {error}") from None
    return block


class Network:
    """The code of the plan's network, which is on the host alone until it has weights. Then it answers."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        torch.backends.cudnn.allow_tf32 = False  # answers are compared with those in float64
        self._side = SIZES[plan.size][1]
        self.device = torch.device(plan.device)
        self._module = made(plan)
        self._sizes = [
            (name, tuple(each.shape), each.numel()) for name, each in _weighed(self._module)
        ]
        self._count = sum(count for _, _, count in self._sizes)
        self._placed: dict[str, torch.Tensor] = {}

    def place(self, block: torch.Tensor) -> None:
        """Take the weights in `block`, one float32 tensor on the network's device, which is kept."""
        if block.numel() != self._count:
            raise InvalidConfig(
                f"the weights have {block.numel():,} numbers and the network {self._count:,}"
            )
        parts: dict[str, torch.Tensor] = {}
        at = 0
        for name, shape, count in self._sizes:
            parts[name] = block[at : at + count].view(shape)
            at += count
        if self._placed:  # the module has tensors on the device: each takes other memory
            for name, part in parts.items():
                self._placed[name].data = part
            return
        counters = {
            name: torch.zeros(tuple(each.shape), dtype=each.dtype, device=self.device)
            for name, each in self._module.state_dict().items()
            if not each.is_floating_point()
        }
        self._module.load_state_dict({**counters, **parts}, assign=True)
        self._placed = {
            **dict(self._module.named_parameters()),
            **dict(self._module.named_buffers()),
        }

    def answer(self, image: Image) -> tuple[list[int], list[float]]:
        """The five likeliest classes of a picture (rows, columns, 3) of uint8, and their probabilities."""
        with torch.inference_mode():
            scores, places = self._probabilities(image, torch.float32).topk(TOP)
            return places.tolist(), scores.tolist()

    def exact(self, image: Image) -> npt.NDArray[np.float64]:
        """The probabilities of all classes, computed in float64. The network is one of float64 afterwards."""
        with torch.inference_mode():
            self._module.double()
            found: npt.NDArray[np.float64] = self._probabilities(image, torch.float64).cpu().numpy()
            return found

    def _probabilities(self, image: Image, dtype: torch.dtype) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).to(self.device)
        given = pixels.permute(2, 0, 1).unsqueeze(0).to(dtype)
        side = self._side
        if given.shape[-2:] != (side, side):
            given = nn.functional.interpolate(
                given, (side, side), mode="bilinear", align_corners=False
            )
        return torch.softmax(self._module(given / 127.5 - 1.0)[0], 0)


def truths(plan: Plan, pictures: Sequence[Image]) -> list[npt.NDArray[np.float64]]:
    """For each picture the probabilities of all classes by the plan's network, in float64 on the CPU."""
    made = Network(dataclasses.replace(plan, device="cpu"))
    made.place(pageable_block(read_weights(plan)))
    return [made.exact(each) for each in pictures]


def pageable_block(block: npt.NDArray[np.float32]) -> torch.Tensor:
    """The block as a tensor that shares its memory."""
    return torch.from_numpy(block)


def host_block(block: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The block as a tensor in host memory: pinned where the network is on a GPU, as the snapshot of rung
    L1."""
    return block.pin_memory() if device.type == "cuda" else block


def device_block(block: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of the block on the device. It is complete when this returns."""
    copied = torch.empty_like(block, device=device, pin_memory=False)
    copied.copy_(block, non_blocking=True)
    settle(device)
    return copied


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_bytes() -> tuple[int, int]:
    """Used memory of the GPU, by all processes, and all of it. This process has a CUDA context afterwards."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free), int(total)
