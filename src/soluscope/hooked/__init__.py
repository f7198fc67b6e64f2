"""A model as probes see it: converted or downloaded, observed on text, ablated exactly."""
