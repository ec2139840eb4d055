# shellcheck shell=bash
# What differs by machine; this file is for any Linux machine or cluster. A new site is a copy of it
# under another name. 0_setup_env.sh takes the first other file of this folder whose `site_is_here`
# says yes, and this one if none does. A function that a site leaves out is the one of this file.

# Is this machine of that site? Look at files, not at host names: compute nodes have other names
# than login nodes.
site_is_here() { true; }

# Which build of torch: cuda or cpu. Login nodes often have no GPU though the nodes of a job do.
site_variant() {
    if nvidia-smi -L 2> /dev/null | grep -q GPU; then echo cuda; else echo cpu; fi
}

# What the packages are installed into: conda (an environment of its own) or venv.
site_environment() {
    if [[ -n $(type -P conda mamba micromamba "${CONDA_EXE:-}" "${MAMBA_EXE:-}") ]]; then
        echo conda
    else
        echo venv
    fi
}

# Before anything is installed: modules to load, a proxy to reach the package index. Fails with a
# message.
site_load_modules() { true; }

# The line that starts ranks, with {N} in all, {PPN} on each node and {DEPTH} cores for each.
# Empty: the setup finds out.
site_mpiexec() { true; }

# Lines for env.sh, which every script reads on every node: exports, and modules to unload.
site_print_env() { true; }
