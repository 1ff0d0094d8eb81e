"""Data: generated scenes, image files, text, templates, collators and the step sampler."""
