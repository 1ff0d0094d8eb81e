"""Every key of a configuration is known, at any depth: a slip in a recipe is named before anything
is imported or built."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_internvl.choices import EMBEDDING, INHERITED, PARTS, embeds_pairs, is_step
from lightning_internvl.config.signatures import Signature, definition, signature_of, statements
from lightning_internvl.config.stage_settings import STAGE_KEYS, DataSettings, SampleSettings, merged
from lightning_internvl.config.targets import OURS, target_fault
from lightning_internvl.config.trust import named_in_conf
from lightning_internvl.config.value_types import type_fault
from lightning_internvl.files import CONF, parsed_yaml
from lightning_internvl.messages import did_you_mean

Node = Mapping[str, Any]
DATA_KEYS = tuple(field.name for field in fields(DataSettings))
KINDS = ("pairs", "chats", "labels")  # datasets of the data group
SYNONYMS = {
    "learning_rate": "lr", "warmup": "warmup_steps", "warmup_ratio": "warmup_steps", "wd": "weight_decay", "steps": "max_steps",
    "bs": "batch_size", "gpus": "devices", "num_gpus": "devices", "device": "accelerator", "workers": "num_workers",
    "gradient_accumulation_steps": "accumulate_grad_batches", "gradient_checkpointing": "activation_checkpointing",
    "bf16": "precision", "fp16": "precision", "output_dir": "paths.run", "resume_from_checkpoint": "resume",
}  # fmt: skip
PATHS = ("root", "run", "sweep")
HELD_OUT = "lightning_internvl.data.scenes.held_out.HeldOutScenes"
RULE = "lightning_internvl.stages.freezing.TrainRule"
COLLATORS = {
    "pairs": "lightning_internvl.data.collate.pairs.PairCollator",
    "chats": "lightning_internvl.data.collate.chats.ChatCollator",
    "labels": "lightning_internvl.data.collate.labels.LabelCollator",
    EMBEDDING: "lightning_internvl.data.collate.embedding.EmbeddingCollator",
}
MORE = {"chats": ("answers", "answer_tokens")}  # of a collator that asks (`data.collate.questions`)
# from which the arguments of the collator are made
CHATS = ("template", "system", "image_frame", "max_text_tokens", "pictures")
# Parameters that the program fills in, by the group whose classes and functions have them.
GIVEN = {
    "module": ("model", "name", "run_dir", "parts", "optimizer", "scheduler", "max_steps", "seed", "start_step"),
    "optimizer": ("model", "plan"),
    "scheduler": ("optimizer", "total_steps"),
    "collate": (
        "tokenizer", "template", "processor", "tokens_per_tile", "image_tokens", "split_answers", "instructions",
        "text_length", "cached_chunk",
    ),
}  # fmt: skip
# Sizes that a part has from its neighbours; one that comes with a checkpoint names them.
SIZES = ("encoder_dim", "encoder_dims", "decoder_dim", "special_tokens")


def key_faults(config: Node, variables: Collection[str] | None = None) -> Iterator[str]:
    """Keys that nothing reads, each with the nearest valid word.

    Args:
        config: resolved, as plain containers.
        variables: dotted paths to which other settings refer (see `variables_of`); those of `data`
            and `paths` are known. None for the configuration of a run, in which references have
            become values: keys that are only referred to are not checked then.
    """
    for part in PARTS:
        yield from _part_faults(part, config[part])
    yield from _group_faults("data", config["data"], DATA_KEYS, variables)
    yield from _data_faults("data", config["data"], config["data"])
    yield from _settings_faults("data", config["data"], DataSettings)
    yield from _group_faults("paths", config["paths"], PATHS, variables)
    strategy = config["strategy"] or {}
    if "_target_" in strategy:
        yield from node_faults("strategy", strategy)
    else:
        yield from unknown("strategy", strategy, ("name",))
    for group in ("optimizer", "scheduler", "trainer"):
        yield from node_faults(group, config[group], given=GIVEN.get(group, ()))
    for group in ("callbacks", "logger"):
        yield from _list_faults(group, config.get(group) or {}, GIVEN.get(group, ()))
    yield from _unfinished_stages(config)


def stage_key_faults(config: Node, stage: Node) -> Iterator[str]:
    """The same for one stage of a pipeline; names of settings are those below the stage."""
    for key in [key for key in stage if key not in STAGE_KEYS]:
        yield f"{key!r} is no setting of a stage; {did_you_mean(key, STAGE_KEYS)}"
    yield from node_faults("module", stage.get("module") or {}, given=GIVEN["module"])
    rules = [rule for rule in (stage.get("module") or {}).get("train") or () if isinstance(rule, Mapping)]
    for rule in rules:
        yield from unknown("module.train", rule, [name for name in _names(RULE) if name != "title"])
    yield from _weight_faults(stage.get("module") or {}, stage.get("objectives") or {})
    yield from _list_faults("objectives", stage.get("objectives"), ("dim", "decoder_dim"))
    yield from _list_faults("evaluation", stage.get("evaluation"))
    yield from unknown("samples", stage.get("samples") or {}, [field.name for field in fields(SampleSettings)])
    yield from _settings_faults("samples", stage.get("samples") or {}, SampleSettings)
    for part in PARTS:
        common = {} if stage["parts"] == INHERITED else config[part]
        yield from _part_faults(part, stage.get(part), common)
    for group in ("optimizer", "scheduler", "trainer"):
        target = config[group].get("_target_")
        yield from node_faults(group, stage.get(group) or {}, target=target, given=GIVEN.get(group, ()))
    data, change = config["data"], stage.get("datasets") or {}
    yield from unknown("datasets", change, (*DATA_KEYS, *data))
    yield from _data_faults("datasets", change, data)
    own = dict(stage.get("collate") or {})
    reads = EMBEDDING if embeds_pairs(stage) else stage.get("data")
    processor = merged(data["processor"], change.get("processor")).get("_target_")
    yield from _processor_faults("collate.processor", own.pop("processor", None), processor)
    yield from unknown("collate", own, (*_collate_keys(reads), "processor"))


def unknown(path: str, node: Any, choices: Iterable[str]) -> Iterator[str]:
    """Keys of a mapping that are none of the choices."""
    known = list(dict.fromkeys(choices))
    for key in node if isinstance(node, Mapping) else ():
        if key not in known and not str(key).startswith("_"):
            words = did_you_mean(key, known) if known else "nothing can be set here"
            yield f"{path}: there is no setting {key!r}; {words}"


def full_names(word: str, config: Any) -> list[str]:
    """The settings that somebody may mean by the last word of their names, or by a word for it that
    other trainers have: `lr`, `gpus`. Those for all stages come before those of one."""
    word = SYNONYMS.get(word, word)
    paths = [path for path in _paths(config) if f".{path}".endswith(f".{word}")]
    common = [path for path in paths if not path.startswith("stages.")]
    return (common or paths)[:3]


def _paths(node: Any, path: str = "") -> Iterator[str]:
    for key in node if isinstance(node, Mapping) else ():
        inner = f"{path}.{key}" if path else str(key)
        yield inner
        yield from _paths(node[key], inner)


def node_faults(
    path: str,
    node: Any,
    *,
    target: str | None = None,
    given: Collection[str] = (),
    hidden: Collection[str] = (),
    more: Collection[str] = (),
) -> Iterator[str]:
    """Keys that a node's class or function does not take, and those of the nodes below it.

    Args:
        target: of a node that changes another one and has none itself.
        given: parameters that the program fills in, and nobody else.
        hidden: parameters that may be given, but are not named among the valid choices.
        more: keys that are read beside the parameters.
    """
    if isinstance(node, list | tuple):
        for number, one in enumerate(node):
            yield from node_faults(f"{path}.{number}", one)
    if not isinstance(node, Mapping):
        return
    found = node.get("_target_", target or "")
    if fault := target_fault(found):
        yield f"{path}.{fault}"
        return
    if found.startswith(OURS) and not _exists(found):
        module, _, name = found.rpartition(".")
        yield f"{path}._target_: {found!r} cannot be found; {did_you_mean(name, _defined(module))}"
    elif (signature := signature_of(found)) is not None and not signature.anything:
        known = [*(name for name in signature.names if name not in given), *more]
        shown = [name for name in known if name not in hidden]
        yield from unknown(path, {key: None for key in node if key not in hidden or key not in known}, shown)
        yield from _type_faults(path, node, signature)
    for key, value in node.items():
        yield from node_faults(f"{path}.{key}", value)


def _type_faults(path: str, node: Node, signature: Signature) -> Iterator[str]:
    """Values of other types than the parameters have."""
    if not isinstance(node.get("_partial_", True), bool):
        yield f"{path}._partial_={node['_partial_']!r:.80} must be true or false"
    for key, value in node.items():
        # null leaves what has no default to the program, which knows the sizes of the neighbours, or what a stage starts from
        later = value == INHERITED or (value is None and key in signature.required)
        annotation = None if later else signature.types.get(key)
        if annotation is not None and (fault := type_fault(key, annotation, value)):
            yield f"{path}.{key}={value!r:.80} {fault}"


def type_faults(path: str, node: Any) -> Iterator[str]:
    """Values in a node and below it that are of other types than its class or function takes."""
    if isinstance(node, list | tuple):
        for number, one in enumerate(node):
            yield from type_faults(f"{path}.{number}", one)
    if not isinstance(node, Mapping):
        return
    found = node.get("_target_", "")
    if fault := target_fault(found):
        yield f"{path}.{fault}"
        return
    if (signature := signature_of(found)) is not None:
        yield from _type_faults(path, node, signature)
    for key, value in node.items():
        yield from type_faults(f"{path}.{key}", value)


def _settings_faults(path: str, node: Node, kind: type) -> Iterator[str]:
    """The same for the fields of a dataclass of settings, of which null stands for the default, and
    of which the number of workers may be a word."""
    signature = signature_of(f"{kind.__module__}.{kind.__name__}")
    assert signature is not None
    own = {key: value for key, value in node.items() if value is not None and key != "num_workers"}
    yield from _type_faults(path, own, signature)


def _exists(target: str) -> bool:
    """Whether a class or function is where a path says; assigned names are left to modules."""
    module, _, name = target.rpartition(".")
    assigned = (getattr(one, "targets", ()) for one in statements(module))
    return definition(module, name) is not None or any(name == getattr(t, "id", "") for ts in assigned for t in ts)


def _defined(module: str) -> list[str]:
    """The public names that a module of this project defines or imports from it."""
    found = []
    for one in statements(module):
        own = [one.name] if isinstance(one, ast.ClassDef | ast.FunctionDef) else []
        imported = [alias.asname or alias.name for alias in one.names] if isinstance(one, ast.ImportFrom) else []
        found += [name for name in (*own, *imported) if definition(module, name) and not name.startswith("_")]
    return found


def _names(target: str) -> tuple[str, ...]:
    """The parameters of a class of this project that is known to be there."""
    signature = signature_of(target)
    assert signature is not None, target
    return signature.names


def _part_faults(part: str, node: Any, common: Node | None = None) -> Iterator[str]:
    if isinstance(node, Mapping) and node.get("_target_") == INHERITED:
        yield from unknown(part, node, ("pretrained",))
        return
    more = ("tokenizer",) if part != "encoder" else ()
    yield from node_faults(part, node or {}, target=(common or {}).get("_target_"), hidden=SIZES, more=more)


def _list_faults(path: str, nodes: Any, given: Collection[str] = ()) -> Iterator[str]:
    """Faults of objects by names that a user chooses."""
    complete = [name for name, node in (nodes or {}).items() if isinstance(node, Mapping) and "_target_" in node]
    for name, node in (nodes or {}).items():
        if isinstance(node, Mapping) and "_target_" not in node:
            nothing = f"there is no {name!r} to change, and it has no _target_"
            yield f"{path}: {nothing}; {did_you_mean(name, complete)}"
        else:
            yield from node_faults(f"{path}.{name}", node, given=given)


def _data_faults(path: str, own: Node, data: Node) -> Iterator[str]:
    """Faults of what lies below a data group, or below changes to it."""
    for kind in KINDS:
        node, common = own.get(kind), data.get(kind) or {}
        if isinstance(node, Mapping) and "_target_" not in {**common, **node}:
            # debug=overfit gives one to all kinds
            yield from unknown(f"{path}.{kind}", node, ("length",))
        yield from node_faults(f"{path}.{kind}", node, target=common.get("_target_"))
    processor = data["processor"].get("_target_")
    for name in ("processor", "eval_processor"):
        yield from _processor_faults(f"{path}.{name}", own.get(name), processor)
    for kind in ("pairs", "chats"):
        yield from unknown(f"{path}.{kind}_collate", own.get(f"{kind}_collate"), _collate_keys(kind))
    # debug=fast gives sizes to data without any
    held_out = (data.get("held_out") or {}).get("_target_") or HELD_OUT
    yield from node_faults(f"{path}.held_out", own.get("held_out"), target=held_out)


def _processor_faults(path: str, node: Any, target: str | None) -> Iterator[str]:
    # any one of this project
    if isinstance(node, Mapping) and (node.get("_target_") or target) == INHERITED:
        kinds = {name for name in named_in_conf() if ".data.processors." in name}
        yield from unknown(path, node, sorted({name for kind in kinds for name in _names(kind)}))
    else:
        yield from node_faults(path, node, target=target)


def _collate_keys(kind: Any) -> list[str]:
    """The settings of a collator."""
    if kind not in COLLATORS:
        return [key for one in COLLATORS for key in _collate_keys(one)]
    own = [name for name in (*_names(COLLATORS[kind]), *MORE.get(kind, ())) if name not in GIVEN["collate"]]
    return [*CHATS, *own] if kind in ("chats", EMBEDDING) else own


def _weight_faults(module: Node, objectives: Node) -> Iterator[str]:
    """Weights of losses that a stage of this project does not have: of its objectives, and of what
    files of `conf/stage/` name."""
    if str(module.get("_target_")).startswith(OURS):
        modules = _stage_modules()
        named = [one.get("weights") or {} for one in modules if one.get("_target_") == module["_target_"]]
        yield from unknown("module.weights", module.get("weights"), [*objectives, *(name for one in named for name in one)])


@functools.cache
def _stage_modules() -> list[Node]:
    """The modules of all files of `conf/stage/`."""
    files = [parsed_yaml(path.read_text(encoding="utf-8")) for path in CONF.glob("stage/*.yaml")]
    return [file.get("module") or {} for file in files]


def _unfinished_stages(config: Node) -> Iterator[str]:
    """What stands under `stages` without being a stage; debug=fast also changes stages that a
    command line has left out."""
    stages = {name: stage or {} for name, stage in config["stages"].items()}
    whole = [name for name, stage in stages.items() if is_step(stage) or "_target_" in (stage.get("module") or {})]
    pipeline = config["pipeline"] if isinstance(config["pipeline"], list) else ()
    for name in stages.keys() - set(whole) - set(map(str, pipeline)):
        if not (CONF / "stage" / f"{name}.yaml").is_file():
            nothing = f"there is no stage {name!r} to change, and it has no module"
            yield f"stages: {nothing}; {did_you_mean(name, whole)}"


# --- variables ----------------------------------------------------------------------------------


def _group_faults(path: str, node: Node, known: Collection[str], variables: Collection[str] | None) -> Iterator[str]:
    if variables is None:
        return
    own = [key for key in node if any(f"{name}.".startswith(f"{path}.{key}.") for name in variables)]
    yield from unknown(path, node, (*known, *own))


def variables_of(config: Any, data_file: str | None = None) -> set[str]:
    """Dotted paths to which the settings of a configuration refer by interpolation, and all that a
    file of `conf/data/` has.

    Args:
        config: as composed, unresolved, as plain containers.
        data_file: the name of that file; one of the user's own counts for what refers to it alone.
    """
    path = Path(CONF, "data", f"{data_file}.yaml")
    own = parsed_yaml(path.read_text(encoding="utf-8")) if data_file and path.is_file() else {}
    return set(_references(config, ())) | {f"data.{key}" for key in own}


def _references(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, Mapping | list | tuple):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _references(value, (*path, str(key)))
    elif isinstance(node, str) and "${" in node:
        for word in re.findall(r"[.\w]*\w", re.sub(r"\[(\w+)\]", r".\1", node)):
            name = word.lstrip(".")
            ups = len(word) - len(name)  # ${.x} stands beside, ${..x} one level up
            yield ".".join((*path[:-ups], name)) if ups else name
