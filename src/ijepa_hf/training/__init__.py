"""Runs a pretraining: the loop, and what goes on beside it (logs, checkpoints, signals, uploads, reports)."""
