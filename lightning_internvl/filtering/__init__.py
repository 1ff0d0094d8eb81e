"""A pipeline step that trains nothing: pairs in shards are scored, and new shards of the good ones
feed the stages behind it."""
