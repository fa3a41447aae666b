"""Estimates operations, memory and time of a run before it is started."""
