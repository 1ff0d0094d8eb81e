"""`python served_toy.py FOLDER`: a page over an untrained model that talks and one that looks for the pictures of a folder."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from chat_toys import comparer, talker

from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.chat.web import serve
from lightning_internvl.inference.picture_search import Retriever

if __name__ == "__main__":
    model, chats = talker(context=4096)
    loaded = Loaded("a toy", lambda: Session(model, chats), Retriever(*comparer()))
    settings = SimpleNamespace(host="127.0.0.1", port=0, max_upload_mb=1, gallery=sys.argv[1], found=2)
    serve(loaded, settings, Sampling(max_new_tokens=12))
