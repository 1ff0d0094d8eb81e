"""What commands share: from a composed configuration to a run folder; plain errors.

Nothing here imports PyTorch: a wrong word on the command line is answered at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from signal import Signals
from typing import Any, cast

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_internvl.choices import INHERITED
from lightning_internvl.config.checks import check_config
from lightning_internvl.config.consent import giving_parts
from lightning_internvl.config.explain import explain, is_fault
from lightning_internvl.config.given import DELETED, GROUP, VALUE, Given, check_given_once, with_place
from lightning_internvl.config.hardware import HARDWARE, with_hardware
from lightning_internvl.config.hf_pictures import picture_fact, picture_size
from lightning_internvl.config.known_keys import variables_of
from lightning_internvl.config.overrides import with_given
from lightning_internvl.config.secrets import given_hosts, take_secrets, with_secrets
from lightning_internvl.config.shapes import check_run_shapes, check_shapes
from lightning_internvl.config.stage_settings import merged
from lightning_internvl.config.surroundings import explain_surroundings
from lightning_internvl.config.sweep import sweep_table
from lightning_internvl.config.targets import build, with_current_targets
from lightning_internvl.config.trust import check_run, foreign_targets, trust_faults, trusting, with_trust
from lightning_internvl.console import console, speaking
from lightning_internvl.distributed.run_lock import owned
from lightning_internvl.distributed.signals import NAMES, WATCH, RunStopped
from lightning_internvl.files import CONF, RUN_CONFIG, naming, remove_all_but, remove_if_empty, runs_here, write_text
from lightning_internvl.launch import (
    UNKNOWN,
    earlier_attempt,
    is_helper,
    is_started_by_trainer,
    launch_time,
    launches,
    note_launch,
    shared_run,
    started_from_outside,
)
from lightning_internvl.messages import ConfigError, hidden, on_a_screen

# what a run can go on from, of a stage or a filter
WORK = ("checkpoints/*/last.ckpt", "handoff/*", "*/scores/*")
LISTS = "skipped*.jsonl"  # of samples that could not be used
# may be another on a resume; the order of samples does not depend on it
WORKERS = "data.num_workers="
LIMIT = "trainer.max_time="  # of one process
VERBOSE = "LIGHTNING_INTERNVL_VERBOSE"  # whether who started the run has asked for tracebacks
WITHOUT_FIRST = 10  # seconds after a signal for which a process waits for the first one to end too

OmegaConf.register_new_resolver("launch_time", launch_time, use_cache=True, replace=True)
OmegaConf.register_new_resolver("either", lambda first, second: first or second, replace=True)
OmegaConf.register_new_resolver("picture_size", picture_size, replace=True)
OmegaConf.register_new_resolver("picture_fact", picture_fact, replace=True)


def as_dict(config: Any, **options: Any) -> dict[str, Any]:
    """A composed configuration as plain containers; options of `OmegaConf.to_container`."""
    return cast(dict[str, Any], OmegaConf.to_container(config, **options))


@contextmanager
def run_folder(config: DictConfig, run_dir: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """The resolved configuration of a new run, which is written to its folder, or of the run that
    is resumed; and the folder.

    A folder belongs to one process (and those that it starts) at a time. A process that torchrun or
    SLURM starts once more goes on with the run that it had begun. A new run that a fault stops
    before there is anything to go on from leaves no run behind, but for the lists of samples that
    could not be used.

    Raises:
        ConfigError: for any fault of the configuration, or a folder that another process trains in.
    """
    command = list(HydraConfig.get().overrides.task)
    again = None if config.resume else earlier_attempt(run_dir, command)
    if again is not None:
        if again[0] != run_dir:
            remove_if_empty(run_dir)
        run_dir, launch = again
        console.print(f"{launch} was started again: goes on with {run_dir}", soft_wrap=True)
    named = config.resume or again or any(word.startswith("paths.") for word in command)
    several = started_from_outside() or HydraConfig.get().mode is RunMode.MULTIRUN
    lock = nullcontext(run_dir) if is_helper() else owned(run_dir, launches(), may_move=not (named or several))
    with lock as folder, _configured(config, folder, bool(again), command) as plain:
        yield plain, folder


@contextmanager
def _configured(config: DictConfig, run_dir: Path, again: bool, command: list[str]) -> Iterator[dict[str, Any]]:
    """The configuration of a run whose folder is this process's own."""
    try:
        if again:
            plain = _run_config(run_dir, as_dict(config, resolve=True))
        else:
            plain = load_run(config) if config.resume else start_run(config, run_dir)
    except Exception:
        remove_if_empty(run_dir)
        raise
    ours, before = not (config.resume or again or is_helper()), set(run_dir.iterdir())
    if ours:
        if run_dir != Path(HydraConfig.get().runtime.output_dir):
            plain["paths"]["run"] = str(run_dir)
        note_launch(run_dir, command)
        write_text(run_dir / RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(hidden(plain))))
    try:
        parts = giving_parts(plain.get("init_parts"))
        with naming(run_dir), shared_run(plain, run_dir), trusting(named_by_user(plain)), parts:
            yield plain
    except RunStopped as stop:
        on = "" if "resume=" in str(stop) else f"; go on with python train.py resume={run_dir}"
        raise stop.told(with_trust(f"{stop}{on}", plain, run_dir)) from stop
    except Exception as error:
        begun = any(any(run_dir.glob(work)) for work in WORK)
        if ours and not begun and is_fault(error):
            for path in set(run_dir.iterdir()) - before:
                remove_all_but(path, LISTS)
            remove_if_empty(run_dir)
        elif begun and not is_helper() and not isinstance(error, ValueError) and (sentence := explain_surroundings(error)):
            raise ConfigError([f"{sentence}; go on with python train.py resume={run_dir}"]) from error
        raise


@contextmanager
def nothing_written(config: DictConfig, run_dir: Path) -> Iterator[dict[str, Any]]:
    """The resolved and checked configuration of a run that is only planned: no folder is left, and
    paths need not be given.

    Raises:
        ConfigError: for any fault of the configuration.
    """
    try:
        plain = _with_given_settings(as_dict(config, resolve=True))
        plain = _checked_and_inherited(plain, _variables(config), lengths=bool(config.doctor))
        with trusting(named_by_user(plain)), giving_parts(plain.get("init_parts")):
            yield plain
    finally:
        root = Path(config.paths.root).resolve()
        # Hydra has made them
        for folder in (run_dir, *(parent for parent in run_dir.parents if parent.is_relative_to(root))):
            remove_if_empty(folder)


def start_run(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """The configuration of a new run as plain containers, resolved and checked.

    Raises:
        ConfigError: for any fault of the configuration, and if the folder holds a run already.
    """
    if UNKNOWN in str(run_dir):
        fault = "several processes were started, each would choose a folder of its own"
        raise ConfigError([f"{fault}; give one: paths.run=FOLDER"])
    plain = _with_given_settings(as_dict(config, resolve=True, throw_on_missing=True))
    plain = _checked_and_inherited(plain, _variables(config))
    if (run_dir / RUN_CONFIG).exists() and not is_helper():
        advice = f"go on with resume={run_dir}, or choose another paths.run"
        raise ConfigError([f"{run_dir} already holds a run; {advice}"])
    return plain


def _with_given_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """A configuration in which the command line and the recipe win over the files of stages; what
    is replaced is printed."""
    check_shapes(plain)
    given = given_settings(HydraConfig.get().overrides.task)
    plain, messages = with_given(with_current_targets(plain), given, _recipe())
    if HydraConfig.get().runtime.choices.get("strategy") == "fsdp":
        messages = ["strategy=fsdp is FSDP2 here, the same as strategy=fsdp2", *messages]
    for line in messages:
        console.print(line, soft_wrap=True, markup=False)
    return plain


def given_settings(words: Iterable[str]) -> list[Given]:
    """The words of a command line as settings.

    Raises:
        HydraException: for a word that is no setting.
    """
    found = []
    for one in OverridesParser.create().parse_overrides(list(words)):
        path = tuple((one.package or one.key_or_group.replace("/", ".")).split("."))
        value = None if one.is_delete() or one.is_sweep_override() else one.value()
        named = isinstance(value, str | list) and (one.package is not None or (CONF / one.key_or_group).is_dir())
        kind = DELETED if one.is_delete() else GROUP if named else VALUE
        found.append(Given(path, value, kind, str(one.input_line)))
    return found


def _recipe() -> dict[str, Any]:
    """What the file of the chosen recipe says, and those of its folder that it builds on."""
    hydra_config = HydraConfig.get()
    name = hydra_config.runtime.choices.get("experiment")
    sources = hydra_config.runtime.config_sources
    folders = [Path(s.path) / "experiment" for s in sources if s.schema == "file"]
    return _recipe_file(name, folders) if name else {}


def _recipe_file(name: str, folders: list[Path]) -> dict[str, Any]:
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    if path is None:  # a recipe of a package; its stages win over its common groups then
        return {}
    own = as_dict(OmegaConf.load(path))
    below = [word for word in own.pop("defaults", []) if isinstance(word, str) and word != "_self_"]
    found: dict[str, Any] = {}
    for word in below:
        found = merged(found, _recipe_file(word, folders))
    return merged(found, own)


def _variables(config: DictConfig) -> set[str]:
    """The settings of a configuration as composed that others refer to."""
    chosen = HydraConfig.get().runtime.choices.get("data")
    return variables_of(as_dict(config), chosen)


def _checked_and_inherited(plain: dict[str, Any], variables: set[str], lengths: bool = True) -> dict[str, Any]:
    """A configuration, checked, with the parts that its stages take from where they start, and with
    the `lengths` in steps of those that are given in epochs."""
    check_config(plain, variables)
    stages = [plain["stages"][name] for name in plain["pipeline"]]
    with trusting(named_by_user(plain)), giving_parts(plain.get("init_parts")):
        if any(stage.get("parts") == INHERITED for stage in stages):
            from lightning_internvl.training.inherit import inherit

            plain = inherit(plain)
        if lengths and any(stage.get("epochs") for stage in stages):
            from lightning_internvl.training.length import with_lengths

            plain = with_lengths(plain, build)
        if lengths and "max_unread_fraction" in plain["data"] and not plain["data"].get("validate"):
            from lightning_internvl.training.unread_records import check_records

            check_records(plain, build)
    return plain


def named_by_user(plain: Mapping[str, Any]) -> list[str]:
    """What a command line names itself, so that a folder may name it too: `trust`, the packages of
    the configuration (a part of one's own), and the hub ids that weights come from.

    Args:
        plain: the configuration of a new run, or of one that is resumed and has passed `check_run`.
    """
    start = str(plain.get("init_from") or "")
    starts = [start, *(str(place or "") for place in (plain.get("init_parts") or {}).values())]
    ids = [place for place in starts if "/" in place]  # a word without a slash would be a package
    return [*(plain.get("trust") or []), *foreign_targets(plain), *ids]


def load_run(config: DictConfig) -> dict[str, Any]:
    """The configuration of the run that is resumed, exactly as it was, or on other hardware.

    Raises:
        ConfigError: if there is no such run, or if other settings than those of the hardware are
            given beside `resume`.
        ValueError: if the run cannot go on with that hardware.
    """
    run_dir = Path(config.resume)
    if config.init_from:
        both = f"init_from={config.init_from} and resume={run_dir} exclude each other"
        why = "init_from starts a new run from weights, resume goes on with an old run as it was"
        raise ConfigError([f"{both}: {why}; leave one out"])
    given = HydraConfig.get().overrides.task
    words = {text.partition("=")[0] for text in given}
    moved = {key: config.trainer[key] for key in HARDWARE if f"trainer.{key}" in words}
    workers = any(o.startswith(WORKERS) for o in given)
    hardware = tuple(f"trainer.{key}=" for key in HARDWARE)
    allowed = ("resume=", "trust=", WORKERS, LIMIT, f"+{LIMIT}", *hardware)
    if others := [o for o in given if not o.startswith(allowed)]:
        names = ", ".join(name.rstrip("=") for name in (*hardware, WORKERS, LIMIT))
        anew = f"leave out {' '.join(others)}, or start anew with init_from={run_dir}"
        fault = f"resume goes on with a run exactly as it was; {anew}"
        raise ConfigError([f"{fault}. Only the hardware may be another: {names}; and trust=[PACKAGE]"])
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise ConfigError([f"resume={run_dir}: there is no run ({path} is missing); {runs_here()}"])
    trust: Any = config.trust
    trust = OmegaConf.to_container(trust) if OmegaConf.is_config(trust) else trust
    if faults := list(trust_faults(trust or [])):
        raise ConfigError(faults)
    plain = with_secrets(_read_run(path), f"resume={run_dir}")
    with trusting([*(trust or []), *given_hosts()]):
        check_run(plain, run_dir, fetches=True)
    plain["trust"] = trust or []  # what the run has recorded itself does not count
    if moved:
        plain, messages = with_hardware(plain, as_dict(OmegaConf.create(moved)))
        for line in messages:
            console.print(line, soft_wrap=True)
    for trainer in (plain["trainer"], *(stage.get("trainer") or {} for stage in plain["stages"].values())):
        trainer.pop("max_time", None)  # of the process that was started with it
    plain["trainer"]["max_time"] = as_dict(config.trainer).get("max_time")
    if workers:
        plain["data"]["num_workers"] = config.data.num_workers
    # the weights it started from may be gone by now
    check_config({**plain, "init_from": None, "resume": str(run_dir)})
    if (moved or workers) and not is_helper():
        # the next resume goes on with what this one has
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(hidden(plain))))
    return plain


def _read_run(path: Path) -> dict[str, Any]:
    """The configuration of a run as its file says, its groups in their places."""
    plain = with_current_targets(as_dict(OmegaConf.load(path)))
    check_run_shapes(plain, path)
    return cast(dict[str, Any], plain)


def _run_config(run_dir: Path, begun: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run that goes on as it was, which has the secrets and may name what the
    configuration that began it trusts; raises ConfigError as `load_run`."""
    plain = with_secrets(_read_run(run_dir / RUN_CONFIG), str(run_dir), begun)
    with trusting(named_by_user(begun)):
        check_run(plain, run_dir)
    check_config({**plain, "init_from": None, "resume": str(run_dir)})
    return plain


def command(main: Callable[[], None], signals: Sequence[Signals] = tuple(NAMES)) -> None:
    """Run a command; faults of the user's input become a message and exit code 2.
    HYDRA_FULL_ERROR=1 shows the traceback too.

    Args:
        signals: those that end it with a message and the exit code 128 + their number; the others
            do what they did.
    """
    threading.excepthook = _of_thread
    with speaking():
        _command(main, signals)


def _command(main: Callable[[], None], signals: Sequence[Signals]) -> None:
    verbose = os.environ.get(VERBOSE, os.environ.get("HYDRA_FULL_ERROR")) == "1"
    # Hydra then hands errors on to us. The processes that the trainer starts have this environment.
    os.environ |= {"HYDRA_FULL_ERROR": "1", VERBOSE: str(int(verbose))}
    try:
        with WATCH.installed(*signals), sweep_table():
            sys.argv[1:] = take_secrets([with_place(word) for word in sys.argv[1:]], given_settings)
            _check_words()
            main()
    except RunStopped as stop:
        if not is_helper():
            print(f"\n{stop}", file=sys.stderr)
        sys.exit(_helper_status(stop) if is_started_by_trainer() else stop.code)
    except Exception as error:
        if verbose or not is_fault(error):
            raise
        where = "(HYDRA_FULL_ERROR=1 shows where it was raised)"
        print(f"\nerror: {on_a_screen(explain(error))}\n{where}", file=sys.stderr)
        sys.exit(2)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = os.environ.pop(VERBOSE)


def _helper_status(stop: RunStopped) -> int:
    """The exit status of a process that the trainer has started. It leaves it to the first one to say
    how the run ended: the trainer kills that one if another ends with a fault, as it must where it
    would wait for this one for ever."""
    if not stop.alone:
        return 0
    time.sleep(WITHOUT_FIRST)  # a signal to all of them ends the first one, and with it this one
    return stop.code


def _of_thread(arguments: threading.ExceptHookArgs) -> None:
    """An error in a thread, as a logger's, that the main one soon meets too."""
    if arguments.exc_value is None or not (sentence := explain_surroundings(arguments.exc_value)):
        threading.__excepthook__(arguments)
    else:
        print(sentence, file=sys.stderr)


def _check_words() -> None:
    """Refuse a setting that stands several times on the command line; before Hydra, which may only
    print the configuration."""
    try:
        given = given_settings(get_args_parser().parse_args().overrides)
    except OverrideParseException:
        return  # Hydra says it of the same words
    check_given_once(given)
