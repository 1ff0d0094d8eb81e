"""When two answers are the same to the VQA evaluation (Antol et al., 2015; GT-Vision-Lab/VQA,
PythonEvaluationTools).

Its rules are followed to the letter, with what looks like oversights, because scores are compared
with those of others: answers are put into a common form only where the ten people do not all agree,
and the contractions that it knows are its own. TextVQA's evaluation (Singh et al., 2019;
facebookresearch/mmf, EvalAIAnswerProcessor) always does so, and splits "'s" from its word before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

FORMS = ("vqa", "textvqa")

NUMBERS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # at most so many are taken out of one answer

# Words that are given back the apostrophe that they lost. Those with several get one back only if
# they still have the others.
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's
won't would've wouldn't y'all you'd you'll you're you've"""
_SEVERAL = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""


def _without_one(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {lost: word for word in f"{_ONE} {_SEVERAL}".split() for lost in _without_one(word)} | {"somebody'd": "somebodyd"}


def accuracy(answer: str, people: Sequence[str], form: str = "vqa") -> float:
    """How right an answer is: for each of the people, a third for every other one who said the
    same, at most 1; the mean.

    Args:
        form: whose common form of answers, of `FORMS`.
    """
    answer, people = _stripped(answer), [_stripped(one) for one in people]
    if form == "textvqa":
        answer, people = textvqa_form(answer), [textvqa_form(one) for one in people]
    elif len(set(people)) > 1:
        answer, people = common_form(answer), [common_form(one) for one in people]
    same = [one == answer for one in people]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def best_single_answer(all_people: Sequence[Sequence[str]], form: str = "vqa") -> str:
    """The answer that gets most when every question is answered by it, among those of the people
    and the empty one."""
    as_said: dict[str, float] = {}
    in_form: dict[str, float] = {}
    texts = {""}
    for people in all_people:
        texts.update(people)
        plain = [_stripped(one) for one in people]
        kept = in_form if form == "textvqa" or len(set(plain)) > 1 else as_said
        said = Counter(_keyed(one, form) for one in people) if kept is in_form else Counter(plain)
        for key, count in said.items():
            others = min(1.0, count / 3) * (len(people) - count)
            kept[key] = kept.get(key, 0.0) + (min(1.0, (count - 1) / 3) * count + others) / len(people)
    return max(sorted(texts), key=lambda text: as_said.get(_stripped(text), 0.0) + in_form.get(_keyed(text, form), 0.0))


def _keyed(text: str, form: str) -> str:
    return textvqa_form(_stripped(text)) if form == "textvqa" else common_form(_stripped(text))


def textvqa_form(text: str) -> str:
    """The common form of TextVQA's evaluation."""
    return common_form(_stripped(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def common_form(text: str) -> str:
    """Lower case without marks and articles, digits for number words, contractions mended."""
    words = (NUMBERS.get(word, word) for word in _without_marks(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_marks(text: str) -> str:
    """A mark goes where it stands beside a blank anywhere in the text, or where a number has a
    comma; else it becomes a blank."""
    number, found = bool(_COMMA_IN_NUMBER.search(text)), text
    for mark in MARKS:
        gone = number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if gone else " ")
    return _PERIOD.sub("", found, count=PERIODS)


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
