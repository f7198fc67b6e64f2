"""The run folder: its state, its configuration, its weights and the facts about them."""
