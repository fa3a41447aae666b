"""Uploads to the Hub and downloads from it, in a separate process."""
