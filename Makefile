# Two commands do everything on a fresh machine: `make demo` and `make test`. `make bench` measures.

PYTHON ?= python3
RUN := .venv/bin/python -m

.PHONY: install demo test lint unit integration e2e chaos bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(RUN) jobs.demo

test: lint unit integration e2e

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

unit integration e2e: install
	$(RUN) pytest -n 2 --dist worksteal tests/$@

chaos: install
	$(RUN) pytest tests/integration/test_train_faults.py --rounds 3
	$(RUN) pytest tests/integration/test_score_faults.py --rounds 30

bench: install
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(RUN) tests.benchmarks.audit
	$(RUN) tests.benchmarks.fit
	$(RUN) tests.benchmarks.train
	$(RUN) tests.benchmarks.search cache
	$(RUN) tests.benchmarks.search tune
	$(RUN) tests.benchmarks.score

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
