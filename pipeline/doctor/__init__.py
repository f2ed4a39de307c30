"""What is in a source of images and captions, what would stop a training on it, and which
configuration suits it."""
