"""Settings that say which finished model a command takes, and how: what `evaluate.py`, `chat.py`
and `export.py` have in common.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from lightning_internvl.choices import PRODUCTS
from lightning_internvl.config.trust import folder_faults
from lightning_internvl.files import runs_here
from lightning_internvl.messages import did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
# how a folder is read that does not say it
READING = ("template", "system", "tokenizer", "pictures", "encoder", "decoder")


@dataclass(frozen=True)
class ModelSource:
    """Which finished model a command takes; fields of conf/chat.yaml and conf/evaluate.yaml."""

    run: str | None
    model: str | None
    template: str | None
    system: str | None
    tokenizer: str | None
    pictures: str | None
    encoder: Any
    decoder: Any
    device: str
    dtype: str
    matmul_precision: str

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From checked settings, of which others may be left."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def reading(self) -> dict[str, str | None]:
        """How a folder is read that does not say it, and where parts lie that it only names."""
        return {name: _said(getattr(self, name)) for name in READING}


def _said(value: Any) -> Any:
    """A setting, or the place of a part."""
    return value.get("pretrained") if isinstance(value, Mapping) else value


def source_faults(settings: Mapping[str, Any], nothing: str) -> Iterable[str]:
    """Faults of `run` and `model`, of which one must be given; else `nothing` is told."""
    run, model = settings["run"], settings["model"]
    if run is None and model is None:
        yield f"{nothing}; give run=FOLDER ({runs_here()}) or model=FOLDER_OR_ID"
    if run is not None and model is not None:
        yield f"run={run} and model={model} exclude each other; leave one out"
    if run is not None and not Path(str(run)).is_dir():
        yield f"run={run}: there is no such folder ({runs_here()})"
    yield from folder_faults(model if run is None else run, settings.get("trust"))
    if model is None and (given := [name for name in READING if _said(settings[name]) is not None]):
        yield f"{', '.join(given)}: a run knows how it reads; only with model="


def dtype_faults(dtype: Any, choices: Sequence[str] = DTYPES) -> Iterable[str]:
    """Faults of `dtype`."""
    if dtype not in choices:
        yield f"dtype={dtype!r} is not known; {did_you_mean(dtype, choices)}"


def running_faults(settings: Mapping[str, Any]) -> Iterable[str]:
    """Faults of the settings that say in which types a model runs."""
    yield from dtype_faults(settings["dtype"], ("auto", *DTYPES))
    if (products := settings["matmul_precision"]) not in PRODUCTS:
        yield f"matmul_precision={products!r} is not known; {did_you_mean(products, PRODUCTS)}"
