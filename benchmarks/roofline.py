"""What a training step should take on a GPU, operator by operator, found without one.

python benchmarks/roofline.py                            # about 0.8 B, a packed row of 16k tokens with 48 tiles, on an H100
python benchmarks/roofline.py compile=true activation_checkpointing=selective weights=bfloat16

The trainer's own code runs on tensors without values that say they are on a GPU, forward and backward, in bf16-mixed. An operator
takes the longest of: its FLOPs at the stated peak, the bytes that it reads and writes at the stated bandwidth, and the start of a
kernel. Peaks are what good kernels reach, not what is printed on the box; MFU is of `rated_tflops`, which is. It counts what the
model computes, not what is computed again.

`weights=bfloat16`: blocks hold weights of that type beside float32 masters, as FSDP2 does, instead of a cast per use.
`attention=pieces`: a kernel for each sample of a row, instead of one for all.
`compile=true` assumes how compilers fuse: what is neither product nor attention in a block, or in its backward pass, runs as one
until another kernel needs its results; only what it reads from outside and what is used after it counts, once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.alternating import arguments
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers import attention_masks, attention_trial
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken, next_token
from lightning_internvl.plan import kernels
from lightning_internvl.stages import SupervisedStage
from lightning_internvl.training import activation_checkpointing

IS_META, IS_CUDA = Tensor.is_meta.__get__, Tensor.is_cuda.__get__  # of which tensors are told by `Gpu` what autograd is told
META, CUDA = torch.device("meta"), torch.device("cuda", 0)
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
# Operators with kernels of their own, which no compiler fuses; and what counts as no work
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@torch.library.custom_op("roofline::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """A fused kernel that shares heads of keys: (B, H, T, K) and the sums (B, H, T)."""
    raise RuntimeError("it has no values")


@torch.library.custom_op("roofline::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward pass."""
    raise RuntimeError("it has no values")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    # as kernels write it: merging heads copies nothing
    return torch.empty_like(q.transpose(1, 2)).transpose(1, 2), q.new_empty(q.shape[:-1], dtype=torch.float32)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.causal = inputs[3]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attention_backward(grad, *ctx.saved_tensors, ctx.causal), None


attention.register_autograd(_backward, setup_context=_keep)


class Gpu(FakeTensorMode):
    """Tensors without values that say that they are on a GPU; autograd's engine, which would look for one, is told otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return META
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:
            kwargs["device"] = CUDA
        return super().__torch_dispatch__(func, types, args, kwargs)


class Autocast(kernels.Kernels):
    """Automatic mixed precision, and attention by a fused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (IS_META, IS_CUDA):
            return func == IS_CUDA
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("q", "k", "v", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | (kwargs or {})
            q, k, v = (self._cast(x, self.autocast) for x in list(given.values())[:3])
            return attention(q, k, v, bool(given.get("is_causal")))[0]
        if not torch.is_autocast_enabled("cuda"):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def attends(name: str) -> bool:
    """Whether an operator is an attention kernel."""
    return "attention" in name or "attn" in name


@dataclass
class Op:
    """An operator that ran: its kind, where, FLOPs, and the bytes that it reads and writes by storage. A compiler may fuse it
    with others of its region: a block, or its backward pass; with none where that is None."""

    name: str
    phase: str
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    region: tuple[int, str] | None = None


@dataclass
class Trace(TorchDispatchMode):
    """Notes operators while it is entered."""

    learnt: int
    compiles: bool
    ops: list[Op] = field(default_factory=list)
    made: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    phase: str = "forward"
    block: bool = False
    region: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.").split(".")[0] if str(func).startswith("aten.") else func._opname
        if name == "nonzero":  # the labelled tokens, whose number is stated
            return torch.empty(self.learnt, args[0].ndim, dtype=torch.int64, device=args[0].device)
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)
        seen = {x.untyped_storage()._cdata for x in inputs}
        view = bool(outputs) and not writes and all(x.untyped_storage()._cdata in seen for x in outputs)
        on_device = any(x.device.type == "cuda" for x in outputs)
        for x in outputs if on_device else ():
            storage = x.untyped_storage()
            if storage._cdata not in seen:
                self.numbers[storage._cdata] = len(self.made)
                self.made[len(self.made)] = StorageWeakRef(storage), storage.nbytes()
        if view or not on_device or name in FREE or name == "_assert_async":
            return result
        # autograd's engine needs no gradients of gradients; what is computed again does
        again = torch.is_grad_enabled() or (attends(name) and "backward" not in name)
        phase = "recompute" if self.phase == "backward" and again else self.phase
        fuses = self.compiles and (self.block or phase != "forward") and name not in PRODUCTS and not attends(name)
        flops = self._flops(func, name, args, kwargs, result)
        self.ops.append(
            Op(name, phase, flops, self._sizes(inputs), self._sizes(outputs), (self.region, phase) if fuses else None)
        )
        return result

    def _sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        found: dict[int, int] = {}
        for x in tensors:
            storage = x.untyped_storage()
            key = self.numbers.get(storage._cdata, -storage._cdata)
            size = min(x.numel() * x.element_size(), storage.nbytes())
            found[key] = max(found.get(key, 0), size)
        return found

    def _flops(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> float:
        if attends(name):
            backward = "backward" in name
            q, k = args[1 if backward else 0], args[2 if backward else 1]
            if "varlen" in name:  # samples side by side, of nearly one length: (T, H, K)
                places = next(i for i, x in enumerate(args) if isinstance(x, Tensor) and x.dtype == torch.int32)
                pairs = q.shape[0] * k.shape[0] / (args[places].shape[0] - 1)
                heads, causal = q.shape[1], next((x for x in args[places:] if isinstance(x, bool)), False)
            else:
                pairs, heads, causal = q.shape[0] * q.shape[2] * k.shape[2], q.shape[1], args[-1]
            return (10 if backward else 4) * pairs * heads * q.shape[-1] * (0.5 if causal else 1.0)
        formula = flop_registry.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=result) if formula is not None else 0.0

    def alive(self) -> int:
        """Bytes of what was made and is still held."""
        return sum(size for reference, size in self.made.values() if not reference.expired())

    def enter_block(self, *_: Any) -> None:
        """A block begins."""
        self.next_region()
        self.block = True

    def leave_block(self, block: nn.Module, given: Any, found: Any) -> None:
        """A block ends; when the gradient of its result is there, its backward pass begins."""
        self.block = False
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self.next_region)

    def next_region(self, *_: Any) -> None:
        """What comes is compiled apart from what was."""
        self.region += 1


def fused(ops: list[Op]) -> Iterator[Op]:
    """The operators, those that a compiler fuses as one: what fuses waits until another kernel needs it, or its region ends."""
    last = {key: place for place, op in enumerate(ops) for key in (*op.reads, *op.writes)}
    waiting: list[int] = []
    for place, op in enumerate(ops):
        if op.region is None:
            now = _needed(ops, waiting, {*op.reads, *op.writes})
        else:
            now = waiting if waiting and ops[waiting[0]].region != op.region else []
        if now:
            made = {key for one in now for key in ops[one].writes}
            waiting = [one for one in waiting if one not in now]
            later = {key for one in waiting for key in ops[one].reads}
            yield _together([ops[one] for one in now], {key for key in made if key < 0 or last[key] >= place or key in later})
        if op.region is None:
            yield op
        else:
            waiting.append(place)
    if waiting:
        yield _together([ops[one] for one in waiting], {key for one in waiting for key in ops[one].writes})


def _needed(ops: list[Op], waiting: list[int], keys: set[int]) -> list[int]:
    """Those of the operators that wait which make storages, or make something for one that does."""
    found: list[int] = []
    for place in reversed(waiting):
        if not keys.isdisjoint(ops[place].writes):
            keys = keys | ops[place].reads.keys()
            found.insert(0, place)
    return found


def _together(run: list[Op], needed: set[int]) -> Op:
    """One kernel instead of several."""
    made: dict[int, int] = {}
    reads: dict[int, int] = {}
    for op in run:
        reads |= {key: max(size, reads.get(key, 0)) for key, size in op.reads.items() if key not in made}
        made |= op.writes
    name = "fused elementwise" if len(run) > 1 else run[0].name
    return Op(name, run[0].phase, 0.0, reads, {key: made[key] for key in needed}, run[0].region)


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


def trace(options: dict[str, Any]) -> tuple[Trace, int, int, int, int]:
    """A step: what ran, numbers of all weights and of those in bfloat16, bytes kept for backward, bytes of the batch."""
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
        batch = batch_of(size, options["tokens"], options["tiles"])
        # pictures cross as bytes
        bytes_in = sum(x.numel() if x.is_floating_point() else x.nbytes for x in batch.values() if isinstance(x, Tensor))
        with tracing, Autocast(torch.bfloat16):
            with torch.autocast("cuda", torch.bfloat16):
                loss = stage.weighted_sum(stage.losses(batch))
            tracing.phase = "backward"
            kept = tracing.alive()
            # `backward` itself would leave `Autocast` out, which blocks that are computed again need
            torch.autograd.graph._engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    weights = sum(p.numel() for p in stage.parameters())
    return tracing, weights, sum(p.numel() for block in blocks for p in block.parameters()) if low else 0, kept, bytes_in


@contextlib.contextmanager
def claimed(attention: str) -> Iterator[None]:
    """PyTorch does not look for a GPU before it turns automatic mixed precision on; a row without padding has no values to
    compare; the type of weights without values is no parameter's."""
    kept = activation_checkpointing.kept_operations() | {torch.ops.roofline.attention.default}
    changed = {
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (torch.cuda, "is_bf16_supported"): lambda *_: True,
        (attention_trial, "refusal"): lambda *_: None if attention == "varlen" else "left out",
        (attention_masks, "_unless_all"): lambda *_: None,
        (activation_checkpointing, "kept_operations"): lambda: kept,
        (next_token, "plain_layer"): lambda head: head.__self__.output_layer,
    }
    before = {(owner, name): getattr(owner, name) for owner, name in changed}
    for (owner, name), value in changed.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def beside(weights: int, low: int) -> list[Op]:
    """What a step does beside forward and backward pass, by bytes: clipping reads gradients twice and writes them
    once; AdamW reads four and writes three tensors; weights of bfloat16 are gathered twice, their gradients become float32."""
    found = [Op("clip and AdamW", "optimizer", 0.0, {0: weights * (8 + 16)}, {0: weights * (4 + 12)})]
    if low:
        found.append(Op("gather and reduce", "optimizer", 0.0, {0: low * (2 * 4 + 2)}, {0: low * (2 * 2 + 4)}))
    return found


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Time of a step, its share of the peak, its memory, and the operators by time."""
    tracing, weights, low, kept, bytes_in = trace(options)
    ops = [*(fused(tracing.ops) if options["compile"] == "true" else tracing.ops), *beside(weights, low)]
    table: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0, 0.0, 0.0])
    for op in ops:
        size = sum(op.reads.values()) + sum(op.writes.values())
        tera = options["attention_tflops" if attends(op.name) else "peak_tflops"]
        ms = max(op.flops / tera / 1e9, size / options["bandwidth"] / 1e9, options["kernel_us"] / 1e3)
        row = table[op.phase, op.name]
        for place, value in enumerate((ms, 1, op.flops / 1e12, size / 1e9)):
            row[place] += value
    total = sum(row[0] for row in table.values()) + bytes_in / options["bus"] / 1e6
    model = sum(op.flops for op in ops if op.phase != "recompute") / 1e12
    elementwise = sum(row[0] for (phase, name), row in table.items() if name not in PRODUCTS and not attends(name))
    memory = (weights * 16 + low * 2 + (0 if low else weights * 2) + kept) / 2**30
    return {
        "ms": round(total, 1),
        "mfu": round(model / options["rated_tflops"] / total * 1e3, 3),
        "share_of_stated_peak": round(model / options["peak_tflops"] / total * 1e3, 3),
        "elementwise_ms": round(elementwise, 1),
        "parameters_M": round(weights / 1e6, 1),
        "kept_GiB": round(kept / 2**30, 4),
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
