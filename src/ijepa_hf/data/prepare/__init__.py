"""Writes the images of any source as parquet shards, shrunk once."""
