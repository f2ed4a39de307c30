"""The codes dataset: images as discrete tokens, in Arrow files with hashes."""
