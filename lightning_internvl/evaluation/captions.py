"""Captions beside those of people (COCO, Flickr30K, NoCaps): CIDEr, BLEU and METEOR."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lightning_internvl.console import console
from lightning_internvl.data.files.captions import read_captions
from lightning_internvl.data.files.lazy_pictures import Pictures
from lightning_internvl.data.scenes.language import CAPTION_REQUEST
from lightning_internvl.evaluation.answer_task import BUILT_IN, AnswerTask, Case
from lightning_internvl.evaluation.metrics.bleu import bleu, bleu_of_constants
from lightning_internvl.evaluation.metrics.cider import cider, cider_of_constants, tokenize
from lightning_internvl.evaluation.metrics.meteor import meteor
from lightning_internvl.evaluation.metrics.ptb_tokenizer import lacking, official_words, words_of
from lightning_internvl.evaluation.scene_cases import caption_cases
from lightning_internvl.inference.predictor import Metrics, Predictor
from lightning_internvl.messages import did_you_mean

WRITERS, TOKENIZERS = ("decoder", "middleware"), ("own", "official")
# captions, each said of every picture, the best of which is chance: of BLEU, and of CIDEr, which takes longer
CONSTANTS, FOR_CIDER = 100, 8


class Captions(AnswerTask):
    """Scores of written captions; what is asked, and of whom, is recorded.

    Args:
        path, images, split: as `data.files.captions.read_captions` takes them.
        writer: "decoder", "middleware", or None for a decoder where there is one.
        language: of the middleware's captions.
        tokenizer: how captions are split into words: "own", or "official", the COCO tools' Java
            program.
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
            given = f"{meteor=} {tokenizer=} run Java programs"
            raise ValueError(f"{given}: {reason}; install it, or leave them out")
        self.meteor = not reason if meteor is None else meteor
        self.without = reason if meteor is None else None

    def cases(self, predictor: Predictor) -> list[Case]:
        if self.path is None:
            return caption_cases(predictor.held_out, self.samples or BUILT_IN)
        found = read_captions(self.path, self.images, self.split)
        named = zip(found.names, found.paths, found.captions, strict=True)
        return [Case(name, path, "", said) for name, path, said in named]

    def write(self, pictures: Pictures, questions: Sequence[str], predictor: Predictor) -> list[str]:
        writer = self._writer(predictor)
        if writer == "decoder":
            return super().write(pictures, questions, predictor)
        return predictor.caption(pictures, self.language, self.max_new_tokens, **self.search_options())

    def _writer(self, predictor: Predictor) -> str:
        writer = self.writer or ("decoder" if predictor.chats else "middleware")
        if (predictor.chats if writer == "decoder" else predictor.pairs) is None:
            raise ValueError(f"writer={writer}: this model has none; choose another, or leave it out")
        predictor.journal.notes["writer"] = writer
        if writer == "middleware":
            prompts = predictor.pairs.caption_prompts
            if self.language not in prompts:
                choices = did_you_mean(self.language, prompts)
                raise ValueError(f"language={self.language!r} has no caption prompt; {choices}")
            predictor.journal.notes["prompt"] = prompts[self.language]
        return writer

    def judge(self, case: Case, answer: str) -> float:
        return float(answer in case.truth)

    def grades(self, cases: Sequence[Case], answers: Sequence[str]) -> list[float]:
        words = self._words(cases, answers)
        return cider(answers, [case.truth for case in cases], words.__getitem__)[1]

    def truth_text(self, case: Case) -> str:
        return " / ".join(case.truth)

    def score(self, cases: Sequence[Case], answers: Sequence[str], predictor: Predictor) -> Metrics:
        self._writer(predictor)
        words, truths = self._words(cases, answers), [case.truth for case in cases]
        written = [words[text] for text in answers]
        true = [[words[text] for text in own] for own in truths]
        found = caption_scores(answers, truths, words.__getitem__)
        common = [words[text] for text in common_captions(truths, words.__getitem__)]
        blind = bleu_of_constants(common, true)
        for place, value in enumerate(bleu(written, true)):
            name = f"caption_bleu_{place + 1}"
            found |= {name: value, f"{name}_chance": max(scores[place] for scores in blind)}
        if self.meteor:
            references = [[" ".join(one) for one in own] for own in true]
            found["caption_meteor"] = meteor([" ".join(one) for one in written], references)
            found["caption_meteor_chance"] = meteor([" ".join(common[0])] * len(true), references)
        elif self.without:
            predictor.journal.notes["meteor"] = f"left out: {self.without}"
            console.print(f"METEOR is left out: {self.without}", soft_wrap=True, markup=False)
        return found

    def _words(self, cases: Sequence[Case], answers: Sequence[str]) -> dict[str, list[str]]:
        """The words of every caption that was written or is true."""
        texts = [*answers, *(text for case in cases for text in case.truth)]
        words = official_words(texts) if self.tokenizer == "official" else map(words_of, texts)
        return dict(zip(texts, words, strict=True))


def caption_scores(
    captions: Sequence[str], truths: Sequence[Sequence[str]], words: Callable[[str], list[str]] = tokenize
) -> Metrics:
    """CIDEr of captions, and the share of those that equal a true one of their picture, each beside
    the best of one caption for all pictures."""
    common = common_captions(truths, words)
    said = Counter(text for own in truths for text in set(own))
    return {
        "caption_cider": cider(captions, truths, words)[0],
        "caption_cider_chance": max(cider_of_constants(common[:FOR_CIDER], truths, words)),
        "caption_exact_match": sum(caption in own for caption, own in zip(captions, truths, strict=True)) / len(truths),
        "caption_exact_match_chance": max(said.values()) / len(truths),
    }


def common_captions(truths: Sequence[Sequence[str]], words: Callable[[str], list[str]]) -> list[str]:
    """The true captions whose words and pairs of words are true of most pictures on average, at
    most `CONSTANTS`, the most common first."""
    parts = {text: _parts(words(text)) for own in truths for text in own}
    pictures: Counter[tuple[str, ...]] = Counter()
    for own in truths:
        pictures.update(set().union(*(parts[text] for text in own)))
    mean = {text: sum(pictures[part] for part in own) / max(1, len(own)) for text, own in parts.items()}
    return sorted(mean, key=lambda text: (-mean[text], text))[:CONSTANTS]


def _parts(words: list[str]) -> set[tuple[str, ...]]:
    return {(word,) for word in words} | set(itertools.pairwise(words))
