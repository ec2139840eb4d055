#!/usr/bin/env bash
#PBS -N dlrm-train
#PBS -j oe
#PBS -l walltime=01:00:00
#PBS -r y
#SBATCH --job-name=dlrm-train
#SBATCH --output=%x.o%j
#SBATCH --open-mode=append
#SBATCH --time=01:00:00
#SBATCH --requeue
# Train and evaluate on every node of the job, convert the traces, write the report.
# usage: ./3_train.sh [OPTION...]                      the demo: toy data, two ranks, here and now
#        qsub -v "DATASET_DIR=...,WORKDIR=..." 3_train.sh
#        DATASET_DIR=... sbatch -N2 --ntasks-per-node=4 3_train.sh
#        DATASET_DIR=... ./3_train.sh [OPTION...]      here and now, or in qsub -I or salloc
#        DATASET_DIR=... ./3_train.sh --submit         with site.sh's DLRM_QSUB or DLRM_SBATCH
# options:   those of python -m dlrm.train, whose --help lists them (source env.sh first), or a
#            script's own
# variables: DATASET_DIR  a dataset folder made by 2_preprocess_dataset.sh; with MODEL=bert4rec:
#                         MovieLens' folder, or a file of `user item [timestamp]` lines, or its
#                         folder
#            WORKDIR      the project's folder (default: where this script is, or where qsub or
#                         sbatch was called)
#            BATCH_SIZE (per rank), EMBEDDING_DIM, EPOCHS, LEARNING_RATE
#            ARGS         more options, quoted as in a shell
#            NPROC        ranks per node (default: as PBS or Slurm was asked, else one per GPU,
#                         else 1)
#            MODEL        dlrm, bert4rec, or a model that DLRM_MODELS brings (see CONTRIBUTING.md);
#                         emulate: a run without its computing, --from RUN;
#                         path/to/script.py: any PyTorch training, traced (docs/any_training.md);
#                         mlcommons: MLCommons' reference, traced
#            MLCOMMONS_DIR  a checkout of github.com/mlcommons/training for MODEL=mlcommons
#                         (default: what ./0_setup_env.sh --mlcommons has fetched)
#            RESULTS      where run folders go (default: WORKDIR/results)
#            NAME         a label, which the run folder's name ends in
#            RESUME       the run folder of a run to resume
#            ANALYSIS     now (default): when training has ended, on the first node; later: by a
#                         job of one node that starts after this one; no: by hand
#            PROFILE_STEPS  e.g. 10-15: torch.profiler on these steps, beside the I/O in Perfetto
#            TRACE=no     without DFTracer; DFTRACER_ENABLE=0 means the same
#            NODE_COUNTERS=yes  processors, memory, disks and network of each node, beside the trace
#            DFTRACER_DATA_DIR  trace only I/O below these folders (default: all)
#            DLRM_ENV_KEEP  more variables whose values go into env.txt, e.g. "MY_SETTING OTHER_*"
# Relative paths, also among the options, are relative to the folder of the call.
set -euo pipefail

script=3_train.sh

print_help() { sed -n '/^# Train/,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

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

# Other models read a file, too; the emulator makes a dataset in a folder that is not there yet.
may_be_no_folder() {
    [[ $1 == DATASET_DIR && ( ${MODEL:-} == emulate || ${MODEL:-dlrm} != dlrm && -f ${!1} ) ]]
}

resolve_paths() {    # those of the variables, from the folder of the call; sets `results`, `resume`
    local name
    for name in DATASET_DIR RESUME; do
        [[ -z ${!name:-} ]] || may_be_no_folder "$name" || check_folder "$name"
    done
    [[ -z ${DATASET_DIR:-} ]] || DATASET_DIR=$(realpath -m -- "$DATASET_DIR")
    results=$(realpath -m -- "${RESULTS:-$here/results}")
    resume=${RESUME:+$(realpath -- "$RESUME")}
}

# Where the demo's data are: in the project, or beside the runs where the project cannot be written.
find_demo_data() {    # find_demo_data NAME: prints the folder
    local own=$here/data
    if [[ -e $own/$1/npy/meta.json || -w $own || ( ! -e $own && -w $here ) ]]; then
        echo "$own/$1"
    else
        echo "$results/data/$1"
    fi
}

make_toy_data() (    # make_toy_data FOLDER, the same way that real data go
    [[ ! -e $1/npy/meta.json ]] || exit 0
    mkdir -p -- "${1%/*}"
    # A subshell holds the lock, so that neither the ranks nor what they leave behind inherit it.
    exec 8> "$1.lock"
    flock -n 8 || { say "another demo is making the toy data, waiting for it"; flock 8; }
    [[ ! -e $1/npy/meta.json ]] || exit 0
    [[ -e $1/raw/day_0 ]] || python -m dlrm.prep toy "$1/raw" --one_file
    ./1_split_dataset.sh "$1/raw" "$1/split" 20000
    DATASET_DIR=$1/split OUTPUT_DIR=$1/npy ARGS='' ./2_preprocess_dataset.sh
)

choose_program() {    # sets `program`, the module that every rank runs
    case ${MODEL:-} in
        mlcommons | */* | *.py) program=dlrm.traced ;;
        *) program=dlrm.train ;;
    esac
}

# The model's spec says how DATASET_DIR, BATCH_SIZE and the like become options. A mistake in the
# options, or a dataset that is not there, ends here, before anything is made.
read_options() {    # sets `title`, `demo` (what the demo trains on), `demo_data` and `options`
    local answer ask=(dlrm.models.script_options "$start" "$run")
    [[ $program != dlrm.traced ]] || ask=(dlrm.traced.script_options "$start")
    mapfile -d '' -t answer < <(python -m "${ask[@]}" "${args[@]}" "$@")
    wait "$!" || exit 2
    title=${answer[0]}
    demo=${answer[1]}
    demo_data=${answer[2]}
    options=("${answer[@]:3}")
}

prepare_demo() {    # without DATASET_DIR: two ranks, on data that are made here
    local folder
    # A program that has no demo (the emulator) knows its data itself.
    [[ -z ${DATASET_DIR:-} && -n $demo ]] || return 0
    export NPROC=${NPROC:-${LOCAL_WORLD_SIZE:-2}}
    say "no DATASET_DIR: the demo of $title, on $demo"
    [[ -n $demo_data ]] || return 0
    folder=$(find_demo_data "$demo_data")
    options=("${options[@]//\{demo_data\}/"$folder"}")
    [[ $demo_data != toy ]] || make_toy_data "$folder"
}

has_option() { [[ " ${options[*]} " == *" $1"[\ =]* ]]; }

name_run() {    # sets `run`, the folder that this run would get
    local answer
    mapfile -d '' -t answer < <(
        python -m dlrm.runtime.new_run_folder name "$results" ${resume:+--resume "$resume"}
    )
    wait "$!" || exit 2
    run=${answer[0]}
}

make_run() {    # sets `run`, and `made`: what proves that it was made here, or nothing
    local answer
    mapfile -d '' -t answer < <(
        python -m dlrm.runtime.new_run_folder make "$results" ${resume:+--resume "$resume"}
    )
    wait "$!" || exit 2
    run=${answer[0]}
    made=${answer[1]}
}

check_resume() {
    if [[ -n $resume && ! -d $run/checkpoints ]] && ! has_option --checkpoint_dir; then
        die "RESUME=$run has no checkpoints to resume from"
    fi
}

end_without_training() {    # for options that only ask: --help shows the other ones
    if has_option --help || has_option -h; then
        exec env -u DFTRACER_ENABLE TRACE=no python -m "$program" "${options[@]}"
    fi
    [[ $program == dlrm.train ]] || return 0
    if has_option --validate_only || has_option --check_options; then exit; fi
}

start_log() {    # what is printed from here on also goes into the run folder; sets `logger`
    # tee ignores a signal to the whole session, so that lines printed while stopping are kept, too.
    exec > >(trap '' INT TERM; exec tee -a -- "$run/log.txt") 2>&1
    logger=$!
}

train() {    # sets `code`, and `stopped` after a signal
    local ranks signalled status
    stopped=''
    code=0
    # A script's own words end the line.
    ./launcher.sh python -m "$program" --output_dir "$run" "${options[@]}" < /dev/null &
    ranks=$!
    trap 'signalled=1 stopped=1; kill -TERM "$ranks" 2> /dev/null || true' INT TERM
    while :; do
        signalled=''
        status=0
        wait "$ranks" || status=$?
        (( status == 127 )) || code=$status    # 127: it ended while a signal was handled
        [[ -n $signalled ]] || break
    done
    (( code == 0 )) || say "training ended with exit code $code"
    if [[ $code != [02] && -d $run/checkpoints ]]; then
        say "to resume from the newest checkpoint: RESUME=${run@Q} and the same command"
    fi
}

# A script may end with code 2 whenever it likes.
has_trained() {
    [[ $code != 2 || -s $run/metrics.jsonl || ($program == dlrm.traced && -e $run/config.json) ]]
}

choose_analysis() {    # choose_analysis [OPTION...]: sets `analysis`: now, later or no
    analysis=${ANALYSIS:-now}
    [[ $analysis == @(now|later|no) ]] || die "ANALYSIS=$analysis: wanted now, later or no"
    if [[ $analysis == later && -z ${PBS_JOBID:-}${SLURM_JOB_ID:-} && ${1:-} != --submit ]]; then
        say "ANALYSIS=later: this is not a batch job, the analysis is done now"
        analysis=now
    fi
}

# The job of the analysis is submitted right here, too: many sites allow no qsub in a job.
submit_training() {    # prints the training's job id
    local job
    export WORKDIR=$here RESULTS=$results
    [[ $analysis != later ]] || export ANALYSIS=no
    job=$(submit "$here/3_train.sh")
    echo "$job"
    [[ $analysis == later ]] || return 0
    run=${resume:-$results/$job${NAME:+-$NAME}}
    submit_analysis "$job" >&2
    [[ $analysis == later ]] || say "when the job has ended: python -m analysis finish ${run@Q}" >&2
}

# In a batch job before training, so that it also comes after a training that is killed; in an
# interactive job after it. A requeued job has done it when it first started.
submit_analysis() {    # submit_analysis before|after|JOB: as a job of its own; sets `analysis_job`
    if ! analysis_job=$(cd -- "$start" && python -m dlrm.runtime.later_analysis "$1" "$run"); then
        say "the analysis could not be submitted"
        analysis=now
    fi
    [[ -z $analysis_job ]] || say "the analysis is job $analysis_job"
}

cancel_analysis() {    # of a training that has left nothing
    [[ -n ${analysis_job:-} ]] || return 0
    if python -m dlrm.runtime.later_analysis cancel "$analysis_job"; then
        say "there is nothing to analyse: job $analysis_job is cancelled"
    fi
    analysis_job=''
}

analyse() {    # two Perfetto files, the check of bytes and the report, from one reading
    say "analysis"
    python -m analysis finish "$run" \
        || say "not all of that was done; the traces are in $run/trace," \
            "try again: python -m analysis finish ${run@Q}"
}

end_with_analysis() {
    if [[ $analysis == later ]]; then submit_analysis after; fi
    # A stopped job has seconds left: its traces can wait.
    if [[ $analysis == now && -z $stopped ]]; then analyse; fi
}

list_results() {
    local file found=''
    [[ ! -d $run ]] || say "results: $run"
    [[ ! -e $run/report.html ]] || say "report:  $run/report.html (open it in a browser)"
    for file in "$run"/*.pftrace; do
        [[ -e $file ]] || continue
        found=1
        say "trace:   $file"
    done
    [[ -z $found ]] || say "to see a trace: drop it on https://ui.perfetto.dev," \
        "or source env.sh && python -m analysis view $(printf %q "$run")"
}

# After a failure its reason stands far above the analysis: it is repeated as the last line.
repeat_reason() {
    [[ $code != 0 && $code != 75 ]] || return 0
    local reason
    reason=$(grep -aE '^(dlrm|launcher\.sh): ' -- "$run/log.txt" 2> /dev/null | tail -n 1) || true
    [[ -z $reason ]] || say "failed with exit code $code: ${reason#dlrm: }"
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
    for name in WORKDIR DATASET_DIR RESULTS RESUME; do check_path "$name"; done
    split_args
    choose_analysis "$@"
    resolve_paths
    cd "$here"
    load_environment "$@"
    if [[ ${1:-} == --submit ]]; then
        submit_training
        exit
    fi
    leave_rank
    name_job_start

    choose_program
    if [[ ${MODEL:-} == mlcommons && -n ${MLCOMMONS_DIR:-} ]]; then
        scripts/mlcommons.sh "$(cd "$start" && realpath -m -- "$MLCOMMONS_DIR")"
    fi
    name_run
    read_options "$@"
    check_resume
    end_without_training
    prepare_demo
    make_run
    start_log
    say "training, run folder $run"
    if [[ $analysis == later && -n $made$resume ]]; then submit_analysis before; fi
    train
    # Code 2 before the first step is a mistake that only the ranks could see: nothing to keep.
    if [[ -n $made ]] && ! has_trained; then
        cancel_analysis
        python -m dlrm.runtime.new_run_folder discard "$run" "$made" || true
    fi
    if [[ -d $run/trace ]] && has_trained; then end_with_analysis; fi
    list_results
    repeat_reason
    exec >&- 2>&-
    wait "$logger" || true
    exit "$code"
}

main "$@"
