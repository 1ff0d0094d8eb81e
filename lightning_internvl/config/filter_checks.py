"""The rules of a filter: which pairs are kept. Nothing here imports PyTorch or NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.choices import is_step
from lightning_internvl.messages import did_you_mean, number_faults

Setting = Mapping[str, Any]
STEP, ENGINES, MODES = "filter", ("local", "ray"), ("c", "g")
SIMILARITY = "similarity"
RANGES = ("side", "aspect", "characters", "words", SIMILARITY)  # rules on a number of each pair
LANGUAGES = ("scripts", "language")  # rules on what a caption is written in
# Rules that look at all pairs, and their setting
COPIES = {"same_picture": "distance", "same_caption": "copies"}
# What `similarity.keep_share` drops is counted apart from what lies outside its range
TOP_SHARE = "top_share"
FIELDS = {
    **dict.fromkeys(RANGES, ("min", "max")),
    SIMILARITY: ("min", "max", "keep_share"),
    **dict.fromkeys(LANGUAGES, ("allowed", "min")),
    **{rule: (field,) for rule, field in COPIES.items()},
}
# A pair is counted under the first that drops it
ORDER = (*RANGES[:-1], *LANGUAGES, SIMILARITY, *COPIES, TOP_SHARE)
SCRIPTS = (
    "latin", "han", "kana", "hangul", "cyrillic", "greek", "arabic", "hebrew", "devanagari",
    "bengali", "tamil", "thai",
)  # fmt: skip
MOST_DISTANCE = 15  # bits of 64; beyond it pictures have nothing in common
KEYS = (
    "step", "rules", "scores_from", "mode", "engine", "batch_size", "num_workers", "parts", "data",
    "new", "dropped",
)  # fmt: skip


def needs_model(stage: Setting) -> bool:
    """Whether a filter compares pictures with captions itself."""
    return not stage.get("scores_from") and (stage.get("rules") or {}).get(SIMILARITY) is not None


def step_faults(config: Setting, name: str) -> Iterator[str]:
    """What is wrong with a step, without building anything."""
    stage = config["stages"][name]
    for key in stage:
        if key not in KEYS:
            yield f"{key!r} is no setting of a filter; {did_you_mean(key, KEYS)}"
    if stage["step"] != STEP:
        yield f"step={stage['step']!r} is not known; valid choices: {STEP}"
        return
    for key, choices in (("engine", ENGINES), ("mode", MODES)):
        if stage.get(key) not in choices:
            yield f"{key}={stage.get(key)!r} is not known; {did_you_mean(stage.get(key), choices)}"
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        yield from number_faults(key, stage.get(key), least=least, whole=True)
    yield from _rule_faults(stage.get("rules"))
    if stage.get("scores_from") and not Path(stage["scores_from"], "scores").is_dir():
        yield f"scores_from={stage['scores_from']} holds no scores; give the folder of a filter, RUN/filter"
    before = config["pipeline"][: config["pipeline"].index(name)]
    trained = any(not is_step(config["stages"][one]) for one in before)
    # A resumed run has been asked before
    if needs_model(stage) and not (trained or config["init_from"] or config["resume"]):
        yield (
            "there is no model before it that could tell how well pictures and captions agree; "
            f"put it behind a stage, as in pipeline=[contrastive,{name},generative], give "
            f"init_from=RUN, or leave it out: stages.{name}.rules.similarity=null"
        )
    if not any((config["data"].get("pairs") or {}).get(given) for given in ("shards", "sources")):
        yield "the data has no shards that could be filtered; give data=webdataset data.shards=FOLDER"


def _rule_faults(rules: Any) -> Iterator[str]:
    if not isinstance(rules, Mapping):
        yield f"rules={rules!r} must name rules with their limits; valid choices: {', '.join(FIELDS)}"
        return
    for rule, setting in rules.items():
        if rule not in FIELDS:
            yield f"rules: there is no rule {rule!r}; {did_you_mean(rule, FIELDS)}"
        elif setting is None:
            continue
        elif not isinstance(setting, Mapping):
            keys = ", ".join(FIELDS[rule])
            yield f"rules.{rule}={setting!r} must be null (leave it out) or have {keys}"
        else:
            for field in setting:
                if field not in FIELDS[rule]:
                    yield f"rules.{rule}: there is no setting {field!r}; {did_you_mean(field, FIELDS[rule])}"
            yield from _limit_faults(rule, setting)


def _limit_faults(rule: str, setting: Setting) -> Iterator[str]:
    place, low, high = f"rules.{rule}", setting.get("min"), setting.get("max")
    for field, value in (("min", low), ("max", high)):
        if value is not None:
            faults = list(number_faults(f"{place}.{field}", value, note=", or null for no limit"))
            yield from faults
            if faults:
                return
    if low is not None and high is not None and low > high:
        yield f"{place}: min={low} is above max={high}, so it would drop every pair"
    if (share := setting.get("keep_share")) is not None:
        note = " and at most 1, the share of most similar pairs to keep, or null"
        yield from number_faults(f"{place}.keep_share", share, above=0, most=1, note=note)
    if rule in LANGUAGES:
        yield from _language_faults(rule, setting)
    if rule == "same_picture":
        name, note = f"{place}.distance", ": bits of 64 that may differ; 0 is equal"
        distance = setting.get("distance")
        yield from number_faults(name, distance, least=0, most=MOST_DISTANCE, whole=True, note=note)
    if rule == "same_caption":
        name, note = f"{place}.copies", ": how often a caption may occur"
        yield from number_faults(name, setting.get("copies"), least=1, whole=True, note=note)


def _language_faults(rule: str, setting: Setting) -> Iterator[str]:
    allowed = setting.get("allowed")
    if not isinstance(allowed, list) or not allowed:
        example = "[latin, han]" if rule == "scripts" else "[en, zh]"
        yield f"rules.{rule}.allowed={allowed!r} must be a list, as in {example}"
    elif rule == "scripts" and (unknown := [one for one in allowed if one not in SCRIPTS]):
        nearest = did_you_mean(unknown[0], SCRIPTS)
        yield f"rules.scripts.allowed: there is no script {unknown[0]!r}; {nearest}"
    yield from number_faults(f"rules.{rule}.min", setting.get("min"), least=0, most=1)
