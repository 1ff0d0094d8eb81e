"""Lets torchvision be imported beside a PyTorch for which its operators were not built; none of them may be called then."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch


def _define_missing() -> torch.library.Library | None:
    if (found := importlib.util.find_spec("torchvision")) is None:
        return None
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted({a or b for a, b in re.findall(r'register_meta\("(\w+)"\)|torchvision::(\w+)', text)}):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library


_LIBRARY = _define_missing()  # operators live as long as it does
