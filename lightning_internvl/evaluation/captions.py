"""Captions beside those that people wrote (COCO, Flickr30K, NoCaps in COCO's form): CIDEr, BLEU and METEOR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_internvl.console import console
from lightning_internvl.data.files.captions import read_captions
from lightning_internvl.data.scenes.language import CAPTION_REQUEST
from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case
from lightning_internvl.evaluation.metrics.bleu import bleu
from lightning_internvl.evaluation.metrics.cider import cider
from lightning_internvl.evaluation.metrics.meteor import meteor
from lightning_internvl.evaluation.metrics.ptb_tokenizer import lacking, official_words, words_of
from lightning_internvl.evaluation.scene_cases import caption_cases
from lightning_internvl.evaluation.tasks import Metrics
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.messages import did_you_mean

WRITERS, TOKENIZERS = ("decoder", "middleware"), ("own", "official")


class Captions(AnswerTask):
    """Scores of written captions; what is asked, and of whom, is recorded.

    Args:
        path, images, split: as `data.files.captions.read_captions` takes them.
        writer: "decoder", "middleware", or None for a decoder where there is one.
        language: of the middleware's captions.
        tokenizer: how captions are split into words: "own", or "official", the COCO tools' Java program.
        meteor: whether METEOR is computed; None: where its Java program can run.
    """

    needs = "captions"
    PROMPT = "Provide a one-sentence caption for the provided image."
    SCENES_PROMPT = CAPTION_REQUEST
    RIGHT = 1.0  # CIDEr

    def __init__(
        self,
        *,
        split: str | None = None,
        writer: str | None = None,
        language: str = "en",
        tokenizer: str = "own",
        meteor: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if writer is not None and writer not in WRITERS:
            raise ValueError(f"{writer=} is not known; {did_you_mean(writer, WRITERS)}, null")
        if tokenizer not in TOKENIZERS:
            raise ValueError(f"{tokenizer=} is not known; {did_you_mean(tokenizer, TOKENIZERS)}")
        self.split, self.writer, self.language, self.tokenizer = split, writer, language, tokenizer
        reason = lacking()
        if reason and (meteor or tokenizer == "official"):
            raise ValueError(f"{meteor=} {tokenizer=} run Java programs: {reason}; install it, or leave them out")
        self.meteor = not reason if meteor is None else meteor
        self.without = reason if meteor is None else None

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None:
            return caption_cases(predictor.held_out, self.samples or BUILT_IN)
        found = read_captions(self.path, self.images, self.split)
        named = zip(found.names, found.paths, found.captions, strict=True)
        return [Case(name, path, "", said) for name, path, said in named]

    def write(self, pictures: Sequence[np.ndarray], questions: Sequence[str], predictor: Predictor) -> list[str]:
        writer = self._writer(predictor)
        if writer == "decoder":
            return super().write(pictures, questions, predictor)
        beams = {"num_beams": self.beams} if self.beams > 1 else {}
        return predictor.caption(pictures, self.language, self.max_new_tokens, **beams)

    def _writer(self, predictor: Predictor) -> str:
        writer = self.writer or ("decoder" if predictor.chats else "middleware")
        if (predictor.chats if writer == "decoder" else predictor.pairs) is None:
            raise ValueError(f"writer={writer}: this model has none; choose another, or leave it out")
        predictor.journal.notes["writer"] = writer
        if writer == "middleware":
            prompts = predictor.pairs.caption_prompts
            if self.language not in prompts:
                raise ValueError(f"language={self.language!r} has no caption prompt; {did_you_mean(self.language, prompts)}")
            predictor.journal.notes["prompt"] = prompts[self.language]
        return writer

    def judge(self, case: Case, answer: str) -> float:
        return float(answer in case.truth)

    def grades(self, cases: Sequence[Case], answers: Sequence[str]) -> list[float]:
        written, true = self._words(cases, answers)
        return cider([" ".join(words) for words in written], [[" ".join(words) for words in own] for own in true], str.split)[1]

    def truth_text(self, case: Case) -> str:
        return " / ".join(case.truth)

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        self._writer(predictor)
        written, true = self._words(cases, answers)
        texts, references = [" ".join(words) for words in written], [[" ".join(words) for words in own] for own in true]
        found = {"cider": cider(texts, references, str.split)[0]}
        found |= {f"bleu_{n}": value for n, value in enumerate(bleu(written, true), start=1)}
        if self.meteor:
            found["meteor"] = meteor(texts, references)
        elif self.without:
            predictor.journal.notes["meteor"] = f"left out: {self.without}"
            console.print(f"METEOR is left out: {self.without}", soft_wrap=True, markup=False)
        exact = [self.judge(case, answer) for case, answer in zip(cases, answers, strict=True)]
        return found | {"exact_match": sum(exact) / len(exact)}

    def _words(self, cases: Sequence[Case], answers: Sequence[str]) -> tuple[list[list[str]], list[list[list[str]]]]:
        """The words of the captions that were written, and of all true ones of each picture."""
        texts = [*answers, *(text for case in cases for text in case.truth)]
        words = official_words(texts) if self.tokenizer == "official" else [words_of(text) for text in texts]
        rest = iter(words[len(answers) :])
        return words[: len(answers)], [[next(rest) for _ in case.truth] for case in cases]
