"""The tasks of lmms-eval on our models.

python -m lightning_internvl.evaluation.lmms --model lightning_internvl --model_args run=RUN \\
    --tasks pope,mme

What follows the module's name are the arguments of `lmms-eval`. `--model_args` says which model:
run or model, template, system, tokenizer, pictures, device, dtype, as in conf/evaluate.yaml;
`--batch_size` counts squares that the encoder sees at a time.
"""

from __future__ import annotations

import importlib.util

from lightning_internvl.cli import command
from lightning_internvl.messages import ConfigError

NAME = "lightning_internvl"  # of the model


def main() -> None:
    """`lmms-eval`, which knows our model in this process.

    Raises:
        ConfigError: if it is not installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(["lmms-eval is not installed: pip install -r requirements-lmms.txt (in an environment of its own)"])
    from lmms_eval.cli.dispatch import main as lmms_eval
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "lightning_internvl.evaluation.lmms_adapter.LightningInternVL"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, simple_class_path=path), overwrite=True)
    lmms_eval()


if __name__ == "__main__":
    command(main)
