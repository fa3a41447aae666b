"""Uploads and downloads, in a process of their own."""
