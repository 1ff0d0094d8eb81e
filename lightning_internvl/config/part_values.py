"""Faults in the configuration of a model that comes with a hand-off: what holds settings does, and
values are of the types of the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_internvl.config.known_keys import type_faults
from lightning_internvl.config.signatures import signature_of

OPTIONAL = ("decoder", "objectives", "peft", "quantization")


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
    for token in ("image_token", "video_token"):
        if not isinstance(config.get(token), str | None):
            yield f"config.{token}={config[token]!r:.80} must be a text"


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
