#!/usr/bin/env bash
#PBS -N dlrm-train
#PBS -j oe
#PBS -l walltime=01:00:00
#PBS -r y
# Train and evaluate on every node of the job, convert the traces, write the report.
# usage: ./3_train.sh                                                  the demo: toy data, two ranks, here and now
#        qsub -v "DATASET_DIR=...,WORKDIR=..." 3_train.sh
#        DATASET_DIR=... ./3_train.sh [TRAIN OPTION...]                here and now
#        DATASET_DIR=... ./3_train.sh --submit                         qsub with site.sh's DLRM_QSUB
# variables: DATASET_DIR  a dataset folder made by 2_preprocess_dataset.sh
#            WORKDIR      the project's folder (default: where this script is, or where qsub was called)
#            BATCH_SIZE (per rank), EMBEDDING_DIM, EPOCHS, LEARNING_RATE
#            ARGS         more options of python -m dlrm.train, quoted as in a shell
#            NPROC        ranks per node (default: as PBS was asked, else one per GPU, else 1)
#            MODEL        dlrm or bert4rec
#            RESULTS      where run folders go (default: WORKDIR/results); RESUME: the run folder of one that shall go on
#            TRACE=no     without DFTracer
set -euo pipefail
say() { echo "3_train.sh: $*"; }
die() { say "$@" >&2; exit 2; }
case ${1:-} in -h | --help) sed -n '/^# Train/,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
[[ ${PBS_ENVIRONMENT:-} != PBS_BATCH ]] || cd "$PBS_O_WORKDIR"    # PBS starts in $HOME, with a copy of this script
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -e $here/launcher.sh ]] || here=${PBS_O_WORKDIR:-$PWD}
here=$(realpath -m -- "${WORKDIR:-$here}")
[[ -e $here/launcher.sh ]] || die "WORKDIR=$here is not the project's folder: it has no launcher.sh"
case ${MODEL:-dlrm} in
    dlrm) program=dlrm.train options=(--evaluate_on_epoch_end --evaluate_on_training_end --in_memory_binary_criteo_path) flags=(batch_size embedding_dim epochs learning_rate) ;;
    bert4rec) program=dlrm.bert4rec options=(--dataset_path) flags=(train_batch_size emb_dim num_epochs lr) ;;
    *) die "MODEL=$MODEL: wanted dlrm or bert4rec" ;;
esac
for name in DATASET_DIR RESUME; do [[ -z ${!name:-} || -d ${!name} ]] || die "$name=${!name} is not a folder"; done
[[ -z ${DATASET_DIR:-} ]] || DATASET_DIR=$(realpath -- "$DATASET_DIR")
results=$(realpath -m -- "${RESULTS:-$here/results}") run=${RESUME:+$(realpath -- "$RESUME")}
cd "$here"

./0_setup_env.sh
source ./env.sh
[[ -z ${DLRM_UMASK:-} ]] || umask "$DLRM_UMASK"    # PBS's own is 077
if [[ ${1:-} == --submit ]]; then (( $# == 1 )) || die "--submit takes no options: put them into ARGS"
    read -ra resources <<< "${DLRM_QSUB:?3_train.sh: set DLRM_QSUB in site.sh, e.g. \"-A PROJECT -q debug -l select=1\"}"
    WORKDIR=$here RESULTS=$results exec qsub -V "${resources[@]}" "$here/3_train.sh"
fi

options=("${options[@]}" "${DATASET_DIR:-$here/data/toy/npy}")
if [[ -z ${DATASET_DIR:-} && $program == dlrm.bert4rec ]]; then
    say "no DATASET_DIR: the demo, on walks whose best guess is known"
    export NPROC=${NPROC:-2}
    options=(--preset toy --cache_dir "$here/data/bert4rec")
elif [[ -z ${DATASET_DIR:-} ]]; then    # the demo walks the same road as real data
    say "no DATASET_DIR: the demo, on toy data"
    toy=$here/data/toy
    if [[ ! -e $toy/npy/meta.json ]]; then
        [[ -e $toy/raw/day_0 ]] || python -m dlrm.prep toy "$toy/raw" --one_file
        ./1_split_dataset.sh "$toy/raw" "$toy/split" 20000
        DATASET_DIR=$toy/split OUTPUT_DIR=$toy/npy ARGS='' ./2_preprocess_dataset.sh
    fi
    export NPROC=${NPROC:-2}
    options+=(--preset toy)
fi
for name in BATCH_SIZE EMBEDDING_DIM EPOCHS LEARNING_RATE; do
    [[ -z ${!name:-} ]] || options+=("--${flags[0]}" "${!name}")
    flags=("${flags[@]:1}")
done    # dot products need the dense tower to end as wide as the tables; ARGS may still say otherwise
[[ -z ${EMBEDDING_DIM:-} || $program != dlrm.train ]] || options+=(--dense_arch_layer_sizes "512,256,$EMBEDDING_DIM")
[[ ${TRACE:-yes} == no ]] || options+=(--trace)
mapfile -t more < <(xargs -rn1 printf '%s\n' <<< "${ARGS:-}"); wait "$!" || die "ARGS=$ARGS: is a quote left open?"

# The run folder: a job that is run again finds its own.
run=${run:-$results/${PBS_JOBID:-$(date +%Y%m%d-%H%M%S)}}
[[ -z ${RESUME:-} || -d $run/checkpoints || "${more[*]} $*" == *--checkpoint_dir* ]] || die "RESUME=$run has no checkpoints to go on from"
[[ -n ${RESUME:-${PBS_JOBID:-}} || ! -e $run ]] || run=$run-$$
python -m "$program" "${options[@]}" "${more[@]}" "$@" --output_dir "$run" --check_options || exit
[[ " ${more[*]} $* " != *" "@(--check_options|--help|-h)" "* ]] || exit 0
made=''; [[ -d $run ]] || { mkdir -p -- "$run"; made=1; }
exec > >(trap '' INT TERM; exec tee -a -- "$run/log.txt") 2>&1; logger=$!    # what is said while stopping is kept, too
{
    while IFS='=' read -r -d '' name value; do
        [[ ${name^^} =~ TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE ]] && continue
        echo "$name=${value@Q}"
    done < <(env -0 | sort -z) | sed -E 's#(://)[^/@]*@#\1***@#g'
} > "$run/env.txt"
{ nvidia-smi -L && nvidia-smi; } > "$run/gpu.txt" 2> /dev/null || echo "no NVIDIA GPU on $(hostname)" > "$run/gpu.txt"

say "training, run folder $run"
./launcher.sh python -m "$program" "${options[@]}" "${more[@]}" "$@" --output_dir "$run" < /dev/null &
ranks=$! stopped='' code=0
trap 'signalled=1 stopped=1; kill -TERM "$ranks" 2> /dev/null || true' INT TERM
while :; do
    signalled='' status=0; wait "$ranks" || status=$?
    (( status == 127 )) || code=$status    # 127: it ended while we were told to stop
    [[ -n $signalled ]] || break
done
(( code == 0 )) || say "training ended with exit code $code"
[[ $code == [02] || ! -d $run/checkpoints ]] || say "to go on from the newest checkpoint: RESUME=${run@Q} and the same command"

# Code 2 before the first step, a mistake: nothing has happened. A stopped job has seconds left: its traces can wait.
[[ -z $made || $code != 2 || -s $run/metrics.jsonl ]] || rm -rf -- "$run"
if [[ -d $run/trace && -z $stopped && ( $code != 2 || -s $run/metrics.jsonl ) ]]; then
    for step in "perfetto" "perfetto --posix" "check" "report"; do
        say "analysis $step"
        read -ra words <<< "$step"
        python -m analysis "${words[@]}" "$run" || say "that failed; the traces are in $run/trace, try again: python -m analysis $step ${run@Q}"
    done
fi
[[ ! -d $run ]] || say "results: $run"
[[ ! -e $run/report.html ]] || say "report:  $run/report.html (open it in a browser)"
for file in "$run"/*.pftrace; do [[ ! -e $file ]] || say "trace:   $file"; done
[[ ! -e ${file:-} ]] || say "to see a trace: drop it on https://ui.perfetto.dev, or source env.sh && python -m analysis view $(printf %q "$run")"
exec >&- 2>&-; wait "$logger" || true; exit "$code"
