# The commands of a working day.
.PHONY: setup test lint format check

setup:     # the environment with what the tests need
	./0_setup_env.sh --dev

test:      # every test
	tests/run.sh

lint:      # ruff, pyright, shellcheck
	tests/lint.sh

format:    # what ruff can put right by itself
	bash -c 'source ./env.sh && ruff check --fix . && ruff format .'

check: lint test
