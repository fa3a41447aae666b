"""Defines the arguments of a run, reads them from command line and recipe files, and has the expected curves."""
