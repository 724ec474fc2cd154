#!/bin/sh
# Do the tests bite? Plants each fault of a list in a copy of a source file, builds, and requires that the checks fail.
#
#   tests/mutants.sh [COUNT]       all faults, or COUNT of them, evenly spread;  CC and CFLAGS from the environment
#   ONLY="text" tests/mutants.sh   those whose name contains the text
#   SOURCE=file LIST=list BUILD=command CHECK=command tests/mutants.sh       another file than metala.c: the command BUILD
#       makes $dir/test of $dir/file, and CHECK, which runs in $dir, fails when the fault is noticed (make cuda-mutants, ptx-mutants)
#
#   DRY=1           only looks whether the text of each fault of the list stands on one line of the file
#
# Two folders are worked on at a time (JOBS=2). Exit status 0 when every fault was noticed.
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} CFLAGS=${CFLAGS:--std=c99 -O1} JOBS=${JOBS:-2}
[ "$JOBS" -ge 1 ] || { echo "mutants.sh: JOBS: got '$JOBS', expected 1 or more" >&2; exit 2; }
SOURCE=${SOURCE:-metala.c} LIST=${LIST:-tests/mutants.txt}
BUILD=${BUILD:-'$CC $CFLAGS -I. -o "$dir/test" test.c "$dir/$SOURCE" -lm'} CHECK=${CHECK:-./test --stop}
work=build/$(basename "$LIST" .txt)

try() {                                  # in the folder of one fault: writes to `result` what the tests say about it
    if ! (dir=$1; eval "$BUILD") > "$1/log" 2>&1; then echo "does not compile" > "$1/result"
    elif (cd "$1" && timeout "${LIMIT:-900}" sh -c "$CHECK" > log 2>&1); then echo "NOT NOTICED" > "$1/result"
    else
        tail -n 60 "$1/log" | grep -a -m 1 -E 'FAILED|Sanitizer|runtime error|cuda_on_cpu|ptx_on_cpu' | cut -c 1-100 > "$1/result"
        [ -s "$1/result" ] || echo "crashed" > "$1/result"
    fi
    rm -f "$1/test"
}

if [ -z "${DRY:-}" ]; then
    rm -rf "$work"
    mkdir -p "$work/000"                 # without a fault the tests must pass, or noticing one would mean nothing
    cp "$SOURCE" "$work/000/$SOURCE"
fi

# One folder for each fault: its name, and the source with the fault in it.
awk -v work="$work" -v what="$SOURCE" -v list="$LIST" -v count="${1:-0}" -v only="${ONLY:-}" -v dry="${DRY:-}" '
    function find(f,   i, hits) {        # the line of a fault
        for (i = 1; i <= lines; i++) if (index(source[i], olds[f])) { hits++; place[f] = i }
        if (hits == 1) return
        printf "%s: \"%s\": its text stands on %d lines of %s, must be 1\n", list, names[f], hits, what
        bad = 1
    }
    function plant(   i, at, from, folder, file) {
        at = place[number]
        folder = work "/" sprintf("%03d", number)
        file = folder "/" what
        system("mkdir -p " folder)
        print name > (folder "/name")
        for (i = 1; i <= lines; i++)
            if (i != at) print source[i] > file
            else {
                from = index(source[at], old)
                print substr(source[at], 1, from - 1) new substr(source[at], from + length(old)) > file
            }
        close(folder "/name"); close(file)
    }
    FNR == NR { source[++lines] = $0; next }
    /^= / { names[++total] = substr($0, 3) }
    /^- / { olds[total] = substr($0, 3) }
    /^\+ / { news[total] = substr($0, 3) }
    END {
        for (f = 1; f <= total; f++) find(f)
        if (bad || dry) exit bad
        for (f = 1; f <= total; f++) {
            if (count > 0 && int(f * count / total) == int((f - 1) * count / total)) continue
            if (only != "" && !index(names[f], only)) continue
            number = f; name = names[f]; old = olds[f]; new = news[f]
            plant()
        }
    }' "$SOURCE" "$LIST" || exit 1

[ -z "${DRY:-}" ] || exit 0
worker() {                               # takes the next folder that nobody has, until the tests fail without a fault
    for folder in "$work"/*/; do
        if [ -s "$work/000/result" ] && ! grep -q '^NOT NOTICED' "$work/000/result"; then return; fi
        mkdir "${folder}taken" 2> /dev/null && try "${folder%/}"
    done
}
jobs=0
while [ "$jobs" -lt "$JOBS" ]; do jobs=$((jobs + 1)); worker & done
wait
unfaulted=$(cat "$work/000/result")
[ "$unfaulted" = "NOT NOTICED" ] || { echo "the tests fail without any fault: $unfaulted"; exit 1; }
rm -r "$work/000"
noticed=0 missed=0
for folder in "$work"/*/; do
    [ -d "$folder" ] || continue
    result=$(cat "$folder/result")
    printf '%-72s %s\n' "$(cat "$folder/name")" "$result"
    case $result in
        "NOT NOTICED" | "does not compile") missed=$((missed + 1)) ;;
        *) noticed=$((noticed + 1)) ;;
    esac
done
echo "$noticed noticed, $missed missed"
[ "$missed" -eq 0 ] && [ "$noticed" -gt 0 ]
