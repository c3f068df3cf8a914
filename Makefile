PYTHON ?= python3
OLDEST = .venv/transformers-5.17.0
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

.PHONY: demo test lint

demo: .venv/.installed
	.venv/bin/python examples/demo.py

test: .venv/.installed $(OLDEST)
	$(PYTEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST)

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/.installed: pyproject.toml constraints.txt tests/lmms-eval.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	.venv/bin/python -m pip install -q --no-deps -r tests/lmms-eval.txt
	touch $@

# Only Transformers itself: it shares every other package with the newest version.
$(OLDEST): .venv/.installed
	.venv/bin/python -m pip install -q --no-deps --upgrade --target $@ transformers==5.17.0
	touch $@
