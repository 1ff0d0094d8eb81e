"""Two processes that run `train.py` again and again, as torchrun would have started them; they are started once."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from PIL import Image
from processes import together
from runs import ROOT, STAGES, TINY, every_checkpoint, train
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

import callbacks
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.launch import leave_processes
from lightning_internvl.stages import base, generative

STEPS = 5
BARE = (
    *TINY, f"max_steps={STEPS}", "logger=[history]", "trainer.accelerator=cpu",
    "callbacks.report=null", "callbacks.progress=null",
    # Full steps from the first one on; a gradient that is zero but for rounding would be scaled up to one with a smaller eps.
    *(f"stages.{stage}.scheduler.warmup_steps=0" for stage in STAGES), "optimizer.eps=1.0e-5",
)  # fmt: skip
BOTH_WAYS = ("+stages.generative.module.both_ways=true", "stages.generative.module.negatives=random")
WHOLE_BATCH = tuple(f"stages.{stage}.batch_size=8" for stage in STAGES)  # of TINY's 4 on each of two devices
LORA = ("pipeline=[supervised]", "peft=lora", "peft.decoder.rank=2")
QLORA = (
    "pipeline=[supervised]", "peft=qlora", "peft.decoder.rank=2", "stages.supervised.new=[encoder,middleware,decoder]",
    "decoder.config.hidden_size=64", "decoder.config.intermediate_size=64", "callbacks.checkpoint.every_n_steps=1",
)  # fmt: skip
SCHEDULE = (
    "pipeline=[contrastive]", "callbacks.checkpoint.every_n_steps=1",
    "stages.contrastive.module.train=[{name: middleware.clip_projector, until_step: 3},middleware,objectives,"
    "{name: encoder, from_step: 2}]",
    # A scale that starts above its limit and is held there.
    "stages.contrastive.objectives.itc.init_scale=14.3", "stages.contrastive.objectives.itc.max_scale=14.2",
)  # fmt: skip
# Adapters on the tower, so that a block holds weights that train and others that do not.
TOWER_LORA = ("pipeline=[contrastive]", "peft=lora", "peft/part@peft.encoder=lora", "peft.encoder.rank=2")
RECOMPUTED = {
    "fsdp2_full": ("strategy=fsdp2", "activation_checkpointing=full", "compile={encoder:aot_eager}"),
    "fsdp2_selective": ("strategy=fsdp2", "strategy.reshard_after_forward=false", "activation_checkpointing=selective"),
    "ddp_selective": ("strategy=ddp", "activation_checkpointing=selective", "compile={encoder:eager}"),
}
# Both processes read the same samples and divide layers: the MLPs of the tower, all of the decoder's blocks.
LAYERS = ("strategy=fsdp2", "strategy.tensor_parallel_size=2", *WHOLE_BATCH)
STRATEGIES = {"ddp": ("strategy=ddp",), "fsdp2": ("strategy=fsdp2",), "layers": LAYERS}
# Steps after which runs of each strategy are stopped: before, at and after the encoder joins at 2; at 3 the pooling freezes.
STOPS = {"ddp": (2,), "fsdp2": (1, 2, 3), "layers": (2,)}
# A file of conversations, of which no process has an even share, and a rate at which nothing gets better.
OWN = (
    "experiment=finetune", "data.validation=0.3", "data.num_workers=0", "max_steps=9", "stages.finetune.batch_size=4",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "optimizer.lr=0.5", "callbacks.report=null",
    "callbacks.tracking.every_n_steps=2", "callbacks.tracking.patience=1", "callbacks.checkpoint.every_n_steps=1",
)  # fmt: skip
QUIET = ("callbacks.samples=null", "callbacks.evaluation=null")  # nothing is measured or shown
LAST = Path("checkpoints") / "contrastive" / "last.ckpt"


def neighbours(batch: int, device: torch.device, others: Tensor | None = None) -> Tensor:
    """Wrong captions that do not depend on how a batch is divided: rows change places in pairs."""
    return torch.arange(batch, device=device) ^ 1


def save_and_note(self: Any, trainer: Any, path: Path, save: Any = callbacks.Checkpoint.save) -> None:
    """Save a checkpoint, and note what this process holds of the decoder's blocks."""
    save(self, trainer, path)
    decoder = trainer.lightning_module.model.decoder
    kinds: dict[str, dict[str, Tensor]] = {"blocks": dict(decoder.lm.model.layers.named_parameters())} if decoder else {}
    kinds["packed"] = {name: x for name, x in kinds.get("blocks", {}).items() if name.endswith(".packed")}
    held = {kind: sum(getattr(x, "_local_tensor", x).nbytes for x in tensors.values()) for kind, tensors in kinds.items()}
    path.with_name(f"held-{trainer.global_rank}.json").write_text(json.dumps(held))


def write_chats(folder: Path) -> Path:
    """Eleven pictures of one colour, each with a question about it."""
    said = [{"from": "human", "value": "<image>\nWhich grey?"}, {"from": "gpt", "value": ""}]
    lines = []
    for number in range(11):
        Image.new("L", (30, 40), 20 * number).save(folder / f"{number}.png")
        turns = [said[0], {**said[1], "value": f"number {number}"}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


def hf_words(folder: Path) -> tuple[str, ...]:
    """A stage with a small vision tower of transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=24)).save_pretrained(folder / "tower")
    bare = (word for word in BARE if not word.startswith(("encoder.", "decoder.")))
    return *bare, *QUIET, "pipeline=[contrastive]", "encoder=hf", f"encoder.pretrained={folder / 'tower'}"


def copy(source: Path, target: Path) -> None:
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def stopped_at(step: int, whole: Path, run: Path) -> None:
    """A run folder as a process leaves it that was killed after a step of its stage."""
    (kept,) = whole.glob(f"checkpoints/*/step-{step}.ckpt")
    last = run / kept.relative_to(whole).with_name(LAST.name)
    last.parent.mkdir(parents=True)
    shutil.copy(whole / RUN_CONFIG, run)
    copy(kept, last)


def clip_and_compare(grads: list[Tensor], limit: float, total: Tensor, clip: Any = base.clip) -> None:
    """Clip, and see that PyTorch's own does the same to the last bit, where it can."""
    copies = [torch.nn.Parameter(grad.clone()) for grad in grads]
    for copied in copies:
        copied.grad = copied.data.clone()
    clip(grads, limit, total)
    if len({getattr(grad, "device_mesh", None) for grad in grads}) == 1:
        torch.nn.utils.clip_grad_norm_(copies, limit)
        local = [getattr(grad, "_local_tensor", grad) for grad in [*grads, *(copied.grad for copied in copies)]]
        assert all(ours.equal(theirs) for ours, theirs in zip(local[: len(grads)], local[len(grads) :], strict=True))


def patched() -> Any:
    """What runs that are compared have in common."""
    clipped = patch.object(base, "clip", clip_and_compare)
    note = patch.object(callbacks.Checkpoint, "save", save_and_note)
    negatives = patch.object(generative, "random_negatives", neighbours)
    return every_checkpoint(), note, negatives, clipped


def run_alone(*arguments: str) -> None:
    """`train.py` in this process."""
    keep, note, negatives, clipped = patched()
    with keep, note, negatives, clipped:
        outcome = train(*arguments)
    assert outcome.code == 0, outcome.err


def run_pair(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run jobs one after the other in two processes: `{"train": arguments}`, `{"stopped_at": [step, whole, run]}`."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(_work, str(folder), port, count=2)


def _work(rank: int, folder: str, port: int) -> None:
    os.chdir(ROOT)
    torch.set_num_threads(1)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    keep, note, negatives, clipped = patched()
    with keep, note, negatives, clipped:
        for number, job in enumerate(json.loads(Path(folder, "jobs.json").read_text())):
            os.environ |= places  # Lightning takes some of them away
            if "train" in job:
                outcome = train(*job["train"])
                Path(folder, f"out-{number}-{rank}.txt").write_text(outcome.out)
                assert outcome.code == 0, (job, outcome.err)
            elif rank == 0:
                step, whole, run = job["stopped_at"]
                stopped_at(step, Path(whole), Path(run))
            dist.barrier()
    leave_processes()
