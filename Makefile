# Everything starts here: `make demo` goes from a fresh clone to a model that writes. `make` lists the targets.
PYTHON ?= python3
RUN := runs/demo
# All GPUs where there are any, else two processes that share the CPU.
RANKS := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' || echo --num_gpus 2)
# bf16 on GPUs and on CPUs with bf16 arithmetic (1.6x the speed of fp32 there); fp32 on other CPUs.
BF16 := $(shell { nvidia-smi -L 2>/dev/null; cat /proc/cpuinfo; } | grep -qE '^GPU|avx512_bf16|amx_bf16' && echo true || echo false)

# The recipes call the programs of .venv by their bare names.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test check clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## make .venv with all that running, testing and checking need; PYTHON=..., TORCH_INDEX=URL
	@$(PYTHON) tools/install.py

demo: install  ## prepare a corpus, pretrain the tiny model, plot, measure, generate; about 7 minutes on 2 cores
	@echo "== 1/5 The corpus: source and docs of this Python installation, and a tokenizer trained on them"
	python tools/preprocess_data.py
	@echo "== 2/5 Pretraining the tiny model; an interrupted run resumes, a finished one stays unchanged"
	$(if $(RANKS),DS_ACCELERATOR=cpu) deepspeed --quiet $(RANKS) launchers/pretrain.py --deepspeed_config ds_configs/cpu_demo.json --bf16.enabled $(BF16)
	@echo "== 3/5 Bits per byte of held-out text, compared with gzip and xz on the same bytes"
	python launchers/evaluate.py --checkpoint $(RUN)
	@echo "== 4/5 The loss curve, $(RUN)/loss.png, and spectra of the weights, $(RUN)/spectra.png"
	python tools/analyze_checkpoints.py --run-dir $(RUN)
	@echo "== 5/5 What the model writes"
	python launchers/generate.py --checkpoint $(RUN) --prompt "class Test"
	python launchers/generate.py --checkpoint $(RUN) --prompt "    def __init__(self, "

test: install  ## run every test
	pytest tests

check: install  ## formatting, lint, types, import directions, words
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	python tools/check_names.py

clean:  ## remove build products and caches; data/, runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find megatronish csrc launchers tools tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find megatronish csrc -name '*.so' -delete 2>/dev/null || true
	rm -f .venv/megatronish-install.json
	@echo "Kept: data/ and runs/ (yours to delete) and .venv/ (make distclean)."

distclean: clean  ## clean, and remove .venv
	rm -rf .venv
