"""Outputs that are objects under a prefix of a bucket, and not files in a folder."""
