"""The package itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, lightning_internvl as l; assert 'torch' not in sys.modules; assert 'load_pretrained' in l.__all__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


WITHOUT_COLLECTING = """
import gc, sys, types
from lightning_internvl.launch import without_collecting

with without_collecting():
    assert not gc.isenabled()
    kept = [[]]
assert gc.isenabled() and gc.get_freeze_count()
assert not any(one is kept for one in gc.get_objects())  # which collections look through
gc.unfreeze()
sys.modules["torch"] = types.ModuleType("torch")
with without_collecting():
    assert gc.isenabled()
assert not gc.get_freeze_count()
"""


def test_what_a_command_imports_is_looked_through_for_garbage_neither_then_nor_later() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_COLLECTING], check=True, cwd=Path(__file__).parents[1])
