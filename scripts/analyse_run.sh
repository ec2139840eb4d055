#!/usr/bin/env bash
#PBS -N dlrm-analysis
#PBS -j oe
#PBS -l walltime=01:00:00
#PBS -r y
#SBATCH --job-name=dlrm-analysis
#SBATCH --output=%x.o%j
#SBATCH --open-mode=append
#SBATCH --time=01:00:00
#SBATCH --requeue
# Analyse a run on one node, after its training: both Perfetto files, the check of bytes, the
# report. 3_train.sh submits this job with ANALYSIS=later.
# usage: qsub -v "RUN=results/ID,WORKDIR=$PWD" scripts/analyse_run.sh
#        RUN=results/ID WORKDIR=$PWD sbatch -N1 --exclusive scripts/analyse_run.sh
# variables: RUN      the run folder
#            WORKDIR  the project's folder
set -euo pipefail
script=analyse_run.sh

main() {
    case ${1:-} in
        -h | --help)
            sed -n '/^# Analyse/,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit
            ;;
    esac
    [[ ${PBS_ENVIRONMENT:-} != PBS_BATCH ]] || cd "$PBS_O_WORKDIR"
    if [[ -z ${RUN:-} || ! -e ${WORKDIR:-}/scripts/job.sh ]]; then
        echo "$script: RUN and WORKDIR name the run's folder and the project's; see --help" >&2
        exit 2
    fi
    source "$WORKDIR/scripts/job.sh"
    # A training that was refused before its first step has left nothing.
    if [[ ! -d $RUN/trace ]]; then
        say "nothing to analyse: no traces in $RUN"
        exit
    fi
    RUN=$(realpath -- "$RUN")
    cd "$WORKDIR"
    load_environment ""
    exec python -m analysis finish "$RUN"
}

main "$@"
