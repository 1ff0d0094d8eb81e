"""Whether data can be trained on, and what of it is used."""
