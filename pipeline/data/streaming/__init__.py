"""Shards that are read from beginning to end."""
