"""Measures features for signs of collapse, judges them, and draws the measurements."""
