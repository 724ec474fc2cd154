#!/bin/sh
# Do the tests bite? Plants each fault of mutants.txt in a copy of metala.c, builds, and requires that ./test fails.
#
#   tests/mutants.sh [COUNT]       all faults, or COUNT of them, evenly spread;  CC and CFLAGS from the environment
#   ONLY="text" tests/mutants.sh   those whose name contains the text
#
# Two faults are tried at a time (JOBS=2). Exit status 0 when every fault was noticed.
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} CFLAGS=${CFLAGS:--std=c99 -O1} JOBS=${JOBS:-2}
work=build/mutants
rm -rf "$work"
mkdir -p "$work"

try() {                                  # in the folder of one fault: 0 when the tests noticed it
    if ! $CC $CFLAGS -I. -o "$1/test" test.c "$1/metala.c" -lm > "$1/log" 2>&1; then echo "does not compile" > "$1/result"
    elif (cd "$1" && timeout "${LIMIT:-900}" ./test --stop > log 2>&1); then echo "NOT NOTICED" > "$1/result"
    else
        tail -n 60 "$1/log" | grep -a -m 1 -E 'FAILED|Sanitizer|runtime error' | cut -c 1-100 > "$1/result"
        [ -s "$1/result" ] || echo "crashed" > "$1/result"
    fi
    rm -f "$1/test"
}

mkdir -p "$work/000"                     # without a fault they must pass, or noticing one would mean nothing
cp metala.c "$work/000/metala.c"
try "$work/000"
[ "$(cat "$work/000/result")" = "NOT NOTICED" ] || { echo "the tests fail without any fault: $(cat "$work/000/result")"; exit 1; }
rm -r "$work/000"

# One folder for each fault: its name, and metala.c with the fault in it.
awk -v work="$work" -v count="${1:-0}" -v only="${ONLY:-}" '
    function plant(   i, at, hits, folder, file) {
        for (i = 1; i <= lines; i++) if (index(source[i], old)) { hits++; at = i }
        if (hits != 1) { printf "mutants.txt: \"%s\": its text stands on %d lines of metala.c, must be 1\n", name, hits; bad = 1; exit }
        folder = work "/" sprintf("%03d", number)
        file = folder "/metala.c"
        system("mkdir -p " folder)
        print name > (folder "/name")
        for (i = 1; i <= lines; i++)
            if (i != at) print source[i] > file
            else {
                place = index(source[i], old)
                print substr(source[i], 1, place - 1) new substr(source[i], place + length(old)) > file
            }
        close(folder "/name"); close(file)
    }
    FNR == NR { source[++lines] = $0; next }
    /^= / { names[++total] = substr($0, 3) }
    /^- / { olds[total] = substr($0, 3) }
    /^\+ / { news[total] = substr($0, 3) }
    END {
        if (bad) exit 1
        for (f = 1; f <= total; f++) {
            if (count > 0 && int(f * count / total) == int((f - 1) * count / total)) continue
            if (only != "" && !index(names[f], only)) continue
            number = f; name = names[f]; old = olds[f]; new = news[f]
            plant()
            if (bad) exit 1
        }
    }' metala.c tests/mutants.txt || exit 1

noticed=0 missed=0 running=0
for folder in "$work"/*/; do
    try "${folder%/}" &
    running=$((running + 1))
    [ "$running" -lt "$JOBS" ] || { wait; running=0; }
done
wait
for folder in "$work"/*/; do
    result=$(cat "$folder/result")
    printf '%-72s %s\n' "$(cat "$folder/name")" "$result"
    case $result in
        "NOT NOTICED" | "does not compile") missed=$((missed + 1)) ;;
        *) noticed=$((noticed + 1)) ;;
    esac
done
echo "$noticed noticed, $missed missed"
[ "$missed" -eq 0 ] && [ "$noticed" -gt 0 ]
