"""What is said of a file that a config group does not have."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_internvl.config.hardware import strategy_refusal
from lightning_internvl.files import CONF
from lightning_internvl.messages import did_you_mean

# of Hydra, each a package of its own
PLUGINS = ("hydra/sweeper/optuna", "hydra/launcher/submitit_local", "hydra/launcher/submitit_slurm")


def missing_file(name: str, options: Iterable[str] | None) -> str | None:
    """The valid choices in place of a missing one; None where there is no such group.

    Args:
        name: GROUP/OPTION
        options: of the group, if Hydra says them. It does not for a word of a list, as in
            logger=[tensorboard,mine].
    """
    group, _, option = name.rpartition("/")
    if group == "strategy" and (refused := strategy_refusal(option)):
        return refused
    if name in PLUGINS:
        return f"{group}={option} is not here; it comes with pip install -r requirements-sweeps.txt"
    known = list(options or ()) or sorted(file.stem for file in CONF.glob(f"./{group}/*.yaml"))
    if not group or not known:
        return None
    return f"there is no {option!r} in the group {group}; {did_you_mean(option, known)}"
