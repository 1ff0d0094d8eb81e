"""A run as a checked folder that others load: weights, tokenizer, processor, card."""
