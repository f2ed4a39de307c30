"""A finished bundle: images from prompts, edits, scores."""
