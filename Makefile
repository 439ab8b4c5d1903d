# Thin: every target is a line or two of plain pip and python.
PYTHON ?= python3
PORT ?= 5000
IMAGE ?=
MODEL ?= auto

BIN := .venv/bin
BASE := .venv/.installed
DEV := .venv/.installed-dev

.PHONY: predict test serve lint clean

predict: $(BASE)
	@$(BIN)/python -m convmixer classify --model "$(MODEL)" $(if $(IMAGE),"$(IMAGE)",--sample)

test: $(DEV)
	$(BIN)/python -m pytest

serve: $(DEV)
	$(BIN)/python serve.py --port $(PORT)

lint: $(DEV)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The stamps: pip runs again only when a requirements file has changed.
$(BASE): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEV): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(BASE)

clean:
	rm -rf .venv .cog .pytest_cache .ruff_cache
