// bench.c - what metala.c's kernels reach of what this machine can do, both measured in the same run.
//
//   build/bench [--threads N] [--only TEXT] [--rounds N]
//
// First the limits: multiply-adds in registers alone (GFLOP/s), and reading an array that no cache holds (GB/s). Then a
// line for each kernel and shape: median time of the rounds, its rate, and that rate as a share of the limit that
// bounds it. A round repeats a kernel for at least 30 ms. Rates of kernels that move data count each tensor once.

#if !defined(_POSIX_C_SOURCE) && (defined(__unix__) || defined(__APPLE__))
#define _POSIX_C_SOURCE 200809L         // clock_gettime; everything else is C99
#endif

#include "metala.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef metala_real real;
static metala_context *ctx;
static const metala_backend *be;
static const char *only = "";
static int rounds = 5;
static double peak, bandwidth;           // GFLOP/s, GB/s

static double seconds(void) {
#ifdef _POSIX_C_SOURCE
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#elif defined _OPENMP
    return omp_get_wtime();
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// Median seconds of one call.
static double median_time(void (*call)(void *), void *data) {
    enum { MOST = 99 };
    double times[MOST];
    call(data);
    for (int r = 0; r < rounds && r < MOST; r++) {
        double start = seconds(), passed;
        int calls = 0;
        do call(data), calls++;
        while ((passed = seconds() - start) < 0.03);
        times[r] = passed / calls;
    }
    qsort(times, (size_t)rounds, sizeof *times, by_size);
    return times[rounds / 2];
}

static const char *time_text(double s) {
    static char text[20];
    snprintf(text, sizeof text, s < 1e-3 ? "%.1f us" : s < 1 ? "%.2f ms" : "%.2f s", s < 1e-3 ? 1e6 * s : s < 1 ? 1e3 * s : s);
    return text;
}

// A line of the table; operations and bytes of one call, 0 = not counted.
static void line(const char *name, const char *shape, double time, double operations, double bytes) {
    printf("%-22s %-28s %10s", name, shape, time_text(time));
    if (operations > 0) printf(" %8.1f GFLOP/s %4.0f %%\n", 1e-9 * operations / time, 1e-7 * operations / time / peak);
    else printf(" %8.1f GB/s    %4.0f %%\n", 1e-9 * bytes / time, 1e-7 * bytes / time / bandwidth);
    fflush(stdout);
}

// ------------------------------------------------------------------------------------------------ the limits

#if defined __AVX512F__
enum { VEC_BYTES = 64 };
#elif defined __AVX__
enum { VEC_BYTES = 32 };
#else
enum { VEC_BYTES = 16 };
#endif
#ifdef __GNUC__
typedef real vec __attribute__((vector_size(VEC_BYTES)));
enum { LANES = VEC_BYTES / sizeof(real) };
#else
typedef real vec;
enum { LANES = 1 };
#endif

// Twelve independent chains of x = x a + b, as many as hide the latency of a multiply-add.
static real multiply_add_chains(size_t n, real start) {
    vec zero = {0};
    vec a = zero + (real)0.999, b = zero + (real)0.001, x[12];
    for (int i = 0; i < 12; i++) x[i] = zero + start + (real)i;
    for (size_t j = 0; j < n; j++) {
        x[0] = x[0] * a + b, x[1] = x[1] * a + b, x[2] = x[2] * a + b, x[3] = x[3] * a + b;
        x[4] = x[4] * a + b, x[5] = x[5] * a + b, x[6] = x[6] * a + b, x[7] = x[7] * a + b;
        x[8] = x[8] * a + b, x[9] = x[9] * a + b, x[10] = x[10] * a + b, x[11] = x[11] * a + b;
    }
    vec sum = x[0];
    for (int i = 1; i < 12; i++) sum += x[i];
    real lanes[LANES], total = 0;
    memcpy(lanes, &sum, sizeof lanes);
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

enum { CHAIN = 200000, BIG = 1 << 26 };   // multiply-adds of a chain; numbers of the array, 256 MB
static real *big;
static volatile real sink;

static void run_chains(void *unused) {
    (void)unused;
    real sum = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(metala_context_threads(ctx)) reduction(+ : sum)
#endif
    sum += multiply_add_chains(CHAIN, (real)0.5);
    sink = sum;
}

static void run_reads(void *unused) {
    (void)unused;
    real sum = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(metala_context_threads(ctx)) reduction(+ : sum)
#endif
    for (int part = 0; part < 64; part++) {
        const real *x = big + (size_t)part * (BIG / 64);
        vec s[4] = {{0}, {0}, {0}, {0}}, v;
        for (size_t i = 0; i < BIG / 64; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                memcpy(&v, x + i + j * LANES, sizeof v);
                s[j] += v;
            }
        s[0] += s[1] + s[2] + s[3];
        memcpy((void *)&v, s, sizeof v);
        real lanes[LANES];
        memcpy(lanes, &v, sizeof lanes);
        for (int j = 0; j < LANES; j++) sum += lanes[j];
    }
    sink = sum;
}

// ------------------------------------------------------------------------------------------------ kernels

// Sizes and tensors of a call; what a kernel does not need is not touched.
typedef struct {
    size_t B, T, D, H, K, V, N, rows, out, in;
    metala_form form;
    real *x[12];
    int *tokens;
} call_data;

enum { ROOM = 1 << 24 };                  // numbers of each of the tensors x[i]

static void matmul_y(void *p) { call_data *c = p; be->matmul_forward(ctx, c->x[0], c->x[1], c->x[2], NULL, c->rows, c->out, c->in); }
static void matmul_dx(void *p) { call_data *c = p; be->matmul_backward(ctx, c->x[0], NULL, NULL, c->x[1], NULL, c->x[2], c->rows, c->out, c->in, 0); }
static void matmul_dw(void *p) { call_data *c = p; be->matmul_backward(ctx, NULL, c->x[0], NULL, c->x[1], c->x[2], NULL, c->rows, c->out, c->in, 0); }
static void scan_forward(void *p) {
    call_data *c = p;
    be->scan_forward(ctx, c->form, c->x[0], NULL, c->x[1], c->x[2], c->x[3], c->x[4], c->x[5], c->B, c->T, c->H, c->K, c->V, 0.1);
}
static void scan_backward(void *p) {
    call_data *c = p;
    be->scan_backward(ctx, c->form, c->x[6], c->x[7], c->x[8], c->x[9], NULL, c->x[10], c->x[1], c->x[2], c->x[3], c->x[4],
                      c->x[5], c->B, c->T, c->H, c->K, c->V, 0.1);
}
static void rms_forward(void *p) { call_data *c = p; be->rms_forward(ctx, c->x[0], c->x[1], c->x[2], NULL, c->rows, c->D, 1e-6); }
static void rms_backward(void *p) { call_data *c = p; be->rms_backward(ctx, c->x[0], c->x[3], c->x[2], c->x[1], NULL, c->rows, c->D); }
static void conv_forward(void *p) { call_data *c = p; be->conv_forward(ctx, c->x[0], c->x[1], c->x[2], c->x[3], NULL, c->B, c->T, c->D); }
static void conv_backward(void *p) {
    call_data *c = p;
    be->conv_backward(ctx, c->x[4], c->x[5], c->x[0], c->x[1], c->x[2], c->x[3], NULL, c->B, c->T, c->D);
}
static void gate_forward(void *p) { call_data *c = p; be->gate_forward(ctx, c->x[0], c->x[1], c->x[2], c->rows * c->D, 16); }
static void gate_backward(void *p) { call_data *c = p; be->gate_backward(ctx, c->x[3], c->x[4], c->x[5], c->x[2], c->x[0], c->rows * c->D, 16); }
static void silu_forward(void *p) { call_data *c = p; be->silu_gate_forward(ctx, c->x[0], c->x[1], c->x[2], c->rows * c->D); }
static void silu_backward(void *p) { call_data *c = p; be->silu_gate_backward(ctx, c->x[3], c->x[4], c->x[0], c->x[1], c->x[2], c->rows * c->D); }
static void augment_forward(void *p) {
    call_data *c = p;
    be->augment_forward(ctx, c->x[0], c->x[1], c->x[2], c->x[3], c->x[4], c->x[5], c->rows, c->H, c->K, c->V);
}
static void augment_backward(void *p) {
    call_data *c = p;
    be->augment_backward(ctx, c->x[6], c->x[7], c->x[8], c->x[9], c->x[0], c->x[2], c->x[3], c->x[4], c->x[5], c->rows, c->H, c->K, c->V);
}
static void head_norm_forward(void *p) { call_data *c = p; be->head_norm_forward(ctx, c->x[0], c->x[1], c->x[2], c->rows, c->H, c->V, 1e-5); }
static void head_norm_backward(void *p) { call_data *c = p; be->head_norm_backward(ctx, c->x[3], c->x[4], c->x[0], c->x[1], c->rows, c->H, c->V); }
static void loss_forward(void *p) { call_data *c = p; be->cross_entropy_forward(ctx, c->x[0], c->x[1], c->x[2], c->tokens, c->rows, c->N); }
static void loss_backward(void *p) { call_data *c = p; be->cross_entropy_backward(ctx, c->x[3], c->x[2], c->x[1], c->tokens, c->rows, c->N, 1e-3); }
static void adamw(void *p) {
    call_data *c = p;
    const metala_adamw a = {1e-9, 0.9, 0.95, 1e-8, 0.1, 0};
    be->adamw(ctx, c->x[0], c->x[1], c->x[2], c->x[3], ROOM, &a, 10, 1, 0.1);
}

static void bench_kernels(call_data *c) {
    // Bytes: tensors of rows × D that are read or written, each once.
    static const struct { const char *name; void (*call)(void *); int tensors; } kernels[] = {
        {"rms forward", rms_forward, 2}, {"rms backward", rms_backward, 4}, {"conv forward", conv_forward, 3},
        {"conv backward", conv_backward, 4}, {"gate forward", gate_forward, 3}, {"gate backward", gate_backward, 5},
        {"silu gate forward", silu_forward, 3}, {"silu gate backward", silu_backward, 5},
        {"augment forward", augment_forward, 4}, {"augment backward", augment_backward, 7},
        {"head norm forward", head_norm_forward, 2}, {"head norm backward", head_norm_backward, 3}};
    char shape[60];
    c->B = 8, c->T = 512, c->D = 512, c->H = 8, c->K = 32, c->V = 64, c->N = 8192, c->rows = 4096;
    snprintf(shape, sizeof shape, "B8 T512 D512 H8");
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (strstr(kernels[i].name, only))
            line(kernels[i].name, shape, median_time(kernels[i].call, c), 0,
                 (double)kernels[i].tensors * (double)c->rows * (double)c->D * sizeof(real));
    c->rows = 2048;
    if (strstr("cross-entropy forward", only))
        line("cross-entropy forward", "2048 rows N8192", median_time(loss_forward, c), 0, 2048.0 * 8192 * sizeof(real));
    if (strstr("cross-entropy backward", only))
        line("cross-entropy backward", "2048 rows N8192", median_time(loss_backward, c), 0, 2 * 2048.0 * 8192 * sizeof(real));
    if (strstr("adamw", only)) line("adamw", "16.8 M parameters", median_time(adamw, c), 0, 7.0 * ROOM * sizeof(real));
}

static void bench_matmul(call_data *c) {
    static const size_t sizes[][2] = {{256, 256}, {512, 512}, {1024, 1024}, {2048, 2048}, {256, 2048}, {2048, 256},
                                      {704, 256}, {1408, 512}};
    static const struct { const char *name; void (*call)(void *); } forms[] = {
        {"matmul y = x W'", matmul_y}, {"matmul dx = dy W", matmul_dx}, {"matmul dW += dy' x", matmul_dw}};
    c->rows = 1536;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int f = 0; f < 3; f++) {
            char shape[60];
            c->out = sizes[s][0], c->in = sizes[s][1];
            snprintf(shape, sizeof shape, "1536 rows, %zu out, %zu in", c->out, c->in);
            if (strstr(forms[f].name, only))
                line(forms[f].name, shape, median_time(forms[f].call, c), 2.0 * 1536 * (double)c->out * (double)c->in, 0);
        }
}

static void bench_scan(call_data *c) {
    static const size_t shapes[][5] = {{8, 256, 4, 32, 64}, {4, 256, 8, 32, 64}, {1, 1024, 8, 64, 128}, {1, 16384, 8, 64, 128}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int form = METALA_CHUNKWISE; form <= METALA_RECURRENT; form++) {
            char shape[60];
            const char *const names[2][2] = {{"scan chunk forward", "scan chunk backward"},
                                             {"scan recurrent forward", "scan recurr. backward"}};
            c->B = shapes[s][0], c->T = shapes[s][1], c->H = shapes[s][2], c->K = shapes[s][3], c->V = shapes[s][4];
            c->form = (metala_form)form;
            double work = (double)(c->B * c->T * c->H * c->K * c->V);    // of a state update or a read: one multiply-add
            snprintf(shape, sizeof shape, "B%zu T%zu H%zu K%zu V%zu", c->B, c->T, c->H, c->K, c->V);
            if (c->T > 4096 && form == METALA_RECURRENT) continue;
            if (!strstr(names[form][0], only) && !strstr(names[form][1], only)) continue;
            line(names[form][0], shape, median_time(scan_forward, c), 4 * work, 0);
            line(names[form][1], shape, median_time(scan_backward, c), 12 * work, 0);
        }
}

// ------------------------------------------------------------------------------------------------ main

int main(int argc, char **argv) {
    int threads = 0;
    call_data c = {0};
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--threads")) threads = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--only")) only = argv[i + 1];
        else if (!strcmp(argv[i], "--rounds") && atoi(argv[i + 1]) > 0) rounds = atoi(argv[i + 1]) < 99 ? atoi(argv[i + 1]) : 99;
        else argc = 2;
    }
    if (argc % 2 == 0) {
        fprintf(stderr, "usage: bench [--threads N] [--only TEXT] [--rounds N]\n");
        return 2;
    }
    ctx = metala_open(NULL, threads);
    if (!ctx) return 1;
    be = metala_context_backend(ctx);
    big = be->alloc(BIG * sizeof *big);
    c.tokens = calloc(1 << 16, sizeof *c.tokens);
    uint64_t random = 1;
    for (size_t i = 0; i < sizeof c.x / sizeof *c.x; i++)
        if ((c.x[i] = be->alloc(ROOM * sizeof(real))) != NULL)
            for (size_t j = 0; j < ROOM; j++) c.x[i][j] = (real)metala_uniform(&random);
    if (!big || !c.tokens || !c.x[11]) {
        fprintf(stderr, "bench: out of memory, 1.1 GB are needed\n");
        return 1;
    }
    memset(big, 1, BIG * sizeof *big);
    peak = 2.0 * 12 * CHAIN * LANES * metala_context_threads(ctx) / median_time(run_chains, NULL) * 1e-9;
    bandwidth = (double)BIG * sizeof *big / median_time(run_reads, NULL) * 1e-9;
    printf("%d threads, vectors of %d bytes: %.1f GFLOP/s of multiply-adds in registers, %.1f GB/s read from memory\n\n",
           metala_context_threads(ctx), (int)VEC_BYTES, peak, bandwidth);
    printf("%-22s %-28s %10s %8s %17s\n", "kernel", "shape", "time", "rate", "of the limit");
    bench_matmul(&c);
    bench_scan(&c);
    bench_kernels(&c);
    printf("\nat the end: %.1f GFLOP/s, ", 2.0 * 12 * CHAIN * LANES * metala_context_threads(ctx) / median_time(run_chains, NULL) * 1e-9);
    printf("%.1f GB/s\n", (double)BIG * sizeof *big / median_time(run_reads, NULL) * 1e-9);
    for (size_t i = 0; i < sizeof c.x / sizeof *c.x; i++) be->free(c.x[i]);
    be->free(big);
    free(c.tokens);
    metala_close(ctx);
    return 0;
}
