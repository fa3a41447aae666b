"""The arguments of a run: dataclasses, command line, recipe files, and the curves expected of a recipe."""
