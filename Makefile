# FactScope: `make` lists what there is. Needs Python 3.11 or later (venv, pip), git and make; everything else goes
# into .venv. PIP_ARGS="..." is handed to pip, for example to choose another build of torch.

PORT ?= 8501
ADDRESS ?= 127.0.0.1
WORKERS ?= 2
ARGS ?=
SEEDS ?= 1 2
DEMO ?= $(HOME)/.cache/factscope/demo
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.14; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done)
VENV_PYTHON := .venv/bin/python
PREPARE = $(or $(PYTHON),$(error FactScope needs Python 3.11 or later, and none is on PATH: install one, or say PYTHON=/path/to/python)) tools/prepare.py

.DEFAULT_GOAL := help
.PHONY: help run test check format bench demo screenshots clean
# One target at a time, in the order given: they share .venv.
.NOTPARALLEL:

help:
	@echo "FactScope: how a language model recalls one fact"
	@echo
	@echo "  make run          start the dashboard at http://$(ADDRESS):$(PORT) (PORT=, ADDRESS=)"
	@echo "  make test         all tests: first those without a browser, then those in one"
	@echo "  make check        format, lint, types, imports"
	@echo "  make format       rewrite the code in the house's format"
	@echo "  make bench        speed against one forward per cell and other libraries (a quarter of an hour; ARGS=--quick)"
	@echo "  make demo         train the bundled model again and measure it (an hour or more a seed; SEEDS=, DEMO=)"
	@echo "  make screenshots  pictures of every page, light and dark, into docs/screenshots"
	@echo "  make clean        remove caches and build outputs (.venv stays)"
	@echo
	@echo "The first run makes .venv and installs requirements.txt; later ones start at once."

run:
	@$(PREPARE) run
	@echo "Starting http://$(ADDRESS):$(PORT) (stop with Ctrl-C)"
	@exec $(VENV_PYTHON) -m factscope serve --address $(ADDRESS) --port $(PORT) $(ARGS)

test:
	@$(PREPARE) test browser
	@echo "Tests without a browser, on $(WORKERS) workers"
	@$(VENV_PYTHON) -m pytest -n $(WORKERS) -m "not browser" $(ARGS)
	@echo "Tests in a browser"
	@$(VENV_PYTHON) -m pytest -m browser $(ARGS)

check:
	@$(PREPARE) test
	@echo "ruff format"; $(VENV_PYTHON) -m ruff format --check .
	@echo "ruff check"; $(VENV_PYTHON) -m ruff check .
	@echo "pyright"; PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV_PYTHON) -m pyright
	@echo "import-linter"; .venv/bin/lint-imports --no-logo

format:
	@$(PREPARE) test
	@$(VENV_PYTHON) -m ruff format .
	@$(VENV_PYTHON) -m ruff check --fix .

bench:
	@$(PREPARE) run
	@$(VENV_PYTHON) -m benchmarks $(ARGS)

demo:
	@$(PREPARE) run
	@for seed in $(SEEDS); do \
		echo "Training with seed $$seed in $(DEMO)/seed$$seed (a run that was stopped goes on)" && \
		$(VENV_PYTHON) -m factscope.demo.train --seed $$seed --out "$(DEMO)/seed$$seed" --resume $(ARGS) && \
		echo "Measuring it into $(DEMO)/seed$$seed.json" && \
		$(VENV_PYTHON) -m factscope.demo.measure --model "$(DEMO)/seed$$seed/model" --out "$(DEMO)/seed$$seed.json" \
		|| exit 1; done
	@echo "The shipped model is as it was. To ship the new one: copy $(DEMO)/seed1/model to factscope/demo/model,"
	@echo "then python -m factscope.demo.card with the measured files puts the figures into the card."

screenshots:
	@$(PREPARE) test browser
	@$(VENV_PYTHON) -m tools.screenshots $(ARGS)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache test-artifacts
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Caches and build outputs removed. .venv stays; remove it by hand to begin anew."
