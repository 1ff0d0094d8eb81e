"""Features of a frozen encoder come back bit by bit, for the same picture and encoder only, and within a limit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import TINY, losses, same_weights, tiny_run, train
from torch import Tensor, nn

from lightning_internvl.choices import cache_faults
from lightning_internvl.data.collate.base import picture_keys
from lightning_internvl.data.processors.basic import RandomCrop, Squash
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.model import feature_cache
from lightning_internvl.model.feature_cache import FeatureCache, fingerprint
from lightning_internvl.model.feature_stores import SHARE, DiskStore, MemoryStore
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.training.assembly import check_cache

LAYERS = (-1, 1)
PICTURE = 2 * 17 * 24 * 4  # bytes of two layers


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore | DiskStore:
    return MemoryStore(2**20) if request.param == "memory" else DiskStore(tmp_path / "features", 2**20)


class Seen:
    """An encoder that notes how many pictures it is shown."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder, self.counts = encoder, list[int]()

    def __call__(self, pixels: Tensor, *, layers: Any, **inputs: Any) -> list[Tensor]:
        self.counts.append(len(pixels))
        return self.encoder(pixels, layers=layers, **inputs)


def features(encoder: Any, cache: FeatureCache, pixels: Tensor, layers: Any, keys: Any) -> list[Tensor]:
    model = SimpleNamespace(encoder=encoder, feature_cache=cache)
    return feature_cache.features(model, pixels, layers, {"picture_keys": keys})


def test_hits_misses_and_repeats(store: MemoryStore | DiskStore, encoder: InternViT) -> None:
    encoder.requires_grad_(False)
    seen, cache, pixels = Seen(encoder), FeatureCache(store, lambda: "tower"), torch.randn(4, 3, 16, 16)
    keys = ["a", "b", "c", "d"]
    first = features(seen, cache, pixels, LAYERS, keys)
    again = features(seen, cache, pixels, LAYERS, keys)
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))
    assert all(x.equal(y) for x, y in zip(first, encoder(pixels, layers=LAYERS), strict=True))
    mixed = torch.cat([pixels[2:], torch.randn(1, 3, 16, 16), pixels[:1]])
    found = features(seen, cache, mixed[[0, 2, 3, 2]], LAYERS, ["c", "e", "a", "e"])
    wanted = encoder(mixed[[0, 2, 3, 2]], layers=LAYERS)
    assert seen.counts == [4, 1]  # the new picture, once
    assert found[0][0].equal(first[0][2])
    assert found[1][2].equal(first[1][0])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    assert (cache.found, cache.computed) == (6 + 1, 5)  # the second e came with the first
    assert "58% of them from the cache" in cache.summary()


def test_no_keys_no_cache(encoder: InternViT) -> None:
    seen, cache = Seen(encoder), FeatureCache(MemoryStore(2**20), lambda: "tower")
    for keys in (None, []):
        features(seen, cache, torch.zeros(1, 3, 16, 16), LAYERS, keys)
    assert seen.counts == [1, 1]
    assert not cache.store.entries
    with pytest.raises(ValueError, match="2 keys for 1 pictures"):
        features(seen, cache, torch.zeros(1, 3, 16, 16), LAYERS, ["a", "b"])


def test_other_layers_encoders_and_precisions_find_nothing(encoder: InternViT) -> None:
    store, pixels, seen = MemoryStore(2**20), torch.randn(1, 3, 16, 16), Seen(encoder)
    cache = FeatureCache(store, lambda: "tower")
    features(seen, cache, pixels, LAYERS, ["a"])
    features(seen, cache, pixels, (-1,), ["a"])
    features(seen, FeatureCache(store, lambda: "other"), pixels, LAYERS, ["a"])
    with torch.autocast("cpu", torch.bfloat16):
        lower = features(seen, cache, pixels, LAYERS, ["a"])
        assert lower[0].equal(features(seen, cache, pixels, LAYERS, ["a"])[0])
    assert seen.counts == [1, 1, 1, 1]


def test_a_name_tells_weights_settings_and_normalisation(encoder: InternViT) -> None:
    def name(scale: float = 1.0, mean: float = 0.5, method: str | None = None) -> str:
        torch.manual_seed(0)
        tower = InternViT(image_size=16, patch_size=4, dim=24, depth=1, heads=3, mlp_dim=32, norm_eps=1e-6 * scale)
        return fingerprint(tower, Squash(16, mean=(mean, 0.5, 0.5)), method)

    assert name() == name()
    assert len({name(), name(scale=2.0), name(mean=0.4), name(method="nf4"), fingerprint(encoder, Squash(16))}) == 5
    before = fingerprint(encoder, Squash(16))
    with torch.no_grad():
        encoder.embeddings.class_embedding[0, 0, 0] += 1e-6
    assert fingerprint(encoder, Squash(16)) != before


def test_pictures_are_named_by_what_is_seen_of_them() -> None:
    squares = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    chats = [{"pictures": [squares[:2], squares[2:]]}, {"pictures": []}, {"pictures": [squares[1:2]]}]
    keys = picture_keys(chats, wanted=True)["picture_keys"]
    assert len(keys) == 4
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]
    assert picture_keys([{"tiles": squares[:1]}], wanted=True) == {"picture_keys": keys[:1]}
    assert picture_keys(chats, wanted=False) == {}


def entry(value: float) -> list[Tensor]:
    return [torch.full((256,), float(value)), torch.full((256,), float(value), dtype=torch.bfloat16)]  # 1.5 KiB


def test_memory_lets_go_of_what_was_not_asked_for_longest() -> None:
    store = MemoryStore(3 * 1536)
    for name in "abc":
        store.put(name, entry(1))
    assert store.get("a") is not None
    store.put("d", entry(1))
    assert list(store.entries) == ["c", "a", "d"]
    assert (store.used, store.dropped) == (3 * 1536, 1)
    store.put("large", [torch.zeros(2000)])
    assert store.get("large") is None


def test_a_disk_that_is_full_lets_go_of_the_oldest_and_other_processes_see_it(tmp_path: Path) -> None:
    limit = 20 * 1536
    ours, theirs = DiskStore(tmp_path, limit), DiskStore(tmp_path, limit)
    names = [f"{number:02x}0" for number in range(30)]
    for number, name in enumerate(names):
        (ours, theirs)[number % 2].put(name, entry(number))
        if number < 10:  # long ago
            past = time.time() - 1000 + number
            os.utime(tmp_path / name[:2] / f"{name}.safetensors", (past, past))
        if number in (10, 20):
            assert theirs.get(names[0]) is not None  # asked for now
    kept = [name for name in names if ours.get(name) is not None]
    assert names[0] in kept
    assert names[1] not in kept
    assert set(names[20:]) <= set(kept)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size <= limit * (1 + 2 / SHARE) + 2 * 1536
    values = ours.get(names[-1])
    assert values[0].equal(entry(29)[0])
    assert values[1].equal(entry(29)[1])


def test_a_damaged_file_counts_as_missing_and_a_full_disk_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path / "features", 2**20)
    store.put("ab", entry(1))
    (file,) = (tmp_path / "features").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert store.get("ab") is None
    assert not file.exists()

    def no_room(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    store.put("cd", entry(1))
    store.put("ef", entry(1))
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert not list((tmp_path / "features").rglob("*.draft"))


DDP = type("DDPStrategy", (), {})()


def with_jpeg(processor: Squash) -> Squash:
    processor.jpeg_quality = [75, 100]
    return processor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rules": ["encoder", "middleware"]}, "the encoder trains in this stage .module.train names encoder"),
        ({"rules": [{"name": "encoder.embeddings", "from_step": 9}]}, "the encoder trains .* encoder.embeddings"),
        ({"endless": True}, "shows no picture twice; set data.endless=false"),
        ({"processor": RandomCrop(16)}, "RandomCrop draws another part of a picture each time"),
        ({"processor": with_jpeg(Squash(16))}, r"data\.jpeg_quality=\[75, 100\] changes a picture each time"),
        ({"inputs": ("image_grid_thw",)}, "InternViT reads image_grid_thw beside the pixels"),
        ({"strategy": object()}, "object divides the encoder among processes"),
    ],
)
def test_it_refuses_where_it_would_be_wrong_or_idle(change: dict[str, Any], said: str, encoder: InternViT) -> None:
    usual = {"rules": ["middleware"], "processor": Squash(16), "strategy": DDP, "endless": False, "inputs": ()}

    def check(**changed: Any) -> None:
        given = usual | changed
        encoder.inputs = given["inputs"]
        plan = FreezePlan(given["rules"])
        check_cache(encoder, plan, given["processor"], given["strategy"], endless=given["endless"])

    check()
    with pytest.raises(ValueError, match=f"feature_cache: .*{said}.*; or leave feature_cache out"):
        check(**change)


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ("memory", "valid choices: null, {where: memory, gib: 4}, {where: disk"),
        ({"where": "ram", "gib": 4}, "valid choices"),
        ({"where": "memory", "gib": 0}, "feature_cache.gib=0 must be a number above 0"),
        ({"where": "memory", "gib": 4, "size": 3}, "no setting 'size'; valid choices: where, gib, path"),
        ({"where": "disk", "gib": 4}, "where=disk needs one"),
        ({"where": "memory", "gib": 4, "path": "x"}, "a path belongs to where=disk"),
    ],
)
def test_wrong_settings_are_named(cache: Any, said: str) -> None:
    (fault,) = cache_faults(cache)
    assert said in fault
    assert not list(cache_faults({"where": "disk", "gib": 0.5, "path": "features"}))
    assert not list(cache_faults(None))


FINITE = ("data.endless=false", "data.pairs.length=12", "pipeline=[contrastive,generative]")


def test_a_run_with_it_equals_one_without_and_shares_its_files(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path / "plain", *FINITE)
    setting = f"stages.generative.feature_cache={{where:disk,gib:1,path:{tmp_path}/features}}"
    for name in ("first", "second"):
        run = tiny_run(tmp_path / name, *FINITE, setting)
        for one, other in zip(losses(plain, "generative"), losses(run, "generative"), strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 12
    assert same_weights(tmp_path / "first", tmp_path / "second", "contrastive")
    told = train(*TINY, *FINITE, f"paths.run={tmp_path}/told", setting)
    assert "100% of them from the cache" in told.out
    outcome = train(*TINY, f"paths.run={tmp_path}/no", "stages.generative.feature_cache={where:memory,gib:1}")
    assert "stages.generative: feature_cache: this data is endless" in outcome.err
