"""Training of one model of one variant with Lightning, such that runs with equal seeds are paired."""
