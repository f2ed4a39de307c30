#!/usr/bin/env bash
# A virtual environment of their own for the peers, with this project in it: benchmarks/.venv
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3.11}" -m venv benchmarks/.venv
pip="benchmarks/.venv/bin/python -m pip install --quiet"
$pip "$(grep '^torch==' constraints.txt)"
$pip -c constraints.txt -e ".[plots]" vector-quantize-pytorch
# dalle-pytorch's own requirements ask for torchvision and tokenizers that do not build any more; what it imports is this:
$pip --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch
$pip "setuptools<81" packaging
echo "ready: benchmarks/.venv/bin/python -m benchmarks.sampling"
