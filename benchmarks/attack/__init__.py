"""Hostile and damaged inputs by the seed, and what reading them does; see `__main__.py`."""
