# The two commands of the README. Both work on a machine that has only Python (3.11 or newer), venv and a network.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A file's tests stay together: many start processes of their own, or share what was costly to make.
WORKERS := -n logical --maxprocesses=4 --dist loadfile

.PHONY: run test test-peers lint clean

run: $(VENV)/.installed                     ## make a small Llama 3.1 from raw text, and a report about it
	$(BIN)/puna run tiny

test: $(VENV)/.installed-test               ## all tests that need no accelerator
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-peers: $(VENV)/.installed-peers        ## what compares us with peers that compile first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m peers

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}")'
	$(PYTHON) -m venv $(VENV)

# The CPU build of PyTorch first, where the index has one: it is a tenth of the size of the CUDA build.
# Installing compiles the C++ kernels, where there is a compiler.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml setup.py $(wildcard puna/kernels/native/*.cpp puna/kernels/native/*.h)
	$(BIN)/python -m pip install -q -e ".[all]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

# llama.cpp compiles, about four minutes on two cores; without its image models, which nothing here uses.
$(VENV)/.installed-peers: $(VENV)/.installed-test
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 $(BIN)/python -m pip install -q -e ".[peers]"
	touch $@

clean:
	rm -rf $(VENV) out
