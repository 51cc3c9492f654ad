"""The documents' model in equal steps: its parts give what its forward gives, on a worker's template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference.md"


@pytest.mark.torch
def test_the_documents_model_gives_the_same_by_its_parts_as_whole() -> None:
    import torch

    from slosched.daemon.backends.checking import check_model
    from slosched.daemon.backends.templates import DeviceWeights, Template
    from slosched.daemon.backends.zoo import ModelSpec

    code = re.search(r"```python\n(import torch\n.*?Stepped\n.*?)```", DOCUMENT.read_text(), re.S)
    assert code is not None
    made: dict[str, Any] = {}
    exec(code.group(1), made)
    template = Template(ModelSpec("refined", lambda: made["Refined"]().eval(), (16,)))
    weights = DeviceWeights(template.host.clone())
    while not template.add_views(weights):
        pass

    def run(rows: Any) -> dict[str, Any]:
        given = [torch.from_numpy(rows[each.name]) for each in template.spec.takes]
        return {name: each.numpy() for name, each in template.forward(weights, given).items()}

    assert check_model(run, template.spec, precision="float32")[0].shape == (16,)
    values = [torch.from_numpy(each) for each in template.sample_rows(4, 1).values()]
    state = template.begin(weights, values)
    for _ in range(template.steps):
        state = template.step(weights, state)
    whole, parts = template.forward(weights, values), template.finish(weights, state)
    assert template.steps == 8 and whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
