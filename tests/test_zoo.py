"""The zoo and the operator's own models: reproducible, checked, and nothing else is ever loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slosched.config import ModelProfile, ModelSource, WorkerConfig
from slosched.errors import InvalidConfig, MissingPackage, UnknownName

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from slosched.daemon.backends import reference_forward  # noqa: E402
from slosched.daemon.backends.contract import single_output  # noqa: E402
from slosched.daemon.backends.cpu.measuring import check_model  # noqa: E402
from slosched.daemon.backends.devices import cuda_device, on_cpu  # noqa: E402
from slosched.daemon.backends.sources import source_spec, worker_specs  # noqa: E402
from slosched.daemon.backends.templates import DeviceWeights, Template  # noqa: E402
from slosched.daemon.backends.zoo import ZOO, _MaskedBert  # noqa: E402
from slosched.daemon.profiler import Profiler, profile_model  # noqa: E402
from slosched.signature import Tensor  # noqa: E402
from template_answers import answer, sample  # noqa: E402

pytestmark = pytest.mark.torch


def tiny_net() -> Any:
    """What an operator's factory looks like; test_zoo:tiny_net names it."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def tiny_convolution() -> Any:
    torch.manual_seed(4)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(1),
        torch.nn.Linear(8, 2),
    )


def no_net() -> str:
    return "this is no module"


def run_source(source: ModelSource, batch: Any) -> Any:
    module = source_spec(source).build()
    with torch.inference_mode():
        return single_output(module(batch), len(batch), name=source.name)


#: Prints what the weights of resnet_tiny come to, and whether the global generator was touched.
DIGEST = """
import hashlib, torch
from slosched.daemon.backends.zoo import ZOO
torch.manual_seed(5)
before = torch.random.get_rng_state()
module = ZOO["resnet_tiny"].build()
assert torch.equal(before, torch.random.get_rng_state())
found = hashlib.sha256()
for tensor in module.state_dict().values():
    found.update(tensor.numpy().tobytes())
digest = found.hexdigest()
"""


def test_every_process_builds_the_same_weights_and_leaves_the_global_seed_alone() -> None:
    here: dict[str, Any] = {}
    exec(DIGEST, here)
    code = [sys.executable, "-c", f"{DIGEST}\nprint(digest)"]
    ended = subprocess.run(code, capture_output=True, timeout=60, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == here["digest"]


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18"])
def test_outputs_tell_inputs_apart(name: str) -> None:
    shape = ZOO[name].input_shape
    inputs = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    outputs = reference_forward(name, inputs)
    assert outputs.shape == (2, 1000) and outputs.dtype == np.float32
    assert np.abs(outputs[0] - outputs[1]).max() > 5e-3, "a tolerance of 1e-4 must mean something"
    assert np.abs(outputs).max() < 10
    single = reference_forward(name, inputs[0])
    assert single.shape == (1000,) and np.abs(single - outputs[0]).max() < 1e-4


def test_a_reference_needs_a_known_name_and_the_right_shape() -> None:
    with pytest.raises(UnknownName, match="nope"):
        reference_forward("nope", np.zeros((3, 64, 64)))
    with pytest.raises(InvalidConfig, match=r"\(3, 64, 64\).*not \(3, 32, 32\)"):
        reference_forward("resnet_tiny", np.zeros((3, 32, 32)))


def test_a_template_runs_as_the_module_does_and_without_weights_not_at_all() -> None:
    spec = ZOO["resnet_tiny"]
    template = Template(spec)
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass
    batch = torch.from_numpy(sample(template, 3))
    expected = reference_forward("resnet_tiny", batch.numpy())
    assert np.abs(answer(template, weights, batch).numpy() - expected).max() < 1e-4
    template.forget(weights)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        template._module(batch)


def test_copies_of_a_model_have_weights_of_their_own() -> None:
    template = Template(ZOO["resnet_tiny"])
    first, second = (DeviceWeights(template.host.clone()) for _ in range(2))
    for weights in (first, second):
        while not template.add_views(weights):
            pass
    batch = torch.from_numpy(sample(template, 1))
    expected = answer(template, first, batch)
    for view in second.views:
        view.zero_()
    assert answer(template, second, batch).abs().max() == 0
    assert torch.equal(answer(template, first, batch), expected)


def test_only_the_zoo_and_the_config_can_be_loaded() -> None:
    assert set(worker_specs(WorkerConfig())) == set(ZOO)
    own = ModelSource("mine", factory="test_zoo:tiny_net", input_shape=(4,))
    assert set(worker_specs(WorkerConfig(models=(own,)))) == {*ZOO, "mine"}


def test_a_factory() -> None:
    batch = torch.rand(5, 4)
    source = ModelSource("mine", factory="test_zoo:tiny_net", input_shape=(4,))
    spec = source_spec(source)
    assert (spec.random_weights, spec.input_shape) == (False, (4,))
    assert torch.equal(run_source(source, batch), tiny_net()(batch))


def test_an_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    net, batch = tiny_net(), torch.rand(5, 4)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(net, (batch,), dynamic_shapes=dynamic), path)
    source = ModelSource("mine", pt2=str(path), input_shape=(4,))
    assert torch.allclose(run_source(source, batch), net(batch))
    template = Template(source_spec(source))
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass
    assert torch.allclose(answer(template, weights, batch), net(batch))


class Weighted(torch.nn.Module):  # type: ignore[misc]
    """Two inputs of any length, one of them by keyword alone."""

    def forward(self, x: Any, *, mask: Any) -> dict[str, Any]:
        return {"mean": (x * mask).sum(1) / mask.sum(1), "doubled": x * 2}


def exported(path: Path, length: Any) -> None:
    dim = torch.export.Dim
    extents = {0: dim("batch", min=1, max=64), 1: length}
    given = torch.rand(3, 8)
    program = torch.export.export(
        Weighted(),
        (given,),
        {"mask": torch.ones(3, 8)},
        dynamic_shapes={"x": extents, "mask": extents},
    )
    torch.export.save(program, path)


def test_an_exported_program_says_its_inputs_and_which_dimensions_vary(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    exported(path, torch.export.Dim("length", min=2, max=32))
    template = Template(source_spec(ModelSource("mine", pt2=str(path), lengths=(8, 16))))
    assert template.spec.takes == tuple(Tensor(n, "float32", (-1,)) for n in ("x", "mask"))
    assert check_model(template) == (
        Tensor("mean", "float32", ()),
        Tensor("doubled", "float32", (-1,)),
    )
    for more, words in (
        ({}, r"x float32\[-1\], mask float32\[-1\] has a dimension of -1, and no lengths"),
        (
            {"input_shape": (4,)},
            r"takes x float32\[-1\], mask float32\[-1\]: leave input_shape out",
        ),
        (
            {"inputs": (Tensor("y", "float32", (4,)),)},
            r"takes x float32.*says y float32\[4\]; leave",
        ),
    ):
        with pytest.raises(InvalidConfig, match=words):
            Template(source_spec(ModelSource("mine", pt2=str(path), **more)))
    too_long = ModelSource("mine", pt2=str(path), lengths=(8, 64))
    with pytest.raises(InvalidConfig, match=r"does not run on x float32.*or lengths"):
        check_model(Template(source_spec(too_long)))
    exported(path, None)  # of one length alone
    fixed = Template(source_spec(ModelSource("mine", pt2=str(path))))
    assert fixed.spec.takes == tuple(Tensor(name, "float32", (8,)) for name in ("x", "mask"))
    assert check_model(fixed)[1] == Tensor("doubled", "float32", (8,))


def test_bert_with_a_mask_answers_as_the_library_does_at_any_length() -> None:
    small: Any = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attn_implementation="sdpa",
    )
    torch.manual_seed(7)
    bert = transformers.BertForSequenceClassification(small).eval()
    ids = torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.inference_mode():
        found = _MaskedBert(bert)(ids, mask).logits
        assert torch.allclose(found, bert(ids, attention_mask=mask).logits, atol=1e-6)
        alone = bert(ids[:1, :4]).logits
        assert torch.allclose(found[:1], alone, atol=1e-5)


@pytest.mark.parametrize("dtype, off", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_an_operators_images_in_channels_last(tmp_path: Path, dtype: str, off: float) -> None:
    net, batch = tiny_convolution().eval(), torch.rand(1, 3, 8, 8)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (batch,)), path)  # for a batch of one, and no other
    shared: Any = {"input_shape": (3, 8, 8), "dtype": dtype, "channels_last": True}
    sources = (
        ModelSource("made", factory="test_zoo:tiny_convolution", **shared),
        ModelSource("exported", pt2=str(path), **shared),
    )
    with torch.inference_mode():
        expected = net(batch)
    for source in sources:
        spec = source_spec(source)
        assert spec.labels == (dtype,) * (dtype != "float32") + ("channels_last",)
        template = Template(spec)
        weights = DeviceWeights(template.host.clone())
        while not template.add_views(weights):
            pass
        assert (answer(template, weights, batch) - expected).abs().max() < off
        kernel = next(view for view in weights.views if view.ndim == 4)
        assert not kernel.is_contiguous() and str(kernel.dtype) == f"torch.{dtype}"
    config = WorkerConfig(device="cpu", models=sources)
    assert set(profile_model("made", config, (1, 2)).exec_ns) == {1, 2}
    assert set(profile_model("exported", config, (1, 2)).exec_ns) == {1}


def test_safetensors_beside_a_config(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
        architectures=["ResNetForImageClassification"],
    )
    net = transformers.ResNetForImageClassification(config).eval()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    source = ModelSource(
        "mine",
        safetensors=str(tmp_path / "model.safetensors"),
        config=str(tmp_path / "config.json"),
        input_shape=(3, 32, 32),
    )
    batch = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = net(batch).logits
    assert torch.allclose(run_source(source, batch), expected, atol=1e-6)
    removed = state.pop("classifier.1.weight")
    assert removed.shape[0] == 3
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InvalidConfig, match=r"lacks \['classifier.1.weight'\]"):
        source_spec(source).build()


@pytest.mark.parametrize(
    "source, words",
    [
        (ModelSource("m", factory="no.such:thing"), "no.such:thing"),
        (ModelSource("m", factory="test_zoo"), "package.module:function"),
        (ModelSource("m", factory="test_zoo:no_net"), "returned a str"),
    ],
)
def test_sources_that_build_nothing(source: ModelSource, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        source_spec(source).build()


@pytest.mark.parametrize(
    "source, words",
    [
        (ModelSource("m", pt2="/no/such.pt2"), "there is no file /no/such.pt2"),
        (ModelSource("m"), "say where it comes from.*resnet50"),
        (
            ModelSource("resnet50", input_shape=(3, 64, 64)),
            r"takes \[3, 224, 224\], not \[3, 64, 64\]",
        ),
        (ModelSource("bert_base", channels_last=True), r"channels_last is for .* not \(128,\)"),
        (ModelSource("m", factory="a:b", input_shape=(4,), channels_last=True), r"not \(4,\)"),
    ],
)
def test_sources_that_are_refused_at_start(source: ModelSource, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        source_spec(source)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"PK nonsense")
    with pytest.raises(InvalidConfig, match="is not an exported program"):
        source_spec(ModelSource("m", pt2=str(path), input_shape=(4,))).build()


def test_a_library_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match="models of timm need it"):
        source_spec(ModelSource("timm/resnet10t", input_shape=(3, 224, 224)))


def test_profiling_measures_what_was_asked_for() -> None:
    said: list[str] = []
    config = WorkerConfig(device="cpu")
    profile = profile_model("resnet_tiny", config, (1, 2), progress=said.append)
    assert isinstance(profile, ModelProfile)
    assert set(profile.exec_ns) == {1, 2} and profile.weights_ns > 0
    assert profile.weights_bytes >= 1_487_240 * 4
    assert (profile.input_shape, profile.output_shape) == ((3, 64, 64), (1000,))
    assert len(said) == 2
    with pytest.raises(UnknownName, match="nope"):
        profile_model("nope", config, (1,))
    emulated = WorkerConfig(device="emulated")
    assert profile_model("resnet50_v2", emulated, (1, 4)).exec_ns == {1: 2_600_000, 4: 5_600_000}


def test_a_model_under_an_alias_is_measured_under_its_canonical_name() -> None:
    own = ModelSource("resnet18_v2", factory="test_zoo:tiny_net", input_shape=(4,))
    with Profiler(WorkerConfig(device="cpu", models=(own,))) as profiler:
        assert profiler.names == tuple(ZOO)
        for name in ("resnet18_v2", "resnet18"):
            measured = profiler.measure(name, (1,))
            assert (measured.name, measured.input_shape) == ("resnet18", (4,))


def test_devices_by_name() -> None:
    assert on_cpu("cpu") and not on_cpu("cuda:0")
    with pytest.raises(InvalidConfig, match="cuda:99"):
        cuda_device("cuda:99")
    with pytest.raises(InvalidConfig, match="cuda:x"):
        cuda_device("cuda:x")
