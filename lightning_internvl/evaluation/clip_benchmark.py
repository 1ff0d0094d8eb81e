"""A model of this project as CLIP_benchmark uses models, so that its tasks and data sets run on our
runs and folders:

python -m lightning_internvl.evaluation.clip_benchmark eval --model RUN_OR_FOLDER \\
    --pretrained c --dataset cifar10

All options are CLIP_benchmark's; `--model` is a run, a hand-off folder, a folder in an official
layout or a hub id, and `--pretrained` the mode of the picture's embedding, c or g. In Python `load`
gives its triple of model, transform and tokenizer.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_internvl.choices import PRODUCTS
from lightning_internvl.config.model_source import READING
from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.data.collate.chats import pad_rows
from lightning_internvl.data.collate.embedding import EmbeddingCollator
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.evaluation.models import model_for, models_under_test
from lightning_internvl.evaluation.settings import EvaluationSettings
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.model.vlm import VLM

TYPE = "lightning_internvl"
MODES = ("c", "g")


class ClipModel(nn.Module):
    """`encode_image` and `encode_text` of a model, not normalised, as CLIP_benchmark calls them.

    Args:
        mode: of the picture's embedding.
    """

    def __init__(self, model: VLM, mode: str = "c") -> None:
        super().__init__()
        self.model, self.mode = model, mode

    def encode_image(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, E)

        Raises:
            ValueError: for a model with several embeddings a picture, which CLIP_benchmark cannot
                compare.
        """
        dtype = next(self.model.parameters()).dtype
        embeds = self.model.encode_image(pixels_N3SS.to(dtype), self.mode)
        if embeds.ndim != 2:
            raise ValueError(
                f"this model has {embeds.shape[1]} embeddings a picture, and CLIP_benchmark "
                "compares one; measure it with python evaluate.py task=[zero_shot,retrieval]"
            )
        return embeds

    def encode_text(self, rows_N2L: Tensor) -> Tensor:
        """Rows of `Tokens` -> (N, E)"""
        return self.model.encode_text(rows_N2L[:, 0], rows_N2L[:, 1])


class Tokens:
    """Texts to one tensor: (N, 2, L) int64, ids and their mask."""

    def __init__(self, pairs: PairCollator) -> None:
        self.pairs = pairs

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Raises ValueError for an empty text."""
        rows = self.pairs.rows("itc", [texts] if isinstance(texts, str) else list(texts))
        return torch.stack(pad_rows(*rows), dim=1)


class Transform:
    """A PIL picture to (3, S, S) float32; it can be sent to processes that prepare data."""

    def __init__(self, pairs: PairCollator) -> None:
        self.processor = pairs.processor

    def __call__(self, image: Image.Image) -> Tensor:
        square = self.processor(np.array(image.convert("RGB")))
        return self.processor.inputs([square])["pixel_values"][0]


class Triple(NamedTuple):
    """What CLIP_benchmark works with."""

    model: ClipModel
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]


def triple_of(model: VLM, pairs: PairCollator, mode: str = "c") -> Triple:
    """The triple of a model that is loaded already; raises ValueError for an unknown mode."""
    if mode not in MODES:
        choices = ", ".join(MODES)
        raise ValueError(f"{mode=} of the picture's embedding is not known; valid choices: {choices}")
    return Triple(ClipModel(model, mode).eval(), Transform(pairs), Tokens(pairs))


def load(place: str | Path, mode: str = "c", device: str = "auto", dtype: str = "float32", trust: Sequence[str] = ()) -> Triple:
    """The last stage of a run that compares, or a folder or hub id with a model that does.

    Args:
        trust: packages whose code the folder may name.

    Raises:
        ValueError: for what cannot be opened, or does not compare.
    """
    folder = Path(place).resolve()
    ours = any((one / RUN_CONFIG).is_file() for one in (folder, *folder.parents[1:2]))
    settings = dict.fromkeys(READING) | {"run": str(place) if ours else None, "model": None if ours else str(place)}
    settings |= {
        "device": device,
        "dtype": dtype,
        "matmul_precision": PRODUCTS[0],
        "batch_size": 1,
        "cases": 0,
        "task": {},
        "record": None,
    }
    with trusting(trust):
        models = models_under_test(EvaluationSettings.of(settings), build)
        predictor = model_for("clip_benchmark", "pairs", models).open()
    if isinstance(predictor.pairs, EmbeddingCollator):
        raise ValueError(
            "CLIP_benchmark asks a middleware that reads texts, and this stage embeds by its decoder; use evaluate.py"
        )
    return triple_of(predictor.model, predictor.pairs, mode)


def register() -> None:
    """Make `--model_type lightning_internvl` known to CLIP_benchmark.

    Raises:
        ValueError: where it is not installed.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        command = "pip install -r requirements-clip-benchmark.txt"
        raise ValueError(f"CLIP_benchmark is not installed; {command}")
    from clip_benchmark import models

    def load_type(model_name: str, pretrained: str, cache_dir: str | None = None, device: Any = "cpu") -> Triple:
        return load(model_name, pretrained, str(device))

    models.TYPE2FUNC[TYPE] = load_type
    if TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(TYPE)


def main() -> None:
    """CLIP_benchmark's own command with our models."""
    register()
    from clip_benchmark import cli

    if sys.argv[1:2] == ["eval"] and "--model_type" not in sys.argv:
        sys.argv += ["--model_type", TYPE]
    cli.main()


if __name__ == "__main__":
    main()
