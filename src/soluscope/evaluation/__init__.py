"""Evaluation: from run folders and probes to the records of a study, validated on the control models."""
