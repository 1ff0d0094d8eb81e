"""Training data from shards: how sources are mixed, and what becomes of a record.

In which order records come is a matter of `data.shards.cursor`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_internvl.data.bad_samples import BadSample, Unwanted
from lightning_internvl.data.files.conversations import CAPTION_REQUEST, read_entry
from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.files.unread import UNREAD
from lightning_internvl.data.order.mixture import Mixture
from lightning_internvl.data.shards.sources import knots_of, open_shards, sources_of
from lightning_internvl.data.shards.tar import Record, Shards, chats_of, pair_of
from lightning_internvl.files import identity_of


class ShardDataset(ABC):
    """Samples of shards.

    Args:
        shards: what `open_shards` opens, or shards.
        sources: instead, several by name: {"shards": ..., "weight": a number from 0 on (1),
            "samples": how many there are, "language": of its captions}.
        weights: null takes the weights of the sources; "size" in proportion to their numbers of
            samples (of shards, where no source says its samples), "sqrt" to the square roots of
            these; or numbers by name.
        schedule: instead of `weights`, as in `Mixture`.
        run: so many samples in a row come from one source.
        samples_per_step: of an optimizer step on all devices, where it is not what batch sizes say
            (with packing).
        shuffle: neighbouring records of a shard that are shuffled, all of them in memory in each
            reader.
        lanes, turns: readers of a step, and groups of readers (see `data.shards.cursor`).
        image, caption: the extension or column of picture and caption, where they have other names
            than usual.
        decode_at: JPEGs may be decoded at a half, quarter or eighth of their size, as long as both
            sides keep so many pixels.

    Raises:
        ValueError: for sources, weights or numbers that do not fit.
    """

    def __init__(
        self,
        shards: Any = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        weights: Mapping[str, float] | str | None = None,
        schedule: Sequence[Mapping[str, Any]] | None = None,
        run: int = 1,
        samples_per_step: int | None = None,
        shuffle: int = 200,
        lanes: int = 8,
        turns: int = 8,
        image: str | None = None,
        caption: str | None = None,
        decode_at: int | None = None,
    ) -> None:
        self.given = sources_of(shards, sources)
        self.sources: dict[str, Shards] = {}
        for name, given in self.given.items():
            try:
                self.sources[name] = open_shards(given["shards"])
            except ValueError as error:
                raise ValueError(f"source {name}: {error}") from error
        sizes = {name: len(shards) for name, shards in self.sources.items()}
        self.knots = knots_of(self.given, sizes, weights, schedule)
        self.run, self.samples_per_step, self.shuffle = run, samples_per_step, shuffle
        self.lanes, self.turns, self.image, self.caption = lanes, turns, image, caption
        self.decode_at = decode_at
        self.mixture(1, 0)  # finds faults of the weights

    def identity(self) -> dict[str, Any]:
        """That of each source."""
        return {name: identity_of(shards) for name, shards in self.sources.items()}

    def mixture(self, samples_per_step: int, seed: int) -> Mixture:
        """Which source stands at which place in the stage's data."""
        # Places in a source are a matter of the readers
        unmeasured: dict[str, Dataset[Any]] = {name: Dataset() for name in self.sources}
        steps = self.samples_per_step or samples_per_step
        return Mixture(unmeasured, {}, schedule=self.knots, samples_per_step=steps, run=self.run, seed=seed)

    @abstractmethod
    def sample(self, record: Record, source: Mapping[str, Any]) -> dict[str, Any]:
        """What a record of a source gives, without its key; raises ValueError."""


class ShardPairs(ShardDataset):
    """{"image": (H, W, 3) uint8, "caption", "language", "key"} from records with a picture and a
    caption (see `pair_of`)."""

    def sample(self, record: Record, source: Mapping[str, Any]) -> dict[str, Any]:
        """Picture and caption of a record."""
        found = pair_of(record, self.image, self.caption)
        language = found.get("language") or source.get("language") or "en"
        return {"image": read_image(found["image"], self.decode_at), "caption": found["caption"], "language": language}


class ShardChats(ShardDataset):
    """{"images": [(H, W, 3) uint8], "conversation": [messages], "unread": [phrases], "key"} from
    conversations and from captions (see `chats_of`).

    Args:
        caption_request: the question that a bare caption answers.
    """

    def __init__(self, *args: Any, caption_request: str = CAPTION_REQUEST, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.caption_request = caption_request

    def sample(self, record: Record, source: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures and conversation of a record."""
        entry = read_entry(chats_of(record, self.image, self.caption), self.caption_request)
        if entry.videos:
            raise Unwanted("it is about a video, and shards give pictures only", "left out: video")
        if paths := [name for name in entry.images if not isinstance(name, bytes)]:
            raise BadSample(f"the record names the picture {paths[0]:.200} and does not hold it", "missing image")
        images = [read_image(image, self.decode_at) for image in entry.images]
        return {"images": images, "conversation": entry.messages, UNREAD: entry.unread}
