"""Rows of images and captions as they lie: folders, tables, shards, `datasets`."""
