"""Train a vision-language model through its alignment stages: compose the configuration, check it, run the stages.

    python train.py                                   # the default recipe, toy size, on a CPU
    python train.py experiment=internvl_chat_toy      # another recipe
    python train.py --cfg job                         # show the configuration, train nothing
    python train.py resume=outputs/internvl_toy/RUN   # go on after a crash
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_internvl.cli import command, load_run, start_run

OmegaConf.register_new_resolver("either", lambda first, second: first or second, replace=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Run what the command line asks for. PyTorch is imported here, so that `--cfg` and `--help` answer at once."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    plain = load_run(config) if config.resume else start_run(config, run_dir)

    from lightning_internvl.pipeline import run_pipeline

    run_pipeline(plain, run_dir, build)


def build(node: dict[str, Any], **extra: Any) -> Any:
    """The object of a configuration node. Runtime objects are passed past Hydra, which would copy them."""
    maker = hydra.utils.instantiate(node, _partial_=True, _convert_="all")
    return maker if node.get("_partial_") and not extra else maker(**extra)


if __name__ == "__main__":
    command(main)
