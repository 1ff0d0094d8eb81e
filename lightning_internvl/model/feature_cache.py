"""What a frozen encoder gives for a picture, kept so that the picture is encoded once.

A picture is known by the bytes that the encoder sees of it, the encoder by its weights and
settings: a changed picture, another processor or other weights never find what was kept for the old
ones, and the same picture in two samples is encoded once. What is kept comes back bit by bit. A
picture that is encoded beside fewer others than without a cache may differ from that in its last
digit, because libraries sum in another order then.

Letters: N pictures (squares) of a batch, S side in pixels, P visual tokens, D width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.feature_stores import DiskStore, MemoryStore

GIB = 2**30
WHOLE = {"DDPStrategy", "SingleDeviceStrategy"}  # of Lightning: every process has the whole encoder
Read = Callable[[Tensor], list[Tensor]]


class FeatureCache:
    """Features of pictures, from where they are kept or from the encoder.

    Args:
        store: where they are kept.
        named: gives a name for the encoder and for how pictures are prepared (see `fingerprint`);
            asked for with the first pictures, when a checkpoint has been restored.

    Attributes:
        found, computed: pictures that were there, and pictures that were encoded.
    """

    def __init__(self, store: MemoryStore | DiskStore, named: Callable[[], str]) -> None:
        self.store, self.named = store, named
        self.found = self.computed = 0

    @cached_property
    def encoder(self) -> str:
        """The name of the encoder."""
        return self.named()

    def __call__(self, read: Read, pixels_N3SS: Tensor, layers: Sequence[int], keys: Sequence[str]) -> list[Tensor]:
        """Hidden states (N, P, D), one a layer; those that are not there are read, all in one call.

        Raises:
            ValueError: unless there is one key a picture.
        """
        if len(keys) != len(pixels_N3SS):
            raise ValueError(f"{len(keys)} keys for {len(pixels_N3SS)} pictures")
        how = f"{self.encoder}/{tuple(layers)}/{_computed_in(pixels_N3SS)}"
        names = [hashlib.blake2b(f"{how}/{key}".encode(), digest_size=16).hexdigest() for key in keys]
        known = {name: kept for name in dict.fromkeys(names) if (kept := self.store.get(name)) is not None}
        missing = {name: place for place, name in reversed(list(enumerate(names))) if name not in known}
        self.found += len(names) - len(missing)
        self.computed += len(missing)
        if missing:
            whole = len(missing) == len(names)
            with torch.no_grad():
                states = read(pixels_N3SS if whole else pixels_N3SS[sorted(missing.values())])
            rows = [[row.clone() for row in state.cpu()] for state in states]
            for row, name in enumerate(sorted(missing, key=missing.__getitem__)):
                known[name] = [state[row] for state in rows]
                self.store.put(name, known[name])
            if whole:
                return states
        stacked = (torch.stack([known[name][layer] for name in names]) for layer in range(len(layers)))
        return [state.to(pixels_N3SS.device, non_blocking=True) for state in stacked]

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        return self  # a copy of the model shares it

    def summary(self) -> str:
        """What it was good for."""
        total = self.found + self.computed
        share = f", {self.found / total:.0%} of them from the cache" if total else ""
        dropped = f"; it was full and let {self.store.dropped:,} go, a larger gib keeps more" if self.store.dropped else ""
        return f"feature cache: {total:,} pictures{share}{dropped}"


def _computed_in(pixels: Tensor) -> str:
    """The kind of device and the type of mixed precision, which numbers depend on."""
    kind = pixels.device.type
    return f"{kind}/{torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None}"


def features(model: Any, pixels_N3SS: Tensor, layers: Sequence[int], batch: Mapping[str, Any], **inputs: Any) -> list[Tensor]:
    """Hidden states of a model's encoder; through its cache, for `picture_keys`.

    Args:
        inputs: what else the encoder reads.
    """
    read = partial(model.encoder, layers=layers, **inputs)
    keys = batch.get("picture_keys")
    return model.feature_cache(read, pixels_N3SS, layers, keys) if model.feature_cache and keys else read(pixels_N3SS)


def fingerprint(encoder: nn.Module, processor: Any, method: str | None = None) -> str:
    """A name for an encoder's settings, weights and quantisation, and for how the processor
    normalises pictures."""
    about = {"encoder": encoder.config, "mean": processor.mean, "std": processor.std, "quantization": method}
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(own_tensors(encoder).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_cache(settings: StageSettings, encoder: nn.Module, collate: Any) -> FeatureCache | None:
    """The cache that a stage asks for; None if it asks for none."""
    own = settings.feature_cache
    if own is None:
        return None
    limit = int(own.gib * GIB)
    store = DiskStore(Path(own.path), limit) if own.path else MemoryStore(limit)
    method = settings.parts.quantization.get("encoder")
    return FeatureCache(store, partial(fingerprint, encoder, collate.processor, method))
