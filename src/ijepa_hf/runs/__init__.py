"""The folder of a run: who owns it, its logs, lock, checkpoints, exported model and cards."""
