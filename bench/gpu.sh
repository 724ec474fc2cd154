#!/bin/sh
# All that only a GPU can say, in one go: are the kernels right, how fast are they, and next to PyTorch where that is there.
#
#   make CUDA=1 gpu-report
#
# Prints what matters; all that the parts printed is in build/gpu. A part that fails is said and the others go on; exit status
# 1 then. From the environment:
#   PARTS="selftest test sanitizer bench train products scans"       in this order; the last two are PyTorch's, and the scans are
#                   flash-linear-attention's, which tries hundreds of kernels first
#   LIMIT=600       seconds for each run
#   SIZES="…"       of the model that trains, options of train: 380 M parameters and 41 GB (28 without its --keep-all)
#   SANITIZE="kernel "      the checks that run under compute-sanitizer, as test --only
#   TEST, SELFTEST, BENCH, TRAIN        other programs
# Arguments go to the test.
set -u
cd "$(dirname "$0")/.." || exit 1
test=${TEST:-build/test} selftest=${SELFTEST:-build/selftest-cuda} bench=${BENCH:-build/bench} train=${TRAIN:-./train}
all="selftest test sanitizer bench train products scans"
parts=${PARTS:-$all} limit=${LIMIT:-600} failed=0 pid=
sizes=${SIZES:---width 1024 --layers 24 --heads 8 --glu-dim 2816 --vocab 32000 --context 2048 --batch 8 --keep-all}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

stop() { echo "gpu.sh: $*" >&2; exit 1; }
wants() { case " $parts " in *" $1 "*) true ;; *) false ;; esac; }
needs() { [ -x "$1" ] || stop "$1 is missing: make CUDA=1 gpu-report"; }
for part in $parts; do
    case " $all " in *" $part "*) ;; *) stop "PARTS: got $part, expected some of $all" ;; esac
done
case $limit in '' | *[!0-9]*) stop "LIMIT: got $limit, expected seconds" ;; esac
needs "$test"
if wants selftest; then needs "$selftest"; fi
if wants bench; then needs "$bench"; fi
if wants train; then needs "$train"; fi
rm -rf build/gpu
mkdir -p build/gpu || exit 1
if command -v timeout > /dev/null; then within="timeout -k 10 $limit"
else within="" && echo "no timeout in PATH: a run that hangs is not ended"; fi
trap '[ -z "$pid" ] || kill "$pid"; exit 130' HUP INT TERM

run() {                                  # NAME COMMAND...: to build/gpu/NAME, and how it ended
    name=$1 log=build/gpu/$1 began=$(date +%s)
    shift
    $within "$@" > "$log" 2>&1 &
    pid=$!
    wait $pid
    status=$? pid=
    case $status in
    0) end="done" ;;
    124 | 137) end="NOT FINISHED within LIMIT=$limit" failed=1 ;;
    *) end="FAILED, status $status" failed=1 ;;
    esac
    echo
    echo "== $name: $end, $(($(date +%s) - began)) s, $*"
    [ $status -eq 0 ] && return
    grep -a -A 3 -E 'FAILED|[Ee]rror|ERROR|Invalid|Uninitialized|Race reported' "$log" | head -n 12
    tail -n 3 "$log"
}
says() { grep -a -E -e "$1" "$log"; }
skipped() { echo; echo "== $1: not tried, $2"; }

date -u '+%Y-%m-%d %H:%M UTC'
cat build/flags 2> /dev/null
if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; fi
# Without a GPU train goes on with the CPU, and nothing here would mean anything.
run gpu "$test" --device cuda --only "kernel rms"
[ $failed -eq 0 ] || exit 1

if wants selftest; then run selftest "$selftest"; says 'wgmma|passed'; fi
if wants test; then
    for math in exact tf32 bf16; do
        run "test-$math" "$test" --device cuda --math $math "$@"
        says ' passed'
    done
fi
if wants sanitizer; then
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            run $tool compute-sanitizer --tool $tool --error-exitcode 9 "$test" --device cuda --math bf16 \
                --only "${SANITIZE:-kernel }"
            says ' passed|SUMMARY'
        done
    else skipped sanitizer "no compute-sanitizer in PATH"; fi
fi
if wants bench; then
    for math in bf16 tf32 exact; do
        run "bench-$math" "$bench" --device cuda --math $math
        says 'FLOP/s|GB/s'
    done
fi
if wants train; then                     # the profile waits after each kernel, so its steps are slower
    for math in bf16 tf32; do
        # shellcheck disable=SC2086
        run "train-$math" "$train" --bench --device cuda --math $math $sizes
        says '^bench'
    done
    # shellcheck disable=SC2086
    run profile "$train" --bench --profile --device cuda --math bf16 $sizes
    says '%|kernel'
fi
for part in products scans; do
    wants $part || continue
    if ! python3 -c 'import torch' 2> build/gpu/torch; then skipped $part "python3 cannot import torch"; continue; fi
    run $part python3 bench/pytorch_gpu.py --math bf16 --only $part
    says '^(matmul|chunk_gla|PyTorch)'
done
[ $failed -eq 0 ] && echo && echo "no part failed"
exit $failed
