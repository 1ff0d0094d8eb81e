"""A LoRA step in the native layout: this trainer beside transformers and peft in a plain loop, same weights, updates and batches.

python benchmarks/lora_step.py                       # toy size and about 170 M parameters, on a CPU
python benchmarks/lora_step.py sizes=toy steps=100
python benchmarks/lora_step.py device=cuda           # both in bf16 autocast

Both start from one folder that transformers has written. The connector trains whole, every linear layer of the language model's
blocks has an update of rank 16, the rest is frozen. Both hold their updates in the layers of peft; theirs are put there by
`get_peft_model`, with the connector under `modules_to_save`. Fused AdamW, the norm clipped; no gradient checkpointing, for which
alone the usual loops ask for `enable_input_require_grads`. Prints one JSON line; `first_losses` are those before any step, and
`losses_at_the_end` those of the same batch after the same steps.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from alternating import against, arguments, plain_step, report
from supervised_step import LR, SIZES, batch, native_folder
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.layers.peft import add_adapters
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages import SupervisedStage
from lightning_internvl.training.optim import adamw, cosine

OURS = {"decoder": {"method": "lora", "rank": 16, "alpha": 32, "dropout": 0.0, "targets": "blocks"}}
THEIRS = {"r": 16, "lora_alpha": 32, "target_modules": r".*language_model\.layers\..*_proj"}


def their_model(folder: Path) -> nn.Module:
    """As people write it."""
    model = InternVLForConditionalGeneration.from_pretrained(folder)
    return peft.get_peft_model(model, peft.LoraConfig(**THEIRS, modules_to_save=["multi_modal_projector"])).train()


def our_model(folder: Path, theirs: nn.Module) -> VLM:
    """The same model with the same fresh updates."""
    model = load_pretrained(folder)
    add_adapters(model, OURS)
    fresh = {name.rpartition("language_model.")[2]: p for name, p in theirs.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in model.decoder.lm.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(fresh.pop(name))
    assert not fresh, f"layers that only peft adapts: {list(fresh)}"
    return model


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measure(size: dict[str, Any], steps: int, device: str) -> dict[str, Any]:
    """Both sides over the same eight batches."""
    torch.manual_seed(0)
    batches = [{name: tensor.to(device) for name, tensor in batch(size).items()} for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        native_folder(size, Path(folder, "native"))
        theirs = their_model(Path(folder, "native")).to(device)
        model = our_model(Path(folder, "native"), theirs).to(device)
        stage = SupervisedStage(
            model, name="supervised", run_dir=Path(folder), parts={"peft": OURS}, train=["middleware", "decoder"],
            optimizer=functools.partial(adamw, lr=LR), scheduler=functools.partial(cosine, min_ratio=1.0), max_steps=steps,
        )  # fmt: skip
        stage.plan.apply(model, 0)
        assert trained(theirs) == trained(model)
        autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

        def their_loss(number: int) -> Tensor:
            with autocast():
                return theirs(**batches[number]).loss

        @torch.no_grad()
        def losses() -> list[float]:
            with autocast():
                return [float(their_loss(0)), float(stage.to(device).losses(batches[0])["next_token"])]

        first = losses()
        named = [one | {"keys": list(range(size["rows"]))} for one in batches]  # the throughput meter counts them
        found = against(stage, named, steps, plain_step(theirs, their_loss, LR), "transformers_peft", device)
        sizes = {"parameters_M": sum(p.numel() for p in model.parameters()) / 1e6, "trained_M": trained(model) / 1e6}
        return {
            **{name: round(number, 2) for name, number in sizes.items()},
            **found,
            "first_losses": first,
            "losses_at_the_end": losses(),
        }


def main() -> None:
    """Measure the sizes asked for."""
    options = arguments(sizes="toy,170M", steps=0, device="cpu")
    default = {"toy": 150, "170M": 20}
    results = {
        name: measure(SIZES[name], options["steps"] or default[name], options["device"]) for name in options["sizes"].split(",")
    }
    report("lora_step", {"transformers": transformers.__version__, "peft": peft.__version__}, {"sizes": results})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
