"""The filter as a step of a run: what it writes, who reads it, kills, bad shards, and settings that keep nothing."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from runs import ROOT, TINY, read_json, same_weights, tiny_run, train

from lightning_internvl.config.filter_settings import filter_settings, settings_before
from lightning_internvl.config.targets import build
from lightning_internvl.data.scene_shards import write_scene_shards
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import TarShards, TarWriter, pair_of
from lightning_internvl.filtering import command as step, job as work
from lightning_internvl.filtering.scores import read_rows
from lightning_internvl.filtering.sources import JoinedShards, join_sources
from lightning_internvl.filtering.write import scored_record

WEBDATASET = ("data=webdataset", "data.num_workers=0", "data.lanes=2", "data.turns=1", "data.held_out=null")
LATIN = "stages.filter.rules.scripts={allowed: [latin, han], min: 0.5}"
ALONE = ("pipeline=[filter]", *WEBDATASET, LATIN)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs in 3 shards, some of them spoilt."""
    folder = tmp_path_factory.mktemp("shards")
    write_scene_shards(folder, pairs=48, per_shard=16, image_size=48, spoilt=0.5)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """All three steps of a pipeline."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return tiny_run(folder, "pipeline=[contrastive,filter,generative]", *WEBDATASET, f"data.shards={shards}", LATIN)


def records(place: Any) -> Iterator[dict[str, Any]]:
    found = TarShards(place)
    for shard in range(len(found)):
        yield from found.read(shard)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_kept_is_what_it_was_with_scores_beside_it(run: Path, shards: Path) -> None:
    before = {record["key"]: record for record in records(str(shards))}
    after = {record["key"]: record for record in records(str(run / "filter" / "shards.txt"))}
    summary = read_json(run / "filter" / "summary.json")
    assert 0 < len(after) == summary["kept"] < len(before) == summary["pairs"] == 48
    for key, record in after.items():
        said = json.loads(record["json"])
        scores = said.pop("scores")
        assert said == json.loads(before[key]["json"])
        assert (record["jpg"], record["txt"]) == (before[key]["jpg"], before[key]["txt"])
        assert -1 <= summary["similarity_from"] <= scores["similarity"] <= 1
        assert scores["side"] >= 16
        assert "picture" not in scores


def test_each_pair_is_kept_or_dropped_by_a_rule(run: Path, shards: Path) -> None:
    folder = run / "filter"
    dropped = {row["key"]: row["rule"] for path in (folder / "dropped").iterdir() for row in read_rows(path)}
    kept = {record["key"] for record in records(str(folder / "shards.txt"))}
    faults = {record["key"]: json.loads(record["json"])["fault"] for record in records(str(shards))}
    assert kept | set(dropped) == set(faults)
    assert not kept & set(dropped)
    assert {dropped[key] for key, fault in faults.items() if fault == "tiny"} == {"side"}
    assert {dropped[key] for key, fault in faults.items() if fault == "foreign"} == {"scripts"}
    assert {dropped[key] for key, fault in faults.items() if fault == "copied"} == {"same_picture"}
    summary = read_json(folder / "summary.json")
    assert sum(summary["dropped"].values()) == len(dropped)
    assert sum(column[2] for column in summary["histograms"]["similarity"]) == 48
    assert sum(counts["kept"] for counts in summary["languages"].values()) == len(kept)
    assert {pair["rule"] for pair in summary["shown"]} >= {"kept", "side", "scripts"}
    assert sum(column[3] for column in summary["histograms"]["similarity"]) == len(kept)


def test_the_stage_behind_reads_what_is_kept_and_goes_on_from_the_stage_before(run: Path, tmp_path: Path) -> None:
    alone = tiny_run(
        tmp_path / "alone", "pipeline=[generative]", *WEBDATASET, f"data.shards={run / 'filter' / 'shards.txt'}",
        f"init_from={run / 'handoff' / 'contrastive'}",
    )  # fmt: skip
    assert same_weights(run, alone, "generative")
    again = train(f"resume={run}")
    assert again.code == 0
    assert f"filter: finished earlier, taken from {run / 'filter'}" in again.out


def test_the_report_tells_what_was_kept(run: Path) -> None:
    page, summary = (run / "report.html").read_text(), read_json(run / "filter" / "summary.json")
    assert f"keeps {summary['kept']} of 48 pairs" in page
    assert 'id="filter"' in page
    assert "similarity: pairs seen and kept" in page
    assert read_json(run / "metrics.json")["filter"] == {
        "pairs": 48, "kept": summary["kept"], "kept_share": summary["kept"] / 48,
    }  # fmt: skip


def test_a_killed_filter_loses_one_shard_and_writes_the_same(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once while it scores and once while it writes, it ends with the bytes of the run that was not."""
    scored, written, real_rows, real_shard = [], [], work.write_rows, work.write_shard

    def write_rows(path: Path, rows: Any) -> None:
        scored.append(path.name)
        if len(scored) == 2:
            raise KeyboardInterrupt
        real_rows(path, rows)

    def write_shard(*given: Any) -> None:
        written.append(given[1])
        if len(written) == 3:
            raise KeyboardInterrupt
        real_shard(*given)

    monkeypatch.setattr(work, "write_rows", write_rows)
    monkeypatch.setattr(work, "write_shard", write_shard)
    again, source = tmp_path / "again", run / "handoff" / "contrastive"
    with pytest.raises(KeyboardInterrupt):
        train(*TINY, *ALONE, f"data.shards={shards}", f"init_from={source}", f"paths.run={again}")
    with pytest.raises(KeyboardInterrupt):
        train(f"resume={again}")
    assert train(f"resume={again}").code == 0
    assert scored == ["000000.jsonl", "000001.jsonl", "000001.jsonl", "000002.jsonl"]
    assert written == [0, 1, 2, 2]
    assert contents(again / "filter") == contents(run / "filter")


def test_workers_change_nothing(run: Path, shards: Path, tmp_path: Path) -> None:
    settings = (f"data.shards={shards}", f"init_from={run / 'handoff' / 'contrastive'}", "stages.filter.num_workers=1")
    other = tiny_run(tmp_path / "run", *ALONE, *settings)
    assert contents(other / "filter") == contents(run / "filter")


def test_two_processes_share_the_work_and_change_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand for processes: they meet in the folder alone."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    job = work.FilterJob(filter_settings(config, "filter"), tmp_path / "filter", build, run / "handoff" / "contrastive")
    own = threading.local()
    monkeypatch.setattr(step, "rank_and_world_size", lambda: (own.rank, 2))

    def process(rank: int) -> None:
        own.rank = rank
        step.run_filter(job, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, (1, 0)))
    assert contents(tmp_path / "filter") == contents(run / "filter")


def test_processes_from_outside_know_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step.rank_and_world_size() == (0, 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert step.rank_and_world_size() == (1, 3)


def test_a_filter_reads_pairs_as_the_stage_before_it() -> None:
    stages = {
        "a": {
            "data": "pairs",
            "encoder": {"image_size": 64},
            "collate": {"max_length": 9, "tasks": ["itg"], "processor": {"s": 1}},
        },
        "b": {"data": "chats", "collate": {"template": "x", "processor": {"s": 2}}},
        "filter": {"step": "filter"},
    }
    after_a, after_b = (
        settings_before("filter", {"stages": stages, "pipeline": [*before, "filter", "c"]}) for before in (["a"], ["a", "b"])
    )
    assert after_a == {"encoder": {"image_size": 64}, "collate": {"max_length": 9, "tasks": ["itc"], "processor": {"s": 1}}}
    assert after_b == {"collate": {"tasks": ["itc"], "processor": {"s": 2}}}


def test_rules_without_a_model_and_several_sources(shards: Path, tmp_path: Path) -> None:
    given = f"data.sources={{a: {{shards: '{shards}/00000.tar', language: de}}, b: {{shards: '{shards}/0000[12].tar'}}}}"
    run = tiny_run(tmp_path / "run", *ALONE, given, "stages.filter.rules.similarity=null")
    summary = read_json(run / "filter" / "summary.json")
    assert set(summary["kept_by_source"]) == {"a", "b"}
    assert sum(summary["kept_by_source"].values()) == summary["kept"] > 24
    assert "similarity" not in summary["histograms"]
    said = [{row.get("told_language") for row in read_rows(path)} for path in sorted((run / "filter" / "scores").iterdir())]
    assert said == [{"en", "zh"}] * 3  # as records say, before their source
    joined = join_sources(
        {"sources": {"a": {"shards": f"{shards}/00000.tar", "language": "de"}, "b": {"shards": str(shards)}}}, build
    )
    assert [joined.language(shard) for shard in range(len(joined))] == ["de", None, None, None]
    assert (run / "filter" / "shards.b.txt").read_text() == "shards/000001.tar\nshards/000002.tar\n"
    assert len(list(records(str(run / "filter" / "shards.a.txt")))) == summary["kept_by_source"]["a"]


def test_other_rules_over_the_same_scores(run: Path, shards: Path, tmp_path: Path) -> None:
    settings = (f"data.shards={shards}", f"stages.filter.scores_from={run / 'filter'}")
    same = tiny_run(tmp_path / "same", *ALONE, *settings)
    assert contents(same / "filter") == contents(run / "filter")
    outcome = train(*TINY, *ALONE, f"data.shards={shards}/00000.tar", settings[1], f"paths.run={tmp_path / 'other'}")
    assert outcome.code == 2
    assert "holds the scores of 3 shards, and there are 1" in outcome.err


def test_ray_does_the_same_work(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="engine=ray needs Ray: pip install -r requirements-ray.txt")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))  # of the actors
    given = (*ALONE, f"data.shards={shards}", "stages.filter.rules.similarity=null")
    here = tiny_run(tmp_path / "here", *given)
    # a short path, because its sockets lie there; the warnings are Ray's own
    with tempfile.TemporaryDirectory(prefix="ray") as folder, warnings.catch_warnings(action="ignore"):
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            there = tiny_run(tmp_path / "there", *given, "stages.filter.engine=ray")
        finally:
            ray.shutdown()
    for folder in ("shards", "scores", "dropped"):
        assert contents(here / "filter" / folder) == contents(there / "filter" / folder)


def test_what_cannot_be_used_is_named_and_left_out(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    with TarWriter(folder / "0.tar") as tar:
        for record, change in zip(
            records(str(shards)), [{"jpg": b"<html>"}, {"txt": ""}, {"txt": "word " * 300}, *[{}] * 6], strict=False
        ):
            tar.write(record | change)
    whole = (shards / "00001.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    rules = ("stages.filter.rules.similarity=null", "stages.filter.rules.same_picture=null")
    run = tiny_run(tmp_path / "run", *ALONE, f"data.shards={folder}", *rules)
    summary = read_json(run / "filter" / "summary.json")
    assert summary["unusable"] == {"broken shard": 1, "empty caption": 1, "unreadable image": 1}
    assert summary["dropped"]["characters"] == 1
    named = read_rows(run / "filter" / "skipped.jsonl")
    assert [(row["batch"], row["kind"]) for row in named] == [(0, "unreadable image"), (0, "empty caption"), (1, "broken shard")]
    outcome = train(*TINY, *ALONE, f"data.shards={folder}", *rules, "data.max_bad_fraction=0", f"paths.run={tmp_path / 'strict'}")
    assert outcome.code == 2
    assert "2 of 9 samples cannot be used" in outcome.err


def test_a_filter_that_drops_more_than_half_is_pointed_out(shards: Path, tmp_path: Path) -> None:
    given = (*ALONE, f"data.shards={shards}", "stages.filter.rules.similarity=null")
    few = train(*TINY, *given, f"paths.run={tmp_path / 'few'}")
    many = train(*TINY, *given, "stages.filter.rules.characters.min=60", f"paths.run={tmp_path / 'many'}")
    assert (few.code, many.code) == (0, 0), many.err
    assert "pairs are dropped:" not in few.out
    assert re.search(r"warning: \d+ of 48 pairs are dropped: characters \d+ \(min: 60, max: 1000\); ", many.out)


def test_a_rule_that_drops_everything_is_named_and_the_scores_stay(shards: Path, tmp_path: Path) -> None:
    rules = ("stages.filter.rules.similarity=null", "stages.filter.rules.words.min=50")
    outcome = train(*TINY, *ALONE, f"data.shards={shards}", *rules, f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "none of 48 pairs is kept" in outcome.err
    assert "words drops" in outcome.err
    assert "(min: 50)" in outcome.err
    assert len(list((tmp_path / "run" / "filter" / "scores").iterdir())) == 3


@pytest.mark.parametrize(
    ("pipeline", "arguments", "told"),
    [
        ("contrastive,filter,generative", (), "give data=webdataset data.shards="),
        ("filter", (*WEBDATASET, "stages.filter.rules.similarity=null", "stages.filter.engine=ray"), "-r requirements-ray.txt"),
    ],
)
def test_bad_settings_stop_before_anything_is_built(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: str, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    given = (f"data.shards={shards}",) if arguments else ()
    outcome = train(f"pipeline=[{pipeline}]", *arguments, *given, f"paths.run={tmp_path / 'run'}")
    assert (outcome.code, (tmp_path / "run").exists()) == (2, False)
    assert told in outcome.err


def test_columns_of_a_table_become_files(tmp_path: Path) -> None:
    table = pyarrow.table({"id": ["a.b", "c"], "img": [b"one", b"two"], "alt": ["a cat", "a dog"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    shards = JoinedShards({"shards": ParquetShards(str(tmp_path / "0.parquet"))}, image="img", caption="alt")
    with TarWriter(tmp_path / "0.tar") as tar:
        for place, record in enumerate(shards.read(0)):
            tar.write(scored_record(shards, 0, place, record, {"key": record["key"], "similarity": 0.5, "picture": "0"}))
    found = [pair_of(record, "img", "alt") | json.loads(record["json"]) for record in records(str(tmp_path / "0.tar"))]
    assert [(one["image"], one["caption"], one["key"]) for one in found] == [(b"one", "a cat", "a.b"), (b"two", "a dog", "c")]
    assert found[0]["scores"] == {"similarity": 0.5}
