"""Training one model of one variant with Lightning, so that runs of one seed are paired."""
