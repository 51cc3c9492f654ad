"""One request from a file: images, arrays, the best classes, and everything that can be wrong."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from fake_controller import FakeController, model_info
from slosched.clients import one_shot
from slosched.clients.inference import Model
from slosched.clients.one_shot import infer_once, read_image, read_inputs, top_classes
from slosched.errors import DeadlineExceeded, InvalidConfig, InvalidRequest
from slosched.messages import ClientHeartbeat, InferRequest
from slosched.signature import Tensor


def read_input(path: Path, model: Model) -> Any:
    """The only input that the file at `path` gives."""
    [value] = read_inputs([str(path)], model).values()
    return value


def image_model(height: int = 8, width: int = 8, channels: int = 3) -> Model:
    return Model(model_info(0, shape=(channels, height, width)), 7)


def test_an_array_goes_there_and_the_answer_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "input.npy"
    np.save(path, np.arange(12, dtype=np.float32).reshape(3, 4))
    with FakeController() as controller:
        result = infer_once(controller.address, "toy", path, "25ms")
    assert result.answer.output is not None and result.answer.output.tolist() == [0, 2]
    text = result.render()
    assert "float32 of shape (2,)" in text and "random weights" in text
    assert "toy: ok after 3ms of 25ms" in text and "predicted 2.6ms" in text
    document = json.loads(json.dumps(result.as_dict()))
    assert document["outcome"] == "ok" and document["output_shape"] == [2]
    assert document["slo_ns"] == 25_000_000 and document["top"] == []


def test_without_a_file_the_worker_makes_the_input() -> None:
    with FakeController() as controller:
        result = infer_once(controller.address, "toy")
        request = controller.of(InferRequest)[0]
    assert result.answer.output is None and "no output" in result.render()
    assert isinstance(request, InferRequest) and request.shape == () and request.slo_ns == 0
    assert result.as_dict()["output_shape"] is None


def test_a_refusal_is_raised() -> None:
    with FakeController() as controller:
        controller.code, controller.reason = 8, "no plan"
        with pytest.raises(DeadlineExceeded, match="no plan"):
            infer_once(controller.address, "toy", None, 0.001)


def test_an_image_becomes_a_normalised_chw_input(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 20), (255, 0, 0)).save(path)
    array = read_image(path, image_model())
    assert array.shape == (3, 8, 8) and array.dtype == np.float32 and array.flags.c_contiguous
    # Red is (1, 0, 0); ImageNet's mean and deviation by channel.
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    for channel, value in zip(array, expected, strict=True):
        assert np.allclose(channel, value, atol=1e-5)


def test_the_middle_of_an_image_is_cut_out(tmp_path: Path) -> None:
    # Wide, with white outer thirds and a black middle: only the middle is seen.
    pixels = np.full((30, 90, 3), 255, np.uint8)
    pixels[:, 30:60] = 0
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    array = read_image(path, image_model(16, 16))
    black = (0 - 0.485) / 0.229
    assert abs(float(array[0].mean()) - black) < 0.05


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(3, 3), (7, 300), (300, 7), (8, 8)])
def test_images_of_any_mode_and_size(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, size).save(path)
    assert read_input(path, image_model(12, 20)).shape == (3, 12, 20)


def test_a_model_that_takes_no_image_says_so(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(InvalidConfig, match=r"float32 of shape \(3, 4\).*\.npy"):
        read_input(path, Model(model_info(0), 7))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    model = image_model()
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(InvalidConfig, match="is not a readable image"):
        read_input(text, model)
    broken = tmp_path / "broken.npy"
    for content in (b"", b"hello", b"\x93NUMPY\x01\x00"):
        broken.write_bytes(content)
        with pytest.raises(InvalidConfig, match=r"broken\.npy"):
            read_input(broken, model)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,), }".ljust(117)
    broken.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header + b"\n")
    with pytest.raises(InvalidConfig, match=r"broken\.npy"):
        read_input(broken, model)
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidConfig, match=r"pickled\.npy"):
        read_input(pickled, model)
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((8, 8), np.float32))
    with pytest.raises(InvalidRequest, match=r"\(3, 8, 8\), not \(8, 8\)"):
        read_input(wrong, model)
    with pytest.raises(InvalidConfig, match="no file"):
        infer_once("127.0.0.1:1", "toy", tmp_path / "missing.jpg")


def test_the_five_best_classes() -> None:
    scores = np.zeros(1000, np.float32)
    scores[[3, 1, 4, 15, 9]] = [5, 4, 3, 2, 1]
    labels = tuple(f"class {i}" for i in range(1000))
    top = top_classes(scores, labels)
    assert [s.index for s in top] == [3, 1, 4, 15, 9] and top[0].label == "class 3"
    total = sum(np.exp([5, 4, 3, 2, 1])) + 995
    assert top[0].probability == pytest.approx(np.exp(5) / total)


def test_scores_of_any_size_stay_finite() -> None:
    top = top_classes(np.array([1e30, 0, 0, 0, 0, -1e30], np.float32))
    assert top[0].probability == 1.0 and top[0].label == ""


@pytest.mark.parametrize(
    "output", [None, np.zeros(5, np.float32), np.zeros((6, 6), np.float32), np.zeros(9, np.int64)]
)
def test_other_outputs_have_no_classes(
    output: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> None:
    assert top_classes(output) == ()


def brightness(path: Path) -> float:
    """What a one-channel model sees, on average, in 0..1."""
    array = read_image(path, image_model(8, 8, channels=1))
    assert array.shape == (1, 8, 8)
    return float(array.mean())


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((9, 9), 32_768, np.uint16)).save(path)
    assert abs(brightness(path) - 0.5) < 0.01


def test_what_has_no_known_white_is_refused_and_a_clear_level_is_white(tmp_path: Path) -> None:
    path = tmp_path / "numbers.tif"
    for low, high in ((0, 2_000_000_000), (-5, 9)):
        Image.fromarray(np.array([[low, high]], np.int32)).save(path)
        with pytest.raises(InvalidConfig, match=f"{low} to {high}, have no known white"):
            read_image(path, image_model())
    clear = tmp_path / "clear.png"
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(clear, transparency=0)
    assert brightness(clear) == 1.0


def test_a_client_beats_while_its_input_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input.npy"
    np.save(path, np.zeros((3, 4), np.float32))
    beaten: list[bool] = []

    with FakeController() as controller:

        def slow(words: list[str], model: Model) -> Any:
            give_up = time.monotonic() + 20
            while not controller.of(ClientHeartbeat) and time.monotonic() < give_up:
                time.sleep(0.02)
            beaten.append(bool(controller.of(ClientHeartbeat)))
            return read_inputs(words, model)

        monkeypatch.setattr(one_shot, "read_inputs", slow)
        infer_once(controller.address, "toy", path, "25ms")
    assert beaten == [True]


def test_an_input_that_takes_too_long_to_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def slow(words: list[str], model: Model) -> Any:
        released.wait(20)

    path = tmp_path / "input.npy"
    np.save(path, np.zeros((3, 4), np.float32))
    monkeypatch.setattr(one_shot, "read_inputs", slow)
    monkeypatch.setattr(one_shot, "_READ_WITHIN_S", 0.05)
    threading.Timer(0.5, released.set).start()
    with FakeController() as controller, pytest.raises(InvalidConfig, match="was not read within"):
        infer_once(controller.address, "toy", path)


def test_transparent_pixels_are_seen_on_white(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path)
    assert brightness(path) == 1.0
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert brightness(tmp_path / "palette.png") == 1.0


def test_an_image_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    pixels = np.zeros((20, 10, 3), np.uint8)
    pixels[:10] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    seen = read_image(path, image_model(8, 8, channels=1))[0]
    assert seen[0].mean() < seen[-1].mean()


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "moves.gif"
    white, black = Image.new("L", (9, 9), 255), Image.new("L", (9, 9), 0)
    white.save(path, save_all=True, append_images=[black])
    assert brightness(path) == 1.0


def test_a_line_of_pixels_is_read_without_making_it_huge(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("L", (1, 5000), 128).save(path)
    assert abs(brightness(path) - 128 / 255) < 0.01
    assert read_image(path, image_model(224, 224)).shape == (3, 224, 224)


def test_a_broken_image_and_one_that_is_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "half.png"
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InvalidConfig, match="is not a readable image"):
        read_image(path, image_model())
    large = tmp_path / "large.png"
    Image.new("L", (100, 100)).save(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    with pytest.raises(InvalidConfig, match=r"is not a readable image.*exceeds limit"):
        read_image(large, image_model())


SENTENCES = Model(
    msgspec.structs.replace(
        model_info(0),
        inputs=(Tensor("ids", "int64", (-1,)), Tensor("text", "BYTES", (1,), 40)),
        outputs=(Tensor("pooled", "float32", (4,)),),
        lengths=(8, 16),
    ),
    7,
)


def test_several_inputs_by_name(tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(5))
    inputs = read_inputs([f"ids={ids}", "text=a = b"], SENTENCES)
    assert [*inputs["ids"]] == [0, 1, 2, 3, 4] and [*inputs["text"]] == ["a = b"]
    (tmp_path / "words.txt").write_bytes(b"from a file")
    inputs = read_inputs([f"ids={ids}", f"text={tmp_path / 'words.txt'}"], SENTENCES)
    assert [*inputs["text"]] == [b"from a file"]
    both = tmp_path / "both.npz"
    np.savez(both, ids=np.arange(5), text=np.array([b"x"]))
    assert sorted(read_inputs([str(both)], SENTENCES)) == ["ids", "text"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text=x"], "it lacks ids"),
        (["ids=nowhere.npy", "text=x"], "no file 'nowhere.npy'"),
        (["nonsense", "text=x"], "'nonsense' is not NAME=FILE"),
        (["nowhere.npz"], "not a readable .npz file"),
    ],
)
def test_wrong_words_for_inputs(words: list[str], said: str) -> None:
    with pytest.raises((InvalidConfig, InvalidRequest), match=said):
        read_inputs(words, SENTENCES)
