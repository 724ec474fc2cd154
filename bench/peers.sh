#!/bin/sh
# Decoding in turn with llama2.c, training in turn with llm.c on the CPU, for those that are there; medians and their ratio.
#
#   LLAMA2C=folder LLMC=folder bench/peers.sh
#
# LLAMA2C is where llama2.c was built (make runomp) and has its tokenizer.bin and a model, the largest .bin file. LLMC is where
# llm.c was built (make train_gpt2) and has gpt2_124M.bin and data. Ours are models of the same width, layers, heads,
# vocabulary and GLU, so with about as many parameters. ROUNDS=5 rounds, THREADS=one per core. Each waits for its threads as it
# does by itself, unless OMP_WAIT_POLICY says how.
# Decoding writes TOKENS=100 tokens, the likeliest; GB/s counts the float32 weights that each token reads, 4 · parameters ·
# tokens/s. A training step of llm.c's B sequences of T tokens is timed, its steps 1 to 3 each round; GFLOP/s counts 6 ·
# parameters · tokens/s.
set -u
ours=$(dirname "$0")/..
rounds=${ROUNDS:-5}
tokens=${TOKENS:-100}

stop() { echo "peers.sh: $*" >&2; exit 1; }

[ -n "${LLAMA2C:-}${LLMC:-}" ] || { echo "no LLAMA2C=folder, no LLMC=folder: not compared with llama2.c and llm.c"; exit 0; }
[ -x "$ours/train" ] && [ -x "$ours/run" ] || stop "train and run are missing: make"
if [ -n "${LLAMA2C:-}" ]; then
    [ -d "$LLAMA2C" ] || stop "LLAMA2C: there is no folder $LLAMA2C"
    [ -x "$LLAMA2C/run" ] || stop "$LLAMA2C/run is missing: make runomp in that folder"
    [ -f "$LLAMA2C/tokenizer.bin" ] || stop "$LLAMA2C/tokenizer.bin is missing: it comes with llama2.c"
    llama=$(cd "$LLAMA2C" && ls -S -- *.bin | grep -v '^tok' | head -n 1)
    [ -n "$llama" ] || stop "no model in $LLAMA2C: download one there, such as stories110M.bin"
fi
if [ -n "${LLMC:-}" ]; then
    [ -d "$LLMC" ] || stop "LLMC: there is no folder $LLMC"
    [ -x "$LLMC/train_gpt2" ] || stop "$LLMC/train_gpt2 is missing: make train_gpt2 in that folder"
    [ -f "$LLMC/gpt2_124M.bin" ] || stop "$LLMC/gpt2_124M.bin is missing: dev/download_starter_pack.sh in that folder"
    ls "$LLMC"/dev/data/tiny*/*_train.bin >/dev/null 2>&1 ||
        stop "no data in $LLMC/dev/data: dev/download_starter_pack.sh in that folder"
fi

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
threads=${THREADS:-$("$ours/train" --bench --width 16 --layers 1 --context 16 --batch 1 | sed 's/.* \([0-9]*\) thread.*/\1/')}

figure() {                               # shown and kept: whose, its speed as a formula, the unit
    speed=$(awk "BEGIN { printf \"%.2f\", $2 }" 2>/dev/null) || stop "$1 shows no speed: $(tail -n 1 "$work/output")"
    echo "$1: $speed $3" | tee -a "$work/figures"
}
median() {                               # of the figures of $1
    sed -n "s|^$1: \([0-9.]*\) .*|\1|p" "$work/figures" | sort -n |
        awk '{ x[NR] = $1 } END { print (x[int((NR + 1) / 2)] + x[int(NR / 2) + 1]) / 2 }'
}
compare() {                              # what, the peer's name, threads, the unit
    echo "$(median "metala.c, $1, threads $3") $(median "$2, $1, threads $3")" | awk -v what="$1, threads $3" -v u="$4" \
        -v peer="$2" '{ printf "%s: metala.c %.1f %s, %s %.1f %s, %.2f times as fast\n", what, $1, u, peer, $2, u, $1 / $2 }'
}

decode() {                               # ours and llama2.c's, with $1 threads
    "$ours/run" "$work/model" 1 -n "$tokens" --temperature 0 --threads "$1" >/dev/null 2>"$work/output"
    speed=$(sed -n 's|.*tokens, \([0-9]*\)/s; .*|\1|p' "$work/output")
    figure "metala.c, decoding, threads $1" "4e-9 * $parameters * $speed" GB/s
    (cd "$LLAMA2C" && OMP_NUM_THREADS=$1 ./run "$llama" -t 0 -n "$tokens") >/dev/null 2>"$work/output"
    speed=$(sed -n 's|^achieved tok/s: ||p' "$work/output")
    figure "llama2.c, decoding, threads $1" "1e-9 * $bytes * $speed" GB/s
}
if [ -n "${LLAMA2C:-}" ]; then           # its file: width, GLU, layers, heads, KV heads, vocabulary (negative: not tied)
    set -- $(od -A n -t d4 -N 24 "$LLAMA2C/$llama")
    tie=--tie
    [ "$6" -gt 0 ] || tie=
    "$ours/train" "$ours/README.md" --quiet --max-steps 1 --batch 1 --context 16 --eval-batches 1 --out "$work/model" \
        --width "$1" --glu-dim "$2" --layers "$3" --heads "$4" --vocab "${6#-}" $tie || exit 1
    parameters=$("$ours/run" "$work/model" --info | awk '$1 == "total" { print $2 }')
    bytes=$(wc -c < "$LLAMA2C/$llama")
    round=1
    while [ "$round" -le "$rounds" ]; do
        decode 1
        [ "$threads" -eq 1 ] || decode "$threads"
        round=$((round + 1))
    done
    rm "$work/model"
fi

train() {                                # llm.c, then ours of the sizes that it prints
    (cd "$LLMC" && OMP_NUM_THREADS=$threads $by_line ./train_gpt2 2>&1) | sed '/^step 3:/q' > "$work/output"
    for step in 1 2 3; do
        ms=$(sed -n "s|^step $step:.*took \([0-9.]*\) ms.*|\1|p" "$work/output")
        figure "llm.c, training, threads $threads" "6e-6 * $(size num_parameters) * $B * $T / $ms" GFLOP/s
    done
    "$ours/train" --bench --threads "$threads" --batch "$B" --context "$T" --width "$(size channels)" --layers \
        "$(size num_layers)" --heads "$(size num_heads)" --vocab "$(size padded_vocab_size)" --glu-dim 0 --tie > "$work/ours" ||
        exit 1
    figure "metala.c, training, threads $threads" "$(sed 's|.*, \([0-9.]*\) GFLOP/s.*|\1|' "$work/ours")" GFLOP/s
}
size() { sed -n "s|^$1: ||p" "$work/output"; }
if [ -n "${LLMC:-}" ]; then
    by_line=$(command -v stdbuf >/dev/null && echo "stdbuf -oL")             # without, the first that it shows is step 20
    B=$(sed -n 's/^ *int B = \([0-9]*\);.*/\1/p' "$LLMC/train_gpt2.c" 2>/dev/null)
    T=$(sed -n 's/^ *int T = \([0-9]*\);.*/\1/p' "$LLMC/train_gpt2.c" 2>/dev/null)
    [ -n "$B" ] && [ -n "$T" ] || stop "$LLMC/train_gpt2.c, which says B and T of its batches, has no int B = ...; int T = ...;"
    round=1
    while [ "$round" -le "$rounds" ]; do
        train
        round=$((round + 1))
    done
fi

if [ -n "${LLAMA2C:-}" ]; then
    echo "decoding: metala.c $parameters parameters, llama2.c $((bytes / 4))"
    compare decoding llama2.c 1 GB/s
    [ "$threads" -eq 1 ] || compare decoding llama2.c "$threads" GB/s
fi
if [ -n "${LLMC:-}" ]; then
    echo "training: metala.c $(sed 's|.* P \(.*\): .*|\1|' "$work/ours") parameters, llm.c $(size num_parameters); B$B T$T"
    compare training llm.c "$threads" GFLOP/s
fi
