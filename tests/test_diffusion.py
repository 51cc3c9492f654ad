"""Diffusion models built from configs: they compute what diffusers' own pipelines do, and can be served."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from slosched.config import ModelSource, WorkerConfig
from slosched.errors import InvalidConfig, MissingPackage, UnknownName
from slosched.signature import Tensor, joined
from slosched.workloads.prompt_tokens import BEGIN, END, TOKENS, hashed_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from cpu_rig import CpuRig  # noqa: E402
from slosched.daemon.backends import reference_forward  # noqa: E402
from slosched.daemon.backends.checking import profile_of  # noqa: E402
from slosched.daemon.backends.cpu.measuring import check_model  # noqa: E402
from slosched.daemon.backends.diffusion import building  # noqa: E402
from slosched.daemon.backends.diffusion.designs import DESIGNS  # noqa: E402
from slosched.daemon.backends.diffusion.judge import large_judge  # noqa: E402
from slosched.daemon.backends.diffusion.model import DiffusionModel  # noqa: E402
from slosched.daemon.backends.diffusion.noise import normal  # noqa: E402
from slosched.daemon.backends.diffusion.schedule import Schedule  # noqa: E402
from slosched.daemon.backends.diffusion.weights import filled  # noqa: E402
from slosched.daemon.backends.formats import in_format  # noqa: E402
from slosched.daemon.backends.layout import made_up  # noqa: E402
from slosched.daemon.backends.libraries import library_spec, library_specs  # noqa: E402
from slosched.daemon.backends.sources import source_spec, worker_specs  # noqa: E402
from slosched.daemon.backends.templates import Template  # noqa: E402

pytestmark = pytest.mark.torch

TINY = ("diffusion/tiny", "diffusion/tiny+judge", "diffusion/tiny-guided", "diffusion/tiny-xl")
IMAGE, SCORE = Tensor("image", "float32", (3, 16, 16)), Tensor("score", "float32", ())


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: library_spec(name).build() for name in TINY}


def requests(batch: int, seed: int = 0) -> dict[str, Any]:
    """Inputs of `batch` requests by name, tensors (batch, ...)."""
    rows = made_up(library_spec(TINY[0]).takes, batch, seed, high=END)
    return {name: torch.from_numpy(row) for name, row in rows.items()}


# --------------------------------------------------------------------------------- what is built


def millions(module: Any) -> float:
    return float(sum(each.numel() for each in module.parameters())) / 1e6


@pytest.mark.parametrize(
    ("name", "unet", "texts", "decoder"),
    [
        ("sd15", 859.5, [123.1], 49.5),
        ("sd-turbo", 865.9, [340.4], 49.5),
        ("sdxs", 318.7, [340.4], 1.22),
        ("sdxl", 2567.5, [123.1, 694.7], 49.5),
        ("sdxl-lightning", 2567.5, [123.1, 694.7], 49.5),
    ],
)
def test_networks_have_the_published_sizes(
    name: str, unet: float, texts: list[float], decoder: float
) -> None:
    built_unet, built_texts, built_decoder = building.networks(DESIGNS[name])
    assert millions(built_unet) == pytest.approx(unet, rel=1e-3)
    assert [millions(each) for each in built_texts] == pytest.approx(texts, rel=1e-3)
    assert millions(built_decoder) == pytest.approx(decoder, rel=1e-2)
    assert all(each.is_meta for each in built_unet.parameters())


def test_the_library_offers_names_and_builds_nothing() -> None:
    specs = worker_specs(WorkerConfig(libraries=("diffusion",)))
    offered = {name for name in specs if name.startswith("diffusion/")}
    light = {"sd-turbo", "sdxs", "sdxl-lightning", "tiny"}
    names = {*light, "sd15", "sdxl", "tiny-guided", "tiny-xl", *(f"{each}+judge" for each in light)}
    assert offered == {f"diffusion/{name}" for name in names} == set(library_specs("diffusion"))
    assert all(specs[name].score == ("score" if "+" in name else "") for name in offered)
    inputs = (Tensor("tokens", "int32", (TOKENS,)), Tensor("seed", "int64", (1,)))
    assert all(specs[name].takes == inputs and specs[name].random_weights for name in offered)


def test_what_cannot_be_named_or_shaped_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"diffusion.*sd15"):
        source_spec(ModelSource("diffusion/sd16"))
    with pytest.raises(
        InvalidConfig, match=r"takes tokens int32\[77\], seed.*leave input_shape out"
    ):
        source_spec(ModelSource("diffusion/tiny", input_shape=(3, 8, 8)))


def test_without_diffusers_the_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackage, match=r"need diffusers.*slosched\[torch,models,diffusion\]"):
        library_specs("diffusion")


def test_the_large_judge_needs_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    spec = library_spec("diffusion/sdxs+judge")
    with pytest.raises(
        MissingPackage, match=r"judge of diffusion/sdxs\+judge.*or serve diffusion/sdxs,"
    ):
        spec.build()


class _Classifier(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    """In the place of EfficientNetV2-S: what ends a block, and what does not."""

    def __init__(self, weights: None, num_classes: int) -> None:
        super().__init__()
        assert weights is None
        last = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        first = torch.nn.Sequential(
            torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.SiLU()
        )
        self.blocks = torch.nn.Sequential(last, first, torch.nn.Flatten(1))
        self.head = torch.nn.Linear(4 * 224 * 224, num_classes)

    def forward(self, images: Any) -> Any:
        assert images.shape[2:] == (224, 224)
        return self.head(self.blocks(images))


def test_the_large_judge_takes_the_light_models_image(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    vars(models)["efficientnet_v2_s"] = _Classifier
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    judge = large_judge("diffusion/sdxs+judge")
    weights = [
        float(each.weight.detach().mean())
        for each in judge.modules()
        if isinstance(each, torch.nn.BatchNorm2d)
    ]
    assert weights == pytest.approx([0.6, 1.0])
    with torch.inference_mode():
        scores = judge(torch.rand(2, 3, 512, 512))
    assert scores.shape == (2,) and bool(((scores >= 0) & (scores <= 1)).all())


def test_weights_follow_from_the_name_and_keep_the_scale() -> None:
    def network() -> Any:
        with torch.device("meta"):
            return torch.nn.Sequential(torch.nn.Linear(300, 4000), torch.nn.LayerNorm(4000))

    made: list[Any] = [filled(network(), name) for name in ("a", "a", "b")]
    first, again, other = made
    weight = first[0].weight
    assert torch.equal(weight, again[0].weight) and not torch.equal(weight, other[0].weight)
    # 1.2 million numbers of a block of one million: no row is another's.
    assert len({row.tobytes() for row in weight.detach().numpy()}) == 4000
    assert float(weight.detach().std()) == pytest.approx(300**-0.5, rel=0.01)
    assert float(first[1].weight.detach().min()) == 1.0 and not first[0].bias.any()
    with torch.device("meta"):
        odd = torch.nn.PReLU()
    with pytest.raises(TypeError, match=r"no rule for the parameter \.weight"):
        filled(odd, "a")


# ------------------------------------------------------------------------------ prompts and noise


def test_prompts_become_tokens() -> None:
    tokens = hashed_tokens("A red fox, a RED fox")
    assert len(tokens) == TOKENS and tokens[0] == BEGIN and tokens[7:] == [END] * 70
    assert tokens[1] == tokens[4] and tokens[2] == tokens[5] and len(set(tokens[1:7])) == 4
    assert tokens == hashed_tokens("a red  fox,\na red fox") != hashed_tokens("a red fox")
    assert hashed_tokens("") == [BEGIN] + [END] * 76
    long = hashed_tokens("word " * 100)
    assert long[-1] == END and long.count(BEGIN) == 1 and len(long) == TOKENS
    assert all(0 <= each < BEGIN for each in hashed_tokens("\ud800 é 漢")[1:4])


def test_noise_is_normal_and_each_rows_own() -> None:
    seeds = torch.tensor([0, 1, -1, 2**40, 2**40 + 1, 2**63 - 1])
    noise = normal(seeds, (4, 65, 63))
    assert noise.shape == (6, 4, 65, 63) and noise.dtype == torch.float32
    flat = noise.flatten(1)
    assert bool(torch.isfinite(flat).all())
    assert flat.mean(1).abs().max() < 0.03 and (flat.std(1) - 1).abs().max() < 0.03
    assert (flat.pow(4).mean(1) - 3).abs().max() < 0.25  # a normal number's fourth moment
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.04
    half = flat.shape[1] // 2
    assert torch.corrcoef(torch.stack([flat[0, :half], flat[0, half:]]))[0, 1].abs() < 0.04
    for place in range(6):
        assert torch.equal(normal(seeds[place : place + 1], (4, 65, 63))[0], noise[place])


def test_noise_is_the_hash_of_seed_and_place() -> None:
    def mixed(value: int) -> int:
        value ^= value >> 16
        value = value * 0x7FEB352D % 2**32
        value ^= value >> 15
        value = value * 0x846CA68B % 2**32
        return value ^ value >> 16

    seed, pair = 123_456_789_012_345, 2
    key = mixed(seed % 2**32 ^ mixed(seed >> 32 ^ 0x9E3779B9))
    first, second = (
        (mixed(mixed(pair ^ stream) ^ key) >> 8) for stream in (0x9E3779B9, 0x85EBCA6B)
    )
    wanted = math.sqrt(-2 * math.log((first + 0.5) / 2**24)) * math.cos(math.tau * second / 2**24)
    found = normal(torch.tensor([seed]), (10,))
    assert float(found[0, pair]) == pytest.approx(wanted, abs=1e-5)


# --------------------------------------------------------------- the same as diffusers' pipelines

_EULER = DESIGNS["tiny-xl"]
_TRAILING = replace(_EULER, schedule={**_EULER.schedule, "timestep_spacing": "trailing"})
SCHEDULES = {
    "ddim": DESIGNS["tiny-guided"],
    "ddim 50": replace(DESIGNS["tiny-guided"], steps=50),
    "euler 50": replace(_EULER, steps=50),
    "one step": replace(_TRAILING, steps=1, guidance=0.0),
    "two steps": replace(_TRAILING, steps=2, guidance=0.0),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_steps_are_the_schedulers(name: str, models: dict[str, Any]) -> None:
    design = SCHEDULES[name]
    unet = models["diffusion/tiny"].unet
    states: Any = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    theirs, table = building.scheduler(design), Schedule(building.scheduler(design), design.steps)
    theirs.set_timesteps(design.steps)
    assert table.first_scale == pytest.approx(float(theirs.init_noise_sigma))
    ours = latents = normal(torch.tensor([5, 6]), (4, 8, 8)) * table.first_scale
    with torch.inference_mode():
        for place, time in enumerate(theirs.timesteps):
            scaled = theirs.scale_model_input(latents, time)
            noise = unet(scaled, time, encoder_hidden_states=states).sample
            number = torch.full((2,), place)
            scale, own_time, keep, move = (each[:, None, None, None] for each in table.at(number))
            assert torch.allclose(ours * scale, scaled, atol=1e-4)
            assert bool((own_time == time).all())
            ours = ours * keep + noise * move
            latents = theirs.step(noise, time, latents).prev_sample
            scale_of = float(latents.abs().max())
            assert float((ours - latents).abs().max()) < 1e-4 * scale_of, place
    assert torch.equal(table.at(torch.tensor([design.steps]))[1], table.at(number[:1])[1])


def test_a_scheduler_with_a_history_is_refused() -> None:
    with pytest.raises(ValueError, match="runs 11 times for 10 steps"):
        Schedule(diffusers.PNDMScheduler(skip_prk_steps=True), 10)
    clipping = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.raises(ValueError, match="not linear"):
        Schedule(clipping, 10)


def their_autoencoder(model: Any) -> Any:
    scale = model.design.latent_scale
    whole = diffusers.AutoencoderKL(**model.design.decoder, scaling_factor=scale)
    whole.post_quant_conv, whole.decoder = model.decoder[0], model.decoder[1]
    return whole.eval()


def their_image(model: Any, given: Mapping[str, Any]) -> Any:
    """What diffusers' pipeline makes of the same networks, states of texts and first latents."""
    design = model.design
    _, _, states, *vectors = model.begin(**given)
    parts: dict[str, Any] = {
        "vae": their_autoencoder(model),
        "text_encoder": None,
        "tokenizer": None,
        "unet": model.unet,
        "scheduler": building.scheduler(design),
    }
    call: dict[str, Any] = {
        "prompt_embeds": states[:, -1],
        "negative_prompt_embeds": states[:, 0] if design.guidance else None,
        "latents": normal(given["seed"][:, 0], (4, design.latent, design.latent)),
        "num_inference_steps": design.steps,
        "guidance_scale": design.guidance,
        "output_type": "pt",
    }
    if design.sized:
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
        call["pooled_prompt_embeds"] = vectors[0][:, -1]
        call["negative_pooled_prompt_embeds"] = vectors[0][:, 0] if design.guidance else None
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**call).images


def of_two_steps(model: Any) -> DiffusionModel:
    """The networks of `model` as SDXL-Lightning runs them."""
    design = SCHEDULES["two steps"]
    return DiffusionModel(
        design,
        unet=model.unet,
        texts=model.texts,
        decoder=model.decoder,
        schedule=Schedule(building.scheduler(design), design.steps),
        judge=None,
    )


@pytest.mark.parametrize(
    "name", ["diffusion/tiny", "diffusion/tiny-guided", "diffusion/tiny-xl", "two steps"]
)
def test_images_are_those_of_diffusers_pipelines(name: str, models: dict[str, Any]) -> None:
    two = name == "two steps"
    model = of_two_steps(models["diffusion/tiny-xl"]) if two else models[name]
    given = requests(2, 3)
    with torch.inference_mode():
        ours, theirs = model(**given)["image"], their_image(model, given)
    assert ours.shape == theirs.shape == (2, 3, 16, 16)
    assert float(ours.std()) > 0.05
    assert float((ours - theirs).abs().max()) < 2e-3


def test_an_autoencoder_of_the_small_kind_decodes_as_diffusers_does() -> None:
    design = replace(
        DESIGNS["tiny"], decoder={"decoder_block_out_channels": (8,) * 4}, tiny_decoder=True
    )
    _, _, decoder = building.networks(design)
    ours = building._centred(filled(decoder, "small"))
    whole = diffusers.AutoencoderTiny(**design.decoder)
    whole.decoder = ours
    latents = normal(torch.tensor([3]), (4, 8, 8))
    with torch.inference_mode():
        assert torch.equal(whole.decode(latents).sample, ours(latents))
        image = ours(latents) / 2 + 0.5
    assert image.shape == (1, 3, 64, 64) and 0.3 < float(image.mean()) < 0.7


# -------------------------------------------------------------------------------- how it is served


@pytest.mark.parametrize("name", TINY)
def test_parts_and_the_whole_say_the_same(name: str, models: dict[str, Any]) -> None:
    model, given = models[name], requests(3)
    with torch.inference_mode():
        whole = model(**given)
        state = model.begin(**given)
        shapes = [(each.shape, each.dtype) for each in state]
        for place in range(model.steps):
            before = [each.clone() for each in state]
            after = model.step(*state)
            assert all(torch.equal(*pair) for pair in zip(before, state, strict=True))
            assert [(each.shape, each.dtype) for each in after] == shapes
            state = after
            assert state[1].tolist() == [place + 1] * 3
        parts = model.finish(*state)
    assert list(parts) == (["image", "score"] if "judge" in name else ["image"])
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_prompt_and_seed_both_matter_and_nothing_else(models: dict[str, Any]) -> None:
    for name in TINY:
        model, given = models[name], requests(2)
        mixed = {"tokens": given["tokens"], "seed": given["seed"].flip(0)}
        both = {key: torch.cat([given[key], mixed[key]]) for key in given}
        with torch.inference_mode():
            first, second, third, fourth = model(**both)["image"]
            again = model(**both)["image"]
        assert torch.equal(again[0], first)
        # Rows 0 and 2 share the prompt, 0 and 3 the seed.
        assert (first - third).abs().max() > 0.1 and (first - fourth).abs().max() > 0.01
        assert (first - second).abs().max() > 0.1


def test_a_judge_changes_no_image(models: dict[str, Any]) -> None:
    given = requests(4)
    with torch.inference_mode():
        plain, judged = (models[name](**given) for name in TINY[:2])
    assert torch.equal(plain["image"], judged["image"])
    assert bool(((judged["score"] > 0) & (judged["score"] < 1)).all())
    assert len(set(judged["score"].tolist())) == 4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in TINY), (TINY[1], "bfloat16"), (TINY[2], "float16")],
)
def test_rows_follow_their_inputs_alone(name: str, dtype: str) -> None:
    template = Template(in_format(library_spec(name), dtype, channels_last=False))
    gives = check_model(template)
    assert gives == ((IMAGE, SCORE) if "judge" in name else (IMAGE,))
    assert template.own_state == () and template.precision == dtype
    profile = profile_of(template.spec, gives, {0: {1: 1000}}, 1, template.weights_bytes)
    assert profile.answers == (IMAGE,) and profile.score == ("score" if "judge" in name else "")


def test_the_schedule_keeps_its_digits_in_half_precision(models: dict[str, Any]) -> None:
    spec = library_spec("diffusion/tiny-guided")
    numbers = torch.arange(10)
    wanted = models["diffusion/tiny-guided"].schedule.at(numbers)
    for dtype in ("float16", "bfloat16"):
        model: Any = in_format(spec, dtype, channels_last=False).build()
        assert all(map(torch.equal, model.schedule.at(numbers), wanted))
        with torch.inference_mode():
            image = model(**requests(1))["image"]
        assert image.dtype == torch.float32 and bool(torch.isfinite(image).all())
    assert wanted[1].tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]


@pytest.fixture(scope="module")
def rig() -> Iterator[CpuRig]:
    names = ("diffusion/tiny+judge", "diffusion/tiny-guided")
    with CpuRig([ModelSource(name) for name in names]) as rig:
        for model_id, name in enumerate(names):
            prepared = rig.prepare(name, max_batch=2)
            assert prepared.code == 0, prepared.reason
            assert rig.load(name, model_id).code == 0
        yield rig


@pytest.mark.processes
def test_a_worker_on_the_cpu_serves_a_light_and_a_heavy_model(
    rig: CpuRig, models: dict[str, Any]
) -> None:
    prompts = ("a fox in the snow", "")
    asked: list[dict[str, Any]] = [
        {
            "tokens": np.array(hashed_tokens(prompt), np.int32),
            "seed": np.array([seed], np.int64),
        }
        for seed, prompt in enumerate(prompts)
    ]
    frames = [bytes(joined([each.tobytes() for each in one.values()])) for one in asked]
    for model_id, name in enumerate(("diffusion/tiny+judge", "diffusion/tiny-guided")):
        done, answers = rig.ask(name, frames, model_id)
        assert done.code == 0, done.reason
        for one, answer in zip(asked, answers, strict=True):
            image = np.frombuffer(answer, np.float32).reshape(3, 16, 16)
            assert np.abs(image - reference_forward(name, one)).max() < 2e-3
        assert len(done.scores) == (0 if model_id else 2)
        if not model_id:
            batch = {
                key: torch.from_numpy(np.stack([one[key] for one in asked])) for key in asked[0]
            }
            with torch.inference_mode():
                scores = models[name](**batch)["score"].numpy()
            assert np.allclose(done.scores, scores, atol=1e-4)
