"""Defines the networks, their configuration and their masks; needs no data, files or training."""
