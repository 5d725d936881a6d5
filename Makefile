# The two commands: `make demo` and `make test`. Everything else is Snakemake (see README.md).
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test lint unit browser slurm bench verify lock clean

demo: $(STAMP)  ## the default experiment and its report
	$(BIN)/snakemake --cores all
	$(BIN)/snakemake --report report.html
	@echo "Open report.html in a browser; every file of it lies under results/."

test: lint unit  ## linters and all tests that need nothing but pip

$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headroom: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not browser and not slurm" -n 2

browser: $(STAMP)  ## the report in headless Chromium (Debian: chromium chromium-driver)
	$(BIN)/python -m pytest -m browser

slurm: $(STAMP)  ## the workflow on a private SLURM of two nodes (root on Debian; skipped elsewhere)
	$(BIN)/python -m pytest -m slurm -rs --durations 0

bench: $(STAMP)  ## speed beside the alternative, in one run
	$(BIN)/python benchmarks/similarity.py
	$(BIN)/python benchmarks/ffn.py
	$(BIN)/python benchmarks/branch_layout.py
	$(BIN)/python benchmarks/branches.py
	$(BIN)/python benchmarks/gradients.py

verify: $(STAMP)  ## the hashes of everything that is recorded under results/
	PYTHONPATH=src $(BIN)/python -m headroom.verify results

lock:  ## write requirements.lock anew from pyproject.toml
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet '.[test,browser]'
	{ sed -n 1p requirements.lock; build/lock/bin/python -m pip freeze --exclude headroom-workflow | sed 's/+cpu$$//'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf results .snakemake report.html build
