"""From the losses of all runs to what differs between arms, with intervals and tests."""
