"""Scores frozen features, by plain functions of arrays."""
