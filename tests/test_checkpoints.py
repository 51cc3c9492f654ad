"""Checkpoints of a dozen architectures, those that must be refused, and errors that say what is possible."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slosched.config import ModelSource
from slosched.config_file import load_worker_config
from slosched.errors import InvalidConfig

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from slosched.daemon.backends.sources import explain_forward_error, source_spec  # noqa: E402
from slosched.daemon.backends.zoo import ModelSpec  # noqa: E402
from slosched.signature import Tensor  # noqa: E402

pytestmark = pytest.mark.torch

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_IMAGE = {**_TEXT, "image_size": 32, "patch_size": 8, "num_labels": 5}
_DISTIL = {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
_GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONV = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}

#: class -> config class and values. Tied and untied, text and images, decoders and encoders.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", _GPT2),
    "LlamaForCausalLM": ("LlamaConfig", {**_TEXT, "tie_word_embeddings": True}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**_TEXT, "num_key_value_heads": 2}),
    "BertForMaskedLM": ("BertConfig", _TEXT),
    "BertModel": ("BertConfig", _TEXT),
    "RobertaForSequenceClassification": ("RobertaConfig", _TEXT),
    "DistilBertForMaskedLM": ("DistilBertConfig", _DISTIL),
    "ElectraForMaskedLM": ("ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "ViTForImageClassification": ("ViTConfig", _IMAGE),
    "DeiTForImageClassification": ("DeiTConfig", _IMAGE),
    "ResNetForImageClassification": ("ResNetConfig", {**_CONV, "embedding_size": 8}),
    "ConvNextForImageClassification": ("ConvNextConfig", {**_CONV, "num_stages": 2}),
}


def original(name: str) -> Any:
    kind, values = CHECKPOINTS[name]
    torch.manual_seed(1)
    return getattr(transformers, name)(getattr(transformers, kind)(**values)).eval()


def saved(model: Any, folder: Path, **options: Any) -> ModelSource:
    """What save_pretrained writes, as a source; the shape is that of a test's inputs."""
    model.save_pretrained(folder, **options)
    images = model.main_input_name == "pixel_values"
    return ModelSource(
        "mine",
        safetensors=str(folder / "model.safetensors"),
        config=str(folder / "config.json"),
        input_shape=(3, 32, 32) if images else (7,),
        input_dtype="float32" if images else "int64",
    )


def batch_for(source: ModelSource) -> Any:
    torch.manual_seed(2)
    if source.input_dtype == "int64":
        return torch.randint(3, 64, (2, *source.input_shape))
    return torch.rand(2, *source.input_shape)


def edit_config(source: ModelSource, **changes: Any) -> None:
    values = json.loads(Path(source.config).read_text())
    values.update(changes)
    kept = {key: value for key, value in values.items() if value is not None}
    Path(source.config).write_text(json.dumps(kept))


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_what_save_pretrained_wrote_answers_as_the_original(name: str, tmp_path: Path) -> None:
    model = original(name)
    source = saved(model, tmp_path)
    batch = batch_for(source)
    built = source_spec(source).build()
    assert not any(module.training for module in built.modules())
    with torch.inference_mode():
        expected, found = model(batch), built(batch)
    if hasattr(expected, "logits"):
        assert torch.allclose(found.logits, expected.logits, atol=1e-6)
    else:  # several tensors, of which the worker's file names one
        assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-6)


def test_a_checkpoint_in_half_precision_is_built_in_float32(tmp_path: Path) -> None:
    source = saved(original("BertForMaskedLM").half(), tmp_path)
    assert {p.dtype for p in source_spec(source).build().parameters()} == {torch.float32}


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    model = original("GPT2LMHeadModel")
    source = saved(model, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with pytest.raises(InvalidConfig, match=r"several files: name model\.safetensors\.index\.json"):
        source_spec(source)
    index = tmp_path / "model.safetensors.index.json"
    whole = ModelSource(**{**vars(source), "safetensors": str(index)})
    batch = batch_for(source)
    with torch.inference_mode():
        assert torch.allclose(
            source_spec(whole).build()(batch).logits, model(batch).logits, atol=1e-6
        )


def outputs_of(model: Any, batch: Any) -> list[Any]:
    with torch.inference_mode():
        found = model(batch)
    return [each for each in found.to_tuple() if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_the_outputs_are_those_of_transformers_own_loading_bit_by_bit(
    name: str, shards: bool, tmp_path: Path
) -> None:
    source = saved(original(name), tmp_path, **({"max_shard_size": "4KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    kind = getattr(transformers, name)
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    whole = ModelSource("mine", transformers=str(tmp_path), input_shape=source.input_shape)
    ours = source_spec(whole).build()
    batch = batch_for(source)
    found, expected = outputs_of(ours, batch), outputs_of(theirs, batch)
    assert found and len(found) <= len(expected)  # ours has no cache
    for one, other in zip(found, expected, strict=False):
        assert torch.equal(one, other)


def index_of(folder: Path, weights: dict[str, dict[str, float]], listed: dict[str, str]) -> str:
    """Files of weights by name, and an index that says `listed` of them. Returns what is wrong with them."""
    from safetensors.torch import save_file

    original("BertForMaskedLM").config.save_pretrained(folder)
    edit_config(
        ModelSource("mine", safetensors="x", config=str(folder / "config.json")),
        architectures=["BertForMaskedLM"],
    )
    for file, values in weights.items():
        save_file({key: torch.full((1,), value) for key, value in values.items()}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    source = ModelSource(
        "mine", safetensors=str(index), config=str(folder / "config.json"), input_shape=(7,)
    )
    with pytest.raises(InvalidConfig) as caught:
        source_spec(source).build()
    return str(caught.value)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weights", "listed", "words"),
    [
        ({ONE: {"a": 1}}, {"a": ONE, "b": ONE}, "lacks ['b'], and has nothing beyond"),
        ({ONE: {"a": 1, "c": 1}}, {"a": ONE}, "lacks nothing, and has ['c'] beyond"),
        ({ONE: {"a": 1}, TWO: {"a": 2, "b": 1}}, {"a": ONE, "b": TWO}, "has ['a'] beyond"),
        ({ONE: {"a": 1}}, {"a": ONE, "b": TWO}, f"lists {TWO!r}, and there is no such file"),
        ({ONE: {"a": 1}}, {"a": "../elsewhere.safetensors"}, "files beside it are read"),
        ({ONE: {"a": 1}}, {"a": "/etc/passwd"}, "files beside it are read"),
        ({ONE: {"a": 1}}, {"a": ".."}, "files beside it are read"),
        ({ONE: {"a": 1}}, {"a": "x" * 5_000}, "only .safetensors files beside it are read"),
        ({ONE: {"a": 1}}, {}, 'no "weight_map"'),
    ],
)
def test_what_is_wrong_with_several_files_is_said(
    weights: dict[str, dict[str, float]], listed: dict[str, str], words: str, tmp_path: Path
) -> None:
    said = index_of(tmp_path, weights, listed)
    assert words in said and len(said) < 600


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    saved(original("BertForMaskedLM"), tmp_path, max_shard_size="4KB")
    [*files] = sorted(tmp_path.glob("model-*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-8])
    with pytest.raises(InvalidConfig, match=rf"{files[1].name} is not a whole file of safetensors"):
        source_spec(ModelSource("mine", transformers=str(tmp_path), input_shape=(7,))).build()


def test_a_weight_that_an_index_lists_twice_is_not_guessed(tmp_path: Path) -> None:
    saved(original("BertForMaskedLM"), tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}')
    with pytest.raises(InvalidConfig, match="it has 'a' twice"):
        source_spec(ModelSource("mine", transformers=str(tmp_path), input_shape=(7,))).build()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = saved(original("ViTForImageClassification"), tmp_path)
    weights = load_file(source.safetensors)
    weights.pop("classifier.bias")
    weights["stray"] = torch.zeros(1)
    weights["classifier.weight"] = torch.zeros(2, 2)
    save_file(weights, source.safetensors)
    with pytest.raises(
        InvalidConfig,
        match=r"lacks \['classifier\.bias'\], has unknown \['stray'\], of another shape "
        r"\['classifier\.weight \[2, 2\] instead of \[5, 16\]'\]",
    ):
        source_spec(source).build()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"architectures": None},
            "names no architectures.*of model_type .bert. are .*BertForMaskedLM",
        ),
        ({"model_type": None}, 'no "model_type"'),
        ({"architectures": ["OurOwnBert"]}, "OurOwnBert.*write a factory"),
        ({"architectures": ["AutoConfig"]}, "AutoConfig.*write a factory"),
        ({"attn_implementation": "somebody/kernels"}, "somebody/kernels.*downloaded"),
        ({"quantization_config": {"quant_method": "gptq"}}, "dequantized"),
        ({"use_pretrained_backbone": True}, "use_pretrained_backbone"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = saved(original("BertForMaskedLM"), tmp_path)
    edit_config(source, **changes)
    with pytest.raises(InvalidConfig, match=words):
        source_spec(source).build()


def test_code_beside_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    source = saved(original("BertForMaskedLM"), tmp_path)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('run')\n")
    edit_config(source, auto_map={"AutoModelForMaskedLM": "modeling_own.Own"})
    assert source_spec(source).build() is not None


# ------------------------------------------------------------------------ a folder


def folder_of(path: Path, **more: Any) -> ModelSource:
    return ModelSource("mine", transformers=str(path), **more)


def test_a_folder_is_served_with_ids_and_a_mask_of_any_length(tmp_path: Path) -> None:
    from slosched.daemon.backends.cpu.measuring import check_model
    from slosched.daemon.backends.templates import Template

    model = original("BertModel")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    template = Template(source_spec(folder_of(tmp_path, lengths=(8, 16))))
    ids, mask = (Tensor(name, "int64", (-1,)) for name in ("input_ids", "attention_mask"))
    assert template.spec.takes == (ids, mask) and template.spec.input_shape == (16,)
    assert check_model(template) == (
        Tensor("last_hidden_state", "float32", (-1, 16)),
        Tensor("pooler_output", "float32", (16,)),
    )


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "ViTForImageClassification", "BertForMaskedLM"]
)
def test_a_folder_of_tied_weights_and_of_renamed_keys(name: str, tmp_path: Path) -> None:
    model = original(name)
    source = saved(model, tmp_path)
    batch = batch_for(source)
    whole = folder_of(tmp_path, input_shape=source.input_shape, input_dtype=source.input_dtype)
    with torch.inference_mode():
        assert torch.allclose(
            source_spec(whole).build()(batch).logits, model(batch).logits, atol=1e-6
        )


def test_a_folder_whose_config_names_no_architectures(tmp_path: Path) -> None:
    source = saved(original("BertModel"), tmp_path)
    edit_config(source, architectures=None)
    built = source_spec(folder_of(tmp_path, lengths=(8,))).build()
    assert type(built).__name__ == "BertModel"


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"needs config\.json, and model\.safetensors or"):
        source_spec(folder_of(tmp_path, lengths=(8,)))
    file = tmp_path / "worker.toml"
    file.write_text('[models.own]\nsafetensors = "."\nlengths = [8]\n')
    (source,) = load_worker_config(file).models
    assert source.transformers == str(tmp_path) and not source.safetensors
    file.write_text('[models.own]\ntransformers = "."\n')
    with pytest.raises(InvalidConfig, match="input_shape must be given"):
        load_worker_config(file)


# ------------------------------------------------------------------------ tables of inputs and outputs

IDS = "[models.own.inputs.ids]\nshape = [-1]\ndtype = 'int64'\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (IDS, r"ids int64\[-1\] has a dimension of -1, and no lengths are given"),
        ("input_shape = [4]\nlengths = [4]\n", "no input has a dimension of -1"),
        ("lengths = [8, 4]\n" + IDS, "lengths must rise"),
        ("lengths = [0]\n" + IDS, "lengths must be"),
        ("input_shape = [4]\nlengths = [8]\n" + IDS, "input_shape or the tables of inputs"),
        ("lengths = [8]\n" + IDS.replace("int64", "string"), r"ids string\[-1\] is none of"),
        ("lengths = [8]\n" + IDS.replace("-1", "-2"), r"'ids': .*it has shape"),
        ("lengths = [8]\n" + IDS + "size = 3\n", "'ids': .*unknown field `size`.*it has shape"),
        ("lengths = [8]\n" + IDS.replace("shape = [-1]", ""), "'ids': .*field `shape`"),
        ("lengths = [100000000]\n" + IDS, "at length 100000000 has 800,000,000 bytes"),
        (
            "[models.own.inputs.a]\nshape = [2]\ndtype = 'BYTES'\nmax_bytes = 4\n",
            "at least 8, not 4",
        ),
        ("[models.own.inputs.a]\nshape = [2]\ndtype = 'BYTES'\n", "BYTES need max_bytes"),
        (
            "input_shape = [4]\noutput = 'a'\n[models.own.outputs.a]\nshape = [2]\n",
            "output or the tables of outputs",
        ),
        (
            "input_shape = [4]\n[models.own.outputs.a]\nshape = [-1]\n",
            "has a dimension of -1, and no input has one",
        ),
        ("inputs = 3\n", "inputs must be a table"),
        ('[models.own.inputs."a\\u0007"]\nshape = [2]\n', "must be printable"),
        (
            "".join(f"[models.own.inputs.a{i}]\nshape = [2]\n" for i in range(65)),
            "65 tables, and at most 64",
        ),
    ],
)
def test_tables_that_are_wrong(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(f'[models.own]\nfactory = "a:b"\n{text}')
    with pytest.raises(InvalidConfig, match=words):
        load_worker_config(file)


def test_what_the_tables_say(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(
        f'[models.own]\nfactory = "a:b"\nlengths = [8, 16]\n{IDS}pad = 7\n'
        "[models.own.inputs.text]\nshape = [2]\ndtype = 'BYTES'\nmax_bytes = '1KiB'\n"
        "[models.own.outputs.scores]\nshape = [-1, 3]\n"
    )
    (source,) = load_worker_config(file).models
    assert source.inputs == (Tensor("ids", "int64", (-1,)), Tensor("text", "BYTES", (2,), 1024))
    assert source.outputs == (Tensor("scores", "float32", (-1, 3)),)
    assert (source.lengths, source.pads) == ((8, 16), {"ids": 7.0})


@pytest.mark.parametrize(
    "source, words",
    [
        (ModelSource("resnet_tiny", lengths=(8,)), "no input has a dimension of -1"),
        (
            ModelSource("bert_masked", inputs=(Tensor("a", "int64", (4,)),)),
            r"takes input_ids int64\[-1\], attention_mask int64\[-1\]; leave the tables",
        ),
    ],
)
def test_a_model_of_the_zoo_knows_its_inputs(source: ModelSource, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        source_spec(source)
    assert source_spec(ModelSource("bert_masked", lengths=(7, 9))).lengths == (7, 9)


# ------------------------------------------------------------------------ beside the worker's file


@pytest.fixture
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("same_path")
def test_a_name_that_is_taken_says_by_which_file(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def make(): ...")
    file = tmp_path / "worker.toml"
    file.write_text('[models.own]\nfactory = "json:make"\ninput_shape = [4]\n')
    source = load_worker_config(file).models[0]
    with pytest.raises(InvalidConfig, match=r"'json' was taken from .*not from .*json\.py: rename"):
        source_spec(source).build()


# ------------------------------------------------------------------------ what is possible


@pytest.mark.parametrize(
    "shape",
    ["[-1, 3]", "[[3, 4], [5]]", "{ a = [3] }", "[0, 3]", '"3,224"', "[true]", "[]", "3", "[1.5]"],
)
def test_shapes_that_cannot_be_served_say_what_can(shape: str, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(f'[models.own]\nfactory = "a:b"\ninput_shape = {shape}\n')
    with pytest.raises(
        InvalidConfig,
        match=r"(?s)input_shape must be a list.*one fixed shape and dtype.*several inputs.*lengths = ",
    ):
        load_worker_config(file)


@pytest.mark.parametrize(
    "lines, words",
    [
        ("input_shape = [1000000, 1000000]", "without the batch"),
        ('input_shape = [4]\ninput_dtype = "int"', "'int' is none of float32.*int64"),
        ('input_shape = [4]\ninput_dtype = "string"', "none of float32"),
        ("input_shape = [4]\noutput = true", "name of an output"),
        ("input_shape = [4]\noutput = -1", "at least 0"),
        ("", "input_shape must be given"),
    ],
)
def test_other_keys_that_are_wrong(lines: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(f'[models.own]\nfactory = "a:b"\n{lines}\n')
    with pytest.raises(InvalidConfig, match=words):
        load_worker_config(file)


def test_an_output_is_a_name_or_an_index_and_none_for_cupy(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    for value, wanted in (("0", "0"), ('"logits"', "logits"), ('"1.0"', "1.0")):
        file.write_text(f'[models.own]\nfactory = "a:b"\ninput_shape = [4]\noutput = {value}\n')
        assert load_worker_config(file).models[0].output == wanted
    file.write_text('[models.own]\ncupy = "a:b"\ninput_shape = [4]\noutput = "x"\n')
    with pytest.raises(InvalidConfig, match="returns one array"):
        load_worker_config(file)


class TwoInputs(torch.nn.Module):  # type: ignore[misc]
    def forward(self, a: Any, b: Any) -> Any:
        return a + b


def failing(make: Callable[[], Any], batch: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        make()(batch)
    return caught.value


def test_what_a_failing_forward_wanted() -> None:
    spec = ModelSpec("own", TwoInputs, (4,))
    batch = torch.rand(1, 4)
    two = explain_forward_error(failing(TwoInputs, batch), spec)
    assert "wants more inputs" in two and "'b'" in two and "[models.own.inputs.INPUT]" in two
    exported = torch.export.export(TwoInputs(), (batch, batch)).module
    assert "wants more inputs" in explain_forward_error(failing(exported, batch), spec)
    tokens = explain_forward_error(failing(lambda: torch.nn.Embedding(9, 3), batch), spec)
    assert 'input_dtype = "int64"' in tokens
    shape = explain_forward_error(failing(lambda: torch.nn.Linear(5, 3), batch), spec)
    assert "float32 (batch, 4)" in shape and "correct input_shape" in shape


def test_a_model_of_an_encoder_and_a_decoder_says_that_it_wants_more(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    source = saved(transformers.T5ForConditionalGeneration(config).eval(), tmp_path)
    spec = source_spec(source)
    error = failing(spec.build, batch_for(source))
    assert "wants more inputs" in explain_forward_error(error, spec)
