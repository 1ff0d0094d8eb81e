"""A run as a folder that others load: weights, tokenizer, processor, chat template, card; checked
before it appears."""
