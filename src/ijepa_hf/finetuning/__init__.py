"""Trains an encoder with a classification head on labelled images."""
