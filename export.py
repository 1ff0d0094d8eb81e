"""Write a finished run as a folder that others load: merge, write, read back, compare.

python export.py run=outputs/llava_toy/RUN to=my_model
python export.py verify=my_model                  # compute again what its card says
python export.py --cfg job                        # all settings
"""

from __future__ import annotations

import lightning_internvl  # noqa: F401 (first: it says which Python it needs)

# isort: split
import hydra
from omegaconf import DictConfig

from lightning_internvl.cli import as_dict, command
from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.launch import without_collecting


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(config: DictConfig) -> None:
    """Do what the command line asks for; PyTorch is imported after the checks."""
    from lightning_internvl.export.settings import check_settings

    settings = check_settings(as_dict(config, resolve=True, throw_on_missing=True))
    with without_collecting():
        from lightning_internvl.export.command import run_export, run_verify
    with trusting(settings.trust):
        if settings.verify is not None:
            run_verify(settings)
        else:
            run_export(settings, build)


def start() -> None:
    """The command `internvl-export` of an installed package."""
    command(main)


if __name__ == "__main__":
    start()
