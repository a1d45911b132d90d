# The two commands: `make demo` and `make test`. Both set themselves up; see CONTRIBUTING.md for the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test setup test-long bench lint types readme lock clean

demo: setup
	@$(BIN)/python recipes/demo.py

test: setup lint types
	$(BIN)/python -m pytest

test-long: setup
	$(BIN)/python -m pytest -m "long or not long"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/train_cpu.py --json benchmarks/results/train_cpu.json
	$(BIN)/python benchmarks/attention_cpu.py --json benchmarks/results/attention_cpu.json
	$(BIN)/python benchmarks/microbatch_cpu.py --json benchmarks/results/microbatch_cpu.json
	$(BIN)/python benchmarks/deepspeed_cpu.py --json benchmarks/results/deepspeed_cpu.json
	$(BIN)/python benchmarks/tokenizing.py --json benchmarks/results/tokenizing.json
	$(BIN)/python benchmarks/pipeline_bubble.py --json benchmarks/results/pipeline_bubble.json
	$(BIN)/python benchmarks/memory_cpu.py --json benchmarks/results/memory_cpu.json
	$(BIN)/python benchmarks/muon.py --json benchmarks/results/muon.json
	$(BIN)/python benchmarks/serve_kernels_cpu.py --json benchmarks/results/serve_kernels_m160.json
	$(BIN)/python benchmarks/serve_kernels_cpu.py --shape 1b --prompt 64 --json benchmarks/results/serve_kernels_1b.json
	$(BIN)/python benchmarks/serve_step_cpu.py --json benchmarks/results/serve_step_m160.json
	$(BIN)/python benchmarks/serve_cpu.py --json benchmarks/results/serve_cpu.json
	$(BIN)/python benchmarks/serve_cpu.py --prefix --shapes m160 --formats int8 int4 --rounds 1 --json benchmarks/results/serve_prefix.json
	$(BIN)/python benchmarks/serve_speculation_cpu.py --json benchmarks/results/serve_speculation.json
	$(BIN)/python benchmarks/serve_front_cpu.py --json benchmarks/results/serve_front_cpu.json
	$(BIN)/python benchmarks/serve_router_cpu.py --json benchmarks/results/serve_router.json
	$(BIN)/python benchmarks/checkpoint_cpu.py --json benchmarks/results/checkpoint_cpu.json
	$(BIN)/python benchmarks/faults.py --full --json benchmarks/results/faults.json
	$(BIN)/python benchmarks/faults_groups.py --json benchmarks/results/faults_groups.json
	$(BIN)/python benchmarks/diloco_cpu.py --json benchmarks/results/diloco_cpu.json

readme: setup
	$(BIN)/python scripts/readme.py

setup: $(STAMP)

# torch first and alone, so that nothing else decides which build of it is taken; then what constraints.txt pins.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "muster needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $(STAMP)

lock: setup
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
