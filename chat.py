"""Talk to a finished model about pictures: in the terminal, on a page or by programs (settings: conf/chat.yaml).

python chat.py run=outputs/internvl_toy/RUN                 a conversation in the terminal; /help lists what it knows
python chat.py model=FOLDER_OR_ID                           an official checkpoint
python chat.py run=outputs/internvl_toy/RUN ui=web          a page in the browser
python chat.py run=outputs/internvl_toy/RUN ui=api          for programs, in the form of OpenAI's API
python chat.py run=... question="what is this?" image=cat.png        one answer, for scripts
"""

from __future__ import annotations

import lightning_internvl  # noqa: F401 (first: it says which Python it needs)

# isort: split
import sys

import hydra
from omegaconf import DictConfig

from lightning_internvl.chat.settings import SIGNALS, check_settings, hide_password, with_password
from lightning_internvl.cli import as_dict, command
from lightning_internvl.config.targets import build
from lightning_internvl.config.trust import trusting
from lightning_internvl.launch import without_collecting


@hydra.main(version_base="1.3", config_path="conf", config_name="chat")
def main(config: DictConfig) -> None:
    """Check the settings, then load the model; PyTorch is imported here, so that a wrong word is
    answered at once."""
    settings = as_dict(config, resolve=True)
    check_settings(settings)
    with without_collecting():
        from lightning_internvl.chat.command import run_chat
    with trusting(settings["trust"]):
        run_chat(with_password(settings), build)


def start() -> None:
    """The command `internvl-chat` of an installed package."""
    sys.argv[1:] = hide_password(sys.argv[1:])
    command(main, signals=SIGNALS)


if __name__ == "__main__":
    start()
