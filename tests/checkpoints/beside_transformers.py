"""What tests of layouts that transformers has in common ask: the same numbers and words, and a folder that its class opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.model.vlm import VLM


def close(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()) + 1e-7


def same_output(ours: VLM, theirs: Any, inputs: dict[str, Tensor]) -> None:
    """Logits of what is seen, and the loss."""
    expected, found, seen = theirs(**inputs), ours(**inputs), inputs["attention_mask"].bool()
    close(found.logits[seen], expected.logits[seen])
    close(found.loss, expected.loss)


def opens_our_folder(ours: VLM, theirs: Any, folder: Path) -> Any:
    """Their model from the folder that we write: the same tensors under the same names."""
    ours.save_pretrained(folder)
    back = type(theirs).from_pretrained(folder).eval()
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    return back


def opens_what_came_from_nowhere(theirs: Any, inputs: dict[str, Tensor], folder: Path) -> None:
    """A model without the config of a checkpoint is written so that their class computes the same."""
    theirs.save_pretrained(folder / "theirs")
    ours = load_pretrained(folder / "theirs")
    ours.config = None
    ours.save_pretrained(folder / "ours")
    back = type(theirs).from_pretrained(folder / "ours").eval()
    assert back(**inputs).logits.equal(theirs(**inputs).logits)


def same_words(theirs: Any, inputs: dict[str, Tensor], folder: Path, **options: Any) -> None:
    """The same ids are written, by the most likely word each time."""
    theirs.save_pretrained(folder)
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    options = {"do_sample": False, **options}
    new = load_pretrained(folder).generate(**prompt, **options)
    assert new.equal(theirs.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :])
