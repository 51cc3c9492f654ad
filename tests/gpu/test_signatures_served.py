"""A worker on a real GPU with models of several inputs and of any length: answers are compared."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from served_signatures import LENGTHS, MODELS, PLAIN, check_answers, load_all, worker  # noqa: E402
from slosched.codes import Code  # noqa: E402
from slosched.config import ModelSource  # noqa: E402
from slosched.messages import ErrorResult, LoadModel  # noqa: E402
from slosched.signature import BYTES, Tensor  # noqa: E402
from slosched.units import NS_PER_S  # noqa: E402
from worker_rig import FOREVER_NS  # noqa: E402

TEXTS = ModelSource(
    "shouts", factory="cpu_models:Shouts", inputs=(Tensor("texts", BYTES, (2,), 64),)
)


@pytest.mark.timeout(400)
def test_answers_of_mixed_lengths_are_those_of_direct_forward_passes() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with worker("cuda:0", (*MODELS, TEXTS)) as controller:
        loaded = load_all(controller, ("pooled", "pairs", "bert_masked", PLAIN))
        for name, model in loaded.items():
            assert "plain execution" not in model.labels, f"{name} was not captured"
        assert tuple(each.length for each in loaded["pooled"].length_classes) == LENGTHS
        assert [str(each) for each in loaded["bert_masked"].inputs] == [
            "input_ids int64[-1]",
            "attention_mask int64[-1]",
        ]
        check_answers(controller, loaded, answers=3000, tolerance=2e-3)
        refused = controller.ask(
            LoadModel(
                session=controller.session,
                action_id=controller.action_id(),
                name="shouts",
                model_id=9,
                copies=1,
                max_batch=1,
                max_exec_ns=NS_PER_S,
                earliest_ns=0,
                latest_ns=FOREVER_NS,
            )
        )
        assert isinstance(refused, ErrorResult) and refused.code == Code.INVALID_MODEL_PATH
        assert "not for a GPU" in refused.reason
