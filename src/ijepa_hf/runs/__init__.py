"""Reads and writes the folder of a run: its owner, logs, lock, checkpoints, exported model and cards."""
