"""Converts published checkpoints to model folders and back, and starts models from existing weights."""
