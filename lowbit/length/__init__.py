"""Dynamic sequence length: training for it."""
