"""The networks, their configuration and their masks: what is computed, without data, files or training."""
