"""Image models by torchvision's names. A small package with its interfaces stands in for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from slosched.errors import InvalidConfig, MissingPackage, UnknownName
from slosched.share_spec import Boundary, BoundaryKind, Job

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

from torch import nn  # noqa: E402

from slosched.daemon.backends.eager.lane import EagerLane  # noqa: E402
from slosched.daemon.backends.eager.vision import Vision, _vit  # noqa: E402

_CLASSES = 5
_CPU = torch.device("cpu")


class _Network(nn.Module):
    """Three convolutions; the last norm of its one block has trained torchvision's name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4)

    def forward(self, pictures: Any) -> Any:
        return self.bn3(self.conv1(pictures))


class _Classifier(_Network):
    def forward(self, pictures: Any) -> Any:
        return super().forward(pictures).mean(dim=(2, 3))


class _Segmenter(_Network):
    def forward(self, pictures: Any) -> Any:
        return {"out": super().forward(pictures)}


class _Transform(nn.Module):
    def __init__(self, fixed: tuple[int, int] | None) -> None:
        super().__init__()
        self.min_size: tuple[int, ...] = (800,)
        self.max_size = 1333
        self.fixed_size = fixed


class _BoxPredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_score = nn.Linear(4, _CLASSES)

    def forward(self, features: Any) -> Any:
        return self.cls_score(features), features


class _Heads(nn.Module):
    """Scores above the threshold, at most `detections_per_img` of them; nothing is suppressed."""

    def __init__(self, *, masks: bool) -> None:
        super().__init__()
        self.score_thresh, self.detections_per_img = 0.05, 100
        self.box_predictor = _BoxPredictor()
        self.mask_predictor = nn.Identity() if masks else None
        self.candidates = 0


class _Detector(nn.Module):
    def __init__(self, *, masks: bool = False) -> None:
        super().__init__()
        self.backbone = _Network()
        self.transform = _Transform(None)
        self.roi_heads = _Heads(masks=masks)

    def forward(self, pictures: list[Any]) -> list[dict[str, Any]]:
        assert isinstance(pictures, list)
        heads, answers = self.roi_heads, []
        features = self.backbone(torch.stack(pictures)).flatten(2).transpose(1, 2)
        logits, _ = heads.box_predictor(features.flatten(0, 1))
        shares = torch.softmax(logits, -1)[:, 1:].reshape(len(pictures), -1)
        heads.candidates = int((shares > heads.score_thresh).sum())
        for each in shares:
            best = each[each > heads.score_thresh].sort(descending=True).values
            best = best[: heads.detections_per_img]
            answer = {"boxes": best[:, None].expand(-1, 4), "scores": best}
            if heads.mask_predictor is not None:
                answer["masks"] = best
            answers.append(answer)
        return answers


class SSD(nn.Module):
    """One stage, with a softmax over classes and a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = _Network(), _Head(ctrness=False)
        self.transform = _Transform((300, 300))
        self.score_thresh, self.detections_per_img = 0.01, 200

    def forward(self, pictures: list[Any]) -> list[dict[str, Any]]:
        scores = torch.softmax(self.head(self.backbone(torch.stack(pictures)))["cls_logits"], -1)
        return _best(scores[..., 1:], self)


class FCOS(SSD):
    """One stage, where each class stands for itself, times how near the middle a place is."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.transform = _Head(ctrness=True), _Transform(None)

    def forward(self, pictures: list[Any]) -> list[dict[str, Any]]:
        found = self.head(self.backbone(torch.stack(pictures)))
        product = torch.sigmoid(found["cls_logits"]) * torch.sigmoid(found["bbox_ctrness"])
        return _best(product.sqrt(), self)


def _best(scores: Any, model: Any) -> list[dict[str, Any]]:
    flat = scores.flatten(1)
    model.candidates = int((flat > model.score_thresh).sum())
    return [{"scores": each.sort(descending=True).values[:20]} for each in flat]


class _Head(nn.Module):
    def __init__(self, *, ctrness: bool) -> None:
        super().__init__()
        self.logits = nn.Linear(4, _CLASSES)
        self.ctrness = nn.Linear(4, 1) if ctrness else None

    def forward(self, features: Any) -> dict[str, Any]:
        places = features.flatten(2).transpose(1, 2)
        found = {"cls_logits": self.logits(places)}
        if self.ctrness is not None:
            found["bbox_ctrness"] = self.ctrness(places)
        return found


_MODELS: dict[str, tuple[str, Any]] = {
    "mobilenet_v3_small": ("torchvision.models", _Classifier),
    "vit_b_32": ("torchvision.models", _Classifier),
    "fcn_resnet50": ("torchvision.models.segmentation", _Segmenter),
    "fasterrcnn_resnet50_fpn": ("torchvision.models.detection", _Detector),
    "maskrcnn_resnet50_fpn_v2": (
        "torchvision.models.detection",
        lambda: _Detector(masks=True),
    ),
    "ssd300_vgg16": ("torchvision.models.detection", SSD),
    "fcos_resnet50_fpn": ("torchvision.models.detection", FCOS),
    "raft_small": ("torchvision.models.optical_flow", _Network),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """torchvision stands in; the keywords of each constructor's call."""
    calls: list[dict[str, Any]] = []

    def get_model(name: str, **keywords: Any) -> Any:
        calls.append(keywords)
        return _MODELS[name][1]()

    def list_models(module: ModuleType | None = None) -> list[str]:
        return sorted(
            name
            for name, (place, _) in _MODELS.items()
            if module is None or place == module.__name__
        )

    models: Any = ModuleType("torchvision.models")
    models.get_model, models.list_models = get_model, list_models
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for room in ("detection", "segmentation"):
        module = ModuleType(f"torchvision.models.{room}")
        setattr(models, room, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield calls


def _model(name: str, **fields: Any) -> Any:
    with torch.inference_mode():
        return Vision(Job(name="job", model=name, **fields), _CPU, 3)


def _answer(model: Any) -> list[tuple[int, ...]]:
    with torch.inference_mode():
        return [tuple(each.shape) for each in model.run(lambda: None)]


def test_a_detector_is_given_the_size_and_a_fixed_number_of_boxes(
    asked: list[dict[str, Any]],
) -> None:
    model = _model("fasterrcnn_resnet50_fpn", size=(48, 64), batch=2)
    assert asked == [{"weights": None, "weights_backbone": None}]
    transform, heads = model.module.transform, model.module.roi_heads
    assert (transform.min_size, transform.max_size) == ((48,), 64)
    assert _answer(model) == [(100, 4), (100,)] * 2
    # The threshold is the last of the best 1000 of each picture, and only those above it pass.
    assert heads.candidates == 1000 * 2 - 1
    assert float(model.module.backbone.bn3.weight[0]) == 0.5
    assert "1000 boxes are candidates" in model.note


def test_masks_stay_on_the_device_and_are_fewer(asked: list[dict[str, Any]]) -> None:
    model = _model("maskrcnn_resnet50_fpn_v2", size=(48, 64))
    assert _answer(model) == [(20, 4), (20,)]
    assert "masks stay on the device" in model.note


@pytest.mark.parametrize("name", ["ssd300_vgg16", "fcos_resnet50_fpn"])
def test_detectors_of_one_stage(name: str, asked: list[dict[str, Any]]) -> None:
    model = _model(name, size=(48, 64))
    assert _answer(model) == [(20,)]
    assert 990 <= model.module.candidates < 1000  # 999, less those that equal the threshold
    if name == "ssd300_vgg16":
        assert model.module.transform.fixed_size == (64, 48)
    assert model.module.detections_per_img == 100


def test_the_size_is_the_published_one_where_the_job_names_none(
    asked: list[dict[str, Any]],
) -> None:
    detector = _model("fasterrcnn_resnet50_fpn")
    assert tuple(detector._picture.shape) == (1, 3, 720, 1280)
    assert detector.module.transform.max_size == 1333
    segmenter = _model("fcn_resnet50", batch=2)
    assert tuple(segmenter._picture.shape) == (2, 3, 520, 520)
    assert _answer(segmenter) == [(2, 520, 520)]
    classifier = _model("mobilenet_v3_small")
    assert _answer(classifier) == [(1, 4)]
    assert asked[-2:] == [{"weights": None, "weights_backbone": None}, {"weights": None}]


def test_a_vision_transformer_is_made_for_its_size(asked: list[dict[str, Any]]) -> None:
    _model("vit_b_32", size=(64, 64))
    assert asked == [{"weights": None, "image_size": 64}]
    with pytest.raises(InvalidConfig, match="square"):
        _model("vit_b_32", size=(64, 96))


def test_names_that_torchvision_lacks_or_that_take_no_picture(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(UnknownName, match="unknown model 'resnet5000'"):
        _model("resnet5000")
    with pytest.raises(InvalidConfig, match="classification, detection and segmentation"):
        _model("raft_small")


def test_a_detector_runs_in_the_lane(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.daemon.backends.eager.lane._settle", lambda device: None)
    job = Job(
        name="job",
        model="fasterrcnn_resnet50_fpn",
        size=(48, 64),
        boundary=Boundary(kind=BoundaryKind.SYNC, every=2),
    )
    prepared = EagerLane(0, job, device="cpu", seed=3).prepare()
    assert prepared.boundaries == 3
    assert prepared.answer


def test_without_torchvision_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    with pytest.raises(MissingPackage, match="pip install torchvision"):
        _model("fasterrcnn_resnet50_fpn")
    assert _answer(_model("resnet_tiny", batch=2)) == [(2, 1000)]
    with pytest.raises(InvalidConfig, match="does not take one picture"):
        _model("bert_base")


def test_the_shape_of_the_large_vision_transformer_without_torchvision() -> None:
    with torch.device("meta"):
        large = _vit(large=True)
    assert sum(each.numel() for each in large.parameters()) == pytest.approx(304e6, rel=0.01)
