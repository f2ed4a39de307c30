"""Pictures and captions from anywhere, through one interface."""
