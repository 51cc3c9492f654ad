"""The profile zoo61: 61 synthetic models that stand for the zoo of Clockwork's artifact.

    .venv/bin/python analysis/zoo61.py [--out src/slosched/profiles/zoo61.toml]

The artifact's experiments load every model of a zoo that was compiled and measured on V100s. This table
has as many networks, of the same families and the same spread, and is NOT measured. The rule:

- weights: the architecture's published number of parameters, 4 bytes each.
- transfer: at 12.26 GB/s, as ResNet-50's 102 MB take 8.33 ms in the profile v100.
- exec of one request: the family's time per layer, times its layers.
- exec of a batch: that time, times ResNet-50's growth in the profile v100 (1, 1.46, 2.15, 3.50 and
  6.04 for 1 to 16) to the family's power: below 1 it gains more by batching, above 1 less.

Times per layer and powers were chosen so that the families come out about as fast, and gain about as much,
as Clockwork's paper says of its own. `resnet50` (the alias resnet50_v2) is v100's, to the digit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from slosched.config import GpuProfile, ModelProfile
from slosched.config_file import dump_profile, load_profile

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "src" / "slosched" / "profiles" / "zoo61.toml"
HEADER = """\
# 61 synthetic models that stand for the zoo of Clockwork's artifact (OSDI'20): its families and spread,
# by a rule and not by measurement. Written by analysis/zoo61.py, which states the rule.
"""
_GRAIN_NS = 10_000


class Family(NamedTuple):
    """How fast one layer is, how batching pays, and what goes in and out."""

    layer_us: float
    power: float
    input_shape: tuple[int, ...] = (3, 224, 224)
    output_shape: tuple[int, ...] = (1000,)


class Network(NamedTuple):
    """`layers` as its name counts them; parameters in millions."""

    name: str
    family: str
    layers: int
    parameters: float


FAMILIES = {
    "cifar": Family(75, 1.0, (3, 32, 32), (10,)),
    "densenet": Family(31, 0.87),
    "wide densenet": Family(49, 0.90),
    "dla": Family(88, 0.93),
    "inception": Family(88, 0.85),
    "large inception": Family(92, 1.02, (3, 299, 299)),
    "mobilenet": Family(34, 0.92),
    "pose": Family(59, 1.28, (3, 256, 192), (17, 64, 48)),
    "resnest": Family(140, 1.17),
    "basic resnet": Family(71, 0.96),
    "resnet": Family(52, 1.0),
    "resnet d": Family(54, 1.0),
    "resnet s": Family(57, 1.02),
    "resnext": Family(45, 1.13),
    "wide resnext": Family(64, 1.23),
    "se resnext": Family(62, 1.05),
    "squeezenet": Family(50, 0.95),
    "video": Family(54, 1.0, (3, 224, 224), (400,)),
    "basic video": Family(70, 0.95, (3, 224, 224), (400,)),
    "vgg": Family(210, 1.12),
    "winograd resnet": Family(65, 0.93),
    "wide resnet": Family(86, 1.15),
    "xception": Family(62, 1.2, (3, 299, 299)),
}

NETWORKS = (
    Network("cifar_wideresnet16_10", "cifar", 16, 17.1),
    Network("cifar_wideresnet28_10", "cifar", 28, 36.5),
    Network("cifar_wideresnet40_8", "cifar", 40, 35.7),
    Network("densenet121", "densenet", 121, 7.98),
    Network("densenet161", "wide densenet", 161, 28.7),
    Network("densenet169", "densenet", 169, 14.1),
    Network("densenet201", "densenet", 201, 20.0),
    Network("dla34", "dla", 34, 15.7),
    Network("googlenet", "inception", 22, 6.62),
    Network("inceptionv3", "large inception", 48, 23.8),
    Network("mobile_pose_resnet18", "pose", 18, 12.9),
    Network("mobile_pose_resnet50", "pose", 50, 25.6),
    Network("mobilenet_v1_050", "mobilenet", 28, 1.34),
    Network("mobilenet_v1_075", "mobilenet", 28, 2.60),
    Network("mobilenet_v1_100", "mobilenet", 28, 4.25),
    Network("mobilenet_v2_100", "mobilenet", 53, 3.54),
    Network("mobilenet_v3_large", "mobilenet", 54, 5.48),
    Network("mobilenet_v3_small", "mobilenet", 42, 2.54),
    Network("resnest14", "resnest", 14, 10.6),
    Network("resnest26", "resnest", 26, 17.1),
    Network("resnest50", "resnest", 50, 27.5),
    Network("resnest101", "resnest", 101, 48.3),
    Network("resnet18", "basic resnet", 18, 11.7),
    Network("resnet34", "basic resnet", 34, 21.8),
    Network("resnet50", "resnet", 50, 25.5),
    Network("resnet101", "resnet", 101, 44.5),
    Network("resnet152", "resnet", 152, 60.2),
    Network("resnet18_v1", "basic resnet", 18, 11.7),
    Network("resnet34_v1", "basic resnet", 34, 21.8),
    Network("resnet50_v1", "resnet", 50, 25.6),
    Network("resnet101_v1", "resnet", 101, 44.6),
    Network("resnet152_v1", "resnet", 152, 60.2),
    Network("resnet50_v1d", "resnet d", 50, 25.6),
    Network("resnet101_v1d", "resnet d", 101, 44.6),
    Network("resnet152_v1d", "resnet d", 152, 60.2),
    Network("resnet50_v1s", "resnet s", 50, 25.7),
    Network("resnet101_v1s", "resnet s", 101, 44.7),
    Network("resnet152_v1s", "resnet s", 152, 60.3),
    Network("resnext50_32x4d", "resnext", 50, 25.0),
    Network("resnext101_32x4d", "resnext", 101, 44.2),
    Network("resnext101_64x4d", "wide resnext", 101, 83.5),
    Network("se_resnext50_32x4d", "se resnext", 50, 27.6),
    Network("se_resnext101_32x4d", "se resnext", 101, 49.0),
    Network("se_resnext101_64x4d", "wide resnext", 125, 88.2),
    Network("senet154", "wide resnext", 154, 115.1),
    Network("simple_pose_resnet18", "pose", 36, 15.4),
    Network("simple_pose_resnet50", "pose", 68, 34.0),
    Network("squeezenet1_0", "squeezenet", 18, 1.25),
    Network("squeezenet1_1", "squeezenet", 18, 1.24),
    Network("tsn_inceptionv3", "video", 82, 22.6),
    Network("tsn_resnet18", "basic video", 18, 11.4),
    Network("tsn_resnet34", "basic video", 34, 21.5),
    Network("tsn_resnet50", "video", 50, 24.3),
    Network("vgg11", "vgg", 11, 132.9),
    Network("vgg13", "vgg", 13, 133.0),
    Network("vgg16", "vgg", 16, 138.4),
    Network("wide_resnet50_2", "wide resnet", 50, 68.9),
    Network("winograd_resnet18", "winograd resnet", 18, 19.4),
    Network("winograd_resnet50", "winograd resnet", 50, 32.2),
    Network("winograd_resnet101", "winograd resnet", 101, 59.0),
    Network("xception", "xception", 71, 22.9),
)


def model_profile(network: Network, measured: ModelProfile) -> ModelProfile:
    """The profile of `network` by the rule; `measured` is v100's ResNet-50."""
    if network.name == measured.name:
        return measured
    family = FAMILIES[network.family]
    first_ns = network.layers * family.layer_us * 1000
    weights_bytes = round(network.parameters * 4_000_000)
    return ModelProfile(
        name=network.name,
        exec_ns={
            batch: round(first_ns * (ns / measured.exec_ns[1]) ** family.power / _GRAIN_NS)
            * _GRAIN_NS
            for batch, ns in sorted(measured.exec_ns.items())
        },
        weights_ns=round(weights_bytes * measured.weights_ns / measured.weights_bytes),
        weights_bytes=weights_bytes,
        input_shape=family.input_shape,
        output_shape=family.output_shape,
    )


def zoo61() -> str:
    """The profile as TOML."""
    v100 = load_profile("v100")
    measured = v100.model("resnet50")
    profile = GpuProfile(
        name="zoo61",
        models={network.name: model_profile(network, measured) for network in NETWORKS},
        weights_cache_bytes=v100.weights_cache_bytes,
        page_bytes=v100.page_bytes,
        clock_mhz=v100.clock_mhz,
    )
    return HEADER + dump_profile(profile)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=TARGET)
    out = parser.parse_args().out
    out.write_text(zoo61(), encoding="utf-8")
    print(f"wrote {out}: {len(NETWORKS)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
