"""Zero-shot classification and retrieval as CLIP_benchmark computes them, on the same features, live and from golden numbers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from seeing_toys import seeing_predictor
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_internvl.evaluation.classification import class_scores, classifier
from lightning_internvl.evaluation.clip_benchmark import register, triple_of
from lightning_internvl.evaluation.retrieval import ImageTextRetrieval, best_columns, recalls
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.objectives import similarities

CLASSES, PROMPTS, PICTURES, WIDTH = 7, 3, 90, 12
# What CLIP_benchmark 1.6.2 gives for the features below.
GOLDEN_CLASSES = {"top1": 60 / 90, "top5": 89 / 90, "mean_per_class": 0.6445974138643312}
GOLDEN_RETRIEVAL = {
    "image_to_text_r1": 10 / 90, "image_to_text_r5": 53 / 90, "image_to_text_r10": 77 / 90,
    "text_to_image_r1": 65 / 180, "text_to_image_r5": 137 / 180, "text_to_image_r10": 161 / 180,
}  # fmt: skip
SKIPPED = "CLIP_benchmark is not installed: pip install --no-deps clip-benchmark==1.6.2"


def features(rows: int, seed: float) -> Tensor:
    """Numbers without a generator, so that every version of PyTorch has the same ones."""
    return torch.sin(torch.arange(rows * WIDTH).double() ** 1.3 * seed).reshape(rows, WIDTH).float()


LABELS = (torch.arange(PICTURES) ** 2 + torch.arange(PICTURES) // 4) % CLASSES
TEXTS = features(CLASSES * PROMPTS, 0.37)
PICTURE_FEATURES = features(PICTURES, 0.11) + 0.8 * TEXTS.view(CLASSES, PROMPTS, WIDTH).mean(dim=1)[LABELS]
OWNER = torch.arange(PICTURES).repeat_interleave(torch.arange(PICTURES) % 3 + 1)
CAPTIONS = features(len(OWNER), 0.23) + 0.5 * PICTURE_FEATURES[OWNER]


def ours_of_classes() -> dict[str, float]:
    predictor = SimpleNamespace(embed_texts=lambda texts: F.normalize(TEXTS[[int(text) for text in texts]], dim=-1))
    said = [[str(place * PROMPTS + number) for number in range(PROMPTS)] for place in range(CLASSES)]
    return class_scores("", similarities(F.normalize(PICTURE_FEATURES, dim=-1), classifier(predictor, said)), LABELS)


def ours_of_retrieval(block: int) -> dict[str, float]:
    image, text = F.normalize(PICTURE_FEATURES, dim=-1), F.normalize(CAPTIONS, dim=-1)
    return recalls("", best_columns(image, text, 10, block)[1], best_columns(text, image, 10, block)[1], OWNER, (1, 5, 10))


class LookUp(torch.nn.Module):
    """A model whose pictures are features, and whose texts are rows of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def encode_image(self, pictures: Tensor) -> Tensor:
        return pictures

    def encode_text(self, rows: Tensor) -> Tensor:
        return self.table[rows]


def numbers(texts: list[str]) -> Tensor:
    return torch.tensor([int(text) for text in texts])


def test_golden_numbers() -> None:
    classes, retrieval = ours_of_classes(), ours_of_retrieval(1000)
    assert {name: classes[name] for name in GOLDEN_CLASSES} == pytest.approx(GOLDEN_CLASSES, abs=1e-7)
    assert {name: retrieval[name] for name in GOLDEN_RETRIEVAL} == pytest.approx(GOLDEN_RETRIEVAL, abs=1e-7)


def test_classes_as_clip_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("clip_benchmark", reason=SKIPPED)
    metrics = SimpleNamespace(classification_report=None, balanced_accuracy_score=mean_recall)
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.metrics", metrics)
    zeroshot_classification = metrics_module("zeroshot_classification")
    zeroshot_classification.float = lambda array: array.item()  # NumPy 2.4 refuses float() of an array of one number
    loader = DataLoader(Labelled(), batch_size=16)
    names = [str(place) for place in range(CLASSES)]
    templates = {name: [str(int(name) * PROMPTS + number) for number in range(PROMPTS)] for name in names}
    theirs = zeroshot_classification.evaluate(LookUp(TEXTS), loader, numbers, names, templates, "cpu", amp=False)
    ours = ours_of_classes()
    assert (ours["top1"], ours["top5"]) == pytest.approx((theirs["acc1"], theirs["acc5"]), abs=1e-7)
    assert ours["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-7)


class Labelled(torch.utils.data.Dataset):
    """Pictures that are features, with their classes."""

    classes = tuple(range(CLASSES))

    def __len__(self) -> int:
        return PICTURES

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return PICTURE_FEATURES[place], int(LABELS[place])


def mean_recall(truth: Tensor, said: Tensor) -> float:
    """What scikit-learn, which CLIP_benchmark uses for this one number, defines as balanced accuracy."""
    return sum(float((said[truth == one] == one).float().mean()) for one in truth.unique()) / len(truth.unique())


def test_retrieval_as_clip_benchmark() -> None:
    pytest.importorskip("clip_benchmark", reason=SKIPPED)
    zeroshot_retrieval = metrics_module("zeroshot_retrieval")
    own = [[str(place) for place in (picture == OWNER).nonzero().flatten().tolist()] for picture in range(PICTURES)]
    batches = [(PICTURE_FEATURES[start : start + 16], own[start : start + 16]) for start in range(0, PICTURES, 16)]
    theirs = zeroshot_retrieval.evaluate(LookUp(CAPTIONS), batches, numbers, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ours = ours_of_retrieval(500)
    for k in (1, 5, 10):
        assert ours[f"image_to_text_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-7)
        assert ours[f"text_to_image_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-7)


def metrics_module(name: str) -> Any:
    """One file of CLIP_benchmark's metrics; the package beside it needs what is not installed here."""
    import importlib.util

    place = importlib.util.find_spec("clip_benchmark").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(name, f"{place}/metrics/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return seeing_predictor()


def test_our_models_as_clip_benchmark_uses_them(predictor: Predictor) -> None:
    model, transform, tokenizer = triple_of(predictor.model, predictor.pairs)
    images = predictor.held_out.labelled().images[:3]
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    with predictor.evaluating():
        assert F.normalize(model.encode_image(pixels), dim=-1).equal(predictor.embed_images(images, "c"))
        texts = ["a cat", "two dogs on a red background"]
        assert F.normalize(model.encode_text(tokenizer(texts)), dim=-1).equal(predictor.embed_texts(texts))
    with pytest.raises(ValueError, match=r"mode='x' .* valid choices: c, g"):
        triple_of(predictor.model, predictor.pairs, "x")


def test_a_task_as_clip_benchmark(predictor: Predictor) -> None:
    pytest.importorskip("clip_benchmark", reason=SKIPPED)
    data, (model, transform, tokenizer) = predictor.held_out.captioned(), triple_of(predictor.model, predictor.pairs)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in data.images])
    batches = [(pixels[start : start + 5], [[text] for text in data.captions[start : start + 5]]) for start in (0, 5, 10)]
    theirs = metrics_module("zeroshot_retrieval").evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
    with predictor.evaluating():
        ours = ImageTextRetrieval()(predictor)
    assert ours["samples"] == len(pixels) == 12
    for k in (1, 5):
        assert ours[f"c_image_to_text_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-7)
        assert ours[f"c_text_to_image_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-7)


def test_clip_benchmark_learns_our_type(monkeypatch: pytest.MonkeyPatch) -> None:
    models = SimpleNamespace(TYPE2FUNC={}, MODEL_TYPES=["open_clip"])
    package = ModuleType("clip_benchmark")
    package.__spec__, package.models = SimpleNamespace(), models
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    register()
    register()
    assert models.MODEL_TYPES == ["open_clip", "lightning_internvl"]
    with pytest.raises(ValueError, match=r"nowhere/at/all"):
        models.TYPE2FUNC["lightning_internvl"]("nowhere/at/all", "c")
