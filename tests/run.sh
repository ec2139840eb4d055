#!/usr/bin/env bash
# Run the whole test suite, making the environment first if it is missing.
# usage: tests/run.sh [PYTEST OPTION...]        e.g. tests/run.sh -m "not slow" -k patches
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./0_setup_env.sh --dev
source ./env.sh
exec python -m pytest "$@"
