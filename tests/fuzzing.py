"""Damaged files of every kind that data comes in, and what reading them gives.

    python tests/fuzzing.py 10000             # so many mutations, spread over all kinds; prints a table

A mutation is named (a ValueError that says what is wrong), read (what comes out is what was written, as far as the file can
tell), `wrong` (a picture with the caption of another, values of another shape), a `traceback`, or a `hang`. A block of a tar put
over the content of another record, and halves of two lines that make a whole one, are files that say something else, which no
reader can tell: Python's own tarfile and json find the same pair in them. They are counted apart, as `rewritten`.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import random
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.files.datasets import PairsFile
from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.files.mask_folder import read_mask
from lightning_internvl.data.files.videos import read_video
from lightning_internvl.data.shards.records import pair_of
from lightning_internvl.data.shards.tables import ParquetShards
from lightning_internvl.data.shards.tar import ShardError, Shards, TarShards

SECONDS = 10  # from which on a reading hangs
RECORDS = 8
GREY = 25  # steps of grey by which a picture tells which record it is of

Pair = tuple[int, int]  # the records of its picture and of its caption
# What is wrong with what was read, or a pair that does not belong together; raises ValueError where a fault is named
Reading = Callable[[Path], str | Pair | None]


class Hang(BaseException):
    """A reading that does not end; no reader catches it."""


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def numbered(record: int) -> bytes:
    """A picture that tells the number of its record."""
    return encoded(Image.new("L", (9, 7), record * GREY), "PNG")


def caption(record: int) -> str:
    """A text that tells the number of its record, in a way that a change does not fake."""
    return "-".join(str(record) * 5) + " zehn"


def mispaired(image: np.ndarray, text: str) -> tuple[int, int] | None:
    """The records of picture and caption of a pair in which both are whole, where they differ."""
    said = [record for record in range(RECORDS) if text == caption(record)]
    seen = int(image[0, 0, 0])
    whole = (image == seen).all() and seen % GREY == 0
    return (seen // GREY, said[0]) if said and whole and seen != said[0] * GREY else None


# --- what is mutated


def tar_files(doubled: bool = False, kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for record in range(RECORDS):
            stem = f"{'0' if doubled else ''}{0 if doubled else record}" + "n" * 120 * (kind == tarfile.GNU_FORMAT)
            for suffix, content in (("png", numbered(record)), ("txt", caption(record).encode())):
                member = tarfile.TarInfo(f"{stem}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def parquet_file(options: dict[str, Any]) -> bytes:
    """A parquet file of pairs."""
    file = io.BytesIO()
    columns = {"image": [numbered(n) for n in range(RECORDS)], "caption": [caption(n) for n in range(RECORDS)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=3, write_page_checksum=True, **options)
    return file.getvalue()


def json_lines(folder: Path) -> bytes:
    """Records of pairs, whose pictures lie beside them."""
    for record in range(RECORDS):
        (folder / f"{record}.png").write_bytes(numbered(record))
    rows = [{"id": f"r{n}", "image": f"{n}.png", "caption": caption(n)} for n in range(RECORDS)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pictures() -> Iterator[tuple[str, bytes]]:
    """Small pictures of all formats and modes, by the ending of their names."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 109)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF", "PCX"):
        yield kind.lower(), encoded(rgb, kind)
    for mode in ("L", "P", "RGBA", "1", "LA"):
        yield "png", encoded(rgb.convert(mode), "PNG")
    for image in (deep, rgb.convert("L").convert("F"), rgb.convert("CMYK")):
        yield "tiff", encoded(image, "TIFF")
    yield "tiff", encoded(rgb, "TIFF", compression="tiff_lzw")
    yield "jpeg", encoded(rgb, "JPEG", progressive=True)
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><rect width="20" height="20" fill="red"/></svg>'


def videos(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Short videos, by the ending of their names; those of PyAV where it is installed."""
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "lime", "blue", "white")]
    for suffix, kind in (("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG")):
        yield suffix, encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    with suppress(ImportError):
        import av

        for suffix, codec in (("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mjpeg"), ("ts", "mpeg4")):
            with av.open(str(folder / f"made.{suffix}"), "w") as container:
                stream: Any = container.add_stream(codec, rate=5)
                stream.width, stream.height, stream.pix_fmt = 32, 24, "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_image(frame)))
                container.mux(stream.encode(None))
            yield suffix, (folder / f"made.{suffix}").read_bytes()


# --- how each is read


def read_shard(kind: Callable[[str], Shards]) -> Reading:
    """All pairs of a shard; what is named of one does not hide the others."""

    def read(path: Path) -> Pair | None:
        named: ValueError | None = None
        try:
            for record in kind(str(path)).read(0):
                try:
                    pair = pair_of(record)
                    if wrong := mispaired(read_image(pair["image"]), pair["caption"]):
                        return wrong
                except BadSample as error:
                    named = error
        except ShardError as error:
            named = error
        if named is not None:
            raise named
        return None

    return read


def read_records(path: Path) -> Pair | None:
    """All pairs of a list."""
    data, named = PairsFile(path), None
    for position in range(len(data)):
        try:
            sample = data[position]
            if wrong := mispaired(sample["image"], sample["caption"]):
                return wrong
        except BadSample as error:
            named = error
    if named is not None:
        raise named
    return None


def read_still(path: Path) -> str | None:
    """A picture."""
    found = read_image(path)
    good = found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
    return None if good else f"{found.shape} {found.dtype}"


def read_moving(path: Path) -> str | None:
    """A video."""
    found, rate = read_video(path)
    good = found.dtype == np.uint8 and found.ndim == 4 and found.shape[3] == 3 and found.size and 0 < rate < float("inf")
    return None if good else f"{found.shape} {found.dtype} {rate}"


def read_classes(path: Path) -> str | None:
    """A mask."""
    found = read_mask(path, 3, False)
    return None if found.dtype == np.uint8 and set(np.unique(found)) <= {0, 1, 2, 255} else f"{found.dtype} {np.unique(found)}"


# --- what a file says by Python's own readers


def pairs_of_tar(path: Path) -> set[Pair]:
    """Neighbours of one name that are a picture and a caption, as `tarfile` finds them before it finds a fault."""
    members = []
    with suppress(tarfile.TarError, OSError, ValueError), tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            members.append((member.name.rpartition("."), content.read() if content else b""))
    found = set[Pair]()
    for ((name, _, kind), picture), ((other, _, text), said) in itertools.pairwise(members):
        if (name, kind, text) == (other, "png", "txt") and (pair := _pair(picture, said.decode(errors="replace"))):
            found.add(pair)
    return found


def pairs_of_lines(path: Path) -> set[Pair]:
    """Those of the lines that `json` reads."""
    found = set[Pair]()
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, OSError, KeyError, TypeError):
            record = json.loads(line)
            if pair := _pair((path.parent / record["image"]).read_bytes(), record["caption"]):
                found.add(pair)
    return found


def _pair(picture: bytes, text: str) -> Pair | None:
    with suppress(OSError, SyntaxError):  # of what is no picture
        return mispaired(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")), text)
    return None


PLAIN: dict[str, Callable[[Path], set[Pair]]] = {"tars": pairs_of_tar, "records": pairs_of_lines}


def is_rewritten(kind: str, path: Path, pair: Pair) -> bool:
    """Whether the file itself says that both belong together."""
    return kind in PLAIN and pair in PLAIN[kind](path)


# --- how it is changed


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file that was cut, of which bits were flipped, bytes set to zero, put in or moved."""
    found, how = bytearray(content), rng.randrange(7)
    place = rng.randrange(len(found))
    if how == 0:
        return bytes(found[:place])
    if how == 1:
        for _ in range(rng.randrange(1, 6)):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif how == 2:
        for _ in range(rng.randrange(1, 4)):
            found[rng.randrange(min(64, len(found)))] = rng.randrange(256)
    elif how == 3:
        found[place : place + rng.randrange(1, 200)] = bytes(rng.randrange(1, 200))
    elif how == 4:
        found[place:place] = rng.randbytes(rng.randrange(1, 40))
    elif how == 5:  # blocks, as of disks and of tars
        start, other = place // 512 * 512, rng.randrange(len(found)) // 512 * 512
        found[start : start + 512 * rng.randrange(2)] = found[other : other + 512]
    else:
        found += found[place:]
    return bytes(found)


def with_sums(content: bytes, rng: random.Random) -> bytes:
    """A tar one of whose headers says something else, and is right by its sum."""
    found, block = bytearray(content), rng.randrange(len(content) // 512) * 512
    place = block + rng.choice([0, 100, 124, 125, 130, 135, 156, 257, 345])
    found[place] = rng.choice([0, 45, 48, 55, 76, 83, 103, 120, 128, 255])
    header = found[block : block + 512]
    found[block + 148 : block + 156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    return bytes(found)


def kinds(folder: Path) -> dict[str, tuple[list[tuple[str, bytes]], Reading]]:
    """What is mutated, and how that is read."""
    mask = Image.fromarray(np.tile(np.array([0, 1, 2], dtype=np.uint8), (20, 10)))
    tars = [tar_files(), tar_files(doubled=True), tar_files(kind=tarfile.GNU_FORMAT)]
    tables = [
        parquet_file(options) for options in ({}, {"compression": "none", "use_dictionary": False}, {"compression": "zstd"})
    ]
    return {
        "records": ([("jsonl", json_lines(folder))], read_records),
        "tars": ([("tar", tar) for tar in tars], read_shard(TarShards)),
        "parquet": ([("parquet", table) for table in tables], read_shard(ParquetShards)),
        "pictures": (list(pictures()), read_still),
        "videos": (list(videos(folder)), read_moving),
        "masks": ([("png", encoded(mask, "PNG")), ("png", encoded(mask.convert("P"), "PNG"))], read_classes),
    }


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Inside, a Hang is raised after a time, and no garbage is collected: of others, it could take longer than a reading."""

    def raise_hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, raise_hang)
    collects = gc.isenabled()
    gc.disable()
    left = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(left)
        signal.signal(signal.SIGALRM, before)
        if collects:
            gc.enable()


def outcome(kind: str, path: Path, read: Reading) -> tuple[str, str]:
    """What reading a file gives, and more about it."""
    try:
        with alarm(SECONDS), warnings.catch_warnings(action="ignore"):
            wrong = read(path)
    except ValueError as error:
        return ("named", str(error)) if str(error).strip() else ("traceback", "nothing is said")
    except Hang:
        return "hang", ""
    except Exception as error:  # what is looked for
        return "traceback", repr(error)
    if isinstance(wrong, tuple):
        told = f"picture {wrong[0]} with the caption of {wrong[1]}"
        return ("rewritten" if is_rewritten(kind, path, wrong) else "wrong"), told
    return ("wrong", wrong) if wrong else ("read", "")


def fuzz(count: int, folder: Path, seed: int = 0) -> tuple[dict[str, Counter[str]], list[str]]:
    """So many mutations over all kinds: outcomes by kind, and what is neither named nor read."""
    found, faults = dict[str, Counter[str]](), list[str]()
    gc.collect()  # what ran before in this process may have left data processes, which take seconds to end
    for name, (files, read) in kinds(folder).items():
        rng, found[name] = random.Random(f"{seed} {name}"), Counter()
        for number in range(count // 6):
            suffix, content = rng.choice(files)
            path = folder / f"mutated.{suffix}"
            change = with_sums if name == "tars" and number % 4 == 0 else mutated
            path.write_bytes(change(content, rng))
            what, more = outcome(name, path, read)
            found[name][what] += 1
            if what not in ("named", "read", "rewritten"):
                faults.append(f"{name} {number} ({suffix}): {what} {more:.200}")
    return found, faults


if __name__ == "__main__":
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        table, bad = fuzz(int(sys.argv[1]), Path(place), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for name, outcomes in table.items():
        print(f"{name:10}", dict(outcomes))
    print("\n".join(bad[:40]), f"{len(bad)} faults, {time.process_time() - begun:.0f} s of CPU", sep="\n")
