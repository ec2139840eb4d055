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

submit() {    # submit SCRIPT: hands it to qsub with site.sh's options, and ends
    local resources
    [[ -n ${DLRM_QSUB:-} ]] \
        || die 'set DLRM_QSUB in site.sh, e.g. "-A PROJECT -q debug -l select=1"'
    read -ra resources <<< "$DLRM_QSUB"
    cd -- "$start" || exit    # the job finds relative paths from here, and PBS puts its log here
    # -V and not -v: a comma inside a value would end it there.
    exec qsub -V "${resources[@]}" "$1"
}
