"""Train a vision-language model through its alignment stages: compose, check, run.

python train.py                                   # the default recipe, toy size, on a CPU
python train.py experiment=internvl_chat_toy      # another recipe
python train.py --cfg job                         # show the configuration, train nothing
python train.py plan=true                         # parameters, FLOPs and memory of each stage; trains nothing
python train.py doctor=true                       # silent failures of each stage, within a minute; trains nothing
python train.py data=conversations data.path=FILE data.validate=true   # what is wrong with your data; trains nothing
python train.py resume=outputs/internvl_toy/RUN   # go on after a crash
"""

from __future__ import annotations

import lightning_internvl  # noqa: F401 (first: it says which Python it needs)

# isort: split
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_internvl.cli import command, named_by_user, nothing_written, run_folder
from lightning_internvl.config.sweep import check_search, objective_of
from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.launch import is_started_by_trainer, shared_config, without_collecting


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | tuple[float, ...] | None:
    """Run what the command line asks for; PyTorch is imported here, for `--help` to be fast.

    Returns:
        the value of `objective_metric`, for a search over runs
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if config.plan:
        with nothing_written(config, run_dir) as plain:
            from lightning_internvl.plan import run_plan

            run_plan(plain, build)
        return None
    if config.doctor:
        with nothing_written(config, run_dir) as plain:
            from lightning_internvl.doctor import run_doctor

            sys.exit(0 if run_doctor(plain, build) else 1)
    if config.data.get("validate"):
        with nothing_written(config, run_dir) as plain:
            from lightning_internvl.validate.command import run_validation

            sys.exit(0 if run_validation(plain, run_dir, build) else 1)
    check_search(HydraConfig.get(), config.objective_metric)
    with run_folder(config, run_dir) as (plain, run_dir):
        with without_collecting():
            from lightning_internvl.pipeline import run_pipeline
        run_pipeline(plain, run_dir, build)
        return objective_of(run_dir, plain.get("objective_metric"))


def join() -> None:
    """Take part in a run, as a process that the first one has started."""
    plain, run_dir = shared_config()
    with without_collecting():
        from lightning_internvl.pipeline import run_pipeline
    with trusting(named_by_user(plain)):
        run_pipeline(plain, run_dir, build)


def start() -> None:
    """The command `internvl-train` of an installed package."""
    command(join if is_started_by_trainer() else main)


if __name__ == "__main__":
    start()
