# shellcheck shell=bash disable=SC2034,SC2154
# What the job scripts share: messages, checks of variables, the environment, submission.
# A script sources this once it has found the project's folder. `script` is the script's name,
# `start` the folder of the call.

say() { echo "$script: $*"; }

die() {
    say "$@" >&2
    exit 2
}

# Paths are written into logs, traces and reports, which are text of one line each.
check_path() {    # check_path VARIABLE: its value is UTF-8 without control characters
    local value=${!1:-}
    if ! printf %s "$value" | iconv -f UTF-8 -t UTF-8 > /dev/null 2>&1; then
        die "$1=$(printf %q "$value") is not UTF-8: name another folder"
    fi
    if [[ $value == *[[:cntrl:]]* ]]; then
        die "$1=$(printf %q "$value") has a control character in its name: name another folder"
    fi
}

check_folder() {    # check_folder VARIABLE: its value is a folder, for the folder of the call
    local value=${!1} where=''
    [[ $value == /* ]] || where=" in $start"
    [[ -d $value ]] || die "$1=$value is not a folder$where"
}

split_args() {    # sets `args`: the words of ARGS, quoted as in a shell
    mapfile -t args < <(xargs -rn1 printf '%s\n' <<< "${ARGS:-}" 2> /dev/null)
    wait "$!" || die "ARGS=$(printf %q "$ARGS"): is a quote left open?"
}

load_environment() {    # load_environment OPTION...: makes the Python environment if it is missing
    if [[ ${1:-} == --submit ]]; then
        (( $# == 1 )) || die "--submit takes no options: put them into ARGS"
        ./0_setup_env.sh >&2    # stdout is the job's id alone
    else
        ./0_setup_env.sh
    fi
    source ./env.sh
    [[ -z ${DLRM_UMASK:-} ]] || umask "$DLRM_UMASK"    # PBS's own is 077
}

# The scripts start the ranks. `srun ./3_train.sh` in a job of several tasks would run it several
# times; in `srun --pty` there is one, and what names it a rank is not for mpiexec.
leave_rank() {
    if [[ ${SLURM_STEP_NUM_TASKS:-1}${PMI_SIZE:-1}${OMPI_COMM_WORLD_SIZE:-1} != 111 ]]; then
        die "this script starts the ranks itself: call it once, without srun or mpiexec"
    fi
    unset "${!PMI_@}" "${!PMIX_@}" "${!OMPI_COMM_@}"
}

# Exports what differs each time that a requeued job starts: its session's first process.
name_job_start() {
    local fields session stat
    fields=$(< "/proc/$$/stat")
    read -ra stat <<< "${fields##*)}"
    session=${stat[3]}
    fields=$(cat "/proc/$session/stat" 2> /dev/null) || fields=''
    read -ra stat <<< "${fields##*)}"
    DLRM_JOB_START="$(uname -n) $session ${stat[19]:-}"
    export DLRM_JOB_START
}

# The scheduler whose options site.sh has, and those; an empty DLRM_SBATCH is enough for Slurm.
find_scheduler() {    # sets `scheduler` (pbs, slurm) and `resources`
    resources=()
    if [[ -n ${DLRM_QSUB:-} && -n ${DLRM_SBATCH+set} ]]; then
        die "both DLRM_QSUB and DLRM_SBATCH are set: keep that of this machine's scheduler"
    elif [[ -n ${DLRM_SBATCH+set} ]]; then
        scheduler=slurm
        read -ra resources <<< "$DLRM_SBATCH" || true
    elif [[ -n ${DLRM_QSUB:-} ]]; then
        scheduler=pbs
        read -ra resources <<< "$DLRM_QSUB"
    else
        die 'set DLRM_QSUB in site.sh, e.g. "-A PROJECT -q debug -l select=1",' \
            'or for Slurm DLRM_SBATCH, e.g. "-A PROJECT -N2 --ntasks-per-node=4"'
    fi
}

# All variables go along, whole: in a list of some, a comma inside a value would end it.
submit() {    # submit SCRIPT: to PBS or Slurm with site.sh's options; prints the job's id
    local scheduler resources
    find_scheduler
    cd -- "$start" || exit    # the job finds relative paths from here, and leaves its log here
    if [[ $scheduler == pbs ]]; then
        qsub -V "${resources[@]}" "$1"
    else
        sbatch --parsable --export=ALL "${resources[@]}" "$1" | cut -d ';' -f 1
    fi
}
