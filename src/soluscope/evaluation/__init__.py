"""Run folders and probes to the rows of a study, validated on the control models."""
