"""Measure a finished model: the tasks of conf/task/, on built-in scenes or public sets.

python evaluate.py run=outputs/internvl_toy/RUN                       what training measures at the end of its stages, again
python evaluate.py run=outputs/internvl_toy/RUN task=[vqa,pope]       other tasks, on the built-in scenes
python evaluate.py model=FOLDER_OR_ID task=pope task.pope.path=coco_pope_random.json task.pope.images=val2014
python evaluate.py --cfg job task=[vqa,pope]                          all settings, measure nothing
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


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Check the settings, then load the model; PyTorch is imported here, so that a wrong word is
    answered at once."""
    from lightning_internvl.evaluation.replay import with_record
    from lightning_internvl.evaluation.settings import check_settings

    settings = with_record(as_dict(config, resolve=True))
    check_settings(settings)
    with without_collecting():
        from lightning_internvl.evaluation.command import run_evaluation
    with trusting(settings["trust"]):
        run_evaluation(settings, build)


def start() -> None:
    """The command `internvl-evaluate` of an installed package."""
    command(main)


if __name__ == "__main__":
    start()
