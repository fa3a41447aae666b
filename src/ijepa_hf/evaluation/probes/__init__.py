"""Scores of frozen features: plain functions of arrays."""
