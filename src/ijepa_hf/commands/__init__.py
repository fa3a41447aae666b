"""Runs the commands of `ijepa-hf`; each has a module with its flags and exit codes."""
