#!/usr/bin/env python3
"""What PyTorch does on the same GPU for the products and scans of `build/bench --device cuda`: products are cuBLAS's, the
scan is chunk_gla of flash-linear-attention where that is installed (pip install flash-linear-attention).

    python3 bench/pytorch_gpu.py --math bf16      # or tf32, exact
    python3 bench/pytorch_gpu.py --device cpu --divide 64        # only to try the program

Medians of 9 rounds of as many calls as take 30 ms, queued behind a pause so that Python's own time does not count. Tensors are
random, and in that type beforehand; ours start from float, write float and add to dW. chunk_gla takes bfloat16 with --math
bf16, else float, the logarithm of the decay in float, and always uses tensor cores; it first tries hundreds of kernels, for each
shape anew, which takes minutes.
"""
import argparse
import gc
import statistics
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("pytorch_gpu.py: cannot import torch; this comparison is optional, install it with: pip install torch")
try:
    from fla.ops.gla import chunk_gla
except Exception as error:                                    # without a GPU not only ImportError
    chunk_gla, reason = None, f"{type(error).__name__}: {error}"

PRODUCTS = [(512, 1024), (1024, 1024), (2816, 1024), (1024, 2816), (4096, 4096)]         # outputs and inputs of 16384 rows
SCANS = [(8, 2048, 8, 64, 128), (8, 2048, 8, 128, 256), (1, 16384, 8, 64, 128)]          # B, T, H, K, V


def median_time(call, cuda, rounds=9):
    """Median seconds of a call."""
    times, calls = [], 1
    for i in range(-2, rounds):                               # the first round warms up, the second finds the number of calls
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(20_000_000)                     # cycles, 10 ms
            start.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
            each = 1e-3 * start.elapsed_time(end) / calls
        else:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            each = (time.perf_counter() - start) / calls
        if i == -1:
            calls = int(0.03 / each) + 1
        if i >= 0:
            times.append(each)
    return statistics.median(times)


def forget_choices():
    """Some of chunk_gla's kernels would take over for a shape what was fastest for the one before."""
    from triton.runtime.autotuner import Autotuner
    for x in gc.get_objects():
        if issubclass(type(x), Autotuner):
            x.cache.clear()


def line(name, shape, seconds, operations):
    print(f"{name:<24} {shape:<28} {1e3 * seconds:9.3f} ms {1e-9 * operations / seconds:10.1f} GFLOP/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--math", choices=["exact", "tf32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--divide", type=int, default=1, help="sizes by this")
    parser.add_argument("--only", choices=["products", "scans"])
    a = parser.parse_args()
    if a.divide < 1:
        parser.error(f"--divide: got {a.divide}, expected 1 or more")
    cuda = a.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("pytorch_gpu.py: PyTorch finds no GPU here; --device cpu --divide 64 tries the program")
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = a.math == "tf32"
    kind = torch.bfloat16 if a.math == "bf16" else torch.float32
    part = lambda n: max(n // a.divide, 1)
    random = lambda *shape, dtype=kind: torch.randn(*shape, device=a.device, dtype=dtype)
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {a.math}", flush=True)

    for rows, out, into in [(8192, 8192, 8192)] + [(16384, out, into) for out, into in PRODUCTS]:
        if a.only == "scans":
            break
        rows, out, into = part(rows), part(out), part(into)
        x, w, dy = random(rows, into), random(out, into), random(rows, out)
        shape, operations = f"{rows} rows, {out} out, {into} in", 2 * rows * out * into
        line("matmul y = x W'", shape, median_time(lambda: x @ w.T, cuda), operations)
        line("matmul dx = dy W", shape, median_time(lambda: dy @ w, cuda), operations)
        line("matmul dW = dy' x", shape, median_time(lambda: dy.T @ x, cuda), operations)

    if a.only == "products":
        return
    if chunk_gla is None or not cuda:
        return print(f"chunk_gla: not measured, {'it needs a GPU' if chunk_gla else reason}")
    for B, T, H, K, V in SCANS:
        T, work = part(T), B * part(T) * H * K * V
        q, k, v, do = (random(B, T, H, n) for n in (K, K, V, V))
        alpha = torch.rand(B, T, H, K, device=a.device)
        tensors = [q, k, v, alpha.log().clamp(min=-20)]
        shape = f"B{B} T{T} H{H} K{K} V{V}"
        forget_choices()
        line("chunk_gla forward", shape, median_time(lambda: chunk_gla(*tensors), cuda), 4 * work)
        for x in tensors:
            x.requires_grad_()
        o, _ = chunk_gla(*tensors)
        backward = lambda: torch.autograd.grad(o, tensors, do, retain_graph=True)
        line("chunk_gla backward", shape, median_time(backward, cuda), 12 * work)


main()
