"""What the protocol says of a server and of its models: metadata and configs.

Clients read these before they send anything: perf_analyzer ends with a segmentation fault where a name or a
datatype is missing.
"""

from __future__ import annotations

from typing import Any

from slosched.fronts.datatypes import OF_NUMPY, config_type
from slosched.fronts.forms import Form
from slosched.fronts.names import ONLY_VERSION
from slosched.signature import Tensor
from slosched.version import __version__

SERVER_NAME = "slosched"
PLATFORM = "slosched"
#: What clients may use. Shared memory is on this list only where it is on.
EXTENSIONS = (
    "binary_tensor_data",
    "parameters",
    "statistics",
    "model_repository",
    "schedule_policy",
    "model_configuration",
)
SHARED_MEMORY = "system_shared_memory"


def server_metadata(*, shared_memory: bool) -> dict[str, Any]:
    """Name, version and the extensions that work."""
    extensions = [*EXTENSIONS, *([SHARED_MEMORY] if shared_memory else [])]
    return {"name": SERVER_NAME, "version": __version__, "extensions": extensions}


def model_metadata(form: Form, name: str, versions: list[str]) -> dict[str, Any]:
    """Inputs and outputs with the batch in front, of the model that was asked for as `name`.

    `versions` are those that are ready.
    """
    return {
        "name": name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [_described(each) for each in form.inputs],
        "outputs": [_described(each) for each in form.outputs],
    }


def _described(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "datatype": OF_NUMPY.get(tensor.dtype, tensor.dtype),
        "shape": [-1, *tensor.shape],
    }


def model_config(form: Form, name: str, version: str) -> dict[str, Any]:
    """The config in the form of the protocol's ModelConfig; dims are those of one row."""
    inputs = [_configured(each) for each in form.inputs]
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": form.max_batch,
        "input": [{**each, "format": "FORMAT_NONE"} for each in inputs],
        "output": [_configured(each) for each in form.outputs],
        "dynamic_batching": {"preferred_batch_size": sorted(form.info.batch_sizes)},
        "parameters": {"version": {"string_value": version or ONLY_VERSION}},
    }


def _configured(tensor: Tensor) -> dict[str, Any]:
    datatype = OF_NUMPY.get(tensor.dtype, tensor.dtype)
    return {"name": tensor.name, "data_type": config_type(datatype), "dims": [*tensor.shape]}
