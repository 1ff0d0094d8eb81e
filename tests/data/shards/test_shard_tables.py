"""Shards of rows: parquet, and data sets that the `datasets` library streams."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_internvl.data.shards.tables import HfShards, ParquetShards
from lightning_internvl.data.shards.tar import ShardError, pair_of

pyarrow = pytest.importorskip("pyarrow")
ROWS = 10


def write(folder: Path, files: int = 2) -> list[Path]:
    """Files of ten rows in groups of four; pictures are two bytes."""
    import pyarrow.parquet

    paths = []
    for file in range(files):
        pictures = [{"bytes": bytes([file, row]), "path": f"{row}.png"} for row in range(ROWS)]
        table = pyarrow.table({"image": pictures, "text": [f"{file}-{row}" for row in range(ROWS)], "size": list(range(ROWS))})
        paths.append(folder / f"{file}.parquet")
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=4)
    return paths


def test_rows_from_any_place(tmp_path: Path) -> None:
    write(tmp_path)
    shards = ParquetShards(f"{tmp_path}/{{0..1}}.parquet")
    assert len(shards) == 2
    assert shards.name(1) == f"{tmp_path}/1.parquet"
    found = list(shards.read(1))
    assert pair_of(found[6]) == {"image": b"\1\6", "caption": "1-6", "key": "000000006"}
    for start in (0, 3, 4, 9, 10, 12):
        assert list(shards.read(1, start)) == found[start:]


def test_row_groups_and_columns(tmp_path: Path) -> None:
    write(tmp_path)
    shards = ParquetShards(tmp_path, columns=["text"], by="row_group")
    assert len(shards) == 6
    assert shards.name(4) == f"{tmp_path}/1.parquet, row group 1"
    assert [list(row.items()) for row in shards.read(4, 2)] == [
        [("text", "1-6"), ("key", "000000002")],
        [("text", "1-7"), ("key", "000000003")],
    ]
    assert [row["text"] for shard in range(6) for row in shards.read(shard)] == [
        f"{f}-{r}" for f in range(2) for r in range(ROWS)
    ]


def test_faults_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, _) = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match=r"0\.parquet: cannot be read"):
        list(ParquetShards(path).read(0))
    with pytest.raises(ShardError, match=r"2\.parquet: does not exist"):
        list(ParquetShards(f"{tmp_path}/{{2..3}}.parquet").read(0))
    with pytest.raises(ShardError, match="no column 'caption' among image, text, size"):
        list(ParquetShards(tmp_path / "1.parquet", columns=["caption"]).read(0))
    with pytest.raises(ValueError, match="by='rows' is not known; valid choices: file, row_group"):
        ParquetShards(path, by="rows")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-parquet\.txt"):
        ParquetShards(path)


def test_data_sets_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-datasets\.txt"):
        HfShards("someone/something")


def test_local_data_sets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    files = [str(path) for path in write(tmp_path)]
    shards = HfShards("parquet", data_files=files)
    assert len(shards) == 2
    found = list(shards.read(1))
    assert pair_of(found[6]) == {"image": b"\1\6", "caption": "1-6", "key": "000000006"}
    assert list(shards.read(1, 7)) == found[7:]
    with pytest.raises(ValueError, match=r"data set .*none, split train, cannot be opened"):
        HfShards(str(tmp_path / "none"))


def test_pictures_named_by_their_paths_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    import pyarrow.parquet

    (tmp_path / "a.png").write_bytes(b"not decoded")
    table = pyarrow.table({"image": [{"bytes": None, "path": str(tmp_path / "a.png")}], "text": ["a cat"], "id": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (record,) = HfShards("parquet", data_files=str(tmp_path / "a.parquet")).read(0)
    assert pair_of(record) == {"image": b"not decoded", "caption": "a cat", "key": "x"}
