"""Comparison of arms: differences of their losses, with intervals and tests."""
