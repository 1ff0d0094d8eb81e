"""From a finished run to a folder that others load, complete and checked or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.weight_files import write_weights
from lightning_internvl.export import check
from lightning_internvl.export.card import Card, card_of
from lightning_internvl.export.engines import run_engine
from lightning_internvl.export.gguf_fields import gguf_faults
from lightning_internvl.export.layout_choice import OWN, add_placeholder_row, choose_layout
from lightning_internvl.export.official_code import copy_code, official_notes
from lightning_internvl.export.older_reader import check_elsewhere
from lightning_internvl.export.plain import make_plain, plain_config
from lightning_internvl.export.processor_files import config_fields
from lightning_internvl.export.processors import WrittenProcessor, write_processor
from lightning_internvl.export.proof import bases_of, hashes, write_probe, write_proof
from lightning_internvl.export.reader_rules import check_rules
from lightning_internvl.export.reload import check_reloaded
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.export.run_facts import adapted_weight, made_steps, part_sizes, run_config, trained_names
from lightning_internvl.files import atomic_folder, read_json, write_json
from lightning_internvl.inference.collators import OWN_PROCESSOR, measuring_processor
from lightning_internvl.inference.load_run import LoadedRun, run_of
from lightning_internvl.layers.quantization import quantized_layers
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import TRUSTED
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import model_roles


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
        ran = [run_engine(reader, draft, view) for reader in options.readers]
        report = ExportReport(
            key,
            rules=[f"{rule}; {said}" for rule, said in zip(rules, ran, strict=True)],
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


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the values that they have in a type, and keep them in float32; tables that no
    file holds stay as they are."""
    for tensor in own_tensors(model).values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


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
    write_proof(draft, bases, probe, known=files)
