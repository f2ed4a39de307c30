# One command each: make demo, make test. Everything lands in .venv/ and runs/.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO_RUN := runs/shapes


# The GPU kit runs by the Python that has torch for the card; pure-Python packages that it lacks travel in .whl/.
GPU_PYTHON ?= python3
DEVICE ?= cuda
WHEELS_PYTHON ?= 3.12
WHEELS := datasets dill multiprocess jsonargparse filelock

.PHONY: help setup demo test test-fast fmt check docs fonts icons bench gpu gpu-wheels audit lower-bounds clean

help:
	@echo "make demo    set up, train both stages on shapes and generate images (about 15 minutes on two cores)"
	@echo "make test    set up, check the code and run the tests"
	@echo "make test-fast   the same without whole runs and several processes"
	@echo "make check   lint, format and types alone; make fmt mends the first two"
	@echo "make docs    build the documentation site into site/"
	@echo "make fonts   how to install the emoji font and names"
	@echo "make audit   known vulnerabilities of the constrained versions, by pip-audit (asks the network)"
	@echo "make lower-bounds   the fast tests with the oldest versions that pyproject.toml allows, in .venv-lower"
	@echo "make icons   fetch the sets of icons by npm into ~/.cache/mini-dalle/icons"
	@echo "make bench   ours against peers, side by side (see benchmarks/README.md)"
	@echo "make gpu     test and measure everything on a GPU in nine minutes; DEVICE=cpu runs it at a tiny size (see benchmarks/README.md)"

# torch first: at its constrained version the CPU build is enough, and an open range would fetch CUDA packages too.
$(VENV)/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python 3.11 is needed; say which one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

setup: $(VENV)/ready

demo: setup
	$(BIN)/minidalle run --config configs/shapes.yaml
	$(BIN)/minidalle generate --bundle $(DEMO_RUN)/bundle --num-images 4 --out $(DEMO_RUN)/images \
		"a large red circle left of a small blue square on white" "a green star above a yellow heart" "a huge purple ring on black"
	@echo "look at $(DEMO_RUN)/samples/held-out-prompts.png and $(DEMO_RUN)/images/grid.png"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread per worker: two workers of two threads each wait for one another on two cores.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m gpu --device cpu tests/gpu

test-fast: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow and not distributed"

fmt:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Warnings are errors. mkdocs-material's notice of its end of life is none.
docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

fonts:
	@echo "Debian and Ubuntu: apt-get install fonts-noto-color-emoji unicode-cldr-core"
	@echo "elsewhere: give data.emoji.font=PATH/NotoColorEmoji.ttf, and pip install emoji for the names"

icons: setup
	$(BIN)/python -m pipeline.data.builtin.fetch_icons

bench:
	benchmarks/setup_peers.sh
	benchmarks/.venv/bin/python -m benchmarks.stage1_training
	benchmarks/.venv/bin/python -m benchmarks.stage2_training --compile
	benchmarks/.venv/bin/python -m benchmarks.sampling --batch 1 --compile
	benchmarks/.venv/bin/python -m benchmarks.sampling --batch 64 --compile
	benchmarks/.venv/bin/python -m benchmarks.encoding
	benchmarks/.venv/bin/python -m benchmarks.shapes_drawing

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu_kit --device $(DEVICE)

# For another machine: of any platform, for Python $(WHEELS_PYTHON), at the constrained versions.
gpu-wheels:
	rm -rf .whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --dest .whl \
		$(foreach name,$(WHEELS),"$$(grep -m1 '^$(name)==' constraints.txt)")
	@ls -l .whl

# In an environment of its own: its packages are none of this project's.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit>=2.9"
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lower-bounds:
	$(PYTHON) -m venv .venv-lower
	$(PYTHON) -m tests.helpers.lower_bounds > .venv-lower/constraints.txt
	.venv-lower/bin/python -m pip install --quiet "$$(grep '^torch==' .venv-lower/constraints.txt)"
	.venv-lower/bin/python -m pip install --quiet -c .venv-lower/constraints.txt -e ".[dev,emoji]"
	OMP_NUM_THREADS=1 .venv-lower/bin/python -m pytest -q -n auto -m "not slow and not distributed"

clean:
	rm -rf $(VENV) .venv-audit .venv-lower build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
