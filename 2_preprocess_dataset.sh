#!/usr/bin/env bash
#PBS -N dlrm-preprocess
#PBS -j oe
#PBS -l walltime=01:00:00
#PBS -r y
#SBATCH --job-name=dlrm-preprocess
#SBATCH --output=%x.o%j
#SBATCH --open-mode=append
#SBATCH --time=01:00:00
#SBATCH --requeue
# Preprocess Criteo TSV (day_0 .. day_23, plain or .gz) into a dataset folder, on every node of the
# job. The same command again resumes a stopped run.
# usage: qsub -v "DATASET_DIR=...,WORKDIR=..." 2_preprocess_dataset.sh
#        DATASET_DIR=... sbatch -N2 2_preprocess_dataset.sh
#        DATASET_DIR=... ./2_preprocess_dataset.sh [OPTION...]     here and now
#        DATASET_DIR=... ./2_preprocess_dataset.sh --submit        with site.sh's DLRM_QSUB or
#                                                                  DLRM_SBATCH
# options:   those of python -m dlrm.prep run, whose --help lists them (source env.sh first)
# variables: DATASET_DIR  folder of the TSV files
#            OUTPUT_DIR   where the dataset goes (default: DATASET_DIR with -npy appended)
#            WORKDIR      the project's folder (default: where this script is, or where qsub or
#                         sbatch was called)
#            NPROC        processes per node (default: its cores)
#            ARGS         more options, quoted as in a shell; for data of other columns than
#                         Criteo's: ARGS="--num_numerical 5 --num_categorical 7" (without the label)
# Relative paths, also among the options, are relative to the folder of the call.
set -euo pipefail
script=2_preprocess_dataset.sh

print_help() { sed -n '/^# Pre/,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# PBS copies this script into its spool and starts it in $HOME; Slurm copies it, too.
find_project() {    # sets `start`, the folder of the call, and `here`, the project's
    [[ ${PBS_ENVIRONMENT:-} != PBS_BATCH ]] || cd "$PBS_O_WORKDIR"
    start=$PWD
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    [[ -e $here/scripts/job.sh ]] || here=${PBS_O_WORKDIR:-$PWD}
    here=$(realpath -m -- "${WORKDIR:-$here}")
    if [[ ! -e $here/scripts/job.sh ]]; then
        echo "$script: ${WORKDIR:+WORKDIR=}$(printf %q "$here") is not the project's folder," \
            "it has no scripts/job.sh: name the folder by WORKDIR" >&2
        exit 2
    fi
}

resolve_paths() {    # relative paths are relative to the folder of the call; sets `from` and `to`
    [[ -n ${DATASET_DIR:-} ]] \
        || die "DATASET_DIR is not set: the folder of day_0 .. day_23; see --help"
    check_folder DATASET_DIR
    from=$(realpath -- "$DATASET_DIR")
    to=$(realpath -m -- "${OUTPUT_DIR:-${DATASET_DIR%/}-npy}")
}

main() {
    case ${1:-} in
        -h | --help)
            print_help
            exit
            ;;
    esac
    local name
    find_project
    source "$here/scripts/job.sh"
    for name in WORKDIR DATASET_DIR OUTPUT_DIR; do check_path "$name"; done
    resolve_paths
    split_args
    cd "$here"
    load_environment "$@"
    if [[ ${1:-} == --submit ]]; then
        export DATASET_DIR=$from OUTPUT_DIR=$to WORKDIR=$here
        submit "$here/2_preprocess_dataset.sh"
        exit
    fi
    leave_rank
    # Where OMP_NUM_THREADS is set, nproc reports it instead of the cores. Slurm may allot fewer.
    NPROC=${NPROC:-${LOCAL_WORLD_SIZE:-${SLURM_CPUS_ON_NODE:-$(env -u OMP_NUM_THREADS nproc)}}}
    export NPROC
    exec ./launcher.sh python -m dlrm.prep run --input_dir "$from" --output_dir "$to" \
        "${args[@]}" "$@" --relative_to "$start"
}

main "$@"
