# make help lists the targets. Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
REPS ?= 3                            # runs of each trainer, of which `make bench` takes the median
BIN := .venv/bin
export DS_BUILD_OPS := 0            # deepspeed compiles what it needs when it needs it
export GOMP_SPINCOUNT := 10000       # threads wait awake for the next product, but not for long: workers need the cores

.DEFAULT_GOAL := help
.PHONY: help install demo demo-cnn test test-slow test-kill test-strategies test-engines check format docs bench bench-folders bench-demo clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: .venv/installed ## set up .venv with everything in it

demo: .venv/installed ## teach a small vision-language model to see: pretrain, fine-tune, report (CPU, minutes)
	$(BIN)/python -m vlm_tune stage=pretrain
	$(BIN)/python -m vlm_tune stage=finetune

demo-cnn: .venv/installed ## the same with a convolutional vision encoder
	$(BIN)/python -m vlm_tune stage=pretrain model=demo_cnn
	$(BIN)/python -m vlm_tune stage=finetune model=demo_cnn

test: .venv/installed ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow and not network and not kill and not strategies"

test-slow: .venv/installed ## run the tests that take minutes
	$(BIN)/python -m pytest -m "slow or network"

test-kill: .venv/installed ## run the tests that kill runs and go on with them; TRUST='--kills 100 --ddp-kills 20 --soak 20000' measures too
	$(BIN)/python -m pytest -m kill
	$(if $(TRUST),$(BIN)/python benchmarks/trust.py $(TRUST))

test-strategies: .venv/installed ## train under every strategy with two processes, and keep the differences from one process
	VLM_TUNE_TRUST=benchmarks/results/trust.json $(BIN)/python -m pytest -m strategies

test-engines: .venv/installed ## run the tests that ask an independent engine; VLM_TUNE_DEMO_RUN=RUN asks the trained demo too
	$(BIN)/python -m pip install --quiet 'xllamacpp==2026.10.11549'
	$(BIN)/python -m pytest -m engines

check: .venv/installed ## lint, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell vlm_tune conf data_recipes docs tests benchmarks README.md CHANGELOG.md CONTRIBUTING.md

format: .venv/installed ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed ## write docs/configuration.md and the tree of README.md anew
	$(BIN)/python docs/write_configuration.py
	$(BIN)/python docs/write_tree.py

bench: bench-folders .venv/installed ## measure beside other trainers: PEERS=FOLDER of their bench.py, WORK=FOLDER that its setup.sh built, REPS=3
	$(BIN)/python benchmarks/speed.py --peers '$(PEERS)' --work '$(WORK)' --reps $(REPS)
	$(BIN)/python benchmarks/pairs_speed.py --work '$(WORK)' --reps $(REPS)
	$(BIN)/python benchmarks/growth.py

bench-folders:
	@test -f '$(PEERS)/bench.py' && test -d '$(WORK)' || { echo 'make bench PEERS=FOLDER WORK=FOLDER: the first holds bench.py, the second what setup.sh built'; exit 2; }

bench-demo: .venv/installed ## measure three seeds of both demos, and tiles
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/tiles.py

clean: ## remove the environment, caches and build output (runs/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
