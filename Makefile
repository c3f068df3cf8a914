PYTHON ?= python3
OLDEST = .venv/transformers-5.17.0
# What hardly depends on the version of Transformers runs with the newest alone.
ANY_TRANSFORMERS = tests/examples/test_app_in_browser.py tests/examples/test_ask_library.py tests/ops \
	tests/parallel/test_ranks.py tests/video/test_decoding.py tests/video/test_fuzzing.py tests/video/test_index.py \
	tests/video/test_sources.py
# Each process takes neighbouring tests, which share fixtures, and at the end what the other has not begun.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo docs install lint space test test-gpu test-latest

# The package alone: a first look should not wait for what the tests need.
demo: .venv-demo/.installed
	.venv-demo/bin/python examples/demo.py

install: .venv/.installed $(OLDEST)

test: install
	$(PYTEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) $(ANY_TRANSFORMERS:%=--ignore %)

# On a machine with a GPU, with whatever is installed: no file is opened that has no test for it, and needs more. What
# takes much of its memory runs one after another.
test-gpu:
	TRITON_CACHE_AUTOTUNING=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m gpu -n 10 --dist loadgroup \
		$$(grep -rl --include 'test_*.py' 'mark\.gpu' tests)

docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -r docs/requirements.txt
	touch $@

# The page as a folder to upload as a Space, with the package and the tiny model in it. See docs/page.md.
SPACE = build/space
space:
	rm -rf $(SPACE)
	mkdir -p $(SPACE)/examples $(SPACE)/checkpoints
	cp examples/space/* $(SPACE)
	cp examples/app.py examples/ask_video.py examples/find_moment.py examples/synthetic_videos.py $(SPACE)/examples
	cp -r src/transformers_vamba $(SPACE)/examples
	cp -r checkpoints/vamba-tiny $(SPACE)/checkpoints
	find $(SPACE) -name __pycache__ -prune -exec rm -r {} +

# For maintainers, before a release: whatever is newest on PyPI, without constraints and without our own upper bounds.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install -q --no-deps -e .
	.venv-latest/bin/python -m pip install -q --upgrade accelerate av huggingface_hub hypothesis jinja2 numpy packaging \
		peft pillow pytest pytest-xdist safetensors torch torchvision tqdm transformers
	.venv-latest/bin/python -m pip list | grep -iE '^(transformers|torch|torchvision|huggingface_hub|peft) '
	.venv-latest/bin/python examples/demo.py
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n 2 tests/test_compat.py tests/test_modeling_vamba.py \
		tests/test_reference.py tests/cache tests/generation tests/examples/test_tiny_model.py

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/.installed: pyproject.toml constraints.txt tests/lmms-eval.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	.venv/bin/python -m pip install -q --no-deps -r tests/lmms-eval.txt
	touch $@

.venv-demo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install -q -c constraints.txt -e .
	touch $@

# The oldest Transformers, and the packages that it needs in older versions. The rest it shares with the newest.
$(OLDEST): .venv/.installed tests/oldest.txt
	rm -rf $@
	.venv/bin/python -m pip install -q --no-deps --target $@ -r tests/oldest.txt
	touch $@
