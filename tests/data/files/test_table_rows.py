"""Tables of text: what a quotation mark means, and that none costs another row."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest
from PIL import Image

from lightning_internvl.data.files.captions import read_captions
from lightning_internvl.data.files.datasets import PairsFile
from lightning_internvl.data.files.records import RecordFile
from lightning_internvl.data.files.table_rows import LONGEST, fields_of, read_rows, read_table
from lightning_internvl.data.files.video_lists import read_video_list


def table(path: Path, *lines: str, header: str = "image,caption") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", "utf-8")
    return path


def captions(path: Path) -> list[str | None]:
    """The captions of a file of records; None for one that is bad."""
    return [found.record and found.record["caption"] for found in RecordFile(path).scan()]


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('a.png,a 5" disk', 'a 5" disk'),
        ('a.png,"Look up', '"Look up'),
        ('a.png,"Look up" says the girl', '"Look up" says the girl'),
        ('a.png,a disk of 5"', 'a disk of 5"'),
        ('a.png,"', '"'),
        ('a.png,"""', '"""'),
        ('a.png,""', ""),
        ('a.png,"a, ""b"""', 'a, "b"'),
        ('a.png, "a, b" ', "a, b"),
        ("a.png, a ", " a "),
    ],
)
def test_a_mark_that_encloses_no_field_is_text(tmp_path: Path, line: str, caption: str) -> None:
    path = table(tmp_path / "t.csv", *(["b.png,before", line] + [f"c.png,number {n}" for n in range(2000)]))
    assert captions(path) == ["before", caption, *(f"number {n}" for n in range(2000))]
    file = RecordFile(path)
    assert [file.read(place) for place in (1, 2001)] == [
        ({"image": "a.png", "caption": caption}, 3),
        ({"image": "c.png", "caption": "number 1999"}, 2003),
    ]


def test_two_marks_far_apart_enclose_no_rows(tmp_path: Path) -> None:
    """By the csv module's rules the caption of the first would hold all rows up to the last."""
    lines = ['a.png,"Look up', *(f"{n}.jpg,number {n}" for n in range(50)), 'b.png,a disk of 5"', "c.png,last"]
    assert captions(table(tmp_path / "t.csv", *lines)) == [line.partition(",")[2] for line in lines]
    ids = ['1\ta\t"Look up', "2\tb\tc", '3\td\te"']
    assert captions(table(tmp_path / "t.tsv", *ids, header="id\tword\tcaption")) == ['"Look up', "c", 'e"']


def test_fields_over_several_lines(tmp_path: Path) -> None:
    lines = ['a.png,"A dog.\nOK, fine\n\n  ""he"" said"', 'b.png,"one\ntwo"', 'c.png,"no end', "d.png,plain"]
    path = table(tmp_path / "t.csv", *lines)
    assert captions(path) == ['A dog.\nOK, fine\n\n  "he" said', "one\ntwo", '"no end', "plain"]
    assert [found.line for found in RecordFile(path).scan()] == [2, 6, 8, 9]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert captions(path) == ['A dog.\r\nOK, fine\r\n\r\n  "he" said', "one\r\ntwo", '"no end', "plain"]


def test_a_mark_without_end_is_given_up_early(tmp_path: Path) -> None:
    """Reading on to the end of a file at each such mark would take memory and time that grow with the file."""

    class Counted(io.BytesIO):
        lines = 0

        def readline(self, *size: int) -> bytes:
            self.lines += 1
            return super().readline(*size)

    line = b"a.png," + b"x" * 1000 + b"\n"
    file = Counted(b'a.png,"\n' + line * 2000)
    found = read_rows(file, ",", columns=2)
    assert next(found) == (2, b'a.png,"\n')
    assert file.lines <= LONGEST / len(line) + 3
    assert sum(1 for _ in found) == 2000


def test_more_or_fewer_fields_than_columns_are_named_and_not_cut(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    lines = ["a.png,A man , a dog and 0 birds", "a.png", 'a.png,"He said "hi", then left"', "a.png,right"]
    data = PairsFile(table(tmp_path / "t.csv", *lines))
    assert len(data) == 4
    for place, said in ((0, "but of 3; a field that holds ',' must stand"), (1, "but of 1"), (2, "one within it is not doubled")):
        with pytest.raises(ValueError, match=rf"t\.csv, line {place + 2}: not a record of 2 fields \(image, caption\), .*{said}"):
            data[place]
    assert data[3]["caption"] == "right"
    with pytest.raises(ValueError, match=r"t\.csv: line 2 is not a record of 2 fields .* but of 3"):
        read_captions(tmp_path / "t.csv")


@pytest.mark.parametrize(("name", "mark"), [("results.csv", "| "), ("captions.tsv", "\t"), ("captions.csv", ",")])
def test_tables_of_captions_with_lone_marks(tmp_path: Path, name: str, mark: str) -> None:
    for n in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{n}.jpg")
    said = [f"caption {j} of picture {n} ." for n in range(6) for j in range(5)]
    said[3], said[12], said[20] = '"Look up says the girl .', "a\u2028b", '"The end'
    lines = [f"{place // 5}.jpg{mark}{place % 5}{mark}{text}" for place, text in enumerate(said)]
    found = read_captions(table(tmp_path / name, *lines, header=mark.join(("image_name", "comment_number", "comment"))))
    assert [text for own in found.captions for text in own] == said


def test_lists_of_videos_with_a_lone_mark(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    path = table(tmp_path / "v.csv", 'a,"up', "b,down", "", "c,down", header="path,label")
    assert read_video_list(path).labels == [0, 1, 1]
    with pytest.raises(ValueError, match="line 5 is not a record of 2 fields"):
        read_video_list(table(tmp_path / "v.csv", "a,up", "b,down", "", "c,down,left", header="path,label"))


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("image,caption\na.png,one\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"t\.csv: the first line is no text in UTF-8"):
        len(RecordFile(path))
    with pytest.raises(ValueError, match=r"t\.csv: line 1 is no text in UTF-8"):
        read_captions(path)
    path.write_bytes(b"image,caption\na.png,caf\xe9\nb.png,two\n")
    assert captions(path) == [None, "two"]


@pytest.mark.parametrize("separator", [",", "\t", "|"])
def test_what_the_csv_module_writes_is_read(tmp_path: Path, separator: str) -> None:
    rng, parts = random.Random(0), ["a", " ", '"', "\n", separator, "é", "x.png", "\r\n", '""', "."]
    for _ in range(100):
        said = [["".join(rng.choices(parts, k=rng.randrange(7))) for _ in range(3)] for _ in range(rng.randrange(1, 6))]
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([["one", "two", "three"], *said])
        path = tmp_path / "t"
        path.write_bytes(stream.getvalue().encode())
        found = [fields for _, fields in read_table(path, [separator])]
        assert found == [["one", "two", "three"], *([field.strip() for field in row] for row in said)], stream.getvalue()


def test_every_byte_is_in_one_row() -> None:
    rng, parts = random.Random(1), [b"a", b",", b'"', b"\n", b'""', b"\r\n", b" ", b'"\n"', b'","']
    for _ in range(3000):
        text = b"".join(rng.choices(parts, k=rng.randrange(40)))
        found = list(read_rows(io.BytesIO(text), ",", columns=2))
        assert b"".join(content for _, content in found) == text
        line = 2
        for number, content in found:
            assert number == line
            line += content.count(b"\n")
            if content.count(b"\n") > content.endswith(b"\n"):  # over several lines: its marks are paired
                assert any("\n" in field for field in fields_of(content, ","))
