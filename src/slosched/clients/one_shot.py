"""One request, from a file to its answer: what `slosched client infer` does."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from slosched.clients.aio import connect
from slosched.clients.inference import Inference, Model
from slosched.clients.tensors import Array, Inputs, Value, pack
from slosched.errors import InvalidConfig
from slosched.messages import StageReply
from slosched.signature import BYTES, Tensor, described
from slosched.units import format_duration
from slosched.verdicts import stage_name, verdict_name

_READ_WITHIN_S = 60.0
#: The statistics of ImageNet that torchvision's models were trained with; RGB.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: The shorter side is scaled to this much more than the crop, as torchvision does (256 for 224).
_RESIZE_TO_CROP = 256 / 224
_TOP = 5
#: A word that ends so is a file and not a text.
_FILES = (".npy", ".npz", ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One of the best classes. `label` is empty where the model has no labels."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class OneShot:
    """One answer, with the best classes where the output is a vector of more than five entries."""

    answer: Inference
    top: tuple[ClassScore, ...]

    def render(self) -> str:
        """The result in a few human-readable lines."""
        info, outputs = self.answer.model.info, self.answer.outputs
        lines = []
        width = max((len(score.label) for score in self.top), default=0)
        for score in self.top:
            label = f"{score.label:<{width}}  " if width else ""
            lines.append(f"{score.index:>6}  {label}{100 * score.probability:6.2f} %")
        if not outputs:
            lines.append("no input was given, so the worker generated one and returned no output")
        elif not self.top:
            named = len(outputs) > 1
            lines += [
                f"output{f' {name}' if named else ''}: {output.dtype} of shape {output.shape}"
                for name, output in outputs.items()
            ]
        if info.random_weights:
            lines.append("random weights: outputs are meaningless, timings are real")
        elif "emulated" in info.labels:
            lines.append("an emulated GPU: it computes nothing and takes the time of its profile")
        lines.append(f"{info.name}: {self.answer.explain()}")
        lines.append(f"round trip at the client: {format_duration(self.answer.round_trip_ns)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON. Times in ns."""
        answer = self.answer
        first = next(iter(answer.outputs.values()), None)
        return {
            "model": answer.model.name,
            "model_id": answer.model.model_id,
            **answer.facts(),
            "batch_size": answer.message.batch_size,
            "stages": [_stage(place, stage) for place, stage in enumerate(answer.stages)],
            "random_weights": answer.model.info.random_weights,
            "output_shape": None if first is None else list(first.shape),
            "output_dtype": None if first is None else str(first.dtype),
            "outputs": {
                name: {"shape": list(output.shape), "dtype": str(output.dtype)}
                for name, output in answer.outputs.items()
            },
            "top": [
                {"index": s.index, "label": s.label, "probability": s.probability} for s in self.top
            ],
        }


def _stage(place: int, stage: StageReply) -> dict[str, Any]:
    """A stage of a cascade's request; score and threshold are None where no judge was asked."""
    return {
        "stage": stage_name(stage.verdict, place),
        "model": stage.model,
        "verdict": verdict_name(stage.verdict),
        "score": stage.score if stage.score >= 0 else None,
        "threshold": stage.threshold if stage.threshold >= 0 else None,
        "queued_ns": stage.queued_ns,
        "start_ns": stage.start_ns,
        "exec_ns": stage.exec_ns,
        "end_ns": stage.end_ns,
        "batch_size": stage.batch_size,
        "worker_id": stage.worker_id,
        "gpu_id": stage.gpu_id,
    }


def infer_once(
    address: str,
    model: str,
    given: Path | Sequence[str] | None = None,
    slo: float | str | None = None,
    *,
    timeout_s: float = 60.0,
) -> OneShot:
    """Load `model`, run one inference of what is `given`, and return the answer.

    `given` is one file, or the words of `read_inputs`; without any the worker makes an input. `slo` is in
    seconds or a duration text; None takes the controller's default. `timeout_s` bounds loading the
    model. Raises InvalidConfig for a file that cannot be used, and what `AsyncClient.infer` raises.
    """
    words = [str(given)] if isinstance(given, Path) else [*(given or ())]

    async def once() -> Inference:
        async with connect(address, name="slosched client infer") as client:
            [handle] = await client.load(model, timeout_s=timeout_s)
            inputs = await _read_beside(words, handle) if words else None
            return await client.infer(handle, inputs, slo=slo)

    for word in words:  # before a connection is made
        path = Path(word.partition("=")[2] or word)
        if path.suffix.lower() in _FILES and not (path.is_file() or Path(word).is_file()):
            raise InvalidConfig(f"no file {str(path)!r}; give an image or a .npy array")
    answer = asyncio.run(once())
    outputs = answer.outputs
    output = next(iter(outputs.values())) if len(outputs) == 1 else None
    return OneShot(answer, top_classes(output, answer.model.info.labels))


async def _read_beside(words: Sequence[str], model: Model) -> Inputs:
    """`read_inputs` in a thread: the loop says meanwhile that the client lives. Raises InvalidConfig."""
    reading = asyncio.to_thread(read_inputs, words, model)
    try:
        return await asyncio.wait_for(reading, _READ_WITHIN_S)
    except TimeoutError:
        raise InvalidConfig(
            f"{', '.join(map(repr, words))} was not read within {_READ_WITHIN_S:.0f} s; copy it to a quick "
            "disk, or scale it down first"
        ) from None


def read_inputs(words: Sequence[str], model: Model) -> dict[str, Value]:
    """Return the inputs that `words` name, checked against the signature of `model`.

    A word is NAME=FILE, or for an input of BYTES NAME=TEXT, for one of the model's inputs. A single word may be
    an .npz file with an array for each input, or without a name the file or text of the only input: an .npy
    array as it is, an image prepared for the model. Raises InvalidConfig for what cannot be read,
    InvalidRequest for inputs that the model does not take.
    """
    tensors = {tensor.name: tensor for tensor in model.inputs}
    inputs: dict[str, Value] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if len(words) == 1 and word.lower().endswith(".npz"):
            inputs |= _read_arrays(Path(word))
        elif equals and name in tensors:
            inputs[name] = _read_value(value, tensors[name], model)
        elif len(words) == len(tensors) == 1:
            [only] = tensors.values()
            inputs[only.name] = _read_value(word, only, model)
        else:
            raise InvalidConfig(
                f"{word!r} is not NAME=FILE for an input of model {model.name!r}, which takes "
                f"{described(model.inputs)}"
            )
    pack(model.info, inputs)  # before anything else is done with them
    return inputs


def _read_value(value: str, tensor: Tensor, model: Model) -> Value:
    """One input: from a file, or for BYTES the text itself where there is no such file."""
    path = Path(value)
    if tensor.dtype != BYTES:
        if not path.is_file():
            raise InvalidConfig(f"no file {value!r}; give an image or a .npy array")
        return read_array(path) if path.suffix.lower() == ".npy" else read_image(path, model)
    if path.suffix.lower() == ".npy" and path.is_file():
        return read_array(path)
    try:
        content = path.read_bytes() if path.is_file() else value
    except OSError as error:  # also a text that is too long for a path
        raise InvalidConfig(f"{value!r} cannot be read: {error}") from None
    if math.prod(tensor.shape) != 1:
        raise InvalidConfig(
            f"{tensor.name} takes {math.prod(tensor.shape)} texts; give them as an .npy array of bytes"
        )
    return _alone(content, tensor.shape)


def _alone(content: bytes | str, shape: tuple[int, ...]) -> Array:
    """The one element of a BYTES tensor, in its shape."""
    array = np.empty(shape, dtype=object)
    array[...] = content
    return array


def _read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file. Pickled objects are refused. Raises InvalidConfig."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, MemoryError, AttributeError, BadZipFile) as error:
        raise InvalidConfig(f"{str(path)!r} is not a readable .npz file: {error}") from None


def read_array(path: Path) -> Array:
    """Return the array of an .npy file. Pickled objects are refused. Raises InvalidConfig."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # the last: a length that is none
        raise InvalidConfig(f"{str(path)!r} is no .npy array that can be read: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InvalidConfig(f"{str(path)!r} holds several arrays; save one with numpy.save")
    return array


def read_image(path: Path, model: Model) -> Array:
    """Return an image as float32 of shape (3, H, W), as torchvision's ImageNet models want it.

    It is turned as its EXIF orientation says, shown on white where it is transparent, and scaled to 8 bit if
    it has 16; of an animation the first picture is taken. The shorter side is scaled to 8/7 of the crop, the
    middle is cut out, and ImageNet's mean and deviation are taken off. A model of (1, H, W) gets grey in 0..1.
    Raises InvalidConfig if it is not an image, a larger one than Pillow takes, or the model takes none.
    """
    shape = model.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or model.input_dtype != "float32":
        raise InvalidConfig(
            f"model {model.name!r} takes {model.input_dtype} of shape {shape}, which is not an image of shape "
            "(3, H, W) or (1, H, W) in float32; give the input as an .npy file"
        )
    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = _as_seen(opened)
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
    ) as error:
        raise InvalidConfig(f"{str(path)!r} is not a readable image: {error}") from None
    # Resize only the visible part of the source: a whole image of 1 x 5,000 pixels would become huge.
    scale = _RESIZE_TO_CROP * max(height / image.height, width / image.width)
    seen_width, seen_height = min(image.width, width / scale), min(image.height, height / scale)
    left, top = (image.width - seen_width) / 2, (image.height - seen_height) / 2
    part = (left, top, left + seen_width, top + seen_height)
    mode = "RGB" if channels == 3 else "L"
    resized = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR, box=part)
    pixels = np.asarray(resized, dtype=np.float32) / 255
    if channels == 1:
        return np.ascontiguousarray(pixels[None])
    normal = (pixels - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def _as_seen(opened: Image.Image) -> Image.Image:
    """The picture as a person sees it, in 8 bits and without transparency."""
    opened.seek(0)
    image: Image.Image = ImageOps.exif_transpose(opened) or opened
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut at 255
        levels = np.asarray(image, dtype=np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"its values of 32 bits, {levels.min()} to {levels.max()}, have no known white; save it "
                "with 8 or 16 bits"
            )
        clear = image.info.get("transparency")  # a level, in PNG
        if isinstance(clear, int):
            levels[levels == clear] = 65535
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("it holds floating numbers; give them as an .npy file")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert("RGB")


def top_classes(output: Array | None, labels: tuple[str, ...] = ()) -> tuple[ClassScore, ...]:
    """Return the five best classes of a vector of scores, by softmax; nothing for other outputs."""
    if output is None or output.ndim != 1 or output.size <= _TOP or output.dtype.kind != "f":
        return ()
    scores = output.astype(np.float64)
    exponents = np.exp(scores - scores.max())
    probabilities = exponents / exponents.sum()
    best = np.argsort(-probabilities, kind="stable")[:_TOP]
    named = labels if len(labels) == output.size else ()
    return tuple(
        ClassScore(int(i), named[int(i)] if named else "", float(probabilities[i])) for i in best
    )
