# The commands anyone needs. Each installs what is missing first; `make help` lists them.
#
#   make run   [MODEL=models/docs-llama-7m] [PORT=3000] [ARGS="--num-shard 2"]
#   make install [TORCH_INDEX_URL=...]      another index for torch, for example one with CPU-only wheels

MODEL ?= models/docs-llama-7m
PORT ?= 3000
ARGS ?=
TORCH_INDEX_URL ?=

# Tests of Python that run at a time; each takes about one core and one gigabyte.
JOBS ?= 2

VENV := .venv
PYTHON := $(VENV)/bin/python
CARGO := PATH="$$HOME/.cargo/bin:$$PATH" cargo
export TORCH_INDEX_URL
export GIT_COMMIT := $(shell . scripts/common.sh && echo "$$GIT_COMMIT")

.PHONY: help install uninstall wheel docs run check check-rust check-python test test-amx test-emulated test-gpu test-full test-rust test-python test-integration matrix simulate bench clean

help:
	@echo "make install   everything that is needed, into $(VENV)/ and target/ (only what is missing)"
	@echo "make run       serve MODEL=$(MODEL) on PORT=$(PORT) and stream an answer; Ctrl-C ends it"
	@echo "make test      every test: Rust, Python, integration"
	@echo "make test-amx  tests that need a processor with AMX"
	@echo "make test-emulated  those of AVX-512's products, on any processor with AVX2"
	@echo "make test-gpu  tests that need an NVIDIA GPU"
	@echo "make test-full the Python and integration tests with every type and number of shards"
	@echo "make check     the fast lints: rustfmt, clippy, ruff, mypy, tidy"
	@echo "make matrix    write the support matrix of docs/quantization.md from the tests"
	@echo "make simulate  a million random schedules of the scheduler (COUNT=..., FIRST=...)"
	@echo "make bench     the benchmarks; see benchmark/README.md"
	@echo "make wheel     dist/*.whl: everything, for pip install"
	@echo "make docs      the documentation as pages, to site/"
	@echo "make clean     remove what was built; make uninstall is the same"

install:
	@scripts/install.sh

run: install
	@$(PYTHON) scripts/run.py --model "$(MODEL)" --port "$(PORT)" -- $(ARGS)

check: check-rust check-python

check-rust: install
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --release --workspace --all-targets --all-features -- -D warnings

check-python: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	cd server && ../$(PYTHON) -m mypy
	$(PYTHON) -m mkdocs build --strict --quiet
	$(PYTHON) -m pytest -q server/tests/test_tidy.py
	$(PYTHON) -m pytest -q integration-tests/test_tidy.py

test: install test-rust test-python test-integration

test-rust: install
	$(CARGO) --config scripts/tests.toml test --locked --release --workspace
	$(CARGO) --config scripts/tests.toml test --locked --release -p scheduler --features planted-bugs --test planted_bugs

test-python: install
	$(PYTHON) -m pytest -n $(JOBS) server/tests

test-integration: install
	$(PYTHON) -m pytest -n $(JOBS) --dist loadfile integration-tests

# On a processor with AMX: its products beside the emulation of its instructions, and against plain arithmetic.
test-amx: install
	AMX=1 $(PYTHON) -m pytest -n $(JOBS) server/tests/kernels server/tests/quantization

# On any processor with AVX2: what needs AVX-512, over an emulation of its instructions.
test-emulated: install
	EMULATE_AVX512=1 $(PYTHON) -m pytest -n $(JOBS) server/tests/kernels server/tests/quantization

test-gpu: install
	$(PYTHON) -m pytest server/tests/kernels/cuda/gpu_checks.py

# With every type and number of shards where `make test` takes a sample.
test-full: install
	FULL=1 $(PYTHON) -m pytest -n $(JOBS) server/tests
	FULL=1 $(PYTHON) -m pytest -n $(JOBS) --dist loadfile integration-tests

matrix: install
	$(PYTHON) scripts/support_matrix.py

# A million schedules take about ten minutes on one core.
simulate: COUNT ?= 1000000
simulate: FIRST ?= 0
simulate:
	FIRST=$(FIRST) COUNT=$(COUNT) $(CARGO) test --locked --release -p scheduler --test simulation -- --nocapture

bench: install
	$(PYTHON) benchmark/run_all.py

wheel:
	@scripts/wheel.sh

docs: install
	$(PYTHON) -m mkdocs build --strict --quiet

# Nothing is ever written outside of this folder, but for packages of the system and the Rust toolchain.
uninstall: clean

clean:
	rm -rf target dist site $(VENV) server/build server/*.egg-info server/text_generation_server/pb
	rm -f server/THIRD_PARTY_NOTICES server/text_generation_server/kernels/cpu/native/libkernels.so server/text_generation_server/kernels/cpu/native/libkernels.stamp
	rm -rf $(foreach name,.hypothesis .pytest_cache .mypy_cache .ruff_cache,$(name) */$(name))
	find . -name __pycache__ -prune -exec rm -rf {} +
