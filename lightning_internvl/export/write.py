"""From a finished run to a folder that others load, complete and checked or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.adapters import all_layouts, layout_of_model
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.weight_files import write_weights
from lightning_internvl.choices import PARTS
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import PartsSettings
from lightning_internvl.config.targets import locate, with_current_targets
from lightning_internvl.config.trust import is_trusted
from lightning_internvl.export import check
from lightning_internvl.export.card import Card, card_of
from lightning_internvl.export.gguf_fields import gguf_faults
from lightning_internvl.export.official_code import copy_code, official_notes
from lightning_internvl.export.older_reader import check_elsewhere
from lightning_internvl.export.plain import make_plain, plain_config
from lightning_internvl.export.processor_files import config_fields
from lightning_internvl.export.processors import WrittenProcessor, write_processor
from lightning_internvl.export.proof import bases_of, hashes, write_probe, write_proof
from lightning_internvl.export.reader_rules import check_rules
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.files import RUN_CONFIG, atomic_folder, read_json, write_json
from lightning_internvl.hub import quiet
from lightning_internvl.inference.collators import OWN_PROCESSOR, measuring_processor
from lightning_internvl.inference.load_run import LoadedRun, run_of
from lightning_internvl.layers.peft import is_update
from lightning_internvl.layers.quantization import quantized_layers
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import check_choice
from lightning_internvl.model.compose import TRUSTED
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import model_roles, roles_of

OWN = "handoff"  # the layout of this project, for models that no other one holds


def export(opened: LoadedRun, to: Path, options: ExportOptions) -> ExportReport:
    """Write, read back, compare; then let the folder appear.

    Raises:
        ValueError: for a layout that cannot hold the model, if something stands at `to`, or if a
            check fails; nothing is left.
    """
    model, view = opened.view.model.float().eval(), opened.view
    choose_layout(model, options.layout, final=False)
    prompts, greedy = check.sample_prompts(view), check.greedy_options(view)
    before = [check.model_outputs(model, prompt, greedy)[0] for prompt in prompts]
    held = own_tensors(model)
    own_names = trained_names(opened, held)
    trained = {adapted_weight(name) for name in own_names}
    learnt = {name: held[name] for name in own_names}
    quantized = bool(quantized_layers(model))
    make_plain(model)
    layout, config = choose_layout(model, options.layout)
    if layout is not None and layout.NATIVE and add_placeholder_row(model):
        layout, config = choose_layout(model, options.layout)
    if options.gguf and (faults := gguf_faults(OWN if layout is None else layout.key, config)):
        raise ValueError(f"this model cannot be a GGUF file: {'; '.join(faults)}")
    if options.transformers4 and (layout is None or not layout.NATIVE):
        key = OWN if layout is None else layout.key
        raise ValueError(f"check=[transformers4] needs a layout that transformers loads, and {key} is none; leave it out")
    if layout is None and options.dtype != "float32":
        fault = f"not known to layout={OWN}, which keeps the types of training"
        raise ValueError(f"dtype={options.dtype} is {fault}; leave it out")
    round_weights(model, getattr(torch, options.dtype))
    reference = [check.model_outputs(model, prompt, greedy) for prompt in prompts]
    # What quantisation changed is reported only; what merging and rounding changed must be small.
    limit = float("inf") if quantized else check.ROUNDING[options.dtype]
    rounding = 0.0
    for logits, (rounded, _) in zip(before, reference, strict=True):
        what = "logits of the weights that were trained and of those that are written"
        own = rounded[..., : logits.shape[-1]]  # without the row of a placeholder
        rounding = max(rounding, check.check_close(what, logits, own, limit))
    with atomic_folder(to) as draft:
        notes = write_model(draft, opened, layout, config, options)
        key = OWN if layout is None else layout.key
        processor = write_processor(draft, key, config, view, run_config(opened)["init_from"])
        node = measuring_processor(opened.settings)
        if not node["_target_"].startswith(TRUSTED):
            write_json(draft / OWN_PROCESSOR, node)
        tensors = check.check_tensors(draft, layout, config, model)
        differences, skipped, loader = check_reloaded(draft, layout, config, view, prompts, reference, greedy)
        elsewhere = None
        if options.transformers4 and layout is not None:
            elsewhere = check_elsewhere(options.transformers4, draft, config, view, prompts, reference, greedy)
        rules = check_rules(draft, key, options.readers)
        report = ExportReport(
            key,
            rules=rules,
            elsewhere=elsewhere,
            loader=loader,
            tensors=tensors,
            trained=len(trained & own_tensors(model).keys()),
            logits=differences,
            rounding=rounding,
            processor=processor.verdict,
            skipped=skipped,
            writes=view.chats is not None,
            parts=part_sizes(own_tensors(model), learnt),
            notes=notes,
        )
        if not options.gguf:  # the folder goes away again
            probe = write_probe(draft, model, prompts, greedy)
            write_card(draft, opened, options, report, processor, probe)
    return report


def choose_layout(model: VLM, key: str | None, *, final: bool = True) -> tuple[Layout | None, Config]:
    """The layout that is written, None for our own, and its `config.json`.

    Args:
        final: False before adapters have been merged, when only the name can be judged.

    Raises:
        ValueError: if the one asked for is unknown or cannot hold the model; with those that can.
    """
    folders = [name for name, layout in all_layouts().items() if not layout.SINGLE_FILE]
    if key is not None:
        check_choice("layout", key, (*folders, OWN))
    if key == OWN or not final:
        return None, {}
    try:
        return layout_of_model(model, key)
    except ValueError as error:
        if key is None:
            return None, {}
        able = [name for name in folders if _can_hold(model, name)]
        choices = ", ".join((*able, OWN))
        raise ValueError(f"layout={key} cannot hold this model; valid choices: {choices}") from error


def add_placeholder_row(model: VLM) -> bool:
    """Give the language model a row for the placeholder of pictures where it is a word without one,
    which is never read here; transformers reads it before the picture takes its place. Returns
    whether it did."""
    token = model.image_token_id or 0
    if model.decoder is None or token < model.decoder.vocab_size:
        return False
    model.decoder.grow(token + 1)
    return True


def _can_hold(model: VLM, key: str) -> bool:
    try:
        layout, config = layout_of_model(model, key)
        layout.official_tensors(config, own_tensors(model))
    except ValueError:
        return False
    return True


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the values that they have in a type, and keep them in float32; tables that no
    file holds stay as they are."""
    for tensor in own_tensors(model).values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def trained_names(opened: LoadedRun, names: Iterable[str]) -> list[str]:
    """The tensors that some stage of the run has trained."""
    stages = RunSettings.of(run_config(opened)).trained
    plans = []
    for stage in stages:
        roles = roles_of(_part_classes(stage.parts))
        plans.append(FreezePlan(stage.module["train"], stage.parts.peft, roles))
    return [name for name in names if any(plan.ever_trains(name) for plan in plans)]


def part_sizes(held: Mapping[str, Tensor], learnt: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """How many numbers each part has, and how many were trained, its adapters as they were before
    they were added."""

    def count(part: str, tensors: Mapping[str, Tensor]) -> int:
        return sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{part}."))

    return {part: (count(part, held), count(part, learnt)) for part in PARTS if count(part, held)}


def made_steps(opened: LoadedRun) -> dict[str, int]:
    """The steps that the finished stages of a run made, as their hand-offs say."""
    folders = (run_of(opened.folder) / "handoff").glob(f"*/{handoff.MANIFEST}")
    manifests = [read_json(path) for path in folders] + [read_json(opened.folder / handoff.MANIFEST)]
    return {manifest["stage"]: manifest["step"] for manifest in manifests}


def _part_classes(parts: PartsSettings) -> dict[str, type]:
    """The classes of a stage's parts; `object` for one that is not trusted, which is not
    imported."""
    nodes = {part: getattr(parts, part) for part in PARTS}
    targets = {part: node["_target_"] for part, node in nodes.items() if node}
    known = {part: target.startswith(TRUSTED) or is_trusted(target) for part, target in targets.items()}
    return {part: locate(target) if known[part] else object for part, target in targets.items()}


def adapted_weight(name: str) -> str:
    """The weight to which the tensor of an adapter is added; any other name as it is."""
    return f"{name.partition('.lora_')[0]}.weight" if is_update(name) else name


def run_config(opened: LoadedRun) -> dict[str, Any]:
    """The resolved configuration of the run."""
    text = (run_of(opened.folder) / RUN_CONFIG).read_text(encoding="utf-8")
    return with_current_targets(yaml.safe_load(text))


def write_model(
    draft: Path,
    opened: LoadedRun,
    layout: Layout | None,
    config: Config,
    options: ExportOptions,
) -> list[str]:
    """Weights and `config.json`; what is to be told of other readers."""
    model, dtype = opened.view.model, getattr(torch, options.dtype)
    if layout is None:
        manifest = read_json(opened.folder / handoff.MANIFEST)
        plan = FreezePlan(opened.settings.module["train"], roles=model_roles(model))
        parts = plain_config(manifest["config"])
        handoff.save(model, draft, stage=manifest["stage"], step=manifest["step"], config=parts, plan=plan)
        if (opened.folder / handoff.TOKENIZERS).is_dir():
            shutil.copytree(opened.folder / handoff.TOKENIZERS, draft / handoff.TOKENIZERS)
        return []
    tensors = own_tensors(model)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    # transformers before 4.56, and the code of the releases, know the older name
    noted = config | {"torch_dtype": options.dtype} | ({"dtype": options.dtype} if layout.NATIVE else {})
    noted |= config_fields(config, opened.view.chats)
    official = layout.key == "internvl_chat"
    if official:
        noted |= copy_code(draft, run_config(opened)["init_from"])
    (draft / "config.json").write_text(json.dumps(noted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_weights(draft, layout.written_tensors(config, tensors), options.max_shard_bytes)
    return official_notes(noted) if official else []


def check_reloaded(
    draft: Path,
    layout: Layout | None,
    config: Config,
    view: Any,
    prompts: list[Any],
    reference: list[Any],
    options: Mapping[str, Any],
) -> tuple[dict[str, float], list[str], str]:
    """Differences by prompt, the prompts that the other class does not take, and its name.

    Args:
        options: of `generate`.

    Raises:
        ValueError: for logits that differ, or other greedy ids.
    """
    model = view.model
    if layout is not None and layout.NATIVE:
        stock = load_stock(draft, config, model)
        found = [check.stock_outputs(stock, model, prompt, options) for prompt in prompts]
        loader = f"transformers.{type(stock).__name__}"
    else:
        again = load_pretrained(draft, dtype=torch.float32)
        again.image_token_id, again.image_placeholders = model.image_token_id, model.image_placeholders
        found = [check.model_outputs(again, prompt, options) for prompt in prompts]
        loader = "lightning_internvl.load_pretrained (transformers has no class for it)"
    return *check.check_outputs(prompts, reference, found), loader


def load_stock(folder: Path, config: Config, model: VLM) -> nn.Module:
    """The class of transformers for a folder, in float32, after it has taken every tensor.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape.
    """
    auto: Any = AutoModelForImageTextToText
    if model.decoder is None:
        auto = getattr(transformers, config["architectures"][0])
    loading = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    with quiet():
        stock, report = auto.from_pretrained(folder, **loading)
    check.check_loading(report, tied=getattr(model.decoder, "tied", False))
    return stock.eval()


def write_card(
    draft: Path,
    opened: LoadedRun,
    options: ExportOptions,
    report: ExportReport,
    prepared: WrittenProcessor,
    probe: Config | None,
) -> None:
    """The card, and the proof of what it says (see `proof.write_proof`)."""
    metrics = read_json(run_of(opened.folder) / "metrics.json", {})
    manifest = read_json(opened.folder / handoff.MANIFEST)
    run = run_config(opened)
    bases = bases_of(run)
    files = hashes(draft, sorted(draft.glob("*.safetensors")))
    card = Card(run, manifest, made_steps(opened), metrics, options, report, prepared, bases, files)
    (draft / "README.md").write_text(card_of(card), encoding="utf-8")
    write_proof(draft, bases, probe)
