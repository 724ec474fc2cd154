#!/bin/sh
# Which rows of the general form learn a task of data/tasks? One line of a table each, in Markdown.
#
#   make; bench/tasks.sh recall [--length T --pairs P --vocab V]     pairs of a key and a value
#   make; bench/tasks.sh listops [--length T]                        the value of a nested expression
#   make; bench/tasks.sh pathfinder [--size S --patch P]             whether a path joins two dots
#
#   ROWS="metala gla"   some of the rows       STEPS=4000       OUT=folder, where data and models stay
#   GATES=              recall: gates that start as usual, not with long memories as those of metala and metala-noconv do
#
# Equal width, layers, steps and data; the better of two learning rates, by the accuracy on sequences that were not trained on,
# at the end and after each quarter of the steps. The state of softmax attention is that after 1024 tokens.
set -u
cd "$(dirname "$0")/.." || exit 1
task=${1:-} steps=${STEPS:-4000} gates=
[ $# -eq 0 ] || shift
case $task in
    recall)
        [ $# -gt 0 ] || set -- --length 64 --pairs 8 --vocab 128
        gates=${GATES-"--gate-scale 16 --gate-mean 200"}
        rows=${ROWS:-metala metala-noconv metala-none gla retnet linear based rwkv4 h3 mamba transformer} ;;
    listops | pathfinder)
        [ $# -gt 0 ] || if [ "$task" = listops ]; then set -- --length 64; else set -- --size 16 --patch 4; fi
        rows=${ROWS:-metala metala-noconv gla retnet lru mamba transformer} ;;
    *) echo "tasks.sh: got '$task', expected recall, listops or pathfinder first" >&2; exit 2 ;;
esac
out=${OUT:-$(mktemp -d)} && mkdir -p "$out" || exit 1
data/tasks $task "$@" --sequences 100k --seed 1 > "$out/$task.safetensors" &&
data/tasks $task "$@" --sequences 1k --seed 2 > "$out/$task-test.safetensors" || exit 1
echo "| row | learning rate | after $((steps / 4)) steps | $((steps / 2)) | $((steps * 3 / 4)) | $steps | state |"
echo "|---|---|---|---|---|---|---|"
for row in $rows; do
    for rate in 0.006 0.002; do
        rm -f "$out/$row.$rate.csv"
        ./train "$out/$task.safetensors" --val "$out/$task-test.safetensors" --model "$row" --learning-rate $rate --width 64 \
            --layers 2 --heads 1 --batch 32 $gates --max-steps "$steps" --eval-every $((steps / 4)) \
            --eval-batches 0 --save-every 0 --quiet --log "$out/$row.$rate.csv" --out "$out/$row.safetensors" \
            2> "$out/$row.err" || { echo "$row: $(cat "$out/$row.err")" >&2; continue 2; }
        awk -F, -v rate=$rate 'NR > 1 && $6 != "" { last = $6; line = line sprintf(" %.1f %% |", 100 * $6) }
                               END { print last, rate " |" line }' "$out/$row.$rate.csv"
    done > "$out/$row.tries"
    ./run "$out/$row.safetensors" --info > "$out/$row.info"
    state=$(sed -n 's/^state of a sequence.*: //p; s/^ *1k tokens  *\([0-9.]* [kMG]*B\)$/\1/p' "$out/$row.info")
    echo "| \`$row\` | $(sort -n -r "$out/$row.tries" | sed -n '1s/^[^ ]* //p') $state |"
done
