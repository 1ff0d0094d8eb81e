"""Answers are drawn from the model's probabilities, each from its own chance, and end where their mark stands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_internvl.data.tokenizer import stop_options, toy_tokenizer
from lightning_internvl.launch import leave_processes
from lightning_internvl.model import answer_sampling
from lightning_internvl.model.answer_sampling import OwnChance, answer_end, draw_answers

PICTURE = 3


class Model:
    """Writes by logits that are given for each place; 4 ends an answer."""

    image_token_id, video_token_id = PICTURE, None

    def __init__(self, logits_LV: Tensor) -> None:
        self.logits = logits_LV

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int, logits_processor: Any, **_: Any
    ) -> Tensor:
        ids = input_ids[:, :0]
        for place in range(max_new_tokens):
            scores = logits_processor(ids, self.logits[place].repeat(len(input_ids), 1))
            ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
        return ids


def drawn(logits: Tensor, seeds: list[int], temperature: float = 1.0) -> Any:
    rows = torch.zeros(len(seeds), 1, dtype=torch.long)
    inputs = {"input_ids": rows, "attention_mask": rows + 1}
    stop = {"eos_token_id": 4}
    chance: dict[str, Any] = {"seeds": seeds, "temperature": temperature, "max_new_tokens": len(logits)}
    return draw_answers(Model(logits), inputs, toy_tokenizer(), stop, **chance)  # type: ignore[arg-type]  # no more of a model is used


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_their_probabilities_say_and_no_placeholder_does(temperature: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 5.0, 0.5]])
    wanted = (logits[0] / temperature).masked_fill(torch.arange(5) == PICTURE, -torch.inf).softmax(dim=0)
    found = drawn(logits, list(range(4000)), temperature)
    shares = torch.tensor([sum(ids == [token] for ids in found.ids) for token in range(5)]) / 4000
    torch.testing.assert_close(shares, wanted, atol=0.03, rtol=0.0)
    chosen = wanted.log()[torch.tensor(found.ids)[:, 0]]
    torch.testing.assert_close(found.log_probs, chosen)
    torch.testing.assert_close(found.entropies, torch.special.entr(wanted).sum().expand(4000))


def test_an_answer_depends_on_its_own_seed_alone() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = -torch.inf
    together, alone = drawn(logits, [7, 8, 7, 9]), drawn(logits, [9])
    assert together.ids[0] == together.ids[2] != together.ids[1]
    assert together.ids[3] == alone.ids[0]
    torch.testing.assert_close(together.log_probs.view(4, 6)[3], alone.log_probs)


def test_what_stands_behind_the_end_of_an_answer_is_no_part_of_it() -> None:
    logits = torch.full((3, 6), -torch.inf)
    logits[0, 1], logits[1, 4], logits[2, 5] = 0.0, 0.0, 0.0
    found = drawn(logits, [0, 1])
    assert found.ids == [[1, 4], [1, 4]]
    assert found.finished == [True, True]
    assert len(found.log_probs) == len(found.entropies) == 4
    cut = drawn(logits[:1], [0])
    assert (cut.ids, cut.finished) == ([[1]], [False])


def test_an_end_of_several_tokens_is_found_in_the_text() -> None:
    tokenizer = toy_tokenizer()
    stop = stop_options(tokenizer, "###")
    ids = tokenizer("two cats###", add_special_tokens=False)["input_ids"]
    assert answer_end([*ids, *ids], tokenizer, stop) == len(ids)
    assert answer_end(ids[:-1], tokenizer, stop) is None
    assert answer_end([ids[0], tokenizer.eos_token_id, *ids], tokenizer, stop) == 2


def test_a_source_of_chance_is_seeded_once() -> None:
    """So that a row's draws follow each other."""
    chance = OwnChance(Model(torch.zeros(1, 5)), [0], 1.0, torch.device("cpu"))  # type: ignore[arg-type]  # of which two fields are read
    tokens = [int(chance(torch.zeros(1, 0), torch.zeros(1, 5)).argmax()) for _ in range(20)]
    assert len(set(tokens)) > 1


def unequal(rank: int, folder: str) -> None:
    """The first process ends its answers at once, the second one never, with weights that both hold a half of."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm, mesh = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)), init_device_mesh("cpu", (2,))
    fully_shard(next(iter(lm.model.layers)), mesh=mesh)
    fully_shard(lm, mesh=mesh)
    model = SimpleNamespace(generate=lambda input_ids, **given: lm.generate(input_ids, **given)[:, input_ids.shape[1] :])
    forced = torch.arange(20) == 4
    answer_sampling.drawn_from = lambda logits, *_: logits.masked_fill(~forced if rank == 0 else forced, -torch.inf)
    rows, tokenizer = torch.ones(3, 2, dtype=torch.long), toy_tokenizer()
    inputs, chance = {"input_ids": rows, "attention_mask": rows}, {"temperature": 1.0, "max_new_tokens": 6}
    found = draw_answers(model, inputs, tokenizer, {"eos_token_id": 4}, seeds=[0, 1, 2], together=True, **chance)  # type: ignore[arg-type]  # no more of a model is used
    torch.save([found.ids, found.finished, len(found.log_probs)], f"{folder}/{rank}")
    leave_processes()


def test_processes_that_share_weights_wait_for_the_longest_answer(tmp_path: Path) -> None:
    together(unequal, str(tmp_path), count=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first == [[[4]] * 3, [True] * 3, 3]
    assert [len(ids) for ids in second[0]] == [6] * 3
    assert second[1:] == [[False] * 3, 18]
