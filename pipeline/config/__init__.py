"""Settings of an experiment: the YAML as dataclasses, read and checked."""
