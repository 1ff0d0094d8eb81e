"""Measures the stage on the user's data that is held out of training (`data.validation`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.console import console
from lightning_internvl.data.module import StageData
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size, gather
from lightning_internvl.files import read_json, write_json
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext


class Validation(L.Callback):
    """Adds to the stage's `metrics.json`: `validation_loss`, by learnt token where there are
    conversations and else by batch, and `validation_exact_match` of short answers to first
    questions, and how many samples each was measured on.

    Args:
        samples: at most so many, spread over all that are held out.
        short: words of an answer that is compared; None compares none.
    """

    def __init__(self, *, samples: int = 256, short: int | None = 3) -> None:
        if samples < 1 or (short is not None and short < 1):
            raise ValueError(f"validation needs a sample or more, and answers of a word or more: {samples=}, {short=}")
        self.samples, self.short = samples, short
        self.found: dict[str, float] = {}

    def setup_stage(self, context: StageContext) -> None:
        """The collators of the stage, which ask its first questions."""
        self.view = context.view

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """The loss, by all processes together, while they still are together."""
        data: StageData = trainer.datamodule  # type: ignore[attr-defined]  # of a connector
        if data.held_out is None:
            return
        self.data, self.held_out = data, data.held_out
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(pl_module.seed)
            self.found = pl_module.use(self._loss, trainer, pl_module)
        for module, training in modes.items():
            module.training = training

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Exact match by the first process, and the file."""
        if not self.found or not (trainer.is_global_zero or pl_module.is_sharded):
            return
        if not pl_module.is_sharded:
            # the trainer's teardown has moved it to the CPU
            pl_module.model.to(trainer.strategy.root_device)
        found = self.found | pl_module.use(self._exact, trainer, pl_module)
        if not trainer.is_global_zero:
            return
        path = pl_module.run_dir / "metrics.json"
        metrics = read_json(path, {})
        write_json(path, metrics | {pl_module.name: {**metrics.get(pl_module.name, {}), **found}})

    def _loss(self, trainer: L.Trainer, stage: Stage) -> dict[str, float]:
        total = weight = used = 0.0
        for batch in self._batches(trainer):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), stage.device)
            with trainer.precision_plugin.forward_context():
                losses = stage.losses(batch)
            loss = stage.weighted_sum(losses)
            rows = len(batch["keys"])
            learnt = int((batch["labels"] != IGNORE_INDEX).sum()) if "input_ids" in batch else rows
            here = gather(torch.tensor([[learnt, rows]], device=loss.device)).sum(dim=0).tolist()
            # Each process has its share of the mean over all, times their number.
            total += float(gather(loss.detach().reshape(1)).mean()) * here[0]
            weight, used = weight + here[0], used + here[1]
        return {"validation_loss": total / weight, "validation_samples": used} if weight else {}

    def _batches(self, trainer: L.Trainer) -> Iterator[dict[str, Any]]:
        """Batches of this process. All processes have equally many samples, because their losses
        wait for each other."""
        usable, told = [], console.print if trainer.is_global_zero else _silent
        for place in self._places():
            try:
                usable.append(self.data.collate.prepare(self.held_out[place]))
            except ValueError as error:
                told(f"held out, but of no use: {error}", soft_wrap=True, markup=False)
        share, shares = data_parallel_rank_and_size(trainer)
        own = usable[: len(usable) // shares * shares][share::shares]
        size = self.data.batch_size
        for start in range(0, len(own), size):
            yield self.data.collate.stack(own[start : start + size])

    def _places(self) -> list[int]:
        length = len(self.held_out)
        return sorted(set(np.linspace(0, length - 1, min(self.samples, length)).round().astype(int).tolist()))

    def _exact(self, trainer: L.Trainer, stage: Stage) -> dict[str, float]:
        """Share of first questions with a short answer that the decoder answers word for word."""
        asked, answers = [], []
        collate, chats = self.data.collate, self.view.chats
        if self.short is None or collate is not self.view.training or chats is None:
            return {}
        for place in self._places():
            try:
                sample = self.held_out[place]
                question, answer = _first_turn(sample)
                if len(answer.split()) <= self.short and "videos" not in sample:
                    chats.prompts([question])
                    asked.append(question)
                    answers.append(answer)
            except ValueError:  # told with the loss
                continue
        if not asked:
            return {}
        precision = trainer.precision_plugin.forward_context
        scenes: Any = None  # what it is asked are the user's own data
        with Predictor(stage.model, scenes, chats=chats).evaluating(precision) as predictor:
            written = predictor.complete(asked)
        right = sum(text == answer for text, answer in zip(written, answers, strict=True))
        count = len(asked)
        return {"validation_exact_match": right / count, "validation_answers": float(count)}


def _first_turn(sample: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A conversation up to its first answer, with the pictures shown by then; the answer."""
    turns = sample["conversation"]
    place = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    shown = sample["images"][: sum(turn["content"].count(IMAGE) for turn in turns[:place])]
    question = {**sample, "images": shown, "conversation": turns[:place]}
    return question, turns[place]["content"].strip()


def _silent(*said: Any, **options: Any) -> None:
    """Other processes leave the words to the first one."""
