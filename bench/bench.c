// bench.c - what metala.c's kernels reach of what this machine can do, both measured in the same run.
//
//   build/bench [--threads N] [--only TEXT] [--rounds N] [--device cpu|cuda] [--math exact|tf32|bf16] [--divide N]
//
// First the limits. On the CPU: multiply-adds in registers alone (GFLOP/s), and reading an array that no cache holds (GB/s).
// On a GPU: a product of matrices of 8192 × 8192 in the chosen --math (by cuBLAS in a build with CUBLAS=1), and a copy of 2^26 numbers.
// There --divide makes all sizes smaller, to try this program. Then a line for each kernel and shape, and for a model that
// reads a prompt and writes tokens: median time of the rounds, its rate, and that rate as a share of the limit that bounds
// it. A round repeats a kernel for about 30 ms. Rates of kernels that move data count each tensor once.

#if !defined(_POSIX_C_SOURCE) && (defined(__unix__) || defined(__APPLE__))
#define _POSIX_C_SOURCE 200809L         // clock_gettime; everything else is C99
#endif

#include "metala.h"

#include <float.h>
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
    int calls = 1;
    call(data);
    for (int r = -1; r < rounds && r < MOST; r++) {                  // the first one finds out how many calls to make
        be->download(ctx, NULL, NULL, 0);                            // waits for a GPU
        double start = seconds();
        for (int i = 0; i < calls; i++) call(data);
        be->download(ctx, NULL, NULL, 0);
        double each = (seconds() - start) / calls;
        if (r >= 0) times[r] = each;
        else calls = each > 0.03 ? 1 : each > 1e-6 ? (int)(0.03 / each) + 1 : 30000;
    }
    if (metala_context_failed(ctx)) {
        fprintf(stderr, "bench: %s\n", metala_error(ctx));
        exit(1);
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
#if defined __GNUC__ && (FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16)      // as in metala.c
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
        vec zero = {0}, s[4] = {zero, zero, zero, zero}, v;
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
    int shared;                           // of the scan's inputs
    real *x[12];
    int *tokens;
} call_data;

static size_t room = 1 << 24;             // numbers of each of the tensors x[i]

static void product(real *y, const real *x, const real *w, size_t rows, size_t out, size_t in) {
    const metala_linear layer = {y, w, NULL, NULL, NULL, out};
    be->matmul_forward(ctx, &layer, 1, x, rows, in);
}
static void product_backward(real *dx, real *dw, const real *dy, const real *x, const real *w, size_t rows, size_t out, size_t in) {
    const metala_linear_gradient layer = {dw, NULL, dy, w, out};
    be->matmul_backward(ctx, dx, &layer, 1, x, rows, in, 0);
}
static void matmul_y(void *p) { call_data *c = p; product(c->x[0], c->x[1], c->x[2], c->rows, c->out, c->in); }
static void matmul_dx(void *p) { call_data *c = p; product_backward(c->x[0], NULL, c->x[1], NULL, c->x[2], c->rows, c->out, c->in); }
static void matmul_dw(void *p) { call_data *c = p; product_backward(NULL, c->x[0], c->x[1], c->x[2], NULL, c->rows, c->out, c->in); }
static void scan_forward(void *p) {
    call_data *c = p;
    be->scan_forward(ctx, c->form, c->x[0], NULL, c->x[1], c->x[2], c->x[3], c->x[4], c->x[5], c->B, c->T, c->H, c->K, c->V, 0.1, c->shared);
}
static void scan_backward(void *p) {
    call_data *c = p;
    be->scan_backward(ctx, c->form, c->x[6], c->x[7], c->x[8], c->x[9], NULL, c->x[10], c->x[1], c->x[2], c->x[3], c->x[4],
                      c->x[5], c->B, c->T, c->H, c->K, c->V, 0.1, c->shared);
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
static void silu_backward(void *p) { call_data *c = p; be->silu_gate_backward(ctx, c->x[3], c->x[4], NULL, c->x[0], c->x[1], c->x[2], c->rows * c->D); }
static void augment_forward(void *p) {
    call_data *c = p;
    be->augment_forward(ctx, c->x[0], c->x[1], c->x[2], c->x[3], c->x[4], c->x[5], c->rows, c->H, c->K, c->V);
}
static void augment_backward(void *p) {
    call_data *c = p;
    be->augment_backward(ctx, c->x[6], c->x[7], c->x[8], c->x[9], c->x[0], c->x[2], c->x[3], c->x[4], c->x[5], c->rows, c->H, c->K, c->V);
}
static void head_norm_forward(void *p) {
    call_data *c = p;
    be->head_norm_forward(ctx, c->x[5], c->x[0], c->x[1], c->x[2], c->x[6], c->rows, c->H, c->V, 1e-5);
}
static void head_norm_backward(void *p) {
    call_data *c = p;
    be->head_norm_backward(ctx, c->x[3], c->x[7], c->x[4], c->x[0], c->x[1], c->x[6], c->rows, c->H, c->V);
}
static void loss_forward(void *p) { call_data *c = p; be->cross_entropy_forward(ctx, c->x[0], c->x[1], c->x[2], c->tokens, c->rows, c->N); }
static void loss_backward(void *p) { call_data *c = p; be->cross_entropy_backward(ctx, c->x[3], c->x[2], c->x[1], c->tokens, c->rows, c->N, 1e-3); }
static void output_backward(void *p) {
    call_data *c = p;
    be->output_backward(ctx, c->x[3], c->x[4], c->x[2], c->x[1], c->tokens, c->x[5], c->x[6], c->rows, c->N, c->D, 1e-3);
}
static void adamw(void *p) {
    call_data *c = p;
    const metala_adamw a = {1e-9, 0.9, 0.95, 1e-8, 0.1, 0};
    be->adamw(ctx, c->x[0], c->x[1], c->x[2], c->x[3], room, &a, 10, 1, 0.1);
}

// The shapes: those of the CPU, or of a GPU, divided.
static int on_gpu;
static size_t divide = 1;
static size_t part(size_t n) { return n / divide ? n / divide : 1; }

static void bench_kernels(call_data *c, size_t B, size_t T, size_t D, size_t N) {
    // Bytes: tensors of rows × D that are read or written, each once.
    static const struct { const char *name; void (*call)(void *); int tensors; } kernels[] = {
        {"rms forward", rms_forward, 2}, {"rms backward", rms_backward, 4}, {"conv forward", conv_forward, 3},
        {"conv backward", conv_backward, 4}, {"gate forward", gate_forward, 3}, {"gate backward", gate_backward, 5},
        {"silu gate forward", silu_forward, 3}, {"silu gate backward", silu_backward, 5},
        {"augment forward", augment_forward, 4}, {"augment backward", augment_backward, 7},
        {"head norm forward", head_norm_forward, 4}, {"head norm backward", head_norm_backward, 5}};
    char shape[60];
    c->B = B, c->T = T, c->D = D, c->H = 8, c->K = D / 16, c->V = D / 8, c->N = N, c->rows = B * T;
    snprintf(shape, sizeof shape, "B%zu T%zu D%zu H8", B, T, D);
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (strstr(kernels[i].name, only))
            line(kernels[i].name, shape, median_time(kernels[i].call, c), 0,
                 (double)kernels[i].tensors * (double)c->rows * (double)c->D * sizeof(real));
    c->rows = part(2048);
    double logits = (double)c->rows * (double)c->N;
    snprintf(shape, sizeof shape, "%zu rows N%zu", c->rows, c->N);
    if (strstr("cross-entropy forward", only)) line("cross-entropy forward", shape, median_time(loss_forward, c), 0, logits * sizeof(real));
    if (strstr("cross-entropy backward", only))
        line("cross-entropy backward", shape, median_time(loss_backward, c), 0, 2 * logits * sizeof(real));
    snprintf(shape, sizeof shape, "%zu rows N%zu D%zu", c->rows, c->N, c->D);
    if (strstr("output backward", only))
        line("output backward", shape, median_time(output_backward, c), 4 * logits * (double)c->D, 0);
    snprintf(shape, sizeof shape, "%.1f M parameters", (double)room / 1e6);
    if (strstr("adamw", only)) line("adamw", shape, median_time(adamw, c), 0, 7.0 * (double)room * sizeof(real));
}

static void bench_matmul(call_data *c, size_t rows, const size_t (*sizes)[2], size_t count) {
    static const struct { const char *name; void (*call)(void *); } forms[] = {
        {"matmul y = x W'", matmul_y}, {"matmul dx = dy W", matmul_dx}, {"matmul dW += dy' x", matmul_dw}};
    c->rows = rows;
    for (size_t s = 0; s < count; s++)
        for (int f = 0; f < 3; f++) {
            char shape[60];
            c->out = part(sizes[s][0]), c->in = part(sizes[s][1]);
            snprintf(shape, sizeof shape, "%zu rows, %zu out, %zu in", rows, c->out, c->in);
            if (!strstr(forms[f].name, only) || (rows == 1 && f > 0)) continue;
            double products = (double)rows * (double)c->out * (double)c->in;
            double time = median_time(forms[f].call, c);             // of one row, the weights are read and little else
            line(forms[f].name, shape, time, rows > 1 ? 2 * products : 0, products * sizeof(real));
        }
}

// All of a SwiGLU: 6·rows·F·D operations forward, twice as many backward.
static void swiglu_forward(void *p) {
    call_data *c = p;
    size_t D = c->in, F = c->out;
    const metala_linear layers[3] = {{c->x[0], c->x[9], NULL, NULL, NULL, F}, {c->x[1], c->x[9] + F * D, NULL, NULL, NULL, F},
                                     {c->x[7], c->x[9] + 2 * F * D, NULL, NULL, c->x[8], D}};
    be->swiglu_forward(ctx, layers, sizeof(real) == sizeof(double) ? METALA_F64 : METALA_F32, c->x[2], c->x[6], c->rows, D);
}
static void swiglu_backward(void *p) {
    call_data *c = p;
    size_t D = c->in, F = c->out;
    const metala_linear_gradient layers[3] = {{c->x[10], NULL, NULL, c->x[9], F},
                                              {c->x[10] + F * D, NULL, NULL, c->x[9] + F * D, F},
                                              {c->x[10] + 2 * F * D, NULL, c->x[8], c->x[9] + 2 * F * D, D}};
    be->swiglu_backward(ctx, c->x[7], layers, c->x[2], c->x[3], c->x[4], c->x[5], c->x[0], c->x[1], c->x[6], c->rows, D);
}
static void bench_swiglu(call_data *c, size_t rows, size_t D, size_t F) {
    char shape[60];
    c->rows = rows, c->in = D, c->out = F;
    snprintf(shape, sizeof shape, "%zu rows, D%zu F%zu", rows, D, F);
    double products = (double)rows * (double)D * (double)F;
    if (strstr("swiglu forward", only)) line("swiglu forward", shape, median_time(swiglu_forward, c), 6 * products, 0);
    if (strstr("swiglu backward", only)) line("swiglu backward", shape, median_time(swiglu_backward, c), 12 * products, 0);
}

static void bench_scan(call_data *c, const size_t (*shapes)[5], size_t count) {
    for (size_t s = 0; s < count; s++)
        for (int form = METALA_CHUNKWISE; form <= METALA_RECURRENT; form++) {
            char shape[60];
            const char *const names[2][2] = {{"scan chunk forward", "scan chunk backward"},
                                             {"scan recurrent forward", "scan recurr. backward"}};
            c->B = shapes[s][0], c->T = part(shapes[s][1]), c->H = shapes[s][2], c->K = shapes[s][3], c->V = shapes[s][4];
            c->form = (metala_form)form;
            double work = (double)(c->B * c->T * c->H * c->K * c->V);    // of a state update or a read: one multiply-add
            snprintf(shape, sizeof shape, "B%zu T%zu H%zu K%zu V%zu", c->B, c->T, c->H, c->K, c->V);
            if ((c->T > 4096 || on_gpu) && form == METALA_RECURRENT) continue;
            if (!strstr(names[form][0], only) && !strstr(names[form][1], only)) continue;
            line(names[form][0], shape, median_time(scan_forward, c), 4 * work, 0);
            line(names[form][1], shape, median_time(scan_backward, c), 12 * work, 0);
        }
}

// One token: swiglu_step reads W_1 and W_2, mixer_step reads and writes the states.
static void swiglu_step(void *p) {
    call_data *c = p;
    const metala_linear layers[2] = {{c->x[0], c->x[1], NULL, NULL, NULL, c->out}, {c->x[2], c->x[3], NULL, NULL, NULL, c->out}};
    be->swiglu_step(ctx, c->x[4], layers, sizeof(real) == sizeof(double) ? METALA_F64 : METALA_F32, c->x[5], c->x[6], c->x[7],
                    c->rows, c->in, 1e-5);
}
static void conv_step(void *p) {
    call_data *c = p;
    be->conv_step(ctx, c->x[0], c->x[1], c->x[2], c->x[3], c->B, c->D, 1e-5);
}
static void mixer_step(void *p) {
    call_data *c = p;
    be->mixer_step(ctx, c->x[0], c->x[1], c->x[2], c->x[3], c->x[4], c->x[5], c->x[6], c->B, c->H, c->K, c->V, 16, 0.1, 1e-5);
}
static void bench_steps(call_data *c) {
    char size[60];
    c->B = c->rows = 1, c->D = c->in = part(1024), c->out = part(2816);
    snprintf(size, sizeof size, "D%zu F%zu", c->in, c->out);
    if (strstr("conv step", only))
        line("conv step", size, median_time(conv_step, c), 0, 13.0 * (double)c->D * sizeof(real));
    if (strstr("swiglu step", only))
        line("swiglu step", size, median_time(swiglu_step, c), 0, 2.0 * (double)c->out * (double)c->in * sizeof(real));
    static const size_t shapes[][4] = {{1, 8, 64, 128}, {1, 8, 128, 256}, {32, 8, 64, 128}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes && strstr("mixer step", only); s++) {
        char shape[60];
        c->B = shapes[s][0], c->H = shapes[s][1], c->K = shapes[s][2], c->V = shapes[s][3];
        snprintf(shape, sizeof shape, "B%zu H%zu K%zu V%zu", c->B, c->H, c->K, c->V);
        line("mixer step", shape, median_time(mixer_step, c), 0, 2.0 * (double)(c->B * c->H * c->K * c->V) * sizeof(real));
    }
}

enum { ONE_Q = METALA_SHARED_QUERY, ONE_K = METALA_SHARED_KEY, ONE_A = METALA_CONSTANT_DECAY, ONE_B = METALA_SHARED_SEQUENCES };

// The shapes that other linear models bring, with what they share: SSMs have V = 1, linear RNNs K = 1, and a normaliser is a
// value channel more. How many state elements (H·K·V for each token) are updated in a second, how many times as many they are of MetaLA's shape,
// which is first, and GB/s of tensors that are read or written, each counted once: for narrow heads memory is the limit.
static void bench_shapes(call_data *c, const size_t (*shapes)[6], size_t count) {
    double first[2] = {0, 0};
    for (size_t s = 0; s < count; s++)
        for (int backward = 0; backward < 2; backward++) {
            const char *name = backward ? "scan shapes backward" : "scan shapes forward";
            char shape[60];
            c->B = shapes[s][0], c->T = shapes[s][1], c->H = shapes[s][2], c->K = shapes[s][3], c->V = shapes[s][4];
            c->form = METALA_CHUNKWISE, c->shared = (int)shapes[s][5];
            if (!strstr(name, only)) continue;
            double own = (c->shared & ONE_B ? 2.0 / (double)c->B : !(c->shared & ONE_Q) + !(c->shared & ONE_K)) + !(c->shared & ONE_A);
            snprintf(shape, sizeof shape, "B%zu T%zu H%zu K%zu V%zu%s%s%s%s%s", c->B, c->T, c->H, c->K, c->V,
                     c->shared ? " one " : "", c->shared & ONE_Q ? "q" : "", c->shared & ONE_K ? "k" : "", c->shared & ONE_A ? "α" : "",
                     c->shared & ONE_B ? " B" : "");
            double time = median_time(backward ? scan_backward : scan_forward, c), tokens = (double)(c->B * c->T);
            double rate = 1e-9 * tokens * (double)(c->H * c->K * c->V) / time;
            double numbers = (double)c->H * (own * (double)c->K * (backward ? 2 : 1) + (double)(c->V * (backward ? 3 : 2)));
            if (s == 0) first[backward] = rate;
            printf("%-22s %-30s %10s %8.0f ns/token %6.2f G elements/s, MetaLA's %5.1f times %6.1f GB/s\n", name, shape,
                   time_text(time), 1e9 * time / tokens, rate, first[backward] / rate,
                   1e-9 * numbers * sizeof(real) * tokens / time);
            fflush(stdout);
        }
    c->shared = 0;
}

// ------------------------------------------------------------------------------------------------ models

// Reading a prompt is bound by arithmetic, writing a token by reading all weights, of the embedding one row.
typedef struct {
    metala_state *state;
    size_t T;
    int *tokens, failed;
    real *logits;
} reader;
static void prefill(void *p) { reader *r = p; r->failed |= metala_prefill(ctx, r->state, r->tokens, NULL, r->T, r->logits); }
static void step(void *p) { reader *r = p; r->failed |= metala_step(ctx, r->state, r->tokens, r->logits); }

static void bench_model(void) {
    static const struct { const char *name; metala_dtype type; } kinds[] = {
        {"model, a token", METALA_F32}, {"model, a token, bf16", METALA_BF16}, {"model, a token, int8", METALA_I8}};
    metala_config c = metala_config_default();
    c.width = (int)part(64) * 12, c.layers = 12, c.heads = 6, c.glu_dim = (int)part(64) * 32, c.vocab_size = (int)part(8192);
    if (on_gpu) {                                                    // a GPU needs a larger one: 380 M parameters
        c.width = (int)part(64) * 16, c.layers = (int)part(24), c.heads = 8, c.glu_dim = (int)part(64) * 44;
        c.vocab_size = (int)part(32000);
    }
    for (int i = 0; i < 3; i++) {
        if (!strstr(kinds[i].name, only) && (i || !strstr("model, a prompt", only))) continue;
        metala_model *m = metala_model_create(ctx, &c);
        reader r = {.T = part(1024)};
        r.tokens = calloc(r.T, sizeof *r.tokens), r.logits = malloc((size_t)c.vocab_size * sizeof(real));
        r.failed = !m || !r.tokens || !r.logits || metala_model_init(ctx, m, 1, NULL)
                || (i && metala_model_quantize(ctx, m, kinds[i].type)) || !(r.state = metala_state_create(ctx, m, 1));
        double numbers = (double)c.vocab_size * c.width, bytes = m ? (double)metala_model_bytes(m) : 0;
        char shape[60];
        snprintf(shape, sizeof shape, "D%d L%d H%d N%d", c.width, c.layers, c.heads, c.vocab_size);
        if (!r.failed && strstr(kinds[i].name, only))
            line(kinds[i].name, shape, median_time(step, &r), 0, bytes - numbers * sizeof(real));
        if (!r.failed && !i && strstr("model, a prompt", only)) {
            snprintf(shape, sizeof shape, "%zu tokens, the same", r.T);
            line("model, a prompt", shape, median_time(prefill, &r), 2.0 * (bytes / sizeof(real) - 2 * numbers) * (double)r.T, 0);
        }
        if (r.failed) {
            fprintf(stderr, "bench: %s: %s\n", kinds[i].name, metala_error(ctx));
            exit(1);
        }
        metala_state_free(r.state), metala_model_free(m), free(r.tokens), free(r.logits);
    }
}

// ------------------------------------------------------------------------------------------------ main

static const size_t cpu_products[][2] = {{256, 256}, {512, 512}, {1024, 1024}, {2048, 2048}, {256, 2048}, {2048, 256},
                                         {704, 256}, {1408, 512}};
static const size_t cpu_scans[][5] = {{8, 256, 4, 32, 64}, {4, 256, 8, 32, 64}, {1, 1024, 8, 64, 128}, {1, 16384, 8, 64, 128}};
static const size_t other_scans[][6] = {{8, 256, 4, 32, 64, 0}, {4, 256, 4, 64, 128, 0},
    {4, 256, 512, 16, 1, ONE_Q + ONE_K},                                      // mamba, twice as many heads as D
    {4, 256, 256, 32, 1, ONE_B + ONE_A},                                      // s4d, dss, h3
    {8, 256, 256, 1, 2, 0},                                                   // rwkv4: a value and the ones
    {8, 256, 256, 1, 2, ONE_Q}, {8, 256, 256, 1, 2, ONE_Q + ONE_K + ONE_A},   // glru; lru, s5: a complex number
    {4, 256, 8, 273, 33, ONE_A}, {4, 256, 4, 64, 65, ONE_A},                  // based; linear
    {4, 256, 256, 16, 1, 0}, {4, 256, 256, 32, 1, 0}};                        // with nothing shared
static const size_t gpu_products[][2] = {{512, 1024}, {1024, 1024}, {2816, 1024}, {1024, 2816}, {4096, 4096}};
static const size_t gpu_scans[][5] = {{8, 2048, 8, 64, 128}, {8, 2048, 8, 128, 256}, {1, 16384, 8, 64, 128}};
#define LIST(x) x, sizeof(x) / sizeof *(x)

static void large_product(void *p) { call_data *c = p; product(c->x[0], c->x[1], c->x[2], part(8192), part(8192), part(8192)); }
static void large_copy(void *p) { call_data *c = p; be->copy(ctx, c->x[0], c->x[1], room * sizeof(real)); }

static void measure_gpu(call_data *c) {
    double n = (double)part(8192);
    peak = 2 * n * n * n / median_time(large_product, c) * 1e-9;
    bandwidth = 2.0 * (double)room * sizeof(real) / median_time(large_copy, c) * 1e-9;
}

static void bench_gpu(call_data *c) {
    measure_gpu(c);
    printf("%s: %.1f GFLOP/s in a product of %zu x %zu, %.1f GB/s in a copy\n\n", be->name, peak, part(8192), part(8192),
           bandwidth);
    printf("%-22s %-28s %10s %8s %17s\n", "kernel", "shape", "time", "rate", "of the limit");
    bench_matmul(c, part(16384), LIST(gpu_products));
    bench_matmul(c, 1, LIST(gpu_products));
    bench_swiglu(c, part(16384), part(1024), part(2816));
    bench_scan(c, LIST(gpu_scans));
    bench_steps(c);
    bench_kernels(c, 8, part(2048), divide > 1 ? 128 : 1024, part(32000));
    bench_model();
    measure_gpu(c);
    printf("\nat the end: %.1f GFLOP/s, %.1f GB/s\n", peak, bandwidth);
}

static void bench_cpu(call_data *c) {
    memset(big, 1, BIG * sizeof *big);
    peak = 2.0 * 12 * CHAIN * LANES * metala_context_threads(ctx) / median_time(run_chains, NULL) * 1e-9;
    bandwidth = (double)BIG * sizeof *big / median_time(run_reads, NULL) * 1e-9;
    printf("%d threads, vectors of %d bytes: %.1f GFLOP/s of multiply-adds in registers, %.1f GB/s read from memory\n\n",
           metala_context_threads(ctx), (int)VEC_BYTES, peak, bandwidth);
    printf("%-22s %-28s %10s %8s %17s\n", "kernel", "shape", "time", "rate", "of the limit");
    bench_matmul(c, 1536, LIST(cpu_products));
    bench_swiglu(c, 1536, 512, 1408);
    bench_scan(c, LIST(cpu_scans));
    bench_steps(c);
    bench_shapes(c, LIST(other_scans));
    bench_kernels(c, 8, 512, 512, 8192);
    bench_model();
    printf("\nat the end: %.1f GFLOP/s, ", 2.0 * 12 * CHAIN * LANES * metala_context_threads(ctx) / median_time(run_chains, NULL) * 1e-9);
    printf("%.1f GB/s\n", (double)BIG * sizeof *big / median_time(run_reads, NULL) * 1e-9);
}

int main(int argc, char **argv) {
    int threads = 0, math = METALA_EXACT;
    char why[300];
    call_data c = {0};
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--threads")) threads = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--only")) only = argv[i + 1];
        else if (!strcmp(argv[i], "--rounds") && atoi(argv[i + 1]) > 0) rounds = atoi(argv[i + 1]) < 99 ? atoi(argv[i + 1]) : 99;
        else if (!strcmp(argv[i], "--device") && (!strcmp(argv[i + 1], "cpu") || !strcmp(argv[i + 1], "cuda")))
            on_gpu = argv[i + 1][1] == 'u';
        else if (!strcmp(argv[i], "--math") && (!strcmp(argv[i + 1], "tf32") || !strcmp(argv[i + 1], "bf16")))
            math = argv[i + 1][0] == 't' ? METALA_TF32 : METALA_BFLOAT16;
        else if (!strcmp(argv[i], "--divide") && atoi(argv[i + 1]) > 0) divide = (size_t)atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--math") || strcmp(argv[i + 1], "exact")) argc = 2;
    }
    if (argc % 2 == 0) {
        fprintf(stderr, "usage: bench [--threads N] [--only TEXT] [--rounds N] [--device cpu|cuda] [--math exact|tf32|bf16]"
                        " [--divide N]\n");
        return 2;
    }
    be = on_gpu ? metala_cuda((metala_math)math, why, sizeof why) : metala_cpu();
    if (!be) {
        fprintf(stderr, "bench: --device cuda: %s\n", why);
        return 1;
    }
    ctx = metala_open(be, threads);
    if (!ctx) return 1;
    if (on_gpu) room = part((size_t)1 << 26);
    if (room < 1 << 21) room = 1 << 21;
    big = malloc(BIG * sizeof *big);
    c.tokens = be->alloc((1 << 16) * sizeof *c.tokens);
    uint64_t random = 1;
    for (size_t i = 0; big && i < room; i++) big[i] = (real)metala_uniform(&random);
    for (size_t i = 0; i < sizeof c.x / sizeof *c.x && big; i++)
        if ((c.x[i] = be->alloc(room * sizeof(real))) != NULL) be->upload(ctx, c.x[i], big, room * sizeof(real));
    if (!big || !c.tokens || !c.x[11]) {
        fprintf(stderr, "bench: out of memory, %.1f GB are needed\n", (12.0 * (double)room + BIG) * sizeof(real) / 1e9);
        return 1;
    }
    if (on_gpu) bench_gpu(&c);
    else bench_cpu(&c);
    for (size_t i = 0; i < sizeof c.x / sizeof *c.x; i++) be->free(c.x[i]);
    free(big);
    be->free(c.tokens);
    metala_close(ctx);
    return 0;
}
