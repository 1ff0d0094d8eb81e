"""What the commands have in common: from a composed configuration to a run folder, and errors in plain words.

Nothing here imports PyTorch: a wrong word on the command line is answered at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_internvl.checks import ConfigError, check_config, suggestion
from lightning_internvl.files import write_text

CONF = Path(__file__).resolve().parent.parent / "conf"
RUN_CONFIG = "config.yaml"


def start_run(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Check a composed configuration and open its run folder.

    Returns:
        the resolved configuration as plain containers, as written to `config.yaml`

    Raises:
        ConfigError: for any fault of the configuration; an empty run folder is removed again.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        check_config(plain)
        if (run_dir / RUN_CONFIG).exists():
            raise ConfigError([f"{run_dir} already holds a run; go on with resume={run_dir}, or choose another paths.run"])
    except Exception:
        if run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()
        raise
    write_text(run_dir / RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(plain)))
    return plain


def load_run(config: DictConfig) -> dict[str, Any]:
    """The configuration of the run that is resumed, exactly as it was.

    Raises:
        ConfigError: if there is no such run, or if other settings are given beside `resume`.
    """
    run_dir = Path(config.resume)
    others = [o for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]
    if config.init_from:
        check_config(OmegaConf.to_container(config, resolve=True))
    if others:
        raise ConfigError([f"resume goes on with a run exactly as it was; leave out {' '.join(others)}, or start anew with init_from={run_dir}"])
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        runs = sorted(str(p.parent) for p in Path("outputs").glob(f"*/*/{RUN_CONFIG}"))
        raise ConfigError([f"resume={run_dir}: there is no run ({path} is missing); runs here: {', '.join(runs[-5:]) or 'none'}"])
    plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    check_config(plain)
    return plain


def command(main: Callable[[], None]) -> None:
    """Run a command; faults of the user's input become a message and exit code 2. HYDRA_FULL_ERROR=1 shows the traceback too."""
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands errors on to us
    try:
        main()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if verbose:
            raise
        print(f"\nerror: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """An error as a user can act on it: an unknown setting comes with the valid ones."""
    text = str(error)
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.filename):
        return f"cannot write or read {error.filename}: {error.strerror}; choose another folder with paths.run=FOLDER"
    unknown = re.search(r"Could not override '([^']+)'|Could not append to config\. An item is already at '([^']+)'", text)
    if unknown and unknown.group(1):
        return f"there is no setting {unknown.group(1)!r}; {_valid_keys(unknown.group(1))}"
    return text.strip()


def _valid_keys(key: str) -> str:
    """The settings beside an unknown one, read from the default configuration."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        node: Any = compose("config")
    *parents, last = re.sub(r"^[+~]*", "", key).split(".")
    for depth, parent in enumerate(parents):
        if not isinstance(node, DictConfig) or parent not in node:
            parents, last = parents[:depth], parent
            break
        node = node._get_node(parent)
    if not isinstance(node, DictConfig):
        return f"{'.'.join(parents)} has no settings below it"
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir()) if not parents else []
    return f"{'in ' + '.'.join(parents) + ': ' if parents else ''}{suggestion(last, sorted({*map(str, node), *groups} - {'hydra'}))}"
