"""Reinforcement learning from rules: the model answers questions about pictures several times, and what
was worth more than the other answers becomes likelier (GRPO; see `objectives.grpo`).

A batch brings questions. Before its step the model answers each, functions say what the answers are
worth, and the rows of the step are prompts with these answers. Letters: R rows, answer by answer; Q
questions, G answers to each; T tokens of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.data.collate.base import pad_id, stable_id
from lightning_internvl.data.collate.pairs_of_answers import COPIES
from lightning_internvl.data.collate.questions import ADVANTAGES, QUESTIONS, Question
from lightning_internvl.data.gradient_accumulation import COUNTS, WINDOW_COUNTS
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size, gather, global_mean, world_size
from lightning_internvl.distributed.gradients import gradients_of, scale_gradients
from lightning_internvl.layers.attention_masks import on_device
from lightning_internvl.messages import check_number
from lightning_internvl.model.answer_sampling import Answers, draw_answers, drawn_from
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives.grpo import equal_groups
from lightning_internvl.objectives.next_token import LABELLED, counts_of, sample_numbers, weighs_samples
from lightning_internvl.stages.base import Batch, Stage
from lightning_internvl.stages.rewards import Reward, checked_weights, reward_of
from lightning_internvl.stages.rollouts import RolloutLog, answer_rows, by_question, prompt_rows

DRAWN = "drawn_log_probs"  # of a batch with answers: of their tokens when they were drawn, (T,)
# of a batch: text, in whose place prompts are generated from
TEXT = ("input_ids", "attention_mask", "labels", "segments", "right_padded")


class RewardStage(Stage):
    """Learns from the model's own answers by `objectives.grpo`; `objectives.next_token` judges their
    tokens. Without answers, as in a check of the stage or of held-out data, it is the next-token
    loss of the true ones.

    Args:
        rewards: what answers are worth: functions by name (see `stages.rewards`), whose values are
            added up; None leaves one out.
        reward_weights: of the functions; those left out count 1.
        answers: to each question.
        answer_tokens: the most of an answer; a longer one is cut off.
        temperature: of the draw; below 1 answers differ less.
        settings: of `Stage`.

    Raises:
        ValueError: for values out of range, and what is no function.
    """

    objectives = ("next_token", "grpo")

    def __init__(
        self,
        *given: Any,
        rewards: Mapping[str, Reward | None],
        reward_weights: Mapping[str, float] | None = None,
        answers: int = 8,
        answer_tokens: int = 64,
        temperature: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(*given, **settings)
        where = f"stages.{self.name}.module"
        check_number(f"{where}.answers", answers, least=2, whole=True)
        check_number(f"{where}.answer_tokens", answer_tokens, least=1, whole=True)
        check_number(f"{where}.temperature", temperature, above=0)
        self.rewards = {name: function for name, function in rewards.items() if function is not None}
        self.reward_weights = checked_weights(self.rewards, reward_weights, where)
        self.answers, self.answer_tokens, self.temperature = answers, answer_tokens, temperature
        self.found: dict[str, Tensor] = {}  # of the answers at hand, what is logged
        self.micro_batches, self.tokens = 1, 0  # of the step at work, and tokens of its answers so far
        self.scale: Tensor | None = None  # of its gradients, behind the last micro-batch

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of the answers, or without any of the true ones, a scalar."""
        hidden, labels = self.model.hidden_states(**batch)
        decoder, judge = self.model.decoder, self.model.objectives["next_token"]
        known = {"shifts": shifts_labels(decoder), "count": batch.get(COUNTS, {}).get(LABELLED)}
        if ADVANTAGES not in batch:
            known |= {"segments": batch.get("segments")} if weighs_samples(judge) else {}
            return {"next_token": judge(hidden, labels, decoder.head, **known)}
        assert labels is not None  # which the rows of answers have
        numbers_RL, _ = sample_numbers(labels)
        log_probs_T, numbers_T = judge.token_log_probabilities(hidden, labels, self.head, **known, beside=[numbers_RL])
        drawn_T = batch.get(DRAWN, log_probs_T.detach())
        losses_T, clipped_T = self.model.objectives["grpo"](log_probs_T, drawn_T, batch[ADVANTAGES][numbers_T])
        self.watched = {**self.found, "clipped": clipped_T.float().mean()}
        total = losses_T.sum()
        if self.micro_batches > 1:  # `scale` makes it a mean
            return {"grpo": total * world_size() / self.answer_tokens}
        return {"grpo": global_mean(total, torch.full_like(total, len(losses_T)))}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Labelled tokens of the true answers; how many the model will write is not known before."""
        judge, labels = self.model.objectives["next_token"], batch["labels"]
        return counts_of(judge, "next_token", labels, shifts=shifts_labels(self.model.decoder), segments=batch.get("segments"))

    def head(self, states_TH: Tensor) -> Tensor:
        """Logits as answers are drawn from them: (T, H) -> (T, V)."""
        return drawn_from(self.model.decoder.head(states_TH), self.model, self.temperature)

    # --- answers --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Leave out of the files what comes again."""
        super().on_fit_start()
        self.log_file = RolloutLog(self.folder, data_parallel_rank_and_size(self.trainer)[0])
        if self.trainer.is_global_zero:
            self.log_file.cut(self.start_step)
        self.trainer.strategy.barrier()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Put answers of the model into the batch in place of the true ones."""
        batch.update(self.use(self._rollouts, batch))
        window = batch.get(WINDOW_COUNTS, [None])
        place = batch_idx % self.trainer.accumulate_grad_batches
        self.micro_batches = self.trainer.accumulate_grad_batches
        self.tokens = batch[COUNTS][LABELLED] + (self.tokens if place else 0)
        self.scale = None
        if self.micro_batches > 1 and place + 1 == len(window):
            total = gather(torch.tensor([float(self.tokens)], device=self.device)).sum()
            self.scale = self.answer_tokens * len(window) / total
        super().on_train_batch_start(batch, batch_idx)

    @torch.no_grad()
    def _rollouts(self, batch: Batch) -> Batch:
        """What is another in a batch with answers."""
        questions: list[Question] = batch[QUESTIONS]
        collate = self.trainer.datamodule.collate  # type: ignore[attr-defined]  # of a connector
        with self.evaluating(), self.trainer.precision_plugin.forward_context():
            drawn = self._draw(batch, questions, collate)
        texts_R = self._texts(drawn, questions, collate)
        worth = {name: self._worth(name, function, texts_R, questions) for name, function in self.rewards.items()}
        total_R = torch.stack([self.reward_weights[name] * x for name, x in worth.items()]).sum(dim=0)
        rewards_QG = total_R.view(self.answers, len(questions)).T
        advantages_QG = self.model.objectives["grpo"].advantages(rewards_QG)
        self.found = self._measures(drawn, worth, rewards_QG)
        named = {f"reward_{name}": x for name, x in worth.items()}
        known = {"answers": texts_R, **named, "reward": total_R, "advantage": advantages_QG.T.flatten()}
        self._keep(questions, {**known, "tokens": [*map(len, drawn.ids)], "finished": drawn.finished})
        rows = answer_rows(questions, drawn.ids, pad_id(collate.tokenizer), shifts=shifts_labels(self.model.decoder))
        rows[ADVANTAGES] = advantages_QG.T.flatten().float()
        placed = {name: on_device(tensor, self.device) for name, tensor in rows.items()}
        counts = {**batch[COUNTS], LABELLED: len(drawn.log_probs)}
        return {**placed, DRAWN: drawn.log_probs, COPIES: self.answers, COUNTS: counts}

    def _draw(self, batch: Batch, questions: Sequence[Question], collate: Any) -> Answers:
        tokenizer, model = collate.tokenizer, self.model
        shown = {n: x for n, x in batch.items() if n == "pixel_values" or (n not in TEXT and model.reads(n))}
        prompts = prompt_rows(questions, self.answers, pad_id(tokenizer))
        return draw_answers(
            model,
            {**shown, **{name: on_device(x, self.device) for name, x in prompts.items()}, COPIES: self.answers},
            tokenizer,
            collate.stop_options(),
            seeds=[stable_id(f"{self.seed}/{self.name}/{one.place}/{n}") for n in range(self.answers) for one in questions],
            temperature=self.temperature,
            max_new_tokens=self.answer_tokens,
            together=self.is_sharded,
        )

    def _texts(self, drawn: Answers, questions: Sequence[Question], collate: Any) -> list[str]:
        """The answers as data has them."""
        texts, frames = collate.decoded(drawn.ids), [one.frame for one in questions] * self.answers
        return [collate.said_in(text, frame) for text, frame in zip(texts, frames, strict=True)]

    def _worth(self, name: str, function: Reward, texts: Sequence[str], questions: Sequence[Question]) -> Tensor:
        """What a function says of all answers, (R,) float64."""
        asked = [(one.truth, {"key": one.key, "conversation": one.conversation}) for one in questions] * self.answers
        found = [reward_of(name, function, text, *one) for text, one in zip(texts, asked, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def _measures(self, drawn: Answers, worth: Mapping[str, Tensor], rewards_QG: Tensor) -> dict[str, Tensor]:
        """What is logged beside the loss, a scalar each: the mean reward, that of each function where there
        are several, the deviation within groups, the share of groups without gradient, tokens of an
        answer, the share that was cut off, and the entropy of a token's draw in nats."""
        cut = torch.tensor([not finished for finished in drawn.finished])
        found = {
            "reward": rewards_QG.mean(),
            **({f"reward_{name}": x.mean() for name, x in worth.items()} if len(worth) > 1 else {}),
            "reward_std": rewards_QG.std(dim=1).mean(),
            "equal_groups": equal_groups(rewards_QG).double().mean(),
            "answer_tokens": torch.tensor(len(drawn.log_probs) / len(cut)),
            "cut_off": cut.double().mean(),
        }
        placed = {name: on_device(x.float(), self.device) for name, x in found.items()}
        return {**placed, "entropy": drawn.entropies.mean()}

    def _keep(self, questions: Sequence[Question], known: Mapping[str, Any]) -> None:
        """Write all answers down; of processes that read the same samples the first one does."""
        same = getattr(self.trainer.strategy, "tensor_parallel_size", 1)
        if self.trainer.global_rank % same == 0:
            values = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in known.items()}
            self.log_file.add(self.global_step, questions, {n: by_question(x, len(questions)) for n, x in values.items()})

    # --- several micro-batches ------------------------------------------------------------------

    def _log_step(self) -> None:
        if self.scale is not None:
            self.step_losses["grpo"] = self.step_losses["grpo"] * self.scale
        super()._log_step()

    def on_after_backward(self) -> None:
        """Make the sums over the micro-batches of a step a mean over all their tokens."""
        if self.scale is not None:
            scale_gradients(gradients_of(*self.trainer.optimizers), self.scale)
