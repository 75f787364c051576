# Two commands do everything on a fresh machine: `make demo` and `make test`. `make bench` measures.

PYTHON ?= python3
RUN := .venv/bin/python -m

.PHONY: install demo test lint unit integration e2e chaos bench lock audit sbom clean

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

unit integration: install
	$(RUN) pytest -n 2 --dist worksteal tests/$@

e2e: install
	$(RUN) pytest -n 2 --dist loadfile tests/$@

chaos: install
	$(RUN) pytest tests/integration/test_train_faults.py --rounds 4 --timeout 7200
	$(RUN) pytest tests/integration/test_score_faults.py --rounds 30 --timeout 14400
	$(RUN) pytest tests/integration tests/e2e -m chaos --timeout 7200

bench: install
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(RUN) tests.benchmarks.audit
	$(RUN) tests.benchmarks.fit
	$(RUN) tests.benchmarks.train
	$(RUN) tests.benchmarks.search cache
	$(RUN) tests.benchmarks.search tune
	$(RUN) tests.benchmarks.decode
	$(RUN) tests.benchmarks.fetch
	$(RUN) tests.benchmarks.score
	$(RUN) tests.benchmarks.scale
	$(RUN) tests.benchmarks.report

# What goes into the image, with hashes; whether any of it is known to be vulnerable; a bill of it.
LOCK := infra/image/requirements.txt

.tools/.installed:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1 uv==0.13.9
	touch $@

lock: .tools/.installed
	.tools/bin/uv pip compile --quiet --no-build --generate-hashes --no-annotate --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock' -c constraints.txt \
		--extra export --extra openvino --extra optuna --extra timm pyproject.toml -o $(LOCK)

audit: .tools/.installed
	.tools/bin/pip-audit --strict --disable-pip --require-hashes -r $(LOCK)

sbom: .tools/.installed
	mkdir -p dist
	.tools/bin/cyclonedx-py requirements $(LOCK) --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json

clean:
	rm -rf .tools .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
