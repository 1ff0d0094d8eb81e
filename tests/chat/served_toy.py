"""`python served_toy.py FOLDER SETTINGS`: a page over a model that talks and one that finds the pictures of a folder."""

from __future__ import annotations

import json
import sys

from chat_toys import chat_settings, comparer, talker

from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.chat.web import serve
from lightning_internvl.inference.picture_search import Retriever

if __name__ == "__main__":
    model, chats = talker(context=4096)
    loaded = Loaded("a toy", lambda: Session(model, chats), Retriever(*comparer()))
    settings = chat_settings(max_upload_mb=1, gallery=sys.argv[1], found=2, **json.loads(sys.argv[2]))
    serve(loaded, settings, Sampling(max_new_tokens=60))
