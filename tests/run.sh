#!/usr/bin/env bash
# Run the whole test suite, making the environment first if it is missing.
# usage: tests/run.sh [PYTEST OPTION...]
#        e.g. tests/run.sh -k patches; -m slow: fuzzing and kills
#        Without options two files of tests run at a time: much of the time is waiting.
#        pytest's own options: source env.sh && pytest --help
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./0_setup_env.sh --dev
source ./env.sh
(( $# > 0 )) || set -- -n 2 --dist loadfile
exec python -m pytest "$@"
