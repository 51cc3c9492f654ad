"""Plain configuration: what a scheduler, a worker and a profile are told. No files are read here.

A field is an option: its one row in the table of `options.py`, from which the command line, the keys of TOML
files (config_file/) and what status shows follow. Every class checks itself when it is made and raises
InvalidConfig with the name of the wrong field, for a wrong type or a number out of bounds as well.
"""

from slosched.config.controller import ControllerConfig
from slosched.config.listening import CONTROLLER_PORT, WORKER_PORT
from slosched.config.liveness import (
    CLIENT_HEARTBEAT_NS,
    CLIENT_LOST_AFTER_NS,
    HEARTBEAT_NS,
    LOST_AFTER_NS,
)
from slosched.config.scheduler import (
    FIDELITIES,
    PLACEMENTS,
    WEIGHT_RANGE,
    SchedulerConfig,
    WeightRule,
    is_weight,
)
from slosched.config.worker import MOST_PUT_ASIDE, PUT_ASIDE_CHARS, WorkerConfig
from slosched.gpu_profile import (
    ALIASES,
    PAGE_BYTES,
    EmulationNoise,
    GpuProfile,
    ModelProfile,
    canonical_model,
)
from slosched.model_source import DTYPES, LIBRARIES, LIBRARY_PREFIXES, ModelSource

__all__ = [
    "ALIASES",
    "CLIENT_HEARTBEAT_NS",
    "CLIENT_LOST_AFTER_NS",
    "CONTROLLER_PORT",
    "DTYPES",
    "FIDELITIES",
    "HEARTBEAT_NS",
    "LIBRARIES",
    "LIBRARY_PREFIXES",
    "LOST_AFTER_NS",
    "MOST_PUT_ASIDE",
    "PAGE_BYTES",
    "PLACEMENTS",
    "PUT_ASIDE_CHARS",
    "WEIGHT_RANGE",
    "WORKER_PORT",
    "ControllerConfig",
    "EmulationNoise",
    "GpuProfile",
    "ModelProfile",
    "ModelSource",
    "SchedulerConfig",
    "WeightRule",
    "WorkerConfig",
    "canonical_model",
    "is_weight",
]
