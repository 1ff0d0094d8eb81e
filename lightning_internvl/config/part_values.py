"""Faults in the manifest of a hand-off, and in the configuration of its model: what holds settings
does, and values are of the types of the parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_internvl.choices import METHODS, PARTS
from lightning_internvl.config.known_keys import type_faults
from lightning_internvl.config.signatures import signature_of
from lightning_internvl.messages import did_you_mean, number_faults

ADAPTER_KEYS = ("method", "rank", "alpha", "dropout", "targets")
OPTIONAL = ("decoder", "objectives", "peft", "quantization")


def manifest_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a manifest whose `config` and `parts` are mappings."""
    yield from part_value_faults(manifest["config"])
    yield from _text_faults("", manifest, ("stage",))
    yield from number_faults("step", manifest.get("step"), least=0, whole=True)
    yield from _list_faults("trained", manifest.get("trained", []))
    for part, entry in manifest["parts"].items():
        yield from _text_faults(f"parts.{part}.", entry, ("sha256",))
    if "base" not in manifest:
        return
    if not isinstance(base := manifest["base"], Mapping):
        yield f"base={base!r:.80} must be a mapping"
        return
    yield from _text_faults("base.", base, ("place", "fingerprint", *({"beside"} & set(base))))
    yield from _list_faults("base.names", base.get("names"))
    parts = base.get("parts", {})
    for part, entry in parts.items() if isinstance(parts, Mapping) else [("", parts)]:
        path = f"base.parts.{part}".removesuffix(".")
        if isinstance(entry, Mapping):
            yield from _text_faults(f"{path}.", entry, ("place", "fingerprint"))
        else:
            yield f"{path}={entry!r:.80} must be a mapping"


def _text_faults(path: str, node: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if not isinstance(node.get(name), str):
            yield f"{path}{name}={node.get(name)!r:.80} must be a text"


def _list_faults(path: str, value: Any) -> Iterator[str]:
    """The fault of a value that is no list of texts."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        yield f"{path}={value!r:.80} must be a list of names"


def part_value_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values of such a configuration."""
    for part in ("encoder", "middleware", *OPTIONAL):
        node = config.get(part)
        if not isinstance(node, Mapping) and not (node is None and part in OPTIONAL):
            yield f"config.{part}={node!r:.80} must be a mapping of settings"
    nodes = {part: config.get(part) for part in ("encoder", "middleware", "decoder")}
    objectives = config.get("objectives")
    nodes |= {f"objectives.{name}": node for name, node in objectives.items()} if isinstance(objectives, Mapping) else {}
    for name, node in nodes.items():
        if isinstance(node, Mapping):
            yield from _node_faults(f"config.{name}", node)
        elif "." in name:
            yield f"config.{name}={node!r:.80} must be a mapping of settings"
    kinds = {kind: config[kind] for kind in METHODS if isinstance(config.get(kind), Mapping)}
    yield from (f"config.{fault}" for fault in adapter_faults(kinds))
    for token in ("image_token", "video_token"):
        if not isinstance(config.get(token), str | None):
            yield f"config.{token}={config[token]!r:.80} must be a text"


def adapter_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with `peft` and `quantization` of a run, a stage or a model."""
    for part, own in (settings.get("peft") or {}).items():
        if part not in PARTS:
            yield f"peft: there is no part {part!r}; {did_you_mean(part, PARTS)}"
        elif own and not isinstance(own, Mapping):
            yield f"peft.{part}={own!r:.80} must be a mapping of settings"
        elif own and (lacking := [key for key in ADAPTER_KEYS if own.get(key) is None]):
            yield f"peft.{part} lacks {', '.join(lacking)}; take them from a file: peft/part@peft.{part}=lora"
        elif own:
            yield from _method_faults(f"peft.{part}", own)
    for part, method in (settings.get("quantization") or {}).items():
        if part not in PARTS:
            yield f"quantization: there is no part {part!r}; {did_you_mean(part, PARTS)}"
        elif method and method not in METHODS["quantization"]:
            advice = did_you_mean(method, METHODS["quantization"])
            yield f"quantization.{part}={method!r} is not known; {advice}, null"


def _method_faults(path: str, own: Mapping[str, Any]) -> Iterator[str]:
    for key in own:
        if key not in ADAPTER_KEYS:
            yield f"{path}: there is no setting {key!r}; {did_you_mean(key, ADAPTER_KEYS)}"
    if own["method"] not in METHODS["peft"]:
        method, choices = own["method"], METHODS["peft"]
        yield f"{path}.{method=} is not known; {did_you_mean(method, choices)}"
    yield from number_faults(f"{path}.rank", own["rank"], above=0, whole=True)
    yield from number_faults(f"{path}.alpha", own["alpha"], above=0)
    yield from number_faults(f"{path}.dropout", own["dropout"], least=0)
    if not isinstance(own["targets"], str):
        yield from _list_faults(f"{path}.targets", own["targets"])


def _node_faults(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    if "_target_" not in node:
        yield f"{path} has no _target_, the class that is built of it"
        return
    tokenizer = node.get("tokenizer")  # a middleware that reads no text has none
    if tokenizer is not None and not (isinstance(tokenizer, Mapping) and "_target_" in tokenizer):
        yield f"{path}.tokenizer={tokenizer!r:.80} must be a mapping of settings with a _target_"
    found = list(type_faults(path, node))
    yield from found
    # anything but a class is no part, and is refused as such
    signature = None if found or not node["_target_"].rpartition(".")[2][:1].isupper() else signature_of(node["_target_"])
    if (
        signature is not None
        and path == "config.encoder"
        and (lacking := [one for one in signature.required if node.get(one) is None])
    ):
        yield f"{path} lacks {', '.join(lacking)}"
