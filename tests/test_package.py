"""The package itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, lightning_internvl as l; assert 'torch' not in sys.modules; assert 'load_pretrained' in l.__all__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
