"""Metrics of either stage and of the whole."""
