# make demo     learn calligraphy from 20 pictures, write it, stroke by stroke and into a painting, in out/calligraphy
# make demo-strokes   learn to write stroke by stroke, and write into a painting, in out/strokes, out/written, out/paintings
# make demo-clip   learn which herb is which, in out/herbs, and answer
# make learn    exercises with checks: the list; make learn N=7 starts one, CHECK=7 checks it, ZH=1 shows it in Chinese
# make test     the tests, offline
# make parity   the tests against diffusers, transformers and open_clip
# make parity-export   exported graphs beside PyTorch, in onnxruntime, openvino and a browser (Python 3.11 or later)
# make bench    speed and memory beside diffusers, transformers, OpenVINO, ONNX Runtime: docs/benchmarks.md
# make faults   training runs killed at random, on two hosts too: is anything lost?
# make fuzz     damaged input for every reader: does it load, or end in one line?
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
CLIP_OUT ?= out/herbs
STROKES_OUT ?= out/strokes
EXPORTS ?= tests/parity_export

# train and data under these names from any folder: --editable knows the packages only
ON_PATH = import os, pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'checkout.pth').write_text(os.getcwd())

.PHONY: setup demo demo-strokes demo-clip learn test parity parity-export faults fuzz bench clean

setup: $(VENV)/base.stamp

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(RUN) -m pip install --quiet --index-url $(TORCH_INDEX) torch torchvision)
	$(RUN) -m pip install --quiet --editable .
	$(RUN) -c "$(ON_PATH)"
	$(RUN) -c "open('$@', 'w')"

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(RUN) -m pip install --quiet --editable ".[test]"
	$(RUN) -c "open('$@', 'w')"

$(VENV)/parity.stamp: $(VENV)/test.stamp
	$(RUN) -m pip install --quiet --editable ".[test,parity]"
	$(RUN) -c "open('$@', 'w')"

$(VENV)/bench.stamp: $(VENV)/parity.stamp
	$(RUN) -m pip install --quiet --editable ".[test,parity,bench]"
	$(RUN) -c "open('$@', 'w')"

demo: $(VENV)/base.stamp
	$(RUN) -m train.train_diffusion --data data/calligraphy --overwrite --out $(DEMO_OUT)
	$(RUN) -m train.train_upscaler --run $(DEMO_OUT)
	$(RUN) -m train.gallery --run $(DEMO_OUT)

demo-strokes: $(VENV)/base.stamp
	$(RUN) -m train.train_diffusion --data data/strokes --steps 400 --batch 56 --overwrite --out $(STROKES_OUT)
	$(RUN) -m train.write --run $(STROKES_OUT) --text 春滿乾坤 --hand 楷書 --seed 7 --out out/written
	$(RUN) -m train.paint --run $(STROKES_OUT) --text 春滿乾坤 --seal 乾坤 --animate --seed 7 --out out/paintings

demo-clip: $(VENV)/base.stamp
	$(RUN) -m train.train_clip --data data/herbs --hold-out artist=twitter --overwrite --out $(CLIP_OUT)
	$(RUN) -m train.search --run $(CLIP_OUT) --text 薑
	$(RUN) -m train.search --run $(CLIP_OUT) --image data/herbs/garlic_twitter.png

learn: $(VENV)/base.stamp
	@$(RUN) docs/learn $(if $(CHECK),check $(CHECK),$(if $(N),start $(N)))

test: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m pytest

parity: $(VENV)/parity.stamp
	$(RUN) -m pytest tests/parity

$(VENV)/export.stamp: $(VENV)/test.stamp
	$(RUN) -c "import sys; sys.exit('onnxruntime needs Python 3.11 or later' if sys.version_info < (3, 11) else 0)"
	$(RUN) -m pip install --quiet --editable ".[test,export]"
	$(RUN) -c "open('$@', 'w')"

parity-export: $(VENV)/export.stamp
	$(RUN) -m pytest $(EXPORTS)

faults: $(VENV)/test.stamp
	$(RUN) -m tests.faults

fuzz: $(VENV)/test.stamp
	$(RUN) -m tests.faults.fuzz

bench: $(VENV)/bench.stamp
	$(RUN) -m tests.bench
	$(RUN) -m tests.bench.training
	$(RUN) -m tests.bench.bench_tokenizer

clean:
	$(RUN) -c "import shutil; [shutil.rmtree(d, True) for d in ('$(VENV)', 'out', '.pytest_cache', '.ruff_cache')]"
