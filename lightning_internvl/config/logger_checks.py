"""Faults of the loggers of a configuration, before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

INSTALL = "pip install -r requirements-loggers.txt"
# packages that loggers import, by the end of the path of their class
PACKAGES = {
    "callbacks.WandbRun": ("wandb",),
    "callbacks.MlflowRun": ("mlflow", "sqlalchemy"),
    "loggers.WandbLogger": ("wandb",),
    "loggers.MLFlowLogger": ("mlflow",),
}


def logger_faults(loggers: Any) -> Iterator[str]:
    """Loggers whose package is not installed, and values that they do not take.

    Args:
        loggers: nodes by name; None leaves one out.
    """
    for name, node in (loggers or {}).items():
        if not isinstance(node, Mapping):
            continue
        target = str(node.get("_target_"))
        needed = next((found for end, found in PACKAGES.items() if target.endswith(end)), ())
        for package in needed:
            if find_spec(package) is None:
                yield f"logger={name} needs the package {package}, which is not here: {INSTALL}"
        offline = node.get("offline")
        if target.endswith("WandbRun") and not isinstance(offline, bool | None):
            choices = "true (send nothing), false (send) or null (as WANDB_MODE and the key say)"
            yield f"logger.{name}.offline={offline!r} must be {choices}"
