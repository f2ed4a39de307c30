"""What every layer above builds on: processes, devices, signals, files that are written whole."""
