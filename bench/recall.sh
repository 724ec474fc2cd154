#!/bin/sh
# Associative recall: which rows of the general form learn it? One line of a table each, in Markdown.
#
#   bench/recall.sh [--length T --pairs P --vocab V]      ROWS="metala gla" for some of them, OUT=folder for the models,
#                                                         GATES= for gates that start as usual
#
# Equal width, layers, steps and data; the better of two learning rates, by the accuracy on sequences that were not trained on,
# at the end and after each quarter of the steps. Decays that are made as MetaLA's start with long memories, all else as always.
# The state of softmax attention is that after 1024 tokens.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-$(mktemp -d)} || exit 1
rows=${ROWS:-metala metala-noconv metala-none gla retnet linear based rwkv4 h3 mamba transformer}
gates=${GATES-"--gate-scale 16 --gate-mean 200"}
steps=4000
[ $# -gt 0 ] || set -- --length 64 --pairs 8 --vocab 128
data/tasks recall "$@" --sequences 100k --seed 1 > "$out/recall.safetensors" &&
data/tasks recall "$@" --sequences 1k --seed 2 > "$out/recall-test.safetensors" || exit 1
echo "| row | learning rate | after $((steps / 4)) steps | $((steps / 2)) | $((steps * 3 / 4)) | $steps | state |"
echo "|---|---|---|---|---|---|---|"
for row in $rows; do
    for rate in 0.006 0.002; do
        rm -f "$out/$row.$rate.csv"
        ./train "$out/recall.safetensors" --val "$out/recall-test.safetensors" --model "$row" --learning-rate $rate --width 64 \
            --layers 2 --heads 1 --batch 32 $gates --max-steps $steps --eval-every $((steps / 4)) \
            --eval-batches 0 --save-every 0 --quiet --log "$out/$row.$rate.csv" --out "$out/$row.safetensors" \
            2> "$out/$row.err" || { echo "$row: $(cat "$out/$row.err")" >&2; continue 2; }
        awk -F, -v rate=$rate 'NR > 1 && $6 != "" { last = $6; line = line sprintf(" %.1f %% |", 100 * $6) }
                               END { print last, rate " |" line }' "$out/$row.$rate.csv"
    done > "$out/$row.tries"
    ./run "$out/$row.safetensors" --info > "$out/$row.info"
    state=$(sed -n 's/^state of a sequence.*: //p; s/^ *1k tokens  *\([0-9.]* [kMG]*B\)$/\1/p' "$out/$row.info")
    echo "| \`$row\` | $(sort -n -r "$out/$row.tries" | sed -n '1s/^[^ ]* //p') $state |"
done
