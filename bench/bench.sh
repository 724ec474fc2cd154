#!/bin/sh
# The speed of a training step, ours and PyTorch's, one after the other for some rounds; medians and their ratio.
#
#   bench/bench.sh [--width D --layers L --heads H --glu-dim F --batch B --context T --threads N]
#
# ROUNDS=5 rounds. GFLOP/s counts 6 · parameters · tokens/s. Without PyTorch for python3, only our own figures.
set -u
cd "$(dirname "$0")/.." || exit 1
rounds=${ROUNDS:-5}
figures=$(mktemp) || exit 1
trap 'rm -f "$figures"' EXIT

peers="chunk recurrent"
python3 -c 'import torch' 2>/dev/null || { peers=""; echo "python3 has no torch: our own figures only"; }
round=1
while [ "$round" -le "$rounds" ]; do
    ./train --bench "$@" | tee -a "$figures" || exit 1
    for scan in $peers; do
        [ "$scan" = recurrent ] && [ "$round" -gt 2 ] && continue        # slow, and not the one to beat
        python3 bench/pytorch_metala.py --scan "$scan" --steps 3 "$@" | tee -a "$figures" || exit 1
    done
    round=$((round + 1))
done

median() {                               # of the ms/step of lines that contain $1
    grep -a "$1" "$figures" | sed 's|.*: \([0-9.]*\) ms/step.*|\1|' | sort -n |
        awk '{ x[NR] = $1 } END { if (NR) print (x[int((NR + 1) / 2)] + x[int(NR / 2) + 1]) / 2 }'
}
ours=$(median '^bench')
echo "metala.c: $ours ms/step"
for scan in $peers; do
    theirs=$(median "scan $scan")
    awk -v o="$ours" -v t="$theirs" -v s="$scan" \
        'BEGIN { printf "PyTorch, %s scan: %s ms/step, %.2f times as long\n", s, t, t / o }'
done
