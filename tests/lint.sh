#!/usr/bin/env bash
# Everything that is checked without running: make lint, CI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./env.sh
ruff check .
ruff format --check .
pyright
shell=([0-9]_*.sh launcher.sh scripts/*.sh sites/*.sh patches/*.sh tests/*.sh .ci/run)
shellcheck "${shell[@]}"
if grep -nE '^.{101}' "${shell[@]}"; then
    echo "tests/lint.sh: these lines of shell have more than 100 columns" >&2
    exit 1
fi
