"""How well a classifier names pictures from features of a frozen tower (InternVL, 4.2).

All features are kept in memory; for a set that is larger than that, the training stage `probe`
reads them batch by batch.
Letters: N pictures, P visual tokens, D width of the tower, F width of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.data.files.class_folder import NamedPictures, read_class_folder
from lightning_internvl.data.files.lazy_pictures import LazyPictures, Pictures
from lightning_internvl.data.scenes.labels import SceneLabels
from lightning_internvl.data.scenes.things import THINGS
from lightning_internvl.evaluation.classification import Metrics, score_pictures
from lightning_internvl.evaluation.features import TaskPictures, pool_patches, scenes_of, tower_states
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.layers.finite import check_finite
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.probe import AttentionProbe, GlobalBatchNorm

GIB = 2**30
HEADS = ("linear", "attention")
MOMENTUM = 0.9


class FeatureProbe:
    """Fits a classifier on features of training pictures and scores it on others.

    Args:
        path: a folder of pictures to score, one folder a class; None: the built-in pictures of
            single things.
        train: a folder of pictures to fit on, with the same classes.
        head: "linear" reads CLS beside the mean of the patches, "attention" all tokens through a
            pooling of its own; both have a batch norm in front of the last layer.
        layer: hidden state of the tower that is read.
        epochs, batch_size, lr, weight_decay: of SGD with momentum and a cosine; `lr` is that of 256
            pictures a step and grows with `batch_size`.
        heads, pooled_dim: of the attention pooling.
        memory: GiB that features may take.
        seed: of the first weights and of the order of the pictures.
        samples, train_samples: only that many pictures, spread over the classes.
        max_missing: the share of pictures that may be unreadable.
    """

    needs = "encoder"

    def __init__(
        self,
        *,
        path: str | None = None,
        train: str | None = None,
        head: str = "linear",
        layer: int = -1,
        epochs: int = 30,
        batch_size: int = 64,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        heads: int = 4,
        pooled_dim: int = 128,
        memory: float = 8.0,
        seed: int = 0,
        top_k: Sequence[int] = (1, 5),
        samples: int | None = None,
        train_samples: int | None = None,
        max_missing: float = 0.01,
        version: int = 2,
    ) -> None:
        check_choice("head", head, HEADS)
        if (path is None) != (train is None):
            fault = "a probe is fitted on one folder and scored on another"
            raise ValueError(f"{path=} and {train=}: {fault}; give both or none")
        if min(epochs, lr, memory) <= 0 or batch_size < 2:
            positive = f"{epochs=}, {lr=} and {memory=}"
            raise ValueError(f"{positive} must lie above 0, {batch_size=} above 1")
        self.path, self.train, self.head, self.layer, self.memory, self.seed = path, train, head, layer, memory, seed
        self.fitting: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size}
        self.fitting |= {"lr": lr * batch_size / 256, "weight_decay": weight_decay}
        self.pooling = {"heads": heads, "pooled_dim": pooled_dim}
        self.top_k, self.samples, self.train_samples, self.max_missing = tuple(top_k), samples, train_samples, max_missing

    def __call__(self, predictor: Predictor) -> Metrics:
        fitted, scored = self._data(predictor)
        sides = fitted, scored
        learnt, asked = (TaskPictures(predictor, x.images, self.max_missing) for x in sides)
        features = self._features(predictor, learnt.images)[learnt.readable()]
        labels = torch.tensor(fitted.labels)[learnt.readable()]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            probe = self._probe(features.shape[-1], len(fitted.names)).to(predictor.device)
            fit(probe, features, labels, **self.fitting)
        scores = scores_of(probe, self._features(predictor, asked.images), predictor.batch_size)
        metrics = score_pictures("probe_", asked, scores, scored.labels, scored.names, self.top_k)
        return metrics | {"fitted_on": len(labels), "samples_asked": scored.total}

    def _data(self, predictor: Predictor) -> tuple[NamedPictures, NamedPictures]:
        """Pictures to fit on, and pictures to score."""
        if self.path is None or self.train is None:
            return scene_pictures(predictor, self.train_samples or 40 * len(THINGS), self.samples)
        fitted, scored = (
            read_class_folder(path, samples=count)
            for path, count in ((self.train, self.train_samples), (self.path, self.samples))
        )
        if fitted.names != scored.names:
            other = sorted(set(fitted.names) ^ set(scored.names))
            alone = f"{other[0]!r} is in one of them alone"
            raise ValueError(f"{self.train} and {self.path} must hold the same classes; {alone}")
        return fitted, scored

    def _probe(self, width: int, classes: int) -> nn.Module:
        if self.head == "attention":
            return _Attention(encoder_dim=width, classes=classes, **self.pooling)
        head = nn.Linear(width, classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return nn.Sequential(GlobalBatchNorm(width, eps=1e-6), head)

    def _features(self, predictor: Predictor, images: Pictures) -> Tensor:
        """(N, F), or all tokens (N, P, D) for the attention pooling."""
        found: list[Tensor] = []
        for (states,) in tower_states(predictor, images, [self.layer]):
            found.append(states if self.head == "attention" else pool_patches(states))
            gib = len(images) * found[0][0].numel() * found[0].element_size() / GIB
            if gib > self.memory:
                raise ValueError(
                    f"the features of {len(images)} pictures take {gib:.1f} GiB, more than memory={self.memory}; give it more, "
                    "lower train_samples, or train the probe as a stage: python train.py experiment=internvl_probe_toy"
                )
        return torch.cat(found)


class _Attention(AttentionProbe):
    """The probe of the training stage, called with one hidden state."""

    # which is not in a list
    def forward(self, states_NPD: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward([states_NPD])


def scene_pictures(predictor: Predictor, train: int, samples: int | None) -> tuple[NamedPictures, NamedPictures]:
    """Built-in single things: some to fit on, and those of zero-shot naming, none in both."""
    scenes = scenes_of(predictor)
    others = SceneLabels(scenes.seed, len(THINGS), scenes.image_size, scenes.styles)
    names, held_out = [thing.name for thing in THINGS], scenes.labelled()
    fitted = LazyPictures(range(train), lambda place: others[place]["image"])
    return (
        NamedPictures(fitted, [place % len(THINGS) for place in range(train)], names, train),
        NamedPictures(held_out.images[:samples], held_out.labels[:samples], names, len(held_out.images)),
    )


def fit(
    probe: nn.Module, features: Tensor, labels_N: Tensor, *, epochs: int, batch_size: int, lr: float, weight_decay: float
) -> None:
    """Train a classifier on features in random order; epochs drop what fills no batch."""
    size, device = min(batch_size, len(features)), next(probe.parameters()).device
    steps = len(features) // size
    optimizer = torch.optim.SGD(probe.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    probe.train()
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(features))
            for step in range(steps):
                rows = order[step * size : (step + 1) * size]
                loss = F.cross_entropy(probe(features[rows].to(device)), labels_N[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    probe.eval()


@torch.no_grad()
def scores_of(probe: nn.Module, features: Tensor, batch_size: int) -> Tensor:
    """(N, C) on the CPU"""
    device = next(probe.parameters()).device
    return check_finite(torch.cat([probe(part.to(device)).cpu() for part in features.split(batch_size)]), "scores of the probe")
