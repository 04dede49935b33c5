# Every target sets itself up: the first makes .venv, later ones find its stamp and start at once.
# Another interpreter (3.11 to 3.13): make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The same packages under the oldest Triton that is supported.
OLDEST_TRITON := 3.6.0
OVERLAY := .venv-triton36
# Seconds that `make gpu-report` may spend on timing.
BUDGET ?= 540
OVERLAY_READY := $(OVERLAY)/.ready

PIP := $(BIN)/python -m pip --disable-pip-version-check
# Many small tensors: one thread in each of several workers beats several pools of threads.
PYTEST := -P -m pytest -q -n auto --maxprocesses 8 -m 'not slow'
# tests/conftest.py runs the interpreter's tests where this is set, and the others where it is not.
unexport TRITON_INTERPRET
INTERPRET := OMP_NUM_THREADS=1 TRITON_INTERPRET=1

.DEFAULT_GOAL := help
.PHONY: help cuda demo test test-torch test-interpreter test-oldest-triton lint aot bench gpu-report
.PHONY: validate clean

help:
	@echo 'make demo      two real models through bertgpt, side by side with transformers'
	@echo 'make test      the suite: torch, then Triton kernels by interpreter on two Triton versions'
	@echo 'make validate  error of every op, backend and dtype against the float64 reference'
	@echo 'make bench     every op and model beside its peers, into out/; MiniLM on a CPU against stock'
	@echo 'make gpu-report  all that a GPU can testify, by the system Python (BUDGET=540 TUNE=1 STAGES=… OUT=out)'
	@echo 'make aot       every committed Triton config compiled for each architecture, without a GPU'
	@echo 'make cuda      builds the CUDA C++ kernels here (needs nvcc), and checks csrc/resources.txt'
	@echo 'make lint      ruff and mypy'
	@echo 'make clean     removes both virtual environments'

demo: $(READY)
	$(BIN)/bertgpt demo

test: test-torch test-interpreter test-oldest-triton

test-torch: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-interpreter: $(READY)
	$(INTERPRET) $(BIN)/python $(PYTEST)

# Mutants try the tests, not Triton: once is enough.
test-oldest-triton: $(OVERLAY_READY)
	$(INTERPRET) $(OVERLAY)/bin/python $(PYTEST) --ignore-glob='*mutants*'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cuda: $(READY)
	$(BIN)/python csrc/build.py --check-resources

aot: $(READY)
	$(BIN)/python benchmarks/aot.py --check

bench: $(READY)
	$(BIN)/bertgpt bench
	$(BIN)/python benchmarks/bench_encode_cpu.py

# No virtual environment and no network: the machine's own Python, torch and nvcc.
gpu-report:
	PYTHONPATH=. $(PYTHON) -P -m bertgpt.benchmarks.gpu_report --budget $(BUDGET) $(if $(TUNE),--tune) \
	  $(if $(STAGES),--stages $(STAGES))

validate: $(READY)
	$(BIN)/bertgpt validate

clean:
	rm -rf $(VENV) $(OVERLAY)

# .incomplete stands while an installation runs; one that was cut short is thrown away and made anew.
# torch goes first, so that its build (CPU, or CUDA where the index serves it) settles the rest.
$(READY): pyproject.toml setup.py constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@if [ -e $(VENV)/.incomplete ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.incomplete
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools torch
	BERTGPT_BUILD_CUDA=0 $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --no-deps -r requirements-demo.txt
	@rm $(VENV)/.incomplete && touch $@

# addsitedir makes everything of .venv importable, after the overlay's own Triton.
$(OVERLAY_READY): $(READY)
	rm -rf $(OVERLAY)
	$(BIN)/python -m venv --without-pip $(OVERLAY)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(OVERLAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(PIP) --python $(OVERLAY)/bin/python install --no-deps triton==$(OLDEST_TRITON)
	@touch $@
