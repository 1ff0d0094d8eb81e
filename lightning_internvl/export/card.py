"""The model card: what a folder is, where it comes from, how well it does, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lightning_internvl.choices import PARTS, trained_stages
from lightning_internvl.export.base_folder import is_hub_id
from lightning_internvl.export.proof import without_secrets
from lightning_internvl.report.metrics_table import format_number, with_chance

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")

if TYPE_CHECKING:
    from lightning_internvl.export.processors import WrittenProcessor
    from lightning_internvl.export.report import ExportOptions, ExportReport


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        run: the resolved configuration of the run.
        manifest: of the hand-off that was exported.
        steps: made by each stage whose hand-off is there.
        metrics: as in `metrics.json`.
        bases: what the run took weights from (see `proof.bases_of`).
        files: hashes of the weights.
    """

    run: Mapping[str, Any]
    manifest: Mapping[str, Any]
    steps: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, float]]
    options: ExportOptions
    report: ExportReport
    prepared: WrittenProcessor
    bases: Sequence[Mapping[str, Any]]
    files: Mapping[str, str]


def card_of(card: Card) -> str:
    """The text of README.md, with the fields of the Hugging Face hub at its beginning."""
    fields = yaml.safe_dump(_fields(card), sort_keys=False, allow_unicode=True).strip()
    pieces = [
        f"---\n{fields}\n---",
        f"# {card.run['name']}",
        _overview(card),
        _usage(card),
        _training(card),
        _metrics(card),
        _bases(card),
        _hashes(card),
        _checks(card),
    ]
    if card.options.licence is None:
        known = "those of the base models and of the data apply"
        pieces.append(f"## Licence\n\nNone was given when this folder was written; {known}.")
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _fields(card: Card) -> dict[str, Any]:
    chats = card.run["stages"][card.manifest["stage"]]["data"] == "chats"
    fields: dict[str, Any] = {}
    if card.options.licence:
        fields["license"] = card.options.licence
    if card.options.licence_link:
        fields["license_link"] = card.options.licence_link
    library = card.report.loader.partition(".")[0]
    fields["library_name"] = library
    fields |= {"pipeline_tag": "image-text-to-text"} if chats else {}
    if bases := base_models(card.run):
        fields["base_model"] = bases if len(bases) > 1 else bases[0]
    return fields


def base_models(run: Mapping[str, Any]) -> list[str]:
    """Ids of the hub from which the run took weights; folders name nothing to others."""
    named = [run.get("init_from"), *((run.get(part) or {}).get("pretrained") for part in PARTS)]
    return list(dict.fromkeys(str(name) for name in named if name and is_hub_id(str(name))))


def _overview(card: Card) -> str:
    parts = card.manifest["config"]
    classes = {part: parts[part]["_target_"].rpartition(".")[2] for part in PARTS if parts.get(part)}
    sizes = card.report.parts
    rows = [f"| {part} | {kind} | {sizes[part][0]:,} | {sizes[part][1]:,} |" for part, kind in classes.items() if part in sizes]
    table = "\n".join(["| part | class | parameters | trained |", "| --- | --- | ---: | ---: |", *rows])
    return (
        f"A vision-language model of the recipe `{card.run['name']}`, trained with lightning_internvl and written in the layout "
        f"`{card.report.layout}` as {card.options.dtype}.\n\n{table}"
    )


def _usage(card: Card) -> str:
    kind, loader = card.prepared.kind, card.report.loader.rpartition(".")[2]
    if card.report.adapters:
        name, first = card.report.base
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            *(["from lightning_internvl import load_pretrained", first] if first else []),
            f'base = AutoModelForImageTextToText.from_pretrained("{name}")',
            'model, processor = PeftModel.from_pretrained(base, "."), AutoProcessor.from_pretrained(".")',
        ]
    elif kind and kind.endswith(("CLIPProcessor", "SiglipProcessor")):
        lines = [
            f"from transformers import {loader}, {kind}",
            f'model, processor = {loader}.from_pretrained("."), {kind}.from_pretrained(".")',
            'inputs = processor(images=[picture], text=["a cat", "a dog"], padding=True, return_tensors="pt")',
            "print(model(**inputs).logits_per_image.softmax(dim=-1))",
        ]
    elif kind and "Blip" not in kind:
        lines = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            'model, processor = AutoModelForImageTextToText.from_pretrained("."), AutoProcessor.from_pretrained(".")',
            'messages = [{"role": "user", "content": [{"type": "image", "url": "picture.png"}, '
            '{"type": "text", "text": "What is it?"}]}]',
            "inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, "
            'return_tensors="pt")',
            "print(processor.decode(model.generate(**inputs, max_new_tokens=32)[0, inputs.input_ids.shape[1] :]))",
        ]
    elif kind:
        lines = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            'model, processor = AutoModelForImageTextToText.from_pretrained("."), AutoProcessor.from_pretrained(".")',
            'messages = [{"role": "user", "content": "<image>\\nWhat is it?"}]',
            "text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
            'inputs = processor(images=[picture], text=[text], add_special_tokens=False, return_tensors="pt")',
            "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=32)))",
        ]
    else:
        lines = [
            "from lightning_internvl import load_pretrained",
            'model = load_pretrained(".")  # runs no code of the folder',
            "model(input_ids=..., attention_mask=..., pixel_values=...)  # placeholders of pictures: see model.image_token_id",
        ]
    stop = card.prepared.stop
    ending = "" if stop is None else f'\n\nAn answer ends with `{stop}`: `generate(..., stop_strings=["{stop}"], tokenizer=...)`.'
    if card.prepared.videos:
        ending = "\n\n`AutoProcessor` of this class needs torchvision, for videos; pictures alone do not." + ending
    code = "\n".join(lines)
    return f"## How to use\n\n```python\n{code}\n```{ending}"


def _training(card: Card) -> str:
    rows = []
    for name in trained_stages(card.run):
        stage = card.run["stages"][name]
        what = ", ".join(f"`{rule if isinstance(rule, str) else rule['name']}`" for rule in stage["module"]["train"])
        steps = card.steps.get(name, "not known")
        rows.append(f"| {name} | {stage['data']} | {steps} | {stage['batch_size']} | {what} |")
    table = "\n".join(["| stage | data | steps | batch | trained |", "| --- | --- | ---: | ---: | --- |", *rows])
    kinds = {stage["data"] for stage in (card.run["stages"][name] for name in trained_stages(card.run))}
    sources = {kind: (card.run["data"].get(kind) or {}).get("_target_", "").rpartition(".")[2] for kind in sorted(kinds)}
    data = "; ".join(f"{kind}: `{source}`" for kind, source in sources.items() if source)
    seed, last = card.run["seed"], card.manifest["stage"]
    data += "".join(f", {place}" for place in _places(card, kinds))
    return f"## Training\n\n{table}\n\nData: {data}. Seed {seed}. This folder holds the stage `{last}`."


def _places(card: Card, kinds: Iterable[str]) -> list[str]:
    """Names of the files of data, without what opens them."""
    found: list[str] = []
    for kind in sorted(kinds):
        node = card.run["data"].get(kind) or {}
        for given in (node.get("path"), node.get("urls"), node.get("root")):
            found += [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return [f"`{without_secrets(str(place))}`" for place in dict.fromkeys(found)]


def _bases(card: Card) -> str:
    rows = []
    for base in card.bases:
        files = [f"`{name}` {digest}" for name, digest in base["files"].items() if name.endswith(WEIGHTS)]
        held = "<br>".join(files) or "not on the machine that wrote this"
        rows.append(f"| {base['name']} | {base['licence']} | {held} |")
    table = "\n".join(["| base | licence that it states | sha256 of its weights |", "| --- | --- | --- |", *rows])
    return f"## Base\n\n{table}" if rows else ""


def _hashes(card: Card) -> str:
    rows = [f"| `{name}` | {digest} |" for name, digest in card.files.items()]
    table = "\n".join(["| file | sha256 |", "| --- | --- |", *rows])
    how = "`python export.py verify=FOLDER` of lightning_internvl computes hashes, logits and ids again (`proof/`)."
    return f"## Hashes\n\n{table}\n\n{how}"


def _metrics(card: Card) -> str:
    rows = [
        f"| {stage} | {name} | {format_number(value)} | {'' if chance is None else format_number(chance)} |"
        for stage, values in card.metrics.items()
        for name, value, chance in with_chance(dict(values))
    ]
    table = "\n".join(["| stage | metric | value | chance |", "| --- | --- | ---: | ---: |", *rows])
    return f"## Metrics\n\n{table}" if rows else ""


def _checks(card: Card) -> str:
    report = card.report
    prompts = f"logits of {len(report.logits)} prompts within {report.worst:.1e} of the largest"
    held = f"{report.adapters} layers with adapters, and {report.trained} tensors that were trained whole"
    if not report.adapters:
        held = f"{report.tensors} tensors found in the files with their values, {report.trained} of them trained"
    lines = [
        f"- {held}",
        f"- read back by {report.loader}, in float32: {prompts}",
        f"- processor: {report.processor}",
    ]
    if card.options.dtype != "float32":
        lines.insert(2, f"- {card.options.dtype} beside the trained weights: logits within {report.rounding:.1e} of the largest")
    lines += [f"- {report.elsewhere}"] if report.elsewhere else []
    lines += [f"- {line}" for line in report.rules]
    lines += [f"- not checked: {note}" for note in report.notes]
    return "## Checked when it was written\n\n" + "\n".join(lines)
