#!/usr/bin/env bash
# Cut one big Criteo day file (plain or .gz) into day_0 .. day_23, in constant memory. A second call
# with the same arguments does nothing.
# usage: ./1_split_dataset.sh DATASET_DIR SPLIT_DIR [SPLIT_LINE=5000000]
#        DATASET_DIR holds day_0 or day_0.gz, or else just one day_*
#        lines after the 24th part are dropped
set -euo pipefail

PARTS=24
shopt -s nullglob

say() { echo "1_split_dataset.sh: $*"; }

die() {
    say "$@" >&2
    exit 2
}

print_help() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }

# site.sh's settings; this script needs no environment, so it also works before the setup.
load_settings() {
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    if [[ -e $here/env.sh ]]; then
        source "$here/env.sh"    # it reads site.sh, too
    elif [[ -e ${DLRM_SITE:-$here/site.sh} ]]; then
        source "${DLRM_SITE:-$here/site.sh}"
    fi
    [[ -z ${DLRM_UMASK:-} ]] || umask "$DLRM_UMASK"
}

find_day_file() {    # sets `file`: day_0 if there is one, else the only day_*
    local candidate days=()
    [[ -d $from ]] || die "$from is not a folder: give the one that holds day_0 or day_0.gz"
    for candidate in "$from"/day_0 "$from"/day_0.gz "$from"/day_*; do
        if [[ $candidate =~ /day_[0-9]+(\.gz)?$ && -f $candidate ]]; then
            days+=("$candidate")
        fi
    done
    [[ ${#days[@]} -gt 0 ]] || die "$from holds no day_0 or day_0.gz"
    file=${days[0]}
    if [[ ${file##*/} != day_0* && ${#days[@]} != 1 ]]; then
        die "$from holds ${#days[@]} day files and no day_0: nothing says which one to split"
    fi
    [[ -r $file ]] || die "$file cannot be read"
}

# split.txt in the output says what was cut, and how: the same again does nothing, and no other
# folder is overwritten.
describe_split() {
    echo "${file##*/} $(stat -L -c '%s bytes, changed %Y' -- "$file"), $lines lines a part"
}

check_output() {    # ends the script if the work is done, or if the folder holds something else
    local left
    if [[ -e $to/split.txt && $(< "$to/split.txt") == "$(describe_split)" ]]; then
        say "nothing to do, $to is this split already"
        exit
    fi
    if [[ -e $to ]] && [[ ! -d $to || -n $(ls -A -- "$to") ]]; then
        die "$to holds something else: remove it, or choose another SPLIT_DIR"
    fi
    for left in "$to".partial.*; do
        say "$left is of another run; remove it if that run was killed" >&2
    done
}

cut_into_parts() {    # writes 00, 01, ... into the folder `part`
    local codes reader=(cat)
    [[ $file != *.gz ]] || reader=(gzip -dc)
    # One line more than needed: a 25th part then shows that something was left over. Stopping early
    # breaks the reader's pipe (141), which is not an error; a damaged .gz is one.
    set +eo pipefail
    "${reader[@]}" -- "$file" \
        | head -n $(( PARTS * lines + 1 )) \
        | split -a 2 -d -l "$lines" - "$part/"
    codes=("${PIPESTATUS[@]}")
    set -eo pipefail
    if [[ ${codes[0]} != 0 && ${codes[0]} != 141 ]]; then
        die "$file could not be read to its end: is it damaged?"
    fi
    [[ ${codes[1]}${codes[2]} == 00 ]] || die "$to could not be written: is the disk full?"
    [[ -e $part/00 ]] || die "$file is empty"
    if [[ -e $part/$PARTS ]]; then
        rm -- "$part/$PARTS"
        say "dropped the rest of $file after $PARTS parts of $lines lines"
    fi
}

advise_shorter_parts() {    # advise_shorter_parts COUNT LINES_OF_LAST: how to get all the parts
    local all=$(( ($1 - 1) * lines + $2 ))
    local each=$(( (all + PARTS - 1) / PARTS ))
    say "only $1 of $PARTS parts: $file has $all lines"
    (( each * (PARTS - 1) >= all )) || say "for $PARTS parts give SPLIT_LINE=$each"
}

publish_parts() {    # names the parts day_0, day_1, ... and gives the folder its name
    local piece count=0
    for piece in "$part"/[0-9][0-9]; do
        mv -- "$piece" "$part/day_$count"
        count=$(( count + 1 ))
    done
    describe_split > "$part/split.txt"
    chmod "$(printf '%o' $(( 0777 & ~$(umask) )))" "$part"    # mktemp gave it to its owner alone
    mv -T -- "$part" "$to"
    say "done, $count parts in $to"
    (( count == PARTS )) || advise_shorter_parts "$count" "$(wc -l < "$to/day_$(( count - 1 ))")"
}

main() {
    case ${1:-} in
        -h | --help)
            print_help
            exit
            ;;
    esac
    (( $# == 2 || $# == 3 )) \
        || die "wanted DATASET_DIR SPLIT_DIR [SPLIT_LINE], got $# arguments; see --help"
    load_settings
    from=$1
    to=$(realpath -m -- "$2")
    lines=${3:-5000000}
    [[ $lines =~ ^[1-9][0-9]{0,15}$ ]] || die "SPLIT_LINE=$lines: wanted a number of lines"
    find_day_file
    check_output

    mkdir -p -- "$(dirname "$to")"
    # A folder under a random name that only this run knows: all that is in it is this run's own.
    part=$(mktemp -d -- "$to.partial.XXXXXXXXXX")
    trap 'rm -rf -- "$part"' EXIT
    say "$file -> $to, $lines lines a part"
    cut_into_parts
    publish_parts
}

main "$@"
