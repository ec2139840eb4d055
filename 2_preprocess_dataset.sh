#!/usr/bin/env bash
#PBS -N dlrm-preprocess
#PBS -j oe
#PBS -l walltime=01:00:00
#PBS -r y
# Preprocess Criteo TSV (day_0 .. day_23, plain or .gz) into a dataset folder, on every node of the job.
# usage: qsub -v "DATASET_DIR=...,WORKDIR=..." 2_preprocess_dataset.sh
#        DATASET_DIR=... ./2_preprocess_dataset.sh [PREP OPTION...]         here and now
#        DATASET_DIR=... ./2_preprocess_dataset.sh --submit                 qsub with site.sh's DLRM_QSUB
# variables: DATASET_DIR  folder of the TSV files
#            OUTPUT_DIR   where the dataset goes (default: DATASET_DIR with -npy appended)
#            WORKDIR      the project's folder (default: where this script is, or where qsub was called)
#            NPROC        processes per node (default: its cores)
#            ARGS         more options of python -m dlrm.prep run
set -euo pipefail
die() { echo "2_preprocess_dataset.sh: $*" >&2; exit 2; }
case ${1:-} in -h | --help) sed -n '/^# Pre/,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
[[ ${PBS_ENVIRONMENT:-} != PBS_BATCH ]] || cd "$PBS_O_WORKDIR"    # PBS starts in $HOME, with a copy of this script
# Paths go into logs, traces and reports, which are text of one line each.
for name in WORKDIR DATASET_DIR OUTPUT_DIR; do
    value=${!name:-}
    printf %s "$value" | iconv -f UTF-8 -t UTF-8 > /dev/null 2>&1 \
        || die "$name=$(printf %q "$value") is not UTF-8: name another folder"
    [[ $value != *[[:cntrl:]]* ]] \
        || die "$name=$(printf %q "$value") has a control character in its name: name another folder"
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -e $here/launcher.sh ]] || here=${PBS_O_WORKDIR:-$PWD}
here=$(realpath -m -- "${WORKDIR:-$here}")
if [[ ! -e $here/launcher.sh ]]; then
    [[ -z ${WORKDIR:-} ]] || die "WORKDIR=$here is not the project's folder: it has no launcher.sh"
    die "$here is not the project's folder, it has no launcher.sh: name the folder by WORKDIR"
fi
[[ -n ${DATASET_DIR:-} ]] || die "DATASET_DIR is not set: the folder of day_0 .. day_23; see --help"
[[ -d $DATASET_DIR ]] || die "DATASET_DIR=$DATASET_DIR is not a folder"
from=$(realpath -- "$DATASET_DIR") to=$(realpath -m -- "${OUTPUT_DIR:-${DATASET_DIR%/}-npy}")
mapfile -t args < <(xargs -rn1 printf '%s\n' <<< "${ARGS:-}" 2> /dev/null)
wait "$!" || die "ARGS=$(printf %q "$ARGS"): is a quote left open?"
cd "$here"

if [[ ${1:-} == --submit ]]; then
    ./0_setup_env.sh >&2    # stdout is the job id alone
else
    ./0_setup_env.sh
fi
source ./env.sh
[[ -z ${DLRM_UMASK:-} ]] || umask "$DLRM_UMASK"    # PBS's own is 077
if [[ ${1:-} == --submit ]]; then
    (( $# == 1 )) || die "--submit takes no options: put them into ARGS"
    [[ -n ${DLRM_QSUB:-} ]] || die 'set DLRM_QSUB in site.sh, e.g. "-A PROJECT -q debug -l select=1"'
    read -ra resources <<< "$DLRM_QSUB"
    DATASET_DIR=$from OUTPUT_DIR=$to WORKDIR=$here exec qsub -V "${resources[@]}" "$here/2_preprocess_dataset.sh"
fi
export NPROC=${NPROC:-$(env -u OMP_NUM_THREADS nproc)}
exec ./launcher.sh python -m dlrm.prep run --input_dir "$from" --output_dir "$to" "${args[@]}" "$@"
