#!/usr/bin/env bash
# Cut one big Criteo day file (plain or .gz) into day_0 .. day_23, streaming. A second time does nothing.
# usage: ./1_split_dataset.sh DATASET_DIR SPLIT_DIR [SPLIT_LINE=5000000]
#        DATASET_DIR holds day_0 or day_0.gz, or else just one day_*; what is left after 24 parts is dropped
set -euo pipefail
die() { echo "1_split_dataset.sh: $*" >&2; exit 2; }
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;; esac
(( $# == 2 || $# == 3 )) || die "wanted DATASET_DIR SPLIT_DIR [SPLIT_LINE], got $# arguments; see --help"
from=$1 to=$2 lines=${3:-5000000} PARTS=24
[[ $lines =~ ^[1-9][0-9]{0,15}$ ]] || die "SPLIT_LINE=$lines: wanted a number of lines"
[[ -d $from ]] || die "$from is not a folder: give the one that holds day_0 or day_0.gz"
shopt -s nullglob
days=()
for file in "$from"/day_0 "$from"/day_0.gz "$from"/day_*; do
    [[ $file =~ /day_[0-9]+(\.gz)?$ && -f $file ]] && days+=("$file")
done
[[ ${#days[@]} -gt 0 ]] || die "$from holds no day_0 or day_0.gz"
file=${days[0]}
[[ ${file##*/} == day_0* || ${#days[@]} == 1 ]] || die "$from holds ${#days[@]} day files and no day_0: nothing says which one to split"
[[ -r $file ]] || die "$file cannot be read"

# split.txt says what was cut into what: the same again does nothing, and nothing else is overwritten.
wanted="${file##*/} $(stat -L -c '%s bytes, changed %Y' -- "$file"), $lines lines a part"
to=$(realpath -m -- "$to")
if [[ -e $to/split.txt && $(< "$to/split.txt") == "$wanted" ]]; then
    echo "1_split_dataset.sh: nothing to do, $to is this split already"
    exit
fi
[[ ! -e $to || -d $to && -z $(ls -A -- "$to") ]] || die "$to holds something else: remove it, or choose another SPLIT_DIR"

mkdir -p -- "$(dirname "$to")"
part=$(mktemp -d -- "$to.partial.XXXXXX")
trap 'rm -rf -- "$part"' EXIT
echo "1_split_dataset.sh: $file -> $to, $lines lines a part"
reader=(cat)
[[ $file != *.gz ]] || reader=(gzip -dc)
# One line more than needed: a 25th part then shows that something was left over. Stopping early breaks the
# reader's pipe (141), which is no error; a damaged .gz is one.
set +eo pipefail
"${reader[@]}" -- "$file" | head -n $(( PARTS * lines + 1 )) | split -a 2 -d -l "$lines" - "$part/"
codes=("${PIPESTATUS[@]}")
set -eo pipefail
[[ ${codes[0]} == 0 || ${codes[0]} == 141 ]] || die "$file could not be read to its end: is it damaged?"
[[ ${codes[1]}${codes[2]} == 00 ]] || die "$to could not be written: is the disk full?"
[[ -e $part/00 ]] || die "$file is empty"
if [[ -e $part/$PARTS ]]; then
    rm -- "$part/$PARTS"
    echo "1_split_dataset.sh: dropped what is left of $file after $PARTS parts of $lines lines"
fi
count=0
for piece in "$part"/[0-9][0-9]; do mv -- "$piece" "$part/day_$(( count++ ))"; done
echo "$wanted" > "$part/split.txt"
chmod "$(printf '%o' $(( 0777 & ~$(umask) )))" "$part"    # mktemp gave it to its owner alone
mv -T -- "$part" "$to"
echo "1_split_dataset.sh: done, $count parts in $to"
