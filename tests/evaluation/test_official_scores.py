"""Rules of scoring beside small tables that the official scripts of the benchmarks gave.

They were VLMEvalKit's vlmeval/utils/matching_util.py (e8e78f0), MMStar's eval/vlmeval/evaluate/mmstar.py (88f243a), Video-MME's
eval_your_results.py (thanku-all/parse_answer afd52cf), MMMU's mmmu/utils/eval_utils.py (bb0b95a), the RRC's
infographicsvqa_eval.py and the textvqa_eval.py of InternVL (2410d1d), pix2struct's metrics.py (945f27e), OCRBench's example.py
(MultimodalOCR 794c36d), and MathVista's extract_answer.py --quick_extract and calculate_score.py (53d5258).
"""

from __future__ import annotations

import pytest

from lightning_internvl.evaluation.metrics.edit_distance import anls, edit_distance
from lightning_internvl.evaluation.metrics.mathvista_answers import Problem, by_rule, extracted, is_right
from lightning_internvl.evaluation.metrics.mmmu_answers import chosen_letter, draws, is_open_answer_right
from lightning_internvl.evaluation.metrics.option_letters import letter_of_mmstar, letter_of_video_mme, letter_of_vlmevalkit
from lightning_internvl.evaluation.metrics.relaxed_accuracy import is_nearly
from lightning_internvl.evaluation.metrics.vqa_accuracy import accuracy, best_single_answer
from lightning_internvl.evaluation.ocrbench import contains

OPTIONS = {"A": "red", "B": "a dog", "C": "two dogs", "D": "7 cm"}

VLMEVALKIT = [
    ("A", "A"), ("(B)", "B"), ("the answer is C.", "C"), ("A dog", "A"), ("I think it is two dogs", "C"), ("B or C", ""),
    ("Sorry, I can't help with images of people yet. A", "Z"), ("Answer: **D**", "D"), ("Z", "Z"), ("a red one", "A"),
    ("", ""),
    ("C because it grows so very fast every day", ""), ("correct answer is *B* or A", "B"),
]  # fmt: skip
MMSTAR = [
    ("A", "A"), ("(b) it", "B"), ("Option C", "C"), ("The answer is D.", "D"), ("A dog", "A"), ("because", "B"),
    ("  c", "C"),
    ("answer: A", "A"), ("", ""), ("The answer is (A)", ""),
]  # fmt: skip
VIDEO_MME = [
    ("C", "C"), ("The best answer is B.", "B"), ("Best answer: D", "B"), ("b", ""), ("Answer: A. Apples", "A"), ("", ""),
    ("I do not know", ""), ("The correct option is (D)", "D"), ("Because of B", "B"), ("The answer is D, not A", "D"),
]  # fmt: skip
# in the order in which the official seed draws
MMMU = [
    ("A", "A"), ("(C)", "C"), ("It is B.", "B"), ("A or (D)", "D"), ("A B", "B"), ("none", "A"),
    ("I think that it must be two dogs here", "C"), ("red then a dog then red again here", "A"), ("", "A"),
    ("C, surely", "C"),
    ("'D'", "D"), ("a", "B"), ("not known", "B"), ("...", "B"),
]  # fmt: skip
MMMU_OPEN = [
    ("3.5", ["3.50"], True), ("The answer is 3.499", ["3.50"], True), ("x = 1,200", ["1200"], True), ("", ["a"], False),
    ("So it could be seven\nthus eight", ["seven"], True), ("C", ["C"], True), ("vitamin C ", ["C"], True),
    ("-3", ["3"], False),
    ("Tampa is in Florida", ["Tampa", "Florida"], True), ("1e3", ["1000"], True), ("It is 24/7.", ["24/7", "3.429"], True),
    ("50%", ["50"], True),
]  # fmt: skip
ANLS = [
    ("ITC Limited", ["ITC Limited"], 1.0), ("itc  limited", ["ITC Limited"], 1.0), ("ITC", ["ITC Limited"], 0),
    ("", ["a"], 0),
    ("ITC Ltd", ["ITC Limited"], 0.6363636363636364), ("$ 45", ["45", "$45"], 0.75),
    ("jan 14 1999", ["January 14, 1999", "14 Jan"], 0.6875),
    ("University of  California ", ["university of california"], 1.0),
]  # fmt: skip
RELAXED = [
    ("14", "14", True), ("14.7", "14", True), ("14.71", "14", False), ("13.3", "14", True), ("yes", "Yes", True),
    ("", "Yes", False),
    ("23%", "0.23", True), ("23", "23%", False), ("0", "0", True), ("0.0", "0", False), ("Italy", "italy.", False),
    ("1,000", "1000", False), ("-5", "-5.2", True), ("nan", "nan", False),
]  # fmt: skip
TEXTVQA = [
    ("Yes", ["yes"] * 10, 1.0), ("Coca-Cola", ["coca cola"] * 3 + ["coca-cola"] * 7, 1.0), ("dog 's", ["dog's"] * 10, 1.0),
    ("dogs", ["dog's"] * 5 + ["dogs"] * 5, 1.0), ("2", ["two"] * 2 + ["2"] + ["3"] * 7, 0.9), ("cant", ["can't"] * 10, 1.0),
    ("STOP?", ["stop"] * 9 + ["a stop"], 1.0), ("1,000", ["1000"] * 4 + ["1 000"] * 6, 1.0),
    ("u.s.a.", ["usa"] * 2 + ["us"] * 8, 0.6),
    ("", ["the"] * 3 + ["b"] * 7, 0.9),
]  # fmt: skip
OCRBENCH = [
    (False, "the word CENTRE.", ["Centre"], 1), (False, "cent re", ["Centre"], 0), (False, "a\nb", ["A B", "x"], 1),
    (False, " ", ["a"], 0),
    (True, "x_{1}", ["x _ { 1 }"], 1), (True, "X_{1}", ["x _ { 1 }"], 0),
    (True, "so x _ {\n1 } = 2", ["y", "x _ { 1 }"], 1),
    (False, "no", ["no.", "nothing"], 0),
]  # fmt: skip
ANGLES = Problem("145°", ("145°", "35°", "135", "45"))
WHOLE, DECIMAL, LIST = Problem("12", kind="integer"), Problem("1.2", kind="float", precision=1), Problem("[1, 2]", kind="list")
MATHVISTA = [
    (ANGLES, "145°", True), (ANGLES, "", False), (ANGLES, 'The answer is "145".', True),
    (ANGLES, 'The answer is "(a)".', True),
    (ANGLES, 'The answer is "E".', False), (WHOLE, "12", True), (WHOLE, " 12 ", True),
    (WHOLE, 'The answer is "12.7".', True),
    (WHOLE, 'The answer is "twelve".', False), (DECIMAL, "1.2", True), (DECIMAL, "1.16", True),
    (DECIMAL, 'The answer is "1.25".', True),
    (LIST, 'The answer is "[1, 2]".', True), (LIST, 'The answer is "[1,2]".', False),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "official"), VLMEVALKIT)
def test_letters_of_vlmevalkit(answer: str, official: str) -> None:
    assert letter_of_vlmevalkit(answer, OPTIONS) == official


@pytest.mark.parametrize(("answer", "official"), MMSTAR)
def test_letters_of_mmstar(answer: str, official: str) -> None:
    found = letter_of_mmstar(answer)
    assert (found if found in OPTIONS else "") == official


@pytest.mark.parametrize(("answer", "official"), VIDEO_MME)
def test_letters_of_video_mme(answer: str, official: str) -> None:
    assert letter_of_video_mme(answer) == official


def test_letters_of_mmmu() -> None:
    drawn = draws()
    assert [chosen_letter(answer, OPTIONS) or drawn.choice("ABCD") for answer, _ in MMMU] == [letter for _, letter in MMMU]


@pytest.mark.parametrize(("answer", "truths", "official"), MMMU_OPEN)
def test_open_answers_of_mmmu(answer: str, truths: list[str], official: bool) -> None:
    assert is_open_answer_right(answer, truths) == official


@pytest.mark.parametrize(("answer", "truths", "official"), ANLS)
def test_anls(answer: str, truths: list[str], official: float) -> None:
    assert anls(answer, truths) == official


def test_edit_distance() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))] == [3, 3, 0, 2]


@pytest.mark.parametrize(("answer", "truth", "official"), RELAXED)
def test_relaxed_accuracy(answer: str, truth: str, official: bool) -> None:
    assert is_nearly(answer, truth) == official


@pytest.mark.parametrize(("answer", "people", "official"), TEXTVQA)
def test_textvqa_accuracy(answer: str, people: list[str], official: float) -> None:
    assert accuracy(answer, people, "textvqa") == pytest.approx(official, abs=1e-12)


@pytest.mark.parametrize(("exact", "answer", "truths", "official"), OCRBENCH)
def test_ocrbench(exact: bool, answer: str, truths: list[str], official: int) -> None:
    assert any(contains(answer, truth, exact) for truth in truths) == official


@pytest.mark.parametrize(("problem", "answer", "official"), MATHVISTA)
def test_mathvista(problem: Problem, answer: str, official: bool) -> None:
    found = extracted(answer, problem)
    assert found is not None
    assert is_right(found, problem) == official


@pytest.mark.parametrize(
    ("problem", "answer", "found"),
    [
        (ANGLES, "First (A), but no: (c) it is.", "C"), (ANGLES, "The correct answer is **B**, because A cat", "B"),
        (ANGLES, "D", "D"), (ANGLES, "B. 35°", "B"), (ANGLES, "so the angle is 135 degrees, not 1450", "C"),
        (ANGLES, "A cat", ""),
        (ANGLES, "unknown", ""), (WHOLE, "There are 3 rows of 1,004 dots", "1004"), (WHOLE, "The answer is 7. Of 9.", "7"),
        (WHOLE, "three", "3"), (DECIMAL, "about -0.5 or .25", ".25"), (LIST, "from [0] to [1, 2]!", "[1, 2]"),
        (LIST, "1, 2", ""),
    ],
)  # fmt: skip
def test_what_rules_find_where_mathvista_asks_a_judge(problem: Problem, answer: str, found: str) -> None:
    assert extracted(answer, problem) is None
    assert by_rule(answer, problem) == found


@pytest.mark.parametrize("form", ["vqa", "textvqa"])
def test_the_best_single_answer_is_that_of_a_search(form: str) -> None:
    """An answer that few people give to every question beats one that all give to some."""
    everybody = [
        ["red"] * 10,
        ["red"] * 7 + ["A Cat"] * 3,
        ["Blue."] * 5 + ["a cat"] * 5,
        ["two"] * 6 + ["cat"] * 4,
        ["cat"] * 10,
    ]
    texts = {text for people in everybody for text in people} | {""}

    def total(text: str) -> float:
        return sum(accuracy(text, people, form) for people in everybody)

    best = best_single_answer(everybody, form)
    assert total(best) == pytest.approx(max(map(total, texts)))
    assert best.lower().removeprefix("a ") == "cat"
