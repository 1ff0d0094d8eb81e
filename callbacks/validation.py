"""Measures a finished stage on the user's held-out data (`data.validation`), and shows answers."""

from __future__ import annotations

import lightning as L
from rich.table import Table
from rich.text import Text

from callbacks.tracking import Tracking
from lightning_internvl.console import console
from lightning_internvl.evaluation.own_data import Asked, OwnData, answer_scores, failure, keep_cases
from lightning_internvl.evaluation.own_pairs import matching
from lightning_internvl.files import read_json, write_json
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Metrics
from lightning_internvl.messages import check_number
from lightning_internvl.stages import Stage
from lightning_internvl.training.context import StageContext

ADVICE = (
    "After {steps} steps: train longer (epochs=N or max_steps=N) or on more records, or start from a "
    "model that answers already, as init_from=OpenGVLab/InternVL3-1B-hf does; a toy shows that "
    "everything runs, and learns little else"
)
WIDTH = 300  # letters of an answer that is shown


class Validation(L.Callback):
    """Adds to the stage's `metrics.json`: `validation_loss`, and of conversations
    `validation_exact_match` of short answers and `validation_token_f1` of all (see
    `lightning_internvl.evaluation.own_data`), with how many samples each was measured on, of pairs
    that are matched `validation_itm_hard_accuracy`; writes
    `cases.json`, and prints some answers.

    Args:
        samples: at most so many give the loss, spread over all that are held out.
        answers: at most so many questions are answered.
        shown: so many of them are printed.
        cases: how many right and how many wrong ones the report shows.
    """

    def __init__(self, *, samples: int = 256, answers: int = 64, shown: int = 3, cases: int = 6) -> None:
        check_number("callbacks.validation.samples", samples, above=0, whole=True)
        for name, value in {"answers": answers, "shown": shown, "cases": cases}.items():
            check_number(f"callbacks.validation.{name}", value, least=0, whole=True)
        self.samples, self.answers, self.shown, self.cases = samples, answers, shown, cases
        self.found: dict[str, float] = {}

    def setup_stage(self, context: StageContext) -> None:
        """The collators of the stage, which ask its questions."""
        self.context = context

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """The loss, by all processes together, while they still are together."""
        self._find_loss(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Answers by the first process, and the files."""
        own = OwnData.of(trainer, self.context)
        if own is None:
            return
        if not pl_module.is_sharded:
            # the trainer's teardown has moved it to the CPU
            pl_module.model.to(trainer.strategy.root_device)
        if not self.found:  # of a stage that was resumed after its last step
            self._find_loss(trainer, pl_module)
        if not (trainer.is_global_zero or pl_module.is_sharded):
            return
        precision = trainer.precision_plugin.forward_context
        asked = pl_module.use(own.ask, precision, self.answers)
        journal = Journal(cases=self.cases)
        scores = answer_scores(asked) | pl_module.use(matching, own, precision, journal, self.samples)
        keep_cases(asked, journal)
        if trainer.is_global_zero:
            self._write(pl_module, scores, journal)
            self._show(trainer, pl_module, asked)

    def _find_loss(self, trainer: L.Trainer, stage: Stage) -> None:
        if own := OwnData.of(trainer, self.context):
            self.found = own.loss(trainer, stage, self.samples)
            for reason in own.unusable.values() if trainer.is_global_zero else ():
                console.print(f"held out, but of no use: {reason}", soft_wrap=True, markup=False)

    def _write(self, stage: Stage, scores: Metrics, journal: Journal) -> None:
        path = stage.run_dir / "metrics.json"
        metrics = read_json(path, {})
        write_json(path, metrics | {stage.name: {**metrics.get(stage.name, {}), **self.found, **scores}})
        if journal.shown:
            write_json(stage.folder / "cases.json", journal.shown)

    def _show(self, trainer: L.Trainer, stage: Stage, asked: list[Asked]) -> None:
        """Some answers, and whether they are good for nothing."""
        if not asked or not self.shown:
            return
        shown = asked[: self.shown]
        title = f"{stage.name}: answers about held-out data, {len(shown)} of {len(asked)}"
        table = Table(title=title, title_justify="left", header_style="bold")
        for column in ("question", "answer", "truth"):
            table.add_column(column, overflow="fold")
        for one in shown:
            texts = (one.question, one.answer, one.truth)
            table.add_row(*(Text(text[:WIDTH] or "(nothing)") for text in texts))
        console.print(table)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # of a connector
        first = next((one.first_loss for one in callbacks if isinstance(one, Tracking)), None)
        if told := failure(asked, self.found["validation_loss"], first):
            words = f"{stage.name}: {told}. {ADVICE.format(steps=trainer.global_step)}"
            console.print(words, style="red", soft_wrap=True, markup=False)
