# make demo     TF-0001 on DeepSpeed 0.18.9: diagnosis, proof, picture (demo/output/)
# make test     lint, types, the whole test suite
# make check    lint, types and the fast tests
# make matrix   the experiments on every DeepSpeed release and every band of the trainers; goes on where it was stopped
# make both     the loss and the optimizer repaired one by one, in four stacks (docs/both-together.json, .png)
# make ledger   how well the ledger finds: the catalogue's errors again, and faults of our own (docs/ledger.md)
# make bench    what the gradient copy costs: counted, and timed on this machine's CPU; the report with its charts
# make clean    remove what these commands made in the checkout
#
# PYTHON=...       the interpreter to build .venv with (default: python3.11, else python3)
# TORCH_INDEX=...  the package index to take torch from (default: see tools/setup.py)

.PHONY: demo test check matrix both ledger bench lint types releases environment clean
BIN := .venv/bin
DEMO := .venv/demo/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

demo:
	@sh tools/python.sh tools/setup.py demo
	@$(DEMO)/python demo/run.py

test: lint types releases
	$(PYTEST)

check: lint types releases
	$(PYTEST) -m "not slow"

matrix: environment
	$(BIN)/python -m tests.matrix

both: environment
	PYTHONPATH=. $(BIN)/python benchmarks/both_together.py

ledger: releases
	$(BIN)/python -m tests.ledger.mutations --json docs/ledger-mutations.json
	$(BIN)/python -m tests.ledger.refind

bench: releases
	PYTHONPATH=. $(BIN)/python benchmarks/counters.py
	PYTHONPATH=. $(BIN)/python benchmarks/host_accumulate.py
	PYTHONPATH=. $(BIN)/python -m benchmarks.report

lint: environment
	$(BIN)/ruff check .

types: environment
	$(BIN)/mypy

releases: environment
	$(BIN)/python -m tests.support.releases

environment:
	@sh tools/python.sh tools/setup.py test

clean:
	rm -rf .venv demo/output dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
