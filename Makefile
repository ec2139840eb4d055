# Shortcuts for contributors.
.PHONY: setup test lint format check lock audit

setup:     # the environment with what the tests need
	./0_setup_env.sh --dev

test:      # every test
	tests/run.sh

lint:      # ruff, pyright, shellcheck
	tests/lint.sh

format:    # what ruff can fix by itself
	bash -c 'source ./env.sh && ruff check --fix . && ruff format .'

lock:      # the hashes of the pins, after a change in requirements/*.txt
	bash -c 'source ./env.sh && python requirements/lock.py'

audit:     # are security advisories known for pinned versions? (skipped without a network)
	bash -c 'source ./env.sh && python requirements/audit.py'

check: lint test
