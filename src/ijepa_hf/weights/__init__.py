"""Weights that exist: published checkpoints both ways, and starts from them or from any ViT."""
