"""An illustrated article on the command line:

python -m lightning_internvl.inference.illustrate_command --article TEXT.txt --pictures FOLDER \\
    --author RUN --out ARTICLE.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.files import write_text
from lightning_internvl.inference.illustrate import Author, illustrate
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.inference.picture_search import Gallery, Retriever
from lightning_internvl.messages import told_by


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the article with its pictures as Markdown; faults of the input end in a message."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with told_by(parser):
        _write_article(options)


def _write_article(options: argparse.Namespace) -> None:
    """Raises ValueError for models that cannot do their part, and as `illustrate`."""
    with trusting(options.trust):
        author, retriever = (open_run(place, build).view for place in (options.author, options.retriever or options.author))
    if author.chats is None:
        raise ValueError(f"--author {options.author}: this stage has no decoder; take one that answers")
    if retriever.pairs is None:
        given = f"--retriever {options.retriever or options.author}"
        raise ValueError(f"{given}: this stage reads no captions; take a contrastive one")
    gallery = Gallery(options.pictures, Retriever(retriever.model, retriever.pairs, options.mode))
    text = options.article.read_text(encoding="utf-8") if options.article else None
    article = illustrate(
        Author(author.model, author.chats),
        gallery,
        text=text,
        title=options.title,
        pictures=options.count,
        candidates=options.candidates,
    )
    write_text(options.out, article.markdown())
    for placed in article.pictures:
        print(f"after paragraph {placed.after + 1}: {placed.path} ({placed.caption})")
    print(f"article      {options.out}")


def _parser() -> argparse.ArgumentParser:
    program = "python -m lightning_internvl.inference.illustrate_command"
    parser = argparse.ArgumentParser(prog=program, description="Illustrate an article.")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--article", type=Path, help="a text file, a paragraph a line")
    subject.add_argument("--title", help="the article is written first")
    parser.add_argument("--pictures", type=Path, required=True, help="the folder to choose from")
    parser.add_argument("--author", type=Path, required=True, help="a run, or the hand-off folder of a stage that answers")
    compares = "a run or hand-off folder that compares pictures and texts; by default the author"
    parser.add_argument("--retriever", type=Path, help=compares)
    parser.add_argument("--trust", action="append", default=[], help="a package whose code these folders may name (SECURITY.md)")
    parser.add_argument("--count", type=int, default=1, help="pictures in the article")
    parser.add_argument("--candidates", type=int, default=4, help="pictures that the author chooses from")
    parser.add_argument("--mode", default="c", help="of encode_image: c or g, where the retriever has both")
    parser.add_argument("--out", type=Path, default=Path("article.md"))
    return parser


if __name__ == "__main__":
    main()
