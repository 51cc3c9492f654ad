"""Models of one's own: what transformers saved loads, modules beside the worker's file, words for the rest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from slosched.config import ModelSource
from slosched.config_file import load_worker_config
from slosched.errors import InvalidConfig

torch = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from slosched.daemon.backends.contract import ModelRefused, single_output  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402

pytestmark = pytest.mark.torch

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
#: Architectures whose weights are tied, whose keys were renamed, and plain ones: (class, its config).
SAVED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "vocab_size": 100,
        "n_positions": 16,
    },
    "LlamaForCausalLM": TEXT | {"tie_word_embeddings": True},
    "Qwen2ForCausalLM": TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "BertForMaskedLM": TEXT,
    "BertForSequenceClassification": TEXT,
    "RobertaForMaskedLM": TEXT | {"max_position_embeddings": 40},
    "AlbertForMaskedLM": TEXT | {"embedding_size": 16},
    "DistilBertForSequenceClassification": {
        "vocab_size": 100,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 64,
    },
    "ViTForImageClassification": IMAGE,
    "DeiTForImageClassification": IMAGE,
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}


def saved(name: str, folder: Path, **more: Any) -> tuple[Any, ModelSource, Any]:
    """(the model, its source after save_pretrained, inputs)."""
    model_class = getattr(transformers, name)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**SAVED[name], **more)).eval()
    model.save_pretrained(folder)
    images = "Image" in name
    shape = (3, 32, 32) if images else (8,)
    inputs = torch.rand(2, *shape) if images else torch.randint(3, 100, (2, *shape))
    source = ModelSource(
        "mine",
        safetensors=str(folder / "model.safetensors"),
        config=str(folder / "config.json"),
        input_shape=shape,
        input_dtype="float32" if images else "int64",
    )
    return model, source, inputs


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saved_is_loaded_and_answers_alike(name: str, tmp_path: Path) -> None:
    model, source, inputs = saved(name, tmp_path)
    spec = source_spec(source)
    with torch.inference_mode():
        wanted = model(inputs).logits
        found = single_output(spec.build()(inputs), 2, name="mine", take=spec.output)
    assert (found == wanted).all()


def test_a_missing_weight_a_strange_one_and_no_architecture_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, source, _ = saved("BertForSequenceClassification", tmp_path)
    weights = load_file(source.safetensors)
    kept = dict(weights)
    del kept["classifier.weight"]
    save_file(kept, source.safetensors)
    with pytest.raises(InvalidConfig, match=r"lacks \['classifier.weight'\]"):
        source_spec(source).build()
    save_file(weights | {"stranger": torch.zeros(2)}, source.safetensors)
    with pytest.raises(InvalidConfig, match=r"has unknown \['stranger'\]"):
        source_spec(source).build()
    config = json.loads(Path(source.config).read_text(encoding="utf-8"))
    del config["architectures"]
    Path(source.config).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InvalidConfig, match=r"names no architectures.*save_pretrained"):
        source_spec(source).build()


def test_one_of_several_outputs_is_taken_by_name(tmp_path: Path) -> None:
    SAVED["BertModel"] = TEXT
    try:
        model, source, inputs = saved("BertModel", tmp_path)
    finally:
        del SAVED["BertModel"]
    spec = source_spec(source)
    with (
        torch.inference_mode(),
        pytest.raises(ModelRefused, match=r"last_hidden_state \[2, 8, 32\]"),
    ):
        single_output(spec.build()(inputs), 2, name="mine", take=spec.output)
    named = ModelSource(**{**vars(source), "output": "pooler_output"})
    with torch.inference_mode():
        found = single_output(source_spec(named).build()(inputs), 2, name="m", take=named.output)
        assert (found == model(inputs).pooler_output).all()


def config_of(folder: Path, text: str) -> ModelSource:
    file = folder / "worker.toml"
    file.write_text(text, encoding="utf-8")
    (source,) = load_worker_config(file).models
    return source


def test_a_module_beside_the_workers_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Linear(4, 2)\n", encoding="utf-8"
    )
    (tmp_path / "json.py").write_text("raise SystemExit('taken instead of the library')\n")
    source = config_of(
        tmp_path, '[models.mine]\nfactory = "beside_it:make"\ninput_shape = [4]\noutput = "0"\n'
    )
    spec = source_spec(source)
    assert isinstance(spec.build(), torch.nn.Linear) and spec.output == "0"
    assert sys.path[-1] == str(tmp_path)


def test_a_module_that_exits_or_fails_when_it_is_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "exits_at_once.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    source = config_of(
        tmp_path, '[models.mine]\nfactory = "exits_at_once:make"\ninput_shape = [4]\n'
    )
    with pytest.raises(InvalidConfig, match=r"cannot be imported \(SystemExit: 3\).*beside"):
        source_spec(source).build()
    source = config_of(tmp_path, '[models.mine]\nfactory = "not_there:make"\ninput_shape = [4]\n')
    with pytest.raises(InvalidConfig, match="No module named 'not_there'"):
        source_spec(source).build()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "input_shape = [-1, 8]",
            r"not \[-1, 8\].*one tensor of one fixed shape.*models.NAME.inputs.INPUT.*lengths = ",
        ),
        ("input_shape = [[4], [8]]", r"not \[\[4\], \[8\]\].*several inputs"),
        ("input_shape = [0]", "sizes of at least 1"),
        ("", "input_shape must be given"),
        ('input_shape = [4]\ninput_dtype = "string"', "input_dtype 'string' is none of float32"),
    ],
)
def test_what_a_model_can_take_is_said(tmp_path: Path, lines: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        config_of(tmp_path, f'[models.mine]\nfactory = "m:f"\n{lines}\n')
