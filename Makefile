# make demo     TF-0001 on DeepSpeed 0.18.9: diagnosis, proof, picture (demo/output/)
# make test     lint, types, the whole test suite
# make check    lint, types and the fast tests
# make matrix   the experiments on every DeepSpeed release and every band of the trainers; goes on where it was stopped
# make both     the loss and the optimizer repaired one by one, in four stacks (docs/both-together.json, .png)
# make clean    remove what these commands made in the checkout
#
# PYTHON=...       the interpreter to build .venv with (default: python3.11, else python3)
# TORCH_INDEX=...  the package index to take torch from (default: see tools/setup.py)

.PHONY: demo test check matrix both lint types releases environment clean
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
