#!/bin/sh
# All that only a GPU can say, in one go: are the kernels right, how fast are they, and next to PyTorch where that is there.
#
#   make CUDA=1 CUDA_ARCH="80 90a" gpu-report            (an H100 or H200; CUDA_ARCH=80 for an A100)
#
# Prints what matters; all that the parts printed is in build/gpu. A part that fails is said and the others go on; exit status
# 1 then. LIMIT=150 seconds for each part. PARTS="selftest test sanitizer bench train peers", in this order. SANITIZE="kernel "
# says which checks run under compute-sanitizer, where that is installed. TEST, SELFTEST, BENCH, TRAIN: other programs; SIZES
# of the model that trains. Arguments are files for the test.
set -u
cd "$(dirname "$0")/.." || exit 1
test=${TEST:-build/test} selftest=${SELFTEST:-build/selftest-cuda} bench=${BENCH:-build/bench} train=${TRAIN:-./train}
limit=${LIMIT:-150} sizes=${SIZES:---width 1024 --layers 24 --heads 8 --glu-dim 2816 --vocab 32000 --context 2048 --batch 8}
failed=0
mkdir -p build/gpu || exit 1
for program in "$test" "$selftest" "$bench" "$train"; do
    [ -x "$program" ] || { echo "gpu.sh: $program is missing: make CUDA=1 gpu-report" >&2; exit 1; }
done
if command -v timeout > /dev/null; then within="timeout $limit"; else within=""; fi

run() {                                  # NAME COMMAND...: to build/gpu/NAME, and how it ended
    name=$1 log=build/gpu/$1 began=$(date +%s)
    shift
    $within "$@" > "$log" 2>&1
    status=$?
    case $status in
    0) end="done" ;;
    124) end="NOT FINISHED within LIMIT=$limit" failed=1 ;;
    *) end="FAILED, status $status" failed=1 ;;
    esac
    echo
    echo "== $name: $end, $(($(date +%s) - began)) s, $*"
    if [ $status -ne 0 ]; then grep -a -E -A 3 'FAILED|ERROR|Error' "$log" | head -n "${LINES_OF_ERROR:-12}"; fi
}
says() { grep -a -E -e "$1" "$log" | tail -n "${2:-99}"; }
wants() { case " ${PARTS:-selftest test sanitizer bench train peers} " in *" $1 "*) true ;; *) false ;; esac; }

date -u '+%Y-%m-%d %H:%M UTC'
if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; fi

if wants selftest; then run selftest "$selftest"; says passed 1; fi
if wants test; then
    for math in exact tf32 bf16; do
        run "test-$math" "$test" --device cuda --math $math "$@"
        says ' passed' 1
    done
fi
if wants sanitizer; then
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            run $tool compute-sanitizer --tool $tool --error-exitcode 9 "$test" --device cuda --math bf16 --only "${SANITIZE:-kernel }"
            says ' passed|SUMMARY' 2
        done
    else echo; echo "no compute-sanitizer in PATH: not tried"; fi
fi
if wants bench; then
    for math in bf16 tf32 exact; do
        run "bench-$math" "$bench" --device cuda --math $math
        says 'FLOP/s|GB/s'
    done
fi
if wants train; then
    for math in bf16 tf32; do
        # shellcheck disable=SC2086
        run "train-$math" "$train" --bench --profile --keep-all --device cuda --math $math $sizes
        says '^bench'
    done
fi
if wants peers; then
    if python3 -c 'import torch' 2> /dev/null; then
        run peers python3 bench/pytorch_gpu.py --math bf16
        says 'FLOP/s|PyTorch|chunk_gla'
    else echo; echo "python3 has no torch: our own figures only"; fi
fi
[ $failed -eq 0 ] && echo && echo "all parts done"
exit $failed
