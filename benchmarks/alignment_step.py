"""The alignment stage, in which the connector alone learns, in the native layout: this trainer beside the usual loop.

python benchmarks/alignment_step.py                          # toy size and half of InternVL2-1B in width and depth, on a CPU
python benchmarks/alignment_step.py sizes=half steps=6 tower_graph=false
python benchmarks/alignment_step.py sizes=1B device=cuda     # InternVL2-1B's own size; both in bf16 autocast

The usual loop is transformers' own class with every parameter frozen but the connector's, and a call of
`enable_input_require_grads`, which tools put before training a model that is mostly frozen. Of transformers 5 it hooks the
embeddings of every part, the tower's patches among them, so gradients run to the pixels through a tower that does not train
(seen in ms-swift, pull request 10214). LLaVA's own code calls it too but runs its tower under `no_grad`: `tower_graph=false`
leaves the call out, which is that loop. Both compute logits at every place.

What can be saved depends on the sizes: the tower's backward, and logits where no label stands. Here they are InternVL2-1B (one
tile of 448 pixels: 1,025 tokens through 300 M parameters, 256 and the words through 500 M) and parts of it; a tower that is small
beside its language model (LLaVA 7B) gains little.

Neither side uses gradient checkpointing. Memory is what backward keeps beside weights at its peak: on a CPU the distinct storages
that the graph saves, on a GPU `max_memory_allocated` above what was there. Prints one JSON line.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from alternating import against, arguments, plain_step, report
from supervised_step import IMAGE, LR, batch, native_folder
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from lightning_internvl import load_pretrained
from lightning_internvl.stages import SupervisedStage
from lightning_internvl.training.optim import adamw, cosine

MIB = 2**20


def sized(part: float, depth: int, vocab: int, image: int, rows: int, words: int) -> dict[str, Any]:
    """A part of InternVL2-1B's widths (InternViT-300M and Qwen2-0.5B), with heads of 64."""
    vision, text = (
        {"hidden_size": int(part * width), "intermediate_size": int(part * mlp), "num_attention_heads": int(part * width) // 64}
        for width, mlp in ((1024, 4096), (896, 4864))
    )
    layers = {"num_hidden_layers": depth}
    return {"vision": vision | layers, "text": text | layers, "vocab": vocab, "image": image, "rows": rows, "words": words}


SIZES = {  # tokens of a picture and words, blocks and vocabulary keep their proportions
    "toy": sized(1 / 8, 3, 2600, 224, 4, 16),
    "half": sized(1 / 2, 12, 38000, 448, 1, 64),
    "1B": sized(1, 24, 151674, 448, 16, 64),
}


def their_model(folder: Path, tower_graph: bool) -> nn.Module:
    """The usual preparation."""
    model = InternVLForConditionalGeneration.from_pretrained(folder).train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if tower_graph:
        model.enable_input_require_grads()
    return model


def kept(loss_of: Callable[[], Tensor], weights: list[Tensor]) -> float:
    """MiB beside the weights that a step needs between forward and backward."""
    if weights[0].is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of().backward()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, Tensor] = {}  # holds them, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            saved[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of()
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / MIB
    loss.backward()
    return found


def both_sides(
    size: dict[str, Any], folder: Path, steps: int, device: str, tower_graph: bool
) -> tuple[nn.Module, SupervisedStage, Callable[[], torch.autocast]]:
    """The usual loop's model, the stage of this trainer with the same weights, and the autocast of both."""
    native_folder(size, folder / "native")
    theirs = their_model(folder / "native", tower_graph).to(device)
    model = load_pretrained(folder / "native").to(device)
    stage = SupervisedStage(
        model, name="alignment", run_dir=folder, parts={}, train=["middleware"],
        optimizer=functools.partial(adamw, lr=LR), scheduler=functools.partial(cosine, min_ratio=1.0), max_steps=steps,
    )  # fmt: skip
    stage.plan.apply(model, 0)
    return theirs, stage, functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")


def measure(size: dict[str, Any], steps: int, device: str, tower_graph: bool) -> dict[str, Any]:
    """Both sides over the same eight batches; captions, so that every word is to be learnt."""
    torch.manual_seed(0)
    batches = [{name: tensor.to(device) for name, tensor in captions(size).items()} for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        theirs, stage, autocast = both_sides(size, Path(folder), steps, device, tower_graph)
        model = stage.model

        def their_loss(number: int) -> Tensor:
            with autocast():
                return theirs(**batches[number]).loss

        def our_loss() -> Tensor:
            with autocast():
                return stage.losses(batches[0])["next_token"]

        first = [float(loss.detach()) for loss in (their_loss(0), our_loss())]
        weights = [list(part.parameters()) + list(part.buffers()) for part in (theirs, model)]
        memory = kept(lambda: their_loss(0), weights[0]), kept(our_loss, weights[1])
        for part in (theirs, model):
            part.zero_grad()
        named = [one | {"keys": list(range(size["rows"]))} for one in batches]  # the throughput meter counts them
        found = against(stage, named, steps, plain_step(theirs, their_loss, LR), "usual_loop", device)
        counts = {"parameters_M": model.parameters(), "trained_M": model.middleware.parameters()}
        return {
            **{name: round(sum(p.numel() for p in parameters) / 1e6, 2) for name, parameters in counts.items()},
            **found,
            "usual_loop_kept_MiB": round(memory[0], 1),
            "trainer_kept_MiB": round(memory[1], 1),
            "memory_ratio": round(memory[1] / memory[0], 3),
            "first_losses": first,
        }


def captions(size: dict[str, Any]) -> dict[str, Tensor]:
    """Rows of one picture and `words` tokens, all of which are to be learnt."""
    found = batch(size)
    return found | {"labels": found["input_ids"].masked_fill(found["input_ids"] == IMAGE, -100)}


def main() -> None:
    """Measure the sizes asked for."""
    options = arguments(sizes="toy,half", steps=0, device="cpu", tower_graph="true")
    default = {"toy": 60, "half": 10, "1B": 30}
    results = {
        name: measure(SIZES[name], options["steps"] or default[name], options["device"], options["tower_graph"] == "true")
        for name in options["sizes"].split(",")
    }
    about = {"transformers": transformers.__version__, "tower_graph": options["tower_graph"]}
    report("alignment_step", about, {"sizes": results})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
