#!/usr/bin/env bash
# Start COMMAND on every rank of the job; inside a rank, set the variables that torch reads.
# usage: [NPROC=4] ./launcher.sh COMMAND [ARG...]        starts mpiexec over the job's nodes
#        mpiexec -n N ./launcher.sh COMMAND [ARG...]     with your own line; also srun and torchrun
# variables: NPROC                     ranks per node (default: as PBS or Slurm was asked, else one
#                                      per GPU, else 1); LOCAL_WORLD_SIZE, exported outside of the
#                                      ranks, means the same
#            MPIEXEC                   instead of env.sh's line, e.g. "mpiexec -n {N} -ppn {PPN}"
#            MASTER_ADDR, MASTER_PORT  where rank 0 listens (default: the first node, a free port)
#            DLRM_JOB_TOKEN            a secret of all ranks: messages without it are ignored
#                                      (default: a random one; with your own mpiexec line, srun or
#                                      torchrun, export it yourself)
#            DLRM_THREADS              threads per rank (default: the node's cores divided by its
#                                      ranks)
#            DLRM_START_TIMEOUT        seconds until mpiexec must have reached all nodes
#                                      (default: 120)
#            DLRM_GPU_ORDER=reverse    last GPU to first local rank
#            DRY_RUN=1                 print the mpiexec line instead
set -euo pipefail

die() {
    echo "launcher.sh: $*" >&2
    exit 2
}

print_help() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

first_set() {    # first_set NAME...: prints the value of the first of these variables that is set
    local name
    for name; do
        if [[ -n ${!name:-} ]]; then
            echo "${!name}"
            return
        fi
    done
}

# Physical cores, because two threads of one core share its vector units. nproc alone would report
# OMP_NUM_THREADS.
divide_cores() {    # divide_cores N: prints this process's cores divided by N, at least 1
    local usable physical slurm_cpus=$slurm_cpus
    usable=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    # Slurm may allot fewer than it binds a process to.
    (( ${slurm_cpus:=usable} >= usable )) || usable=$slurm_cpus
    physical=$(lscpu -p=CORE,SOCKET 2> /dev/null | grep -v '^#' | sort -u | wc -l)
    (( physical > 0 && physical < usable )) || physical=$usable
    echo $(( physical > $1 ? physical / $1 : 1 ))
}

list_gpus() {    # prints this process's devices, one a line
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"
    else
        find /dev -maxdepth 1 -name 'nvidia[0-9]*' | sed 's|/dev/nvidia||' | sort -n
    fi
}

list_hosts() {    # prints the job's nodes in the scheduler's order
    if [[ -r ${PBS_NODEFILE:-} ]]; then
        awk '!seen[$0]++' "$PBS_NODEFILE"
    elif [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        scontrol show hostnames "$SLURM_JOB_NODELIST"
    else
        echo localhost
    fi
}

find_rank() {    # sets `rank`; empty outside of a rank
    rank=$(first_set PMI_RANK PALS_RANKID PMIX_RANK OMPI_COMM_WORLD_RANK)
    if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then
        rank=$RANK
    elif [[ -z $rank && ${SLURM_STEP_NUM_TASKS:-1} != 1 ]]; then
        # Slurm's batch script itself has rank 0: only a step of several tasks counts.
        rank=$SLURM_PROCID
    elif [[ -z $rank && -n ${SLURM_STEP_ID:-} && -n ${DLRM_WORLD_SIZE:-} ]]; then
        # A step of one task may be `srun --pty bash`, but not with a variable of start_ranks.
        rank=$SLURM_PROCID
    fi
}

# --- outside of the ranks: start them

# PBS's node file has a line for each rank that was asked for. Slurm has SLURM_NTASKS if ranks were
# asked for; in a step of its own (`srun --pty`) it counts that step's.
count_asked_ranks() {    # prints the ranks per node that the scheduler was asked for, or 1
    local lines tasks=''
    if [[ -r ${PBS_NODEFILE:-} ]]; then
        lines=$(wc -l < "$PBS_NODEFILE")
        (( lines % ${#nodes[@]} == 0 )) \
            || die "$PBS_NODEFILE gives its nodes unequal shares: set NPROC, ranks per node"
        echo $(( lines / ${#nodes[@]} ))
        return
    fi
    [[ -z ${SLURM_NTASKS:-} || -n ${SLURM_STEP_ID:-} ]] || tasks=${SLURM_TASKS_PER_NODE:-}
    tasks=${tasks/%"(x${#nodes[@]})"/}    # Slurm says 4(x2) for four on each of two nodes
    [[ $tasks =~ ^[0-9]*$ ]] || die "Slurm gives its nodes unequal shares, $tasks:" \
        "ask it for --ntasks-per-node, or set NPROC, ranks per node"
    echo "${tasks:-1}"
}

choose_nproc() {    # sets NPROC, the ranks per node
    if [[ -n ${LOCAL_WORLD_SIZE:-} && ${NPROC:=$LOCAL_WORLD_SIZE} != "$LOCAL_WORLD_SIZE" ]]; then
        die "NPROC=$NPROC contradicts LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE: unset one of them"
    fi
    if [[ -z ${NPROC:-} ]]; then
        NPROC=$(count_asked_ranks) || exit
        (( NPROC > 1 )) || NPROC=$(list_gpus | grep -c .) || NPROC=1
    fi
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: wanted the number of ranks per node"
}

choose_meeting_point() {    # exports MASTER_ADDR and MASTER_PORT
    local port
    if [[ -n ${MASTER_PORT:-} ]] \
        && ! [[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ && $MASTER_PORT -lt 65536 ]]; then
        die "MASTER_PORT=$MASTER_PORT: wanted a port, 1 to 65535; unset it and a free one is taken"
    fi
    [[ ${#nodes[@]} -gt 1 ]] || nodes=(127.0.0.1)
    while [[ -z ${MASTER_PORT:-} ]]; do
        port=$(( 20000 + RANDOM % 12000 ))    # below the range that the system hands out ports from
        (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null || MASTER_PORT=$port
    done
    export MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}} MASTER_PORT
}

# srun, also the one that an mpiexec starts its helpers with.
set_slurm_variables() {
    export SLURM_OVERLAP=1    # a step inside of `srun --pty` would wait for that step to end
    # More ranks than processors were allotted, as after `sbatch -N2` alone.
    (( NPROC <= ${slurm_cpus:-NPROC} )) || export SLURM_OVERCOMMIT=1
}

fill_line() {    # fill_line RANKS RANKS_PER_NODE CORES: sets `mpi`, the words that start them
    read -ra mpi <<< "${MPIEXEC:-${DLRM_MPIEXEC:-mpiexec -n {N\}}}"
    mpi=("${mpi[@]//\{N\}/$1}")
    mpi=("${mpi[@]//\{PPN\}/$2}")
    mpi=("${mpi[@]//\{DEPTH\}/$3}")
}

# mpich's mpiexec never gives up on a node that it does not reach, or that does not reach it.
check_nodes() {    # one process on each node, in time
    local mpi code=0 limit=${DLRM_START_TIMEOUT:-120}
    [[ $limit =~ ^[1-9][0-9]*$ ]] || die "DLRM_START_TIMEOUT=$limit: wanted seconds"
    fill_line "${#nodes[@]}" 1 1
    timeout --foreground -k 5 "$limit" "${mpi[@]}" true < /dev/null || code=$?
    (( code != 124 && code != 137 )) || die "${mpi[0]##*/} on $(uname -n) does not reach all" \
        "nodes (${nodes[*]}), or they do not reach it, within $limit s:" \
        "name the network between them by HYDRA_IFACE, or ask for other nodes"
}

is_hydra() {    # is_hydra MPIEXEC: mpich's mpiexec, or one made of it
    [[ $("$1" --version 2> /dev/null) == *@(HYDRA|Intel)* ]]
}

# Which of these would kill the ranks on SIGTERM, instead of passing it on?
kills_its_ranks() {    # kills_its_ranks MPIEXEC
    [[ ${1##*/} == srun || $("$1" --version 2> /dev/null) == *@("Open MPI"|OpenRTE)* ]]
}

start_ranks() {    # start_ranks COMMAND [ARG...]: becomes mpiexec, or what runs it
    local count depth mpi names run=()
    mapfile -t nodes < <(list_hosts)
    choose_nproc
    count=$(( NPROC * ${#nodes[@]} ))
    depth=$(divide_cores "$NPROC")
    export DLRM_THREADS=${DLRM_THREADS:-$depth} DLRM_WORLD_SIZE=$count
    choose_meeting_point
    [[ -z ${SLURM_JOB_ID:-} ]] || set_slurm_variables
    # It signs the ranks' messages to each other.
    [[ -n ${DLRM_JOB_TOKEN:-} ]] || DLRM_JOB_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export DLRM_JOB_TOKEN

    fill_line "$count" "$NPROC" "$depth"
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${mpi[@]}" "$here/launcher.sh" "$@"
        echo
        exit
    fi
    command -v "${mpi[0]}" > /dev/null \
        || die "no ${mpi[0]} on PATH: run 0_setup_env.sh, or set MPIEXEC"
    if kills_its_ranks "${mpi[0]}"; then
        run=(python3 "$here/scripts/run_mpiexec.py")
    elif (( ${#nodes[@]} > 1 )) && is_hydra "${mpi[0]}"; then
        check_nodes
        names=$(IFS=,; echo "${nodes[*]}")
        run=(python3 "$here/scripts/run_mpiexec.py" --nodes "$names")
        # A line without {PPN} leaves it to mpiexec which ranks a node has.
        [[ ${MPIEXEC:-${DLRM_MPIEXEC:-}} != *'{PPN}'* ]] || run+=(--nproc "$NPROC")
    fi
    exec "${run[@]}" "${mpi[@]}" "$here/launcher.sh" "$@"
}

# --- inside a rank: name it, and become the command

# torchrun has set these variables itself.
name_rank() {    # exports RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
    if [[ -z ${TORCHELASTIC_RUN_ID:-} ]]; then
        RANK=$rank
        WORLD_SIZE=$(first_set PMI_SIZE OMPI_COMM_WORLD_SIZE SLURM_STEP_NUM_TASKS DLRM_WORLD_SIZE)
        [[ -n $WORLD_SIZE ]] \
            || die "rank $RANK cannot tell how many ranks there are: set DLRM_WORLD_SIZE"
        LOCAL_RANK=$(first_set PMI_LOCAL_RANK PALS_LOCAL_RANKID MPI_LOCALRANKID \
            OMPI_COMM_WORLD_LOCAL_RANK SLURM_LOCALID)
        LOCAL_WORLD_SIZE=$(first_set PMI_LOCAL_SIZE PALS_LOCAL_SIZE MPI_LOCALNRANKS \
            OMPI_COMM_WORLD_LOCAL_SIZE SLURM_STEP_TASKS_PER_NODE)
        LOCAL_RANK=${LOCAL_RANK:-$RANK}
        LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE:-$WORLD_SIZE}
        LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE%%[(,]*}    # Slurm says 4(x2)
    fi
    export RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
}

# Every rank comes to the same answer by itself.
find_meeting_point() {    # exports MASTER_ADDR and MASTER_PORT
    local job
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=127.0.0.1
        (( LOCAL_WORLD_SIZE == WORLD_SIZE )) || MASTER_ADDR=$(list_hosts | head -n 1)
        [[ $MASTER_ADDR != localhost ]] \
            || die "rank $RANK cannot tell which node is the first:" \
                "export MASTER_ADDR before mpiexec"
    fi
    if [[ -z ${MASTER_PORT:-} ]]; then
        job=$(first_set PBS_JOBID SLURM_JOB_ID)
        # One mpiexec is the parent of all ranks of a node.
        (( LOCAL_WORLD_SIZE < WORLD_SIZE )) || job=$job.$PPID
        MASTER_PORT=$(( 20000 + $(cksum <<< "$job" | cut -d' ' -f1) % 12000 ))
    fi
    export MASTER_ADDR MASTER_PORT
}

choose_gpu() {    # exports CUDA_VISIBLE_DEVICES where there are several: one for each local rank
    local device devices
    mapfile -t devices < <(list_gpus)
    (( ${#devices[@]} > 1 )) || return 0
    device=$(( LOCAL_RANK % ${#devices[@]} ))
    [[ ${DLRM_GPU_ORDER:-} != reverse ]] || device=$(( ${#devices[@]} - 1 - device ))
    export CUDA_VISIBLE_DEVICES=${devices[device]}
}

# When a rank fails before MPI_Init, mpich's mpiexec keeps the other ranks waiting forever; programs
# that use gloo or NCCL never call MPI_Init. Open MPI and srun do the opposite and end the others at
# once. So this shell stays and waits 5 seconds, as ranks on other hosts need 4 to report why; then
# it sends PMI's abort command, which ends the job. Not if all ranks are ending anyway (75: stopped
# cleanly); Open MPI alone would kill then those that are still writing.
run_and_report_failure() {    # run_and_report_failure COMMAND [ARG...]: exits with its code
    local signalled='' code=0
    trap signalled=1 INT TERM USR1
    trap : PIPE
    "$@" || code=$?
    if [[ -z $signalled ]] && (( code > 130 && code < 160 )); then
        echo "launcher.sh: rank $RANK on $(uname -n): killed by signal $(( code - 128 ))" >&2
    fi
    if [[ $code != 0 && $code != 75 && -z $signalled ]]; then
        sleep 5 || true    # it gets signals, too
        # Only mpich has it, and it may be gone already.
        { echo "cmd=abort exitcode=$code" >&"${PMI_FD:-1000}"; } 2> /dev/null || true
    elif [[ $code == 75 && -n ${OMPI_COMM_WORLD_RANK:-} ]]; then
        sleep 2 || true
    fi
    exit "$code"
}

main() {
    case ${1:-} in
        '') die "no command given; see --help" ;;
        -h | --help)
            print_help
            exit
            ;;
    esac
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    [[ ! -e $here/env.sh ]] || source "$here/env.sh"

    # What Slurm has allotted of this node, e.g. 2(x3); salloc's shell is on no node of the job.
    slurm_cpus=${SLURM_CPUS_ON_NODE:-${SLURM_JOB_CPUS_PER_NODE:-}}
    slurm_cpus=${slurm_cpus%%[(,]*}
    find_rank
    [[ -n $rank ]] || start_ranks "$@"

    name_rank
    find_meeting_point
    export OMP_NUM_THREADS=${DLRM_THREADS:-$(divide_cores "$LOCAL_WORLD_SIZE")} TMPDIR=/tmp
    choose_gpu
    # torchrun has an agent of its own, and PALS ends a job by itself.
    if [[ -z ${TORCHELASTIC_RUN_ID:-} ]] \
        && [[ -n ${PMI_FD:-}${OMPI_COMM_WORLD_RANK:-}${SLURM_STEP_ID:-} ]]; then
        run_and_report_failure "$@"
    fi
    exec "$@"
}

main "$@"
