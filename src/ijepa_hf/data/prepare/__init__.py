"""Writes the images of any source as parquet shards, made small once."""
