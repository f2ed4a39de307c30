"""How likely images are under both stages together."""
