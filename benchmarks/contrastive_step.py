"""A contrastive step: this trainer beside open_clip's model and loss in a plain loop, with towers and text encoders of one size.

pip install --no-deps open_clip_torch torchvision ftfy regex wcwidth timm
python benchmarks/contrastive_step.py                # toy size and about 60 M parameters
python benchmarks/contrastive_step.py sizes=toy parts=clip steps=100
python benchmarks/contrastive_step.py device=cuda    # both in bf16 autocast, similarities in float32

`clip` is the architecture of open_clip's model, part by part; `internvl` is InternViT in the style of the 300M tower and a LLaMA
of equal width, depth and heads, whose MLPs have equally many parameters (three matrices beside two). Texts have 77 tokens. Prints
one JSON line.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision_operators  # noqa: F401 - before anything that imports torchvision

# isort: split
import torch
from alternating import against, arguments, plain_step, report
from torch import Tensor

from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC
from lightning_internvl.stages import ContrastiveStage
from lightning_internvl.training.optim import adamw, cosine

LENGTH, LR = 77, 1e-4
SIZES: dict[str, dict[str, int]] = {
    "toy": {"dim": 128, "depth": 3, "image": 96, "patch": 16, "vocab": 2000, "batch": 64},
    "60M": {"dim": 384, "depth": 12, "image": 224, "patch": 16, "vocab": 49408, "batch": 16},
}  # fmt: skip
HEAD = 64


def theirs(size: dict[str, int]) -> tuple[Any, Any]:
    """open_clip's model and loss."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=size["depth"], width=size["dim"], head_width=HEAD, patch_size=size["patch"], image_size=size["image"]
    )
    text = CLIPTextCfg(
        context_length=LENGTH,
        vocab_size=size["vocab"],
        width=size["dim"],
        heads=size["dim"] // HEAD,
        layers=size["depth"],
    )
    return CLIP(size["dim"], vision, text).train(), ClipLoss()


def clip(size: dict[str, int]) -> VLM:
    """The architecture of open_clip's model."""
    sizes = {"dim": size["dim"], "depth": size["depth"], "heads": size["dim"] // HEAD, "mlp_dim": 4 * size["dim"], "act": "gelu"}
    encoder = CLIPViT(image_size=size["image"], patch_size=size["patch"], **sizes)
    middleware = CLIPText(
        encoder_dim=size["dim"], vocab_size=size["vocab"], positions=LENGTH, embed_dim=size["dim"], pooling="argmax", **sizes
    )
    return VLM(encoder, middleware, objectives={"itc": ITC()})


def internvl(size: dict[str, int]) -> VLM:
    """InternViT in the style of the 300M tower, and a LLaMA as text encoder."""
    sizes = {"dim": size["dim"], "depth": size["depth"], "heads": size["dim"] // HEAD}
    encoder = InternViT(
        image_size=size["image"], patch_size=size["patch"], mlp_dim=4 * size["dim"], norm="layer_norm", qk_norm=False,
        qkv_bias=True, **sizes,
    )  # fmt: skip
    middleware = QLLaMA(
        encoder_dim=size["dim"], vocab_size=size["vocab"], mlp_dim=-(-8 * size["dim"] // 3 // 8) * 8, num_queries=0,
        embed_dim=size["dim"], pool_heads=size["dim"] // HEAD, **sizes,
    )  # fmt: skip
    return VLM(encoder, middleware, objectives={"itc": ITC()})


def batch(size: dict[str, int]) -> dict[str, Tensor]:
    """Pictures and texts; open_clip pools at the largest id, which stands at the end."""
    ids = torch.randint(1, size["vocab"] - 1, (size["batch"], LENGTH))
    ids[:, -1] = size["vocab"] - 1
    pixels = torch.randn(size["batch"], 3, size["image"], size["image"])
    return {"pixel_values": pixels, "itc_ids": ids, "itc_mask": torch.ones_like(ids)}


def measure(size: dict[str, int], make: Callable[[dict[str, int]], VLM], steps: int, device: str) -> dict[str, Any]:
    """Both sides over the same eight batches."""
    torch.manual_seed(0)
    batches = [{name: tensor.to(device) for name, tensor in batch(size).items()} for _ in range(8)]
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
    (other, loss), model = theirs(size), make(size).to(device)
    other.to(device)

    def their_loss(number: int) -> Tensor:
        with autocast():
            image, text, scale = other(batches[number]["pixel_values"], batches[number]["itc_ids"])
        return loss(image.float(), text.float(), scale)

    with tempfile.TemporaryDirectory() as folder:
        stage = ContrastiveStage(
            model, name="contrastive", run_dir=Path(folder), parts={}, train=["encoder", "middleware", "objectives"],
            optimizer=functools.partial(adamw, lr=LR), scheduler=functools.partial(cosine, min_ratio=1.0), max_steps=steps,
        )  # fmt: skip
        named = [one | {"keys": list(range(size["batch"]))} for one in batches]  # the throughput meter counts them
        found = against(stage, named, steps, plain_step(other, their_loss, LR), "open_clip", device)
    millions = {
        name: round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for name, m in {"ours": model, "theirs": other}.items()
    }
    return {"parameters_M": millions, **found}


def main() -> None:
    """Measure the sizes asked for."""
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("torchvision") is None:
        sys.exit(
            "this benchmark compares with open_clip: pip install --no-deps open_clip_torch torchvision ftfy regex wcwidth timm"
        )
    options = arguments(sizes="toy,60M", parts="clip,internvl", steps=0, device="cpu")
    default, makers = {"toy": 150, "60M": 20}, {"clip": clip, "internvl": internvl}
    results = {
        size: {
            part: measure(SIZES[size], makers[part], options["steps"] or default[size], options["device"])
            for part in options["parts"].split(",")
        }
        for size in options["sizes"].split(",")
    }
    from open_clip import __version__

    report("contrastive_step", {"open_clip": __version__}, {"sizes": results})


if __name__ == "__main__":
    main()
