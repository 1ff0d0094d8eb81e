"""Training data from tar shards beside webdataset: 640x480 JPEGs to batches of 448 px, images a second of one core, and memory.

    pip install -r requirements.txt webdataset==1.0.2 braceexpand==0.1.7
    python benchmarks/loader.py                                  # 512 pictures, 7 rounds
    python benchmarks/loader.py pictures=128 rounds=3 batch=32

Each side lives in a process of its own with one thread and no workers; they take turns. Both read the same shards, shuffle among
200 records and hand over the same batches: captions, and pictures squashed to 448x448, once as bytes (B, S, S, 3), as they go
to the device, and once normalised in float32 (B, 3, S, S) on the host (`products`). `webdataset` decodes with Pillow, as
`decode("pilrgb")` does, resizes with its bicubic filter, and makes tensors as torchvision's ToTensor and Normalize do. `ours` are
the lanes of data=webdataset with a collator of pictures alone: `ours_exact` gives the same bytes, `ours_torch`
(data.processor.resize=torch, the default of random parts) nearly the same:
`differing` is the share of values
that do, `largest` by how much of 255. A core's second is one of processor time, which other programs do not lengthen; `ratio` is
the median over rounds. `peak_MiB` is the largest resident memory of the process, `imports_MiB` what it was before the first
batch. Prints one JSON line.
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternating import arguments, report
from PIL import Image

from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.data.processors.pixels import IMAGENET_MEAN, IMAGENET_STD
from lightning_internvl.data.shards.cursor import ReaderLayout
from lightning_internvl.data.shards.datasets import ShardPairs
from lightning_internvl.data.shards.stream import ShardStream
from lightning_internvl.data.shards.tar import TarWriter

SIDE, WIDTH, HEIGHT = 448, 640, 480
SHARDS = 4
OURS = {"ours_exact": "pillow", "ours_torch": "torch"}
SIDES = ("webdataset", *OURS)
PRODUCTS = ("uint8", "float32")
SHUFFLE = 200

Batch = tuple[torch.Tensor, list[str]]


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG with detail at all scales, as photographs have."""
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    cells = 4
    while cells <= WIDTH:
        noise = rng.normal(0, 90 / cells**0.45, (max(2, cells * HEIGHT // WIDTH), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
        cells *= 2
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shards(folder: str, pictures: int) -> tuple[str, int]:
    """Shards of pictures with captions: their pattern, and the bytes of a picture on average."""
    rng, total = np.random.default_rng(0), 0
    for shard in range(SHARDS):
        with TarWriter(Path(folder, f"{shard:05d}.tar")) as tar:
            for number in range(pictures // SHARDS):
                content = photo(rng)
                total += len(content)
                tar.write({"key": f"{shard:05d}{number:04d}", "jpg": content, "txt": f"picture {number} of shard {shard}"})
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar", total // pictures


def their_batches(urls: str, product: str, pictures: int, size: int, shuffle: int) -> Iterator[Batch]:
    """A webdataset pipeline as its documentation builds them."""
    import webdataset

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def transform(image: Image.Image) -> torch.Tensor:
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small))
        return pixels if product == "uint8" else pixels.permute(2, 0, 1).contiguous().float().div(255).sub_(mean).div_(std)

    found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    found = found.shuffle(shuffle) if shuffle > 1 else found
    batches = found.decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform, str).batched(size)
    return islice(iter(batches), pictures // size)


class Pictures:
    """A collator of pictures and captions as they are."""

    def __init__(self, product: str, resize: str) -> None:
        self.product, self.processor = product, Squash(SIDE, resize=resize)

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The square of a sample."""
        return {"square": self.processor(sample["image"], sample["draw"]), "caption": sample["caption"]}

    def stack(self, prepared: list[dict[str, Any]]) -> dict[str, Any]:
        """The squares as one tensor."""
        batch = self.processor.inputs([one["square"] for one in prepared])
        batch = batch if self.product == "uint8" else self.processor.normalised(batch)
        return {**batch, "captions": [one["caption"] for one in prepared]}


def our_batches(urls: str, product: str, pictures: int, size: int, shuffle: int, resize: str) -> Iterator[Batch]:
    """The batches of one process from one lane."""
    data = ShardPairs(urls, shuffle=shuffle, lanes=1, turns=1)
    for batch in ShardStream(data, Pictures(product, resize), ReaderLayout.for_step(1, 1, size), batches=pictures // size):
        yield batch["pixel_values"], batch["captions"]


def serve(side: str, pipe: Any) -> None:
    """One side: goes through what it is asked for, and hands over times, or the last batch, until it is asked for nothing."""
    torch.set_num_threads(1)
    begun = peak()
    while (asked := pipe.recv()) is not None:
        *what, shown = asked
        batches = their_batches(*what) if side == "webdataset" else our_batches(*what, OURS[side])
        started = time.process_time(), time.perf_counter()
        pictures, last = 0, None
        for pixels, captions in batches:
            pictures, last = pictures + len(captions), (pixels, captions) if shown else None
        times = (pictures, time.process_time() - started[0], time.perf_counter() - started[1], peak(), begun)
        pipe.send((last[0].numpy(), last[1]) if shown else times)


def peak() -> float:
    """The largest resident memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(ask: Callable[..., Any], urls: str, size: int) -> dict[str, dict[str, float]]:
    """How a batch differs from webdataset's."""
    found: dict[str, dict[str, float]] = {}
    for product, unit, slack in (("uint8", 1, 0), ("float32", 255 * min(IMAGENET_STD), 1e-3)):
        theirs, captions = ask("webdataset", urls, product, size, size, 1, True)
        for side in OURS:
            ours, said = ask(side, urls, product, size, size, 1, True)
            gap = np.abs(ours.astype(np.float64) - theirs) * unit
            assert said == captions
            assert gap.max() <= (slack if side == "ours_exact" else 3), (side, product, gap.max())
            found.setdefault(side, {"differing": round(float((gap > 0).mean()), 6), "largest": int(gap.max())})
    return found


def summary(times: list[tuple[Any, ...]]) -> dict[str, float]:
    """Images a second of one core and of the clock (medians), the spread between the quartiles, and memory."""
    core, clock = ([one[0] / one[which] for one in times] for which in (1, 2))
    quarters = statistics.quantiles(core, n=4)
    return {
        "images_a_core_second": round(statistics.median(core), 1),
        "quartiles_apart": round(quarters[2] - quarters[0], 1),
        "images_a_second": round(statistics.median(clock), 1),
        "peak_MiB": round(max(one[3] for one in times)),
        "imports_MiB": round(times[0][4]),
    }


def main() -> None:
    """Measure all sides in turns."""
    options = arguments(pictures=512, rounds=7, batch=32)
    sizes = options["pictures"], options["batch"], SHUFFLE
    context = multiprocessing.get_context("spawn")
    pipes = {}
    with tempfile.TemporaryDirectory() as folder:
        urls, size_bytes = write_shards(folder, options["pictures"])
        for side in SIDES:
            pipes[side], other = context.Pipe()
            context.Process(target=serve, args=(side, other), daemon=True).start()
            other.close()  # so that the end of a side is noticed

        def ask(side: str, *what: Any) -> Any:
            pipes[side].send(what)
            return pipes[side].recv()

        differences = compare(ask, f"{folder}/00000.tar", min(16, options["pictures"] // SHARDS))
        times: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        for _ in range(options["rounds"]):
            for product in PRODUCTS:
                for side in SIDES:
                    times.setdefault((product, side), []).append(ask(side, urls, product, *sizes, False))
        for pipe in pipes.values():
            pipe.send(None)
    products = {product: {side: summary(times[product, side]) for side in SIDES} for product in PRODUCTS}
    for product, found in products.items():
        for side in OURS:
            rounds = zip(times[product, side], times[product, "webdataset"], strict=True)
            found[side]["ratio"] = round(statistics.median(theirs[1] / ours[1] for ours, theirs in rounds), 3)
    versions = {name: version(name) for name in ("webdataset", "pillow", "numpy")}
    settings = {**options, "bytes_a_picture": size_bytes, "side": SIDE}
    report("loader", versions, {**settings, "products": products, "differences": differences})


if __name__ == "__main__":
    main()
