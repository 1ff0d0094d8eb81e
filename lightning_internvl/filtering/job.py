"""The work of a filter in pieces of one shard, whoever does them: which are left, and how one is
scored and written.

What lies in the folder says how far the work is; a file that is there is whole. So a killed run
loses what it had of one shard in each process, and writes the same bytes as one that was never
killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.checkpoints.weight_source import read_weights
from lightning_internvl.config.filter_checks import SIMILARITY
from lightning_internvl.config.filter_settings import FilterSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.data.bad_samples import Ledger, Skipped
from lightning_internvl.distributed.placement import place_of
from lightning_internvl.filtering.decide import Columns, write_columns
from lightning_internvl.filtering.measures import Row, can_guess_languages, language_identifier
from lightning_internvl.filtering.scores import UNUSABLE, Scorer, SimilarityModel, read_rows, scores_file, write_rows
from lightning_internvl.filtering.sources import JoinedShards, join_sources
from lightning_internvl.filtering.write import write_shard, written_marker
from lightning_internvl.inference.collators import make_view
from lightning_internvl.model.compose import Build, compose_model
from lightning_internvl.model.vlm import VLM


class FilterJob(NamedTuple):
    """One filter of a run.

    Attributes:
        folder: of the filter.
        source: of the model's weights; None where no model is needed.
    """

    settings: FilterSettings
    folder: Path
    build: Build
    source: str | Path | None

    @property
    def name(self) -> str:
        """The filter's name in the pipeline."""
        return self.settings.name

    @property
    def columns(self) -> Path:
        """Where decisions are made."""
        return self.folder / "columns"

    def shards(self) -> JoinedShards:
        """The shards that are filtered. Raises ValueError if there are none."""
        return join_sources(self.settings.pairs, self.build)

    def unscored(self, numbers: Sequence[int]) -> list[int]:
        """Those of some shards that have no scores yet."""
        return [number for number in numbers if not scores_file(self.folder, number).exists()]

    def unwritten(self, numbers: Sequence[int]) -> list[int]:
        """Those of some shards that are not written yet."""
        return [number for number in numbers if not written_marker(self.folder, number).exists()]

    def scorer(self) -> Scorer:
        """What scores shards, with the model where one is needed."""
        settings = self.settings
        model = None
        if settings.needs_model:
            assert self.source is not None  # the check before the run has seen to it
            model = load_filter_model(settings, self.build, self.source)
        sizes = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
        untold = settings.shares_by_language and can_guess_languages()
        return Scorer(self.shards(), model, language=settings.needs_language, untold=untold, **sizes)

    def keep(self, number: int, rows: Sequence[Row]) -> None:
        """Write the scores of a shard, and before them, because they mark it as scored, what is
        needed of them to decide."""
        write_columns(self.columns, number, rows, self.settings.rules)
        write_rows(scores_file(self.folder, number), rows)

    def take_scores(self, numbers: Sequence[int]) -> None:
        """Take the scores of an earlier filter over the same shards: rules alone are new.

        Raises:
            ValueError: if there are none, not those of all these shards, or they lack a score that
                a rule needs.
        """
        place = Path(str(self.settings.scores_from))
        found = len(list((place / "scores").glob("*.jsonl")))
        if found != (count := len(self.shards())):
            raise ValueError(
                f"scores_from={place} holds the scores of {found} shards, and there are {count}; "
                "give the folder of a filter (RUN/filter) that has scored the same shards"
            )
        for number in self.unscored(numbers):
            rows = read_rows(scores_file(place, number))
            good = [row for row in rows if UNUSABLE not in row]
            rules = [rule for rule in (SIMILARITY, "language") if self.settings.rules.get(rule)]
            if lacking := [rule for rule in rules if any(rule not in row for row in good)]:
                remedy = f"set stages.{self.name}.rules.{lacking[0]}=null"
                raise ValueError(f"scores_from={place} has no {lacking[0]}; {remedy}")
            self.keep(number, rows)

    def score(self, numbers: Sequence[int], ledger: Ledger) -> Iterator[int]:
        """Score those of some shards that are not yet; enter unusable records in the ledger.

        Yields:
            for each shard the number of pairs that were scored

        Raises:
            ValueError: if too many pairs cannot be used.
        """
        pending = self.unscored(numbers)
        scored = self.scorer().score(pending) if pending else iter(())
        waiting = set(pending)
        for number in numbers:
            if number in waiting:
                _, rows = next(scored)
                self.keep(number, rows)
            else:
                rows = read_rows(scores_file(self.folder, number))
            enter_rows(ledger, rows)
            yield len(rows) if number in waiting else 0

    def ledger(self, rank: int = 0) -> Ledger:
        """A new account of what cannot be used, of one process."""
        limit = self.settings.max_bad_fraction
        path = self.folder / (f"skipped.{rank}.jsonl" if rank else "skipped.jsonl")
        return Ledger(path, max_bad_fraction=limit, start=0, batch_size=0, epoch=None)

    def write(self, numbers: Iterable[int]) -> Iterator[int]:
        """Write what is kept of some shards; yields the number of each that is written."""
        shards, columns = self.shards(), Columns(self.columns)
        for number in numbers:
            write_shard(shards, number, self.folder, columns.reasons(number))
            yield number


def enter_rows(ledger: Ledger, rows: Sequence[Row]) -> None:
    """Enter the rows of the next shard; raises ValueError if too many cannot be used."""
    unusable = [(place, row) for place, row in enumerate(rows) if UNUSABLE in row]
    bad = [Skipped(place, row["key"], row[UNUSABLE], row["reason"]) for place, row in unusable]
    ledger.add(bad, len(rows) - len(bad))


def compose_filter_model(settings: StageSettings, build: Build) -> tuple[VLM, Any]:
    """The model of a filter with fresh weights, and how that reads pairs.

    Raises:
        ValueError: if the model reads no captions.
    """
    model, tokenizers = compose_model(settings.parts.config, build)
    if "middleware" not in tokenizers:
        raise ValueError(
            "the middleware reads no text, so it cannot compare captions with pictures; choose one that does (middleware=qllama, "
            f"qformer, clip_text_l14), or leave the rule out: stages.{settings.name}.rules.similarity=null"
        )
    return model, make_view(settings, model, tokenizers, build).pairs


def load_filter_model(settings: FilterSettings, build: Build, source: str | Path) -> SimilarityModel:
    """The model of a filter with its weights, on this process's device."""
    own = settings.scorer
    model, pairs = compose_filter_model(own, build)
    tensors = read_weights(source).for_model(None)
    report = LoadReport.of(model, tensors, source=str(source), new=own.new, dropped=own.dropped)
    report.load(model, tensors)
    device, dtype = place_of(own.trainer)
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    return SimilarityModel(model.eval().to(device), pairs, settings.mode, device, half)


def rehearse_filter(job: FilterJob) -> VLM | None:
    """Find faults of a filter before anything trains: in its model, its list of shards.

    Returns:
        the model, where one is needed, to compare its names with those of the source
    """
    job.shards()
    if job.settings.needs_language:
        language_identifier()
    if job.settings.engine == "ray":
        from lightning_internvl.filtering.engines import check_ray

        check_ray()
    if not job.settings.needs_model:
        return None
    with torch.device("meta"):
        return compose_filter_model(job.settings.scorer, job.build)[0]
