"""Errors of the user's input as a user can act on them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from lightning_internvl.config.groups import missing_file
from lightning_internvl.config.known_keys import full_names
from lightning_internvl.config.surroundings import explain_surroundings
from lightning_internvl.files import CONF
from lightning_internvl.messages import did_you_mean

FAULTS = (ValueError, OSError, HydraException, OmegaConfBaseException, YAMLError)  # of the user's input


def explain(error: Exception) -> str:
    """An error as a user can act on it: a wrong word comes with the valid ones."""
    text = str(error).strip().split("\n\nConfig search path")[0]
    if (sentence := explain_surroundings(error)) and not isinstance(error, ValueError):
        return sentence
    if isinstance(error, OSError) and error.filename:
        advice = "paths.run=FOLDER chooses another folder for the run"
        return f"cannot read or write {error.filename}: {error.strerror}; {advice}"
    if isinstance(error, MissingConfigException):
        return missing_file(str(error.missing_cfg_file), error.options) or text
    if isinstance(error, OverrideParseException):
        reason = next(line for line in reversed(text.splitlines()) if not line.startswith("See "))
        advice = "write SETTING=VALUE, with quotes around special characters, as in 'data.path=\"a=b.jsonl\"'"
        return f"{error.override!r} is not understood ({reason}); {advice}"
    if isinstance(error, InterpolationResolutionError) and "resolving interpolation: " in text:
        return text.partition("resolving interpolation: ")[2].partition("\n    full_key:")[0]
    if isinstance(error, InterpolationKeyError) and (asked := re.search(r"Interpolation key '([^']+)' not found", text)):
        part = asked[1].partition(".")[0]
        choice = f"choose another {part}, or give" if (CONF / part).is_dir() else "give"
        return f"{error.full_key} is that of {asked[1]}, which is not there; {choice} {error.full_key}=VALUE"
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} has no value; give {error.full_key}=VALUE"
    if text.startswith("Config group override must be"):
        words = [word for word in sys.argv[1:] if (CONF / word.partition("=")[0].partition("@")[0].lstrip("+")).is_dir()]
        without = [f"~{word.partition('=')[0].lstrip('+')}" for word in words if word.endswith("=null")]
        left_out = f"; {' '.join(without)} leaves it out" if without else ""
        return f"{' '.join(words)}: a group is chosen by the name of a file, as in encoder=internvit_toy{left_out}"
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^'@]+)'", text)
    resumed = next((word for word in sys.argv[1:] if word.startswith("resume=")), None)
    if unknown and resumed:
        anew = f"leave out {unknown[1]}, or start anew with init_from={resumed.removeprefix('resume=')}"
        return f"resume goes on with a run exactly as it was, with its own settings: {anew}"
    if unknown:
        return _unknown_setting(unknown[1])
    # in a process that prepares data
    if text.startswith("Caught ") and "Original Traceback" in text:
        return re.split(r"\n\w*Error: ", text)[-1].strip()
    return text or type(error).__name__


def is_fault(error: Exception) -> bool:
    """Whether an error is of the user's input or of the machine, and told without a traceback."""
    return isinstance(error, FAULTS) or explain_surroundings(error) is not None


def _unknown_setting(key: str) -> str:
    """What stands beside an unknown setting, with the files that the command line chooses."""
    from hydra import compose, initialize_config_dir

    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    choice = re.compile(rf"\+?({'|'.join(groups)})(@[\w.]+)?=(\w+|\[[\w,]+\])")
    chosen = [word for word in sys.argv[1:] if choice.fullmatch(word)]
    # chat.py has settings of its own
    own = Path(sys.argv[0]).stem.removeprefix("internvl-")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tasks = [word for word in chosen if word.startswith("task=")]
        node: Any = compose(own, tasks) if (CONF / f"{own}.yaml").is_file() else compose("config", overrides=chosen)
    parents: list[str] = []
    for word in key.split("."):
        if not isinstance(node, DictConfig):
            return f"there is no setting {key!r}; {'.'.join(parents)} has no settings below it"
        if word not in node:
            break
        parents, node = [*parents, word], node._get_node(word)
    else:
        return f"{key} has no such setting below it; add one with +{key}.NAME=VALUE"
    own_groups = groups if "pipeline" in node and not parents else []
    choices = sorted({*map(str, node), *own_groups} - {"hydra", "_target_", "_partial_"})
    if not choices:
        return f"there is no setting {key!r}, {'.'.join(parents)} is empty; add one with +{key}=VALUE"
    if full := full_names(word, OmegaConf.to_container(node)):
        return f"there is no setting {key!r}; did you mean {' or '.join('.'.join([*parents, one]) for one in full)}?"
    part = f"; a part of one stage is swapped with {word}@{key}=OPTION" if parents and word in groups else ""
    place = f"in {'.'.join(parents)}: " if parents else ""
    return f"there is no setting {key!r}; {place}{did_you_mean(word, choices)}{part}"
