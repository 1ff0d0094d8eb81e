"""Adapters alone, as a folder that `peft.PeftModel.from_pretrained` puts on a model of
transformers.

The base is what the run started from (`init_from`) in transformers' layout. Tensors that the run
has trained whole are in the folder too, as PEFT's `modules_to_save`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_internvl.checkpoints.adapters import layout_of_checkpoint
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.name_rules import Config, RuleMatch, match_rules
from lightning_internvl.checkpoints.weight_files import WeightFiles, read_config, write_weights
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.distributed.scratch import scratch_folder
from lightning_internvl.export import check
from lightning_internvl.export.base_folder import is_hub_id
from lightning_internvl.export.layout_choice import OWN, choose_layout
from lightning_internvl.export.peft_model import Update, wrap_with_peft
from lightning_internvl.export.plain import dequantize, make_plain
from lightning_internvl.export.processors import write_processor
from lightning_internvl.export.reload import load_stock
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.export.run_facts import part_sizes, run_config, trained_names
from lightning_internvl.export.write import write_card
from lightning_internvl.files import atomic_folder
from lightning_internvl.hub import cached_folder, quiet
from lightning_internvl.inference.load_run import LoadedRun
from lightning_internvl.layers import peft
from lightning_internvl.layers.expert_layers import ExpertLinear
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import first_of


def export_adapter(opened: LoadedRun, to: Path, options: ExportOptions) -> ExportReport:
    """Write the adapters of a run, put them on their base with PEFT, compare, publish.

    Raises:
        ValueError: if the run has no adapters, or those of an earlier stage are in its weights
            already; if transformers has no class for the model, or a layer of its cannot carry an
            update; if a check fails. Nothing is left then.
    """
    model, view = opened.view.model.float().eval(), opened.view
    updates = adapter_updates(model)
    if not updates:
        advice = "train with peft=lora, or export the whole model with adapter=false"
        raise ValueError(f"{opened.folder} has no adapters; {advice}")
    check_earlier_stages(opened)
    dequantize(model)
    plain = copy.deepcopy(model)
    make_plain(plain)
    layout, config = choose_layout(plain, options.layout)
    if layout is None or not layout.NATIVE:
        key = OWN if layout is None else layout.key
        needs = f"a layout that transformers loads, and {key} is none"
        raise ValueError(f"adapter=true needs {needs}; use adapter=false")
    prompts, greedy = check.sample_prompts(view), check.greedy_options(view)
    reference = [check.model_outputs(model, prompt, greedy) for prompt in prompts]
    learnt = trained_names(opened, own_tensors(model))
    whole = [name for name in learnt if not peft.is_update(name)]
    with atomic_folder(to) as draft, scratch_folder("base") as base:
        write_base(base, layout, config, model, whole)
        stock = load_stock(base, config, plain)
        names = stock_names(stock, layout)
        own = stock_updates(updates, layout, config, plain, names)
        wrapped = wrap_with_peft(stock, own, stock_tensors(whole, layout, config, plain, names))
        with quiet():
            wrapped.save_pretrained(draft)
        start = run_config(opened)["init_from"]
        base_named = base_of(start)
        write_base_name(draft, base_named[0] if base_named[1] else start)
        processor = write_processor(draft, layout.key, config, view, start)
        fresh = load_stock(base, config, plain)
        with quiet():
            again = peft.peft_library().PeftModel.from_pretrained(fresh, draft).eval()
        found = [check.stock_outputs(again, plain, prompt, greedy) for prompt in prompts]
        logits, skipped = check.check_outputs(prompts, reference, found)
        report = ExportReport(
            layout.key,
            loader=f"peft.PeftModel on transformers.{type(stock).__name__}",
            tensors=0,
            trained=len(whole),
            logits=logits,
            rounding=0.0,
            processor=processor.verdict,
            skipped=skipped,
            adapters=len(updates),
            parts=part_sizes(own_tensors(plain), {name: own_tensors(model)[name] for name in learnt}),
            base=base_named,
            notes=[f"transformers does not open the base as it is; first:  {base_named[1]}"] if base_named[1] else [],
        )
        write_card(draft, opened, options, report, processor, None)
    return report


def write_base_name(folder: Path, init_from: str | None) -> None:
    """Say what the adapters belong to: what the run started from, or what was made of it for
    transformers."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": init_from}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def base_of(start: str | None) -> tuple[str, str | None]:
    """What the adapters are put on, as a name for people elsewhere, and the line of Python that
    writes it first where what the run started from is in a layout that transformers does not open."""
    folder, named = Path(str(start)), str(start) if start and is_hub_id(str(start)) else None
    if named:
        with contextlib.suppress(OSError):
            folder = Path(cached_folder(named))
    try:
        layout = layout_of_checkpoint(read_config(folder), WeightFiles(folder).shapes)
    except (OSError, ValueError):  # a run of ours, or not on this machine any more
        layout = None
    if layout is None or layout.NATIVE:
        return named or "BASE_IN_THE_SAME_LAYOUT", None
    return "base", f'load_pretrained("{named or "BASE"}").save_pretrained("base")'


def adapter_updates(model: nn.Module) -> dict[str, Update]:
    """The adapters of a model by the name of their layer."""
    found = {}
    for name, layer in peft.adapted_layers(model):
        a, b = layer.lora_A[peft.NAME].weight.detach(), layer.lora_B[peft.NAME].weight.detach()
        magnitudes = layer.lora_magnitude_vector
        own = magnitudes[peft.NAME].weight.detach() if peft.NAME in magnitudes else None
        rank = layer.rank if isinstance(layer, ExpertLinear) else len(a)
        found[name] = Update(a, b, layer.scaling[peft.NAME] * rank, own)
    return found


def check_earlier_stages(opened: LoadedRun) -> None:
    """See that no earlier stage has changed the weights under the adapters by adapters of its own.

    Raises:
        ValueError: naming the stage.
    """
    own, run = opened.settings, RunSettings.of(run_config(opened))
    names = [stage.name for stage in run.trained]
    for stage in run.trained[: names.index(own.name)]:
        if other := peft.differing(stage.parts.peft, own.parts.peft):
            raise ValueError(
                f"the adapters of stage {stage.name} on {', '.join(other)} were added to the weights before this stage, so the "
                "later ones alone do not fit the run's base; use adapter=false"
            )


def _stage(opened: LoadedRun) -> str:
    return opened.folder.resolve().name


def write_base(folder: Path, layout: Layout, config: Config, model: nn.Module, whole: Iterable[str]) -> None:
    """The base in its layout, without the tensors that the adapter folder brings."""
    brought = set(whole)
    tensors = {n: t for n, t in own_tensors(model).items() if not peft.is_update(n)}
    tensors = {n: torch.zeros_like(t) if n in brought else t for n, t in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(folder, layout.official_tensors(config, tensors), 5 * 10**9)


def stock_names(stock: nn.Module, layout: Layout) -> dict[str, str]:
    """Where the tensors of a layout are in a model of transformers, by its own names."""
    names = [name for name, _ in stock.named_parameters(remove_duplicate=False)]
    return {str(layout.canonical(name)): name for name in names}


def stock_updates(
    updates: Mapping[str, Update],
    layout: Layout,
    config: Config,
    plain: nn.Module,
    names: Mapping[str, str],
) -> dict[str, Update]:
    """Adapters by the layers of transformers' model: renamed, or cut up for several layers.

    Raises:
        ValueError: for a layer whose rows are not simply rows there.
    """
    matches, _ = match_rules(layout.rules(config), own_tensors(plain))
    by_name = {name: match for match in matches for name in match.ours}
    found: dict[str, Update] = {}
    for layer, update in updates.items():
        if update.stacked:
            found[stock_experts(layer, names.values())] = update
            continue
        for name, part in split_update(layer, update, by_name[f"{layer}.weight"]).items():
            found[names[name].removesuffix(".weight")] = part
    return found


def stock_experts(name: str, stock: Iterable[str]) -> str:
    """The parameter of transformers' model that is a projection of our experts, which stands in a
    block of the same number: `layers.N.mlp.experts.KIND`.

    Raises:
        ValueError: if there is none.
    """
    block = name.partition(".layers.")[2]
    found = [there for there in stock if there.endswith(f".layers.{block}")]
    if len(found) != 1:
        raise ValueError(f"the adapter of {name} has no place in transformers' model, which holds its experts otherwise")
    return found[0]


def split_update(layer: str, update: Update, group: RuleMatch) -> dict[str, Update]:
    """An adapter of one of our layers as those of the official weights that its weight becomes.

    Raises:
        ValueError: if the rule does more than rename a weight or cut it into blocks of rows.
    """
    if len(group.ours) > 1:
        shared = f"{first_of(group.official, 20)} is made of several layers"
        raise ValueError(f"the adapter of {layer} has no place of its own: {shared}")
    own = group.ours[0]
    rows = group.write({own: update.b})
    whole = group.write({own: update.b @ update.a})
    sizes: Mapping[str, Tensor | None] = dict.fromkeys(rows)
    if update.magnitude is not None:
        sizes = group.write({own: update.magnitude})
    for name, b in rows.items():
        if b.ndim != 2 or not torch.allclose(b @ update.a, whole[name], atol=1e-6):
            official = first_of(group.official, 20)
            raise ValueError(f"the adapter of {layer} cannot be written as one of {official}")
    return {name: Update(update.a, b, update.alpha, sizes[name]) for name, b in rows.items()}


def stock_tensors(
    whole: Iterable[str], layout: Layout, config: Config, plain: nn.Module, names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors that were trained whole, by their names in transformers' model."""
    own, wanted = own_tensors(plain), set(whole)
    matches, _ = match_rules(layout.rules(config), own)
    found: dict[str, Tensor] = {}
    for match in matches:
        if wanted.intersection(match.ours) and ".experts." in match.ours[0]:
            found |= {stock_experts(name, names.values()): own[name] for name in match.ours}
        elif wanted.intersection(match.ours):
            found |= {names[name]: tensor for name, tensor in match.write(own).items()}
    return found
