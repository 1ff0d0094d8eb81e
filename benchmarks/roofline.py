"""What a training step should take on a GPU, operator by operator, found without one.

python benchmarks/roofline.py                            # about 0.8 B, a packed row of 16k tokens with 48 tiles, on an H100
python benchmarks/roofline.py compile=true activation_checkpointing=selective weights=bfloat16

The trainer's own code runs on tensors without values that say they are on a GPU, forward and backward, in bf16-mixed. An operator
takes the longest of: its FLOPs at the stated peak, the bytes that it reads and writes at the stated bandwidth, and the start of a
kernel. Peaks are what good kernels reach, not what is printed on the box; MFU is of `rated_tflops`, which is. It counts what the
model computes, not what is computed again, neither by recomputation nor inside of attention's backward pass (a fifth of it).

`weights=bfloat16`: blocks hold weights of that type beside float32 masters, as FSDP2 does, instead of a cast per use.
`attention=pieces`: a kernel for each sample of a row, instead of one for all.
`compile=true` assumes how compilers fuse what is neither product nor attention (see `roofline_fusion.py`).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.alternating import arguments
from benchmarks.roofline_fusion import PRODUCTS, Op, attends, found_again, fused
from benchmarks.roofline_trace import Autocast, Gpu, Trace, claimed
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken
from lightning_internvl.plan import kernels
from lightning_internvl.stages import SupervisedStage
from lightning_internvl.training import activation_checkpointing

IMAGE = 5  # id of the placeholder
SIZES: dict[str, dict[str, Any]] = {
    "0.8B": {
        "tower": {"image_size": 448, "patch_size": 14, "dim": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
        "text": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        "vocab": 151655, "sample": 1365,
    },
    "tiny": {
        "tower": {"image_size": 56, "patch_size": 14, "dim": 64, "depth": 2, "heads": 2, "mlp_dim": 128},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "vocab": 100, "sample": 32,
    },
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "size": "0.8B", "tokens": 16384, "tiles": 48, "learnt": 0, "drop_path": 0.1, "weights": "float32",
    "activation_checkpointing": "none", "compile": "false", "attention": "varlen", "peak_tflops": 800.0,
    "attention_tflops": 350.0, "rated_tflops": 989.0, "bandwidth": 3.0, "bus": 25.0, "memory": 80.0, "kernel_us": 2.5,
}  # fmt: skip


def build(size: dict[str, Any], options: dict[str, Any]) -> SupervisedStage:
    """The stage: InternViT, pixel shuffle and MLP, a Qwen2; all of it trains."""
    encoder = InternViT(qk_norm=False, qkv_bias=True, norm="layer_norm", drop_path=options["drop_path"], **size["tower"])
    text = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": size["vocab"], "tie_word_embeddings": True}
    decoder = HFCausalLM(config=text | size["text"])
    middleware = PixelShuffleMLP(encoder_dim=encoder.dim, decoder_dim=decoder.dim)
    model = VLM(encoder, middleware, decoder, objectives={"next_token": NextToken()}, image_token_id=IMAGE)
    stage = SupervisedStage(
        model, name="supervised", run_dir=Path(), parts={}, train=["encoder", "middleware", "decoder"],
        optimizer=lambda *_: None, scheduler=lambda *_: None, max_steps=1,
    ).train()  # fmt: skip
    stage.plan.apply(model, 0)
    return stage


def blocks_of(model: VLM) -> list[nn.Module]:
    """What is compiled, computed again and divided, one by one."""
    return [block for part in (model.encoder, model.middleware, model.decoder) for block in part.sharding_units()]


def lower_weights(blocks: list[nn.Module]) -> None:
    """Weights of blocks in bfloat16, as they are gathered from float32 masters."""
    for module in (module for block in blocks for module in block.modules()):
        for name, weight in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(weight.detach().to(torch.bfloat16)))


def batch_of(size: dict[str, Any], tokens: int, tiles: int) -> dict[str, Any]:
    """One packed row."""
    pieces = [size["sample"]] * (tokens // size["sample"])
    pieces += [rest] if (rest := tokens - sum(pieces)) else []
    side = size["tower"]["image_size"]
    ids = torch.empty(1, tokens, dtype=torch.int64)
    pixels = torch.empty(tiles, 3, side, side)
    named = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": torch.empty_like(ids)}
    return {**named, "pixel_values": pixels, "segments": [pieces]}


def trace(options: dict[str, Any]) -> tuple[Trace, int, int, dict[int, int], int]:
    """A step: what ran, numbers of all weights and of those in bfloat16, bytes kept for backward by storage, of the batch."""
    size, low = SIZES[options["size"]], options["weights"] == "bfloat16"
    recompute = options["activation_checkpointing"]
    tracing = Trace(options["learnt"] or options["tokens"] // 8, options["compile"] == "true")
    with claimed(options["attention"]), Gpu(allow_non_fake_inputs=True), torch.device("cuda"), kernels.Unfilled():
        stage = build(size, options)
        blocks = blocks_of(stage.model)
        if low:
            lower_weights(blocks)
        activation_checkpointing.recompute_blocks(
            stage.model, dict.fromkeys(("encoder", "decoder"), None if recompute == "none" else recompute)
        )
        for block in blocks:
            block.register_forward_pre_hook(tracing.enter_block)
            block.register_forward_hook(tracing.leave_block, always_call=True)
        if tracing.compiles:
            objective = stage.model.objectives["next_token"]
            objective.judge = tracing.apart(objective.judge)
        batch = batch_of(size, options["tokens"], options["tiles"])
        # pictures cross as bytes
        bytes_in = sum(x.numel() if x.is_floating_point() else x.nbytes for x in batch.values() if isinstance(x, Tensor))
        with tracing, Autocast(torch.bfloat16):
            with torch.autocast("cuda", torch.bfloat16):
                loss = stage.weighted_sum(stage.losses(batch))
            tracing.phase, tracing.inside = "backward", False
            kept = tracing.alive()
            # `backward` itself would leave `Autocast` out, which blocks that are computed again need
            torch.autograd.graph._engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            tracing.gradients = set(tracing.alive())
    weights = sum(p.numel() for p in stage.parameters())
    return tracing, weights, sum(p.numel() for block in blocks for p in block.parameters()) if low else 0, kept, bytes_in


def beside(weights: int, low: int) -> list[Op]:
    """What a step does beside forward and backward pass, by bytes: the norm reads gradients; AdamW reads four tensors and writes
    them, gradients clipped. Weights of bfloat16, which FSDP2 divides, are gathered twice, their gradients become float32, and
    are clipped before, in a pass of their own."""
    found = [Op("norm and AdamW", "optimizer", 0.0, {0: weights * (4 + 16)}, {0: weights * 16})]
    if low:
        found.append(Op("gather and reduce", "optimizer", 0.0, {0: low * (2 * 4 + 2)}, {0: low * (2 * 2 + 4)}))
        found.append(Op("clip", "optimizer", 0.0, {0: weights * 4}, {}))
    return found


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Time of a step, its share of the peak, its memory, and the operators by time."""
    tracing, weights, low, kept, bytes_in = trace(options)
    ops = tracing.ops
    if options["compile"] == "true":
        ops, dropped = found_again(ops)
        kept = {key: size for key, size in kept.items() if key not in dropped}
        ops = list(fused(ops, tracing.gradients))
    ops = [*ops, *beside(weights, low)]
    held = sum(kept.values())
    table: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0, 0.0, 0.0])
    for op in ops:
        size = sum(op.reads.values()) + sum(op.writes.values())
        tera = options["attention_tflops" if attends(op.name) else "peak_tflops"]
        ms = max(op.flops / tera / 1e9, size / options["bandwidth"] / 1e9, options["kernel_us"] / 1e3)
        row = table[op.phase, op.name]
        for place, value in enumerate((ms, 1, op.flops / 1e12, size / 1e9)):
            row[place] += value
    total = sum(row[0] for row in table.values()) + bytes_in / options["bus"] / 1e6
    # of its five products attention's backward pass computes one again
    work = (op.flops * (0.8 if attends(op.name) and op.phase == "backward" else 1.0) for op in ops if op.phase != "recompute")
    model = sum(work) / 1e12
    elementwise = sum(row[0] for (phase, name), row in table.items() if name not in PRODUCTS and not attends(name))
    memory = (weights * 16 + low * 2 + (0 if low else weights * 2) + held) / 2**30
    return {
        "ms": round(total, 1),
        "mfu": round(model / options["rated_tflops"] / total * 1e3, 3),
        "share_of_stated_peak": round(model / options["peak_tflops"] / total * 1e3, 3),
        "elementwise_ms": round(elementwise, 1),
        "parameters_M": round(weights / 1e6, 1),
        "kept_GiB": round(held / 2**30, 4),
        "memory_GiB": round(memory, 1),
        "fits": memory < options["memory"],
        "kernels": len(ops),
        "operators": sorted(([*key, *row] for key, row in table.items()), key=lambda row: -row[2]),
    }


def main() -> None:
    """Print the most expensive operators, and one JSON line."""
    options = arguments(**OPTIONS)
    found = measure(options)
    for phase, name, ms, calls, flops, size in found.pop("operators")[:10]:
        print(f"{phase:10s} {name:40s} {calls:6d} calls {flops:8.2f} TFLOP {size:8.1f} GB {ms:8.1f} ms")
    print(json.dumps({"benchmark": "roofline", **options, **found}))


if __name__ == "__main__":
    main()
