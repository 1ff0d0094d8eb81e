"""Semantic segmentation by a head on the frozen features of a tower (InternVL, section 4.2).

Letters: N pictures, D width of the tower, G side of the square of patches, S side of a square of
    pixels, H, W sides of a picture,
C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.files.mask_folder import IGNORED, MaskedPictures, read_mask_folder
from lightning_internvl.data.processors.basic import Processor
from lightning_internvl.data.scenes.generator import Scenes
from lightning_internvl.data.scenes.masks import SCENE_CLASSES, scene_masks
from lightning_internvl.evaluation.classification import Metrics
from lightning_internvl.evaluation.features import TaskPictures, encode_images, patches_of, scenes_of, square_processor
from lightning_internvl.evaluation.segmentation_heads import HEADS
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.layers.finite import check_finite
from lightning_internvl.messages import check_choice

SCENES = 500  # that are scored unless told otherwise
RIGHT = 0.9  # share of right pixels from which a picture is shown as a right case

UNKNOWN = np.full((1, 1), IGNORED, dtype=np.uint8)


class Segmentation:
    """Fits a head on training pictures, always in the same way, and scores it on others.

    The whole picture is squashed to a square in training and in scoring, and the answer is enlarged
    to the picture's own size.

    Args:
        path: ADE20K's folder (see `read_mask_folder`); None: the built-in scenes (classes:
            background, things).
        train, split: names of the folders of the pictures to fit on and of those to score.
        classes: how many there are.
        reduce_zero_label: whether 0 stands for no class.
        head: "linear" on the last hidden state, or "upernet" on four.
        layers: hidden states that are read; None: the last one, or four that lie evenly apart.
        image_size: side in pixels of what the tower sees; None: its own.
        width: channels of the UperNet head.
        steps, batch_size, lr, weight_decay: of AdamW with a cosine.
        seed: of the first weights, of which pictures come and of their mirroring.
        samples: only that many pictures are scored, spread over all.
        max_missing: the share of pictures that may be unreadable.
    """

    needs = "encoder"

    def __init__(
        self,
        *,
        path: str | None = None,
        train: str = "training",
        split: str = "validation",
        classes: int = 150,
        reduce_zero_label: bool = True,
        head: str = "linear",
        layers: Sequence[int] | None = None,
        image_size: int | None = None,
        width: int = 64,
        steps: int = 400,
        batch_size: int = 16,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
        samples: int | None = None,
        max_missing: float = 0.01,
        version: int = 2,
    ) -> None:
        check_choice("head", head, HEADS)
        if layers is not None and len(layers) != HEADS[head].levels:
            raise ValueError(f"{head=} reads {HEADS[head].levels} hidden state(s), but {layers=}")
        if min(steps, lr, width) <= 0 or batch_size < 2 or not 2 <= classes <= IGNORED:
            raise ValueError(f"{steps=}, {lr=}, {width=} must lie above 0, {batch_size=} above 1, {classes=} from 2 to {IGNORED}")
        self.path, self.splits, self.reduce_zero_label = path, (train, split), reduce_zero_label
        self.classes = SCENE_CLASSES if path is None else classes
        self.head, self.layers, self.image_size, self.width = head, layers, image_size, width
        self.steps, self.batch_size, self.lr, self.weight_decay = steps, batch_size, lr, weight_decay
        self.seed, self.samples, self.max_missing = seed, samples, max_missing

    def __call__(self, predictor: Predictor) -> Metrics:
        processor = square_processor(predictor, self.image_size)
        fitted, scored = self._data(predictor)
        layers = self.layers or layers_of(predictor.model.encoder, HEADS[self.head].levels)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            head = HEADS[self.head](predictor.model.encoder.dim, self.classes, self.width).to(predictor.device)
            self._fit(predictor, head, fitted, layers, processor)
        asked = TaskPictures(predictor, scored.images, self.max_missing)
        confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        for start in range(0, len(asked.images), predictor.batch_size):
            images = list(asked.images[start : start + predictor.batch_size])
            answers = check_finite(head(maps(predictor, images, layers, processor)).cpu(), "answers of the head")
            places = range(start, len(asked.images))
            for place, image, answer in zip(places, images, answers, strict=False):
                if place not in asked.lost:
                    confusion += self._judged(predictor.journal, asked.key(place), image, scored.mask(place), answer)
        counts = {"samples": len(asked.readable()), "samples_asked": scored.total}
        return mask_scores(confusion) | counts

    def _data(self, predictor: Predictor) -> tuple[MaskedPictures, MaskedPictures]:
        """Pictures to fit on, and pictures to score."""
        if self.path is None:
            scenes = scenes_of(predictor)
            counts = (self.steps * self.batch_size, min(self.samples or SCENES, SCENES))
            splits = [Scenes(scenes.seed, split, scenes.image_size, scenes.styles) for split in ("train", "scenes")]
            fitted, scored = (scene_masks(source, count) for source, count in zip(splits, counts, strict=True))
            return fitted, MaskedPictures(scored.images, scored.mask, SCENES)
        train, split = self.splits
        fitted = read_mask_folder(self.path, train, self.classes, self.reduce_zero_label)
        classes = self.classes, self.reduce_zero_label
        return fitted, read_mask_folder(self.path, split, *classes, self.samples)

    def _fit(
        self, predictor: Predictor, head: nn.Module, data: MaskedPictures, layers: Sequence[int], processor: Processor
    ) -> None:
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        rows, learnt = (
            _drawn(len(data.images), self.steps * self.batch_size),
            TaskPictures(predictor, data.images, self.max_missing),
        )
        head.train()
        for _ in range(self.steps):
            places = [next(rows) for _ in range(self.batch_size)]
            # -1 mirrors a picture.
            turns = [1 if draw < 0.5 else -1 for draw in torch.rand(self.batch_size).tolist()]
            drawn = zip(places, turns, strict=True)
            images = [np.ascontiguousarray(learnt.images[i][:, ::turn]) for i, turn in drawn]
            states = maps(predictor, images, layers, processor)
            # where heads are judged; finer costs much and says little
            side = max(4 * states[0].shape[-1], processor.image_size // 4)
            masks = [UNKNOWN if place in learnt.lost else data.mask(place) for place in places]
            turned = [mask[:, ::turn] for mask, turn in zip(masks, turns, strict=True)]
            truth = torch.stack([_resized(mask, side) for mask in turned]).long().to(predictor.device)
            with torch.enable_grad():
                logits = _enlarged(head(states), (side, side))
                loss = F.cross_entropy(logits, truth, ignore_index=IGNORED)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
        head.eval()

    def _judged(self, journal: Journal, key: str, image: np.ndarray, mask: np.ndarray, answer: Tensor) -> Tensor:
        """How many pixels of each true class were called what: (C, C), true classes in rows. Some
        pictures are kept as cases, with the truth and the answer beside them in colours."""
        if image.shape[:2] != mask.shape:
            raise ValueError(f"{key} is {image.shape[:2]}, but its annotation {mask.shape} pixels")
        truth = torch.from_numpy(mask).long()
        said = _enlarged(answer[None], mask.shape)[0].argmax(dim=0)
        judged = truth != IGNORED
        right = (truth == said)[judged].float().mean().item()
        if journal.has_room(right >= RIGHT):
            shown = np.concatenate([image, coloured(truth), coloured(said.masked_fill(~judged, IGNORED))], axis=1)
            text = {"question": f"picture {key}, truth, answer", "answer": f"{right:.0%} of the pixels", "truth": "all"}
            journal.show(shown, **text, right=right >= RIGHT)
        pairs = truth[judged] * self.classes + said[judged]
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)


def coloured(classes_HW: Tensor) -> np.ndarray:
    """(H, W, 3) uint8: a colour a class, black for class 0 and grey for no class."""
    palette = np.random.default_rng(0).integers(40, 256, (IGNORED + 1, 3), dtype=np.uint8)
    palette[0], palette[IGNORED] = 0, 127
    return palette[classes_HW.numpy()]


def layers_of(encoder: nn.Module, levels: int) -> list[int]:
    """Evenly spread hidden states up to the last; a tower of fewer layers repeats some.

    Raises:
        ValueError: if several are wanted of a tower that does not say how many it has.
    """
    if levels > 1 and not hasattr(encoder, "depth"):
        name = type(encoder).__name__
        raise ValueError(f"{name} does not say how many layers it has; give layers=[...], {levels} of them")
    depth = getattr(encoder, "depth", 1)
    return [-1 - (depth * (levels - 1 - level)) // levels for level in range(levels)]


def maps(predictor: Predictor, images: Pictures, layers: Sequence[int], processor: Processor) -> list[Tensor]:
    """What the tower makes of the places of some pictures: (N, D, G, G), one a layer, float32."""
    found = []
    for state in encode_images(predictor, images, layers, processor):
        patches, side = patches_of(check_finite(state.float(), "states of pictures"))
        found.append(patches.transpose(1, 2).unflatten(2, (side, side)))
    return found


def mask_scores(confusion_CC: Tensor) -> Metrics:
    """Mean intersection over union of the classes that occur, the mean of their own shares of right
    pixels, and the share of all pixels. Chance is the best of what knows no picture: the commonest
    class everywhere, or classes that are drawn for each pixel, alike or by their shares.

    Raises:
        ValueError: if no pixel was judged.
    """
    counts = confusion_CC.double()
    right, true, said = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    if not true.sum():
        raise ValueError("the annotations judge no pixel: all of them stand for no class")
    union, there = true + said - right, true > 0
    shares = true[there] / true.sum()
    commonest, drawn = shares.max().item(), 1 / len(counts)
    by_chance = (
        commonest / len(shares),
        (shares * drawn / (shares + drawn - shares * drawn)).sum().item() / len(counts),
        (shares / (2 - shares)).mean().item(),
    )
    occurring = union > 0
    return {
        "miou": (right[occurring] / union[occurring]).mean().item(),
        "miou_chance": max(by_chance),
        "mean_accuracy": (right[there] / true[there]).mean().item(),
        "mean_accuracy_chance": 1 / int(there.sum()),
        "pixel_accuracy": (right.sum() / true.sum()).item(),
        "pixel_accuracy_chance": commonest,
    }


def _drawn(pictures: int, wanted: int) -> Iterator[int]:
    """Pictures in random order, all before one comes again."""
    for _ in range(-(-wanted // pictures)):
        yield from torch.randperm(pictures).tolist()


def _resized(mask: np.ndarray, side: int) -> Tensor:
    """(H, W) -> (S, S)"""
    picture = Image.fromarray(np.ascontiguousarray(mask))
    return torch.from_numpy(np.array(picture.resize((side, side), Image.Resampling.NEAREST)))


def _enlarged(x_NCGG: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x_NCGG, size=size, mode="bilinear", align_corners=False)
