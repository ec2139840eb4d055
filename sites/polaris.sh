# shellcheck shell=bash
# ALCF's Polaris: PBS, 4 A100 a node, Cray MPICH started by PALS.
# generic.sh says what each function is for.

site_is_here() { [[ -d /soft/modulefiles && -d /opt/cray ]]; }

site_variant() { echo cuda; }    # login nodes have no GPU

# As ALCF recommends: a virtual environment on top of the conda module's base. A conda environment
# of one's own would download a second Python and its libraries into a home folder with a quota.
site_environment() { echo venv; }

site_load_modules() {
    export http_proxy=${http_proxy:-http://proxy.alcf.anl.gov:3128}
    export https_proxy=${https_proxy:-$http_proxy}
    set +u    # the module system reads variables that may be unset
    { module use /soft/modulefiles && module load conda && conda activate base; } \
        || die "module load conda failed"
    set -u
}

site_mpiexec() { echo 'mpiexec -n {N} --ppn {PPN} --depth {DEPTH} --cpu-bind depth'; }

site_print_env() {
    cat <<'ENV'
# Darshan and DFTracer in one process fight over the same calls.
if [[ ${LOADEDMODULES:-} == *darshan* ]]; then module unload darshan || true; fi
export DLRM_GPU_ORDER=reverse    # the last GPU is nearest to the first cores
newest() { printf '%s\n' "$@" | sort -V | tail -1; }
libraries=${CRAY_MPICH_DIR:+$CRAY_MPICH_DIR/lib-abi-mpich:}
libraries+=$(newest /soft/libraries/aws-ofi-nccl/*/lib):$(newest /soft/libraries/hwloc/lib*)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# What you have exported yourself stays. If a job hangs in NCCL, unset the first four in site.sh.
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL-PHB} NCCL_CROSS_NIC=${NCCL_CROSS_NIC-1}
export NCCL_COLLNET_ENABLE=${NCCL_COLLNET_ENABLE-1} NCCL_NET="${NCCL_NET-AWS Libfabric}"
export FI_CXI_DISABLE_HOST_REGISTER=${FI_CXI_DISABLE_HOST_REGISTER-1}
export FI_MR_CACHE_MONITOR=${FI_MR_CACHE_MONITOR-userfaultfd}
export FI_CXI_DEFAULT_CQ_SIZE=${FI_CXI_DEFAULT_CQ_SIZE-131072}
ENV
}
