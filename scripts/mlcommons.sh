#!/usr/bin/env bash
# Put MLCommons' DLRM, with patches/mlcommons_training-*.patch, into .cache/mlcommons. A second time
# does nothing. Called by ./0_setup_env.sh --mlcommons and by MODEL=mlcommons ./3_train.sh.
# usage: scripts/mlcommons.sh [CHECKOUT]
#        CHECKOUT: of github.com/mlcommons/training, which stays as it is; without it the program is
#                  cloned: one folder of it, one commit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

url=https://github.com/mlcommons/training
commit=aa344c7fb900e82ed19fb94aebfed50c63ab2204
program=recommendation_v2/torchrec_dlrm
made=.cache/mlcommons

die() {
    echo "scripts/mlcommons.sh: $*" >&2
    exit 2
}

copy_checkout() {    # copy_checkout FOLDER: its program into $new
    mkdir -p -- "$new/$program"
    cp -r -- "$1/$program/." "$new/$program"
}

clone() {    # the program into $new
    git init -q -- "$new"
    git -C "$new" remote add origin "$url"
    git -C "$new" sparse-checkout set "$program"
    if ! git -C "$new" fetch -q --depth 1 --filter=blob:none origin "$commit" \
        || ! git -C "$new" checkout -q FETCH_HEAD; then
        die "$url, commit $commit, cannot be fetched: name a checkout of it: MLCOMMONS_DIR=FOLDER"
    fi
}

apply_patches() {
    local patch
    # Inside a work tree that ignores this folder, git apply would skip every file.
    export GIT_CEILING_DIRECTORIES=$PWD/.cache
    for patch in "$PWD"/patches/mlcommons_training-*.patch; do
        git -C "$new" apply --check --reverse "$patch" 2> /dev/null \
            || git -C "$new" apply "$patch" \
            || die "${patch##*/} does not fit this checkout: take commit $commit"
    done
}

describe() {    # what the program was made of
    [[ -z ${1:-} ]] || find "$1/$program" -name '*.py' -exec sha256sum {} +
    echo "${1:-$commit}"
    cat patches/mlcommons_training-*.patch scripts/mlcommons.sh
}

main() {
    local stamp
    [[ -z ${1:-} || -f $1/$program/dlrm_main.py ]] \
        || die "MLCOMMONS_DIR=$1 has no $program/dlrm_main.py: name a checkout of $url"
    mkdir -p .cache
    exec 9> .cache/mlcommons.lock
    flock 9
    stamp=$(describe "${1:-}" | sha256sum)
    if [[ -f $made.stamp && $(< "$made.stamp") == "$stamp" && -d $made ]]; then return; fi
    new=$PWD/$made.partial
    rm -rf -- "$new"
    if [[ -n ${1:-} ]]; then copy_checkout "$1"; else clone; fi
    apply_patches
    rm -rf -- "$made"
    mv -- "$new" "$made"
    echo "$stamp" > "$made.stamp"
    echo "scripts/mlcommons.sh: MLCommons' DLRM is in $made, patched"
}

main "$@"
