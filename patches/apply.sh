#!/usr/bin/env bash
# Apply the patches to the torchrec in SITE_PACKAGES. A second time does nothing.
# usage: patches/apply.sh SITE_PACKAGES
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
    echo "patches/apply.sh: $*" >&2
    exit 2
}

site=$(cd "${1:?usage: patches/apply.sh SITE_PACKAGES}" && pwd -P)

shopt -s nullglob
installed=("$site"/torchrec-*.dist-info)
[[ ${#installed[@]} == 1 ]] \
    || die "$site holds ${#installed[@]} torchrec installations, wanted 1:" \
        "remove the environment and run 0_setup_env.sh"
version=${installed[0]##*/torchrec-}
version=${version%.dist-info}

# Inside a git work tree that ignores this folder, git apply would skip every file and report
# success.
export GIT_CEILING_DIRECTORIES=${site%/*}
for patch in "$here"/torchrec-*.patch; do
    name=${patch##*/}
    [[ $name == "torchrec-$version-"* ]] \
        || die "$name is not for the installed torchrec $version: remake it against that version"
    if git -C "$site" apply --check --reverse "$patch" 2> /dev/null; then
        continue    # it is in already
    fi
    git -C "$site" apply "$patch" || die "$name does not fit the torchrec $version in $site"
    git -C "$site" apply --check --reverse "$patch" || die "$name left no change in $site"
    # Python tells a stale .pyc by second and size, and both may be the same as before.
    file=$(sed -n 's|^+++ b/||p' "$patch")
    rm -f "$site/${file%/*}/__pycache__/$(basename "$file" .py)".*.pyc
    echo "patched: $name"
done
