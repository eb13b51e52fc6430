# The two commands: `make demo` and `make test`. Both make .venv first when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests at a time: one a core. Most start ranks of their own, so more than eight only disturb each other.
JOBS ?= logical
# Ranks of the demo: the GPUs, or else the cores of this machine, two at least and four at most.
RANKS ?= $(shell $(BIN)/python -c "import os, torch; print(torch.cuda.device_count() or min(4, max(2, os.cpu_count() or 1)))" 2>/dev/null)

.PHONY: demo test soak parity storm lint clean

demo: $(VENV)/.ready
	rm -rf runs/demo
	$(BIN)/dsyolo sample sample
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --num_gpus $(RANKS) dsyolo/train.py \
	    --deepspeed_config ds_configs/demo.json --data sample/data.yaml --model yolov5n --imgsz 160 \
	    --epochs 14 --warmup_min_images 640 --val_every 2 --mosaic 0 --cache ram --name demo
	$(BIN)/dsyolo detect --weights runs/demo/weights/best.safetensors --out runs/demo/detections sample/images/val
	$(BIN)/dsyolo val --weights runs/demo/weights/best.safetensors --data sample/data.yaml
	@echo "Pictures: runs/demo/detections/*.jpg, runs/demo/predictions.jpg, runs/demo/results.png"

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8

soak: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 -m soak

parity: $(VENV)/.ready
	$(BIN)/python tests/support/parity.py

storm: $(VENV)/.ready
	$(BIN)/python tests/support/storm.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs sample
