"""Which option an answer in words chooses, by the rules of published scorers that need no judge.

Every rule is followed to the letter, with what looks like oversights, because scores are compared
with those of others. Each gives a letter, or "" where it finds none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FAILED = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SENTENCE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
LAST_WORDS = 5  # of an answer, among which a letter counts

# Of Video-MME's script, where two pairs of them have grown together.
_LEADS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option isThe correct option is",
    "Best answer:Best option:", "Answer:", "Option:", "The correct answer", "The correct option",
)  # fmt: skip


def letter_of_vlmevalkit(answer: str, options: Mapping[str, str]) -> str:
    """The rule of MMBench, AI2D and others in VLMEvalKit (vlmeval/utils/matching_util.py,
    `can_infer`, without a judge): one letter alone among the last words, then "the answer is X",
    then the only option whose text is in the answer. "Z" is a refusal.

    Args:
        options: texts by letter.
    """
    found = "" if FAILED in answer else _letter_alone(answer, options)
    return found or _option_in_text(answer.lower(), options)


def _letter_alone(answer: str, options: Mapping[str, str]) -> str:
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = _SENTENCE.search(answer)
    return said[1].upper() if said and said[1].upper() in options else ""


def _option_in_text(answer: str, options: Mapping[str, str]) -> str:
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in answer]
    return named[0] if len(named) == 1 else ""


def letter_of_mmstar(answer: str) -> str:
    """The rule of MMStar (MMStar-Benchmark/MMStar, eval/vlmeval/evaluate/mmstar.py): the first
    letter, or the one behind "(", "option " or "the answer is "."""
    answer = answer.lower().strip().replace("\n", " ")
    for lead in ("(", "option ", "the answer is "):
        if answer.startswith(lead) and len(answer) > len(lead):
            return answer[len(lead)].upper()
    return answer[:1].upper()


def letter_of_video_mme(answer: str) -> str:
    """The rule of Video-MME (thanku-all/parse_answer, eval_your_results.py): the first A, B, C or
    D, in capitals, once some beginnings are gone."""
    answer = answer.strip()
    for lead in _LEADS:
        answer = answer.replace(lead, "")
    found = re.search("[ABCD]", answer)
    return found[0] if found else ""
