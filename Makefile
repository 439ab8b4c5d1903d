# Thin: every target is a line or two of plain pip and python.
PYTHON ?= python3
PORT ?=
IMAGE ?=
MODEL ?= auto
GPU ?=
CPU ?=
COG ?= cog
COG_FLAGS ?=
TAG ?= convmixer$(if $(CPU),-cpu)

BIN := .venv/bin

.PHONY: predict demo test serve container lint clean

predict: .venv/.$(if $(GPU),gpu,core)
	@$(BIN)/python -m convmixer classify --model "$(MODEL)" $(if $(IMAGE),"$(IMAGE)",--sample)

demo: .venv/.demo
	@$(BIN)/python demo/app.py --model "$(MODEL)" $(if $(PORT),--port $(PORT))

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

serve: .venv/.serve
	$(BIN)/python -m serving $(if $(PORT),--port $(PORT))

container:
	$(COG) build $(if $(CPU),-f cog.cpu.yaml) -t $(TAG) $(COG_FLAGS)

lint: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# A stamp for each requirements file: pip runs again only when one has changed.
.venv/.%: requirements/%.txt $(wildcard requirements/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf .venv .cog .pytest_cache .ruff_cache
