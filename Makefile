# The two commands of the README. Each makes .venv if it is absent, installs with plain pip, and runs.
PYTHON ?= python3
SOURCES := pyproject.toml CMakeLists.txt green_context_lib.py $(shell find csrc semipd traces configs/slo -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: compare test clean

compare: .venv/installed
	.venv/bin/semipd compare

test: .venv/installed-dev
	.venv/bin/pytest

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip $(SOURCES)
	.venv/bin/pip install --quiet --disable-pip-version-check .
	@touch $@

.venv/installed-dev: .venv/bin/pip $(SOURCES)
	.venv/bin/pip install --quiet --disable-pip-version-check '.[dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv build dist
