"""Merges into object stores: making shards there, runs, what is said of them, checking them."""
