"""Shards of scenes: whole records, faults in their shares, the same files for the same settings."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_internvl.data.scene_shards import FAULTS, SpoiltScenes, main, write_scene_shards
from lightning_internvl.data.shards.tar import TarShards, pair_of


def size(record: dict[str, Any]) -> tuple[int, int]:
    with Image.open(io.BytesIO(record["jpg"])) as image:
        return image.size


def test_the_command_writes_equal_shards_for_equal_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        main([f"to={tmp_path / folder}", "pairs=25", "per_shard=10", "spoilt=0.5", "image_size=32"])
    assert capsys.readouterr().out.startswith(f"3 shards in {tmp_path / 'a'}")
    files = [sorted((tmp_path / folder).iterdir()) for folder in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    shards = TarShards(str(tmp_path / "a"))
    records = [record for shard in range(len(shards)) for record in shards.read(shard)]
    assert [record["key"] for record in records] == [f"{index:09d}" for index in range(25)]
    assert all(pair_of(record)["caption"] for record in records)


def test_faults_come_in_their_shares_and_are_what_they_say() -> None:
    scenes = SpoiltScenes(spoilt=0.5, image_size=32)
    faults = Counter(scenes.fault(index)[0] for index in range(4000))
    assert faults.pop(None) / 4000 == pytest.approx(0.5, abs=0.03)
    assert {name: number / faults.total() for name, number in faults.items()} == pytest.approx(FAULTS, abs=0.03)
    records = [scenes.record(index) for index in range(80)]
    by_fault = {fault: [r for r in records if r["json"]["fault"] == fault] for fault in (None, *FAULTS)}
    good = {(record["jpg"], record["txt"]) for record in by_fault[None]}
    assert all((record["jpg"], record["txt"]) in good for record in by_fault["copied"])
    assert all(record["jpg"] not in {jpg for jpg, _ in good} for record in by_fault["recompressed"])
    assert {size(record) for record in by_fault["tiny"]} == {(12, 12)}
    assert all(width > 3 * height for width, height in map(size, by_fault["stretched"]))
    assert {record["txt"][:3] for record in by_fault["file_name"]} == {"IMG"}
    assert not any(record["txt"].isascii() for record in by_fault["foreign"])
    whole = SpoiltScenes(image_size=32)
    assert all(whole.record(int(r["key"]))["txt"] != r["txt"] for r in by_fault["mismatched"])
    assert all(whole.record(int(r["key"]))["jpg"] == r["jpg"] for r in by_fault["mismatched"])
    assert json.loads(json.dumps(records[0]["json"]))["fault"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["to=x"], "give pairs=VALUE"),
        (["to=x", "pair=3"], "there is no setting 'pair'; did you mean 'pairs'"),
        (["to=x", "pairs=0"], "pairs=0 must be a whole number above 0"),
        (["to=x", "pairs=3", "spoilt=2"], "spoilt=2 must be a share"),
        (["to=x", "pairs=3", "format=gif"], "format='gif' is not known"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        main(arguments)


def test_an_unknown_fault_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no fault 'blurred'"):
        write_scene_shards(tmp_path, 3, faults={"blurred": 1.0})
