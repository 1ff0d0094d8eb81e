"""Tar shards: names, records, damaged files, writing."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import time
from pathlib import Path

import pytest

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.shards.names import Braces
from lightning_internvl.data.shards.sources import open_shards
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import ShardError, TarShards, TarWriter, chats_of, pair_of

RECORDS = [{"key": f"{i:09d}", "jpg": bytes([i]) * (700 + i), "txt": f"caption {i}", "json": {"number": i}} for i in range(20)]


def write(path: Path, records: list[dict] = RECORDS) -> Path:
    with TarWriter(path) as tar:
        for record in records:
            tar.write(record)
    return path


def read(path: Path | str, start: int = 0) -> list[dict]:
    return list(TarShards(path).read(0, start))


def read_broken(path: Path | str) -> tuple[list[str], ShardError]:
    """The keys that a broken shard gives, and what is said of it, as it comes from a data process."""
    keys: list[str] = []
    try:
        for record in TarShards(path).read(0):
            keys.append(record["key"])
    except ShardError as error:
        return keys, pickle.loads(pickle.dumps(error))
    raise AssertionError(f"{path} is whole")


# --- names


def test_patterns_stand_for_many_names(tmp_path: Path) -> None:
    names = TarShards("s3x/{00..02}/{a,b}-{8..12..2}.tar").names
    assert len(names) == 18
    assert [names[0], names[4], names[17]] == ["s3x/00/a-8.tar", "s3x/00/b-10.tar", "s3x/02/b-12.tar"]
    assert list(names) == [names[place] for place in range(18)]
    for name in ("b.tar", "a.tar", "c.tgz", "note.md"):
        (tmp_path / name).touch()
    assert [Path(one).name for one in TarShards(tmp_path).names] == ["a.tar", "b.tar", "c.tgz"]
    assert [Path(one).name for one in TarShards(f"{tmp_path}/*.tar").names] == ["a.tar", "b.tar"]
    (tmp_path / "list.txt").write_text("# two sources\nx{0..1}.tar\n\n/y/z.tar\nmemory://deep/q.tar\n")
    listed = TarShards([tmp_path / "list.txt", "last.tar"])
    assert [listed.name(place) for place in range(len(listed))] == [
        f"{tmp_path}/x0.tar", f"{tmp_path}/x1.tar", "/y/z.tar", "memory://deep/q.tar", "last.tar",
    ]  # fmt: skip


def test_braces_beside_a_star_end(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        for suffix in ("tar", "parquet"):
            (tmp_path / part / f"0.{suffix}").touch()
    for suffix in ("tar", "parquet"):
        found = open_shards(f"{tmp_path}/{{a,b}}/*.{suffix}").names
        assert list(found) == [f"{tmp_path}/a/0.{suffix}", f"{tmp_path}/b/0.{suffix}"]
    with pytest.raises(IndexError):
        Braces("a{0,1}")[2]


def test_the_query_of_a_web_server_is_no_pattern() -> None:
    for suffix, kind in (("tar", TarShards), ("tar.gz", TarShards), ("parquet", ParquetShards)):
        shards = open_shards(f"http://host/{{00..01}}.{suffix}?sig=a*b")
        assert isinstance(shards, kind)
        assert list(shards.names) == [f"http://host/00.{suffix}?sig=a*b", f"http://host/01.{suffix}?sig=a*b"]


def test_many_shards_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"{n}.tar" for n in range(100_000)))
    begun = time.process_time()
    assert len(TarShards("http://host/{000000..999999}.tar")) == 1_000_000
    assert TarShards(tmp_path / "list.txt").name(99_999) == f"{tmp_path}/99999.tar"
    assert time.process_time() - begun < 4


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("none/a.tar", "shard none/a.tar does not exist"),
        ("none/*.tar", "matches no file"),
        ([], "list of shards is empty"),
        ("a{3..1}.tar", "does not rise"),
        ("a{x}.tar", "neither a range"),
        ("a{0..1.tar", "a brace without its other half"),
        ("none.txt", "none.txt cannot be read"),
        ("nosuch://a.tar", "the protocol 'nosuch' is unknown"),
        ("adl://a/b.tar", "adl needs a package that is not installed"),
    ],
)
def test_names_that_are_none(urls: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TarShards(urls)


# --- records


def test_records_come_back_from_any_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    found = read(path)
    assert [(r["key"], r["jpg"], r["txt"].decode(), json.loads(r["json"])) for r in found] == [
        (r["key"], r["jpg"], r["txt"], r["json"]) for r in RECORDS
    ]
    for start in (1, 7, 19, 20, 25):
        assert read(path, start) == found[start:]
    assert list(tmp_path.iterdir()) == [path]
    assert write(tmp_path / "b.tar").read_bytes() == path.read_bytes()
    assert list(pickle.loads(pickle.dumps(TarShards(path))).read(0, 18)) == found[18:]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers(tmp_path: Path, format: int) -> None:  # noqa: A002
    deep = "folder/" * 20 + "é" * 60
    names = ["a/1.JPG", "a/1.seg.png", "a/2.jpg", "README", f"{deep}.txt" if format != tarfile.USTAR_FORMAT else "b/3.txt"]
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=format) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"xyz"))
    found = read(tmp_path / "a.tar.gz")
    assert [sorted(record) for record in found] == [["jpg", "key", "seg.png"], ["jpg", "key"], ["key", "txt"]]
    assert [record["key"] for record in found] == ["a/1", "a/2", names[-1][:-4]]


def test_urls_are_streamed(tmp_path: Path) -> None:
    import fsspec

    path = write(tmp_path / "a.tar")
    with fsspec.open("memory://shards/00.tar", "wb") as file:
        file.write(path.read_bytes())
    assert read("memory://shards/{00..00}.tar", 3) == read(path, 3)
    assert TarShards("memory://shards/*.tar").name(0) == "memory:///shards/00.tar"
    with pytest.raises(ShardError, match=r"memory://shards/01\.tar: does not exist"):
        read("memory://shards/01.tar")


def test_damaged_shards_give_what_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    content, whole = path.read_bytes(), [record["key"] for record in RECORDS]
    member = content.index(b"000000010.txt")  # the header of a member of the eleventh record
    cases = {
        "cut_content.tar": (content[: member + 512 + 3], 10, "cut off"),
        "cut_between.tar": (content[:member], 10, "without the mark of its end"),
        "cut_header.tar": (content[: member + 100], 10, "within the header"),
        "zeroed.tar": (content[: member + 600] + b"\1" * 512 + content[member + 1112 :], 10, "damaged"),
        "page.tar": (b"<!DOCTYPE html><html>" + b" " * 600, 0, "not a tar file: it begins with b'<!DOCTYPE html>"),
        "empty.tar": (b"", 0, "empty"),
        "zeros.tar": (bytes(10240), 0, "zeros alone"),
        "hole.tar": (content[:member] + bytes(4096) + content[member + 4096 :], 10, "damaged: "),
        "tail.tar": (content[:member] + bytes(len(content) - member), 10, "zero bytes behind 31 members"),
        "joined.tar": (content + b"\1" * 512, 19, "what should be the header of member 61 is none"),
    }
    for name, (damaged, records, message) in cases.items():
        (tmp_path / name).write_bytes(damaged)
        keys, said = read_broken(tmp_path / name)
        assert keys == whole[:records], name
        assert message in said.reason
        assert name in str(said)
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8b\x08" + b"\0" * 20)
    assert "cut.tgz" in str(read_broken(tmp_path / "cut.tgz")[1])
    assert str(read_broken("none/{0..1}.tar")[1]) == "shard none/0.tar: does not exist"


def test_tars_put_together_are_read_to_the_end(tmp_path: Path) -> None:
    one = write(tmp_path / "a.tar").read_bytes()
    end = one.rstrip(b"\0")
    short = end + bytes(-len(end) % 512 + 1024)  # as writers that do not fill up their last block
    for first in (one, short):
        (tmp_path / "joined.tar").write_bytes(first + one)
        found = read(tmp_path / "joined.tar")
        assert [record["key"] for record in found] == 2 * [record["key"] for record in RECORDS]
        assert list(TarShards(tmp_path / "joined.tar").read_near(0, 30, found[25].mark)) == found[30:]


def pax(name: bytes, value: bytes) -> bytes:
    """An extended header, and a member of one block."""
    length = len(name) + len(value) + 3
    while len(text := b"%d %s=%s\n" % (length, name, value)) != length:
        length = len(text)
    header, member = tarfile.TarInfo("x"), tarfile.TarInfo("loop")
    header.type, header.size = b"x", len(text)
    return header.tobuf() + text + bytes(-len(text) % 512) + member.tobuf()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (b"size", b"-1536", "a member of b'-1536' bytes"),
        (b"size", b"-512", "a member of b'-512' bytes"),
        (b"size", b"9" * 4000, "a member of b'9999"),
        (b"size", b"9" * 19, ""),
        (b"size", b"1e3", "a member of b'1e3' bytes"),
        (b"GNU.sparse.major", b"1", "write it without --sparse"),
    ],
)
def test_a_size_that_is_none_ends_the_shard(tmp_path: Path, name: bytes, value: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(write(tmp_path / "b.tar").read_bytes()[: 512 * 12] + pax(name, value) + bytes(1024))
    assert message in read_broken(tmp_path / "a.tar")[1].reason


def members(path: Path, *names: str) -> Path:
    """A tar of such files, each of which holds its place."""
    with tarfile.open(path, "w") as tar:
        for place, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"%02d" % place))
    return path


def test_files_that_come_again(tmp_path: Path) -> None:
    """In the same order they are records of one name; in another one, nobody knows what belongs together."""
    path = members(tmp_path / "a.tar", "a.png", "a.txt", "a.png", "a.txt", "b.png", "b.txt")
    assert [pair_of(record)["caption"] for record in read(path)] == ["01", "03", "05"]
    for doubled in (["a.png", "a.png", "a.txt", "a.txt"], ["a.png", "a.txt", "a.txt"], ["a.txt", "a.png", "a.png", "a.txt"]):
        found = read(members(tmp_path / "b.tar", "0.png", "0.txt", *doubled, "b.png", "b.txt"))
        assert [record["key"] for record in found] == ["0", "a", "b"]
        assert [read(tmp_path / "b.tar", start) for start in range(4)] == [found, found[1:], found[2:], []]
        assert [pair_of(found[0])["caption"], pair_of(found[2])["caption"]] == ["01", f"{3 + len(doubled):02}"]
        for reader in (pair_of, chats_of):
            with pytest.raises(BadSample, match="files of one name come again in another order") as caught:
                reader(found[1])
            assert (caught.value.kind, caught.value.key) == ("doubled files", "a")


def test_files_of_one_name_are_bounded(tmp_path: Path) -> None:
    path = members(tmp_path / "a.tar", *(f"a.{n}" for n in range(1100)))
    assert "1001 files of the name 'a'" in read_broken(path)[1].reason


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    for record, message in (
        ({"key": "a.b", "txt": "x"}, "cannot be the key"),
        ({"key": "a", "jpg": object()}, "object is no content of a file"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "a.tar", [RECORDS[0], record])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not to URLs"):
        TarWriter("s3://bucket/a.tar")


# --- what records say


@pytest.mark.parametrize(
    ("record", "caption"),
    [
        ({"jpg": b"J", "txt": b" a cat\n"}, "a cat"),
        ({"webp": b"J", "json": b'{"caption": "a dog"}'}, "a dog"),
        ({"jpg": b"J", "txt": b"\xef\xbb\xbfa cat"}, "a cat"),
        ({"jpg": b"J", "json": b'\xef\xbb\xbf{"caption": "a cat"}'}, "a cat"),
        ({"jpg": b"J", "json": '\ufeff{"caption": "a cat"}'}, "a cat"),
        ({"image": {"bytes": b"J", "path": None}, "text": "a row"}, "a row"),
        ({"images": [{"bytes": b"J"}], "caption": "one"}, "one"),
    ],
)
def test_pairs(record: dict, caption: str) -> None:
    assert pair_of({"key": "7", **record}) == {"image": b"J", "caption": caption, "key": "7"}


def test_pairs_with_names_of_their_own() -> None:
    record = {"key": "7", "jpg": b"no", "big.jpg": b"J", "json": {"alt": "a cat", "language": "de"}, "txt": "no"}
    assert pair_of(record, image="big.jpg", caption="alt") == {"image": b"J", "caption": "a cat", "key": "7", "language": "de"}


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"txt": b"a"}, "missing image", "no picture: none of jpg, .* among txt"),
        ({"jpg": b"J"}, "missing caption", "no caption: none of txt, caption, text among jpg"),
        ({"jpg": b"J", "txt": b" \n"}, "empty caption", "empty"),
        ({"jpg": b"J", "txt": b"\xff\xfe"}, "broken caption", "UTF-8"),
        ({"jpg": b"J", "json": {"caption": 3}}, "broken caption", "no text, but 3"),
        ({"jpg": b"J", "txt": b"a" * 2**20}, "long caption", "1048576 bytes; at most 65536 characters"),
        ({"jpg": b"J", "txt": b"a" * 70_000}, "long caption", "70000 characters; at most 65536"),
        ({"jpg": b"J", "json": b"{"}, "broken line", "json cannot be read"),
        ({"jpg": b"J", "json": b"[" * 100_000}, "broken line", "json cannot be read"),
        ({"jpg": b"J", "json": b'{"caption": "a", "caption": "b"}'}, "broken line", "'caption' stands in it twice"),
        ({"jpg": b"J", "json": b'{"caption": "\\ud800 cat"}'}, "broken caption", "UTF-8"),
        ({"jpg": b"J", "txt": "cat".encode("utf-16-le")}, "broken caption", "holds zeros, as UTF-16"),
        ({"jpg": b"J", "png": b"P", "txt": b"a"}, "several images", "2 pictures for one caption, jpg, png"),
        ({"image": "a/b.jpg", "text": "x"}, "missing image", "'a/b.jpg' is not the bytes of a file"),
    ],
)
def test_pairs_that_are_none(record: dict, kind: str, message: str) -> None:
    with pytest.raises(BadSample, match=message) as caught:
        pair_of({"key": "7", **record})
    assert (caught.value.kind, caught.value.key) in ((kind, "7"), ("long caption", None))


def test_conversations_with_the_pictures_beside_them() -> None:
    said = [{"from": "human", "value": "<image><image> which?"}, {"from": "gpt", "value": "the second"}]
    record = {"key": "7", "10.jpg": b"C", "2.jpg": b"B", "json": json.dumps({"image": "x.jpg", "conversations": said})}
    assert chats_of(record) == {"conversations": said, "images": [b"B", b"C"], "key": "7"}
    row = {"key": "8", "messages": said, "images": [{"bytes": b"B"}]}
    assert chats_of(row) == row
    assert chats_of({"key": "9", "jpg": b"J", "txt": "a cat"})["caption"] == "a cat"
