"""The pretraining loop and all that surrounds it while it runs."""
