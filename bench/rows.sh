#!/bin/sh
# Every row of the general form trained on the same text: one line of a table each, in Markdown.
#
#   bench/rows.sh TEXT [options of train]           ROWS="metala gla mamba" for some of them, OUT=folder for the models
#
# Equal parameters (--match-params), steps and data. Bits per byte over all of the validation part; the speed of training is the
# median of train --bench, the speed of generation that of 1000 tokens; the state is that of one sequence, whatever its
# length, or, of softmax attention, after 1024 tokens.
set -u
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
text=$1
shift
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-$(mktemp -d)} || exit 1
rows=${ROWS:-$(./run --models | sed -n 's/^\([a-z][a-z0-9-]*\)  .*/\1/p')}
echo "| row | parameters | bits per byte | training, tokens/s | generation, tokens/s | state |"
echo "|---|---|---|---|---|---|"
for row in $rows; do
    rm -f "$out/$row.csv"
    ./train "$text" --model "$row" --match-params --width 192 --max-steps 600 --eval-every 0 --eval-batches 0 --save-every 0 \
        --sample-every 0 --quiet --out "$out/$row.safetensors" --log "$out/$row.csv" "$@" 2>"$out/$row.err" ||
        { echo "$row: $(cat "$out/$row.err")" >&2; continue; }
    ./run "$out/$row.safetensors" A -n 1000 --temperature 1 --seed 1 >"$out/$row.txt" 2>"$out/$row.speed"
    ./run "$out/$row.safetensors" --info >"$out/$row.info"
    speed=$(./train --bench --model "$row" --match-params --width 192 --layers 4 --context 128 "$@" | sed -n 's/.*step, \([0-9]*\) tokens.*/\1/p')
    parameters=$(awk '/^  total/ { printf "%.2f M", $NF / 1e6 }' "$out/$row.info")
    state=$(sed -n 's/^state of a sequence.*: //p; s/^ *1k tokens  *\([0-9.]* [kMG]*B\)$/\1/p' "$out/$row.info")
    written=$(sed -n 's/.*, \([0-9]*\)\/s; position.*/\1/p' "$out/$row.speed")
    awk -F, -v row="$row" -v parameters="$parameters" -v state="$state" -v written="$written" -v speed="$speed" '
        NR > 1 && $5 != "" { loss = $5 }
        END { printf "| `%s` | %s | %.4f | %s | %s | %s |\n", row, parameters, loss / log(2), speed, written, state }' \
        "$out/$row.csv"
done
