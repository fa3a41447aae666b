"""Draws masks, curves and features, and computes the values for these pictures."""
