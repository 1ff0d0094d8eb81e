"""Composition: encoder, middleware and decoder as one model."""
