#!/usr/bin/env bash
# Start COMMAND on every rank of the job; inside a rank, give it the names that torch reads.
# usage: [NPROC=4] ./launcher.sh COMMAND [ARG...]        starts mpiexec over the job's nodes
#        mpiexec -n N ./launcher.sh COMMAND [ARG...]     the same with your own line; also srun and torchrun
# variables: NPROC                       ranks per node (default: as PBS was asked, else one per GPU, else 1)
#            MPIEXEC                     instead of env.sh's line, e.g. "mpiexec -n {N} -ppn {PPN} -bind-to core"
#            MASTER_ADDR, MASTER_PORT    where the ranks meet (default: the first node, a free port)
#            DLRM_JOB_TOKEN              a secret that all ranks share: messages without it are ignored (default: a random
#                                        one; with your own mpiexec line, srun or torchrun, export it yourself)
#            DLRM_THREADS                threads per rank (default: the node's cores divided by its ranks)
#            DLRM_GPU_ORDER=reverse      last GPU to first local rank
#            DRY_RUN=1                   print the mpiexec line instead
set -euo pipefail
die() { echo "launcher.sh: $*" >&2; exit 2; }
case ${1:-} in
    '') die "no command given; see --help" ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ ! -e $here/env.sh ]] || source "$here/env.sh"

first() {    # first NAME...: the value of the first of these variables that is set
    local name
    for name; do [[ -z ${!name:-} ]] || { echo "${!name}"; return; }; done
}
share() {    # share N: the physical cores that this process may use, divided by N; nproc alone would read OMP_NUM_THREADS
    local usable real
    usable=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    real=$(lscpu -p=CORE,SOCKET 2> /dev/null | grep -v '^#' | sort -u | wc -l)
    (( real > 0 && real < usable )) || real=$usable
    echo $(( real > $1 ? real / $1 : 1 ))
}
gpus() {    # this process's devices, one a line
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"
    else find /dev -maxdepth 1 -name 'nvidia[0-9]*' | sed 's|/dev/nvidia||' | sort -n; fi
}
hosts() {    # the job's nodes in the scheduler's order
    if [[ -r ${PBS_NODEFILE:-} ]]; then awk '!seen[$0]++' "$PBS_NODEFILE"
    elif [[ -n ${SLURM_JOB_NODELIST:-} ]]; then scontrol show hostnames "$SLURM_JOB_NODELIST"
    else echo localhost; fi
}

rank=$(first PMI_RANK PALS_RANKID PMIX_RANK OMPI_COMM_WORLD_RANK)
[[ -z ${TORCHELASTIC_RUN_ID:-} ]] || rank=$RANK
# Slurm's batch script itself has rank 0: only a step of several tasks counts.
[[ -n $rank || ${SLURM_STEP_NUM_TASKS:-1} == 1 ]] || rank=$SLURM_PROCID

if [[ -z $rank ]]; then    # outside: start the ranks
    mapfile -t nodes < <(hosts)
    if [[ -z ${NPROC:-} ]]; then
        lines=$([[ -r ${PBS_NODEFILE:-} ]] && wc -l < "$PBS_NODEFILE" || echo 1)
        (( lines % ${#nodes[@]} == 0 )) || die "$PBS_NODEFILE gives its nodes unequal shares: set NPROC, ranks per node"
        NPROC=$(( lines / ${#nodes[@]} ))
        (( NPROC > 1 )) || NPROC=$(gpus | grep -c .) || NPROC=1
    fi
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC: wanted the number of ranks per node"
    n=$(( NPROC * ${#nodes[@]} )) depth=$(share "$NPROC")
    export DLRM_THREADS=${DLRM_THREADS:-$depth} DLRM_WORLD_SIZE=$n
    [[ ${#nodes[@]} -gt 1 ]] || nodes=(127.0.0.1)
    while [[ -z ${MASTER_PORT:-} ]]; do    # below the range from which the system hands out ports
        port=$(( 20000 + RANDOM % 12000 ))
        (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null || MASTER_PORT=$port
    done
    [[ -n ${DLRM_JOB_TOKEN:-} ]] || DLRM_JOB_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')    # signs the ranks' messages
    export MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}} MASTER_PORT DLRM_JOB_TOKEN
    read -ra mpi <<< "${MPIEXEC:-${DLRM_MPIEXEC:-mpiexec -n {N\}}}"
    mpi=("${mpi[@]//\{N\}/$n}") mpi=("${mpi[@]//\{PPN\}/$NPROC}") mpi=("${mpi[@]//\{DEPTH\}/$depth}")
    [[ -z ${DRY_RUN:-} ]] || { printf '%q ' "${mpi[@]}" "$here/launcher.sh" "$@"; echo; exit; }
    command -v "${mpi[0]}" > /dev/null || die "no ${mpi[0]} on PATH: run 0_setup_env.sh, or set MPIEXEC"
    exec "${mpi[@]}" "$here/launcher.sh" "$@"
fi

# Inside: who am I?
RANK=$rank
if [[ -z ${TORCHELASTIC_RUN_ID:-} ]]; then
    WORLD_SIZE=$(first PMI_SIZE OMPI_COMM_WORLD_SIZE SLURM_STEP_NUM_TASKS DLRM_WORLD_SIZE)
    [[ -n $WORLD_SIZE ]] || die "rank $RANK cannot tell how many ranks there are: set DLRM_WORLD_SIZE"
    LOCAL_RANK=$(first PMI_LOCAL_RANK PALS_LOCAL_RANKID MPI_LOCALRANKID OMPI_COMM_WORLD_LOCAL_RANK SLURM_LOCALID)
    LOCAL_WORLD_SIZE=$(first PMI_LOCAL_SIZE PALS_LOCAL_SIZE MPI_LOCALNRANKS OMPI_COMM_WORLD_LOCAL_SIZE SLURM_STEP_TASKS_PER_NODE)
    LOCAL_RANK=${LOCAL_RANK:-$RANK} LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE:-$WORLD_SIZE}
    LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE%%[(,]*}    # Slurm says 4(x2)
fi
if [[ -z ${MASTER_ADDR:-} ]]; then    # all ranks work out the same answer
    MASTER_ADDR=127.0.0.1
    if (( LOCAL_WORLD_SIZE < WORLD_SIZE )); then MASTER_ADDR=$(hosts | head -n 1); fi
    [[ $MASTER_ADDR != localhost ]] || die "rank $RANK cannot tell which node is the first: export MASTER_ADDR before mpiexec"
fi
if [[ -z ${MASTER_PORT:-} ]]; then
    job=$(first PBS_JOBID SLURM_JOB_ID)
    (( LOCAL_WORLD_SIZE < WORLD_SIZE )) || job=$job.$PPID    # one mpiexec is the parent of all ranks of a node
    MASTER_PORT=$(( 20000 + $(cksum <<< "$job" | cut -d' ' -f1) % 12000 ))
fi
export RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${DLRM_THREADS:-$(share "$LOCAL_WORLD_SIZE")} TMPDIR=/tmp
mapfile -t devices < <(gpus)
if (( ${#devices[@]} > 1 )); then
    device=$(( LOCAL_RANK % ${#devices[@]} ))
    [[ ${DLRM_GPU_ORDER:-} != reverse ]] || device=$(( ${#devices[@]} - 1 - device ))
    export CUDA_VISIBLE_DEVICES=${devices[device]}
fi

[[ -n ${PMI_FD:-} && -z ${TORCHELASTIC_RUN_ID:-} ]] || exec "$@"
# When a rank fails before MPI_Init, mpich's mpiexec keeps the other ranks waiting for ever; programs that use gloo or
# NCCL never call MPI_Init. So this shell stays and sends PMI's abort command, which ends the job. Not if all ranks are
# ending anyway (75: stopped cleanly), and only after 5 seconds: ranks on other hosts need 4 to report why.
signalled='' code=0
trap signalled=1 INT TERM
trap : PIPE
"$@" || code=$?
if [[ -z $signalled ]] && (( code > 130 && code < 160 )); then
    echo "launcher.sh: rank $RANK on $(uname -n): killed by signal $(( code - 128 ))" >&2
fi
[[ $code == 0 || $code == 75 || -n $signalled ]] || { sleep 5; echo "cmd=abort exitcode=$code" >&"$PMI_FD" || true; }
exit "$code"
