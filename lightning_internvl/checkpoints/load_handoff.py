"""A model from a hand-off folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.checkpoints.handoff import MANIFEST, TOKENIZERS
from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.checkpoints.weight_source import read_handoff
from lightning_internvl.config.trust import check_parts, without_notes
from lightning_internvl.layers.quantization import quantize
from lightning_internvl.model.compose import check_trusted, compose_model, trusted_build
from lightning_internvl.model.vlm import VLM


def trusted_config(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the model in a manifest, with the places of the folder's tokenizers.

    Raises:
        ValueError: if it names other code or weights elsewhere.
    """
    config = without_notes(manifest["config"])
    check_parts(config, folder)
    check_trusted(config)
    for part in ("middleware", "decoder"):
        if (saved := folder / TOKENIZERS / part).is_dir():
            config[part]["tokenizer"]["folder"] = str(saved.resolve())
    return config


def load(folder: Path) -> tuple[VLM, dict[str, Any], dict[str, Any]]:
    """The model of a hand-off folder in evaluation mode, the tokenizers of its parts, and the
    manifest from whose configuration (parts of this package only) it is built.

    Raises:
        ValueError: as `read_handoff`; if the configuration names other code or weights elsewhere;
            if tensors do not fit the model.
    """
    tensors, manifest = read_handoff(folder)
    config = trusted_config(folder, manifest)
    try:
        model, tokenizers = compose_model(config, trusted_build)
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: {error}") from error
    LoadReport.of(model, tensors, source=str(folder), new=(), dropped=()).load(model, tensors)
    quantize(model, config.get("quantization"), keep=manifest.get("trained", ()))
    return model.eval(), tokenizers, manifest


def load_model(folder: str | Path) -> VLM:
    """The model of a hand-off folder alone; see `load`."""
    return load(Path(folder))[0]
