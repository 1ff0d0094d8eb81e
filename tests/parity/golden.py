"""Golden tensors of the original implementations: where they lie, how they are read, how ours are compared."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parents[1] / "fixtures"
RELATIVE, ABSOLUTE = 1e-4, 1e-6


@dataclass(frozen=True)
class Fixture:
    """One folder with `fixture.json`, `config.json` and the tensors that went in and came out."""

    folder: Path

    @cached_property
    def system(self) -> str:
        return json.loads((self.folder / "fixture.json").read_text())["system"]

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "outputs.safetensors")


def find(*roots: Path) -> list[Fixture]:
    """Every fixture below the roots, at any depth.

    Raises:
        ValueError: for a root that is no folder.
    """
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} is no folder (PARITY_FIXTURES lists folders, separated by {os.pathsep!r})")
    return [Fixture(path.parent) for root in roots for path in sorted(root.rglob("fixture.json"))]


def extra_roots() -> list[Path]:
    """The folders named in the environment variable PARITY_FIXTURES."""
    return [Path(part) for part in os.environ.get("PARITY_FIXTURES", "").split(os.pathsep) if part]


def relative_error(reference: Tensor, ours: Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute reference."""
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max().clamp(min=1e-30))


def differences(reference: dict[str, Tensor], ours: dict[str, Tensor], echoes: frozenset[str] = frozenset()) -> dict[str, str]:
    """What is wrong with each tensor; empty if all agree, integers exactly, others to 1e-4 of the largest reference.

    Args:
        echoes: inputs that the reference file repeats and that nobody computes.
    """
    problems = {}
    for name in reference.keys() - echoes:
        if name not in ours:
            problems[name] = "not computed"
        elif problem := _difference(reference[name], ours[name]):
            problems[name] = problem
    return problems


def _difference(reference: Tensor, ours: Tensor) -> str | None:
    ours, reference = (x.reshape(1) if x.ndim == 0 else x for x in (ours, reference))  # most files hold numbers as vectors of one
    if reference.shape != ours.shape or reference.dtype != ours.dtype:
        return f"{tuple(ours.shape)} {ours.dtype} instead of {tuple(reference.shape)} {reference.dtype}"
    if not reference.is_floating_point():
        wrong = int((reference != ours).sum())
        return f"{wrong} of {reference.numel()} differ" if wrong else None
    gap = float((ours.double() - reference.double()).abs().max())
    allowed = RELATIVE * float(reference.abs().max()) + ABSOLUTE
    # Written so that not-a-number fails.
    return None if gap <= allowed else f"off by {gap:.2e}, allowed {allowed:.2e}"
