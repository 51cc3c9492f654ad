"""What a worker offers: one model of its file, with where it comes from and how it runs; names of versions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from slosched.errors import InvalidConfig
from slosched.field_types import AtLeast0, AtLeast1, Shape, check_types
from slosched.options import Option
from slosched.signature import Tensor, score_error

#: Precisions of a model's weights.
DTYPES = ("float32", "float16", "bfloat16")

#: Libraries of models. Their models are named LIBRARY/NAME.
LIBRARIES = ("torchvision", "timm", "diffusion", "originals")
LIBRARY_PREFIXES = tuple(f"{library}/" for library in LIBRARIES)

#: A version is at most this long a number.
_VERSION_DIGITS = 9


def split_version(name: str) -> tuple[str, int]:
    """A repository's "NAME:VERSION" as name and version; the version is 0 for a name without one."""
    plain, colon, version = name.rpartition(":")
    if not (colon and plain) or not 0 < len(version) <= _VERSION_DIGITS:
        return name, 0
    if not (version.isascii() and version.isdecimal()) or version[0] == "0":
        return name, 0
    return plain, int(version)


def is_version_of(name: str, plain: str) -> bool:
    """Whether `name` is a version of the repository's model `plain`."""
    return name.startswith(plain) and split_version(name)[0] == plain != name


def newest_version(plain: str, names: Iterable[str]) -> str:
    """The one of `names` that is the newest version of `plain`; empty: there is none."""
    versions = [name for name in names if is_version_of(name, plain)]
    return max(versions, key=lambda name: split_version(name)[1], default="")


@dataclass(frozen=True)
class ModelSource:
    """Where a worker may take one model from, and in which precision. Only the worker's own config can
    say this.

    Exactly one of `factory` ("package.module:function", called without arguments, returns an
    nn.Module), `pt2` (torch.export file), `transformers` (a folder that its save_pretrained wrote),
    `safetensors` (weights, or an index of several files of them, beside a transformers `config` file; or such
    a folder) and `cupy`
    ("package.module:function", for the CuPy backend) is set; none means the zoo's, or the library's, own of
    that name.

    What one request gives is `inputs` (signature.py), or in short `input_shape` and `input_dtype`; models of
    the zoo, of libraries and of pt2 files know it themselves. `lengths` are the length classes of a dimension
    of -1; what is shorter is padded with `pads`, by input (0 where there is none). `output` names the one
    of several outputs that is the answer: a key, an attribute or an index ("0"); `outputs` name several.
    `score` names the output that is a judge's score of the answer: the controller gets it, clients do not.
    """

    name: Annotated[str, Option(in_file=False)]  # the file has it in the heading
    factory: str = ""
    pt2: str = ""
    transformers: str = ""
    safetensors: str = ""
    config: str = ""
    cupy: str = ""
    input_shape: Shape = ()
    input_dtype: str = "float32"
    dtype: str = "float32"  # of its weights, one of DTYPES; inputs and outputs travel as float32
    channels_last: bool = False  # of its weights and, on the device, inputs
    output: str = ""
    score: str = ""
    lengths: tuple[AtLeast1, ...] = ()
    #: The answer may depend on the class that a request runs in; without this such a model is refused.
    padding_changes_answers: bool = False
    inputs: Annotated[tuple[Tensor, ...], Option(in_file=False)] = ()
    outputs: Annotated[tuple[Tensor, ...], Option(in_file=False)] = ()
    #: With `preempt`, on a GPU: it may interrupt others however long it takes; the length of its own segments,
    #: and how many of them are in flight (1 or 2). 0: both are chosen by measurement.
    urgent: bool = False
    boundary_ns: AtLeast0 = 0
    in_flight: Annotated[int, Meta(ge=0, le=2)] = 0
    pads: Annotated[dict[str, float], Option(in_file=False)] = field(default_factory=dict)
    #: Where the files are that an index of safetensors lists, by their names there; else beside it.
    shards: Annotated[dict[str, str], Option(in_file=False)] = field(default_factory=dict)
    #: Where modules are looked for that are not installed: beside the worker's file.
    folder: Annotated[str, Option(in_file=False)] = ""

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype not in DTYPES:
            raise InvalidConfig(
                f"model {self.name!r}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}"
            )
        wrong = self._score_error() if self.score else ""
        if wrong:
            raise InvalidConfig(f"model {self.name!r}: {wrong}")

    def _score_error(self) -> str:
        """What speaks against `score` by the rest of the table, in a sentence; empty if nothing does."""
        if self.cupy:
            return "a cupy model returns one array, which cannot be its score: leave score out"
        if self.score == self.output:
            return f"output and score both name {self.score!r}; the answer is another output"
        judge = tuple(each for each in self.outputs if each.name == self.score)
        others = tuple(each for each in self.outputs if each.name != self.score)
        return score_error((*others, *judge), self.score) if judge else ""
