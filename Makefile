# Everything runs in a virtual environment of its own, with the versions of requirements.lock.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)
# One thread unless a process asks for more; without it torchrun warns about the same choice.
export OMP_NUM_THREADS ?= 1
export DVC_NO_ANALYTICS := 1

.PHONY: setup lint repro test verify bench

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
		f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m gpt2.report.plots_page
	touch $@

repro: setup  ## the whole pipeline at the scale of params.yaml
	dvc repro
	@$(MAKE) --no-print-directory dvc.lock.processor.json

# The bits of the results depend on the processor, so its kind is recorded next to the lock.
dvc.lock.processor.json: dvc.lock
	python -m tools.verify --record
	@touch $@

lint: setup  ## style, format and types of the code
	ruff check .
	ruff format --check .
	mypy

test: setup  ## the test suite, a file of it to a process
	python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

verify: setup  ## rebuild in a temporary clone and compare with dvc.lock
	python -m tools.verify

bench: setup  ## the benchmarks; NANOGPT=folder of nanoGPT adds a baseline, HELLASWAG=file its items, TEXT=folder of Parquet
	python -m bench $(if $(NANOGPT),--nanogpt $(NANOGPT))
	python -m bench.generate $(if $(NANOGPT),--nanogpt $(NANOGPT))
	python -m bench.hellaswag $(if $(HELLASWAG),--items $(HELLASWAG))
	$(if $(TEXT),python -m bench.prepare $(TEXT))
	$(if $(TEXT),python -m bench.tokenize $(wildcard $(TEXT)/*.parquet))
	python -m bench.heads
	python -m bench.prune
