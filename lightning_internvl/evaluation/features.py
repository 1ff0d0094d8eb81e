"""What a frozen tower or a contrastive model gives for many pictures, for some tasks.

Letters: N pictures, P visual tokens, D width of the tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_internvl.data.files.lazy_pictures import LazyPictures, Pictures
from lightning_internvl.data.processors.basic import Processor, Squash
from lightning_internvl.data.scenes.held_out import HeldOutScenes
from lightning_internvl.inference.predictor import Predictor, in_precision
from lightning_internvl.layers.finite import check_finite

GREY = np.full((8, 8, 3), 127, dtype=np.uint8)
TIE = 1e-6  # of a score, that make no difference


class TaskPictures:
    """The pictures that a task asks for; unreadable ones are noted and not scored.

    Args:
        images: pictures, or videos where `blank` is one.
        max_missing: the share that may be left out.
        blank: what stands in the place of one that cannot be read.

    Attributes:
        images: what the model is shown.
    """

    def __init__(self, predictor: Predictor, images: Pictures, max_missing: float, blank: np.ndarray = GREY) -> None:
        self.predictor, self.source, self.max_missing, self.blank = predictor, images, max_missing, blank
        self.lost: set[int] = set()
        lazy = isinstance(images, LazyPictures)
        self.images = LazyPictures(range(len(images)), self._read) if lazy else images
        named = images.items if isinstance(images, LazyPictures) else ()
        self._shared = {name for name, times in Counter(map(str, named)).items() if times > 1}

    def _read(self, place: int) -> np.ndarray:
        try:
            return self.source[place]
        except ValueError as error:
            self.predictor.journal.add_missing(self.key(place), error)
            self.lost.add(place)
            if len(self.lost) > self.max_missing * len(self.source):
                raise ValueError(
                    f"{len(self.lost)} of {len(self.source)} samples cannot be used, a larger "
                    f"share than max_missing={self.max_missing}; the last one: {error}"
                ) from error
            return self.blank

    def key(self, place: int) -> str:
        """What a sample is called, as no other is: a file that is listed twice is two samples."""
        name = str(self.source.items[place] if isinstance(self.source, LazyPictures) else place)
        return f"{name} (sample {place + 1})" if name in self._shared else name

    def readable(self) -> list[int]:
        """The places of the samples that could be read, once all have been asked for; raises
        ValueError if there are none."""
        found = [place for place in range(len(self.source)) if place not in self.lost]
        if not found:
            one = next(iter(self.predictor.journal.missing))
            raise ValueError(f"none of {len(self.source)} samples can be used; one of them: {one}")
        return found

    def keep_answers(self, question: str, answers: Sequence[str], truths: Sequence[str], right: Sequence[bool]) -> None:
        """Keep the answer about each readable sample, and some cases with their pictures (of a
        video its middle frame)."""
        readable, journal = self.readable(), self.predictor.journal
        said = list(zip(readable, answers, truths, right, strict=True))
        journal.finish(
            {"key": self.key(place), "question": question, "answer": answer, "truth": truth, "right": bool(is_right)}
            for place, answer, truth, is_right in said
        )
        for place, answer, truth, is_right in said:
            if journal.has_room(is_right):
                shown = self.source[place]
                picture = shown[len(shown) // 2] if shown.ndim == 4 else shown
                journal.show(picture, question=question, answer=answer, truth=truth, right=is_right)


def share_of(right_N: Tensor) -> float:
    """The share of true values, rounded to float32."""
    return (right_N.sum() / len(right_N)).item()


def ties_against(scores: Tensor, own: Tensor) -> Tensor:
    """Scores by which a tie counts against the model: those of the truth (`own`, bool, the same shape)
    are lower by what the rounding of float32 may be."""
    return scores - own * TIE * scores.abs().clamp(min=1.0)


def scenes_of(predictor: Predictor) -> HeldOutScenes:
    """The built-in scenes that the model's training held out, or those of seed 0."""
    if isinstance(predictor.held_out, HeldOutScenes):
        return predictor.held_out
    size = predictor.model.encoder.image_size
    return HeldOutScenes(seed=0, image_size=size + size % 2)


def processor_of(predictor: Predictor) -> Processor:
    """How the model sees a picture as one square."""
    found = predictor.pairs or predictor.labels or predictor.chats
    return found.processor.whole()


def square_processor(predictor: Predictor, image_size: int | None = None) -> Processor:
    """Pictures as the model sees them, but whole: places stay places in the square."""
    seen = processor_of(predictor)
    return Squash(image_size or seen.image_size, seen.mean, seen.std)


@in_precision
def encode_images(predictor: Predictor, images: Pictures, layers: Sequence[int], processor: Processor) -> list[Tensor]:
    """Hidden states (N, P, D), one a layer, of pictures that the tower sees at once.

    Raises:
        ValueError: for a tower that reads more than one square a picture.
    """
    if hasattr(predictor.model.encoder, "blank"):
        name = type(predictor.model.encoder).__name__
        raise ValueError(f"{name} does not read one square a picture, as this task needs it")
    weight = next(predictor.model.encoder.parameters(), torch.zeros(0))
    pixels = processor.inputs([processor(image) for image in images])["pixel_values"]
    return predictor.model.encoder(pixels.to(weight.device, weight.dtype), layers=tuple(layers))


def tower_states(predictor: Predictor, images: Pictures, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Hidden states (N, P, D), one a layer, of `predictor.batch_size` pictures at a time, on the
    CPU in float32."""
    processor = processor_of(predictor)
    for start in range(0, len(images), predictor.batch_size):
        states = encode_images(predictor, images[start : start + predictor.batch_size], layers, processor)
        yield [check_finite(state.float().cpu(), "states of pictures") for state in states]


def patches_of(states_NPD: Tensor) -> tuple[Tensor, int]:
    """The tokens of patches, without those in front (CLS), and the side of their square.

    Raises:
        ValueError: for tokens that are no square.
    """
    tokens = states_NPD.shape[1]
    side = int(tokens**0.5)
    if tokens - side**2 > 1:
        raise ValueError(f"{tokens} visual tokens are no square of patches, with CLS or without")
    return states_NPD[:, tokens - side**2 :], side


def pool_patches(states_NPD: Tensor) -> Tensor:
    """One vector a picture: the mean of the patches, behind CLS if any: (N, D) or (N, 2 D)."""
    patches, side = patches_of(states_NPD)
    front = states_NPD[:, : states_NPD.shape[1] - side**2].flatten(1)
    return torch.cat([front, patches.mean(dim=1)], dim=-1)
