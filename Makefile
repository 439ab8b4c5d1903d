# Thin: every target is a line or two of plain pip and python.
PYTHON ?= python3
PORT ?=
IMAGE ?=
MODEL ?= auto

BIN := .venv/bin
BASE := .venv/.installed
DEMO := .venv/.installed-demo
DEV := .venv/.installed-dev

.PHONY: predict demo test serve lint clean

predict: $(BASE)
	@$(BIN)/python -m convmixer classify --model "$(MODEL)" $(if $(IMAGE),"$(IMAGE)",--sample)

demo: $(DEMO)
	@$(BIN)/python demo/app.py --model "$(MODEL)" $(if $(PORT),--port $(PORT))

test: $(DEV)
	$(BIN)/python -m pytest

serve: $(DEV)
	$(BIN)/python serve.py $(if $(PORT),--port $(PORT))

lint: $(DEV)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The stamps: pip runs again only when a requirements file has changed.
$(BASE): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEMO): requirements.txt requirements-demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@touch $@ $(BASE)

$(DEV): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(BASE) $(DEMO)

clean:
	rm -rf .venv .cog .pytest_cache .ruff_cache
