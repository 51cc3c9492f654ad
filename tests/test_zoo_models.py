"""Each network of the zoo: what it takes and gives, and that a CUDA graph could hold it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from slosched.config import WorkerConfig  # noqa: E402
from slosched.daemon.backends.contract import single_output  # noqa: E402
from slosched.daemon.backends.formats import in_format  # noqa: E402
from slosched.daemon.backends.sources import worker_specs  # noqa: E402
from slosched.daemon.backends.templates import DeviceWeights, Template  # noqa: E402
from slosched.daemon.backends.zoo import ZOO, import_zoo  # noqa: E402
from template_answers import answer  # noqa: E402

pytestmark = pytest.mark.torch

#: Parameters in millions, and the shape of one output. From the papers and model cards.
EXPECTED = {
    "resnet_tiny": (1.5, (1000,)),
    "resnet18": (11.7, (1000,)),
    "resnet50": (25.6, (1000,)),
    "resnet101": (44.5, (1000,)),
    "resnet152": (60.2, (1000,)),
    "mobilenet_v2": (3.5, (1000,)),
    "vit_base": (86.6, (1000,)),
    "bert_base": (109.5, (2,)),
    "bert_large": (335.1, (2,)),
    "bert_masked": (109.5, (2,)),
    "gpt2": (124.4, (50257,)),
    "whisper": (20.6, (15, 512)),
}
#: Built in full here; the others would take a test gigabytes or minutes.
BUILT = ("mobilenet_v2",)
LARGE = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("resnet101", "vit_base", "gpt2", "whisper")
]


def inputs(name: str, batch: int, device: str = "cpu") -> Any:
    """The only input of a model that has one."""
    spec = ZOO[name]
    shape = (batch, *spec.input_shape)
    random = torch.Generator().manual_seed(0)
    if spec.input_dtype == "int64":
        return torch.randint(0, spec.input_high, shape, generator=random).to(device)
    return torch.rand(shape, generator=random).to(device)


@cache
def direct(name: str) -> Any:
    """Outputs of two different inputs, by the module itself."""
    with torch.inference_mode():
        return single_output(ZOO[name].build()(inputs(name, 2)), 2, name=name)


def served(spec: Any, batch: int = 2) -> tuple[Template, Any]:
    """The template of `spec` and its outputs of the same inputs, or the first of them."""
    template = Template(spec)
    weights = DeviceWeights(template.host)
    while not template.add_views(weights):
        pass
    return template, answer(template, weights, inputs(spec.name, 2)[:batch])


def test_every_network_is_listed_here() -> None:
    assert set(EXPECTED) == set(ZOO)
    import_zoo()


@pytest.mark.parametrize("name", list(EXPECTED))
def test_size_and_shapes_and_no_step_that_looks_at_a_value(name: str) -> None:
    # Tensors on the meta device have no values, so a forward pass that branched on one, which no
    # CUDA graph can hold, would fail here.
    millions, output_shape = EXPECTED[name]
    with torch.device("meta"):
        module = ZOO[name].build()
    spec = ZOO[name]
    given = [inputs(name, 3, device="meta")] if len(spec.takes) == 1 else []
    more = {
        tensor.name: torch.ones((3, *tensor.shape_at(48)), dtype=torch.int64, device="meta")
        for tensor in spec.takes[len(given) :]
    }
    with torch.inference_mode():
        output = single_output(module(*given, **more), 3, name=name)
    assert (output.shape, output.dtype) == ((3, *output_shape), torch.float32)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert not module.training


@pytest.mark.parametrize("name", [*BUILT, *LARGE])
def test_a_template_answers_as_the_module_and_tells_inputs_apart(name: str) -> None:
    _, output = served(ZOO[name])
    assert torch.isfinite(output).all() and output.abs().max() < 10
    assert (output - direct(name)).abs().max() < 1e-4
    assert (output[0] - output[1]).abs().max() > 5e-3


@pytest.mark.slow
def test_gpt2_answers_as_the_library_does_with_its_own_causal_mask() -> None:
    module: Any = ZOO["gpt2"].build()
    with torch.inference_mode():
        expected = module.model(inputs("gpt2", 2)).logits[:, -1]
    assert (direct("gpt2") - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["resnet_tiny", "mobilenet_v2"])
def test_in_bfloat16_a_network_says_roughly_the_same(name: str) -> None:
    template, output = served(in_format(ZOO[name], "bfloat16", channels_last=False), batch=1)
    assert output.dtype == torch.float32
    assert template.weights_bytes < 2.3e6 * EXPECTED[name][0]
    apart = (direct(name)[0] - direct(name)[1]).abs().max()
    off = (output[0] - direct(name)[0]).abs().max()
    assert 0 < off < apart / 3, "closer to the answer to its own input than to another's"


@pytest.mark.parametrize("name", ["resnet_tiny", "mobilenet_v2"])
def test_channels_last_changes_where_weights_lie_and_not_what_they_say(name: str) -> None:
    spec = in_format(ZOO[name], "float32", channels_last=True)
    assert spec.labels == ("image", "channels_last")
    template, output = served(spec)
    assert (output - direct(name)).abs().max() < 1e-4
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass
    convolutions = [v for v in weights.views if v.ndim == 4 and min(v.shape[1:3]) > 1]
    assert convolutions
    for view in convolutions:
        assert view.is_contiguous(memory_format=torch.channels_last) and not view.is_contiguous()
    seen: list[Any] = []
    template._module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    answer(template, weights, inputs(name, 2))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_a_workers_precision_is_for_the_models_that_its_config_does_not_name() -> None:
    from slosched.config import ModelSource

    named = (
        ModelSource("resnet50"),
        ModelSource("resnet18_v2", dtype="bfloat16", channels_last=True),
        ModelSource("kernels", cupy="package.module:function", input_shape=(8,)),
    )
    specs = worker_specs(WorkerConfig(dtype="float16", channels_last=True, models=named))
    assert set(specs) == set(ZOO), "what is for CuPy is no torch model"
    assert specs["resnet_tiny"].labels == ("image", "float16", "channels_last")
    assert specs["bert_base"].labels == ("text", "float16")
    assert specs["resnet50"] is ZOO["resnet50"]
    assert specs["resnet18"].labels == ("image", "bfloat16", "channels_last")
    module = specs["resnet_tiny"].build()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}


def test_strides_of_weights_that_have_gaps_or_overlap_become_plain() -> None:
    class Odd(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gaps = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4)[:, ::2])
            self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
            self.register_buffer("repeated", torch.tensor([[7.0]]).expand(2, 2))

        def forward(self, batch: Any) -> Any:
            parts = (
                self.gaps.sum(),
                (self.turned @ torch.tensor([1.0, 10.0])).sum(),
                self.repeated.sum(),
            )
            return batch + torch.stack(parts)

    from slosched.daemon.backends.zoo import ModelSpec

    template = Template(ModelSpec("odd", lambda: Odd().eval(), (3,)))
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass
    assert [view.stride() for view in weights.views] == [(2, 1), (1, 3), (2, 1)]
    output = answer(template, weights, torch.from_numpy(np.zeros((1, 3), np.float32)))
    expected = torch.tensor([[30.0, 0 + 1 + 2 + 10 * (3 + 4 + 5), 28.0]])
    assert torch.equal(output, expected)
