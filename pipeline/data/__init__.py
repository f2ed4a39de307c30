"""Images and captions from anywhere, through one interface."""
