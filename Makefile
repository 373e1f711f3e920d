# make demo     learn calligraphy from 20 pictures and write, in out/calligraphy
# make test     the tests, offline
# make parity   the tests against diffusers, transformers and open_clip
# make bench    speed and memory beside diffusers
# make setup    only build .venv (every verb does so when it is missing or out of date)
#
# PYTHON=python3.12               another Python
# TORCH_INDEX=URL                 a wheel index for torch and torchvision, such as PyTorch's own CPU-only one

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
RUN := $(BIN)/python
DEMO_OUT ?= out/calligraphy

.PHONY: setup demo test parity bench clean

setup: $(VENV)/base.stamp

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(RUN) -m pip install --quiet --index-url $(TORCH_INDEX) torch torchvision)
	$(RUN) -m pip install --quiet --editable .
	$(RUN) -c "open('$@', 'w')"

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(RUN) -m pip install --quiet --editable ".[test]"
	$(RUN) -c "open('$@', 'w')"

$(VENV)/parity.stamp: $(VENV)/test.stamp
	$(RUN) -m pip install --quiet --editable ".[test,parity]"
	$(RUN) -c "open('$@', 'w')"

demo: $(VENV)/base.stamp
	$(RUN) -m train.train_diffusion --data data/calligraphy --out $(DEMO_OUT)
	$(RUN) -m train.sample --run $(DEMO_OUT) --prompt "春 草書" --count 20 --seed 7 --out $(DEMO_OUT)/written

test: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m pytest

parity: $(VENV)/parity.stamp
	$(RUN) -m pytest tests/parity

bench: $(VENV)/parity.stamp
	$(RUN) -m tests.bench

clean:
	$(RUN) -c "import shutil; [shutil.rmtree(d, True) for d in ('$(VENV)', 'out', '.pytest_cache', '.ruff_cache')]"
