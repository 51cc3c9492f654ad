"""The originals: the same answers as transformers' own models with the same weights, step by step."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from slosched.config import WorkerConfig  # noqa: E402
from slosched.daemon.backends.checking import check_model  # noqa: E402
from slosched.daemon.backends.contract import Arrays  # noqa: E402
from slosched.daemon.backends.graphs import models  # noqa: E402
from slosched.daemon.backends.graphs.models import job_spec  # noqa: E402
from slosched.daemon.backends.job_models import MODELS, can_capture  # noqa: E402
from slosched.daemon.backends.libraries import library_spec  # noqa: E402
from slosched.daemon.backends.originals.building import (  # noqa: E402
    original_spec,
    originals_specs,
    speech_encoder,
)
from slosched.daemon.backends.originals.designs import (  # noqa: E402
    DESIGNS,
    SpeechDesign,
    TextDesign,
)
from slosched.daemon.backends.originals.speech import SpeechDecoder, SpeechModel  # noqa: E402
from slosched.daemon.backends.originals.text import TextModel  # noqa: E402
from slosched.daemon.backends.sources import worker_specs  # noqa: E402
from slosched.daemon.backends.templates import DeviceWeights, Template  # noqa: E402
from slosched.errors import InvalidConfig, UnknownName  # noqa: E402
from slosched.share.presets import DETECTOR, HOTCARBON_MODELS, TINY_MODEL  # noqa: E402
from slosched.share.solos import load_profile, own_profiles  # noqa: E402
from slosched.share_spec import Job  # noqa: E402

pytestmark = pytest.mark.torch

TINY = [f"originals/{name}" for name in DESIGNS if name.startswith("tiny")]


def generated(model: Any, tokens: Any, count: int, **more: Any) -> tuple[Any, Any]:
    """`count` tokens that `model` of transformers gives greedily, and the logits of each."""
    found, logits = [], []
    for _ in range(count):
        last = model(tokens, **more).logits[:, -1]
        logits.append(last)
        found.append(last.argmax(-1, keepdim=True))
        tokens = torch.cat([tokens, found[-1]], dim=1)
    return torch.cat(found, dim=1), torch.stack(logits, dim=1)


def ours(model: Any, inputs: Any, logits_of: Any) -> tuple[Any, Any]:
    """The tokens of `model`, and the logits behind each, by its own parts."""
    with torch.inference_mode():
        state = model.begin(inputs)
        logits = [logits_of(state[2])] if isinstance(model, TextModel) else []
        for _ in range(model.steps):
            state = model.step(*state)
            logits.append(logits_of(state[2]))
        return model.finish(*state)["tokens"], torch.stack(logits, dim=1)


def text_design(rotary: int) -> TextDesign:
    return TextDesign(
        layers=3,
        width=48,
        heads=4,
        vocabulary=113,
        positions=64,
        rotary=rotary,
        prompt=5,
        length=21,
    )


def test_gpt2_generates_as_transformers_does() -> None:
    torch.manual_seed(1)
    design = text_design(0)
    config = transformers.GPT2Config(
        vocab_size=113, n_positions=64, n_embd=48, n_layer=3, n_head=4, initializer_range=0.3
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    model = TextModel(design).eval()
    weights = theirs.transformer.state_dict()
    # transformers' Conv1D has its weights the other way round.
    turned = {
        name: value.t() if ".c_" in name and name.endswith("weight") else value
        for name, value in weights.items()
    }
    model.load_state_dict(turned)
    tokens = torch.randint(0, 113, (3, 5))
    with torch.inference_mode():
        wanted, scores = generated(theirs, tokens, 16)
    found, logits = ours(model, tokens, model.logits)
    assert torch.equal(found, wanted)
    assert len(set(wanted.flatten().tolist())) > 8  # it does not say the same all the time
    torch.testing.assert_close(logits, scores, rtol=1e-4, atol=1e-4)


def test_gptj_generates_as_transformers_does() -> None:
    torch.manual_seed(2)
    design = text_design(8)
    config = transformers.GPTJConfig(
        vocab_size=113,
        n_positions=64,
        n_embd=48,
        n_layer=3,
        n_head=4,
        rotary_dim=8,
        initializer_range=0.3,
    )
    theirs = transformers.GPTJForCausalLM(config).eval()
    model = TextModel(design).eval()
    weights = {
        name.removeprefix("transformer."): value for name, value in theirs.state_dict().items()
    }
    model.load_state_dict(weights)
    model.add_tables()
    tokens = torch.randint(0, 113, (3, 5))
    with torch.inference_mode():
        wanted, scores = generated(theirs, tokens, 16)
    found, logits = ours(model, tokens, model.logits)
    assert torch.equal(found, wanted)
    assert len(set(wanted.flatten().tolist())) > 8
    torch.testing.assert_close(logits, scores, rtol=1e-4, atol=1e-4)


def test_whisper_transcribes_as_transformers_does() -> None:
    torch.manual_seed(3)
    design = SpeechDesign(
        layers=2,
        width=48,
        heads=4,
        inner=96,
        vocabulary=113,
        positions=32,
        bands=8,
        states=30,
        start=7,
        steps=12,
    )
    config = transformers.WhisperConfig(
        vocab_size=113,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=32,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=7,
    )
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    model = SpeechModel(design, speech_encoder(design), SpeechDecoder(design)).eval()
    model.encoder.load_state_dict(theirs.model.encoder.state_dict())
    model.decoder.load_state_dict(theirs.model.decoder.state_dict())
    features = torch.randn(3, 8, 60)
    tokens, wanted, scores = torch.full((3, 1), 7), [], []
    with torch.inference_mode():
        for _ in range(12):
            last = theirs(input_features=features, decoder_input_ids=tokens).logits[:, -1]
            scores.append(last)
            wanted.append(last.argmax(-1, keepdim=True))
            tokens = torch.cat([tokens, wanted[-1]], dim=1)
    table = model.decoder.embed_tokens.weight
    found, logits = ours(model, features, lambda last: last @ table.T)
    assert torch.equal(found, torch.cat(wanted, dim=1))
    assert len(set(found.flatten().tolist())) > 5
    torch.testing.assert_close(logits, torch.stack(scores, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_original_can_be_served(name: str, dtype: str) -> None:
    """Rows follow their inputs, no weights change, a run leaves nothing to the next one."""
    template = Template(original_spec(name, dtype))
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass

    def run(rows: Arrays) -> Arrays:
        inputs = [torch.from_numpy(rows[tensor.name]) for tensor in template.spec.takes]
        found = template.forward(weights, inputs, steps=min(3, template.steps))
        return {key: value.numpy() for key, value in found.items()}

    gives = check_model(run, template.spec, precision=dtype)
    wanted = ["tokens", "last"]
    if name.endswith("bert"):
        wanted = ["tokens", "logits"] if dtype == "float32" else ["logits"]
    assert [tensor.name for tensor in gives] == wanted
    template.check_bound()
    assert not template.changed(weights)


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-gpt2", "tiny-whisper"])
def test_steps_past_the_last_one_write_nothing_outside(name: str) -> None:
    """Preparation launches the graph of a step as often as it likes."""
    spec = original_spec(f"originals/{name}")
    model: Any = spec.build()
    rows = Template(spec).sample_rows(2, 5)
    (inputs,) = (torch.from_numpy(rows[tensor.name]) for tensor in spec.takes)
    with torch.inference_mode():
        state = model.begin(inputs)
        for _ in range(model.steps + 5):
            after = model.step(*state)
            same = [new is old for new, old in zip(after, state, strict=True)]
            assert same[0] and same[3], "caches and tokens are written in place"
            state = after
        assert int(state[1].max()) == state[0].shape[1] - 1


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-gpt2", "tiny-whisper"])
def test_parts_on_the_same_memory_answer_as_the_whole(name: str) -> None:
    """As captured parts run: the state stays where it is, holds anything at first, and serves run after run."""
    spec = original_spec(f"originals/{name}")
    model: Any = spec.build()
    samples = Template(spec)
    (tensor,) = spec.takes
    state: list[Any] = []
    for seed in range(3):
        inputs = torch.from_numpy(samples.sample_rows(2, seed)[tensor.name])
        with torch.inference_mode():
            whole = model(inputs)
            made = model.begin(inputs)
        if not state:
            state = [torch.empty_like(value) for value in made]
            for value in state:
                value.fill_(float("nan") if value.is_floating_point() else 10**6)
        with torch.inference_mode():
            for there, value in zip(state, made, strict=True):
                there.copy_(value)
            for _ in range(model.steps):
                for there, value in zip(state, model.step(*state), strict=True):
                    if value is not there:
                        there.copy_(value)
            parts = model.finish(*state)
        for key, value in whole.items():
            assert torch.equal(parts[key], value), key


def test_the_next_token_is_ahead_of_all_others() -> None:
    """So that rounding decides nothing: half precision and other batch sizes choose the same."""
    for name in ("tiny-gpt", "tiny-gpt2"):
        model: Any = original_spec(f"originals/{name}").build()
        with torch.inference_mode():
            last = model.begin(torch.randint(0, 97, (8, 4)))[2]
            first, second = model.logits(last).topk(2).values.unbind(-1)
        assert float((first - second).min()) > 0.5


def test_published_shapes() -> None:
    gpt, whisper = DESIGNS["gpt"], DESIGNS["whisper"]
    assert isinstance(gpt, TextDesign) and isinstance(whisper, SpeechDesign)
    with torch.device("meta"):
        parameters = {
            "gpt": sum(each.numel() for each in TextModel(gpt).parameters()),
            "decoder": sum(each.numel() for each in SpeechDecoder(whisper).parameters()),
        }
        theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig())
    assert parameters["gpt"] == sum(each.numel() for each in theirs.parameters()) == 6_050_882_784
    # whisper-small has 241.7 million parameters, 88.2 of them in its encoder.
    assert round(parameters["decoder"] / 1e6, 1) == 153.6
    assert (gpt.cached, gpt.length - gpt.prompt) == (104, 90)


def test_models_of_jobs_by_name() -> None:
    def spec_of(model: str, **more: Any) -> Any:
        return job_spec(Job(name="a", model=model, **more))

    assert spec_of("gpt").name == "originals/gpt" and spec_of("gpt").labels == ("text", "float16")
    assert spec_of("bert", dtype="half").labels == ("text", "float16")
    assert spec_of("whisper").input_shape == (80, 3000)
    tiny = spec_of("resnet_tiny", dtype="fp16")
    assert tiny.channels_last and tiny.labels == ("image", "float16", "channels_last")
    assert next(spec_of("originals/tiny-gpt").build().parameters()).dtype is torch.float32
    with pytest.raises(UnknownName, match="originals/gpt5"):
        spec_of("originals/gpt5")
    with pytest.raises(UnknownName, match="fasterrcnn"):
        spec_of("fasterrcnn_resnet50_fpn")
    with pytest.raises(InvalidConfig, match="size"):
        spec_of("bert", size=(720, 1280))
    with pytest.raises(InvalidConfig, match="int4"):
        spec_of("bert", dtype="int4")
    made = spec_of("torch.nn:Identity", size=(8, 16))
    assert made.input_shape == (3, 8, 16) and isinstance(made.build(), torch.nn.Identity)


def test_diffusion_is_built_in_its_precision() -> None:
    pytest.importorskip("diffusers")
    assert job_spec(Job(name="a", model="diffusion")).name == "diffusion/sdxl"
    spec = job_spec(Job(name="a", model="diffusion/tiny"))
    assert spec.labels == ("text", "float16")
    assert next(spec.build().parameters()).dtype is torch.float16
    with pytest.raises(UnknownName, match="diffusion/none"):
        job_spec(Job(name="a", model="diffusion/none"))


def test_torchvision_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is stood in for."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def get_model(name: str, **more: Any) -> Any:
        calls.append((name, more))
        return torch.nn.Identity()

    module: Any = types.ModuleType("torchvision.models")
    module.get_model = get_model
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    monkeypatch.setattr(models, "find_spec", lambda name: object())
    for model, size, shape in (
        ("resnet50", (0, 0), (3, 224, 224)),
        ("torchvision/vit_l_16", (384, 384), (3, 384, 384)),
        ("fcn_resnet50", (720, 1280), (3, 720, 1280)),
    ):
        spec = job_spec(Job(name="a", model=model, size=size))
        assert spec.input_shape == shape
        assert spec.output == ("out" if model.startswith("fcn") else "")
        spec.build()
    assert calls == [
        ("resnet50", {"weights": None}),
        ("vit_l_16", {"weights": None, "image_size": 384}),
        ("fcn_resnet50", {"weights": None, "weights_backbone": None}),
    ]
    with pytest.raises(InvalidConfig, match="square"):
        job_spec(Job(name="a", model="vit_b_16", size=(720, 1280)))


def test_a_worker_offers_them_as_a_library() -> None:
    specs = worker_specs(WorkerConfig(libraries=("originals",)))
    assert set(originals_specs()) < set(specs)
    assert library_spec("originals/gpt2").input_shape == (10,)
    assert specs["originals/gpt"].labels == ("text", "float16")


def test_every_name_of_profiles_presets_and_originals_is_in_the_one_table() -> None:
    profiled = {solo.model for name in own_profiles() for solo in load_profile(name).solos}
    assert profiled | {*HOTCARBON_MODELS, DETECTOR, TINY_MODEL} <= set(MODELS)
    published = {f"originals/{name}" for name in DESIGNS if not name.startswith("tiny")}
    libraries = {model.library for model in MODELS.values() if model.library}
    assert libraries == published | {"diffusion/sdxl"}
    assert all(can_capture(Job(name="a", model=name)) for name in HOTCARBON_MODELS)
