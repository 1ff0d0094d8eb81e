"""Passwords and tokens are in nothing that a run writes or prints; what it lacks to go on is asked for."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from runs import TINY, losses, read_json, train

from lightning_internvl.config.secrets import with_secrets
from lightning_internvl.console import speaking
from lightning_internvl.data.shards.names import ShardNames
from lightning_internvl.data.shards.tar import ShardError, Shards, TarWriter
from lightning_internvl.filtering.decide import BAD, KEPT
from lightning_internvl.filtering.scores import UNUSABLE, Scorer, scores_file, write_rows
from lightning_internvl.filtering.sources import JoinedShards
from lightning_internvl.filtering.write import write_shard
from lightning_internvl.inference.journal import Journal
from lightning_internvl.messages import HIDDEN, ConfigError, hidden, told

PASSWORD, SIGNATURE, KEY = "correct-horse", "battery%2Bstaple", "key-of-the-environment"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa@ss@host:80/x.tar?sig=ab%2B&Expires=9", f"https://user:{HIDDEN}@host:80/x.tar?sig={HIDDEN}&Expires=9"),
        ("postgresql+psycopg://u:pw@h/db", f"postgresql+psycopg://u:{HIDDEN}@h/db"),
        ("https://ghtoken@host/x cannot be read", f"https://{HIDDEN}@host/x cannot be read"),
        (
            "[https://a/x?token=1,https://b/y?X-Amz-Signature=2]",
            f"[https://a/x?token={HIDDEN},https://b/y?X-Amz-Signature={HIDDEN}]",
        ),
        ("+logger.wandb.api_key=abc", f"+logger.wandb.api_key={HIDDEN}"),
        ("error: token: 'abc'", f"error: token: '{HIDDEN}'"),
        ("Bearer abcdefghij and hf_abcdefghijklmnopqrst", f"Bearer {HIDDEN} and {HIDDEN}"),
        (f"x{KEY}x", f"x{HIDDEN}x"),
        *(
            (text, text)
            for text in ("http://h:80/p@x", "s3://b/{0..3}.tar?download=true", "image_token=<i>", "keep_tokens=0.5", "a@b")
        ),
    ],
)
def test_what_is_told_has_no_secrets(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", KEY)
    assert told(text) == shown


def test_settings_whose_names_say_so_are_hidden() -> None:
    settings = {
        "api_key": "x",
        "image_token": "<i>",
        "token": None,
        "use_auth_token": True,
        "aws_secret_access_key": "y",
        "list": ["a"],
    }
    assert hidden(settings) == {**settings, "api_key": HIDDEN, "aws_secret_access_key": HIDDEN}


def test_secrets_are_put_back_by_address_and_by_name() -> None:
    whole = {"shards": ["https://u:p@h/a.tar?sig=1&Date=1"], "same": "https://u:p@h/a.tar?sig=1&Date=1", "key": {"password": "p"}}
    settings = hidden(whole)
    assert with_secrets(settings, "RUN", whole) == whole
    signed_again = {"shards": "https://u:q@h/a.tar?sig=2&Date=2", "key.password": "p"}
    assert with_secrets(settings, "RUN", signed_again)["same"] == signed_again["shards"]
    with pytest.raises(
        ConfigError, match=r"RUN: shards \(and key\.password\) had a secret, .* give it again: 'shards=\"https://u:<hidden>@h/"
    ):
        with_secrets(settings, "RUN", {"shards": "https://u:p@other/a.tar"})
    with pytest.raises(ValueError, match="its secret is not kept"):
        ShardNames(settings["shards"], (".tar",))


ADDRESS = f"https://user:{PASSWORD}@host/x.tar?sig={SIGNATURE}"


class Behind(Shards):
    """A shard at an address with secrets, of which two records can be read, one of them named by an address too."""

    def __len__(self) -> int:
        return 1

    def name(self, shard: int) -> str:
        return ADDRESS

    def read(self, shard: int, start: int = 0) -> Iterator[dict[str, Any]]:
        stream = io.BytesIO()
        Image.new("RGB", (30, 30)).save(stream, "PNG")
        yield {"key": ADDRESS, "png": stream.getvalue(), "txt": "one"}
        yield {"key": "2", "png": b"none", "txt": ADDRESS}
        raise ShardError(ADDRESS, f"{ADDRESS} is cut off")


def test_rows_of_a_filter_name_no_secret(tmp_path: Path) -> None:
    shards = JoinedShards({"one": Behind()})
    ((_, rows),) = Scorer(shards).score([0])
    write_rows(scores_file(tmp_path, 0), rows)
    assert [UNUSABLE in row for row in rows] == [False, True, True]
    write_shard(shards, 0, tmp_path, [KEPT, BAD, BAD])
    told = [path.read_bytes() for folder in ("scores", "dropped", "written") for path in (tmp_path / folder).iterdir()]
    assert len(told) == 3
    assert not [text for text in told if PASSWORD.encode() in text or SIGNATURE.encode() in text]
    assert f"user:{HIDDEN}@host".encode() in told[0]


def test_answers_that_are_kept_name_no_secret_and_are_asked_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    journal.add([(ADDRESS, "what?", "a cat"), ("b.png", "what?", "a dog")])
    journal.add_missing(ADDRESS, f"{ADDRESS} cannot be read")
    assert PASSWORD not in journal.path.read_text() + str(journal.record())
    assert f"user:{HIDDEN}@host" in journal.path.read_text()
    later = Journal(journal.path)
    assert (later.answer(ADDRESS, "what?"), later.answer("b.png", "what?")) == (None, "a dog")
    journal.finish([{"key": ADDRESS, "question": "what?", "answer": "a cat"}])
    assert PASSWORD not in journal.path.read_text()


def test_an_output_shows_what_its_encoding_has(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with speaking():
        print("1.9 \u00d7 chance, \u732b, \ud83d")
    assert raw.getvalue() == b"1.9 \\xd7 chance, \\u732b, \\ud83d\n"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, whatever the password and the query."""

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A shard behind a password and a signature; a third of its pairs have no caption."""
    with TarWriter(tmp_path / "served" / "0.tar") as tar:
        for number in range(40):
            stream = io.BytesIO()
            Image.fromarray(np.full((30, 30, 3), number, np.uint8)).save(stream, "JPEG")
            tar.write({"key": f"{number:03}", "jpg": stream.getvalue(), "txt": "" if number % 3 == 1 else f"picture {number}"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}/0.tar?X-Sig={SIGNATURE}"
    server.shutdown()
    server.server_close()


def test_a_run_keeps_and_prints_no_secret_and_goes_on_when_they_are_given_again(address: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (
        *TINY, "data=webdataset", "pipeline=[contrastive]", "max_steps=2", "callbacks.samples=null", "callbacks.evaluation=null",
        "data.lanes=2", "data.turns=1", "data.num_workers=0", "callbacks.checkpoint.every_n_steps=1", "data.max_bad_fraction=0.9",
    )  # fmt: skip
    begun = train(*words, f"data.shards='{address}'", f"paths.run={run}")
    assert begun.code == 0, begun.err
    written = [path for path in run.rglob("*") if path.is_file()]
    spelt = [secret.encode() for secret in (PASSWORD, SIGNATURE, SIGNATURE.replace("%2B", "+"))]
    assert not [path for path in written if any(secret in path.read_bytes() for secret in spelt)]
    assert PASSWORD not in begun.out + begun.err
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["shards"] == hidden(address)
    (skipped,) = (run / "stages/contrastive").glob("skipped*.jsonl")
    assert HIDDEN in json.loads(skipped.read_text().splitlines()[0])["key"]
    before = losses(run, "contrastive")
    (run / "handoff/contrastive").rename(tmp_path / "aside")

    refused = train(f"resume={run}")
    assert refused.code == 2
    assert f"resume={run}: data.shards had a secret, which no run keeps; give it again: 'data.shards=" in refused.err
    again = train(f"resume={run}", f"data.shards='{address.replace(SIGNATURE, 'another')}'")
    assert again.code == 0, again.err
    assert losses(run, "contrastive") == before
    assert read_json(run / "handoff/contrastive/manifest.json")["step"] == 2
