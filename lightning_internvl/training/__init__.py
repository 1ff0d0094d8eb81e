"""Assembly of a stage, optimizers, compilation and recomputation."""
