"""Converted and downloaded models, their activations on text, and exact ablations."""
