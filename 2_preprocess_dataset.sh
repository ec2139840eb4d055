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
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -e $here/launcher.sh ]] || here=${PBS_O_WORKDIR:-$PWD}
here=$(realpath -m -- "${WORKDIR:-$here}")
[[ -e $here/launcher.sh ]] || die "WORKDIR=$here is not the project's folder: it has no launcher.sh"
[[ -n ${DATASET_DIR:-} ]] || die "DATASET_DIR is not set: the folder of day_0 .. day_23; see --help"
[[ -d $DATASET_DIR ]] || die "DATASET_DIR=$DATASET_DIR is not a folder"
from=$(realpath -- "$DATASET_DIR") to=$(realpath -m -- "${OUTPUT_DIR:-${DATASET_DIR%/}-npy}")
cd "$here"

./0_setup_env.sh
source ./env.sh
[[ -z ${DLRM_UMASK:-} ]] || umask "$DLRM_UMASK"    # PBS's own is 077
if [[ ${1:-} == --submit ]]; then (( $# == 1 )) || die "--submit takes no options: put them into ARGS"
    read -ra resources <<< "${DLRM_QSUB:?2_preprocess_dataset.sh: set DLRM_QSUB in site.sh, e.g. \"-A PROJECT -q debug -l select=1\"}"
    DATASET_DIR=$from OUTPUT_DIR=$to WORKDIR=$here exec qsub -V "${resources[@]}" "$here/2_preprocess_dataset.sh"
fi
mapfile -t args < <(xargs -rn1 printf '%s\n' <<< "${ARGS:-}"); wait "$!" || die "ARGS=$ARGS: is a quote left open?"
export NPROC=${NPROC:-$(env -u OMP_NUM_THREADS nproc)}
exec ./launcher.sh python -m dlrm.prep run --input_dir "$from" --output_dir "$to" "${args[@]}" "$@"
