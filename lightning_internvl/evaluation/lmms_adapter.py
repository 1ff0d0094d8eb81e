"""A model of ours as one of lmms-eval, answering by a run or a folder; `lmms` starts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.cli import CONF
from lightning_internvl.config.model_source import READING
from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.data.files.images import read_image
from lightning_internvl.evaluation.lmms import NAME
from lightning_internvl.evaluation.models import model_for, models_under_test
from lightning_internvl.evaluation.settings import EvaluationSettings, check_settings
from lightning_internvl.files import parsed_yaml
from lightning_internvl.inference.predictor import Predictor, as_sample
from lightning_internvl.messages import ConfigError, did_you_mean
from lightning_internvl.model.vlm import shifts_labels

CHOICES = ("run", "model", "trust", *READING, "device", "dtype", "batch_size")
LONGEST = 1024  # tokens of an answer where a task does not say


class LightningInternVL(lmms):
    """A finished run, or a folder in an official layout, that answers questions about pictures.

    Args:
        choice: which model, see `CHOICES`; `batch_size` counts squares that the encoder sees at a
            time.

    Raises:
        ValueError: for a setting that is not known, and for what cannot be opened or does not
            answer.
    """

    def __init__(self, **choice: Any) -> None:
        super().__init__()
        # lmms-eval adds max_batch_size.
        choice = {name: value for name, value in choice.items() if name != "max_batch_size"}
        if unknown := [name for name in choice if name not in CHOICES]:
            raise ConfigError(f"--model_args {name}: {did_you_mean(name, CHOICES)}" for name in unknown)
        plain = parsed_yaml((CONF / "evaluate.yaml").read_text(encoding="utf-8"))
        settings = plain | choice | {"batch_size": int(choice.get("batch_size") or 1)}
        named = choice.get("trust")
        # Written as trust=one+two, since a comma parts settings.
        settings["trust"] = str(named).split("+") if named else []
        check_settings(settings | {"task": {NAME: {"_target_": NAME, "version": 1}}})
        with trusting(settings["trust"]):
            models = models_under_test(EvaluationSettings.of(settings | {"task": {}}), build)
            self.predictor: Predictor = model_for(NAME, "chats", models).open()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; those of equal options are asked together."""
        together: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            together.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(place)
        answers = [""] * len(requests)
        for places in together.values():
            options = requests[places[0]].args[1]
            samples = [self._asked(*self._parts(requests[place])) for place in places]
            with self.predictor.evaluating():
                texts = self.predictor.complete(samples, options.get("max_new_tokens") or LONGEST, **_search(options))
            for place, text in zip(places, texts, strict=True):
                answers[place] = _until(text, options.get("until"))
                self.cache_hook.add_partial("generate_until", requests[place].args[:2], answers[place])
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The mean loss of each continuation as an answer, its end mark among it, and whether
        greedy search would write it.

        lmms-eval takes the choice of the lowest number, as its own models give the loss and not the
        likelihood.
        """
        return [self._loss(request) for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises ValueError: such tasks ask on after an answer, which a batch cannot."""
        task = requests[0].args[-2]
        raise ValueError(f"{task} asks in several rounds, and {NAME} answers one question at a time")

    def _loss(self, request: Instance) -> tuple[float, bool]:
        context, target, pictures, key = self._parts(request)
        text = target if isinstance(target, str) else target(self._doc(request))
        sample = self._asked(context, target, pictures, key)
        sample["conversation"].append({"role": "assistant", "content": str(text).strip()})
        batch = self.predictor.chats([sample])
        batch = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        batch.pop("image_counts")
        model = self.predictor.model
        with self.predictor.evaluating(), self.predictor.precision():
            inputs = {name: self.predictor.placed(tensor) for name, tensor in batch.items()}
            hidden, labels = model.hidden_states(**inputs)
            logits = model.decoder.head(hidden)
        assert labels is not None  # the collator gives them
        if shifts_labels(model.decoder):
            logits, labels = logits[:, :-1], labels[:, 1:]
        learnt = labels != IGNORE_INDEX
        logits, labels = logits[learnt].float(), labels[learnt]
        exact = bool((logits.argmax(-1) == labels).all())
        return torch.nn.functional.cross_entropy(logits, labels).item(), exact

    def _doc(self, request: Instance) -> Any:
        number, task, split = request.args[-3:]
        return self.task_dict[task][split][number]

    def _parts(self, request: Instance) -> tuple[str, Any, list[np.ndarray], str]:
        """The question, what else the task gives, the pictures, and the sample's name."""
        context, other, look, number, task, _ = request.args
        key = f"{task}/{number}"
        return context, other, _pictures(look, self._doc(request), key), key

    def _asked(self, context: str, other: Any, pictures: list[np.ndarray], key: str) -> dict[str, Any]:
        return as_sample(pictures, context, key)


def _pictures(look: Callable[[Any], Any], doc: Any, key: str) -> list[np.ndarray]:
    """The pictures of a sample, (H, W, 3) uint8; raises ValueError for what is none, as a video."""
    found = look(doc)
    found = [] if found is None else found if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    for one in found:
        if not isinstance(one, Image.Image | str | Path):
            kind = type(one).__name__
            raise ValueError(f"sample {key}: {NAME} reads pictures and files of pictures, not {kind}")
    return [np.array(one.convert("RGB")) if isinstance(one, Image.Image) else read_image(one) for one in found]


def _search(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is told of a task's options."""
    warmth = float(options.get("temperature") or 0)
    drawn = {"do_sample": True, "temperature": warmth, "top_p": float(options.get("top_p") or 1)} if warmth > 0 else {}
    return {"num_beams": int(options.get("num_beams") or 1), **drawn}


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """A text up to the first of its ends."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.partition(end)[0] if end else text
    return text.strip()
