"""A supervised step in the native layout: this trainer beside transformers' own class in a plain loop, same weights and batches.

python benchmarks/supervised_step.py                 # toy size and about 170 M parameters
python benchmarks/supervised_step.py sizes=toy steps=100
python benchmarks/supervised_step.py device=cuda     # both in bf16 autocast

Both start from one folder that transformers has written, train every parameter with fused AdamW and clip the norm. Half of the
text tokens carry a label, as in a conversation whose answers are as long as its questions. Prints one JSON line.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from alternating import against, arguments, plain_step, report
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.stages import SupervisedStage
from lightning_internvl.training.optim import adamw, cosine

IMAGE, LR = 5, 1e-4
SIZES: dict[str, dict[str, Any]] = {
    "toy": {
        "vision": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
        "text": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 344},
        "vocab": 2000, "image": 56, "rows": 16, "words": 48,
    },
    "170M": {
        "vision": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
        "text": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
        "vocab": 32000, "image": 224, "rows": 2, "words": 64,
    },
}  # fmt: skip


def native_folder(size: dict[str, Any], folder: Path) -> None:
    """Random weights as transformers writes them."""
    text = {
        "model_type": "qwen2",
        "vocab_size": size["vocab"],
        "num_key_value_heads": size["text"]["num_attention_heads"],
        "tie_word_embeddings": False,
    }
    vision = {"image_size": size["image"], "patch_size": 14, "attention_bias": True}
    config = InternVLConfig(
        vision_config=size["vision"] | vision,
        text_config=size["text"] | text | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)


def batch(size: dict[str, Any]) -> dict[str, Tensor]:
    """Rows of one picture and `words` tokens, the last half of which are to be learnt."""
    side, rows, words = size["image"], size["rows"], size["words"]
    tokens = (side // 14) ** 2 // 4
    text = torch.randint(10, size["vocab"], (rows, words))
    ids = torch.cat([torch.full((rows, tokens), IMAGE), text], dim=1)
    labels = ids.clone()
    labels[:, : tokens + words // 2] = -100
    pixels = torch.randn(rows, 3, side, side)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def measure(size: dict[str, Any], steps: int, device: str) -> dict[str, Any]:
    """Both sides over the same eight batches."""
    torch.manual_seed(0)
    batches = [{name: tensor.to(device) for name, tensor in batch(size).items()} for _ in range(8)]
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        native_folder(size, Path(folder, "native"))
        theirs = InternVLForConditionalGeneration.from_pretrained(Path(folder, "native")).train().to(device)
        model = load_pretrained(Path(folder, "native")).to(device)
        stage = SupervisedStage(
            model, name="supervised", run_dir=Path(folder), parts={}, train=["encoder", "middleware", "decoder"],
            optimizer=functools.partial(adamw, lr=LR), scheduler=functools.partial(cosine, min_ratio=1.0), max_steps=steps,
        )  # fmt: skip

        def their_loss(number: int) -> Tensor:
            with autocast():
                return theirs(**batches[number]).loss

        named = [one | {"keys": list(range(size["rows"]))} for one in batches]  # the throughput meter counts them
        found = against(stage, named, steps, plain_step(theirs, their_loss, LR), "transformers", device)
    stage.to(device)
    with torch.no_grad(), autocast():  # the same batch after the same steps
        losses = [float(loss) for loss in (their_loss(0), stage.losses(batches[0])["next_token"])]
    return {"parameters_M": round(sum(p.numel() for p in model.parameters()) / 1e6, 1), **found, "losses_at_the_end": losses}


def main() -> None:
    """Measure the sizes asked for."""
    options = arguments(sizes="toy,170M", steps=0, device="cpu")
    default = {"toy": 150, "170M": 20}
    results = {
        name: measure(SIZES[name], options["steps"] or default[name], options["device"]) for name in options["sizes"].split(",")
    }
    report("supervised_step", {"transformers": transformers.__version__}, {"sizes": results})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
