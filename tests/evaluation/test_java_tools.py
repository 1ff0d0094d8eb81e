"""The Java programs of the COCO tools, played by a script: what they are asked, and what becomes of their answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_internvl.evaluation.captions import Captions
from lightning_internvl.evaluation.metrics import ptb_tokenizer as ptb
from lightning_internvl.evaluation.metrics.meteor import meteor

PROGRAM = """#!{python}
import sys
if "PTBTokenizer" in " ".join(sys.argv):
    assert sys.argv[-2:] == ["-preserveLines", "-lowerCase"]
    print(sys.stdin.read().lower().replace(".", " ."), end="")
for line in () if "PTBTokenizer" in " ".join(sys.argv) else sys.stdin:
    kind, *fields = line.strip("\\n").split(" ||| ")
    if kind == "SCORE":  # references, then the caption
        print(len(fields[-1].split()), flush=True)
    elif "9" in fields:
        break
    else:
        print(*(float(field) for field in fields), sum(map(float, fields)) / 10, sep="\\n", flush=True)
"""


@pytest.fixture(autouse=True)
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_text(PROGRAM.format(python=sys.executable))
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(ptb, "tools", lambda: tmp_path)


def test_captions_are_split_line_by_line() -> None:
    assert ptb.official_words(["A cat.", "", "Two\ndogs -- here."]) == [["a", "cat"], [], ["two", "dogs", "here"]]


def test_meteor_reads_the_score_of_all_captions() -> None:
    pytest.importorskip("pycocoevalcap")
    assert meteor(["a b", "a b  c ||| d"], [["a"], ["b", "c"]]) == pytest.approx(0.6)
    assert meteor(["a"], [["a"]]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="has ended before it was done; leave it out with meteor=false"):
        meteor(["a b c d e f g h i"], [["a"]])


def test_without_java_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(ptb.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="run Java programs: there is no Java on this machine"):
        Captions(meteor=True)
    monkeypatch.setattr(ptb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pycocoevalcap is not installed: pip install -r requirements-captions\.txt"):
        Captions(tokenizer="official")
    assert not Captions().meteor
