"""The commands of `ijepa-hf`: one module each, with its flags and its exit codes."""
