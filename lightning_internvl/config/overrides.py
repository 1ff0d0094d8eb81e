"""Settings of the command line reach every stage: line > recipe > stage file > group.

A stage carries changes to the common groups (`stages.contrastive.optimizer.lr`), and these win over
the groups. What the user gives for a group (`optimizer.lr=1e-4`, `optimizer=sgd`) is therefore
written into the stages' own changes, once, where the command line is known, so that the
configuration of the run shows what holds. What is given for one stage
(`stages.contrastive.optimizer.lr=1e-3`) wins over what is given for all.

Nothing here imports PyTorch or Hydra; all is done on plain containers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_internvl.choices import BLOCKWISE, INHERITED, PARTS, by_part, is_step
from lightning_internvl.config.effects import without_effect
from lightning_internvl.config.given import DELETED, GROUP, VALUE, Given, Path
from lightning_internvl.config.strangers import leave_out_strangers
from lightning_internvl.messages import ConfigError

Config = dict[str, Any]
RECIPE = ("optimizer", "scheduler", "trainer")  # groups of a recipe that win over stage files
# of a stage's own where another file of the group is chosen; else what the file names
KEPT: dict[str, Sequence[str]] = {"scheduler": ("warmup_steps",)}
LENGTHS = ("max_steps", "epochs")  # of a stage
ABSENT = object()


def with_given(
    config: Mapping[str, Any], given: Iterable[Given], recipe: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """The configuration in which the settings of the command line, and of a recipe, hold for all
    stages of the pipeline.

    Args:
        config: resolved, as plain containers.
        given: what the command line gives.
        recipe: the settings that the file of a recipe itself names, those for stages among them.

    Returns:
        the configuration, and for each stage in which something was replaced one line that says
        what

    Raises:
        ConfigError: for a setting that cannot have an effect in any stage of the pipeline.
    """
    found, given = copy.deepcopy(dict(config)), list(given)
    _empty(found, given)
    names = _trained(found)
    lines = [*leave_out_strangers(found, given, recipe or {}, names)]
    whys: dict[str, list[str | None]] = {one.text: [] for one in given}
    _check_lengths(found, given)
    lengths = any(one.path[-1] in LENGTHS for one in given) or found.get("epochs") is not None
    for name in names:
        change = _Change(found, name, given)
        change.take_recipe(recipe or {})
        change.take_groups()
        change.take_values()
        change.take_blockwise()
        if lengths:
            change.take_length()
        change.take_batch_size(recipe or {})
        lines += [f"{name}: {'; '.join(change.messages)}"] if change.messages else []
        for one in given:
            whys[one.text].append(change.unreached.get(one.text))
    for word in ("epochs", "batch_size", *(["max_steps"] if lengths else [])) if names else ():
        if word == "epochs" or (_whole(found.get(word)) and found[word] > 0):  # what is no such number is told by its name
            found[word] = None  # each stage has its own now
    nowhere = {text: [why for why in of_stages if why] for text, of_stages in whys.items() if all(of_stages)}
    faults = [*without_effect(found, given, names)]
    faults += [f"{text} has no effect: {'; '.join(why)}" for text, why in nowhere.items() if why]
    if faults:
        raise ConfigError(faults)
    return found, lines


def _check_lengths(config: Mapping[str, Any], given: Iterable[Given]) -> None:
    """Refuse a length in steps and one in epochs for the same stages.

    Raises:
        ConfigError: naming both.
    """
    texts = {one.path: one.text for one in given if one.kind == VALUE and one.value is not None}
    places: list[Path] = [(), *(("stages", name) for name in _trained(config))]
    found = ([texts[*place, word] for word in LENGTHS if (*place, word) in texts] for place in places)
    both = "both say how long to train; leave one out"
    faults = [f"{' and '.join(words)} {both}" for words in found if len(words) > 1]
    if faults:
        raise ConfigError(faults)


def _empty(config: Config, given: list[Given]) -> None:
    """`X={}` makes X empty; else it would be merged into what stands there."""
    for one in given:
        below = any(other.path[: len(one.path)] == one.path and other.path != one.path for other in given)
        node = _at(config, one.path)
        if one.kind == VALUE and one.value == {} and isinstance(node, dict) and not below:
            node.clear()


def _trained(config: Mapping[str, Any]) -> list[str]:
    """The stages of the pipeline that train, as far as the unchecked configuration says."""
    stages, pipeline = config.get("stages") or {}, config.get("pipeline")
    names = pipeline if isinstance(pipeline, list) else []
    return [name for name in dict.fromkeys(names) if isinstance(stages.get(name), Mapping) and not is_step(stages[name])]


class _Change:
    """What becomes of one stage's own settings.

    Attributes:
        told: what was replaced, in words.
        unreached: why a setting cannot reach the stage, by its words on the command line.
    """

    def __init__(self, config: Config, name: str, given: list[Given]) -> None:
        self.config, self.name, self.stage = config, name, config["stages"][name]
        own = [one._replace(path=one.path[2:]) for one in given if one.path[:2] == ("stages", name)]
        self.common = [one for one in given if one.path[0] != "stages"]
        self.own_groups = {one.path for one in own if one.kind == GROUP}
        self.own_values = {path for one in own if one.kind != GROUP for path in _leaves(one.path, one.value)}
        self.messages: list[str] = []
        self.unreached: dict[str, str] = {}

    def take_recipe(self, recipe: Mapping[str, Any]) -> None:
        """What a recipe says for all stages wins over a stage's file, not its own words for it."""
        for group in RECIPE:
            spoken = set(_leaves((group,), _at(recipe, ("stages", self.name, group))))
            for path in _leaves((group,), _at(recipe, (group,))):
                if path not in spoken and path[-1] != "_target_" and len(path) > 1:
                    self._write(path, path, "of the recipe")

    def take_groups(self) -> None:
        """`optimizer=sgd`: the stage keeps of its own what the new choice has too."""
        for one in self.common:
            group, own = one.path[0], self.stage.get(one.path[0])
            if one.kind != GROUP or one.path in self.own_groups:
                continue
            if group == "peft":
                self._swap_adapters(one, one.path[1:] or PARTS)
            elif len(one.path) == 1 and isinstance(own, dict) and own:
                if group in ("optimizer", "scheduler", "trainer"):
                    self._swap(one, own)
                elif group == "quantization":
                    chosen = self.config["quantization"]
                    for part in [p for p in chosen if chosen[p] or not any(chosen.values())]:
                        self._write((group, part), (group, part))

    def _swap(self, one: Given, own: Config) -> None:
        group, common = one.path[0], self.config[one.path[0]]
        if "_target_" in own:
            if own["_target_"] == common.get("_target_"):
                return
            self.stage[group] = {key: value for key, value in own.items() if self._is_own((group, key)) and key in common}
            self.messages.append(f"{one.text} in place of {own['_target_'].rpartition('.')[2]} and its settings")
            return
        kept = {k: v for k, v in own.items() if (k in KEPT.get(group, [*common]) and k in common) or self._is_own((group, k))}
        self.stage[group] = kept
        left = [f"{key} {own[key]}" for key in own if key not in kept]
        words = [f"with its {', '.join(f'{k} {v}' for k, v in kept.items())}" if kept else ""]
        words.append(f"without its {', '.join(left)}" if left else "")
        self.messages.append(f"{one.text} {' and '.join(filter(None, words))}")

    def _swap_adapters(self, one: Given, parts: Iterable[str]) -> None:
        chosen, own = self.config["peft"] or {}, self.stage.get("peft") or {}
        lacking = self._lacking([part for part in parts if chosen.get(part)])
        self.unreached |= {one.text: lacking} if lacking else {}
        for part in [part for part in parts if part in own and not self._is_own(("peft", part))]:
            if not any(chosen.get(p) for p in parts) and own[part]:
                self.messages.append(f"{one.text} in place of its own adapters on the {part}")
                del own[part]
            elif chosen.get(part) and own[part] is None:
                self._below_nothing(("peft", part, "method"), 2, own, one.text)
            elif chosen.get(part) and "method" in own[part]:
                self._write(("peft", part, "method"), ("peft", part, "method"))

    def _lacking(self, parts: list[str]) -> str | None:
        """Why settings of parts cannot reach the stage, if it has none of these."""
        has = self.stage.get("parts")
        # Of a word that is no part the check of the configuration says more.
        known = set(parts) <= set(PARTS)
        if not parts or not known or has == INHERITED or not isinstance(has, list):
            return None
        if set(parts) & set(has):
            return None
        return f"stage {self.name} has no {' and no '.join(parts)}; choose a part that it has, as in peft/part@peft.{has[0]}=lora"

    def take_values(self) -> None:
        """`optimizer.lr=1e-4`: in place of the stage's own."""
        for one in [one for one in self.common if one.kind != GROUP]:
            if one.path[0] in ("peft", "quantization") and (lacking := self._lacking(list(one.path[1:2]))):
                self.unreached[one.text] = lacking
                continue
            for path in _leaves(one.path, one.value):
                for prefix, place in self._places():
                    if path[: len(prefix)] == prefix and len(path) > len(prefix):
                        own = (*place, *path[len(prefix) :])
                        self._delete(own) if one.kind == DELETED else self._write(path, own, text=one.text)

    def _places(self) -> Iterator[tuple[Path, Path]]:
        """Where a stage keeps its changes to what is common."""
        for group in ("optimizer", "scheduler", "trainer", "peft", "quantization", *PARTS):
            yield (group,), (group,)
        yield ("data",), ("datasets",)
        yield ("data", "processor"), ("collate", "processor")
        yield ("data", f"{self.stage.get('data')}_collate"), ("collate",)

    def _write(self, path: Path, own: Path, of: str = "", text: str = "") -> None:
        """Let the common value at `path` hold at `own` in the stage, where they differ."""
        group = self.stage.get(own[0])
        if not isinstance(group, dict) or self._is_own(own):
            return
        # of a class of its own, so that nothing common is left below it
        whole = group.get("_target_")
        if whole and own[0] in PARTS and whole != _at(self.config, (own[0], "_target_")):
            return
        node: Any = group
        for depth, key in enumerate(own[1:-1], 2):
            child = node.get(key, ABSENT)
            if child is ABSENT:
                break
            if not isinstance(child, dict):  # null for all that lies below
                self._below_nothing(own, depth, node, text)
                return
            node = child
        else:
            if own[-1] in node or (whole and len(own) > 2):
                self._replace(path, node, own[-1], of)
                return
        if whole and text:
            fitting = ", ".join(key for key in group if not key.startswith("_"))
            self.unreached[text] = f"stage {self.name} has {whole.rpartition('.')[2]} as its {own[0]}, with {fitting}"

    def _replace(self, path: Path, node: Config, key: str, of: str) -> None:
        old, new = node.get(key), _at(self.config, path)
        if new is not ABSENT and old != new:
            node[key] = copy.deepcopy(new)
            self.messages.append(f"{'.'.join(path)} {new}{f' {of}' if of else ''} in place of {old}")

    def _below_nothing(self, own: Path, depth: int, node: Config, text: str) -> None:
        setting = ".".join(own[:depth])
        if own[0] != "peft":
            del node[own[depth - 1]]
            self.messages.append(f"{text or '.'.join(own)} in place of {setting}=null")
        elif text:
            self.unreached[text] = f"stages.{self.name}.{setting}=null keeps adapters off"
            self.messages.append(f"{text} does not reach it: stages.{self.name}.{setting}=null")

    def _delete(self, own: Path) -> None:
        node = _at(self.stage, own[:-1])
        if isinstance(node, dict) and own[-1] in node and not self._is_own(own):
            self.messages.append(f"without its {'.'.join(own)} {node.pop(own[-1])}")

    def take_blockwise(self) -> None:
        """`compile=true` and the like, which are one word or one for each part."""
        for one in self.common:
            name = one.path[0]
            own = by_part(self.stage.get(name)) if name in BLOCKWISE else {}
            for part, old in list(own.items()):
                new = by_part(self.config.get(name)).get(part)
                if one.path[1:] in ((), (part,)) and old != new and not self._is_own((name, part)):
                    own[part] = new
                    self.messages.append(f"{name}.{part} {new} in place of {old}")
                    self.stage[name] = own

    def take_length(self) -> None:
        """`max_steps` or `epochs` of the command line is the length of each stage; `max_steps` of a
        file only shortens stages."""
        stage, cap = self.stage, self.config.get("max_steps")
        own = [word for word in LENGTHS if self._is_own((word,)) and stage.get(word) is not None]
        if own:
            stage |= {word: None for word in LENGTHS if word in stage and word not in own}
        elif any(one.path == ("max_steps",) for one in self.common) and cap is not None:
            self._take_length("max_steps", cap)
        elif self.config.get("epochs") is not None:
            self._take_length("epochs", self.config["epochs"])
        elif _whole(cap):
            # of a file, beside the length of another stage
            old = stage.get("max_steps")
            stage |= {"epochs": None, "max_steps": min(old, cap) if _whole(old) else cap}

    def _take_length(self, word: str, new: Any) -> None:
        before = {one: self.stage[one] for one in LENGTHS if self.stage.get(one) is not None}
        if before != {word: new}:
            old = [str(x) if one == word else f"{one} {x}" for one, x in before.items()]
            self.messages.append(f"{word} {new} in place of {', '.join(old) or 'none'}")
        self.stage |= dict.fromkeys(before) | {word: new}

    def take_batch_size(self, recipe: Mapping[str, Any]) -> None:
        """`batch_size=8` is that of each stage; in a recipe, of each for which it names no other."""
        given = any(one.path == ("batch_size",) for one in self.common)
        spoken = _at(recipe, ("stages", self.name, "batch_size")) is not ABSENT and not given
        size, old = self.config.get("batch_size"), self.stage.get("batch_size")
        if size in (None, old) or spoken or self._is_own(("batch_size",)):
            return
        self.stage["batch_size"] = size
        self.messages.append(f"batch_size {size} in place of {old}")

    def _is_own(self, path: Path) -> bool:
        """Whether the command line says something for this stage at a path, above or below it."""
        return any(path[: len(own)] == own or own[: len(path)] == path for own in self.own_values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at(node: Any, path: Path) -> Any:
    """What stands at a path; `ABSENT` where nothing does."""
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return ABSENT
        node = node[key]
    return node


def _leaves(path: Path, value: Any) -> list[Path]:
    """The paths of all values at and below a path; an empty mapping is a value."""
    if value is ABSENT:
        return []
    if not isinstance(value, Mapping) or not value:
        return [path]
    return [leaf for key, child in value.items() for leaf in _leaves((*path, str(key)), child)]
