"""What runs a filter: processes of this machine, or Ray."""

from __future__ import annotations

import importlib.util

INSTALL = "pip install -r requirements-ray.txt"


def check_ray() -> None:
    """Raises ValueError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"engine=ray needs the package ray, which is not installed:  {INSTALL}; engine=local does without")
