"""Removal of the per-token gain from a trained model, by refitting the readout and by further training (P7)."""
