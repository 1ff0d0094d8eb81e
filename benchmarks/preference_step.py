"""A step of direct preference optimisation: the packed rows of this trainer beside trl's DPOTrainer, same weights and texts.

pip install --no-deps trl==1.16.0 && pip install -r requirements-datasets.txt accelerate
OMP_NUM_THREADS=1 python benchmarks/preference_step.py    # 8 pairs a step, 4 blocks of width 256, float32, one thread of a CPU
python benchmarks/preference_step.py packing=false steps=10

Rows have 256 to 512 tokens, uniformly, of which 128 ask. Both sides know what the reference says, as trl has computed it, take
DPO's loss with what they log beside it, clip the norm and step with fused AdamW. trl's side is `compute_loss` of its trainer
over batches of its own collator, in the shortest loop; ours is the stage `preference` under its trainer. Prints one JSON line.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from alternating import against, arguments, plain_step, report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_internvl.data.collate.packed import PackedChats
from lightning_internvl.data.processors.basic import Tiles
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import DPO, NextToken
from lightning_internvl.stages import PreferenceStage
from lightning_internvl.training.optim import adamw, cosine

PAIRS, BATCHES, ASKED, SHORTEST, LONGEST, VOCAB, LR = 8, 4, 128, 256, 512, 8192, 1e-5
INSTALL = "pip install --no-deps trl==1.16.0 && pip install -r requirements-datasets.txt accelerate"
CONFIG = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCAB}


def trl_trainer(model: nn.Module, folder: str) -> Any:
    """trl's trainer, with random words for texts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    words = enumerate(["<pad>", "<end>", *map(str, range(2, VOCAB))])
    splits = Tokenizer(models.WordLevel({word: number for number, word in words}))
    splits.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splits, pad_token="<pad>", eos_token="<end>")

    def texts(least: int, most: int) -> list[str]:
        lengths = torch.randint(least, most + 1, (PAIRS * BATCHES,)).tolist()
        return ["".join(f"{number} " for number in torch.randint(2, VOCAB, (length,))) for length in lengths]

    answers = SHORTEST - ASKED - 1, LONGEST - ASKED - 1  # trl adds the token that ends an answer
    rows = {"prompt": texts(ASKED, ASKED), "chosen": texts(*answers), "rejected": texts(*answers)}
    settings = DPOConfig(
        output_dir=folder, per_device_train_batch_size=PAIRS, precompute_ref_log_probs=True, max_length=None, beta=0.1,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    return DPOTrainer(model, args=settings, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)


def our_batch(chats: PackedChats, given: dict[str, Tensor], number: int, packing: bool) -> dict[str, Any]:
    """The pairs of a batch of trl's as the stage reads them, named by their places."""
    labels = given["input_ids"].masked_fill(given["completion_mask"] == 0, -100)
    lengths = given["attention_mask"].sum(dim=1).tolist()
    rows = [tuple(x[row, :length].tolist() for x in (given["input_ids"], labels)) for row, length in enumerate(lengths)]
    none: dict[str, Any] = {"pictures": [], "videos": [], "sizes": []}
    pairs = [{"key": i, "pair_key": (number, i), "row": rows[i], "rejected": rows[PAIRS + i], **none} for i in range(PAIRS)]
    return chats.pack([pairs]) if packing else chats.stack(pairs)


def our_stage(theirs: nn.Module, folder: str, steps: int) -> PreferenceStage:
    """The stage with the same weights, beside a tower that sees no picture."""
    encoder = InternViT(image_size=16, patch_size=16, dim=8, depth=1, heads=1, mlp_dim=8)
    decoder, connector = HFCausalLM(config={"model_type": "llama", **CONFIG}), MLPConnector(encoder_dim=8, decoder_dim=256)
    decoder.lm.load_state_dict(theirs.state_dict())
    objectives = {"next_token": NextToken(), "preference": DPO(beta=0.1)}
    return PreferenceStage(
        VLM(encoder, connector, decoder, objectives=objectives), name="preference", run_dir=Path(folder), parts={},
        train=["decoder"], optimizer=partial(adamw, lr=LR), scheduler=partial(cosine, min_ratio=1.0), max_steps=steps,
    )  # fmt: skip


def main() -> None:
    """Measure."""
    if find_spec("trl") is None:
        sys.exit(f"this benchmark compares with trl: {INSTALL}")
    options = arguments(steps=20, packing="true")
    torch.manual_seed(0)
    chats = PackedChats(toy_tokenizer(), load_template("chatml", ""), Tiles(16), 1, PAIRS * LONGEST, preferences=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
        trainer = trl_trainer(theirs, folder)
        given = [dict(batch) for batch in trainer.get_train_dataloader()]
        batches = [our_batch(chats, one, number, options["packing"] == "true") for number, one in enumerate(given)]
        stage = our_stage(theirs, folder, options["steps"])
        reference = (torch.cat([one[f"ref_{kind}_logps"] for one in given]).tolist() for kind in ("chosen", "rejected"))
        stage.scores = dict(zip(product(range(BATCHES), range(PAIRS)), zip(*reference, strict=True), strict=True))
        stage._new_reference = lambda: "trl"  # which needs no look for another one

        def losses() -> list[float]:
            with torch.no_grad():
                return [float(trainer.compute_loss(theirs, given[0])), float(stage.losses(batches[0])["preference"])]

        real = float(torch.cat([one["attention_mask"].flatten() for one in given]).float().mean())
        found = {"trl_padding_share": round(1 - real, 3), "first_losses": losses()}
        step = plain_step(theirs, lambda number: trainer.compute_loss(theirs, given[number]), LR)
        found |= {**against(stage, batches, options["steps"], step, "trl", "cpu"), "losses_at_the_end": losses()}
    report("preference_step", {"trl": version("trl"), "packing": options["packing"]}, found)


if __name__ == "__main__":
    main()
