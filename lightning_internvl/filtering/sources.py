"""What a filter reads: all sources of the data as one row of shards."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_internvl.data.shards.sources import open_shards, sources_of
from lightning_internvl.data.shards.tar import Record, Shards, pair_of
from lightning_internvl.model.compose import Build


class JoinedShards(Shards):
    """The shards of several sources, one source after the other.

    Args:
        image, caption: the extension or column of picture and caption, where they have other names
            than usual.
        decode_at: see `read_image`; the stages read pictures so, and so does the filter.
        languages: of the captions, by source, where it says one.
    """

    def __init__(
        self,
        sources: Mapping[str, Shards],
        image: str | None = None,
        caption: str | None = None,
        decode_at: int | None = None,
        languages: Mapping[str, str | None] | None = None,
    ) -> None:
        self.sources, self.image = dict(sources), image
        self.caption, self.decode_at = caption, decode_at
        self.languages = languages or {}
        self._ends = list(itertools.accumulate(map(len, self.sources.values())))

    def __len__(self) -> int:
        return self._ends[-1]

    def source(self, shard: int) -> str:
        """The name of the source that a shard belongs to."""
        return list(self.sources)[bisect.bisect_right(self._ends, shard)]

    def language(self, shard: int) -> str | None:
        """Of the captions of a shard, where its source says one."""
        return self.languages.get(self.source(shard))

    def name(self, shard: int) -> str:
        source, place = self._place(shard)
        return source.name(place)

    def read(self, shard: int, start: int = 0) -> Iterator[Record]:
        source, place = self._place(shard)
        return source.read(place, start)

    def pair(self, record: Record) -> dict[str, Any]:
        """Picture and caption of a record; raises BadSample as `pair_of`."""
        return pair_of(record, self.image, self.caption)

    def _place(self, shard: int) -> tuple[Shards, int]:
        which = bisect.bisect_right(self._ends, shard)
        return list(self.sources.values())[which], shard - (self._ends[which - 1] if which else 0)


def join_sources(pairs: Mapping[str, Any], build: Build) -> JoinedShards:
    """The shards of a dataset of pairs. Raises ValueError for a source that has none."""
    found, languages = {}, {}
    for name, source in sources_of(pairs.get("shards"), pairs.get("sources")).items():
        given, languages[name] = source["shards"], source.get("language")
        found[name] = open_shards(build(given) if isinstance(given, Mapping) else given)
    options = {name: pairs.get(name) for name in ("image", "caption", "decode_at")}
    return JoinedShards(found, **options, languages=languages)
