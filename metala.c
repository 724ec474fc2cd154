// metala.c - MetaLA in one file of C99: kernels with their gradients, the decay scan in three forms, the model,
// AdamW and the file formats. Nothing beyond libc and libm; OpenMP is used when the compiler has it.
//
// The file reads from top to bottom in the order in which a token meets the code. A reader who stops after section 5
// has understood MetaLA. The API is explained in metala.h; the equations are those of the paper ("MetaLA: Unified
// Optimal Linear Approximation to Softmax Attention Map", NeurIPS 2024) and of its authors' code.
//
//     tokens ─embedding─► x ─┬─ rms ─► token mixer ─┬─(+)─ h ─┬─ rms ─► SwiGLU ─┬─(+)─► … L layers … ─ rms ─► head
//                            └──────────────────────┘         └─────────────────┘
//
//     token mixer:  n ─conv─► u ─┬─ W_q ─► q ──────────────────────────────┐
//                                ├─ W_α ─► z ─► α = σ(z)^(1/τ), k = 1 - α ─┤ scan: S_t = diag(α_t) S_{t-1} + k_t v_tᵀ
//                                ├─ W_v ─► v ──────────────────────────────┘       o_t = s S_tᵀ q_t
//                                └─ W_g ─► g        out = W_o ( silu(g) ⊙ norm(o + σ((q⊙k)·b v)) )
//
// Contents
//     1. Context: errors, memory, threads
//     2. Scalar functions: exp, sigmoid, log-sigmoid; sums
//     3. Matrix products
//     4. The kernels around the scan: embedding, patches, norms, convolution, gate, augmentation, SwiGLU, cross-entropy, AdamW
//     5. The decay scan: recurrent, parallel, chunkwise
//     6. The backend table
//     7. The model: rows of the general form, configuration, parameters, initialisation
//     8. Forward and backward through the layers
//     9. Training: trainer, gradient, update
//    10. Inference: states, steps, prefill, scoring
//    11. Files: safetensors, configuration, models, states, checkpoints
//    12. Data: text and safetensors datasets
//
// Letters: B batch, T time, D width, H heads, K = D/2/H query, key and decay channels of a head, V = D/H value channels,
// F GLU width, N vocabulary, rows = B·T, s = K^(-1/2), τ = 16, b [H·K] a learned vector, ⊙ element by element. A gradient
// is called d + name. Section 3 alone uses M, N, K for the sizes of a product.

#include "metala.h"

#include <float.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

typedef metala_real real;
#define REAL_TYPE (sizeof(real) == sizeof(double) ? METALA_F64 : METALA_F32)

// ============================================================== 1. Context: errors, memory, threads

struct metala_context {
    const metala_backend *backend;
    int threads;
    int failed;                 // a kernel could not run; cleared by metala_context_failed
    void *scratch;              // grows to what the largest kernel call asks for
    size_t scratch_bytes;
    char error[512];
};

#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
static int fail(metala_context *ctx, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, arguments);
    va_end(arguments);
    for (char *c = ctx->error; *c; c++)           // one line, whatever a file's strings contain
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    return -1;
}

const char *metala_error(const metala_context *ctx) { return ctx ? ctx->error : "out of memory"; }
const metala_backend *metala_context_backend(const metala_context *ctx) { return ctx->backend; }
int metala_context_threads(const metala_context *ctx) { return ctx->threads; }

int metala_context_failed(metala_context *ctx) {
    int failed = ctx->failed;
    ctx->failed = 0;
    return failed ? -1 : 0;
}

static int fail_memory(metala_context *ctx, const char *what, double bytes) {
    return fail(ctx, "out of memory: %s needs %.1f MB; try a smaller batch, context or model", what, bytes / 1e6);
}

// Sizes come from files and command lines, so products are checked: a·b, or SIZE_MAX when it does not fit.
static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

// a + b for sizes that are added up; SIZE_MAX/16 stands for all that is more, and can still be multiplied.
static size_t plus(size_t a, size_t b) {
    const size_t most = SIZE_MAX / 16;
    return a > most || b > most - a ? most : a + b;
}

// The CPU's memory: zeroed and aligned to a cache line. The byte count of the shift is kept just before the memory.
enum { ALIGN = 64 };
static void *cpu_alloc(size_t bytes) {
    if (bytes > SIZE_MAX - 2 * ALIGN) return NULL;
    unsigned char *memory = calloc(1, bytes + ALIGN);
    if (!memory) return NULL;
    size_t shift = ALIGN - (size_t)((uintptr_t)memory % ALIGN);
    memory[shift - 1] = (unsigned char)shift;
    return memory + shift;
}

static void cpu_free(void *memory) {
    unsigned char *p = memory;
    if (p) free(p - p[-1]);
}

// Memory for the duration of one kernel call; its content is undefined.
static void *scratch(metala_context *ctx, size_t bytes) {
    if (bytes > ctx->scratch_bytes) {
        ctx->backend->free(ctx->scratch);
        ctx->scratch = ctx->backend->alloc(bytes);
        ctx->scratch_bytes = ctx->scratch ? bytes : 0;
        if (!ctx->scratch) {
            ctx->failed = 1;
            fail_memory(ctx, "a kernel's scratch space", (double)bytes);
        }
    }
    return ctx->scratch;
}

void *metala_context_scratch(metala_context *ctx, size_t bytes) { return scratch(ctx, bytes); }

// The first failure is the cause of those that follow.
void metala_context_fail(metala_context *ctx, const char *format, ...) {
    char text[sizeof ctx->error];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!ctx->failed) fail(ctx, "%s", text);
    ctx->failed = 1;
}

// Threads share out the outputs of a kernel, never the terms of a sum: results do not depend on their number.
// PARALLEL_FOR(work) starts threads only when there is work for them (about 10 µs worth of operations).
#ifdef _OPENMP
#define PRAGMA(text) _Pragma(#text)
#define PARALLEL PRAGMA(omp parallel num_threads(ctx->threads))
#define SHARED_FOR PRAGMA(omp for schedule(dynamic))
#define PARALLEL_FOR(work) PRAGMA(omp parallel for num_threads(ctx->threads) if((work) > 100000) schedule(static))
static size_t thread_number(void) { return (size_t)omp_get_thread_num(); }
#else
#define PARALLEL
#define SHARED_FOR
#define PARALLEL_FOR(work) (void)ctx;
static size_t thread_number(void) { return 0; }
#endif

// Start of part i when n things are shared out evenly over `parts`.
static size_t share(size_t n, size_t parts, size_t i) { return n / parts * i + (n % parts < i ? n % parts : i); }

// Two hardware threads of one core share its multipliers, so that a second one would only wait. Linux says which belong
// together; elsewhere all processors count.
#ifdef _OPENMP
static int physical_cores(void) {
    int cores = 0, processors = omp_get_num_procs();
    for (int cpu = 0, first = 0; cpu < 1024; cpu++) {
        char path[80];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE *list = fopen(path, "r");
        if (!list) continue;                              // offline, or another system
        cores += fscanf(list, "%d", &first) == 1 && first == cpu;
        fclose(list);
    }
    return cores > 0 && cores < processors ? cores : processors;
}
#endif

metala_context *metala_open(const metala_backend *backend, int threads) {
    metala_context *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return NULL;
    ctx->backend = backend ? backend : metala_cpu();
#ifdef _OPENMP
    ctx->threads = threads > 0 ? threads : physical_cores();
#else
    ctx->threads = 1;
    (void)threads;
#endif
    return ctx;
}

void metala_close(metala_context *ctx) {
    if (ctx) ctx->backend->free(ctx->scratch);
    free(ctx);
}

// ============================================================== 2. Scalar functions

// The functions below are written without branches and without libm calls, so that a loop over them becomes vector
// instructions. Errors are relative, over all of float's range, and checked in test.c. The float64 build takes libm's.

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#ifdef METALA_FLOAT64
static inline real real_exp(real x) { return exp(x); }
static inline real real_log1p(real y) { return log1p(y); }
static inline real one_minus_exp(real a) { return -expm1(a); }
#else
// 2^n for -150 <= n <= 130, as a product of two floats that are both in range: the result may be 0, denormal or inf.
static inline float scale_by_power(float x, int32_t n) {
    uint32_t high = (uint32_t)(n + 512) >> 1, low = (uint32_t)(n + 512) - high;
    return x * float_of_bits((high - 256 + 127) << 23) * float_of_bits((low - 256 + 127) << 23);
}

// e^x = 2^n e^r,  n = round(x / ln 2),  |r| <= ln(2)/2; e^r by its power series. Relative error below 1.5e-7.
static inline float real_exp(float x) {
    x = x < -104.0f ? -104.0f : x;                       // beyond lies 0
    x = x > 89.0f ? 89.0f : x;                           // beyond lies infinity
    const float round_shift = 12582912.0f;               // 1.5·2^23: adding it leaves the nearest integer in the low bits
    float shifted = x * 1.44269504f + round_shift;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    float n = shifted - round_shift;
    float r = x - n * 0.693359375f;                      // ln 2 in two parts, the first exact in a product with n
    r = r - n * -2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return scale_by_power(p, (int32_t)(bits - 0x4B400000u));
}

// log(1 + y) for 0 <= y <= 1: 2 atanh(s) with s = y/(2+y) <= 1/3, by its power series. Relative error below 2e-7.
static inline float real_log1p(float y) {
    float s = y / (2.0f + y), x = s * s;
    float p = 1.0f / 15;
    p = p * x + 1.0f / 13;
    p = p * x + 1.0f / 11;
    p = p * x + 1.0f / 9;
    p = p * x + 1.0f / 7;
    p = p * x + 1.0f / 5;
    p = p * x + 1.0f / 3;
    p = p * x + 1.0f;
    return 2.0f * s * p;
}

// 1 - e^a for a <= 0 without cancellation near 0, where it is -a. Relative error below 3e-7.
static inline float one_minus_exp(float a) {
    float p = 1.0f / 40320;
    p = p * a + 1.0f / 5040;
    p = p * a + 1.0f / 720;
    p = p * a + 1.0f / 120;
    p = p * a + 1.0f / 24;
    p = p * a + 1.0f / 6;
    p = p * a + 0.5f;
    p = p * a + 1.0f;
    float near = -a * p, far = 1.0f - real_exp(a);
    return a > -0.5f ? near : far;
}
#endif

// sin x and cos x, in double: x is a phase after many tokens, of which only what exceeds whole turns counts. With n the
// nearest whole number of quarter turns, r = x - n π/2 (π/2 in two parts, the first exact in a product with n < 2^20), and
// the power series of r; the last two bits of n say which of the two series is the sine, and the signs. Error below 1e-9.
static inline void sine_cosine(double x, double *sine, double *cosine) {
#ifdef METALA_FLOAT64
    *sine = sin(fmod(x, 6.283185307179586477)), *cosine = cos(fmod(x, 6.283185307179586477));
#else
    const double round_shift = 6755399441055744.0;       // 1.5·2^52
    double shifted = x * 0.63661977236758134308 + round_shift, n = shifted - round_shift;
    double r = x - n * 1.57079632673412561417 - n * 6.07710050650619224932e-11, y = r * r;
    double s = r * (1 + y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880)))));
    double c = 1 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 - y * (1.0 / 3628800)))));
    uint64_t quarter;
    memcpy(&quarter, &shifted, sizeof quarter);
    double of_sine = quarter & 1 ? c : s, of_cosine = quarter & 1 ? s : c;
    *sine = quarter & 2 ? -of_sine : of_sine;
    *cosine = (quarter + 1) & 2 ? -of_cosine : of_cosine;
#endif
}

static inline real absolute(real x) { return x < 0 ? -x : x; }

// σ(x) = 1/(1+e^-x). The exponential is of -|x|, so that it never overflows.
static inline real sigmoid(real x) {
    real e = real_exp(-absolute(x)), s = 1 / (1 + e);
    return x < 0 ? e * s : s;
}

// log σ(z) = min(z,0) - log(1 + e^-|z|), finite for every z: σ itself would be 0 below z = -88.
static inline real log_sigmoid(real z) {
    real least = z < 0 ? z : 0;
    return least - real_log1p(real_exp(-absolute(z)));
}

// silu(x) = x σ(x) and its derivative σ(x)(1 + x(1 - σ(x))).
static inline real silu(real x) { return x * sigmoid(x); }
static inline real silu_slope(real x) {
    real s = sigmoid(x);
    return s * (1 + x * (1 - s));
}

// A vec is one register of LANES numbers. gcc and clang have such a type, unless the machine computes with more digits
// than float has; elsewhere a vec is a single number and the same code is merely slower. It is used for sums and for the
// tile of the matrix product, where a plain loop would need the compiler's leave to reorder additions; every other loop
// in this file is plain and left to the compiler.
#if defined __AVX512F__
enum { VEC_BYTES = 64 };
#elif defined __AVX__
enum { VEC_BYTES = 32 };
#else
enum { VEC_BYTES = 16 };
#endif
#if defined __GNUC__ && (FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16)
typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real vec_at __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));
enum { LANES = VEC_BYTES / sizeof(real) };
#else
typedef real vec, vec_at;
enum { LANES = 1 };
#endif
#define VEC(p) (*(const vec_at *)(p))            // LANES numbers from anywhere
#define VEC_STORE(p, x) (*(vec_at *)(p) = (x))

// Asks for the memory `bytes` after p, which may lie beyond the end, before it is needed. A hint, nothing without it.
#ifdef __GNUC__
#define PREFETCH(p, bytes) __builtin_prefetch((const void *)((uintptr_t)(p) + (bytes)))
#else
#define PREFETCH(p, bytes) (void)0
#endif

static inline real sum_lanes(vec x) {
    real lane[LANES], sum = 0;
    VEC_STORE(lane, x);
    for (int l = 0; l < LANES; l++) sum += lane[l];
    return sum;
}

// Σ_i a_i b_i
static inline real dot(const real *a, const real *b, size_t n) {
    vec x = {0}, y = {0};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        x += VEC(a + i) * VEC(b + i);
        y += VEC(a + i + LANES) * VEC(b + i + LANES);
    }
    if (i + LANES <= n) {
        x += VEC(a + i) * VEC(b + i);
        i += LANES;
    }
    real sum = sum_lanes(x + y);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Σ_i a_i
static inline real total(const real *a, size_t n) {
    vec x = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) x += VEC(a + i);
    real sum = sum_lanes(x);
    for (; i < n; i++) sum += a[i];
    return sum;
}

// ============================================================== 3. Matrix products

// Nearly all arithmetic of the model is products of matrices, C += A B, in three variants: y = x Wᵀ forward,
// dx = dy W and dW = dyᵀ x backward. The naive loop,
//
//     for i < M:  for j < N:  for k < K:  C[i][j] += A[i][k] * B[k][j];
//
// needs two loads for each multiplication and runs at a few percent of what the machine can do. Three steps:
//
//   Tile.  A block of 6 × 2·LANES elements of C stays in 12 vector registers while k runs: 8 loads feed 12 vector
//          multiply-adds, and the multiplier never waits for memory. 12 + 2 (a row of B) + 1 (an element of A) = 15
//          registers fit the 16 of x86-64, and more than fit the 32 of AVX-512 and ARM.
//   Pack.  Beforehand, B is copied in strips of 2·LANES columns, so that a tile reads it from beginning to end. A is read
//          in place where its rows are contiguous; where its columns are, what a block has of them is copied, one k
//          after the other. Either is a matter of strides, and so the three variants are one function.
//   Block. k is cut in pieces of DEPTH, B in BLOCK_COLUMNS and A in BLOCK_ROWS, such that what is packed stays near, in the
//          caches of level 2 and 3, from which one strip of B after the other comes to level 1 and meets a block of A.
//
// Every element of C is summed in the same order whatever the number of threads: they share out tiles of C.

enum { TILE_ROWS = 6, TILE_COLUMNS = 2 * LANES, DEPTH = 512, BLOCK_ROWS = 96, BLOCK_COLUMNS = 512, PIECE_DEPTH = 16,
       AHEAD = 8, CACHE_LINE = 64 / sizeof(real) };          // a line in numbers

// tile_R: C[R × TILE_COLUMNS] = start + Σ_k A(0..R, k) b[k][0..TILE_COLUMNS), for R = 1 … 6 rows, with
// A(i,k) = a[i·a_row + k·a_k]. start is C itself (accumulate), or one row (a bias, zeros) with row stride 0. Named
// variables in place of an array: no compiler then keeps the sums anywhere but in registers.
typedef void tile_function(real *c, size_t c_stride, const real *start, size_t start_stride, const real *a,
                           size_t a_row, size_t a_k, const real *b, size_t b_stride, size_t depth);
#define ROWS_1(X) X(0)
#define ROWS_2(X) ROWS_1(X) X(1)
#define ROWS_3(X) ROWS_2(X) X(2)
#define ROWS_4(X) ROWS_3(X) X(3)
#define ROWS_5(X) ROWS_4(X) X(4)
#define ROWS_6(X) ROWS_5(X) X(5)
#define TILE_LOAD(i) vec x##i = VEC(start + i * start_stride), y##i = VEC(start + i * start_stride + LANES);
#define TILE_ADD(i) x##i += a[i * a_row] * p; y##i += a[i * a_row] * q;
#define TILE_STORE(i) VEC_STORE(c + i * c_stride, x##i); VEC_STORE(c + i * c_stride + LANES, y##i);
#define DEFINE_TILE(R)                                                                                             \
    static void tile_##R(real *c, size_t c_stride, const real *start, size_t start_stride, const real *a,          \
                         size_t a_row, size_t a_k, const real *b, size_t b_stride, size_t depth) {                 \
        ROWS_##R(TILE_LOAD)                                                                                        \
        for (; depth > 0; depth--, a += a_k, b += b_stride) {                                                      \
            vec p = VEC(b), q = VEC(b + LANES);                                                                    \
            ROWS_##R(TILE_ADD)                                                                                     \
        }                                                                                                          \
        ROWS_##R(TILE_STORE)                                                                                       \
    }
DEFINE_TILE(1) DEFINE_TILE(2) DEFINE_TILE(3) DEFINE_TILE(4) DEFINE_TILE(5) DEFINE_TILE(6)
static tile_function *const tile[TILE_ROWS + 1] = {NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

static size_t round_up(size_t n, size_t unit) { return n > SIZE_MAX - unit ? SIZE_MAX : (n + unit - 1) / unit * unit; }

// C[M×N] = start + Σ_k A(i,k) b[k][N] for small matrices, of which b is stored this way already (rows of k); N must be a
// multiple of TILE_COLUMNS. A(i,k) as above.
static void block_product(real *c, size_t c_stride, const real *start, size_t start_stride, const real *a, size_t a_row,
                          size_t a_k, const real *b, size_t b_stride, size_t M, size_t N, size_t depth) {
    size_t strips = (M + TILE_ROWS - 1) / TILE_ROWS;                       // of M/strips rows: 16 are 6 + 5 + 5, not 6 + 6 + 4
    for (size_t j = 0; j < N; j += TILE_COLUMNS)
        for (size_t s = 0; s < strips; s++) {
            size_t i = share(M, strips, s), rows = share(M, strips, s + 1) - i;
            tile[rows](c + i * c_stride + j, c_stride, start + i * start_stride + j, start_stride, a + i * a_row, a_row,
                       a_k, b + j, b_stride, depth);
        }
}

// The same of a[k][M], rows of k as well, as the scan has them.
static void block_multiply(real *c, size_t c_stride, const real *start, size_t start_stride, const real *a,
                           size_t a_stride, const real *b, size_t b_stride, size_t M, size_t N, size_t depth) {
    block_product(c, c_stride, start, start_stride, a, 1, a_stride, b, b_stride, M, N, depth);
}

// One tile at the right edge, where only `columns` columns exist: through a buffer of full width.
static void tile_at_edge(size_t rows, size_t columns, real *c, size_t c_stride, const real *start,
                         size_t start_stride, const real *a, size_t a_row, size_t a_k, const real *b, size_t depth) {
    real buffer[TILE_ROWS * TILE_COLUMNS] = {0};
    for (size_t i = 0; i < rows; i++)
        memcpy(buffer + i * TILE_COLUMNS, start + i * start_stride, columns * sizeof(real));
    tile[rows](buffer, TILE_COLUMNS, buffer, TILE_COLUMNS, a, a_row, a_k, b, TILE_COLUMNS, depth);
    for (size_t i = 0; i < rows; i++) memcpy(c + i * c_stride, buffer + i * TILE_COLUMNS, columns * sizeof(real));
}

// packed[k][0..n) = source[k·k_stride + 0..n). The steps in k may be too long for the processor to foresee.
static inline void pack_columns(real *packed, size_t packed_stride, const real *source, size_t k_stride, size_t n,
                                size_t depth) {
    for (size_t k = 0; k < depth; k++, source += k_stride) {
        for (size_t i = 0; i < n; i += CACHE_LINE) PREFETCH(source + i, AHEAD * k_stride * sizeof(real));
        memcpy(packed + k * packed_stride, source, n * sizeof(real));
    }
}

// A strip of B: packed[k][j] = source[j·column_stride + k·k_stride] for j < columns, zeros up to TILE_COLUMNS.
static void pack_strip(real *packed, const real *source, size_t column_stride, size_t k_stride, size_t columns, size_t depth) {
    if (column_stride == 1 && columns == TILE_COLUMNS) pack_columns(packed, TILE_COLUMNS, source, k_stride, TILE_COLUMNS, depth);
    else
        for (size_t k0 = 0; k0 < depth; k0 += PIECE_DEPTH) {                // a piece of `packed` stays in the cache
            size_t end = depth - k0 < PIECE_DEPTH ? depth : k0 + PIECE_DEPTH;
            for (size_t j = 0; j < columns; j++)
                for (size_t k = k0; k < end; k++) packed[k * TILE_COLUMNS + j] = source[j * column_stride + k * k_stride];
            for (size_t j = columns; j < TILE_COLUMNS; j++)
                for (size_t k = k0; k < end; k++) packed[k * TILE_COLUMNS + j] = 0;
        }
}

// ---- Quantized weights. Generation reads every weight for every token and does little else, so fewer bytes are more
// speed. A row W[o] of `in` weights is stored in one of two types:
//
//     bfloat16   the upper half of a float: 8 bits of exponent, 7 of fraction
//     int8       W'[o][i] = s q_i,  s = max |W[o][i]| / 127,  q_i = round(W[o][i] / s);  one s for METALA_GROUP inputs
//
// They are turned into reals where they are used, in loops of constant length that become vector instructions.

typedef struct {
    const void *w;                      // (out,in) uint16_t or int8_t
    const float *scales;                // (out,groups) s of int8; NULL: bfloat16
    size_t in;
} quantized;

static size_t groups(size_t in) { return (in + METALA_GROUP - 1) / METALA_GROUP; }

// Round to nearest, ties to even: adding just under half of the last place that stays carries into it, with its own
// lowest bit added to decide ties. A NaN could carry into infinity, so it is cut, with a bit that keeps it a NaN.
static inline uint16_t bfloat16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16, cut = bits >> 16 | 0x40u;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? cut : rounded);
}

static void quantize_bfloat16(uint16_t *to, const real *w, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = bfloat16_of((float)w[i]);
}

// One row. A group in which all is so small that s would be denormal, and imprecise, becomes zeros.
static void quantize_int8(int8_t *q, float *scales, const real *w, size_t n) {
    for (size_t i0 = 0; i0 < n; i0 += METALA_GROUP) {
        size_t end = n - i0 < METALA_GROUP ? n : i0 + METALA_GROUP;
        real most = 0;
        for (size_t i = i0; i < end; i++) most = absolute(w[i]) > most ? absolute(w[i]) : most;
        float s = (float)(most / 127);
        if (s < FLT_MIN) s = 0;
        for (size_t i = i0; i < end; i++) q[i] = (int8_t)(s > 0 ? lrint((double)w[i] / s) : 0);
        scales[i0 / METALA_GROUP] = s;
    }
}

// to[i] = W'[o][i0 + i]; i0 is a multiple of METALA_GROUP.
static void dequantize(real *to, const quantized *weights, size_t o, size_t i0, size_t n) {
    const uint16_t *w = weights->w;
    const int8_t *q = weights->w;
    const float *s = weights->scales ? weights->scales + o * groups(weights->in) + i0 / METALA_GROUP : NULL;
    size_t at = o * weights->in + i0;
    if (!s)
        for (size_t i = 0; i < n; i++) to[i] = float_of_bits((uint32_t)w[at + i] << 16);
    else
        for (size_t i = 0; i < n; i++) to[i] = (real)s[i / METALA_GROUP] * q[at + i];
}

// Σ_i a_i W'_i of a row in bfloat16
static inline real dot_bfloat16(const real *a, const uint16_t *w, size_t n) {
    vec x = {0}, y = {0};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        real lane[2 * LANES];
        for (int l = 0; l < 2 * LANES; l++) lane[l] = float_of_bits((uint32_t)w[i + (size_t)l] << 16);
        x += VEC(a + i) * VEC(lane);
        y += VEC(a + i + LANES) * VEC(lane + LANES);
    }
    real sum = sum_lanes(x + y);
    for (; i < n; i++) sum += a[i] * float_of_bits((uint32_t)w[i] << 16);
    return sum;
}

// Bytes become numbers fastest four at a time: the bits 8k to 8k+7 of a 32-bit word, moved to its top, are the integer
// q·2^24, for which the scale makes up. So the inputs of a group are first put in the order in which its bytes come out:
// y[16k + j] = x[byte k of word j], where the byte order of the machine says which byte of memory that is.
enum { WORDS = METALA_GROUP / 4 };
static void order_inputs(real *y, const real *x, size_t n) {
    uint32_t one = 1;
    unsigned char little;
    memcpy(&little, &one, 1);
    size_t i = 0;
    for (; i + METALA_GROUP <= n; i += METALA_GROUP)
        for (size_t k = 0; k < 4; k++)
            for (size_t j = 0; j < WORDS; j++) y[i + WORDS * k + j] = x[i + 4 * j + (little ? k : 3 - k)];
    for (; i < n; i++) y[i] = x[i];
}

// Σ_g s_g Σ_i a_i q_i of a row in int8: i are the inputs of group g, a those of order_inputs. There is so much to compute
// for each byte that the processor does not look far enough ahead by itself.
static inline real dot_int8(const real *a, const int8_t *q, const float *scales, size_t n) {
    const uint32_t top = 0xFF000000u;
    vec x = {0};
    size_t i = 0;
    for (; i + METALA_GROUP <= n; i += METALA_GROUP, scales++) {
        uint32_t word[WORDS];
        real lane[METALA_GROUP];
        vec sum = {0};
        PREFETCH(q + i, 3072);
        memcpy(word, q + i, sizeof word);
        for (int j = 0; j < WORDS; j++) lane[j] = (int32_t)(word[j] << 24);
        for (int j = 0; j < WORDS; j++) lane[WORDS + j] = (int32_t)(word[j] << 16 & top);
        for (int j = 0; j < WORDS; j++) lane[2 * WORDS + j] = (int32_t)(word[j] << 8 & top);
        for (int j = 0; j < WORDS; j++) lane[3 * WORDS + j] = (int32_t)(word[j] & top);
        for (int l = 0; l < METALA_GROUP; l += LANES) sum += VEC(a + i + l) * VEC(lane + l);
        x += (real)(*scales * 0x1p-24f) * sum;
    }
    real sum = 0;
    for (; i < n; i++) sum += a[i] * q[i];
    return sum_lanes(x) + (n % METALA_GROUP ? *scales * sum : 0);
}

// packed[k - k0][j - j0] = W'[j][k] for `columns` rows j of W, zeros up to TILE_COLUMNS.
static void pack_quantized(real *packed, const quantized *weights, size_t j0, size_t columns, size_t k0,
                           size_t depth) {
    real row[DEPTH];
    for (size_t j = 0; j < TILE_COLUMNS; j++) {
        if (j < columns) dequantize(row, weights, j0 + j, k0, depth);
        for (size_t k = 0; k < depth; k++) packed[k * TILE_COLUMNS + j] = j < columns ? row[k] : 0;
    }
}

// C[M×N] = A B, or C += A B.   A(i,k) = a[i·a_row + k·a_k], one of the two strides being 1;  B(k,j) = b[k·b_k + j·b_column],
// or B(k,j) = W'[j][k] of quantized weights when those are not NULL.
typedef struct {
    real *c;
    const real *a, *b, *start_row;      // what C starts from when it is not added to: (N) a bias, or zeros
    size_t a_row, a_k, b_k, b_column;
    const quantized *weights;
    size_t N, K;
    int accumulate;
} product;

// Rows i0 to i1 and columns j0 to j1 of C, over `depth` terms from k0 on. packed_b: those of B, in strips.
static void multiply_block(const product *m, size_t i0, size_t i1, size_t j0, size_t j1, size_t k0, size_t depth,
                           const real *packed_b, real *packed_a) {
    int from_c = m->accumulate || k0 > 0;
    if (m->a_k != 1) pack_columns(packed_a, BLOCK_ROWS, m->a + i0 + k0 * m->a_k, m->a_k, i1 - i0, depth);
    for (size_t j = j0; j < j1; j += TILE_COLUMNS)
        for (size_t i = i0; i < i1; i += TILE_ROWS) {
            size_t rows = i1 - i < TILE_ROWS ? i1 - i : TILE_ROWS;
            real *to = m->c + i * m->N + j;
            const real *start = from_c ? to : m->start_row + j, *strip_b = packed_b + (j - j0) * depth;
            const real *strip_a = m->a_k == 1 ? m->a + i * m->a_row + k0 : packed_a + (i - i0);
            size_t row_step = m->a_k == 1 ? m->a_row : 1, k_step = m->a_k == 1 ? 1 : BLOCK_ROWS, start_step = from_c ? m->N : 0;
            if (j1 - j >= TILE_COLUMNS)
                tile[rows](to, m->N, start, start_step, strip_a, row_step, k_step, strip_b, TILE_COLUMNS, depth);
            else tile_at_edge(rows, j1 - j, to, m->N, start, start_step, strip_a, row_step, k_step, strip_b, depth);
        }
}

// The part of C that one thread has: rows first to last, columns left to right. work: packed B, packed A.
static void multiply_part(const product *m, size_t first, size_t last, size_t left, size_t right, real *work) {
    real *packed_a = work + BLOCK_COLUMNS * DEPTH;
    for (size_t j0 = left; j0 < right; j0 += BLOCK_COLUMNS) {
        size_t j1 = right - j0 < BLOCK_COLUMNS ? right : j0 + BLOCK_COLUMNS, k0 = 0;
        do {                                                                // once at least: K = 0 still sets C
            size_t depth = m->K - k0 < DEPTH ? m->K - k0 : DEPTH;
            for (size_t j = j0; j < j1; j += TILE_COLUMNS) {
                size_t columns = j1 - j < TILE_COLUMNS ? j1 - j : TILE_COLUMNS;
                real *strip = work + (j - j0) * depth;
                if (m->weights) pack_quantized(strip, m->weights, j, columns, k0, depth);
                else
                    pack_strip(strip, m->b + k0 * m->b_k + j * m->b_column, m->b_column, m->b_k, columns, depth);
            }
            for (size_t i = first; i < last; i += BLOCK_ROWS)
                multiply_block(m, i, last - i < BLOCK_ROWS ? last : i + BLOCK_ROWS, j0, j1, k0, depth, work, packed_a);
            k0 += depth;
        } while (k0 < m->K);
    }
}

// Threads share out C as a grid, of so many parts across as costs least, where for each k a tile costs 4, packing a strip of
// B 16 and reading one of A 1. Each packs for itself what it needs: what another thread has just written is slower to read
// than to write again.
static size_t parts_across(size_t threads, size_t strips_a, size_t strips_b) {
    size_t best = 1, least = SIZE_MAX;
    for (size_t across = 1; across <= threads; across++) {
        size_t down = threads / across, rows = (strips_a + down - 1) / down, columns = (strips_b + across - 1) / across;
        size_t cost = 4 * rows * columns + 16 * columns + rows;
        if (cost < least) least = cost, best = across;
    }
    return best;
}

static void matrix_multiply(metala_context *ctx, real *c, const real *a, size_t a_row, size_t a_k, const real *b,
                            size_t b_k, size_t b_column, const quantized *weights, const real *bias, size_t M,
                            size_t N, size_t K, int accumulate) {
    size_t strips_a = (M + TILE_ROWS - 1) / TILE_ROWS, strips_b = (N + TILE_COLUMNS - 1) / TILE_COLUMNS;
    size_t threads = (size_t)ctx->threads, across = parts_across(threads, strips_a, strips_b), down = threads / across;
    size_t each = (BLOCK_COLUMNS + BLOCK_ROWS) * DEPTH, start_count = strips_b * TILE_COLUMNS;
    real *start_row = scratch(ctx, plus(start_count, threads * each) * sizeof(real));
    if (!start_row) return;
    memset(start_row, 0, start_count * sizeof(real));
    if (bias) memcpy(start_row, bias, N * sizeof(real));
    const product m = {c, a, b, start_row, a_row, a_k, b_k, b_column, weights, N, K, accumulate};
    PARALLEL_FOR(M * N * K)
    for (size_t part = 0; part < down * across; part++) {
        size_t row = part / across, column = part % across;
        size_t first = share(strips_a, down, row) * TILE_ROWS, last = share(strips_a, down, row + 1) * TILE_ROWS;
        size_t left = share(strips_b, across, column) * TILE_COLUMNS, right = share(strips_b, across, column + 1) * TILE_COLUMNS;
        multiply_part(&m, first, last < M ? last : M, left, right < N ? right : N,
                      start_row + start_count + thread_number() * each);
    }
}

// Linear layers of one x:  y = x Wᵀ + bias + residual.    y, residual (rows,out)   x (rows,in)   w [out,in]   bias [out]
// A few rows at a time, as in generation, each weight is used once and memory is the limit: plain dot products then,
// with the weight's row read once for all rows of x. in = 0 gives y = bias + residual. NULL for what is not wanted.
enum { FEW_ROWS = 4 };
static void add(metala_context *ctx, real *y, const real *a, const real *b, size_t n);   // in section 4
static void matmul_forward(metala_context *ctx, const metala_linear *layers, int count, const real *x, size_t rows, size_t in) {
    for (const metala_linear *l = layers; l < layers + count; l++) {
        const real *w = l->w;
        size_t out = l->out;
        if (in == 0 && l->bias && !l->residual) {
            PARALLEL_FOR(rows * out)
            for (size_t row = 0; row < rows; row++) memcpy(l->y + row * out, l->bias, out * sizeof(real));
            continue;
        }
        if (rows > FEW_ROWS) {
            matrix_multiply(ctx, l->y, x, in, 1, w, 1, in, NULL, l->bias, rows, out, in, 0);
            if (l->residual) add(ctx, l->y, l->residual, l->y, rows * out);
            continue;
        }
        PARALLEL_FOR(rows * out * in)
        for (size_t o = 0; o < out; o++)
            for (size_t row = 0; row < rows; row++) {
                real sum = dot(x + row * in, w + o * in, in) + (l->bias ? l->bias[o] : 0);
                l->y[row * out + o] = (l->residual ? l->residual[row * out + o] : 0) + sum;
            }
    }
}

// The same of quantized weights:  y = x W'ᵀ + bias + residual.    w [out,in]   scales [out,groups] of int8, NULL of bfloat16
static void matmul_quantized(metala_context *ctx, const metala_linear *layers, int count, const real *x, size_t rows, size_t in) {
    const real *inputs = x;
    if (rows <= FEW_ROWS && layers->scales) {
        real *ordered = scratch(ctx, rows * in * sizeof(real));
        if (!ordered) return;
        for (size_t row = 0; row < rows; row++) order_inputs(ordered + row * in, x + row * in, in);
        inputs = ordered;
    }
    for (const metala_linear *l = layers; l < layers + count; l++) {
        const quantized weights = {l->w, l->scales, in};
        const uint16_t *w16 = l->w;
        const int8_t *w8 = l->w;
        size_t out = l->out;
        if (rows > FEW_ROWS) {
            matrix_multiply(ctx, l->y, x, in, 1, NULL, 0, 0, &weights, l->bias, rows, out, in, 0);
            if (l->residual) add(ctx, l->y, l->residual, l->y, rows * out);
            continue;
        }
        PARALLEL_FOR(rows * out * in)
        for (size_t o = 0; o < out; o++)
            for (size_t row = 0; row < rows; row++) {
                const real *a = inputs + row * in;
                real sum = l->scales ? dot_int8(a, w8 + o * in, l->scales + o * groups(in), in)
                                     : dot_bfloat16(a, w16 + o * in, in);
                if (l->bias) sum += l->bias[o];
                l->y[row * out + o] = (l->residual ? l->residual[row * out + o] : 0) + sum;
            }
    }
}

// sums[j] += Σ_row a[row][j], the gradient of a bias.
static void add_column_sums(metala_context *ctx, real *sums, const real *a, size_t rows, size_t columns) {
    enum { STRIP = 64 };
    PARALLEL_FOR(rows * columns)
    for (size_t j0 = 0; j0 < columns; j0 += STRIP) {
        size_t n = columns - j0 < STRIP ? columns - j0 : STRIP;
        real sum[STRIP] = {0};
        for (size_t row = 0; row < rows; row++)
            for (size_t j = 0; j < n; j++) sum[j] += a[row * columns + j0 + j];
        for (size_t j = 0; j < n; j++) sums[j0 + j] += sum[j];
    }
}

// dx = Σ_layers dy W (or dx += that)      dW += dyᵀ x      dbias += Σ_rows dy
//   dx, x (rows,in)   dw [out,in]   dbias [out]   dy (rows,out); NULL for what is not wanted
static void matmul_backward(metala_context *ctx, real *dx, const metala_linear_gradient *layers, int count, const real *x,
                            size_t rows, size_t in, int accumulate) {
    for (const metala_linear_gradient *l = layers; l < layers + count; l++) {
        size_t out = l->out;
        if (dx) matrix_multiply(ctx, dx, l->dy, out, 1, l->w, in, 1, NULL, NULL, rows, in, out, accumulate || l > layers);
        if (l->dw) matrix_multiply(ctx, l->dw, l->dy, 1, out, x, in, 1, NULL, NULL, out, in, rows, 1);
        if (l->dbias) add_column_sums(ctx, l->dbias, l->dy, rows, out);
    }
}

// ============================================================== 4. The kernels around the scan

// Embedding:  x_row = scale · E[token_row]          x (rows,D)   E [N,D]   scale 1 or √D
static void embedding_forward(metala_context *ctx, real *x, const int *tokens, const real *E, size_t rows, size_t D,
                              double scale) {
    real c = (real)scale;
    PARALLEL_FOR(rows * D)
    for (size_t row = 0; row < rows; row++)
        for (size_t d = 0; d < D; d++) x[row * D + d] = c * E[(size_t)tokens[row] * D + d];
}

// dE[token] += scale · dx, but nothing for the padding token. Threads share the columns: a token may come often.
static void embedding_backward(metala_context *ctx, real *dE, const real *dx, const int *tokens, size_t rows,
                               size_t D, double scale, int pad_token_id) {
    enum { STRIP = 32 };
    real c = (real)scale;
    PARALLEL_FOR(rows * D)
    for (size_t d0 = 0; d0 < D; d0 += STRIP) {
        size_t d1 = d0 + STRIP < D ? d0 + STRIP : D;
        for (size_t row = 0; row < rows; row++)
            if (tokens[row] != pad_token_id)
                for (size_t d = d0; d < d1; d++) dE[(size_t)tokens[row] * D + d] += c * dx[row * D + d];
    }
}

// Patches:  x = bytes/255, the input of the linear map that stands in the embedding's place      x, bytes (rows,C), n = rows·C
static void patch_forward(metala_context *ctx, real *x, const int *bytes, size_t n) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) x[i] = (real)bytes[i] / 255;
}

// RMS norm without weights:  n = m x r,  r = (mean_D(x²) + eps)^(-1/2)
//   n, x (rows,D)   r (rows) for the backward   mask m (rows) of 0 and 1, or NULL for all ones
//   "simplermsnorm" of the authors' code; the mixer's input is masked here, before the convolution.
static void rms_forward(metala_context *ctx, real *n, real *r, const real *x, const uint8_t *mask, size_t rows,
                        size_t D, double eps) {
    PARALLEL_FOR(2 * rows * D)
    for (size_t row = 0; row < rows; row++) {
        const real *in = x + row * D;
        r[row] = 1 / (real)sqrt(dot(in, in, D) / (real)D + (real)eps);
        real scale = mask && !mask[row] ? 0 : r[row];
        for (size_t d = 0; d < D; d++) n[row * D + d] = in[d] * scale;
    }
}

// dx += r (m dn - x̂ mean_D(m dn ⊙ x̂)),  x̂ = x r         dx, dn (rows,D)   r (rows); a masked row gets nothing
static void rms_backward(metala_context *ctx, real *dx, const real *dn, const real *x, const real *r,
                         const uint8_t *mask, size_t rows, size_t D) {
    PARALLEL_FOR(2 * rows * D)
    for (size_t row = 0; row < rows; row++) {
        if (mask && !mask[row]) continue;
        const real *in = x + row * D, *gradient = dn + row * D;
        real scale = r[row], mean = scale * dot(gradient, in, D) / (real)D;
        for (size_t d = 0; d < D; d++) dx[row * D + d] += scale * (gradient[d] - in[d] * scale * mean);
    }
}

// Short causal convolution and SiLU:  c_t = Σ_j w[:,j] ⊙ n_{t-3+j},  u_t = silu(c_t)
//   u, c, n (B,T,D)   w [D,1,4], the last tap multiplies the current token   c is kept for the backward
//   tail (B,4,D): the inputs before the first one, oldest first, of which the last 3 are read (the authors' cache has
//   4); afterwards the last 4 of (tail, n_0 … n_{T-1}), to which the next call looks back. NULL: zeros, and nothing is kept.
//   Paper section 4.2. With u NULL the convolution alone.
static const real *conv_input(const real *n, const real *tail, const real *zeros, size_t b, size_t t, size_t j,
                              size_t T, size_t D) {
    enum { REACH = METALA_CONV - 1 };
    if (t + j >= REACH) return n + (b * T + t + j - REACH) * D;
    return tail ? tail + (b * METALA_CONV + t + j + 1) * D : zeros;
}

// tail = the last 4 of (tail, n_0 … n_{T-1}).
static void keep_tail(real *tail, const real *n, size_t B, size_t T, size_t D) {
    size_t kept = T < METALA_CONV ? METALA_CONV - T : 0, taken = METALA_CONV - kept;
    for (size_t b = 0; b < B; b++) {
        real *own = tail + b * METALA_CONV * D;
        memmove(own, own + taken * D, kept * D * sizeof(real));
        memcpy(own + kept * D, n + (b * T + T - taken) * D, taken * D * sizeof(real));
    }
}

static void conv_forward(metala_context *ctx, real *u, real *c, const real *n, const real *w, real *tail, size_t B,
                         size_t T, size_t D) {
    real *taps = scratch(ctx, (METALA_CONV + 1) * D * sizeof(real));
    if (!taps) return;
    real *zeros = taps + METALA_CONV * D;
    for (size_t d = 0; d < D; d++) {
        for (size_t j = 0; j < METALA_CONV; j++) taps[j * D + d] = w[d * METALA_CONV + j];
        zeros[d] = 0;
    }
    PARALLEL_FOR(10 * B * T * D)
    for (size_t row = 0; row < B * T; row++) {
        const real *n0 = conv_input(n, tail, zeros, row / T, row % T, 0, T, D);
        const real *n1 = conv_input(n, tail, zeros, row / T, row % T, 1, T, D);
        const real *n2 = conv_input(n, tail, zeros, row / T, row % T, 2, T, D);
        const real *n3 = conv_input(n, tail, zeros, row / T, row % T, 3, T, D);
        real *to_c = c + row * D, *to_u = u ? u + row * D : NULL;
        for (size_t d = 0; d < D; d++)
            to_c[d] = taps[d] * n0[d] + taps[D + d] * n1[d] + taps[2 * D + d] * n2[d] + taps[3 * D + d] * n3[d];
        if (u)
            for (size_t d = 0; d < D; d++) to_u[d] = silu(to_c[d]);
    }
    if (tail) keep_tail(tail, n, B, T, D);
}

// One token, as generation needs it:  n = rms(x),  u = silu(Σ_j w_j ⊙ n_{t-3+j}).  The tail is shifted, and n becomes its last.
//   u, x (B,D)   w [D,4]   tail (B,4,D)
static void conv_step(metala_context *ctx, real *u, real *tail, const real *x, const real *w, size_t B, size_t D, double eps) {
    PARALLEL_FOR(12 * B * D)
    for (size_t b = 0; b < B; b++) {
        const real *in = x + b * D;
        real *n0 = tail + b * METALA_CONV * D, *n1 = n0 + D, *n2 = n1 + D, *n3 = n2 + D, *out = u + b * D;
        real r = 1 / (real)sqrt(dot(in, in, D) / (real)D + (real)eps);
        memmove(n0, n1, (METALA_CONV - 1) * D * sizeof(real));
        for (size_t d = 0; d < D; d++) n3[d] = in[d] * r;
        for (size_t d = 0; d < D; d++)
            out[d] = w[4 * d] * n0[d] + w[4 * d + 1] * n1[d] + w[4 * d + 2] * n2[d] + w[4 * d + 3] * n3[d];
        for (size_t d = 0; d < D; d++) out[d] = silu(out[d]);
    }
}

// dc = du ⊙ silu'(c), or du where c is NULL
// dn_t = Σ_j w[:,j] ⊙ dc_{t+3-j}  (dc beyond the end is 0)      dw[:,j] += Σ_{b,t} dc_t ⊙ n_{t-3+j}
static void conv_backward(metala_context *ctx, real *dn, real *dw, const real *du, const real *c, const real *n,
                          const real *w, const real *tail, size_t B, size_t T, size_t D) {
    enum { STRIP = 32 };
    real *taps = scratch(ctx, ((c ? B * T : 0) + METALA_CONV + 1) * D * sizeof(real));
    if (!taps) return;
    real *zeros = taps + METALA_CONV * D;
    real *slopes = zeros + D;
    const real *dc = c ? slopes : du;
    for (size_t d = 0; d < D; d++) {
        for (size_t j = 0; j < METALA_CONV; j++) taps[j * D + d] = w[d * METALA_CONV + j];
        zeros[d] = 0;
    }
    if (c) {
        PARALLEL_FOR(10 * B * T * D)
        for (size_t i = 0; i < B * T * D; i++) slopes[i] = du[i] * silu_slope(c[i]);
    }
    PARALLEL_FOR(8 * B * T * D)
    for (size_t row = 0; row < B * T; row++) {
        size_t t = row % T;
        real *to = dn + row * D;
        for (size_t d = 0; d < D; d++) to[d] = taps[(METALA_CONV - 1) * D + d] * dc[row * D + d];
        for (size_t later = 1; later < METALA_CONV && t + later < T; later++)
            for (size_t d = 0; d < D; d++)
                to[d] += taps[(METALA_CONV - 1 - later) * D + d] * dc[(row + later) * D + d];
    }
    PARALLEL_FOR(8 * B * T * D)
    for (size_t d0 = 0; d0 < D; d0 += STRIP) {
        size_t count = D - d0 < STRIP ? D - d0 : STRIP;
        real sum[METALA_CONV][STRIP] = {{0}};
        for (size_t row = 0; row < B * T; row++)
            for (size_t j = 0; j < METALA_CONV; j++) {
                const real *in = conv_input(n, tail, zeros, row / T, row % T, j, T, D) + d0;
                const real *gradient = dc + row * D + d0;
                for (size_t d = 0; d < count; d++) sum[j][d] += gradient[d] * in[d];
            }
        for (size_t d = 0; d < count; d++)
            for (size_t j = 0; j < METALA_CONV; j++) dw[(d0 + d) * METALA_CONV + j] += sum[j][d];
    }
}

// x_row = m_row x_row, in place; its own backward. x (rows,D), m (rows). Used on v: a masked token then adds k vᵀ = 0
// to the state, while its α still decays it.
static void mask_rows(metala_context *ctx, real *x, const uint8_t *mask, size_t rows, size_t D) {
    (void)ctx;
    for (size_t row = 0; row < rows; row++)
        if (!mask[row]) memset(x + row * D, 0, D * sizeof(real));
}

// From the gate logit to decay and key:  a = log σ(z) / τ,  α = e^a = σ(z)^(1/τ),  k = 1 - α
//   alpha, k, z: n numbers; k NULL when the key is not tied to the decay. Paper section 4.1; τ = 16.
//   α and k are formed from a, in log space: σ(z) is 0 in float below z = -88, its 16th root is not small.
static void gate_forward(metala_context *ctx, real *alpha, real *k, const real *z, size_t n, double tau) {
    enum { STRIP = 1024 };
    real inverse_tau = (real)(1 / tau);
    PARALLEL_FOR(30 * n)
    for (size_t i0 = 0; i0 < n; i0 += STRIP) {
        size_t i1 = i0 + STRIP < n ? i0 + STRIP : n;
        for (size_t i = i0; i < i1; i++) alpha[i] = log_sigmoid(z[i]) * inverse_tau;
        if (k)
            for (size_t i = i0; i < i1; i++) k[i] = one_minus_exp(alpha[i]);
        for (size_t i = i0; i < i1; i++) alpha[i] = real_exp(alpha[i]);
    }
}

// dz = (da - α dk) σ(-z) / τ      da is the gradient in a = log α from the scan, dk the full gradient of the tied key
// (NULL when it is not tied), since d(1 - α)/da = -α and d log σ(z)/dz = σ(-z).
static void gate_backward(metala_context *ctx, real *dz, const real *da, const real *dk, const real *z,
                          const real *alpha, size_t n, double tau) {
    enum { STRIP = 1024 };
    real inverse_tau = (real)(1 / tau);
    PARALLEL_FOR(20 * n)
    for (size_t i0 = 0; i0 < n; i0 += STRIP) {
        size_t i1 = i0 + STRIP < n ? i0 + STRIP : n;
        for (size_t i = i0; i < i1; i++) {
            real gradient = da[i];
            if (dk) gradient -= alpha[i] * dk[i];
            dz[i] = gradient * sigmoid(-z[i]) * inverse_tau;
        }
    }
}

// Self-augmentation:  p_t = o_t + σ(w_t v_t),  w_t = Σ_i q_{t,i} k_{t,i} b_i        per head
//   p, o, v (rows,H,V)   q, k (rows,H,K)   b [H·K] `aug_balance`; q is not scaled here. Paper section 4.2.
static void augment_forward(metala_context *ctx, real *p, const real *o, const real *q, const real *k, const real *v,
                            const real *b, size_t rows, size_t H, size_t K, size_t V) {
    PARALLEL_FOR(20 * rows * H * V)
    for (size_t row = 0; row < rows; row++)
        for (size_t h = 0; h < H; h++) {
            const real *qh = q + (row * H + h) * K, *kh = k + (row * H + h) * K, *bh = b + h * K;
            const real *vh = v + (row * H + h) * V, *oh = o + (row * H + h) * V;
            real *ph = p + (row * H + h) * V, w = 0;
            for (size_t i = 0; i < K; i++) w += qh[i] * kh[i] * bh[i];
            for (size_t j = 0; j < V; j++) ph[j] = oh[j] + sigmoid(w * vh[j]);
        }
}

// With e = σ(w v), t = dp ⊙ e ⊙ (1 - e):   do = dp (the same memory serves both)     dw = Σ_V t ⊙ v
//   dv += w t     dq += dw (k ⊙ b)     dk += dw (q ⊙ b)     db += Σ_rows dw (q ⊙ k)
static void augment_backward(metala_context *ctx, real *dq, real *dk, real *dv, real *db, const real *dp,
                             const real *q, const real *k, const real *v, const real *b, size_t rows, size_t H,
                             size_t K, size_t V) {
    real *dw = scratch(ctx, rows * H * sizeof(real));
    if (!dw) return;
    PARALLEL_FOR(20 * rows * H * V)
    for (size_t row = 0; row < rows; row++)
        for (size_t h = 0; h < H; h++) {
            size_t at_k = (row * H + h) * K, at_v = (row * H + h) * V;
            const real *qh = q + at_k, *kh = k + at_k, *bh = b + h * K, *vh = v + at_v, *dph = dp + at_v;
            real *dqh = dq + at_k, *dkh = dk + at_k, *dvh = dv + at_v, w = 0, sum = 0;
            for (size_t i = 0; i < K; i++) w += qh[i] * kh[i] * bh[i];
            enum { STRIP = 64 };                        // t in strips: sums of products go through vector registers
            for (size_t j0 = 0; j0 < V; j0 += STRIP) {
                real t[STRIP];
                size_t n = V - j0 < STRIP ? V - j0 : STRIP;
                for (size_t j = 0; j < n; j++) {
                    real e = sigmoid(w * vh[j0 + j]);
                    t[j] = dph[j0 + j] * e * (1 - e);
                }
                for (size_t j = 0; j < n; j++) dvh[j0 + j] += w * t[j];
                sum += dot(t, vh + j0, n);
            }
            for (size_t i = 0; i < K; i++) {
                dqh[i] += sum * kh[i] * bh[i];
                dkh[i] += sum * qh[i] * bh[i];
            }
            dw[row * H + h] = sum;
        }
    PARALLEL_FOR(3 * rows * H * K)
    for (size_t h = 0; h < H; h++)
        for (size_t row = 0; row < rows; row++) {
            const real *qh = q + (row * H + h) * K, *kh = k + (row * H + h) * K;
            for (size_t i = 0; i < K; i++) db[h * K + i] += dw[row * H + h] * qh[i] * kh[i];
        }
}

// Head norm, a layer norm over the V channels of one head without weights, and the output gate:
//   n = (p - μ) ρ,  ρ = (mean((p-μ)²) + eps)^(-1/2)      y = silu(g) ⊙ n
//   y, n, p, g (rows,H,V)   ρ (rows,H)   n and ρ are kept for the backward; with g NULL there is no y.
//   As in the authors' code.
static void head_norm_forward(metala_context *ctx, real *y, real *n, real *rho, const real *p, const real *g, size_t rows,
                              size_t H, size_t V, double eps) {
    PARALLEL_FOR((g ? 14 : 4) * rows * H * V)
    for (size_t row = 0; row < rows * H; row++) {
        const real *in = p + row * V;
        real *out = n + row * V, mean = total(in, V) / (real)V;
        for (size_t j = 0; j < V; j++) out[j] = in[j] - mean;
        rho[row] = 1 / (real)sqrt(dot(out, out, V) / (real)V + (real)eps);
        for (size_t j = 0; j < V; j++) out[j] *= rho[row];
        if (g)
            for (size_t j = 0; j < V; j++) y[row * V + j] = silu(g[row * V + j]) * out[j];
    }
}

// dn = dy ⊙ silu(g), or dy with g NULL      dp = ρ (dn - mean(dn) - n mean(dn ⊙ n))      dg = dy ⊙ n ⊙ silu'(g); dn is made in dp
static void head_norm_backward(metala_context *ctx, real *dp, real *dg, const real *dy, const real *n, const real *rho,
                               const real *g, size_t rows, size_t H, size_t V) {
    PARALLEL_FOR((g ? 20 : 4) * rows * H * V)
    for (size_t row = 0; row < rows * H; row++) {
        const real *gradient = dy + row * V, *out = n + row * V;
        real *to = dp + row * V;
        if (g) {
            const real *gate = g + row * V;
            real *to_g = dg + row * V;
            for (size_t j = 0; j < V; j++) {
                real s = sigmoid(gate[j]), d = gradient[j];
                to_g[j] = d * out[j] * s * (1 + gate[j] * (1 - s));
                to[j] = d * gate[j] * s;
            }
            gradient = to;
        }
        real mean = total(gradient, V) / (real)V, along = dot(gradient, out, V) / (real)V;
        for (size_t j = 0; j < V; j++) to[j] = rho[row] * (gradient[j] - mean - out[j] * along);
    }
}

// Gated product:  y = silu(a) ⊙ b, n numbers. Of SwiGLU, and the output gate of rows with another norm than MetaLA's (a = g,
// b = normalised heads).
static void silu_gate_forward(metala_context *ctx, real *y, const real *a, const real *b, size_t n) {
    PARALLEL_FOR(10 * n)
    for (size_t i = 0; i < n; i++) y[i] = silu(a[i]) * b[i];
}

// da = dy ⊙ b ⊙ silu'(a)      db = dy ⊙ silu(a)      y = silu(a) ⊙ b once more
static void silu_gate_gradients(real *restrict da, real *restrict db, real *restrict y, const real *restrict dy,
                                const real *restrict a, const real *restrict b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(a[i]), gradient = dy[i];
        da[i] = gradient * b[i] * s * (1 + a[i] * (1 - s));
        db[i] = gradient * a[i] * s;
        y[i] = a[i] * s * b[i];
    }
}
// None that is written may be another. y, which costs little here, may be NULL.
static void silu_gate_backward(metala_context *ctx, real *da, real *db, real *y, const real *dy, const real *a, const real *b,
                               size_t n) {
    enum { SOME = 512 };
    PARALLEL_FOR(15 * n)
    for (size_t i = 0; i < n; i += SOME) {
        real unused[SOME];
        silu_gate_gradients(da + i, db + i, y ? y + i : unused, dy + i, a + i, b + i, n - i < SOME ? n - i : SOME);
    }
}

// SwiGLU, the channel mixer (Shazeer 2020):
//
//     a = W_1 n + β_1     b = W_2 n + β_2     h = silu(a) ⊙ b     y = W_3 h + β_3 + residual
//
//     layers: W_1, W_2 [F,in], W_3, of the type `weights`; their y: a, b (rows,F) and y      h (rows,F)      n (rows,in)
// h is room: a device that has no need to write it may leave it as it is.
static void swiglu_forward(metala_context *ctx, const metala_linear *layers, metala_dtype weights, real *h, const real *n,
                           size_t rows, size_t in) {
    size_t F = layers->out;
    void (*const products)(metala_context *, const metala_linear *, int, const real *, size_t, size_t) =
        weights == REAL_TYPE ? matmul_forward : matmul_quantized;
    products(ctx, layers, 2, n, rows, in);
    silu_gate_forward(ctx, h, layers[0].y, layers[1].y, rows * F);
    products(ctx, layers + 2, 1, h, rows, F);
}

// dh = dy W_3    da = dh ⊙ b ⊙ silu'(a)    db = dh ⊙ silu(a)    dn = db W_2 + da W_1    and of each dW += dyᵀ x, dβ += Σ_rows dy
//   layers: as those of swiglu_forward, W_3 with dy; the others' dy, da and db, are made here
//   h, dh, da, db (rows,F): room, of which a device may leave what it does not need; h is made once more
static void swiglu_backward(metala_context *ctx, real *dn, const metala_linear_gradient *layers, real *h, real *dh, real *da,
                            real *db, const real *a, const real *b, const real *n, size_t rows, size_t in) {
    size_t F = layers->out;
    metala_linear_gradient of_h = layers[2], of_w = layers[2], two[2] = {layers[1], layers[0]};
    of_h.dw = of_h.dbias = NULL;
    matmul_backward(ctx, dh, &of_h, 1, NULL, rows, F, 0);
    silu_gate_backward(ctx, da, db, h, dh, a, b, rows * F);
    matmul_backward(ctx, NULL, &of_w, 1, h, rows, F, 0);
    two[0].dy = db, two[1].dy = da;
    matmul_backward(ctx, dn, two, 2, n, rows, in, 0);
}

// All of SwiGLU but W_3 for a few rows, and the norm before it, as generation needs it:
//
//     y = silu(W_1 n + β_1) ⊙ (W_2 n + β_2),  n = rms(x)          y (rows,out)   x (rows,in)
//
// layers: W_1 and W_2, as wide as each other and without a residual, of the type `weights`. What lies between x and y is written
// here to n (rows,in), r (rows) and the layers' y (rows,out); another device may keep it.
static void swiglu_step(metala_context *ctx, real *y, const metala_linear *layers, metala_dtype weights, real *n, real *r,
                        const real *x, size_t rows, size_t in, double eps) {
    rms_forward(ctx, n, r, x, NULL, rows, in, eps);
    (weights == REAL_TYPE ? matmul_forward : matmul_quantized)(ctx, layers, 2, n, rows, in);
    silu_gate_forward(ctx, y, layers[0].y, layers[1].y, rows * layers->out);
}

// Sum:  y = a + b, n numbers; y may be a or b.
static void add(metala_context *ctx, real *y, const real *a, const real *b, size_t n) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) y[i] = a[i] + b[i];
}

// ---- Kernels of the other rows of the general form.

// Token shift:  y_t = μ ⊙ n_t + (1-μ) ⊙ n_{t-1}          y, n (B,T,D)   μ [D]
//   previous (B,D) is n_{-1}, NULL for zeros. RWKV-4 (Peng et al. 2023, section 3.1.1).
static void shift_forward(metala_context *ctx, real *y, const real *n, const real *mu, const real *previous, size_t B,
                          size_t T, size_t D) {
    PARALLEL_FOR(3 * B * T * D)
    for (size_t row = 0; row < B * T; row++) {
        const real *now = n + row * D, *before = row % T ? now - D : previous ? previous + row / T * D : NULL;
        real *to = y + row * D;
        for (size_t d = 0; d < D; d++) to[d] = mu[d] * now[d];
        if (before)
            for (size_t d = 0; d < D; d++) to[d] += (1 - mu[d]) * before[d];
    }
}

// dn_t += μ ⊙ dy_t + (1-μ) ⊙ dy_{t+1}  (dy beyond the end is 0)      dμ += Σ_{b,t} dy_t ⊙ (n_t - n_{t-1})
static void shift_backward(metala_context *ctx, real *dn, real *dmu, const real *dy, const real *n, const real *mu,
                           const real *previous, size_t B, size_t T, size_t D) {
    enum { STRIP = 32 };
    PARALLEL_FOR(4 * B * T * D)
    for (size_t row = 0; row < B * T; row++) {
        const real *gradient = dy + row * D;
        real *to = dn + row * D;
        for (size_t d = 0; d < D; d++) to[d] += mu[d] * gradient[d];
        if (row % T + 1 < T)
            for (size_t d = 0; d < D; d++) to[d] += (1 - mu[d]) * gradient[D + d];
    }
    PARALLEL_FOR(3 * B * T * D)
    for (size_t d0 = 0; d0 < D; d0 += STRIP) {
        size_t count = D - d0 < STRIP ? D - d0 : STRIP;
        real sum[STRIP] = {0};
        for (size_t row = 0; row < B * T; row++) {
            const real *now = n + row * D, *before = row % T ? now - D : previous ? previous + row / T * D : NULL;
            const real *gradient = dy + row * D;
            for (size_t d = 0; d < count; d++) sum[d] += gradient[d0 + d] * (now[d0 + d] - (before ? before[d0 + d] : 0));
        }
        for (size_t d = 0; d < count; d++) dmu[d0 + d] += sum[d];
    }
}

// The last token of each sequence, x_{T-1}: what the next call's token shift looks back to.   to (B,D)   x (B,T,D)
static void last_token(metala_context *ctx, real *to, const real *x, size_t B, size_t T, size_t D) {
    (void)ctx;
    for (size_t b = 0; b < B; b++) memcpy(to + b * D, x + (b * T + T - 1) * D, D * sizeof(real));
}

// Element by element:  y = f(x), n numbers.   f(x) = x,   silu(x) = x σ(x)   or   elu(x) + 1 = x + 1 for x > 0, else e^x.
//   y may be x only where f(x) = x. SiLU: TransNormerLLM (Qin et al. 2023); elu + 1: Linear Transformer (Katharopoulos
//   et al. 2020, equation 7).
static inline real negative_part(real x) { return x < 0 ? x : 0; }
static void map_forward(metala_context *ctx, real *y, const real *x, size_t n, metala_map map) {
    if (map == METALA_MAP_NONE) memmove(y, x, n * sizeof(real));
    else if (map == METALA_MAP_SILU) {
        PARALLEL_FOR(10 * n)
        for (size_t i = 0; i < n; i++) y[i] = silu(x[i]);
    } else {
        PARALLEL_FOR(10 * n)
        for (size_t i = 0; i < n; i++) y[i] = real_exp(negative_part(x[i])) + (x[i] > 0 ? x[i] : 0);
    }
}

// dx = dy f'(x), where (elu(x) + 1)' = 1 for x > 0, else e^x; dx may be dy.
static void map_backward(metala_context *ctx, real *dx, const real *dy, const real *x, size_t n, metala_map map) {
    if (map == METALA_MAP_NONE) memmove(dx, dy, n * sizeof(real));
    else if (map == METALA_MAP_SILU) {
        PARALLEL_FOR(10 * n)
        for (size_t i = 0; i < n; i++) dx[i] = dy[i] * silu_slope(x[i]);
    } else {
        PARALLEL_FOR(10 * n)
        for (size_t i = 0; i < n; i++) dx[i] = dy[i] * real_exp(negative_part(x[i]));
    }
}

// Taylor feature map:  y = [ 1,  x d^(-1/4),  x_i x_j / √(2d) for all i, j ],  so that y(q)·y(k) = 1 + s + s²/2, the start
// of the series of e^s, with s = q·k/√d.          y (rows,H,1+d+d²)   x (rows,H,d)
//   Based (Arora et al. 2024, section 4.1).
static void taylor_forward(metala_context *ctx, real *y, const real *x, size_t rows, size_t H, size_t d) {
    real first = (real)(1 / sqrt(sqrt((double)d))), second = (real)(1 / sqrt(2.0 * (double)d));
    PARALLEL_FOR(rows * H * d * d)
    for (size_t row = 0; row < rows * H; row++) {
        const real *in = x + row * d;
        real *to = y + row * (1 + d + d * d), *square = to + 1 + d;
        to[0] = 1;
        for (size_t i = 0; i < d; i++) to[1 + i] = first * in[i];
        for (size_t i = 0; i < d; i++)
            for (size_t j = 0; j < d; j++) square[i * d + j] = second * in[i] * in[j];
    }
}

// dx_i = d^(-1/4) dy_i + Σ_j (dy_ij + dy_ji) x_j / √(2d). The authors' d = 16 is a constant for the compiler.
static inline void taylor_head_backward(real *dx, const real *dy, const real *x, size_t d, real first, real second) {
    const real *square = dy + 1 + d;
    for (size_t i = 0; i < d; i++) dx[i] = second * dot(square + i * d, x, d);
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) dx[j] += second * x[i] * square[i * d + j];
    for (size_t i = 0; i < d; i++) dx[i] += first * dy[1 + i];
}

static void taylor_backward(metala_context *ctx, real *dx, const real *dy, const real *x, size_t rows, size_t H, size_t d) {
    real first = (real)(1 / sqrt(sqrt((double)d))), second = (real)(1 / sqrt(2.0 * (double)d));
    size_t width = 1 + d + d * d;
    PARALLEL_FOR(4 * rows * H * d * d)
    for (size_t row = 0; row < rows * H; row++) {
        if (d == 16) taylor_head_backward(dx + row * 16, dy + row * width, x + row * 16, 16, first, second);
        else taylor_head_backward(dx + row * d, dy + row * width, x + row * d, d, first, second);
    }
}

// Phase:  y_t = x_t e^{±iθ(position+t)}, where two neighbouring numbers of x are a complex one; minus when `negative`.
//   y, x (B,T,H,K), y may be x   θ [H,K/2], or [K/2] for all heads when `shared`
//   RoPE (Su et al. 2021, section 3.2.2) with θ_i = 10000^(-2i/K); a complex decay's phase, moved from the state into what
//   is written and read, since (r e^{iθ})^t = r^t e^{iθt}.
//
// The table of cosines and sines, (T,n) pairs of the n angles; NULL: no memory. What a token gets depends on its position
// alone, not on where a call starts.
static real *rotation_table(metala_context *ctx, const real *theta, size_t T, size_t n, uint64_t position) {
    real *table = scratch(ctx, times(times(T, n), 2 * sizeof(real)));
    if (!table) return NULL;
    PARALLEL_FOR(20 * T * n)
    for (size_t t = 0; t < T; t++) {
        double p = (double)(position + t);
        real *to = table + t * n * 2;
        for (size_t i = 0; i < n; i++) {
            double sine, cosine;
            sine_cosine((double)theta[i] * p, &sine, &cosine);
            to[2 * i] = (real)cosine;
            to[2 * i + 1] = (real)sine;
        }
    }
    return table;
}

// y (B,T,heads,n) = x times the table's numbers, or their conjugates where sign is -1.
static void rotate(metala_context *ctx, real *y, const real *x, const real *table, size_t B, size_t T, size_t heads,
                   size_t n, real sign) {
    PARALLEL_FOR(6 * B * T * heads * n)
    for (size_t row = 0; row < B * T * heads; row++) {
        const real *in = x + row * n * 2, *turn = table + row / heads % T * n * 2;
        real *to = y + row * n * 2;
        for (size_t i = 0; i < n; i++) {
            real re = in[2 * i], im = in[2 * i + 1], c = turn[2 * i], s = sign * turn[2 * i + 1];
            to[2 * i] = re * c - im * s;
            to[2 * i + 1] = re * s + im * c;
        }
    }
}

static void rotate_forward(metala_context *ctx, real *y, const real *x, const real *theta, size_t B, size_t T, size_t H,
                           size_t K, int shared, uint64_t position, int negative) {
    size_t heads = shared ? H : 1, n = H * (K / 2) / heads;
    const real *table = rotation_table(ctx, theta, T, n, position);
    if (table) rotate(ctx, y, x, table, B, T, heads, n, negative ? -1 : 1);
}

// dx = dy e^{∓iθ(position+t)}, may be dy      dθ += ± Σ (position+t) Im(dy conj(y)), skipped when dθ is NULL
static void rotate_backward(metala_context *ctx, real *dx, real *dtheta, const real *dy, const real *y, const real *theta,
                            size_t B, size_t T, size_t H, size_t K, int shared, uint64_t position, int negative) {
    enum { STRIP = 32 };
    size_t heads = shared ? H : 1, n = H * (K / 2) / heads, rows = B * T * heads;
    const real *table = rotation_table(ctx, theta, T, n, position);
    if (!table) return;
    if (dtheta) {
        PARALLEL_FOR(5 * rows * n)
        for (size_t i0 = 0; i0 < n; i0 += STRIP) {
            size_t count = n - i0 < STRIP ? n - i0 : STRIP;
            double sum[STRIP] = {0};
            for (size_t row = 0; row < rows; row++) {
                const real *gradient = dy + (row * n + i0) * 2, *out = y + (row * n + i0) * 2;
                double p = (double)(position + row / heads % T);
                for (size_t i = 0; i < count; i++)
                    sum[i] += p * (double)(gradient[2 * i + 1] * out[2 * i] - gradient[2 * i] * out[2 * i + 1]);
            }
            for (size_t i = 0; i < count; i++) dtheta[i0 + i] += (real)(negative ? -sum[i] : sum[i]);
        }
    }
    rotate(ctx, dx, dy, table, B, T, heads, n, negative ? 1 : -1);
}

// Decay with a lower bound:  α = γ + (1-γ) σ(z),  k = 1 - α = (1-γ) σ(-z)         z, alpha, k (rows,n)   gamma [n] in [0,1]
//   k may be NULL. HGRN (Qin et al. 2023, equation 5).
static void bounded_gate_forward(metala_context *ctx, real *alpha, real *k, const real *z, const real *gamma, size_t rows,
                                 size_t n) {
    PARALLEL_FOR(20 * rows * n)
    for (size_t row = 0; row < rows; row++) {
        const real *in = z + row * n;
        real *to = alpha + row * n;
        if (k)
            for (size_t i = 0; i < n; i++) k[row * n + i] = (1 - gamma[i]) * sigmoid(-in[i]);
        for (size_t i = 0; i < n; i++) to[i] = gamma[i] + (1 - gamma[i]) * sigmoid(in[i]);
    }
}

// da is the gradient in a = log α from the scan, dk the one of the key. With f = (1-γ) σ(z), so that dα/dz = f σ(-z),
//     dz = σ(-z) (da f/α - dk f)        dγ += Σ_rows σ(-z) (da/α - dk)          dk, dγ may be NULL
// f/α <= 1, and is 1 where both are 0. da has the factor α; below 1e-30 the quotient da/α counts as less than it is.
static void bounded_gate_backward(metala_context *ctx, real *dz, real *dgamma, const real *da, const real *dk,
                                  const real *z, const real *gamma, size_t rows, size_t n) {
    enum { STRIP = 32 };
    PARALLEL_FOR(25 * rows * n)
    for (size_t i0 = 0; i0 < n; i0 += STRIP) {
        size_t count = n - i0 < STRIP ? n - i0 : STRIP;
        real sum[STRIP] = {0};
        for (size_t row = 0; row < rows; row++)
            for (size_t i = 0; i < count; i++) {
                size_t at = row * n + i0 + i;
                real g = gamma[i0 + i], f = (1 - g) * sigmoid(z[at]), down = sigmoid(-z[at]), alpha = g + f;
                real key = dk ? dk[at] : 0;
                dz[at] = down * (da[at] * (alpha > 0 ? f / alpha : 1) - key * f);
                sum[i] += down * (da[at] / (alpha > (real)1e-30 ? alpha : (real)1e-30) - key);
            }
        if (dgamma)
            for (size_t i = 0; i < count; i++) dgamma[i0 + i] += sum[i];
    }
}

// Lower bounds that grow with depth:  p = softmax over the layers of G,  γ_l = Σ_{1<=m<=l} p_m,  so that γ_0 = 0.
//   gamma, G (L,n), n channels each for itself. HGRN, section 3.2.
static void bounds_softmax(double *p, const real *G, size_t L, size_t n) {        // one channel: G points to it
    double most = G[0], sum = 0;
    for (size_t l = 1; l < L; l++) most = G[l * n] > most ? G[l * n] : most;
    for (size_t l = 0; l < L; l++) sum += p[l] = exp((double)G[l * n] - most);
    for (size_t l = 0; l < L; l++) p[l] /= sum;
}

static void bounds_forward(metala_context *ctx, real *gamma, const real *G, size_t L, size_t n) {
    double *p = scratch(ctx, L * sizeof(double));
    if (!p) return;
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        bounds_softmax(p, G + i, L, n);
        for (size_t l = 0; l < L; l++) {
            sum += l ? p[l] : 0;
            gamma[l * n + i] = (real)(sum < 1 ? sum : 1);
        }
    }
}

// dp_m = Σ_{l>=m} dγ_l for m >= 1, dp_0 = 0      dG_l += p_l (dp_l - Σ_m p_m dp_m)
static void bounds_backward(metala_context *ctx, real *dG, const real *dgamma, const real *G, size_t L, size_t n) {
    double *p = scratch(ctx, 2 * L * sizeof(double));
    if (!p) return;
    double *dp = p + L;
    for (size_t i = 0; i < n; i++) {
        double later = 0, mean = 0;
        bounds_softmax(p, G + i, L, n);
        for (size_t l = L; l-- > 0;) {
            later += (double)dgamma[l * n + i];
            dp[l] = l ? later : 0;
            mean += p[l] * dp[l];
        }
        for (size_t l = 0; l < L; l++) dG[l * n + i] += (real)(p[l] * (dp[l] - mean));
    }
}

// A diagonal complex state-space model S' = λ S + x in steps of Δ: its decay λ̄ = α e^{iθ} and input factor b, the same for
// every token.          decay, phase, alpha, theta [H,N]   step [H]   b [H,N,2] complex
//     LRU  α = exp(-exp(decay))   θ = exp(phase)   b = exp(step)                               (N = 1)
//     ZOH  λ = -exp(decay) + i phase,  Δ = exp(step):   λ̄ = e^{λΔ}   b = (e^{λΔ} - 1)/λ,  the hold of zeroth order
//     DSS  as ZOH, but normalised as a softmax over `length` tokens:   b = 1/λ / Σ_{l<length} e^{λΔl}
//   LRU (Orvieto et al. 2023, section 3.3), S4D (Gu et al. 2022, section 3), DSS (Gupta et al. 2022, proposition 1b).
typedef struct { double re, im; } complex_number;
static complex_number complex_of(double re, double im) { complex_number z = {re, im}; return z; }
static complex_number complex_times(complex_number a, complex_number b) {
    return complex_of(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re);
}
static complex_number complex_over(complex_number a, complex_number b) {
    double size = b.re * b.re + b.im * b.im;
    return complex_of((a.re * b.re + a.im * b.im) / size, (a.im * b.re - a.re * b.im) / size);
}
// e^z - 1, exact near 0.
static complex_number complex_expm1(complex_number z) {
    double half = sin(z.im / 2), grown = expm1(z.re);
    return complex_of(grown * cos(z.im) - 2 * half * half, (grown + 1) * sin(z.im));
}
// Exponents are kept where nothing overflows, 1/λ² included.
static double bounded_exp(real x) { return exp(x < -20 ? -20 : x > 40 ? 40 : (double)x); }
static double bounded_phase(double x) { return x < -1e30 ? -1e30 : x > 1e30 ? 1e30 : x; }

static void ssm_forward(metala_context *ctx, metala_ssm kind, real *alpha, real *theta, real *b, const real *decay,
                        const real *phase, const real *step, size_t H, size_t N, size_t length) {
    PARALLEL_FOR(500 * H * N)
    for (size_t i = 0; i < H * N; i++) {
        double delta = bounded_exp(step[i / N]);
        complex_number factor = {delta, 0};
        if (kind == METALA_SSM_LRU) {
            alpha[i] = (real)exp(-bounded_exp(decay[i]));
            theta[i] = (real)bounded_exp(phase[i]);
        } else {
            complex_number lambda = {-bounded_exp(decay[i]), bounded_phase((double)phase[i])};
            complex_number z = {lambda.re * delta, bounded_phase(lambda.im * delta)};
            complex_number all = {z.re * (double)length, z.im * (double)length};
            alpha[i] = (real)exp(z.re);
            theta[i] = (real)z.im;
            factor = complex_over(complex_expm1(z), lambda);
            if (kind == METALA_SSM_DSS) factor = complex_over(factor, complex_expm1(all));
        }
        b[2 * i] = (real)factor.re;
        b[2 * i + 1] = (real)factor.im;
    }
}

// From da [H,N], the gradient in log α summed over all tokens, and those of θ and b; adds to all three of the parameters.
// b is a differentiable function of the complex λ, so that dλ = db conj(∂b/∂λ). With z = λΔ, and S the sum in DSS:
//     ZOH  ∂b/∂λ = Δ² (z e^z - (e^z - 1))/z²          ∂b/∂Δ = e^z
//     DSS  ∂b/∂λ = -b (1/λ + Δ S'/S)                  ∂b/∂Δ = -b λ S'/S,      S'/S = length χ(z length) - χ(z)
// where χ(w) = e^w/(e^w - 1) - 1/w. Near 0 both fractions take their power series instead.
static complex_number zoh_slope(complex_number z) {                               // (z e^z - (e^z - 1))/z²
    complex_number grown = complex_expm1(z), sum = {0, 0};
    if (z.re * z.re + z.im * z.im > 0.25) {
        complex_number e = {grown.re + 1, grown.im}, top = complex_times(z, e);
        return complex_over(complex_of(top.re - grown.re, top.im - grown.im), complex_times(z, z));
    }
    for (int n = 15; n >= 0; n--) {                                               // Σ_n z^n (n+1)/(n+2)!
        double term = n + 1;
        for (int m = n + 2; m > 1; m--) term /= m;
        sum = complex_times(sum, z);
        sum.re += term;
    }
    return sum;
}

static complex_number softmax_slope(complex_number w) {                           // χ(w)
    static const double series[] = {1.0 / 12, -1.0 / 720, 1.0 / 30240, -1.0 / 1209600, 1.0 / 47900160,
                                    -691.0 / 1307674368000.0};
    if (w.re * w.re + w.im * w.im > 0.25) {
        complex_number grown = complex_expm1(w), inverse = complex_over(complex_of(1, 0), w);
        complex_number ratio = complex_over(complex_of(grown.re + 1, grown.im), grown);
        return complex_of(ratio.re - inverse.re, ratio.im - inverse.im);
    }
    complex_number square = complex_times(w, w), sum = {0, 0};
    for (int n = 5; n >= 0; n--) {
        sum = complex_times(sum, square);
        sum.re += series[n];
    }
    sum = complex_times(sum, w);
    return complex_of(sum.re + 0.5, sum.im);
}

static void ssm_backward(metala_context *ctx, metala_ssm kind, real *ddecay, real *dphase, real *dstep, const real *da,
                         const real *dtheta, const real *db, const real *decay, const real *phase, const real *step,
                         size_t H, size_t N, size_t length) {
    PARALLEL_FOR(1000 * H * N)
    for (size_t h = 0; h < H; h++) {
        double delta = bounded_exp(step[h]), ddelta = 0;
        for (size_t i = h * N; i < (h + 1) * N; i++) {
            double gradient_a = (double)da[i], gradient_theta = (double)dtheta[i], rate = bounded_exp(decay[i]);
            complex_number gradient = {(double)db[2 * i], (double)db[2 * i + 1]};
            if (kind == METALA_SSM_LRU) {
                ddecay[i] += (real)(-rate * gradient_a);
                dphase[i] += (real)(gradient_theta * bounded_exp(phase[i]));
                ddelta += gradient.re;
                continue;
            }
            complex_number lambda = {-rate, bounded_phase((double)phase[i])};
            complex_number z = {lambda.re * delta, bounded_phase(lambda.im * delta)};
            complex_number grown = complex_expm1(z), in_lambda, in_delta;
            if (kind == METALA_SSM_ZOH) {
                in_lambda = complex_times(complex_of(delta * delta, 0), zoh_slope(z));
                in_delta = complex_of(grown.re + 1, grown.im);
            } else {
                complex_number all = {z.re * (double)length, z.im * (double)length};
                complex_number near = softmax_slope(z), far = softmax_slope(all);
                complex_number slope = {(double)length * far.re - near.re, (double)length * far.im - near.im};
                complex_number inverse = complex_over(complex_of(1, 0), lambda);
                complex_number b = complex_times(complex_over(grown, complex_expm1(all)), inverse);
                complex_number relative = {-inverse.re - delta * slope.re, -inverse.im - delta * slope.im};
                in_lambda = complex_times(b, relative);
                in_delta = complex_times(complex_times(b, lambda), complex_of(-slope.re, -slope.im));
            }
            double re = gradient.re * in_lambda.re + gradient.im * in_lambda.im + gradient_a * delta;
            double im = gradient.im * in_lambda.re - gradient.re * in_lambda.im + gradient_theta * delta;
            ddecay[i] += (real)(re * lambda.re);
            dphase[i] += (real)im;
            ddelta += gradient.re * in_delta.re + gradient.im * in_delta.im + gradient_a * lambda.re +
                      gradient_theta * lambda.im;
        }
        dstep[h] += (real)(ddelta * delta);
    }
}

// A complex factor for each channel:  y = b ⊙ x          x, y (rows,n) complex   b [n] complex
static void scale_pairs_forward(metala_context *ctx, real *y, const real *x, const real *b, size_t rows, size_t n) {
    PARALLEL_FOR(6 * rows * n)
    for (size_t row = 0; row < rows; row++) {
        const real *in = x + row * n * 2;
        real *to = y + row * n * 2;
        for (size_t i = 0; i < n; i++) {
            to[2 * i] = b[2 * i] * in[2 * i] - b[2 * i + 1] * in[2 * i + 1];
            to[2 * i + 1] = b[2 * i] * in[2 * i + 1] + b[2 * i + 1] * in[2 * i];
        }
    }
}

// dx = conj(b) ⊙ dy      db += Σ_rows conj(x) ⊙ dy
static void scale_pairs_backward(metala_context *ctx, real *dx, real *db, const real *dy, const real *x, const real *b,
                                 size_t rows, size_t n) {
    enum { STRIP = 32 };
    PARALLEL_FOR(12 * rows * n)
    for (size_t i0 = 0; i0 < n; i0 += STRIP) {
        size_t count = n - i0 < STRIP ? n - i0 : STRIP;
        real re[STRIP] = {0}, im[STRIP] = {0};
        const real *factor = b + i0 * 2;
        for (size_t row = 0; row < rows; row++) {
            const real *in = x + (row * n + i0) * 2, *gradient = dy + (row * n + i0) * 2;
            real *to = dx + (row * n + i0) * 2;
            for (size_t i = 0; i < count; i++) {
                real p = gradient[2 * i], q = gradient[2 * i + 1];
                re[i] += in[2 * i] * p + in[2 * i + 1] * q;
                im[i] += in[2 * i] * q - in[2 * i + 1] * p;
                to[2 * i] = factor[2 * i] * p + factor[2 * i + 1] * q;
                to[2 * i + 1] = factor[2 * i] * q - factor[2 * i + 1] * p;
            }
        }
        for (size_t i = 0; i < count; i++) {
            db[(i0 + i) * 2] += re[i];
            db[(i0 + i) * 2 + 1] += im[i];
        }
    }
}

// Selective state space:  Δ = softplus(z),  α = exp(-Δ e^A),  v = Δ x
//   z, x, v (rows,C)   alpha (rows,C,N)   A [C,N]          Mamba (Gu and Dao 2023, section 3.2) with A = -e^A
static inline real softplus(real z) { return -log_sigmoid(-z); }
static const real *selective_rates(metala_context *ctx, const real *A, size_t count) {            // e^A
    real *rates = scratch(ctx, count * sizeof(real));
    if (rates)
        for (size_t i = 0; i < count; i++) rates[i] = real_exp(A[i] < 80 ? A[i] : 80);
    return rates;
}

static void selective_forward(metala_context *ctx, real *alpha, real *v, const real *z, const real *x, const real *A,
                              size_t rows, size_t C, size_t N) {
    const real *rates = selective_rates(ctx, A, C * N);
    if (!rates) return;
    PARALLEL_FOR(15 * rows * C * N)
    for (size_t row = 0; row < rows; row++) {
        real *a = alpha + row * C * N, *delta = v + row * C;
        for (size_t c = 0; c < C; c++) delta[c] = softplus(z[row * C + c]);
        for (size_t c = 0; c < C; c++)
            for (size_t n = 0; n < N; n++) a[c * N + n] = -delta[c] * rates[c * N + n];
        for (size_t i = 0; i < C * N; i++) a[i] = real_exp(a[i]);
        for (size_t c = 0; c < C; c++) delta[c] *= x[row * C + c];
    }
}

// da (rows,C,N) is the gradient in log α:   dΔ = x dv - Σ_n e^A da      dz = σ(z) dΔ      dx = Δ dv
//                                           dA += Σ_rows -Δ e^A da
static void selective_backward(metala_context *ctx, real *dz, real *dx, real *dA, const real *da, const real *dv,
                               const real *z, const real *x, const real *A, size_t rows, size_t C, size_t N) {
    enum { STRIP = 16 };
    const real *rates = selective_rates(ctx, A, C * N);
    if (!rates) return;
    PARALLEL_FOR(rows * C * (4 * N + 30))
    for (size_t c0 = 0; c0 < C; c0 += STRIP) {
        size_t count = C - c0 < STRIP ? C - c0 : STRIP;
        for (size_t row = 0; row < rows; row++) {
            size_t at = row * C + c0;
            real delta[STRIP], along[STRIP];
            for (size_t c = 0; c < count; c++) delta[c] = softplus(z[at + c]);
            for (size_t c = 0; c < count; c++) {
                const real *rate = rates + (c0 + c) * N, *gradient = da + (at + c) * N;
                real *to = dA + (c0 + c) * N;
                along[c] = dot(rate, gradient, N);
                for (size_t n = 0; n < N; n++) to[n] -= delta[c] * (rate[n] * gradient[n]);
            }
            for (size_t c = 0; c < count; c++) dz[at + c] = sigmoid(z[at + c]) * (x[at + c] * dv[at + c] - along[c]);
            for (size_t c = 0; c < count; c++) dx[at + c] = delta[c] * dv[at + c];
        }
    }
}

// The same for every head:  y_h = x          y (rows,H,K)   x (rows,K). Mamba's B and C serve all channels.
static void copy_heads_forward(metala_context *ctx, real *y, const real *x, size_t rows, size_t H, size_t K) {
    PARALLEL_FOR(rows * H * K)
    for (size_t row = 0; row < rows; row++)
        for (size_t h = 0; h < H; h++)
            for (size_t i = 0; i < K; i++) y[(row * H + h) * K + i] = x[row * K + i];
}

// dx = Σ_h dy_h
static void copy_heads_backward(metala_context *ctx, real *dx, const real *dy, size_t rows, size_t H, size_t K) {
    PARALLEL_FOR(rows * H * K)
    for (size_t row = 0; row < rows; row++) {
        real *to = dx + row * K;
        for (size_t i = 0; i < K; i++) to[i] = dy[row * H * K + i];
        for (size_t h = 1; h < H; h++)
            for (size_t i = 0; i < K; i++) to[i] += dy[(row * H + h) * K + i];
    }
}

// RWKV-4's weighted mean of values (Peng et al. 2023, equation 16; each channel for itself, decay e^-w' with w' = e^w),
//
//     wkv_t = (Σ_{j<t} e^{k_j - (t-1-j)w'} v_j + e^{u+k_t} v_t) / (the same with v = 1)
//
// as a scan with exponents that are never positive: the state S_t that token t reads, of tokens before t only, is kept
// times e^{-M_t}, where M_t is its largest exponent,
//
//     M_t = max(M_{t-1} - w', k_{t-1})    α_t = e^{M_{t-1} - w' - M_t}    key_t = e^{k_{t-1} - M_t}
//     p_t = max(M_t, u + k_t)             q_t = e^{M_t - p_t}             bonus_t = e^{u + k_t - p_t}
//
// so that  S_t = α_t S_{t-1} + key_t v_{t-1}  and  wkv_t = (q_t S_t + bonus_t v_t) / (the same with v = 1).
//   q, key, alpha, bonus, k (B,T,D), the first four in [0,1]   w, u [D]   mask (B,T): a masked token's k is -1e30; or NULL
//   previous (B,2,D): k and M of the token before, then of the last one here; NULL for none before. Position 0 has none.
static const real WKV_NOTHING = (real)-1e30;
static inline real wkv_bounded(real x) { return x < (real)-1e28 ? (real)-1e28 : x > (real)1e28 ? (real)1e28 : x; }
static void wkv_forward(metala_context *ctx, real *q, real *key, real *alpha, real *bonus, const real *k, const real *w,
                        const real *u, const uint8_t *mask, real *previous, size_t B, size_t T, size_t D,
                        uint64_t position) {
    enum { STRIP = 32 };
    size_t parts = (D + STRIP - 1) / STRIP;
    PARALLEL_FOR(60 * B * T * D)
    for (size_t task = 0; task < B * parts; task++) {
        size_t b = task / parts, d0 = task % parts * STRIP, n = D - d0 < STRIP ? D - d0 : STRIP;
        real last[STRIP], M[STRIP], decay[STRIP], first[STRIP];
        real *past = previous ? previous + b * 2 * D + d0 : NULL;
        for (size_t d = 0; d < n; d++) {
            last[d] = past && position ? past[d] : WKV_NOTHING;
            M[d] = past && position ? past[D + d] : WKV_NOTHING;
            decay[d] = real_exp(w[d0 + d] < 60 ? w[d0 + d] : 60);
            first[d] = wkv_bounded(u[d0 + d]);
        }
        for (size_t t = 0; t < T; t++) {
            size_t at = (b * T + t) * D + d0;
            real now[STRIP], down[STRIP], own[STRIP], p[STRIP];
            if (mask && !mask[b * T + t])
                for (size_t d = 0; d < n; d++) now[d] = WKV_NOTHING;
            else
                for (size_t d = 0; d < n; d++) now[d] = wkv_bounded(k[at + d]);
            for (size_t d = 0; d < n; d++) {
                down[d] = M[d] - decay[d];
                own[d] = first[d] + now[d];
                M[d] = down[d] > last[d] ? down[d] : last[d];
                p[d] = M[d] > own[d] ? M[d] : own[d];
            }
            for (size_t d = 0; d < n; d++) alpha[at + d] = real_exp(down[d] - M[d]);
            for (size_t d = 0; d < n; d++) key[at + d] = real_exp(last[d] - M[d]);
            for (size_t d = 0; d < n; d++) q[at + d] = real_exp(M[d] - p[d]);
            for (size_t d = 0; d < n; d++) bonus[at + d] = real_exp(own[d] - p[d]);
            for (size_t d = 0; d < n && position + t == 0; d++) {
                alpha[at + d] = key[at + d] = q[at + d] = 0;
                bonus[at + d] = 1;
            }
            memcpy(last, now, n * sizeof(real));
        }
        for (size_t d = 0; past && d < n; d++) {
            past[d] = last[d];
            past[D + d] = M[d];
        }
    }
}

// Of a whole sequence. M and p cancel in wkv and count as constants, which is why dq is not needed:
//     dk_t = dbonus_t bonus_t + dkey_{t+1} key_{t+1}  (0 beyond the end and where masked)
//     dw += Σ -w' da_t      du += Σ dbonus_t bonus_t          da is the gradient in log α
static void wkv_backward(metala_context *ctx, real *dk, real *dw, real *du, const real *dkey, const real *da,
                         const real *dbonus, const real *key, const real *bonus, const real *w, const uint8_t *mask,
                         size_t B, size_t T, size_t D) {
    enum { STRIP = 32 };
    PARALLEL_FOR(8 * B * T * D)
    for (size_t d0 = 0; d0 < D; d0 += STRIP) {
        size_t n = D - d0 < STRIP ? D - d0 : STRIP;
        real sum_w[STRIP] = {0}, sum_u[STRIP] = {0};
        for (size_t row = 0; row < B * T; row++) {
            size_t at = row * D + d0;
            real there = mask && !mask[row] ? 0 : 1, next = row % T + 1 < T ? 1 : 0;
            size_t after = next > 0 ? at + D : at;
            for (size_t d = 0; d < n; d++) {
                real own = dbonus[at + d] * bonus[at + d];
                dk[at + d] = there * (own + next * dkey[after + d] * key[after + d]);
                sum_u[d] += own;
                sum_w[d] += da[at + d];
            }
        }
        for (size_t d = 0; d < n; d++) {
            dw[d0 + d] -= real_exp(w[d0 + d] < 60 ? w[d0 + d] : 60) * sum_w[d];
            du[d0 + d] += sum_u[d];
        }
    }
}

// The channel of ones that becomes the normaliser:  y_t = m_t [v_t, 1]          y (B,T,H,V+1)   v (B,T,H,V)   mask m (B,T)
//   or NULL. Delayed, for wkv above:  y_t = [v_{t-1}, 1], where v_{-1} is `previous` (B,H·V), NULL for zeros; no mask then.
static void extend_forward(metala_context *ctx, real *y, const real *v, const uint8_t *mask, const real *previous,
                           int delayed, size_t B, size_t T, size_t H, size_t V) {
    PARALLEL_FOR(B * T * H * (V + 1))
    for (size_t row = 0; row < B * T; row++) {
        const real *in = v + row * H * V;
        real there = delayed || !mask || mask[row] ? 1 : 0, *to = y + row * H * (V + 1);
        if (delayed) in = row % T ? in - H * V : previous ? previous + row / T * H * V : NULL;
        for (size_t h = 0; h < H; h++) {
            for (size_t j = 0; j < V; j++) to[h * (V + 1) + j] = in ? there * in[h * V + j] : 0;
            to[h * (V + 1) + V] = there;
        }
    }
}

// dv_t = m_t dy_t, or dy_{t+1} when delayed (0 beyond the end), without the last channel
static void extend_backward(metala_context *ctx, real *dv, const real *dy, const uint8_t *mask, int delayed, size_t B,
                            size_t T, size_t H, size_t V) {
    PARALLEL_FOR(B * T * H * V)
    for (size_t row = 0; row < B * T; row++) {
        const real *gradient = dy + (delayed && row % T + 1 < T ? row + 1 : row) * H * (V + 1);
        real there = delayed ? row % T + 1 < T : !mask || mask[row];
        for (size_t h = 0; h < H; h++)
            for (size_t j = 0; j < V; j++) dv[(row * H + h) * V + j] = there * gradient[h * (V + 1) + j];
    }
}

// A mean instead of a sum:  y_j = (o_j + b v_j) / (o_V + b + eps)          o (rows,H,V+1)   y, v (rows,H,V)
//   bonus b (rows,H), the weight of the token's own value, or NULL for 0. Linear Transformer, equation 9; RWKV-4.
// One head at a time; with V = 1, which RWKV-4 has, as a constant, the compiler leaves out all loops.
static inline void normalise_head(real *y, const real *o, real b, const real *v, size_t V, real eps) {
    real scale = 1 / (o[V] + b + eps);
    for (size_t j = 0; j < V; j++) y[j] = (v ? o[j] + b * v[j] : o[j]) * scale;
}

static void normalise_forward(metala_context *ctx, real *y, const real *o, const real *bonus, const real *v, size_t rows,
                              size_t H, size_t V, double eps) {
    PARALLEL_FOR(rows * H * (4 * V + 10))
    for (size_t row = 0; row < rows * H; row++) {
        const real *own = bonus ? v + row * V : NULL;
        real b = bonus ? bonus[row] : 0;
        if (V == 1) normalise_head(y + row, o + 2 * row, b, own, 1, (real)eps);
        else normalise_head(y + row * V, o + row * (V + 1), b, own, V, (real)eps);
    }
}

// With c = o_V + b + eps:   do_j = dy_j/c      do_V = -Σ_j dy_j y_j/c      db = Σ_j do_j v_j + do_V      dv_j = b do_j
static inline void normalise_head_backward(real *dO, real *dbonus, real *dv, const real *dy, const real *y, const real *o,
                                           real b, const real *v, size_t V, real eps) {
    real scale = 1 / (o[V] + b + eps), along = V == 1 ? dy[0] * y[0] : dot(dy, y, V);
    for (size_t j = 0; j < V; j++) dO[j] = scale * dy[j];
    dO[V] = -scale * along;
    if (!v) return;
    *dbonus = (V == 1 ? dO[0] * v[0] : dot(dO, v, V)) + dO[V];
    for (size_t j = 0; j < V; j++) dv[j] = b * dO[j];
}

static void normalise_backward(metala_context *ctx, real *dO, real *dbonus, real *dv, const real *dy, const real *y,
                               const real *o, const real *bonus, const real *v, size_t rows, size_t H, size_t V,
                               double eps) {
    PARALLEL_FOR(rows * H * (8 * V + 20))
    for (size_t row = 0; row < rows * H; row++) {
        size_t at = row * V, at_o = row * (V + 1);
        const real *own = bonus ? v + at : NULL;
        real b = bonus ? bonus[row] : 0, *to_b = bonus ? dbonus + row : NULL, *to_v = bonus ? dv + at : NULL;
        if (V == 1) normalise_head_backward(dO + at_o, to_b, to_v, dy + at, y + at, o + at_o, b, own, 1, (real)eps);
        else normalise_head_backward(dO + at_o, to_b, to_v, dy + at, y + at, o + at_o, b, own, V, (real)eps);
    }
}

// The input past the scan:  y = o + d ⊙ x          y, o, x (rows,n), y may be o   d [n]. State-space models' D.
static void skip_forward(metala_context *ctx, real *y, const real *o, const real *x, const real *d, size_t rows, size_t n) {
    PARALLEL_FOR(2 * rows * n)
    for (size_t row = 0; row < rows; row++)
        for (size_t i = 0; i < n; i++) y[row * n + i] = o[row * n + i] + d[i] * x[row * n + i];
}

// do = dy (the same memory serves both)      dx += d ⊙ dy      dd += Σ_rows x ⊙ dy
static void skip_backward(metala_context *ctx, real *dx, real *dd, const real *dy, const real *x, const real *d, size_t rows,
                          size_t n) {
    enum { STRIP = 32 };
    PARALLEL_FOR(4 * rows * n)
    for (size_t i0 = 0; i0 < n; i0 += STRIP) {
        size_t count = n - i0 < STRIP ? n - i0 : STRIP;
        real sum[STRIP] = {0};
        for (size_t row = 0; row < rows; row++) {
            const real *gradient = dy + row * n + i0, *in = x + row * n + i0;
            real *to = dx + row * n + i0;
            for (size_t i = 0; i < count; i++) {
                sum[i] += gradient[i] * in[i];
                to[i] += gradient[i] * d[i0 + i];
            }
        }
        for (size_t i = 0; i < count; i++) dd[i0 + i] += sum[i];
    }
}

// Product:  y = a ⊙ b, n numbers.
static void multiply_forward(metala_context *ctx, real *y, const real *a, const real *b, size_t n) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) y[i] = a[i] * b[i];
}

// da = dy ⊙ b      db = dy ⊙ a, may be dy
static void multiply_backward(metala_context *ctx, real *da, real *db, const real *dy, const real *a, const real *b,
                              size_t n) {
    PARALLEL_FOR(2 * n)
    for (size_t i = 0; i < n; i++) {
        real gradient = dy[i];
        da[i] = gradient * b[i];
        db[i] = gradient * a[i];
    }
}

// Gated product:  y = σ(a) ⊙ b, n numbers. RWKV-4's receptance.
static void sigmoid_gate_forward(metala_context *ctx, real *y, const real *a, const real *b, size_t n) {
    PARALLEL_FOR(10 * n)
    for (size_t i = 0; i < n; i++) y[i] = sigmoid(a[i]) * b[i];
}

// da = dy ⊙ b ⊙ σ(a)(1 - σ(a))      db = dy ⊙ σ(a)
static void sigmoid_gate_backward(metala_context *ctx, real *da, real *db, const real *dy, const real *a, const real *b,
                                  size_t n) {
    PARALLEL_FOR(15 * n)
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(a[i]), gradient = dy[i];
        da[i] = gradient * b[i] * s * (1 - s);
        db[i] = gradient * s;
    }
}

// Softmax attention, what all of this approximates:   o_t = Σ_{j<=past+t} p_tj v_j,   p_t = softmax_j(s q_t·k_j)
//   q, o (B,T,H,K), (B,T,H,V)   k, v (B,past+T,H,K), (B,past+T,H,V), of which sequence b starts at row b·stride, since a
//   cache has room for more   mask (B,past+T), with the same stride: masked j are skipped; or NULL
//   lse (B,T,H) = log Σ_j e^{s q_t·k_j}, for the backward. A token with nothing to look at gets o = 0 and lse = 0.
//
// The T×T map is never stored: a block of KEYS keys after the other, with the largest score so far taken out of the
// exponentials, and sums made smaller when a larger one comes (online softmax of Milakov and Gimelshein 2018; FlashAttention
// of Dao et al. 2022). Many queries go in tiles, as products of matrices. Scores are stored a row for each key, so that the
// maxima and sums of QUERIES queries are taken side by side, without a sum across a vector register.
enum { QUERIES = 64, KEYS = 48, FEW_QUERIES = 4 };
static const real NO_SCORE = -(real)FLT_MAX;

typedef struct {                // one head of one sequence: pointers to its first token and distances between tokens
    const real *q, *k, *v, *dO, *o, *lse;
    const uint8_t *mask;
    size_t K, V, H, q_step, v_step, past;
    real scale;
} attention_head;

static attention_head attention_head_of(const real *q, const real *k, const real *v, const uint8_t *mask, size_t b, size_t h,
                                        size_t T, size_t past, size_t stride, size_t H, size_t K, size_t V, double scale) {
    attention_head a = {q + (b * T * H + h) * K, k + (b * stride * H + h) * K, v + (b * stride * H + h) * V, NULL, NULL,
                        NULL, mask ? mask + b * stride : NULL, K, V, H, H * K, H * V, past, (real)scale};
    return a;
}

// One query, which sees `count` keys.
static void attention_of_query(const attention_head *a, real *o, real *lse, const real *q, size_t count) {
    real score[KEYS], most = NO_SCORE, sum = 0;
    for (size_t j = 0; j < a->V; j++) o[j] = 0;
    for (size_t j0 = 0; j0 < count; j0 += KEYS) {
        size_t n = count - j0 < KEYS ? count - j0 : KEYS;
        real before = most;
        for (size_t j = 0; j < n; j++) {
            int seen = !a->mask || a->mask[j0 + j];
            score[j] = seen ? a->scale * dot(q, a->k + (j0 + j) * a->q_step, a->K) : NO_SCORE;
            most = score[j] > most ? score[j] : most;
        }
        real shrink = real_exp(before - most);
        for (size_t j = 0; j < n; j++) score[j] = score[j] <= NO_SCORE ? 0 : real_exp(score[j] - most);
        sum = sum * shrink + total(score, n);
        for (size_t l = 0; l < a->V && shrink < 1; l++) o[l] *= shrink;
        for (size_t j = 0; j < n; j++) {
            const real *v = a->v + (j0 + j) * a->v_step;
            for (size_t l = 0; l < a->V; l++) o[l] += score[j] * v[l];
        }
    }
    for (size_t l = 0; l < a->V && sum > 0; l++) o[l] /= sum;
    *lse = sum > 0 ? most + (real)log(sum) : 0;
}

// to (columns, QUERIES) = scale · fromᵀ and rows (QUERIES, width) = from, of n rows; zeros beyond. rows may be NULL.
static void pack_queries(real *to, real *rows, size_t width, const real *from, size_t step, size_t n, size_t columns,
                         real scale) {
    memset(to, 0, columns * QUERIES * sizeof(real));
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < columns; i++) to[i * QUERIES + t] = scale * from[t * step + i];
    if (!rows) return;
    memset(rows, 0, QUERIES * width * sizeof(real));
    for (size_t t = 0; t < n; t++) memcpy(rows + t * width, from + t * step, columns * sizeof(real));
}

// S (n,QUERIES): the scores of keys j0 to j0 + n for queries from t0 on; NO_SCORE where a query must not look.
static void attention_scores(const attention_head *a, real *S, const real *q, const real *zeros, size_t t0, size_t j0,
                             size_t n) {
    block_product(S, QUERIES, zeros, 0, a->k + j0 * a->q_step, a->q_step, 1, q, QUERIES, n, QUERIES, a->K);
    for (size_t j = 0; j < n; j++) {
        size_t blind = j0 + j > a->past + t0 ? j0 + j - a->past - t0 : 0;          // queries before the key
        if (blind > QUERIES || (a->mask && !a->mask[j0 + j])) blind = QUERIES;
        for (size_t t = 0; t < blind; t++) S[j * QUERIES + t] = NO_SCORE;
    }
}

static size_t attention_scratch(size_t K, size_t V) {
    size_t Vp = round_up(V, TILE_COLUMNS);
    return QUERIES + K * QUERIES + KEYS * QUERIES + KEYS * Vp + QUERIES * Vp;
}

// Queries t0 to t0 + n.
static void attention_of_tile(const attention_head *a, real *o, real *lse, size_t t0, size_t n, real *work) {
    size_t K = a->K, V = a->V, Vp = round_up(V, TILE_COLUMNS), end = a->past + t0 + n;
    real *zeros = work, *q = zeros + QUERIES, *S = q + K * QUERIES;                // (K,QUERIES), (KEYS,QUERIES)
    real *v = S + KEYS * QUERIES, *out = v + KEYS * Vp;                            // (KEYS,Vp), (QUERIES,Vp)
    real most[QUERIES], sum[QUERIES] = {0};
    memset(zeros, 0, QUERIES * sizeof(real));
    memset(v, 0, (KEYS + QUERIES) * Vp * sizeof(real));
    pack_queries(q, NULL, 0, a->q + t0 * a->q_step, a->q_step, n, K, a->scale);
    for (size_t t = 0; t < QUERIES; t++) most[t] = NO_SCORE;
    for (size_t j0 = 0; j0 < end; j0 += KEYS) {
        size_t keys = end - j0 < KEYS ? end - j0 : KEYS;
        real before[QUERIES], shrink[QUERIES];
        attention_scores(a, S, q, zeros, t0, j0, keys);
        for (size_t j = 0; j < keys; j++) memcpy(v + j * Vp, a->v + (j0 + j) * a->v_step, V * sizeof(real));
        memcpy(before, most, sizeof before);
        for (size_t j = 0; j < keys; j++)
            for (size_t t = 0; t < QUERIES; t++) most[t] = S[j * QUERIES + t] > most[t] ? S[j * QUERIES + t] : most[t];
        for (size_t t = 0; t < QUERIES; t++) shrink[t] = real_exp(before[t] - most[t]);
        for (size_t t = 0; t < QUERIES; t++) sum[t] *= shrink[t];
        for (size_t j = 0; j < keys; j++) {
            real *p = S + j * QUERIES;
            for (size_t t = 0; t < QUERIES; t++) {
                real e = real_exp(p[t] - most[t]);
                p[t] = p[t] <= NO_SCORE ? 0 : e;
            }
            for (size_t t = 0; t < QUERIES; t++) sum[t] += p[t];
        }
        for (size_t t = 0; t < n; t++)
            for (size_t l = 0; l < Vp; l++) out[t * Vp + l] *= shrink[t];
        block_product(out, Vp, out, Vp, S, 1, QUERIES, v, Vp, n, Vp, keys);
    }
    for (size_t t = 0; t < n; t++) {
        real inverse = sum[t] > 0 ? 1 / sum[t] : 0;
        for (size_t l = 0; l < V; l++) o[t * a->v_step + l] = out[t * Vp + l] * inverse;
        lse[t * a->H] = sum[t] > 0 ? most[t] + (real)log(sum[t]) : 0;
    }
}

static void attention_forward(metala_context *ctx, real *o, real *lse, const real *q, const real *k, const real *v,
                              const uint8_t *mask, size_t B, size_t T, size_t past, size_t stride, size_t H, size_t K,
                              size_t V, double scale) {
    if (T <= FEW_QUERIES) {
        PARALLEL_FOR(B * T * H * (past + T) * (K + V))
        for (size_t task = 0; task < B * T * H; task++) {
            size_t h = task % H, t = task / H % T, b = task / H / T;
            attention_head a = attention_head_of(q, k, v, mask, b, h, T, past, stride, H, K, V, scale);
            attention_of_query(&a, o + task * V, lse + task, q + task * K, past + t + 1);
        }
        return;
    }
    size_t each = round_up(attention_scratch(K, V), 16), tiles = (T + QUERIES - 1) / QUERIES;
    real *work = scratch(ctx, (size_t)ctx->threads * each * sizeof(real));
    if (!work) return;
    PARALLEL
    SHARED_FOR
    for (size_t task = 0; task < B * H * tiles; task++) {                          // the longest first
        size_t h = task % H, b = task / H % B, t0 = (tiles - 1 - task / H / B) * QUERIES, at = (b * T + t0) * H + h;
        attention_head a = attention_head_of(q, k, v, mask, b, h, T, past, stride, H, K, V, scale);
        attention_of_tile(&a, o + at * V, lse + at, t0, T - t0 < QUERIES ? T - t0 : QUERIES, work + thread_number() * each);
    }
}

static size_t attention_backward_scratch(size_t T, size_t K, size_t V) {
    size_t Kp = round_up(K, TILE_COLUMNS), Vp = round_up(V, TILE_COLUMNS);
    return plus(times(T, 2 * Kp + Vp), QUERIES * (1 + K + V + 2 * Kp + Vp + 2 * KEYS));
}

// All of one head, tile by tile. With P and G stored like the scores,
//     S_jt = k_j·q_t    dP_jt = v_j·do_t    dv = P do    dk = G q    dq = Gᵀ k
static void attention_head_backward(const attention_head *a, real *dq, real *dk, real *dv, size_t T, real *work) {
    size_t K = a->K, V = a->V, Kp = round_up(K, TILE_COLUMNS), Vp = round_up(V, TILE_COLUMNS);
    real *k = work, *dk_all = k + T * Kp, *dv_all = dk_all + T * Kp;               // (T,Kp), (T,Kp), (T,Vp)
    real *zeros = dv_all + T * Vp, *qt = zeros + QUERIES, *dOt = qt + K * QUERIES; // (K,QUERIES), (V,QUERIES)
    real *q = dOt + V * QUERIES, *dO = q + QUERIES * Kp, *dq_tile = dO + QUERIES * Vp;
    real *P = dq_tile + QUERIES * Kp, *G = P + KEYS * QUERIES;
    memset(work, 0, (T * (2 * Kp + Vp) + QUERIES) * sizeof(real));
    for (size_t j = 0; j < T; j++) memcpy(k + j * Kp, a->k + j * a->q_step, K * sizeof(real));
    for (size_t t0 = 0; t0 < T; t0 += QUERIES) {
        size_t n = T - t0 < QUERIES ? T - t0 : QUERIES, end = t0 + n;
        real lse[QUERIES], own[QUERIES];
        pack_queries(qt, q, Kp, a->q + t0 * a->q_step, a->q_step, n, K, a->scale);
        pack_queries(dOt, dO, Vp, a->dO + t0 * a->v_step, a->v_step, n, V, 1);
        memset(dq_tile, 0, QUERIES * Kp * sizeof(real));
        for (size_t t = 0; t < QUERIES; t++) {                                     // beyond the end p becomes e^-∞
            lse[t] = t < n ? a->lse[(t0 + t) * a->H] : -NO_SCORE;
            own[t] = t < n ? dot(dO + t * Vp, a->o + (t0 + t) * a->v_step, V) : 0;
        }
        for (size_t j0 = 0; j0 < end; j0 += KEYS) {
            size_t keys = end - j0 < KEYS ? end - j0 : KEYS;
            attention_scores(a, P, qt, zeros, t0, j0, keys);
            block_product(G, QUERIES, zeros, 0, a->v + j0 * a->v_step, a->v_step, 1, dOt, QUERIES, keys, QUERIES, V);
            for (size_t j = 0; j < keys; j++) {
                real *p = P + j * QUERIES, *g = G + j * QUERIES;
                for (size_t t = 0; t < QUERIES; t++) {
                    real exponent = p[t] - lse[t];                                 // above 0 by rounding alone
                    real e = real_exp(exponent > 0 ? 0 : exponent);
                    p[t] = p[t] <= NO_SCORE ? 0 : e;
                    g[t] = a->scale * p[t] * (g[t] - own[t]);
                }
            }
            block_product(dv_all + j0 * Vp, Vp, dv_all + j0 * Vp, Vp, P, QUERIES, 1, dO, Vp, keys, Vp, n);
            block_product(dk_all + j0 * Kp, Kp, dk_all + j0 * Kp, Kp, G, QUERIES, 1, q, Kp, keys, Kp, n);
            block_product(dq_tile, Kp, dq_tile, Kp, G, 1, QUERIES, k + j0 * Kp, Kp, n, Kp, keys);
        }
        for (size_t t = 0; t < n; t++) memcpy(dq + (t0 + t) * a->q_step, dq_tile + t * Kp, K * sizeof(real));
    }
    for (size_t j = 0; j < T; j++) {
        memcpy(dk + j * a->q_step, dk_all + j * Kp, K * sizeof(real));
        memcpy(dv + j * a->v_step, dv_all + j * Vp, V * sizeof(real));
    }
}

// With p_tj = e^{s q_t·k_j - lse_t} and g_tj = s p_tj (do_t·v_j - do_t·o_t), for past 0 and stride T:
//     dv_j = Σ_t p_tj do_t      dq_t = Σ_j g_tj k_j      dk_j = Σ_t g_tj q_t
static void attention_backward(metala_context *ctx, real *dq, real *dk, real *dv, const real *dO, const real *o,
                               const real *lse, const real *q, const real *k, const real *v, const uint8_t *mask, size_t B,
                               size_t T, size_t H, size_t K, size_t V, double scale) {
    size_t each = round_up(attention_backward_scratch(T, K, V), 16);
    real *work = scratch(ctx, times(times((size_t)ctx->threads, each), sizeof(real)));
    if (!work) return;
    PARALLEL
    SHARED_FOR
    for (size_t task = 0; task < B * H; task++) {
        size_t h = task % H, b = task / H, at = b * T * H + h;
        attention_head a = attention_head_of(q, k, v, mask, b, h, T, 0, T, H, K, V, scale);
        a.dO = dO + at * V, a.o = o + at * V, a.lse = lse + at;
        attention_head_backward(&a, dq + at * K, dk + at * K, dv + at * V, T, work + thread_number() * each);
    }
}

// Softmax cross-entropy:  lse = log Σ_n e^{logit_n},  loss = lse - logit_target; 0 where the target is METALA_IGNORE
//   loss, lse (rows)   logits (rows,N). The largest logit is taken out first, so nothing overflows.
static void cross_entropy_forward(metala_context *ctx, real *loss, real *lse, const real *logits, const int *targets,
                                  size_t rows, size_t N) {
    enum { STRIP = 256 };
    PARALLEL_FOR(20 * rows * N)
    for (size_t row = 0; row < rows; row++) {
        const real *x = logits + row * N;
        real most = x[0], sum = 0, e[STRIP];
        for (size_t i = 1; i < N; i++) most = x[i] > most ? x[i] : most;
        for (size_t i0 = 0; i0 < N; i0 += STRIP) {
            size_t n = N - i0 < STRIP ? N - i0 : STRIP;
            for (size_t i = 0; i < n; i++) e[i] = real_exp(x[i0 + i] - most);
            sum += total(e, n);
        }
        lse[row] = most + (real)log(sum);
        loss[row] = targets[row] == METALA_IGNORE ? 0 : most - x[targets[row]] + (real)log(sum);
    }
}

// dlogits = weight (softmax(logits) - onehot(target)), 0 where ignored; may overwrite the logits.
static void cross_entropy_backward(metala_context *ctx, real *dlogits, const real *logits, const real *lse,
                                   const int *targets, size_t rows, size_t N, double weight) {
    real c = (real)weight;
    PARALLEL_FOR(20 * rows * N)
    for (size_t row = 0; row < rows; row++) {
        const real *x = logits + row * N;
        real *dx = dlogits + row * N, base = lse[row];
        if (targets[row] == METALA_IGNORE) {
            memset(dx, 0, N * sizeof(real));
            continue;
        }
        for (size_t i = 0; i < N; i++) dx[i] = c * real_exp(x[i] - base);
        dx[targets[row]] -= c;
    }
}

// The output layer, logits = x Wᵀ, with the cross-entropy behind it:  dx = dlogits W      dW += dlogitsᵀ x
//   dx, x (rows,in)   w, dw [N,in]   logits (rows,N): room for dlogits; another device may not need it
static void output_backward(metala_context *ctx, real *dx, real *dw, real *logits, const real *lse, const int *targets,
                            const real *x, const real *w, size_t rows, size_t N, size_t in, double weight) {
    const metala_linear_gradient layer = {dw, NULL, logits, w, N};
    cross_entropy_backward(ctx, logits, logits, lse, targets, rows, N, weight);
    matmul_backward(ctx, dx, &layer, 1, x, rows, in, 0);
}

// Σ x², for the global norm of the gradients: sums of strips, added up in order.
static double sum_squares(metala_context *ctx, const real *x, size_t n) {
    enum { STRIP = 4096 };
    size_t count = (n + STRIP - 1) / STRIP;
    double *part = scratch(ctx, count * sizeof(double)), sum = 0;
    if (!part) return 0;
    PARALLEL_FOR(n)
    for (size_t s = 0; s < count; s++) {
        size_t start = s * STRIP;
        part[s] = dot(x + start, x + start, n - start < STRIP ? n - start : STRIP);
    }
    for (size_t s = 0; s < count; s++) sum += part[s];
    return sum;
}

// AdamW, step = 1, 2, …:  g = gradient_scale · g;  θ *= 1 - lr·wd;  m = β₁m + (1-β₁)g;  v = β₂v + (1-β₂)g²
//                         θ -= lr/(1-β₁^step) · m / (√v / √(1-β₂^step) + eps)
static void adamw(metala_context *ctx, real *p, real *m, real *v, const real *g, size_t n, const metala_adamw *adamw,
                  uint64_t step, double gradient_scale, double weight_decay) {
    real scale = (real)gradient_scale, keep = (real)(1 - adamw->learning_rate * weight_decay);
    real beta1 = (real)adamw->beta1, beta2 = (real)adamw->beta2, eps = (real)adamw->eps;
    real rate = (real)(adamw->learning_rate / (1 - pow(adamw->beta1, (double)step)));
    real root = (real)(1 / sqrt(1 - pow(adamw->beta2, (double)step)));
    PARALLEL_FOR(4 * n)
    for (size_t i = 0; i < n; i++) {
        real gradient = scale * g[i];
        m[i] = beta1 * m[i] + (1 - beta1) * gradient;
        v[i] = beta2 * v[i] + (1 - beta2) * gradient * gradient;
#ifdef METALA_FLOAT64
        real deviation = sqrt(v[i]);
#else
        real deviation = sqrtf(v[i]);
#endif
        p[i] = keep * p[i] - rate * m[i] / (deviation * root + eps);
    }
}

// ============================================================== 5. The decay scan

// The heart of the model, for each sequence and head:
//
//     S_t = diag(α_t) S_{t-1} + k_t v_tᵀ           S in R^{K×V}, the memory: row i is what channel i remembers
//     o_t = s S_tᵀ q_t                             read after token t is in; s = K^(-1/2)
//
//   o, v (B,T,H,V)   q, k, alpha (B,T,H,K)   S (B,H,K,V): initial state in, final state out, NULL for zeros and no
//   interest; states (B,H,ceil(T/64),K,V) receives the state before every 64th token, for the backward, or NULL;
//   the parallel form writes only the first, S_0.
//   0 <= α <= 1.     Paper section 3, equations of the general form; MetaLA has k = 1 - α.
//
// Other rows of the general form need fewer numbers. `shared` says which, and a gradient always has its input's shape:
//
//   METALA_SHARED_QUERY      q (B,T,K), the same for all heads         METALA_SHARED_KEY   k likewise
//   METALA_SHARED_SEQUENCES  q and k (T,H,K), the same for all sequences; not together with these two
//   METALA_CONSTANT_DECAY    alpha [H,K], the same for all tokens      (all sizes are at least 1)
//
// Three computations of the same numbers. Decays over several tokens are always products of α, each a factor <= 1:
// nothing is divided by a decay and no exponential is taken, so that nothing can overflow, and what underflows is
// truly gone, for every gate. (Dividing by cumulative products, (Q⊙P)(K/P)ᵀ, overflows within 16 tokens of strong
// decay.)
//
// Backward, from do_t and Γ_T = dS, the gradients of the outputs and of the final state: G_t is the gradient of S_t
// counting all later uses, Γ_t = diag(α_{t+1}) G_{t+1} the part of it that comes from the future.
//
//     G_t   = Γ_t + s q_t do_tᵀ
//     dq_t  = s S_t do_t         dk_t = G_t v_t         dv_t = G_tᵀ k_t
//     da_t  = α_t ⊙ rowsum(G_t ⊙ S_{t-1})               the gradient in a = log α, finite and exact as α → 0
//     Γ_{t-1} = diag(α_t) G_t                           Γ_0 is returned in dS, the gradient of the initial state
//
// The states are recomputed from those stored. (Running the recurrence backwards, S_{t-1} = (S_t - k vᵀ)/α, loses all
// digits within 64 tokens.)

// What one thread walks through: one head of one sequence, or several neighbours where they are narrow, of all sequences where
// these share q, k and α. The pointers are to the first token of the first.
typedef struct {
    size_t T, K, V, heads;
    size_t q_step, k_step, a_step, v_step, dq_step, dk_step;       // from token to token; a_step 0: da is the sum over all
    size_t sequences, v_next, S_next, states_next;                 // how many; from one sequence to the next
    int shared;
    real scale;
    const real *q, *k, *v, *alpha, *dO, *states;
    real *o, *keep_states, *dq, *dk, *dv, *da;
} head;

// da of channel i at token t: set, or added to that of all tokens.
static void put_da(const head *h, size_t t, size_t i, real da) {
    if (h->da && h->a_step) h->da[t * h->a_step + i] = da;
    else if (h->da) h->da[i] += da;
}

static size_t chunks(size_t T) { return (T + METALA_CHUNK - 1) / METALA_CHUNK; }

// ---- Recurrent: the definition, token by token.

// S = diag(α) S + k vᵀ
static void state_update(real *S, const real *k, const real *v, const real *alpha, size_t K, size_t V) {
    for (size_t i = 0; i < K; i++)
        for (size_t j = 0; j < V; j++) S[i * V + j] = alpha[i] * S[i * V + j] + k[i] * v[j];
}

static void recurrent_forward(const head *h, real *S) {
    size_t K = h->K, V = h->V;
    for (size_t t = 0; t < h->T; t++) {
        const real *q = h->q + t * h->q_step;
        real *o = h->o + t * h->v_step;
        if (h->keep_states && t % METALA_CHUNK == 0)
            memcpy(h->keep_states + t / METALA_CHUNK * K * V, S, K * V * sizeof(real));
        state_update(S, h->k + t * h->k_step, h->v + t * h->v_step, h->alpha + t * h->a_step, K, V);
        for (size_t j = 0; j < V; j++) o[j] = 0;
        for (size_t i = 0; i < K; i++)
            for (size_t j = 0; j < V; j++) o[j] += h->scale * q[i] * S[i * V + j];
    }
}

static size_t recurrent_scratch(size_t K, size_t V) { return (METALA_CHUNK + 1) * K * V; }

// G: Γ on entry to a token, (K,V), becomes dS. work: the states of one chunk.
static void recurrent_backward(const head *h, real *G, real *work) {
    size_t K = h->K, V = h->V, KV = K * V;
    for (size_t c = chunks(h->T); c-- > 0;) {
        size_t t0 = c * METALA_CHUNK, n = h->T - t0 < METALA_CHUNK ? h->T - t0 : METALA_CHUNK;
        memcpy(work, h->states + c * KV, KV * sizeof(real));
        for (size_t t = 0; t < n; t++) {                             // work[t + 1] = S after token t0 + t
            size_t at = t0 + t;
            memcpy(work + (t + 1) * KV, work + t * KV, KV * sizeof(real));
            state_update(work + (t + 1) * KV, h->k + at * h->k_step, h->v + at * h->v_step, h->alpha + at * h->a_step, K, V);
        }
        for (size_t t = n; t-- > 0;) {
            size_t at = t0 + t;
            const real *q = h->q + at * h->q_step, *k = h->k + at * h->k_step, *alpha = h->alpha + at * h->a_step;
            const real *v = h->v + at * h->v_step, *dO = h->dO + at * h->v_step, *before = work + t * KV, *after = before + KV;
            real *dq = h->dq + at * h->dq_step, *dk = h->dk + at * h->dk_step, *dv = h->dv + at * h->v_step;
            for (size_t j = 0; j < V; j++) dv[j] = 0;
            for (size_t i = 0; i < K; i++) {
                real *g = G + i * V, sq = h->scale * q[i];
                for (size_t j = 0; j < V; j++) g[j] += sq * dO[j];
                for (size_t j = 0; j < V; j++) dv[j] += g[j] * k[i];
                dq[i] = h->scale * dot(after + i * V, dO, V);
                dk[i] = dot(g, v, V);
                put_da(h, at, i, alpha[i] * dot(g, before + i * V, V));
                for (size_t j = 0; j < V; j++) g[j] *= alpha[i];
            }
        }
    }
}

// ---- Parallel: the T×T attention map that stands for softmax attention's.
//
//     A_tj = Σ_i q_{t,i} k_{j,i} Π_{j<r<=t} α_{r,i}  for j <= t          o_t = s ( Σ_j A_tj v_j + S_0ᵀ (q_t ⊙ Π_{r<=t} α_r) )

static size_t parallel_scratch(size_t T, size_t K, size_t V) { return plus(times(2, times(T, T)), 2 * T * K + K * V); }

// One column of A at a time: key j as it is still remembered at t = j, j+1, …, in `e` (K). Leaves e = k_j Π_{r>j} α_r.
static void map_column(const head *h, real *A, real *e, size_t j) {
    for (size_t i = 0; i < h->K; i++) e[i] = h->k[j * h->k_step + i];
    for (size_t t = j; t < h->T; t++) {
        const real *alpha = h->alpha + t * h->a_step;
        if (t > j)
            for (size_t i = 0; i < h->K; i++) e[i] *= alpha[i];
        A[t * h->T + j] = dot(h->q + t * h->q_step, e, h->K);
    }
}

static void parallel_forward(const head *h, real *S, real *work) {
    size_t T = h->T, K = h->K, V = h->V;
    real *A = work, *e = A + T * T, *p = e + K;
    if (h->keep_states) memcpy(h->keep_states, S, K * V * sizeof(real));     // its backward needs S_0 only
    for (size_t i = 0; i < K; i++) p[i] = 1;
    for (size_t t = 0; t < T; t++) {                                 // what is left of S_0 at t
        real *o = h->o + t * h->v_step;
        for (size_t j = 0; j < V; j++) o[j] = 0;
        for (size_t i = 0; i < K; i++) {
            p[i] *= h->alpha[t * h->a_step + i];
            real q = h->scale * h->q[t * h->q_step + i] * p[i];
            for (size_t j = 0; j < V; j++) o[j] += q * S[i * V + j];
        }
    }
    for (size_t i = 0; i < K; i++)
        for (size_t j = 0; j < V; j++) S[i * V + j] *= p[i];
    for (size_t j = 0; j < T; j++) {
        const real *v = h->v + j * h->v_step;
        map_column(h, A, e, j);
        for (size_t i = 0; i < K; i++)
            for (size_t l = 0; l < V; l++) S[i * V + l] += e[i] * v[l];
    }
    for (size_t t = 0; t < T; t++)
        for (size_t j = 0; j <= t; j++)
            for (size_t l = 0; l < V; l++)
                h->o[t * h->v_step + l] += h->scale * A[t * T + j] * h->v[j * h->v_step + l];
}

// With D_tj = s do_t·v_j, e_tj = Π_{j<r<=t} α_r and p_t = Π_{r<=t} α_r:
//
//     dq_t = Σ_{j<=t} D_tj e_tj ⊙ k_j + s p_t ⊙ (S_0 do_t)          dk_j = Σ_{t>=j} D_tj e_tj ⊙ q_t + e_Tj ⊙ (Γ v_j)
//     dv_j = s Σ_{t>=j} A_tj do_t + Γᵀ (e_Tj ⊙ k_j)                 Γ_0 = diag(p_T) Γ + s Σ_t (q_t ⊙ p_t) do_tᵀ
//     da_r = Σ_{t>=r} (q_t ⊙ dq_t - k_t ⊙ dk_t) + rowsum(Γ ⊙ S_T)
//
// The last line because log α_r scales every q_t with t >= r and unscales every k_j with j >= r, and the final state
// counts as one more query. Its terms nearly cancel under strong decay: da is right to the rounding of the terms.
static void parallel_backward(const head *h, real *G, real *work) {
    size_t T = h->T, K = h->K, V = h->V;
    real *A = work, *D = A + T * T, *e = D + T * T, *p = e + T * K, *S_T = p + T * K;
    const real *S_0 = h->states;
    for (size_t t = 0; t < T; t++)                                   // p_t = Π_{r<=t} α_r
        for (size_t i = 0; i < K; i++) p[t * K + i] = (t ? p[(t - 1) * K + i] : 1) * h->alpha[t * h->a_step + i];
    for (size_t i = 0; i < K; i++)
        for (size_t l = 0; l < V; l++) S_T[i * V + l] = p[(T - 1) * K + i] * S_0[i * V + l];
    for (size_t j = 0; j < T; j++) {
        map_column(h, A, e, j);
        for (size_t t = j; t < T; t++) D[t * T + j] = h->scale * dot(h->dO + t * h->v_step, h->v + j * h->v_step, V);
        real *dv = h->dv + j * h->v_step, *dk = h->dk + j * h->dk_step;
        const real *v = h->v + j * h->v_step;
        for (size_t l = 0; l < V; l++) dv[l] = 0;
        for (size_t i = 0; i < K; i++) {                             // through the final state
            for (size_t l = 0; l < V; l++) dv[l] += e[i] * G[i * V + l];
            for (size_t l = 0; l < V; l++) S_T[i * V + l] += e[i] * v[l];
        }
        for (size_t t = j; t < T; t++)
            for (size_t l = 0; l < V; l++) dv[l] += h->scale * A[t * T + j] * h->dO[t * h->v_step + l];
        for (size_t i = 0; i < K; i++) dk[i] = 0;
        for (size_t i = 0; i < K; i++) e[i] = 1;
        for (size_t t = j; t < T; t++) {
            const real *q = h->q + t * h->q_step, *alpha = h->alpha + t * h->a_step;
            for (size_t i = 0; i < K && t > j; i++) e[i] *= alpha[i];
            for (size_t i = 0; i < K; i++) dk[i] += D[t * T + j] * e[i] * q[i];
        }
        for (size_t i = 0; i < K; i++) dk[i] += e[i] * dot(G + i * V, v, V);
    }
    for (size_t t = 0; t < T; t++) {
        real *dq = h->dq + t * h->dq_step;
        const real *dO = h->dO + t * h->v_step;
        for (size_t i = 0; i < K; i++) dq[i] = h->scale * p[t * K + i] * dot(S_0 + i * V, dO, V);
        for (size_t i = 0; i < K; i++) e[i] = 1;
        for (size_t j = t + 1; j-- > 0;) {
            for (size_t i = 0; i < K; i++) dq[i] += D[t * T + j] * e[i] * h->k[j * h->k_step + i];
            for (size_t i = 0; i < K; i++) e[i] *= h->alpha[j * h->a_step + i];
        }
    }
    for (size_t i = 0; i < K; i++) {
        real sum = dot(G + i * V, S_T + i * V, V);
        for (size_t t = T; t-- > 0;) {
            sum += h->q[t * h->q_step + i] * h->dq[t * h->dq_step + i] - h->k[t * h->k_step + i] * h->dk[t * h->dk_step + i];
            put_da(h, t, i, sum);
        }
        for (size_t l = 0; l < V; l++) G[i * V + l] *= p[(T - 1) * K + i];
        for (size_t t = 0; t < T; t++) {
            real q = h->scale * h->q[t * h->q_step + i] * p[t * K + i];
            for (size_t l = 0; l < V; l++) G[i * V + l] += q * h->dO[t * h->v_step + l];
        }
    }
}

// ---- Chunkwise: the parallel form inside blocks of 16 tokens, the recurrence from block to block.
//
// The state then moves once for 16 tokens instead of once for each, and nearly all work is products of small matrices.
// With t and j inside a block, S_0 the state before it, p_t = Π_{r<=t} α_r and n its last token:
//
//     o_t = s ( S_0ᵀ (q_t ⊙ p_t) + Σ_{j<=t} A_tj v_j ),   A_tj = q_t · (k_j ⊙ Π_{j<r<=t} α_r)
//     S_n = diag(p_n) S_0 + Σ_j (k_j ⊙ Π_{j<r<=n} α_r) v_jᵀ
//
// The decayed keys k_j ⊙ Π_{j<r<=t} α_r are carried from t to t + 1 by one multiplication by α_{t+1}; when the block is
// done they are what the second line needs. (On a CPU one level of blocks does the least arithmetic: 2KV + 16(K+V)
// multiply-adds for a token. Larger chunks with sub-blocks, as GPUs use them, feed wider matrix units.)

enum { BLOCK = 16 };

typedef struct {                // what a block needs, padded to whole tiles: Vp = V, Kp = K + BLOCK rounded up
    size_t Vp, Kp;
    real *S_v;                  // (K + BLOCK, Vp)  the state, and below it the block's v
    real *qp_A;                 // (K + BLOCK, BLOCK)  s (q_t ⊙ p_t) as columns, and below it s A_tj, column t
    real *keys;                 // (BLOCK, K)  decayed keys
    real *p;                    // (K)  total decay of the block
    real *o;                    // (BLOCK, Vp)
} block_memory;

static size_t block_scratch(size_t K, size_t V) {
    size_t Vp = round_up(V, TILE_COLUMNS);
    return (K + BLOCK) * (Vp + BLOCK) + BLOCK * K + K + BLOCK * Vp;
}

static block_memory block_memory_in(real *work, size_t K, size_t V) {
    block_memory m = {round_up(V, TILE_COLUMNS), round_up(K + BLOCK, TILE_COLUMNS), NULL, NULL, NULL, NULL, NULL};
    m.S_v = work;
    m.qp_A = m.S_v + (K + BLOCK) * m.Vp;
    m.keys = m.qp_A + (K + BLOCK) * BLOCK;
    m.p = m.keys + BLOCK * K;
    m.o = m.p + K;
    return m;
}

// to (rows, width) = from (rows, columns), zeros to the right; and back.
static void copy_padded(real *to, size_t width, const real *from, size_t from_step, size_t rows, size_t columns) {
    for (size_t row = 0; row < rows; row++) {
        memcpy(to + row * width, from + row * from_step, columns * sizeof(real));
        for (size_t j = columns; j < width; j++) to[row * width + j] = 0;
    }
}

static void copy_unpadded(real *to, size_t to_step, const real *from, size_t width, size_t rows, size_t columns) {
    for (size_t row = 0; row < rows; row++) memcpy(to + row * to_step, from + row * width, columns * sizeof(real));
}

// Walks through a block of n tokens from t0: fills qp_A, the decayed keys (as they are after the last token) and p.
static void block_walk(const head *h, const block_memory *m, size_t t0, size_t n) {
    size_t K = h->K;
    for (size_t i = 0; i < K; i++) m->p[i] = 1;
    for (size_t t = 0; t < n; t++) {
        size_t at = t0 + t;
        const real *q = h->q + at * h->q_step, *k = h->k + at * h->k_step, *alpha = h->alpha + at * h->a_step;
        for (size_t i = 0; i < K; i++) m->p[i] *= alpha[i];
        for (size_t i = 0; i < K; i++) m->qp_A[i * BLOCK + t] = h->scale * q[i] * m->p[i];
        for (size_t i = 0; i < K; i++) m->keys[t * K + i] = k[i];
        for (size_t j = 0; j < n; j++) {
            real *key = m->keys + j * K;
            for (size_t i = 0; i < K && j < t; i++) key[i] *= alpha[i];
            m->qp_A[(K + j) * BLOCK + t] = j <= t ? h->scale * dot(q, key, K) : 0;
        }
    }
}

// S = diag(p) S + keysᵀ v
static void block_state_update(const block_memory *m, size_t K, size_t n) {
    for (size_t i = 0; i < K; i++)
        for (size_t j = 0; j < m->Vp; j++) m->S_v[i * m->Vp + j] *= m->p[i];
    block_multiply(m->S_v, m->Vp, m->S_v, m->Vp, m->keys, K, m->S_v + K * m->Vp, m->Vp, K, m->Vp, n);
}

static void chunkwise_forward(const head *h, real *S, real *work) {
    size_t K = h->K, V = h->V;
    block_memory m = block_memory_in(work, K, V);
    copy_padded(m.S_v, m.Vp, S, V, K, V);
    for (size_t t0 = 0; t0 < h->T; t0 += BLOCK) {
        size_t n = h->T - t0 < BLOCK ? h->T - t0 : BLOCK;
        if (h->keep_states && t0 % METALA_CHUNK == 0)
            copy_unpadded(h->keep_states + t0 / METALA_CHUNK * K * V, V, m.S_v, m.Vp, K, V);
        copy_padded(m.S_v + K * m.Vp, m.Vp, h->v + t0 * h->v_step, h->v_step, n, V);
        block_walk(h, &m, t0, n);
        memset(m.o, 0, n * m.Vp * sizeof(real));
        block_multiply(m.o, m.Vp, m.o, m.Vp, m.qp_A, BLOCK, m.S_v, m.Vp, n, m.Vp, K + n);     // o = [qp A] [S; v]
        copy_unpadded(h->o + t0 * h->v_step, h->v_step, m.o, m.Vp, n, V);
        block_state_update(&m, K, n);
    }
    copy_unpadded(S, V, m.S_v, m.Vp, K, V);
}

// to (columns, to_step) = fromᵀ, from (rows, from_step)
static void transpose(real *to, size_t to_step, const real *from, size_t from_step, size_t rows, size_t columns) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) to[j * to_step + i] = from[i * from_step + j];
}

static size_t chunkwise_scratch(size_t K, size_t V) {
    size_t Vp = round_up(V, TILE_COLUMNS), Kp = round_up(K + BLOCK, TILE_COLUMNS);
    return block_scratch(K, V) + (METALA_CHUNK / BLOCK + 1) * K * Vp + (BLOCK + K) * (Vp + BLOCK) + 2 * V * Kp +
           2 * V * BLOCK + 2 * BLOCK * Kp + BLOCK * K + BLOCK * Vp;
}

// Block by block from the last. Γ is the gradient of the state after the block, D_tj = s do_t·v_j for j <= t, and the
// decayed queries q_t ⊙ Π_{j<r<=t} α_r mirror the decayed keys:
//
//     dq_t = s p_t ⊙ (S_0 do_t) + Σ_{j<=t} D_tj (k_j ⊙ Π_{j<r<=t} α_r)
//     dk_j = Σ_{t>=j} D_tj (q_t ⊙ Π_{j<r<=t} α_r) + Π_{j<r<=n} α_r ⊙ (Γ v_j)
//     dv_j = s Σ_{t>=j} A_tj do_t + Γᵀ (k_j ⊙ Π_{j<r<=n} α_r)
//     da_t = Σ_{r>=t} (q_r ⊙ dq_r - k_r ⊙ dk_r) + rowsum(Γ ⊙ S_n)        (see parallel_backward)
//     Γ   <- diag(p_n) Γ + s Σ_t (q_t ⊙ p_t) do_tᵀ
static void chunkwise_backward(const head *h, real *G, real *work) {
    enum { BLOCKS = METALA_CHUNK / BLOCK };
    size_t K = h->K, V = h->V;
    block_memory m = block_memory_in(work, K, V);
    size_t Vp = m.Vp, Kp = m.Kp;
    real *states = work + block_scratch(K, V);                 // (BLOCKS + 1, K, Vp)  state before each block, and after
    real *dO_G = states + (BLOCKS + 1) * K * Vp;               // (BLOCK + K, Vp)  do, and below it Γ
    real *A_keys = dO_G + (BLOCK + K) * Vp;                    // (BLOCK + K, BLOCK)  s A (row t), below it keysᵀ
    real *St_vt = A_keys + (BLOCK + K) * BLOCK;                // (V, Kp)  S_0ᵀ, and beside it vᵀ
    real *Gt = St_vt + V * Kp, *dOt = Gt + V * Kp;             // (V, Kp)  Γᵀ;   (V, BLOCK)  doᵀ
    real *vt = dOt + V * BLOCK, *X = vt + V * BLOCK;           // (V, BLOCK)  vᵀ;  (BLOCK, Kp)  do [S_0ᵀ vᵀ]
    real *Y = X + BLOCK * Kp, *walk = Y + BLOCK * Kp;          // (BLOCK, Kp)  v Γᵀ;  (BLOCK, K)  decayed keys, queries
    real *dv = walk + BLOCK * K;                               // (BLOCK, Vp)
    real *gamma = dO_G + BLOCK * Vp;
    copy_padded(gamma, Vp, G, V, K, V);
    memset(St_vt, 0, 2 * V * Kp * sizeof(real));

    for (size_t c = chunks(h->T); c-- > 0;) {
        size_t c0 = c * METALA_CHUNK, end = h->T - c0 < METALA_CHUNK ? h->T : c0 + METALA_CHUNK;
        size_t blocks = (end - c0 + BLOCK - 1) / BLOCK;
        copy_padded(m.S_v, Vp, h->states + c * K * V, V, K, V);
        for (size_t b = 0; b < blocks; b++) {                  // the states between the blocks of this chunk
            size_t t0 = c0 + b * BLOCK, n = end - t0 < BLOCK ? end - t0 : BLOCK;
            memcpy(states + b * K * Vp, m.S_v, K * Vp * sizeof(real));
            copy_padded(m.S_v + K * Vp, Vp, h->v + t0 * h->v_step, h->v_step, n, V);
            block_walk(h, &m, t0, n);
            block_state_update(&m, K, n);
        }
        memcpy(states + blocks * K * Vp, m.S_v, K * Vp * sizeof(real));

        for (size_t b = blocks; b-- > 0;) {
            size_t t0 = c0 + b * BLOCK, n = end - t0 < BLOCK ? end - t0 : BLOCK;
            const real *v = h->v + t0 * h->v_step, *dO = h->dO + t0 * h->v_step, *S_0 = states + b * K * Vp, *S_n = S_0 + K * Vp;
            const real *q = h->q + t0 * h->q_step, *k = h->k + t0 * h->k_step, *alpha = h->alpha + t0 * h->a_step;
            real *dq = h->dq + t0 * h->dq_step, *dk = h->dk + t0 * h->dk_step;
            block_walk(h, &m, t0, n);

            // Operands: everything that is summed over V must have V as its rows.
            copy_padded(dO_G, Vp, dO, h->v_step, n, V);
            transpose(dOt, BLOCK, dO, h->v_step, n, V);
            transpose(vt, BLOCK, v, h->v_step, n, V);
            transpose(St_vt, Kp, S_0, Vp, K, V);
            transpose(St_vt + K, Kp, v, h->v_step, n, V);
            transpose(Gt, Kp, gamma, Vp, K, V);
            memset(X, 0, 2 * BLOCK * Kp * sizeof(real));
            block_multiply(X, Kp, X, Kp, dOt, BLOCK, St_vt, Kp, n, Kp, V);       // X = do [S_0ᵀ vᵀ]
            block_multiply(Y, Kp, Y, Kp, vt, BLOCK, Gt, Kp, n, Kp, V);           // Y = v Γᵀ

            // dv: rows 0…n-1 of A_keys are tokens t, the K rows below are channels.
            for (size_t t = 0; t < n; t++)
                for (size_t j = 0; j < BLOCK; j++) A_keys[t * BLOCK + j] = j < n ? m.qp_A[(K + j) * BLOCK + t] : 0;
            memset(dv, 0, n * Vp * sizeof(real));
            block_multiply(dv, Vp, dv, Vp, A_keys, BLOCK, dO_G, Vp, n, Vp, n);
            transpose(A_keys + BLOCK * BLOCK, BLOCK, m.keys, K, n, K);
            block_multiply(dv, Vp, dv, Vp, A_keys + BLOCK * BLOCK, BLOCK, gamma, Vp, n, Vp, K);
            copy_unpadded(h->dv + t0 * h->v_step, h->v_step, dv, Vp, n, V);

            for (size_t t = 0; t < n; t++) {                                     // dq: keys decay forwards
                const real *decay = alpha + t * h->a_step;
                real *to = dq + t * h->dq_step;
                for (size_t i = 0; i < K; i++) walk[t * K + i] = k[t * h->k_step + i];
                for (size_t j = 0; j < t; j++)
                    for (size_t i = 0; i < K; i++) walk[j * K + i] *= decay[i];
                for (size_t i = 0; i < K; i++) m.p[i] = t ? m.p[i] * decay[i] : decay[i];
                for (size_t i = 0; i < K; i++) to[i] = h->scale * m.p[i] * X[t * Kp + i];
                for (size_t j = 0; j <= t; j++) {
                    real D = h->scale * X[t * Kp + K + j];
                    for (size_t i = 0; i < K; i++) to[i] += D * walk[j * K + i];
                }
            }
            real *rest = m.keys;                                                 // (K) Π_{j<r<=n} α_r; the keys are done with
            for (size_t i = 0; i < K; i++) rest[i] = 1;
            for (size_t j = n; j-- > 0;) {                                       // dk: queries decay backwards
                const real *decay = alpha + j * h->a_step;
                real *to = dk + j * h->dk_step;
                for (size_t i = 0; i < K; i++) to[i] = rest[i] * Y[j * Kp + i];
                for (size_t i = 0; i < K; i++) walk[j * K + i] = q[j * h->q_step + i];
                for (size_t t = j; t < n; t++) {
                    real D = h->scale * X[t * Kp + K + j];
                    for (size_t i = 0; i < K; i++) to[i] += D * walk[t * K + i];
                }
                for (size_t t = j; t < n; t++)
                    for (size_t i = 0; i < K; i++) walk[t * K + i] *= decay[i];
                for (size_t i = 0; i < K; i++) rest[i] *= decay[i];
            }
            real *sum = m.keys;                                                  // (K) da, summed up from the end
            for (size_t i = 0; i < K; i++) sum[i] = dot(gamma + i * Vp, S_n + i * Vp, V);
            for (size_t t = n; t-- > 0;)
                for (size_t i = 0; i < K; i++) {
                    sum[i] += q[t * h->q_step + i] * dq[t * h->dq_step + i] - k[t * h->k_step + i] * dk[t * h->dk_step + i];
                    put_da(h, t0 + t, i, sum[i]);
                }
            // Γ: rows t of `walk` are now q_t ⊙ p_t, having decayed all the way to the start of the block.
            for (size_t t = 0; t < n; t++)
                for (size_t i = 0; i < K; i++) walk[t * K + i] *= h->scale;
            for (size_t i = 0; i < K; i++)
                for (size_t j = 0; j < Vp; j++) gamma[i * Vp + j] *= m.p[i];
            block_multiply(gamma, Vp, gamma, Vp, walk, K, dO_G, Vp, K, Vp, n);
        }
    }
    copy_unpadded(G, V, gamma, Vp, K, V);
}

// ---- Narrow heads: where K = 1 or V = 1, the state of a head is a vector.
//
// Products of matrices have nothing to gain there, and the recurrence costs little more than reading its inputs and
// writing its results. So neighbouring heads walk through time together: a group goes from token to token, so that whole
// pages are read in the order of memory, which is what out of the caches counts most, and its states stay in the caches.

enum { PIECE = 512, GROUP = 8 };                  // numbers of state in a piece, pieces in a group

static int is_narrow(size_t K, size_t V) { return K == 1 || V == 1; }

// to[2i] = to[2i+1] = x[i]
static void double_up(real *restrict to, const real *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++) to[2 * i] = to[2 * i + 1] = x[i];
}

// to[i] = x[2i] + x[2i+1]
static void add_pairs(real *restrict to, const real *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = x[2 * i] + x[2 * i + 1];
}

// Each of the n numbers x `count` times, in `to`; or where they are, if that is once. work: n·count/2. Loops over pairs
// become vector instructions, loops over 16 neighbours hardly; so this doubles as often as it can, and add_up halves.
static const real *repeat(real *to, const real *x, size_t n, size_t count, real *work) {
    if (count == 1) return x;
    if (count % 2 == 0) double_up(to, repeat(work, x, n, count / 2, to), n * count / 2);
    else
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < count; j++) to[i * count + j] = x[i];
    return to;
}

// to[i] = Σ of the i-th `count` numbers of x, for n sums; x is used up. One number is its own sum: then x is `to`.
static void add_up(real *to, real *x, size_t n, size_t count, real *work) {
    if (count == 2) add_pairs(to, x, n);
    else if (count % 2 == 0) {
        add_pairs(work, x, n * count / 2);
        add_up(to, work, n, count / 2, x);
    } else
        for (size_t i = 0; i < n && count > 1; i++) to[i] = total(x + i * count, count);
}

// K = 1, a linear RNN: V is 1, or 2 for a complex number, or for a value and its normaliser. The v, o and S of neighbours are
// n = heads·V numbers one behind the other, and one loop serves all; their q, k and α are repeated V times to be as long, and
// the sums over V are those of so many neighbours. A piece is what stays in the level-1 cache with all that is repeated.

typedef struct {                                  // one token of a piece: n numbers of each
    size_t heads, n;
    const real *q, *k, *v, *alpha, *dO;
} row_piece;

// Parts of the memory beside a piece: q, k, α, and the terms of dq, dk, da. They are a cache line further apart than a power
// of two, or the same element of all would compete for one set of lines.
enum { ROW_PARTS = 6 };
static size_t row_heads(size_t V) { return V < PIECE ? PIECE / V : 1; }
static size_t row_part(size_t V) { return row_heads(V) * V + 16; }

static const real *row_keys(real *to, const real *x, const row_piece *p, int shared, size_t V, real *work) {
    if (!shared) return repeat(to, x, p->heads, V, work);
    for (size_t i = 0; i < p->n; i++) to[i] = x[0];
    return to;
}

static row_piece row_piece_at(const head *h, size_t t, size_t first, real *work) {
    size_t V = h->V, most = row_heads(V), heads = h->heads - first < most ? h->heads - first : most, part = row_part(V);
    int one_q = h->shared & METALA_SHARED_QUERY, one_k = h->shared & METALA_SHARED_KEY;
    row_piece p = {heads, heads * V, NULL, NULL, NULL, NULL, NULL};
    p.q = row_keys(work, h->q + t * h->q_step + (one_q ? 0 : first), &p, one_q, V, work + 3 * part);
    p.k = row_keys(work + part, h->k + t * h->k_step + (one_k ? 0 : first), &p, one_k, V, work + 3 * part);
    p.alpha = repeat(work + 2 * part, h->alpha + t * h->a_step + first, heads, V, work + 3 * part);
    p.v = h->v + t * h->v_step + first * V;
    if (h->dO) p.dO = h->dO + t * h->v_step + first * V;
    return p;
}

// S = α S_before + k v
static void row_update(real *restrict S, const real *restrict before, const real *restrict k, const real *restrict v,
                       const real *restrict alpha, size_t n) {
    for (size_t i = 0; i < n; i++) S[i] = alpha[i] * before[i] + k[i] * v[i];
}

// The same in place, and o.
static void row_step(real *restrict o, real *restrict S, const real *restrict q, const real *restrict k,
                     const real *restrict v, const real *restrict alpha, real scale, size_t n) {
    for (size_t i = 0; i < n; i++) {
        S[i] = alpha[i] * S[i] + k[i] * v[i];
        o[i] = scale * q[i] * S[i];
    }
}

// The terms of the gradients. G: Γ of this token becomes Γ of the one before.
static void row_gradient(real *restrict dq, real *restrict dk, real *restrict dv, real *restrict da, real *restrict G,
                         const real *restrict dO, const real *restrict q, const real *restrict k,
                         const real *restrict v, const real *restrict alpha, const real *restrict before,
                         const real *restrict S, real scale, size_t n) {
    for (size_t i = 0; i < n; i++) {
        real g = G[i] + scale * q[i] * dO[i];
        dq[i] = scale * S[i] * dO[i];
        dk[i] = g * v[i];
        dv[i] = g * k[i];
        G[i] = alpha[i] * g;
        da[i] = G[i] * before[i];
    }
}

static void row_forward(const head *h, real *S, real *work) {
    size_t V = h->V;
    for (size_t t = 0; t < h->T; t++) {
        for (size_t i = 0; h->keep_states && t % METALA_CHUNK == 0 && i < h->heads; i++)
            memcpy(h->keep_states + (i * chunks(h->T) + t / METALA_CHUNK) * V, S + i * V, V * sizeof(real));
        for (size_t first = 0; first < h->heads; first += row_heads(V)) {
            row_piece p = row_piece_at(h, t, first, work);
            row_step(h->o + t * h->v_step + first * V, S + first * V, p.q, p.k, p.v, p.alpha, h->scale, p.n);
        }
    }
}

// What a piece adds to dq or dk: sums over V, for each head, or one for all (shared).
static void row_keys_gradient(real *to, real *terms, size_t first, const row_piece *p, int shared, size_t V, real *work) {
    if (shared) to[0] = (first ? to[0] : 0) + total(terms, p->n);
    else add_up(to + first, terms, p->heads, V, work);
}

static void row_backward(const head *h, real *G, real *work) {
    size_t V = h->V, part = row_part(V), step = h->heads * V + 16;
    int one_q = h->shared & METALA_SHARED_QUERY, one_k = h->shared & METALA_SHARED_KEY, each_a = h->da && h->a_step;
    real *terms_q = work + 3 * part, *terms_k = terms_q + part, *terms_a = terms_k + part;
    real *states = work + ROW_PARTS * part;                     // (METALA_CHUNK + 1, heads, V)
    for (size_t c = chunks(h->T); c-- > 0;) {
        size_t t0 = c * METALA_CHUNK, n = h->T - t0 < METALA_CHUNK ? h->T - t0 : METALA_CHUNK;
        for (size_t i = 0; i < h->heads; i++)
            memcpy(states + i * V, h->states + (i * chunks(h->T) + c) * V, V * sizeof(real));
        for (size_t t = 0; t < n; t++)                               // states + (t + 1)·step: S after token t0 + t
            for (size_t first = 0; first < h->heads; first += row_heads(V)) {
                row_piece p = row_piece_at(h, t0 + t, first, work);
                real *before = states + t * step + first * V;
                row_update(before + step, before, p.k, p.v, p.alpha, p.n);
            }
        for (size_t t = n; t-- > 0;)
            for (size_t first = 0; first < h->heads; first += row_heads(V)) {
                row_piece p = row_piece_at(h, t0 + t, first, work);
                const real *before = states + t * step + first * V;
                real *dq = h->dq + (t0 + t) * h->dq_step, *dk = h->dk + (t0 + t) * h->dk_step;
                real *da = h->da ? h->da + (t0 + t) * h->a_step + first : NULL;
                real *of_q = V == 1 && !one_q ? dq + first : terms_q, *of_k = V == 1 && !one_k ? dk + first : terms_k;
                real *of_a = V == 1 && each_a ? da : terms_a;
                row_gradient(of_q, of_k, h->dv + (t0 + t) * h->v_step + first * V, of_a, G + first * V, p.dO, p.q, p.k, p.v,
                             p.alpha, before, before + step, h->scale, p.n);
                row_keys_gradient(dq, of_q, first, &p, one_q, V, work);         // the inputs are done with
                row_keys_gradient(dk, of_k, first, &p, one_k, V, work);
                if (each_a) add_up(da, of_a, p.heads, V, work);
                else if (da) {
                    real *sum = V == 1 ? of_a : terms_k;
                    add_up(sum, of_a, p.heads, V, work);
                    for (size_t i = 0; i < p.heads; i++) da[i] += sum[i];
                }
            }
    }
}

// V = 1, a state-space model: each head has a loop along K, in which v is one number, and q and k may be those of all heads.
// Of its sums over K, LANES parts are left to add up.

static size_t column_scratch(size_t heads) { return 2 * heads * LANES; }

// S = α S_before + k v
static void column_update(real *S, const real *before, const real *k, const real *alpha, real v, size_t K) {
    size_t i = 0;
    for (; i + LANES <= K; i += LANES) VEC_STORE(S + i, VEC(alpha + i) * VEC(before + i) + v * VEC(k + i));
    for (; i < K; i++) S[i] = alpha[i] * before[i] + v * k[i];
}

// The same in place, and the parts of s qᵀS. a_step: to the α of the next token, which is asked for here.
static void column_step(real *part, real *S, const real *q, const real *k, const real *alpha, size_t a_step, real v, real scale,
                        size_t K) {
    vec sum = {0};
    real rest = 0;
    size_t i = 0;
    for (; i + LANES <= K; i += LANES) {
        PREFETCH(alpha + i, a_step * sizeof(real));
        vec s = VEC(alpha + i) * VEC(S + i) + v * VEC(k + i);
        VEC_STORE(S + i, s);
        sum += VEC(q + i) * s;
    }
    for (; i < K; i++) {
        S[i] = alpha[i] * S[i] + v * k[i];
        rest += q[i] * S[i];
    }
    VEC_STORE(part, scale * sum);
    part[0] += scale * rest;
}

// The gradients, of v in parts. Γ in G, as above. add_q, add_k, add_a: added to what is there. da may be NULL.
static void column_gradient(real *dq, real *dk, real *part, real *da, int add_q, int add_k, int add_a, real *G, const real *q,
                            const real *k, const real *alpha, real v, real dO, const real *before, const real *S, size_t K) {
    vec sum = {0};
    real rest = 0;
    size_t i = 0;
    for (; i + LANES <= K; i += LANES) {
        vec g = VEC(G + i) + dO * VEC(q + i), of_q = dO * VEC(S + i), of_k = v * g, of_a = g * VEC(alpha + i);
        sum += g * VEC(k + i);
        VEC_STORE(G + i, of_a);
        of_a *= VEC(before + i);
        if (add_q) of_q += VEC(dq + i);
        if (add_k) of_k += VEC(dk + i);
        if (add_a) of_a += VEC(da + i);
        VEC_STORE(dq + i, of_q);
        VEC_STORE(dk + i, of_k);
        if (da) VEC_STORE(da + i, of_a);
    }
    for (; i < K; i++) {
        real g = G[i] + dO * q[i];
        rest += g * k[i];
        G[i] = alpha[i] * g;
        dq[i] = (add_q ? dq[i] : 0) + dO * S[i];
        dk[i] = (add_k ? dk[i] : 0) + v * g;
        if (da) da[i] = (add_a ? da[i] : 0) + G[i] * before[i];
    }
    VEC_STORE(part, sum);
    part[0] += rest;
}

// Sequences that share q, k and α go through a chunk one after the other, while these stay in the level-2 cache.
static void column_forward(const head *h, real *S, real *work) {
    size_t K = h->K, q_next = h->shared & METALA_SHARED_QUERY ? 0 : K, k_next = h->shared & METALA_SHARED_KEY ? 0 : K;
    for (size_t chunk = 0; chunk < chunks(h->T); chunk++)
        for (size_t b = 0; b < h->sequences; b++) {
            real *state = S + b * h->S_next;
            for (size_t i = 0; h->keep_states && i < h->heads; i++)
                memcpy(h->keep_states + b * h->states_next + (i * chunks(h->T) + chunk) * K, state + i * K, K * sizeof(real));
            for (size_t t = chunk * METALA_CHUNK; t < h->T && t < (chunk + 1) * METALA_CHUNK; t++) {
                const real *q = h->q + t * h->q_step, *k = h->k + t * h->k_step, *alpha = h->alpha + t * h->a_step;
                const real *v = h->v + b * h->v_next + t * h->v_step;
                real *o = h->o + b * h->v_next + t * h->v_step, *parts = LANES == 1 ? o : work;
                for (size_t i = 0; i < h->heads; i++)
                    column_step(parts + i * LANES, state + i * K, q + i * q_next, k + i * k_next, alpha + i * K, h->a_step, v[i],
                                h->scale, K);
                add_up(o, parts, h->heads, LANES, work + h->heads * LANES);
            }
        }
}

// One chunk of n tokens from t0, of sequence b. dq and dk are added to what the sequences before gave.
static void column_chunk_backward(const head *h, real *G, real *states, size_t t0, size_t n, size_t b, real *work) {
    size_t K = h->K, q_next = h->shared & METALA_SHARED_QUERY ? 0 : K, k_next = h->shared & METALA_SHARED_KEY ? 0 : K;
    size_t step = h->heads * K + 16;
    for (size_t t = 0; t < n; t++) {                                 // states + (t + 1)·step: S after token t0 + t
        const real *k = h->k + (t0 + t) * h->k_step, *alpha = h->alpha + (t0 + t) * h->a_step;
        const real *v = h->v + b * h->v_next + (t0 + t) * h->v_step;
        real *before = states + t * step;
        for (size_t i = 0; i < h->heads; i++)
            column_update(before + step + i * K, before + i * K, k + i * k_next, alpha + i * K, v[i], K);
    }
    for (size_t t = n; t-- > 0;) {
        size_t at = t0 + t, at_v = b * h->v_next + at * h->v_step;
        const real *q = h->q + at * h->q_step, *k = h->k + at * h->k_step, *alpha = h->alpha + at * h->a_step;
        const real *v = h->v + at_v, *dO = h->dO + at_v, *before = states + t * step;
        real *dq = h->dq + at * h->dq_step, *dk = h->dk + at * h->dk_step, *da = h->da ? h->da + at * h->a_step : NULL;
        real *dv = h->dv + at_v, *parts = LANES == 1 ? dv : work;
        for (size_t i = 0; i < h->heads; i++)
            column_gradient(dq + i * q_next, dk + i * k_next, parts + i * LANES, da ? da + i * K : NULL, b || (i && !q_next),
                            b || (i && !k_next), da && !h->a_step, G + i * K, q + i * q_next, k + i * k_next, alpha + i * K, v[i],
                            h->scale * dO[i], before + i * K, before + step + i * K, K);
        add_up(dv, parts, h->heads, LANES, work + h->heads * LANES);
    }
}

static void column_backward(const head *h, real *G, real *work) {
    size_t K = h->K;
    real *states = work + column_scratch(h->heads);             // (METALA_CHUNK + 1, heads, K)
    for (size_t c = chunks(h->T); c-- > 0;) {
        size_t t0 = c * METALA_CHUNK, n = h->T - t0 < METALA_CHUNK ? h->T - t0 : METALA_CHUNK;
        for (size_t b = 0; b < h->sequences; b++) {
            for (size_t i = 0; i < h->heads; i++)
                memcpy(states + i * K, h->states + b * h->states_next + (i * chunks(h->T) + c) * K, K * sizeof(real));
            column_chunk_backward(h, G + b * h->S_next, states, t0, n, b, work);
        }
    }
}

// ---- All heads of all sequences.

// What one thread computes at a time: how many sequences (all, where they share q, k and α) and how many neighbouring heads of
// each (with several sequences fewer, for a chunk of their q and k to stay in the level-2 cache). groups: of heads.
typedef struct { size_t sequences, heads, groups; } portion;
static portion portion_of(metala_form form, size_t B, size_t H, size_t K, size_t V, int shared) {
    int same = METALA_SHARED_SEQUENCES | METALA_CONSTANT_DECAY;
    int all = form == METALA_CHUNKWISE && V == 1 && K > 1 && B > 0 && (shared & same) == same;
    size_t most = form == METALA_CHUNKWISE && is_narrow(K, V) ? (all ? PIECE : GROUP * PIECE) / (K * V) : 1;
    size_t heads = most < 1 ? 1 : most < H ? most : H;
    portion p = {all ? B : 1, heads, (H + heads - 1) / heads};
    return p;
}

// Their states, and what is needed beside them.
static size_t scan_scratch(metala_form form, portion p, size_t T, size_t K, size_t V, int backward) {
    size_t n = p.heads * K * V, S = times(p.sequences, n), between = backward ? (METALA_CHUNK + 1) * (n + 16) : 0;
    return plus(S, form == METALA_PARALLEL  ? parallel_scratch(T, K, V)
                 : form == METALA_RECURRENT ? (backward ? recurrent_scratch(K, V) : 0)
                 : K == 1                   ? between + ROW_PARTS * row_part(V)
                 : V == 1                   ? between + column_scratch(p.heads)
                 : backward                 ? chunkwise_scratch(K, V) : block_scratch(K, V));
}

// Portion i of all, with the inputs that forward and backward have in common. first: its first head, counted through all
// sequences (b·H + h).
static head head_at(size_t i, portion p, const real *q, const real *k, const real *v, const real *alpha, size_t T, size_t H,
                    size_t K, size_t V, double scale, int shared, size_t *first) {
    size_t token = i / p.groups * T, of_sequence = i % p.groups * p.heads;
    int one_q = shared & METALA_SHARED_QUERY, one_k = shared & METALA_SHARED_KEY, one_a = shared & METALA_CONSTANT_DECAY;
    size_t key_token = shared & METALA_SHARED_SEQUENCES ? 0 : token;
    head h = {0};
    *first = i / p.groups * H + of_sequence;
    h.T = T, h.K = K, h.V = V, h.scale = (real)scale, h.shared = shared;
    h.heads = H - of_sequence < p.heads ? H - of_sequence : p.heads;
    h.sequences = p.sequences, h.v_next = T * H * V, h.states_next = H * chunks(T) * K * V;
    h.q_step = one_q ? K : H * K, h.k_step = one_k ? K : H * K, h.a_step = one_a ? 0 : H * K, h.v_step = H * V;
    h.q = q + key_token * h.q_step + (one_q ? 0 : of_sequence * K);
    h.k = k + key_token * h.k_step + (one_k ? 0 : of_sequence * K);
    h.alpha = alpha + token * h.a_step + of_sequence * K;
    h.v = v + token * h.v_step + of_sequence * V;
    return h;
}

// The states of a portion: in S (B,H,K,V) from `first` on, or zeros in `own`.
static real *states_of(head *h, real *S, size_t first, real *own, size_t H) {
    size_t KV = h->K * h->V;
    h->S_next = S ? H * KV : h->heads * KV;
    return S ? S + first * KV : memset(own, 0, h->sequences * h->heads * KV * sizeof(real));
}

static void scan_forward(metala_context *ctx, metala_form form, real *o, real *S, real *states, const real *q,
                         const real *k, const real *v, const real *alpha, size_t B, size_t T, size_t H, size_t K,
                         size_t V, double scale, int shared) {
    portion p = portion_of(form, B, H, K, V, shared);
    size_t each = scan_scratch(form, p, T, K, V, 0), room = p.sequences * p.heads * K * V;
    real *work = scratch(ctx, times((size_t)ctx->threads, times(each, sizeof(real))));
    if (!work) return;
    PARALLEL_FOR(B * T * H * K * V)
    for (size_t i = 0; i < B / p.sequences * p.groups; i++) {
        size_t first;
        head h = head_at(i, p, q, k, v, alpha, T, H, K, V, scale, shared, &first);
        real *own = work + thread_number() * each, *state = states_of(&h, S, first, own, H), *rest = own + room;
        h.o = o + (h.v - v);
        h.keep_states = states ? states + first * chunks(T) * K * V : NULL;
        if (form == METALA_RECURRENT) recurrent_forward(&h, state);
        else if (form == METALA_PARALLEL) parallel_forward(&h, state, rest);
        else if (K == 1) row_forward(&h, state, rest);
        else if (V == 1) column_forward(&h, state, rest);
        else chunkwise_forward(&h, state, rest);
    }
}

// Where a gradient is a sum over heads, sequences or tokens of several portions, each portion has a part of it: of dq and dk
// (B,T,groups,K), or (B,T,H,K) where sequences share them and each is a portion of its own; of da (B/sequences,H,K).
typedef struct { size_t rows, copies, n; } parts;          // rows of n numbers, each a sum of `copies`; 0 copies: no parts
typedef struct { parts q, k, a; size_t count; } all_parts;

static size_t parts_count(parts x) { return times(x.rows, times(x.copies, x.n)); }

static all_parts parts_of(portion p, size_t B, size_t T, size_t H, size_t K, int shared) {
    parts heads = {times(B, T), p.groups, K}, sequences = {1, B, times(T, times(H, K))};
    parts tokens = {1, B / p.sequences, times(H, K)}, none = {0, 0, 0};
    parts keys = shared & METALA_SHARED_SEQUENCES && p.sequences == 1 ? sequences : none;
    all_parts all = {shared & METALA_SHARED_QUERY ? heads : keys, shared & METALA_SHARED_KEY ? heads : keys,
                     shared & METALA_CONSTANT_DECAY ? tokens : none, 0};
    all.count = plus(plus(parts_count(all.q), parts_count(all.k)), parts_count(all.a));
    return all;
}

static void add_parts(metala_context *ctx, real *to, const real *part, parts x) {
    if (x.copies) copy_heads_backward(ctx, to, part, x.rows, x.copies, x.n);
}

// dS (B,H,K,V): gradient of the final state in, of the initial state out; NULL for zero and no interest. da: NULL for no
// interest. states: as scan_forward left them, in the same form.
static void scan_backward(metala_context *ctx, metala_form form, real *dq, real *dk, real *dv, real *da, real *dS,
                          const real *dO, const real *states, const real *q, const real *k, const real *v,
                          const real *alpha, size_t B, size_t T, size_t H, size_t K, size_t V, double scale, int shared) {
    portion p = portion_of(form, B, H, K, V, shared);
    int one_q = shared & METALA_SHARED_QUERY, one_k = shared & METALA_SHARED_KEY, one_a = shared & METALA_CONSTANT_DECAY;
    size_t each = scan_scratch(form, p, T, K, V, 1), room = p.sequences * p.heads * K * V;
    all_parts of = parts_of(p, B, T, H, K, shared);
    real *part_q = scratch(ctx, times(plus(of.count, times((size_t)ctx->threads, each)), sizeof(real)));
    if (!part_q) return;
    real *part_k = part_q + parts_count(of.q), *part_a = part_k + parts_count(of.k), *work = part_q + of.count;
    PARALLEL_FOR(B * T * H * K * V)
    for (size_t i = 0; i < B / p.sequences * p.groups; i++) {
        size_t first;
        head h = head_at(i, p, q, k, v, alpha, T, H, K, V, scale, shared, &first);
        real *own = work + thread_number() * each, *G = states_of(&h, dS, first, own, H), *rest = own + room;
        size_t own_part = i / p.groups * T * p.groups + i % p.groups, own_heads = first / H * T * H + first % H;
        h.states = states + first * chunks(T) * K * V;
        h.dO = dO + (h.v - v), h.dv = dv + (h.v - v);
        h.dq_step = one_q ? p.groups * K : H * K, h.dk_step = one_k ? p.groups * K : H * K;
        h.dq = (of.q.copies ? part_q : dq) + (one_q ? own_part : own_heads) * K;
        h.dk = (of.k.copies ? part_k : dk) + (one_k ? own_part : own_heads) * K;
        if (da) h.da = one_a ? part_a + first * K : da + (h.alpha - alpha);
        if (da && one_a) memset(h.da, 0, h.heads * K * sizeof(real));
        if (form == METALA_RECURRENT) recurrent_backward(&h, G, rest);
        else if (form == METALA_PARALLEL) parallel_backward(&h, G, rest);
        else if (K == 1) row_backward(&h, G, rest);
        else if (V == 1) column_backward(&h, G, rest);
        else chunkwise_backward(&h, G, rest);
    }
    add_parts(ctx, dq, part_q, of.q);
    add_parts(ctx, dk, part_k, of.k);
    if (da) add_parts(ctx, da, part_a, of.a);
}

// ---- One token of MetaLA's mixer, from the projections to the gated output, as generation needs it:
//
//     α = σ(z)^(1/τ)    k = 1 - α    S = diag(α) S + k vᵀ    o = s Sᵀ q    p = o + σ(w v), w = Σ_i q_i k_i b_i
//     y = silu(g) ⊙ (p - μ) ρ        μ and ρ as in head_norm_forward
//
//   y, v, g (B,H,V)   z, q (B,H,K)   S (B,H,K,V)   b [H,K], NULL without self-augmentation
//
// Paper sections 4.1 (decay and key) and 4.2 (self-augmentation), the authors' code (norm and gate).
static void mixer_step(metala_context *ctx, real *y, real *S, const real *z, const real *q, const real *v, const real *g,
                       const real *b, size_t B, size_t H, size_t K, size_t V, double tau, double scale, double eps) {
    real *alpha = scratch(ctx, 2 * B * H * K * sizeof(real)), *k = alpha + B * H * K;
    if (!alpha) return;
    gate_forward(ctx, alpha, k, z, B * H * K, tau);
    PARALLEL_FOR(5 * B * H * K * V)
    for (size_t head = 0; head < B * H; head++) {
        const real *of_v = v + head * V, *of_g = g + head * V;
        real *p = y + head * V, w = 0;
        memset(p, 0, V * sizeof(real));
        for (size_t i = 0; i < K; i++) {
            size_t at = head * K + i;
            real *row = S + at * V;
            for (size_t j = 0; j < V; j++) {
                row[j] = alpha[at] * row[j] + k[at] * of_v[j];
                p[j] += q[at] * row[j];
            }
            if (b) w += q[at] * k[at] * b[head % H * K + i];
        }
        for (size_t j = 0; j < V; j++) p[j] = (real)scale * p[j] + (b ? sigmoid(w * of_v[j]) : 0);
        real mean = total(p, V) / (real)V;
        for (size_t j = 0; j < V; j++) p[j] -= mean;
        real rho = 1 / (real)sqrt(dot(p, p, V) / (real)V + (real)eps);
        for (size_t j = 0; j < V; j++) p[j] *= rho * silu(of_g[j]);
    }
}

// ============================================================== 6. The backend table

// The model below calls kernels only through this table, so that another device needs kernels and not another model.

static void cpu_copy(metala_context *ctx, void *to, const void *from, size_t bytes) {
    (void)ctx;
    if (bytes) memmove(to, from, bytes);
}

static void cpu_zero(metala_context *ctx, void *memory, size_t bytes) {
    (void)ctx;
    memset(memory, 0, bytes);
}

static const metala_backend cpu_backend = {
    "cpu", (size_t)1 << 22, cpu_alloc, cpu_free, cpu_copy, cpu_copy, cpu_copy, cpu_zero, NULL, NULL, NULL, NULL,
    embedding_forward, embedding_backward, patch_forward,
    rms_forward, rms_backward,
    conv_forward, conv_backward, conv_step,
    matmul_forward, matmul_backward, matmul_quantized,
    mask_rows,
    gate_forward, gate_backward,
    scan_forward, scan_backward, mixer_step,
    augment_forward, augment_backward,
    head_norm_forward, head_norm_backward,
    silu_gate_forward, silu_gate_backward,
    swiglu_forward, swiglu_backward, swiglu_step,
    add,
    shift_forward, shift_backward, last_token,
    map_forward, map_backward,
    taylor_forward, taylor_backward,
    rotate_forward, rotate_backward,
    bounded_gate_forward, bounded_gate_backward,
    bounds_forward, bounds_backward,
    ssm_forward, ssm_backward,
    scale_pairs_forward, scale_pairs_backward,
    selective_forward, selective_backward,
    copy_heads_forward, copy_heads_backward,
    wkv_forward, wkv_backward,
    extend_forward, extend_backward,
    normalise_forward, normalise_backward,
    skip_forward, skip_backward,
    multiply_forward, multiply_backward,
    sigmoid_gate_forward, sigmoid_gate_backward,
    attention_forward, attention_backward,
    cross_entropy_forward, cross_entropy_backward, output_backward,
    sum_squares, adamw,
};

const metala_backend *metala_cpu(void) { return &cpu_backend; }

#ifndef METALA_CUDA                     // cuda_metala.cu has another
const metala_backend *metala_cuda(metala_math math, char *why, size_t size) {
    (void)math;
    snprintf(why, size, "these programs were built without CUDA; build with make CUDA=1");
    return NULL;
}
#endif

// ============================================================== 7. The model: rows, configuration, parameters, initialisation

// The table of the general form (metala.h). A column's values stand in the order of their enum.
static const metala_column columns[METALA_COLUMNS] = {
    {"conv", "how a token sees its neighbours", {"off", "on", "shift", "value", "key", NULL}},
    {"query", "q", {"linear", "silu", "elu1", "taylor", "one", "constant", "shared", "exp", NULL}},
    {"key", "k", {"tied", "linear", "silu", "elu1", "taylor", "one", "constant", "shared", "exp", NULL}},
    {"value", "v", {"linear", "complex", "silu", "input", "product", NULL}},
    {"decay", "α", {"dynamic", "lowrank", "fixed", "one", "heads", "depth", "bounded", "exp", "lru", "zoh", "dss", "selective",
                    "softmax", NULL}},
    {"self", "what the current token adds by itself", {"off", "augment", "bonus", "skip", NULL}},
    {"normaliser", "division by the sum of the weights", {"off", "on", NULL}},
    {"phase", "rotation with time", {"off", "rope", "first", "learned", "decay", NULL}},
    {"norm", "of what was read", {"off", "layer", "rms", "width", NULL}},
    {"gate", "of the output", {"off", "silu", "sigmoid", "linear", NULL}},
    {"channels", "of q, k and α, of D", {"half", "full", NULL}},
};

#define ROW(conv, query, key, value, decay, self, normaliser, phase, norm, gate, channels)                                     \
    {METALA_CONV_##conv, METALA_QUERY_##query, METALA_KEY_##key, METALA_VALUE_##value, METALA_DECAY_##decay,                   \
     METALA_SELF_##self, METALA_NORMALISER_##normaliser, METALA_PHASE_##phase, METALA_NORM_##norm, METALA_GATE_##gate,         \
     METALA_CHANNELS_##channels}

// Every row has MetaLA's surroundings: pre-norm without weights, the SwiGLU, linear layers without biases (but for that of a
// SiLU gate) that start from one distribution. Only what differs from its paper within the mixer is said in the row.
static const metala_named_row rows_of_the_paper[] = {
    //                        conv   query     key       value    decay      self     norm. phase    norm   gate     channels
    {"metala",           ROW(ON,    LINEAR,   TIED,     LINEAR,  DYNAMIC,   AUGMENT, OFF, OFF,     LAYER, SILU,    HALF), 1,
     "S = diag(α) S + (1-α) vᵀ, α = σ(W_α u)^(1/16), o = SᵀW_q u + σ(((q⊙k)·b) v)",
     "MetaLA, NeurIPS 2024, section 4"},
    {"metala-noconv",    ROW(OFF,   LINEAR,   TIED,     LINEAR,  DYNAMIC,   AUGMENT, OFF, OFF,     LAYER, SILU,    HALF), 1,
     "without the short convolution", "MetaLA, its ablations"},
    {"metala-noaug",     ROW(ON,    LINEAR,   TIED,     LINEAR,  DYNAMIC,   OFF,     OFF, OFF,     LAYER, SILU,    HALF), 1,
     "without self-augmentation", "MetaLA, its ablations"},
    {"metala-key",       ROW(ON,    LINEAR,   LINEAR,   LINEAR,  DYNAMIC,   AUGMENT, OFF, OFF,     LAYER, SILU,    HALF), 1,
     "k = W_k u in place of 1 - α", "MetaLA, its ablations"},
    {"metala-fixed",     ROW(ON,    LINEAR,   TIED,     LINEAR,  FIXED,     AUGMENT, OFF, OFF,     LAYER, SILU,    HALF), 1,
     "α learned, the same for every token", "not among MetaLA's ablations"},
    {"metala-none",      ROW(OFF,   LINEAR,   LINEAR,   LINEAR,  FIXED,     OFF,     OFF, OFF,     LAYER, SILU,    HALF), 1,
     "all four at once", "not among MetaLA's ablations"},
    {"linear",           ROW(OFF,   ELU1,     ELU1,     LINEAR,  ONE,       OFF,     ON,  OFF,     OFF,   OFF,     FULL), 1,
     "S = S + φ(k) vᵀ, o = Sᵀφ(q) / Σφ(k)ᵀφ(q), φ = elu + 1",
     "Transformers are RNNs, Katharopoulos 2020"},
    {"transnormer",      ROW(OFF,   SILU,     SILU,     LINEAR,  DEPTH,     OFF,     OFF, FIRST,   WIDTH, LINEAR,  FULL), 1,
     "S = λ S + silu(k) vᵀ, λ = exp(-8(h+1)/H (1-l/L)), o = Sᵀ silu(q)",
     "TransNormerLLM, Qin 2023; the paper's decays, its code has exp(-2^(-8(h+1)/H) (1-l/(L-1))); rotates pairs of channels"
     " by angles that all heads share, where its code keeps cosine and sine parts of each channel"},
    {"retnet",           ROW(OFF,   LINEAR,   LINEAR,   LINEAR,  HEADS,     OFF,     OFF, ROPE,    RMS,   SILU,    FULL), 2,
     "S = (1-2^(-5-h)) S + (k e^{iθt}) vᵀ, o = Sᵀ(q e^{iθt})",
     "Retentive Network, Sun 2023; without its rescaling of the parallel form, which the norm takes out again; angles are"
     " RoPE's 10000^(-2i/K), its code's 10000^(-2i/(K-2)); the gate has a bias"},
    {"gla",              ROW(OFF,   LINEAR,   LINEAR,   LINEAR,  LOWRANK,   OFF,     OFF, OFF,     RMS,   SILU,    HALF), 1,
     "S = diag(α) S + k vᵀ, α = σ(W_2 W_1 n + b)^(1/16), o = Sᵀq",
     "Gated Linear Attention, Yang 2023; here the norm is RMS, without the weights of its layer norm"},
    {"based",            ROW(ON,    TAYLOR,   TAYLOR,   LINEAR,  ONE,       OFF,     ON,  OFF,     OFF,   OFF,     FULL), 1,
     "S = S + φ(k) vᵀ, φ(q)·φ(k) = 1 + q·k/√d + (q·k)²/2d, o = Sᵀφ(q) / Σφ(k)ᵀφ(q)",
     "Based, Arora 2024, as \"Base\" of MetaLA's recall figure; without its sliding-window layers; the convolution is"
     " MetaLA's, in front of the projections, where its own convolutions are layers between"},
    {"rwkv4",            ROW(SHIFT, EXP,      EXP,      LINEAR,  EXP,       BONUS,   ON,  OFF,     OFF,   SIGMOID, FULL), 1,
     "S = exp(-e^w) S + e^k v, o = (S_{t-1} + e^(u+k) v) / (the same with v = 1)",
     "RWKV-4, Peng 2023; its channel mixing is the SwiGLU that all rows have; no weights start as zeros, and the shift of"
     " values starts as that of keys"},
    {"glru",             ROW(OFF,   ONE,      TIED,     SILU,    BOUNDED,   OFF,     OFF, LEARNED, WIDTH, SILU,    FULL), 1,
     "h = λ e^{iθ} h + (1-λ) silu(W_v n), λ = γ + (1-γ) σ(W_λ n)",
     "HGRN, Qin 2023; here the norm is RMS, without the weights of its layer norm; projections without biases; angles start"
     " as 10000^(-j/D), its code's as 10000^(-2j/D). MetaLA's table 1 shows GLRU with an input gate of its own for k"},
    {"lru",              ROW(OFF,   ONE,      ONE,      COMPLEX, LRU,       SKIP,    OFF, DECAY,   OFF,   OFF,     FULL), 1,
     "x = λ x + γ B n, λ = exp(-e^ν + iθ), y = Re(C x) + d n",
     "Resurrecting RNNs, Orvieto 2023; D complex states; B and C are dense real matrices of real and imaginary parts; |λ|²"
     " starts evenly between 0.5 and 0.98 instead of at random; d starts as 1"},
    {"s4d",              ROW(OFF,   CONSTANT, CONSTANT, INPUT,   ZOH,       SKIP,    OFF, DECAY,   OFF,   OFF,     FULL), 1,
     "x = e^{ΔA} x + (e^{ΔA}-1)/A n, y = 2 Re(C x) + d n, for each channel",
     "S4D, Gu 2022, from S4D-Lin; without the GELU before the output projection and the GLU after it; d starts as 1"},
    {"dss",              ROW(OFF,   CONSTANT, CONSTANT, INPUT,   DSS,       SKIP,    OFF, DECAY,   OFF,   OFF,     FULL), 1,
     "as s4d, with the input factor of a softmax over the positions",
     "DSS, Gupta 2022; Re A stays negative, each channel has its own A, and the softmax is over `length` tokens, those of a"
     " training sequence; starts and ends as s4d"},
    {"s5",               ROW(OFF,   ONE,      ONE,      COMPLEX, ZOH,       SKIP,    OFF, DECAY,   OFF,   OFF,     FULL), 1,
     "x = e^{ΔA} x + (e^{ΔA}-1)/A B n, y = Re(C x) + d n, one system for all channels",
     "S5, Smith 2022; D complex states; B and C are dense real matrices of real and imaginary parts, C with the 2 of a"
     " conjugate pair in it; A starts as blocks of S4D-Lin, not as HiPPO's; without the GELU and gate after it"},
    {"h3",               ROW(KEY,   CONSTANT, CONSTANT, PRODUCT, ZOH,       SKIP,    OFF, DECAY,   OFF,   LINEAR,  FULL), 1,
     "q ⊙ s4d(shift(k) ⊙ v)",
     "Hungry Hungry Hippos, Fu 2022; heads of one channel, as its code's default; the shift has 4 taps, without a skip"},
    {"mamba",            ROW(VALUE, SHARED,   SHARED,   INPUT,   SELECTIVE, SKIP,    OFF, OFF,     OFF,   SILU,    FULL), 2,
     "x = e^{-Δ e^A} x + Δ B u, y = C·x + d u; Δ, B and C from u = silu(conv(W_v n))",
     "Mamba, Gu 2023; the convolution has no bias, the gate has one; Δ comes of `low_rank` channels, its D/16; W_2 starts"
     " like other weights; the SwiGLU stands between layers, where the paper has none"},
    {"transformer",      ROW(OFF,   LINEAR,   LINEAR,   LINEAR,  SOFTMAX,   OFF,     OFF, ROPE,    OFF,   OFF,     FULL), 1,
     "o = Σ_j softmax_j(q·k_j/√K) v_j: what the others approximate",
     "Attention is all you need, with RoPE; keeps all keys and values"},
    {NULL, {0}, 0, NULL, NULL},
};
#undef ROW

const metala_column *metala_columns(void) { return columns; }
const metala_named_row *metala_rows(void) { return rows_of_the_paper; }

int *metala_row_column(metala_row *row, int column) {
    int *const values[METALA_COLUMNS] = {&row->conv, &row->query, &row->key, &row->value, &row->decay, &row->self,
                                         &row->normaliser, &row->phase, &row->norm, &row->gate, &row->channels};
    return column >= 0 && column < METALA_COLUMNS ? values[column] : NULL;
}

static int row_value(const metala_row *row, int column) {
    metala_row copy = *row;
    return *metala_row_column(&copy, column);
}

const char *metala_config_row_name(const metala_config *c) {
    for (const metala_named_row *r = rows_of_the_paper; r->name; r++) {
        int same = 1;
        for (int i = 0; i < METALA_COLUMNS; i++) same &= row_value(&r->row, i) == row_value(&c->row, i);
        if (same) return r->name;
    }
    return "custom";
}

int metala_config_row(metala_context *ctx, metala_config *config, const char *name) {
    char known[400] = "";
    for (const metala_named_row *r = rows_of_the_paper; r->name; r++) {
        if (!strcmp(r->name, name)) {
            config->row = r->row;
            config->expand = r->expand;
            return 0;
        }
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", *known ? ", " : "", r->name);
    }
    return fail(ctx, "there is no model called %.40s; there are %s", name, known);
}

metala_config metala_config_default(void) {
    metala_config c = {0};
    c.vocab_size = 256, c.width = 256, c.layers = 6, c.heads = 4, c.glu_dim = 704;
    c.pad_token_id = c.bos_token_id = c.eos_token_id = -1;
    c.norm_eps = 1e-6, c.head_norm_eps = 1e-5, c.tau = 16;
    c.row = rows_of_the_paper[0].row;
    c.expand = 1, c.state_size = 16, c.low_rank = 16, c.feature_dim = 16, c.length = 1024;
    return c;
}

// The sizes that follow from a configuration.
typedef struct {
    size_t D, F, N;
    size_t H, K, V;                     // of the scan; V without the normaliser's channel
    size_t ones;                        // 1: the scan has one more value channel
    size_t u;                           // width of u
    size_t q, k, v, low, z, g;          // widths of the projections, 0 for what a row has not
    size_t p;                           // width of what is read, gated and projected back: H·V
    size_t states;                      // of a complex state-space model, for each head
    size_t theta;                       // learned angles
    int complex_values;                 // a head is a complex number: K = 1, V = 2, and the phase is in v and o
    int own_q, own_k, own_v;            // the scan's q, k, v are made from the projections, in memory of their own
    int shared;                         // METALA_SHARED_QUERY and so on: inputs of the scan that are not (B,T,H,K)
    int learned_decay;                  // the gradient of α is wanted
    int shared_u, shared_scan;          // u is n; what the scan gives is p
    double scale;                       // s of o = s Sᵀ q
} sizes;

static sizes sizes_of(const metala_config *c) {
    const metala_row *r = &c->row;
    sizes s = {0};
    size_t E = times((size_t)c->expand, (size_t)c->width), heads = (size_t)c->heads;
    s.D = (size_t)c->width, s.F = (size_t)c->glu_dim, s.N = (size_t)c->vocab_size;
    s.u = r->conv == METALA_CONV_VALUE ? E : s.D;
    s.complex_values = r->value == METALA_VALUE_COMPLEX || r->value == METALA_VALUE_SILU;
    s.ones = r->normaliser == METALA_NORMALISER_ON;
    s.states = r->phase != METALA_PHASE_DECAY ? 0 : s.complex_values ? 1 : (size_t)c->state_size;
    if (s.complex_values) s.H = E, s.K = 1, s.V = 2;
    else if (r->query == METALA_QUERY_CONSTANT) s.H = E, s.K = 2 * s.states, s.V = 1;
    else if (r->query == METALA_QUERY_SHARED) s.H = E, s.K = s.q = s.k = (size_t)c->state_size, s.V = 1;
    else if (r->query == METALA_QUERY_EXP) s.H = s.k = E, s.K = 1, s.V = 1;
    else {
        size_t d = (size_t)c->feature_dim;
        s.H = heads, s.V = E / heads, s.K = (r->channels == METALA_CHANNELS_HALF ? s.D / 2 : s.D) / heads;
        s.q = s.k = times(s.H, s.K);
        if (r->query == METALA_QUERY_TAYLOR) s.K = 1 + d + d * d, s.q = s.k = times(s.H, d);
        if (r->key == METALA_KEY_TIED) s.k = 0;
        if (r->query <= METALA_QUERY_SILU && r->key <= METALA_KEY_SILU) s.scale = 1 / sqrt((double)s.K);
    }
    if (r->query == METALA_QUERY_CONSTANT) s.scale = 2;       // a complex state stands for itself and its conjugate
    else if (!(s.scale > 0)) s.scale = 1;
    if (r->conv == METALA_CONV_KEY) s.k = s.D;
    s.p = times(s.H, s.V);
    s.v = r->conv == METALA_CONV_VALUE ? E : r->value == METALA_VALUE_INPUT ? 0 : s.p;
    s.z = r->decay <= METALA_DECAY_FIXED || r->decay == METALA_DECAY_BOUNDED ? times(s.H, s.K)
        : r->decay == METALA_DECAY_SELECTIVE                                 ? s.H : 0;
    s.low = r->decay == METALA_DECAY_LOWRANK || r->decay == METALA_DECAY_SELECTIVE ? (size_t)c->low_rank : 0;
    s.g = r->gate ? s.p : 0;
    s.theta = r->phase == METALA_PHASE_FIRST ? s.K / 2
            : r->phase == METALA_PHASE_LEARNED ? (s.complex_values ? s.H : times(s.H, s.K / 2)) : 0;
    int one_q = r->query == METALA_QUERY_ONE || r->query == METALA_QUERY_SHARED;
    int one_k = r->key == METALA_KEY_ONE || r->key == METALA_KEY_SHARED;
    int fixed_decay = r->decay == METALA_DECAY_ONE || r->decay == METALA_DECAY_HEADS || r->decay == METALA_DECAY_DEPTH;
    if (r->self != METALA_SELF_AUGMENT)               // which reads q and k of each head
        s.shared = (one_q ? METALA_SHARED_QUERY : 0) | (one_k ? METALA_SHARED_KEY : 0);
    if (r->query == METALA_QUERY_CONSTANT && r->self != METALA_SELF_AUGMENT) s.shared = METALA_SHARED_SEQUENCES;
    if (fixed_decay || r->phase == METALA_PHASE_DECAY) s.shared |= METALA_CONSTANT_DECAY;
    s.learned_decay = !fixed_decay;
    s.own_q = r->query != METALA_QUERY_LINEAR && !(s.shared & METALA_SHARED_QUERY && s.q);
    s.own_k = r->key != METALA_KEY_LINEAR && !(s.shared & METALA_SHARED_KEY && s.k);
    s.own_v = s.ones || s.complex_values || r->value == METALA_VALUE_PRODUCT || r->decay == METALA_DECAY_SELECTIVE;
    s.shared_u = r->conv == METALA_CONV_OFF || r->conv == METALA_CONV_KEY;
    s.shared_scan = !s.ones && (s.complex_values || (r->self != METALA_SELF_AUGMENT && r->self != METALA_SELF_SKIP));
    return s;
}

// What a row of one's own must keep to. `wrong` says what is amiss.
static const char *row_problem(const metala_config *c) {
    const metala_row *r = &c->row;
    int q = r->query, k = r->key, v = r->value, a = r->decay;
    int complex_values = v == METALA_VALUE_COMPLEX || v == METALA_VALUE_SILU;
    int complex_decay = a == METALA_DECAY_LRU || a == METALA_DECAY_ZOH || a == METALA_DECAY_DSS;
    int gate_decay = a <= METALA_DECAY_FIXED || a == METALA_DECAY_BOUNDED;
    const struct { int wrong; const char *what; } rules[] = {
        {(q == METALA_QUERY_TAYLOR) != (k == METALA_KEY_TAYLOR), "query taylor and key taylor belong together"},
        {(q == METALA_QUERY_CONSTANT) != (k == METALA_KEY_CONSTANT), "query constant and key constant belong together"},
        {(q == METALA_QUERY_SHARED) != (k == METALA_KEY_SHARED), "query shared and key shared belong together"},
        {(q == METALA_QUERY_SHARED) != (a == METALA_DECAY_SELECTIVE), "query shared and decay selective belong together"},
        {q == METALA_QUERY_SHARED && v != METALA_VALUE_INPUT, "query shared needs value input"},
        {(q == METALA_QUERY_EXP) != (k == METALA_KEY_EXP), "query exp and key exp belong together"},
        {(q == METALA_QUERY_EXP) != (a == METALA_DECAY_EXP), "query exp and decay exp belong together"},
        {(q == METALA_QUERY_EXP) != (r->self == METALA_SELF_BONUS), "query exp and self bonus belong together"},
        {(q == METALA_QUERY_EXP) != (r->conv == METALA_CONV_SHIFT), "query exp and conv shift belong together"},
        {q == METALA_QUERY_EXP && !r->normaliser, "query exp needs the normaliser"},
        {q == METALA_QUERY_EXP && c->expand != 1, "query exp needs expand 1"},
        {(q == METALA_QUERY_ONE) != complex_values, "query one and complex or silu values belong together"},
        {(k == METALA_KEY_ONE) && !complex_values, "key one needs complex or silu values"},
        {complex_values && k != METALA_KEY_ONE && k != METALA_KEY_TIED, "complex or silu values need key one or tied"},
        {k == METALA_KEY_TIED && !gate_decay, "key tied needs decay dynamic, lowrank, fixed or bounded"},
        {q == METALA_QUERY_CONSTANT && a != METALA_DECAY_ZOH && a != METALA_DECAY_DSS,
         "query constant needs decay zoh or dss"},
        {complex_decay != (r->phase == METALA_PHASE_DECAY), "phase decay and decay lru, zoh or dss belong together"},
        {complex_decay && q != METALA_QUERY_CONSTANT && v != METALA_VALUE_COMPLEX,
         "decay lru, zoh or dss needs query constant or complex values"},
        {v == METALA_VALUE_COMPLEX && !complex_decay, "complex values need decay lru, zoh or dss; others take value silu"},
        {r->normaliser && v != METALA_VALUE_LINEAR, "the normaliser needs linear values"},
        {r->normaliser && r->self != METALA_SELF_OFF && r->self != METALA_SELF_BONUS,
         "with a normaliser self is off or bonus"},
        {r->normaliser && (q == METALA_QUERY_LINEAR || q == METALA_QUERY_SILU || k == METALA_KEY_LINEAR || k == METALA_KEY_SILU
                           || r->phase),
         "the normaliser divides by a sum of weights that must be positive: query elu1, taylor or exp, a key of these or tied,"
         " phase off"},
        {r->self == METALA_SELF_AUGMENT && complex_values, "self augment needs real values"},
        {(v == METALA_VALUE_PRODUCT) != (r->conv == METALA_CONV_KEY), "value product and conv key belong together"},
        {v == METALA_VALUE_PRODUCT && (k != METALA_KEY_CONSTANT || c->expand != 1),
         "value product needs key constant and expand 1"},
        {r->conv == METALA_CONV_VALUE && v != METALA_VALUE_INPUT, "conv value needs value input"},
        {v == METALA_VALUE_INPUT && r->conv != METALA_CONV_VALUE && c->expand != 1,
         "value input needs expand 1 or conv value"},
        {(r->phase == METALA_PHASE_ROPE || r->phase == METALA_PHASE_FIRST) && (complex_values || q >= METALA_QUERY_TAYLOR),
         "phase rope or first needs query linear, silu or elu1"},
        {r->phase == METALA_PHASE_LEARNED && !complex_values && q >= METALA_QUERY_TAYLOR,
         "phase learned needs query linear, silu or elu1, or silu values"},
        {a == METALA_DECAY_SOFTMAX && (q >= METALA_QUERY_TAYLOR || r->normaliser || r->self == METALA_SELF_BONUS),
         "decay softmax needs query linear, silu or elu1, and no normaliser"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].wrong) return rules[i].what;
    return NULL;
}

int metala_config_check(metala_context *ctx, const metala_config *c) {
    enum { MOST = 1 << 24 };
    const struct { const char *name; int value, most; } whole[] = {
        {"vocab_size", c->vocab_size, MOST}, {"width (decoder_embed_dim)", c->width, MOST},
        {"layers (decoder_layers)", c->layers, MOST}, {"heads (decoder_attention_heads)", c->heads, MOST},
        {"glu_dim", c->glu_dim, MOST}, {"expand", c->expand, 64}, {"state_size", c->state_size, 1 << 16},
        {"low_rank", c->low_rank, MOST}, {"feature_dim", c->feature_dim, 1 << 10}, {"length", c->length, INT_MAX}};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (whole[i].value < 1 || whole[i].value > whole[i].most)
            return fail(ctx, "configuration: %s must be 1 to %d, got %d", whole[i].name, whole[i].most, whole[i].value);
    if (c->patch_dim < 0 || c->patch_dim > MOST)
        return fail(ctx, "configuration: patch_dim must be 0 for tokens, or 1 to %d, got %d", MOST, c->patch_dim);
    if (c->patch_dim && (c->tie_word_embeddings || c->scale_embedding))
        return fail(ctx, "configuration: %s needs an embedding, patches (patch_dim %d) have none; leave it out",
                    c->tie_word_embeddings ? "tie_word_embeddings" : "scale_embedding", c->patch_dim);
    for (int i = 0; i < METALA_COLUMNS; i++) {
        int value = row_value(&c->row, i), count = 0;
        while (columns[i].values[count]) count++;
        if (value < 0 || value >= count)
            return fail(ctx, "configuration: %s is number %d of %d choices", columns[i].name, value, count);
    }
    const char *problem = row_problem(c);
    if (problem) return fail(ctx, "configuration: %s", problem);
    int by_heads = c->row.query <= METALA_QUERY_TAYLOR, half = c->row.channels == METALA_CHANNELS_HALF;
    if (by_heads && (c->width % (half ? 2 : 1) || c->width / (half ? 2 : 1) % c->heads || c->width * c->expand % c->heads))
        return fail(ctx, "configuration: the number of heads must divide width%s, got width %d and %d heads",
                    half ? "/2" : "", c->width, c->heads);
    sizes s = sizes_of(c);
    if ((c->row.phase == METALA_PHASE_ROPE || c->row.phase == METALA_PHASE_FIRST ||
         (c->row.phase == METALA_PHASE_LEARNED && !s.complex_values)) && s.K % 2)
        return fail(ctx, "configuration: a head that rotates needs an even number of channels, got %zu; change the heads",
                    s.K);
    if ((c->row.norm == METALA_NORM_LAYER || c->row.norm == METALA_NORM_RMS) && s.V == 1)
        return fail(ctx, "configuration: norm %s leaves no more than a sign of heads with one value channel; take norm width, or"
                    " fewer heads", c->row.norm == METALA_NORM_LAYER ? "layer" : "rms");
    if (!(c->norm_eps >= 0) || !(c->head_norm_eps >= 0) || !(c->norm_eps < 1) || !(c->head_norm_eps < 1))
        return fail(ctx, "configuration: norm epsilons must be 0 to 1, got %g and %g", c->norm_eps, c->head_norm_eps);
    if (!(c->tau > 0) || !(c->tau <= 1e6))
        return fail(ctx, "configuration: tau must be positive, got %g", c->tau);
    return 0;
}

// Where the parameters of one layer start in the block that holds them; ABSENT if the configuration has none.
#define ABSENT SIZE_MAX
typedef struct {
    size_t conv, shift_g, shift_k, shift_v, q, C, z, z_bias, low, A, ssm_decay, ssm_phase, ssm_step, time_decay, time_first;
    size_t theta, k, v, g, g_bias, b, skip, out, l1, l2, l3, l1_bias, l2_bias, l3_bias;
} layer_offsets;

struct metala_model {
    metala_config config;
    const metala_backend *backend;
    metala_dtype weights;               // REAL_TYPE, METALA_BF16 or METALA_I8: what linear layers multiply with
    real *parameters;                   // the backend's memory: all parameters, or those that are not quantized
    unsigned char *quantized;           // the backend's memory: quantized weights, int8 followed by its scales
    size_t reals, quantized_bytes;      // sizes of the two
    size_t size;                        // parameters, in both
    metala_tensor *tensors;
    size_t *places;                     // of each tensor in its block: in numbers, of quantized weights in bytes
    int tensor_count;
    layer_offsets *layers;
    size_t embedding, head;             // the same when tied, unless quantized: the lookup needs reals
    size_t patch_bias;                  // with patches, whose weights are at `embedding`
    size_t bounds;                      // logits of the lower bounds of decays
    real *constants;                    // the backend's memory: see fill_constants
    uint64_t version;                   // counts changes of the parameters
};

// [ out·in weights | padding | out·groups scales of int8 | padding ], where the scales start, and all of it in bytes.
static size_t scales_start(size_t out, size_t in) { return round_up(out * in, ALIGN); }
static size_t quantized_size(metala_dtype type, size_t out, size_t in) {
    if (times(out, in) > SIZE_MAX / 16) return SIZE_MAX / 16;
    if (type == METALA_BF16) return round_up(out * in * sizeof(uint16_t), ALIGN);
    return scales_start(out, in) + round_up(out * groups(in) * sizeof(float), ALIGN);
}

static size_t place_quantized(metala_model *m, size_t out, size_t in) {
    size_t place = m->quantized_bytes;
    m->quantized_bytes = plus(place, quantized_size(m->weights, out, in));
    return place;
}

// One more tensor in the list and in its block; returns its place there. 0 in shape ends it. PLAIN has no weight decay;
// LINEAR can be quantized.
enum tensor_kind { PLAIN, DECAYED, LINEAR };
static size_t add_tensor(metala_model *m, const char *name, enum tensor_kind kind, size_t s0, size_t s1, size_t s2) {
    metala_tensor *t = &m->tensors[m->tensor_count];
    size_t *place = &m->places[m->tensor_count];
    const size_t shape[3] = {s0, s1, s2};
    m->tensor_count++;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->dtype = kind == LINEAR ? m->weights : REAL_TYPE;
    t->decay = kind != PLAIN;
    t->count = 1;
    t->offset = m->size;
    for (t->ndim = 0; t->ndim < 3 && shape[t->ndim]; t->ndim++) {
        t->shape[t->ndim] = shape[t->ndim];
        t->count = times(t->count, shape[t->ndim]);
    }
    m->size = plus(m->size, t->count);
    *place = t->dtype == REAL_TYPE ? m->reals : place_quantized(m, s0, s1);
    if (t->dtype == REAL_TYPE) m->reals = plus(m->reals, t->count);
    return *place;
}

// In layer `layer`, when the row has it; ABSENT otherwise.
static size_t add_if(metala_model *m, int wanted, int layer, const char *name, enum tensor_kind kind, size_t s0, size_t s1,
                     size_t s2) {
    char full[128];
    if (!wanted) return ABSENT;
    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    return add_tensor(m, full, kind, s0, s1, s2);
}

// All parameters with the authors' names, in the order of computation. Weight decay is for weights of two or more
// dimensions, but not for those of decays.
enum { TENSORS_OF_LAYER = 32 };
static void list_tensors(metala_model *m) {
    const metala_config *c = &m->config;
    const metala_row *r = &c->row;
    sizes s = sizes_of(c);
    size_t D = s.D, F = s.F, HK = times(s.H, s.K), HN = times(s.H, s.states), R = s.low;
    int conv = r->conv == METALA_CONV_ON || r->conv == METALA_CONV_VALUE || r->conv == METALA_CONV_KEY;
    int shift = r->conv == METALA_CONV_SHIFT, selective = r->decay == METALA_DECAY_SELECTIVE;
    int gate = r->decay == METALA_DECAY_DYNAMIC || r->decay == METALA_DECAY_BOUNDED;
    if (c->patch_dim) {
        m->embedding = add_tensor(m, "model.patch_embed.weight", DECAYED, D, (size_t)c->patch_dim, 0);
        m->patch_bias = add_tensor(m, "model.patch_embed.bias", PLAIN, D, 0, 0);
    } else m->embedding = add_tensor(m, "model.embed_tokens.weight", DECAYED, s.N, D, 0);
    m->bounds = ABSENT;
    if (r->decay == METALA_DECAY_BOUNDED)
        m->bounds = add_tensor(m, "model.lower_bounds", PLAIN, (size_t)c->layers, HK, 0);
    for (int l = 0; l < c->layers; l++) {
        layer_offsets *w = &m->layers[l];
        w->conv = add_if(m, conv, l, "token_mixer.conv1d.weight", DECAYED, r->conv == METALA_CONV_KEY ? s.k : s.u, 1,
                         METALA_CONV);
        w->shift_g = add_if(m, shift, l, "token_mixer.shift_g", PLAIN, D, 0, 0);
        w->shift_k = add_if(m, shift, l, "token_mixer.shift_k", PLAIN, D, 0, 0);
        w->shift_v = add_if(m, shift, l, "token_mixer.shift_v", PLAIN, D, 0, 0);
        w->q = add_if(m, s.q > 0, l, "token_mixer.q_proj.weight", LINEAR, s.q, s.u, 0);
        w->C = add_if(m, r->query == METALA_QUERY_CONSTANT, l, "token_mixer.C", PLAIN, s.H, s.states, 2);
        w->z = gate                                ? add_if(m, 1, l, "token_mixer.k_gate.weight", LINEAR, s.z, s.u, 0)
             : r->decay == METALA_DECAY_FIXED      ? add_if(m, 1, l, "token_mixer.decay_logit", PLAIN, s.z, 0, 0)
                                                   : add_if(m, R > 0, l, "token_mixer.k_gate.1.weight", LINEAR, s.z, R, 0);
        w->z_bias = add_if(m, R > 0, l, "token_mixer.k_gate.1.bias", PLAIN, s.z, 0, 0);
        w->low = add_if(m, R > 0, l, "token_mixer.k_gate.0.weight", LINEAR, R, s.u, 0);
        w->A = add_if(m, selective, l, "token_mixer.A_log", PLAIN, s.H, s.K, 0);
        w->ssm_decay = add_if(m, HN > 0, l, "token_mixer.ssm_decay", PLAIN, s.H, s.states, 0);
        w->ssm_phase = add_if(m, HN > 0, l, "token_mixer.ssm_phase", PLAIN, s.H, s.states, 0);
        w->ssm_step = add_if(m, HN > 0, l, "token_mixer.ssm_step", PLAIN, s.H, 0, 0);
        w->time_decay = add_if(m, r->decay == METALA_DECAY_EXP, l, "token_mixer.time_decay", PLAIN, s.H, 0, 0);
        w->time_first = add_if(m, r->decay == METALA_DECAY_EXP, l, "token_mixer.time_first", PLAIN, s.H, 0, 0);
        w->theta = add_if(m, s.theta > 0 && (l == 0 || r->phase != METALA_PHASE_FIRST), l, "token_mixer.theta", PLAIN, s.theta,
                          0, 0);
        w->k = add_if(m, s.k > 0, l, "token_mixer.k_proj.weight", LINEAR, s.k, s.u, 0);
        w->v = add_if(m, s.v > 0, l, "token_mixer.v_proj.weight", LINEAR, s.v, D, 0);
        w->g = add_if(m, s.g > 0, l, "token_mixer.g_proj.weight", LINEAR, s.g, D, 0);
        w->g_bias = add_if(m, r->gate == METALA_GATE_SILU, l, "token_mixer.g_proj.bias", PLAIN, s.g, 0, 0);
        w->b = add_if(m, r->self == METALA_SELF_AUGMENT, l, "token_mixer.aug_balance", PLAIN, HK, 0, 0);
        w->skip = add_if(m, r->self == METALA_SELF_SKIP, l, "token_mixer.D", PLAIN, s.complex_values ? D : s.p, 0, 0);
        w->out = add_if(m, 1, l, "token_mixer.out_proj.weight", LINEAR, D, s.p, 0);
        w->l1 = add_if(m, 1, l, "channel_mixer.l1.weight", LINEAR, F, D, 0);
        w->l2 = add_if(m, 1, l, "channel_mixer.l2.weight", LINEAR, F, D, 0);
        w->l3 = add_if(m, 1, l, "channel_mixer.l3.weight", LINEAR, D, F, 0);
        w->l1_bias = add_if(m, c->glu_bias, l, "channel_mixer.l1.bias", PLAIN, F, 0, 0);
        w->l2_bias = add_if(m, c->glu_bias, l, "channel_mixer.l2.bias", PLAIN, F, 0, 0);
        w->l3_bias = add_if(m, c->glu_bias, l, "channel_mixer.l3.bias", PLAIN, D, 0, 0);
    }
    m->head = !c->tie_word_embeddings   ? add_tensor(m, "lm_head.weight", LINEAR, s.N, D, 0)
              : m->weights == REAL_TYPE ? m->embedding
                                        : place_quantized(m, s.N, D);
}

void metala_model_free(metala_model *m) {
    if (!m) return;
    m->backend->free(m->parameters);
    m->backend->free(m->quantized);
    m->backend->free(m->constants);
    free(m->tensors);
    free(m->places);
    free(m->layers);
    free(m);
}

// A model without its parameters: enough to know all sizes.
static metala_model *model_outline(metala_context *ctx, const metala_config *config, metala_dtype weights) {
    if (metala_config_check(ctx, config)) return NULL;
    size_t L = (size_t)config->layers;
    metala_model *m = calloc(1, sizeof *m);
    if (m) {
        m->config = *config;
        m->backend = ctx->backend;
        m->weights = weights;
        m->layers = calloc(L, sizeof *m->layers);
        m->tensors = calloc(L * TENSORS_OF_LAYER + 4, sizeof *m->tensors);
        m->places = calloc(L * TENSORS_OF_LAYER + 4, sizeof *m->places);
    }
    if (!m || !m->layers || !m->tensors || !m->places) {
        fail_memory(ctx, "the list of tensors", (double)L * TENSORS_OF_LAYER * sizeof(metala_tensor));
        metala_model_free(m);
        return NULL;
    }
    list_tensors(m);
    return m;
}

// What a row takes for given: [ ones (H·K) | the angles of RoPE (K/2) | decays (layers, H·K) ].
static int fill_constants(metala_context *ctx, metala_model *m) {
    const metala_row *r = &m->config.row;
    sizes s = sizes_of(&m->config);
    size_t HK = times(s.H, s.K), L = (size_t)m->config.layers, depth = r->decay == METALA_DECAY_DEPTH ? L : 1;
    size_t count = plus(s.K + s.K / 2, times(depth, HK));
    real *host = cpu_alloc(times(count, sizeof(real)));
    m->constants = host ? m->backend->alloc(times(count, sizeof(real))) : NULL;
    if (!m->constants) {
        cpu_free(host);
        return fail_memory(ctx, "a model's constants", 2.0 * (double)count * sizeof(real));
    }
    for (size_t i = 0; i < s.K; i++) host[i] = 1;
    for (size_t i = 0; i < s.K / 2; i++) host[s.K + i] = (real)pow(10000, -2.0 * (double)i / (double)s.K);
    for (size_t l = 0; l < depth; l++)
        for (size_t i = 0; i < HK; i++) {
            double h = (double)(i / s.K), alpha = 1;
            if (r->decay == METALA_DECAY_HEADS) alpha = 1 - pow(2, -5 - h);
            if (r->decay == METALA_DECAY_DEPTH) alpha = exp(-8 * (h + 1) / (double)s.H * (1 - (double)l / (double)L));
            host[s.K + s.K / 2 + l * HK + i] = (real)alpha;
        }
    m->backend->upload(ctx, m->constants, host, count * sizeof(real));
    cpu_free(host);
    return metala_context_failed(ctx);
}

static metala_model *create_model(metala_context *ctx, const metala_config *config, metala_dtype weights) {
    metala_model *m = model_outline(ctx, config, weights);
    if (!m) return NULL;
    m->parameters = m->backend->alloc(times(m->reals, sizeof(real)));
    if (m->quantized_bytes) m->quantized = m->backend->alloc(m->quantized_bytes);
    if (!m->parameters || (m->quantized_bytes && !m->quantized)) {
        fail_memory(ctx, "the model", (double)metala_model_bytes(m));
        metala_model_free(m);
        return NULL;
    }
    if (fill_constants(ctx, m)) {
        metala_model_free(m);
        return NULL;
    }
    return m;
}

metala_model *metala_model_create(metala_context *ctx, const metala_config *config) {
    return create_model(ctx, config, REAL_TYPE);
}

const metala_config *metala_model_config(const metala_model *m) { return &m->config; }
metala_dtype metala_model_weights(const metala_model *m) { return m->weights; }
size_t metala_model_bytes(const metala_model *m) { return plus(times(m->reals, sizeof(real)), m->quantized_bytes); }
size_t metala_model_size(const metala_model *m) { return m->size; }
int metala_model_tensors(const metala_model *m) { return m->tensor_count; }
const metala_tensor *metala_model_tensor(const metala_model *m, int i) {
    return i >= 0 && i < m->tensor_count ? &m->tensors[i] : NULL;
}

static const metala_tensor *find_parameter(metala_context *ctx, const metala_model *m, const char *name) {
    for (int i = 0; i < m->tensor_count; i++)
        if (!strcmp(m->tensors[i].name, name)) return &m->tensors[i];
    fail(ctx, "this model has no parameter called %s", name);
    return NULL;
}

static quantized quantized_at(const unsigned char *place, metala_dtype type, size_t out, size_t in) {
    const void *scales = place + scales_start(out, in);
    quantized weights = {place, type == METALA_I8 ? scales : NULL, in};
    return weights;
}

int metala_model_get(metala_context *ctx, const metala_model *m, const char *name, real *out) {
    const metala_tensor *t = find_parameter(ctx, m, name);
    if (!t) return -1;
    size_t place = m->places[t - m->tensors];
    if (t->dtype == REAL_TYPE) {
        m->backend->download(ctx, out, m->parameters + place, t->count * sizeof(real));
        return metala_context_failed(ctx);
    }
    size_t bytes = quantized_size(t->dtype, t->shape[0], t->shape[1]);
    unsigned char *host = cpu_alloc(bytes);
    if (!host) return fail_memory(ctx, name, (double)bytes);
    m->backend->download(ctx, host, m->quantized + place, bytes);
    quantized weights = quantized_at(host, t->dtype, t->shape[0], t->shape[1]);
    for (size_t o = 0; o < t->shape[0]; o++) dequantize(out + o * t->shape[1], &weights, o, 0, t->shape[1]);
    cpu_free(host);
    return metala_context_failed(ctx);
}

static const char *weights_name(metala_dtype type) {             // as in a file's metadata
    return type == METALA_I8 ? "int8" : type == METALA_BF16 ? "bf16" : "real";
}

// What reads or writes the parameters as reals cannot do so once they are quantized.
static int need_reals(metala_context *ctx, const metala_model *m, const char *what) {
    return m->weights == REAL_TYPE ? 0
         : fail(ctx, "%s: this model's weights are %s, which is for inference only; take the model before it was"
                " quantized", what, weights_name(m->weights));
}

int metala_model_set(metala_context *ctx, metala_model *m, const char *name, const real *in) {
    const metala_tensor *t = find_parameter(ctx, m, name);
    if (!t || need_reals(ctx, m, name)) return -1;
    m->version++;
    m->backend->upload(ctx, m->parameters + t->offset, in, t->count * sizeof(real));
    return 0;
}

// Quantizes values [out,in] into a model's memory at `place`; host holds as much.
static int put_quantized(metala_context *ctx, metala_model *m, size_t place, const char *name, const real *values,
                         size_t out, size_t in, unsigned char *host) {
    void *to = host, *scales = host + scales_start(out, in);
    for (size_t i = 0; i < out * in && m->weights == METALA_I8; i++)
        if (!isfinite(values[i]))
            return fail(ctx, "quantize: %s has a number that is not finite, which int8 cannot hold; the parameters are"
                        " broken, or take bf16", name);
    PARALLEL_FOR(out * in)
    for (size_t o = 0; o < out; o++) {
        const real *w = values + o * in;
        if (m->weights == METALA_BF16) quantize_bfloat16((uint16_t *)to + o * in, w, in);
        else quantize_int8((int8_t *)to + o * in, (float *)scales + o * groups(in), w, in);
    }
    m->backend->upload(ctx, m->quantized + place, host, quantized_size(m->weights, out, in));
    return 0;
}

// Bytes of host memory that hold any one tensor as it is stored, or quantized.
static size_t largest_tensor(const metala_model *m) {
    size_t most = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const metala_tensor *t = &m->tensors[i];
        size_t bytes = times(t->count, sizeof(real));
        size_t other = t->ndim == 2 && m->weights != REAL_TYPE ? quantized_size(m->weights, t->shape[0], t->shape[1]) : 0;
        if (other > bytes) bytes = other;
        if (bytes > most) most = bytes;
    }
    return most;
}

// A second model is made beside the first, and takes its place when it is complete.
int metala_model_quantize(metala_context *ctx, metala_model *m, metala_dtype type) {
    if (type != METALA_BF16 && type != METALA_I8)
        return fail(ctx, "quantize: weights can be METALA_BF16 or METALA_I8, got type %d", (int)type);
    if (m->weights == type) return 0;
    if (need_reals(ctx, m, "quantize")) return -1;
    metala_model *to = create_model(ctx, &m->config, type);
    if (!to) return -1;
    size_t room = largest_tensor(to);
    real *values = cpu_alloc(room);
    unsigned char *host = cpu_alloc(room);
    int status = values && host ? 0 : fail_memory(ctx, "quantizing", 2.0 * (double)room);
    for (int i = 0; i < m->tensor_count && !status; i++) {
        const metala_tensor *t = &to->tensors[i];
        metala_model_get(ctx, m, t->name, values);
        if (t->dtype == REAL_TYPE) to->backend->upload(ctx, to->parameters + to->places[i], values, t->count * sizeof(real));
        else status = put_quantized(ctx, to, to->places[i], t->name, values, t->shape[0], t->shape[1], host);
        if (!status && i == 0 && m->config.tie_word_embeddings)
            status = put_quantized(ctx, to, to->head, t->name, values, t->shape[0], t->shape[1], host);
    }
    if (!status) {
        metala_model old = *m;
        to->version = m->version + 1;
        *m = *to;
        *to = old;
    }
    cpu_free(values);
    cpu_free(host);
    metala_model_free(to);
    return status;
}

uint64_t metala_random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

double metala_uniform(uint64_t *state) { return (double)(metala_random(state) >> 11) / 9007199254740992.0; }   // 2^53

static double random_normal(uint64_t *state) {                       // Box and Muller
    double radius = sqrt(-2 * log(1 - metala_uniform(state)));
    return radius * cos(6.283185307179586 * metala_uniform(state));
}

static int ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

// Initial value number j of a tensor that is not a weight matrix.
static real initial_value(const metala_config *c, const metala_tensor *t, size_t j, int layer, uint64_t *stream) {
    sizes s = sizes_of(c);
    const char *name = strrchr(t->name, '.');
    size_t K = s.K;
    double depth = (double)layer / (double)c->layers, along = ((double)j + 0.5) / (double)t->count;
    name = name && !strncmp(t->name, "model.layers.", 13) ? name + 1 : t->name;
    if (ends_with(t->name, "k_gate.1.bias"))                       // mamba: Δ from 0.001 to 0.1; gla: 0
        return c->row.decay == METALA_DECAY_LOWRANK ? 0
             : (real)log(expm1(exp(log(0.001) + metala_uniform(stream) * log(100))));
    if (ends_with(t->name, "conv1d.weight")) return (real)(metala_uniform(stream) - 0.5);
    if (!strcmp(name, "decay_logit")) return (real)(8 * ((double)(j % K) + 0.5) / (double)K - 4);   // α from 0.78 to 0.999
    if (!strncmp(name, "shift_", 6))
        return (real)(pow(along, (name[6] == 'g' ? 0.5 : 1) * (1 - depth)) + (name[6] == 'v' ? 0.3 * depth : 0));
    if (!strcmp(name, "time_decay")) return (real)(-5 + 8 * pow(along, 0.7 + 1.3 * depth));
    if (!strcmp(name, "time_first")) return (real)(log(0.3) + 0.5 * ((double)((j + 1) % 3) - 1));
    if (!strcmp(name, "theta"))                                    // a wave for each channel, or for two that rotate
        return (real)pow(10000, (s.complex_values ? -2.0 : -1.0) * (double)j / (double)t->count);
    if (!strcmp(name, "A_log")) return (real)log((double)(j % K) + 1);
    if (!strcmp(name, "D")) return 1;
    if (!strcmp(name, "C")) return (real)(random_normal(stream) * sqrt(0.5));
    int lru = c->row.decay == METALA_DECAY_LRU;
    size_t n = s.complex_values ? j % 16 : j % (s.states ? s.states : 1);
    double ring = sqrt(0.5 + 0.48 * along);                        // lru: |λ|, from 0.7 to 0.99
    if (!strcmp(name, "ssm_decay")) return (real)(lru ? log(-log(ring)) : log(0.5));
    if (!strcmp(name, "ssm_phase"))
        return (real)(lru ? log(6.283185307179586 * metala_uniform(stream) + 1e-6) : 3.141592653589793 * (double)n);
    if (!strcmp(name, "ssm_step"))
        return (real)(lru ? 0.5 * log(1 - ring * ring) : log(0.001) + metala_uniform(stream) * log(100));
    return 0;                                                      // biases, aug_balance, lower_bounds
}

// The distributions are in metala.h.
int metala_model_init(metala_context *ctx, metala_model *m, uint64_t seed, const metala_init *init) {
    static const metala_init authors = {0.02, 1, 1, 0};
    if (need_reals(ctx, m, "initialisation")) return -1;
    if (!init) init = &authors;
    m->version++;
    size_t most = 0, D = (size_t)m->config.width, K = sizes_of(&m->config).K;
    for (int i = 0; i < m->tensor_count; i++) most = m->tensors[i].count > most ? m->tensors[i].count : most;
    real *values = cpu_alloc(times(most, sizeof(real)));
    if (!values) return fail_memory(ctx, "the initial values of a tensor", (double)most * sizeof(real));
    for (int i = 0; i < m->tensor_count; i++) {
        const metala_tensor *t = &m->tensors[i];
        uint64_t stream = seed ^ (uint64_t)i << 32;                  // each tensor its own numbers
        int layer = 0;
        metala_random(&stream);
        if (sscanf(t->name, "model.layers.%d.", &layer) != 1) layer = 0;
        int gate = ends_with(t->name, "k_gate.weight") && m->config.row.decay == METALA_DECAY_DYNAMIC;
        int residual = ends_with(t->name, "out_proj.weight") || ends_with(t->name, "l3.weight");
        double std = init->std * (residual ? init->residual_scale : gate ? init->gate_scale : 1);
        double slope = gate ? init->gate_mean / (double)(K * D) : 0;                                       // of the rows' means
        int matrix = t->decay && !ends_with(t->name, "conv1d.weight");
        for (size_t j = 0; j < t->count; j++)
            values[j] = matrix ? (real)(slope * ((double)(j / D % K) + 0.5) + std * random_normal(&stream))
                               : initial_value(&m->config, t, j, layer, &stream);
        if (i == 0 && !m->config.patch_dim && m->config.pad_token_id >= 0 && m->config.pad_token_id < m->config.vocab_size)
            memset(values + (size_t)m->config.pad_token_id * D, 0, D * sizeof(real));
        m->backend->upload(ctx, m->parameters + t->offset, values, t->count * sizeof(real));
    }
    cpu_free(values);
    return 0;
}

// ============================================================== 8. Forward and backward through the layers

// What one layer computes for `rows` tokens, in the order of computation. Inference has one set that all layers use in
// turn; training keeps for every layer what metala_keep says, and has one set for the rest. Where a row has nothing to
// compute, two pointers are the same.
typedef struct {
    real *input;                                              // x, the residual stream into the layer
    real *input_r, *token_norm;                               // rms
    real *shift_k, *shift_v;                                  // token shift for the key and the value
    real *conv_in, *conv_out;                                 // c and u
    real *q_proj, *k_proj, *v_proj, *low, *z, *g;             // linear maps of u
    real *ssm;                                                // complex decay: α, θ (HN each), b (2HN), α as the scan takes it (2HN)
    real *q, *k, *v, *alpha, *bonus;                          // what the scan takes
    real *states, *scan_out, *lse;                            // S at the start of each chunk; o; of softmax
    real *aug_out;                                            // p
    real *rho, *group_norm;                                   // norm
    real *gated;                                              // f_g(g) ⊙ norm(p)
    real *mixer_residual;                                     // h = x + W_o gated
    real *residual_r, *channel_norm;
    real *l1, *l2;                                            // a, b of SwiGLU
    real *glu_prod;                                           // room for silu(a) ⊙ b
    real *output;                                             // x' = mixer_residual + SwiGLU; the next layer's input
} activations;

// The members, their names for metala_trainer_activation, their numbers per token (or per layer, or states), and what it
// would cost to compute them again, which decides who keeps them until the backward. NEEDED (the input): every layer,
// always. COSTLY: every layer, with METALA_KEEP_COSTLY. CHEAP: only with METALA_KEEP_ALL. What a layer does not keep lies in
// one set that all layers share, where the next layer overwrites it; layer_recompute or layer_forward fills it once more. ROOM:
// never kept, and not filled again: the backward makes it itself.
enum width { PER_D, PER_U, PER_SHIFT, PER_CONV, PER_Q_PROJ, PER_K_PROJ, PER_V_PROJ, PER_LOW, PER_Z, PER_G, PER_SSM, PER_Q,
             PER_K, PER_V, PER_ALPHA, PER_BONUS, PER_STATE, PER_SCAN, PER_LSE, PER_P, PER_RHO, PER_NORM, PER_GATED, PER_F,
             PER_TOKEN };
enum cost { ROOM, CHEAP, COSTLY, NEEDED };
static const struct activation_member {
    const char *name;
    size_t member;
    enum width width;
    enum cost cost;
} activation_members[] = {
    {"input", offsetof(activations, input), PER_D, NEEDED},
    {"input_r", offsetof(activations, input_r), PER_TOKEN, CHEAP},
    {"token_norm", offsetof(activations, token_norm), PER_D, CHEAP},
    {"shift_k", offsetof(activations, shift_k), PER_SHIFT, CHEAP},
    {"shift_v", offsetof(activations, shift_v), PER_SHIFT, CHEAP},
    {"conv_in", offsetof(activations, conv_in), PER_CONV, CHEAP},
    {"conv_out", offsetof(activations, conv_out), PER_U, CHEAP},
    {"q_proj", offsetof(activations, q_proj), PER_Q_PROJ, COSTLY},
    {"k_proj", offsetof(activations, k_proj), PER_K_PROJ, COSTLY},
    {"v_proj", offsetof(activations, v_proj), PER_V_PROJ, COSTLY},
    {"low", offsetof(activations, low), PER_LOW, COSTLY},
    {"k_gate", offsetof(activations, z), PER_Z, COSTLY},
    {"g", offsetof(activations, g), PER_G, COSTLY},
    {"ssm", offsetof(activations, ssm), PER_SSM, COSTLY},
    {"q", offsetof(activations, q), PER_Q, CHEAP},
    {"k", offsetof(activations, k), PER_K, CHEAP},
    {"v", offsetof(activations, v), PER_V, CHEAP},
    {"alpha", offsetof(activations, alpha), PER_ALPHA, CHEAP},
    {"bonus", offsetof(activations, bonus), PER_BONUS, CHEAP},
    {"states", offsetof(activations, states), PER_STATE, COSTLY},
    {"scan_out", offsetof(activations, scan_out), PER_SCAN, CHEAP},    // COSTLY with a normaliser or softmax
    {"lse", offsetof(activations, lse), PER_LSE, COSTLY},
    {"aug_out", offsetof(activations, aug_out), PER_P, COSTLY},
    {"rho", offsetof(activations, rho), PER_RHO, CHEAP},
    {"group_norm", offsetof(activations, group_norm), PER_NORM, CHEAP},
    {"gated", offsetof(activations, gated), PER_GATED, CHEAP},
    {"mixer_residual", offsetof(activations, mixer_residual), PER_D, COSTLY},
    {"residual_r", offsetof(activations, residual_r), PER_TOKEN, CHEAP},
    {"channel_norm", offsetof(activations, channel_norm), PER_D, CHEAP},
    {"l1", offsetof(activations, l1), PER_F, COSTLY},
    {"l2", offsetof(activations, l2), PER_F, COSTLY},
    {"glu_prod", offsetof(activations, glu_prod), PER_F, ROOM},
};
enum { ACTIVATION_MEMBERS = sizeof activation_members / sizeof *activation_members };

// Numbers of a member for B sequences of T tokens; 0 where the row has none, or shares those of another member. A map of
// the identity has one name for two: the scan's q, k and v are then the projections themselves.
static size_t member_count(const metala_config *c, enum width width, size_t B, size_t T) {
    const metala_row *r = &c->row;
    sizes s = sizes_of(c);
    int softmax = r->decay == METALA_DECAY_SOFTMAX;
    size_t HK = times(s.H, s.K), HV = times(s.H, s.V), each = 0;
    switch (width) {
        case PER_D: each = s.D; break;
        case PER_U: each = s.shared_u ? 0 : s.u; break;
        case PER_SHIFT: each = r->conv == METALA_CONV_SHIFT ? s.D : 0; break;
        case PER_CONV: each = r->conv == METALA_CONV_OFF || r->conv == METALA_CONV_SHIFT ? 0
                            : r->conv == METALA_CONV_KEY ? s.k : s.u; break;
        case PER_Q_PROJ: each = s.own_q ? s.q : 0; break;
        case PER_K_PROJ: each = s.own_k ? s.k : 0; break;
        case PER_V_PROJ: each = s.own_v || r->value == METALA_VALUE_INPUT ? s.v : 0; break;
        case PER_LOW: each = s.low; break;
        case PER_Z: each = s.z; break;
        case PER_G: each = s.g; break;
        case PER_SSM: return times(6, times(s.H, s.states));
        case PER_Q: case PER_K:
            if (s.shared & METALA_SHARED_SEQUENCES) return times(T, HK);
            each = s.shared & (width == PER_Q ? METALA_SHARED_QUERY : METALA_SHARED_KEY) ? s.K : HK;
            break;
        case PER_V: each = s.own_v ? times(s.H, s.V + s.ones) : r->value == METALA_VALUE_INPUT ? 0 : HV; break;
        case PER_ALPHA:
            if (s.shared & METALA_CONSTANT_DECAY) return HK;
            each = softmax ? 0 : HK;
            break;
        case PER_BONUS: each = r->self == METALA_SELF_BONUS ? s.H : 0; break;
        case PER_STATE: return softmax ? 0 : times(times(B, chunks(T)), times(HK, s.V + s.ones));
        case PER_SCAN: each = s.shared_scan ? 0 : times(s.H, s.V + s.ones); break;
        case PER_LSE: each = softmax ? s.H : 0; break;
        case PER_P: each = HV; break;
        case PER_RHO: each = r->norm == METALA_NORM_WIDTH ? 1 : r->norm ? s.H : 0; break;
        case PER_NORM: each = r->norm ? HV : 0; break;
        case PER_GATED: each = r->gate ? HV : 0; break;
        case PER_F: each = s.F; break;
        case PER_TOKEN: each = 1; break;
    }
    return times(times(B, T), each);
}

// Sets the pointers of the members whose cost lies in a range, in a block of memory, and returns how many numbers that
// takes; block may be NULL.
static size_t place_activations(activations *a, real *block, const metala_config *c, size_t B, size_t T,
                                enum cost least, enum cost most, int with_states) {
    sizes s = sizes_of(c);
    size_t used = 0;
    for (int i = 0; i < ACTIVATION_MEMBERS; i++) {
        const struct activation_member *member = &activation_members[i];
        real **pointer = (real **)(void *)((char *)a + member->member);
        enum cost cost = member->cost;
        if ((member->width == PER_Q && !s.own_q) || (member->width == PER_K && !s.own_k) ||
            (member->width == PER_V && !s.own_v) ||
            (member->width == PER_SCAN && (s.ones || c->row.decay == METALA_DECAY_SOFTMAX)))
            cost = COSTLY;
        size_t count = member_count(c, member->width, B, T);
        if (cost < least || cost > most || !count || (member->width == PER_STATE && !with_states)) continue;
        if (block) *pointer = block + used;
        used = plus(used, round_up(count, 16));
        if (used > SIZE_MAX / 64) return SIZE_MAX / 64;
    }
    if (!block) return used;
    if (s.shared_u) a->conv_out = a->token_norm;
    if (c->row.conv != METALA_CONV_SHIFT) a->shift_k = a->conv_out, a->shift_v = a->token_norm;
    if (!s.own_q) a->q_proj = a->q;
    if (!s.own_k) a->k_proj = a->k;
    if (!s.own_v && c->row.value != METALA_VALUE_INPUT) a->v_proj = a->v;
    if (!s.own_v && c->row.value == METALA_VALUE_INPUT) a->v = a->conv_out;
    if (s.shared_scan) a->scan_out = a->aug_out;
    if (!c->row.norm) a->group_norm = a->aug_out;
    if (!c->row.gate) a->gated = a->group_norm;
    return used;
}

// Sets the pointers of n parts of a block of memory, each from a multiple of 16 numbers on, and returns how many numbers they
// take; block may be NULL.
struct part { real **pointer; size_t count; };
static size_t place_parts(real *block, const struct part *parts, size_t n) {
    size_t used = 0;
    for (size_t i = 0; i < n; i++) {
        if (block) *parts[i].pointer = block + used;
        used = plus(used, round_up(parts[i].count, 16));
        if (used > SIZE_MAX / 64) return SIZE_MAX / 64;
    }
    return used;
}

// The numbers of a member that shares those of another.
static size_t activation_count(const metala_config *c, const struct activation_member *member, size_t B, size_t T) {
    sizes s = sizes_of(c);
    size_t count = member_count(c, member->width, B, T), rows = times(B, T);
    if (count) return count;
    return member->width == PER_U ? rows * s.u : member->width == PER_V ? rows * s.p
         : member->width == PER_SCAN || member->width == PER_NORM || member->width == PER_GATED ? rows * s.p
         : member->width == PER_Q_PROJ ? rows * s.q : member->width == PER_K_PROJ ? rows * s.k
         : member->width == PER_V_PROJ ? rows * s.v : 0;
}

static real *parameter(const metala_model *m, size_t offset) {
    return offset == ABSENT ? NULL : m->parameters + offset;
}

// A linear layer  y = x Wᵀ + bias + residual  with the weight at `place`, real or quantized, …
static metala_linear linear_at(const metala_model *m, real *y, size_t place, size_t bias, const real *residual, size_t out,
                               size_t in) {
    metala_linear l = {.y = y, .bias = parameter(m, bias), .residual = residual, .out = out};
    if (m->weights == REAL_TYPE) l.w = m->parameters + place;
    else {
        quantized q = quantized_at(m->quantized + place, m->weights, out, in);
        l.w = q.w, l.scales = q.scales;
    }
    return l;
}
// … some of them, with the same x, …
static void linears(metala_context *ctx, const metala_model *m, const metala_linear *layers, int count, const real *x, size_t rows,
                    size_t in) {
    if (m->weights == REAL_TYPE) m->backend->matmul_forward(ctx, layers, count, x, rows, in);
    else m->backend->matmul_quantized(ctx, layers, count, x, rows, in);
}
// … and one.
static void linear(metala_context *ctx, const metala_model *m, real *y, const real *x, size_t place, size_t bias,
                   const real *residual, size_t rows, size_t out, size_t in) {
    metala_linear l = linear_at(m, y, place, bias, residual, out, in);
    linears(ctx, m, &l, 1, x, rows, in);
}

// The gradients of one linear layer, as matmul_backward.
static void linear_backward(metala_context *ctx, const metala_backend *be, real *dx, real *dw, real *dbias, const real *dy,
                            const real *x, const real *w, size_t rows, size_t out, size_t in, int accumulate) {
    metala_linear_gradient l = {dw, dbias, dy, w, out};
    be->matmul_backward(ctx, dx, &l, 1, x, rows, in, accumulate);
}

// y (rows,n) = the same n numbers in every row: a linear layer without inputs. And the gradient: d += Σ_rows dy.
static void repeat_rows(metala_context *ctx, const metala_backend *be, real *y, const real *numbers, size_t rows, size_t n) {
    metala_linear l = {.y = y, .w = numbers, .bias = numbers, .out = n};
    be->matmul_forward(ctx, &l, 1, numbers, rows, 0);
}
static void add_rows(metala_context *ctx, const metala_backend *be, real *d, const real *dy, size_t rows, size_t n) {
    linear_backward(ctx, be, NULL, NULL, d, dy, dy, dy, rows, n, 0, 0);
}

typedef struct {                // what all layers of one pass share
    size_t B, T, rows;
    sizes s;
    const uint8_t *mask;        // the backend's memory, or NULL
    metala_form form;
    uint64_t position;          // of the first token
    int ssm_ready;              // the constants of complex decays are those of these parameters already
    const real *bounds;         // (L,H·K) lower bounds of decays
    real *dbounds;
} pass;

static pass pass_of(const metala_config *c, size_t B, size_t T, const uint8_t *mask, metala_form form, uint64_t position) {
    pass p = {B, T, B * T, sizes_of(c), mask, form, position, 0, NULL, NULL};
    return p;
}

// ---- The token mixer in four parts; of one token of MetaLA's, mixer_step is the last two. `again`: for the backward, from
// what COSTLY members hold; nothing that they hold may then be changed.
//
//     u = conv(n)     q, k, v, z, g: linear maps of u     q = f_q, k = f_k, v = f_v, α = f_α of these, rotated by the phase
//     o = scan(q, k, v, α)      p = o + self       y = f_g(g) ⊙ norm(p)      h = x + W_o y

// State that a sequence has beside S: where the convolution or the token shift looks back to.
//     convolution  (B,4,U) its last inputs
//     token shift  (B,D) the last n   (B,2,D) last key and largest exponent   (B,D) last v
static size_t tail_width(const metala_config *c) {
    sizes s = sizes_of(c);
    return c->row.conv == METALA_CONV_OFF ? 0 : c->row.conv == METALA_CONV_KEY ? s.k : s.u;
}
static size_t tail_count(const metala_config *c) { return times(METALA_CONV, tail_width(c)); }

// n and u.
static void mixer_input(metala_context *ctx, const metala_model *m, int layer, const activations *a, const pass *p,
                        real *tail, int again) {
    const metala_backend *be = m->backend;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    const sizes *s = &p->s;
    if (m->config.row.conv == METALA_CONV_ON && tail && p->T == 1 && !p->mask) {      // only u is read then
        be->conv_step(ctx, a->conv_out, tail, a->input, P + w->conv, p->B, s->D, m->config.norm_eps);
        return;
    }
    be->rms_forward(ctx, a->token_norm, a->input_r, a->input, p->mask, p->rows, s->D, m->config.norm_eps);
    switch (m->config.row.conv) {
        case METALA_CONV_ON:
            be->conv_forward(ctx, a->conv_out, a->conv_in, a->token_norm, P + w->conv, tail, p->B, p->T, s->D);
            break;
        case METALA_CONV_SHIFT:
            be->shift_forward(ctx, a->conv_out, a->token_norm, P + w->shift_g, tail, p->B, p->T, s->D);
            be->shift_forward(ctx, a->shift_k, a->token_norm, P + w->shift_k, tail, p->B, p->T, s->D);
            be->shift_forward(ctx, a->shift_v, a->token_norm, P + w->shift_v, tail, p->B, p->T, s->D);
            if (tail) be->last_token(ctx, tail, a->token_norm, p->B, p->T, s->D);
            break;
        case METALA_CONV_VALUE:
            if (!again) linear(ctx, m, a->v_proj, a->token_norm, w->v, ABSENT, NULL, p->rows, s->v, s->D);
            be->conv_forward(ctx, a->conv_out, a->conv_in, a->v_proj, P + w->conv, tail, p->B, p->T, s->u);
            break;
    }
    if (p->mask && m->config.row.value == METALA_VALUE_INPUT) be->mask_rows(ctx, a->conv_out, p->mask, p->rows, s->u);
}

// The linear maps  y = x Wᵀ + bias. x is u; it is n for conv value's gate, and for values unless they are convolved or shifted.
// out is 0 for what a row does not have, and for conv value's v, which mixer_input has made.
enum { MAP_G, MAP_V, MAP_Q, MAP_K, MAP_Z, MIXER_MAPS };
typedef struct { real *y; const real *x; size_t weight, bias, out, in; } mixer_map;
static void mixer_maps(mixer_map *maps, const metala_model *m, int layer, const activations *a, const pass *p) {
    const layer_offsets *w = &m->layers[layer];
    const metala_row *r = &m->config.row;
    const sizes *s = &p->s;
    int on = r->conv == METALA_CONV_ON, value = r->conv == METALA_CONV_VALUE, fixed = r->decay == METALA_DECAY_FIXED;
    const mixer_map all[MIXER_MAPS] = {
        [MAP_G] = {a->g, value ? a->token_norm : a->conv_out, w->g, w->g_bias, s->g, s->D},
        [MAP_V] = {a->v_proj, on ? a->conv_out : a->shift_v, w->v, ABSENT, value ? 0 : s->v, s->D},
        [MAP_Q] = {a->q_proj, a->conv_out, w->q, ABSENT, s->q, s->u},
        [MAP_K] = {a->k_proj, a->shift_k, w->k, ABSENT, s->k, s->u},
        [MAP_Z] = {s->low ? a->low : a->z, a->conv_out, s->low ? w->low : w->z, ABSENT, s->low ? s->low : fixed ? 0 : s->z, s->u}};
    memcpy(maps, all, sizeof all);
}
// Maps with the same pointer x are computed together. Lists those that read the x of map i, and returns how many; 0 when they
// were listed for an earlier one, or when there is no map i.
static int maps_of_x(int *same_x, const mixer_map *maps, int i) {
    int count = 0;
    for (int j = 0; j < MIXER_MAPS; j++)
        if (maps[j].out && maps[j].x == maps[i].x) same_x[count++] = j;
    return count && same_x[0] == i ? count : 0;
}

static void mixer_projections(metala_context *ctx, const metala_model *m, int layer, const activations *a, const pass *p) {
    const layer_offsets *w = &m->layers[layer];
    const metala_row *r = &m->config.row;
    const sizes *s = &p->s;
    mixer_map maps[MIXER_MAPS];
    mixer_maps(maps, m, layer, a, p);
    for (int i = 0; i < MIXER_MAPS; i++) {
        metala_linear layers[MIXER_MAPS];
        int same_x[MIXER_MAPS], count = maps_of_x(same_x, maps, i);
        for (int n = 0; n < count; n++) {
            const mixer_map *map = &maps[same_x[n]];
            layers[n] = linear_at(m, map->y, map->weight, map->bias, NULL, map->out, map->in);
        }
        if (count) linears(ctx, m, layers, count, maps[i].x, p->rows, maps[i].in);
    }
    if (s->low) linear(ctx, m, a->z, a->low, w->z, w->z_bias, NULL, p->rows, s->z, s->low);
    else if (r->decay == METALA_DECAY_FIXED) repeat_rows(ctx, m->backend, a->z, m->parameters + w->z, p->rows, s->z);
    if (p->mask && s->v && r->conv != METALA_CONV_VALUE) m->backend->mask_rows(ctx, a->v_proj, p->mask, p->rows, s->v);
}

// f_q or f_k: from a projection x to what the scan takes, y (rows,H,K); where all heads share it (rows,K), perhaps x itself;
// (T,H,K) of METALA_QUERY_CONSTANT. choice: one of METALA_QUERY_*; those of keys come in
// the same order (key_choice). constant [H,K]: what METALA_QUERY_CONSTANT repeats.
static int key_choice(const metala_row *r) { return r->key - METALA_KEY_LINEAR; }

// How many sequences have q and k of their own.
static size_t key_sequences(const pass *p) { return p->s.shared & METALA_SHARED_SEQUENCES ? 1 : p->B; }

static void feature_forward(metala_context *ctx, const metala_model *m, int choice, real *y, const real *x,
                            const real *constant, const pass *p) {
    const metala_backend *be = m->backend;
    size_t H = p->s.H, K = p->s.K;
    switch (choice) {
        case METALA_QUERY_SILU: be->map_forward(ctx, y, x, p->rows * H * K, METALA_MAP_SILU); break;
        case METALA_QUERY_ELU1: be->map_forward(ctx, y, x, p->rows * H * K, METALA_MAP_ELU1); break;
        case METALA_QUERY_TAYLOR: be->taylor_forward(ctx, y, x, p->rows, H, (size_t)m->config.feature_dim); break;
        case METALA_QUERY_ONE: repeat_rows(ctx, be, y, m->constants, p->rows, K); break;
        case METALA_QUERY_CONSTANT: repeat_rows(ctx, be, y, constant, key_sequences(p) * p->T, H * K); break;
        case METALA_QUERY_SHARED: if (y != x) be->copy_heads_forward(ctx, y, x, p->rows, H, K); break;
    }
}

// f_α, and what it makes beside α: a tied key; θ and b of a complex decay; q, k and the bonus of METALA_DECAY_EXP; v of
// METALA_DECAY_SELECTIVE. exponents: the state of METALA_DECAY_EXP, or NULL.
static void decay_forward(metala_context *ctx, const metala_model *m, int layer, const activations *a, const pass *p,
                          real *exponents) {
    const metala_backend *be = m->backend;
    const metala_config *c = &m->config;
    const metala_row *r = &c->row;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    size_t rows = p->rows, H = p->s.H, K = p->s.K, N = p->s.states, HK = H * K;
    const real *decays = m->constants + K + K / 2;
    real *tied = r->key == METALA_KEY_TIED ? a->k : NULL;
    switch (r->decay) {
        case METALA_DECAY_DYNAMIC: case METALA_DECAY_LOWRANK: case METALA_DECAY_FIXED:
            be->gate_forward(ctx, a->alpha, tied, a->z, rows * HK, c->tau);
            break;
        case METALA_DECAY_ONE: case METALA_DECAY_HEADS: case METALA_DECAY_DEPTH:
            be->copy(ctx, a->alpha, decays + (r->decay == METALA_DECAY_DEPTH ? (size_t)layer * HK : 0), HK * sizeof(real));
            break;
        case METALA_DECAY_BOUNDED:
            be->bounded_gate_forward(ctx, a->alpha, tied, a->z, p->bounds + (size_t)layer * HK, rows, HK);
            break;
        case METALA_DECAY_EXP:
            be->wkv_forward(ctx, a->q, a->k, a->alpha, a->bonus, a->k_proj, P + w->time_decay, P + w->time_first, p->mask,
                            exponents, p->B, p->T, H, p->position);
            break;
        case METALA_DECAY_LRU: case METALA_DECAY_ZOH: case METALA_DECAY_DSS:
            if (p->ssm_ready) break;
            be->ssm_forward(ctx, (metala_ssm)(r->decay - METALA_DECAY_LRU), a->ssm, a->ssm + H * N, a->ssm + 2 * H * N,
                            P + w->ssm_decay, P + w->ssm_phase, P + w->ssm_step, H, N, (size_t)c->length);
            break;
        case METALA_DECAY_SELECTIVE:
            be->selective_forward(ctx, a->alpha, a->v, a->z, a->conv_out, P + w->A, rows, H, K);
            break;
    }
    if (r->phase == METALA_PHASE_DECAY) {
        if (!p->ssm_ready) be->copy_heads_forward(ctx, a->ssm + 4 * H * N, a->ssm, H * N, K / N, 1);
        be->copy(ctx, a->alpha, a->ssm + 4 * H * N, HK * sizeof(real));
    }
}

// f_v. last_v: the state of the bonus, or NULL.
static void value_forward(metala_context *ctx, const metala_model *m, const activations *a, const pass *p, real *last_v) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    size_t rows = p->rows, H = p->s.H, V = p->s.V;
    switch (r->value) {
        case METALA_VALUE_LINEAR:
            if (p->s.ones) {
                be->extend_forward(ctx, a->v, a->v_proj, p->mask, last_v, r->self == METALA_SELF_BONUS, p->B, p->T, H, V);
                if (last_v) be->last_token(ctx, last_v, a->v_proj, p->B, p->T, H * V);
            }
            break;
        case METALA_VALUE_COMPLEX: be->scale_pairs_forward(ctx, a->v, a->v_proj, a->ssm + 2 * H, rows, H); break;
        case METALA_VALUE_SILU: be->map_forward(ctx, a->v, a->v_proj, rows * H * V, METALA_MAP_SILU); break;
        case METALA_VALUE_PRODUCT: be->multiply_forward(ctx, a->v, a->conv_in, a->v_proj, rows * H * V); break;
    }
}

// The angles by which values, or queries and keys, rotate, and whether all heads share them; NULL for none.
static const real *mixer_angles(const metala_model *m, int layer, const activations *a, const pass *p, int *one_angle) {
    const metala_row *r = &m->config.row;
    *one_angle = r->phase == METALA_PHASE_ROPE || r->phase == METALA_PHASE_FIRST;
    if (r->phase == METALA_PHASE_ROPE) return m->constants + p->s.K;
    if (r->phase == METALA_PHASE_DECAY) return a->ssm + p->s.H * p->s.states;
    return parameter(m, m->layers[layer].theta);                  // of FIRST and LEARNED
}

// q, k, v and α. What has no memory of its own is there already.
static void mixer_choices(metala_context *ctx, const metala_model *m, int layer, const activations *a, const pass *p,
                          real *tail, int again) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    const real *b = a->ssm ? a->ssm + 2 * p->s.H * p->s.states : NULL;
    size_t H = p->s.H, K = p->s.K;
    real *shifted = r->conv == METALA_CONV_SHIFT ? tail : NULL;             // only its tail has these parts
    decay_forward(ctx, m, layer, a, p, shifted ? shifted + p->B * p->s.D : NULL);
    feature_forward(ctx, m, r->query, a->q, a->q_proj, parameter(m, w->C), p);
    feature_forward(ctx, m, key_choice(r), a->k, a->k_proj, b, p);
    if (r->conv == METALA_CONV_KEY)
        be->conv_forward(ctx, NULL, a->conv_in, a->k_proj, m->parameters + w->conv, tail, p->B, p->T, p->s.k);
    value_forward(ctx, m, a, p, shifted ? shifted + 3 * p->B * p->s.D : NULL);

    size_t sequences = key_sequences(p);
    int one_angle, minus = r->phase == METALA_PHASE_DECAY;                  // conj(C e^{-iθt}) b e^{-iθs} = conj(C) b e^{iθ(t-s)}
    const real *theta = mixer_angles(m, layer, a, p, &one_angle);
    if (theta && p->s.complex_values)
        be->rotate_forward(ctx, a->v, a->v, theta, p->B, p->T, H, 2, one_angle, p->position, 1);
    else if (theta) {
        if (p->s.own_q || !again) be->rotate_forward(ctx, a->q, a->q, theta, sequences, p->T, H, K, one_angle, p->position, minus);
        if (p->s.own_k || !again) be->rotate_forward(ctx, a->k, a->k, theta, sequences, p->T, H, K, one_angle, p->position, minus);
    }
}

// Norm and gate; MetaLA's are one kernel.
static int has_gated_norm(const metala_row *r) { return r->norm == METALA_NORM_LAYER && r->gate == METALA_GATE_SILU; }
static void mixer_output(metala_context *ctx, const metala_model *m, const activations *a, const pass *p) {
    const metala_backend *be = m->backend;
    const sizes *s = &p->s;
    double eps = m->config.head_norm_eps;
    size_t count = p->rows * s->p;
    if (has_gated_norm(&m->config.row)) {
        be->head_norm_forward(ctx, a->gated, a->group_norm, a->rho, a->aug_out, a->g, p->rows, s->H, s->V, eps);
        return;
    }
    switch (m->config.row.norm) {
        case METALA_NORM_LAYER:
            be->head_norm_forward(ctx, NULL, a->group_norm, a->rho, a->aug_out, NULL, p->rows, s->H, s->V, eps);
            break;
        case METALA_NORM_RMS: be->rms_forward(ctx, a->group_norm, a->rho, a->aug_out, NULL, p->rows * s->H, s->V, eps); break;
        case METALA_NORM_WIDTH: be->rms_forward(ctx, a->group_norm, a->rho, a->aug_out, NULL, p->rows, s->p, eps); break;
    }
    switch (m->config.row.gate) {
        case METALA_GATE_SILU: be->silu_gate_forward(ctx, a->gated, a->g, a->group_norm, count); break;
        case METALA_GATE_SIGMOID: be->sigmoid_gate_forward(ctx, a->gated, a->g, a->group_norm, count); break;
        case METALA_GATE_LINEAR: be->multiply_forward(ctx, a->gated, a->g, a->group_norm, count); break;
    }
}

// Keeps a sum of no weights from being divided by; with a bonus the sum is at least 1.
static double normaliser_eps(const metala_row *r) { return r->self == METALA_SELF_BONUS ? 0 : 1e-6; }

// The past of one layer that a pass continues from and updates; all NULL to start from nothing.
typedef struct {
    real *S;                    // (B,H,K,V) the scan's state
    real *tail;                 // see tail_count
    real *keys, *values;        // softmax attention: (B,room,H·K), (B,room,H·V), of all tokens so far
    uint8_t *seen;              // (B,room) their masks
    size_t room;
} memory_of_layer;

// Softmax attention over this pass and what `past` remembers, to which it is added.
static void attend(metala_context *ctx, const metala_model *m, const activations *a, const pass *p,
                   const memory_of_layer *past) {
    const metala_backend *be = m->backend;
    const sizes *s = &p->s;
    size_t HK = s->H * s->K, HV = s->H * s->V, T = p->T;
    if (!past) {
        be->attention_forward(ctx, a->scan_out, a->lse, a->q, a->k, a->v, p->mask, p->B, T, 0, T, s->H, s->K, s->V, s->scale);
        return;
    }
    size_t at = (size_t)p->position;
    for (size_t b = 0; b < p->B; b++) {
        size_t row = b * past->room + at;
        be->copy(ctx, past->keys + row * HK, a->k + b * T * HK, T * HK * sizeof(real));
        be->copy(ctx, past->values + row * HV, a->v + b * T * HV, T * HV * sizeof(real));
        be->copy(ctx, past->seen + row, p->mask + b * T, T);
    }
    be->attention_forward(ctx, a->scan_out, a->lse, a->q, past->keys, past->values, past->seen, p->B, T, at, past->room, s->H,
                          s->K, s->V, s->scale);
}

// From the projections to the gated output: choices, scan, what is added to it, norm and gate.
static void mixer_scan(metala_context *ctx, const metala_model *m, int layer, const activations *a, const pass *p,
                       const memory_of_layer *past) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    const sizes *s = &p->s;
    size_t rows = p->rows, H = s->H, K = s->K, V = s->V;
    mixer_choices(ctx, m, layer, a, p, past ? past->tail : NULL, 0);
    if (r->decay == METALA_DECAY_SOFTMAX) attend(ctx, m, a, p, past);
    else
        be->scan_forward(ctx, p->form, a->scan_out, past ? past->S : NULL, a->states, a->q, a->k, a->v, a->alpha, p->B, p->T, H,
                         K, V + s->ones, s->scale, s->shared);
    if (s->complex_values) {
        int one_angle;
        const real *theta = mixer_angles(m, layer, a, p, &one_angle);
        if (theta) be->rotate_forward(ctx, a->scan_out, a->scan_out, theta, p->B, p->T, H, 2, one_angle, p->position, 0);
    }
    if (s->ones)
        be->normalise_forward(ctx, a->aug_out, a->scan_out, a->bonus, a->v_proj, rows, H, V, normaliser_eps(r));
    if (r->self == METALA_SELF_AUGMENT)
        be->augment_forward(ctx, a->aug_out, a->scan_out, a->q, a->k, a->v, P + w->b, rows, H, K, V);
    if (r->self == METALA_SELF_SKIP && !s->complex_values)
        be->skip_forward(ctx, a->aug_out, a->scan_out, r->value == METALA_VALUE_INPUT ? a->conv_out : a->v, P + w->skip, rows,
                         s->p);
    mixer_output(ctx, m, a, p);
}

// Is one token of this row what mixer_step computes? What else there is goes only with other queries, keys and values.
static int is_mixer_step(const metala_row *r, const pass *p) {
    return p->T == 1 && p->form == METALA_RECURRENT && r->query == METALA_QUERY_LINEAR && r->key == METALA_KEY_TIED &&
           r->value == METALA_VALUE_LINEAR && r->decay != METALA_DECAY_BOUNDED && r->phase == METALA_PHASE_OFF &&
           r->self != METALA_SELF_SKIP && has_gated_norm(r);
}

// One layer: input -> output.
//
//     n = rms(x)    the token mixer, see above                          h = x + W_o y
//     n' = rms(h)   SwiGLU                                              x' = h + W_3 (silu(W_1 n') ⊙ W_2 n')
//
// The mixer of MetaLA:
//
//     u = silu(conv(n))          (a masked token's n and v are 0)
//     q = W_q u     z = W_α u    v = W_v u    g = W_g u + β              α = σ(z)^(1/τ)    k = 1 - α
//     o = scan(q, k, v, α)       p = o + σ(w v), w = Σ_i q_i k_i b_i     y = silu(g) ⊙ norm(p)
static void layer_forward(metala_context *ctx, const metala_model *m, int layer, const activations *a, const pass *p,
                          const memory_of_layer *past) {
    const metala_backend *be = m->backend;
    const metala_config *c = &m->config;
    const metala_row *r = &c->row;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    const sizes *s = &p->s;
    size_t rows = p->rows, D = s->D, F = s->F;

    mixer_input(ctx, m, layer, a, p, past ? past->tail : NULL, 0);
    mixer_projections(ctx, m, layer, a, p);
    if (past && is_mixer_step(r, p))
        be->mixer_step(ctx, a->gated, past->S, a->z, a->q_proj, a->v_proj, a->g, parameter(m, w->b), p->B, s->H, s->K, s->V,
                       c->tau, s->scale, c->head_norm_eps);
    else mixer_scan(ctx, m, layer, a, p, past);
    linear(ctx, m, a->mixer_residual, a->gated, w->out, ABSENT, a->input, rows, D, s->p);
    if (r->self == METALA_SELF_SKIP && s->complex_values)
        be->skip_forward(ctx, a->mixer_residual, a->mixer_residual, a->conv_out, P + w->skip, rows, D);

    metala_linear swiglu[3];
    swiglu[0] = linear_at(m, a->l1, w->l1, w->l1_bias, NULL, F, D);
    swiglu[1] = linear_at(m, a->l2, w->l2, w->l2_bias, NULL, F, D);
    swiglu[2] = linear_at(m, a->output, w->l3, w->l3_bias, a->mixer_residual, D, F);
    if (past && p->T == 1) {
        be->swiglu_step(ctx, a->glu_prod, swiglu, m->weights, a->channel_norm, a->residual_r, a->mixer_residual, rows, D,
                        c->norm_eps);
        linears(ctx, m, swiglu + 2, 1, a->glu_prod, rows, F);
    } else {
        be->rms_forward(ctx, a->channel_norm, a->residual_r, a->mixer_residual, NULL, rows, D, c->norm_eps);
        be->swiglu_forward(ctx, swiglu, m->weights, a->glu_prod, a->channel_norm, rows, D);
    }
}

// Fills in what is CHEAP, from what layer_forward left in the rest; the scan and the matrix products are not repeated.
static void layer_recompute(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                            const pass *p) {
    const metala_backend *be = m->backend;
    mixer_input(ctx, m, layer, a, p, NULL, 1);
    mixer_choices(ctx, m, layer, a, p, NULL, 1);
    mixer_output(ctx, m, a, p);
    be->rms_forward(ctx, a->channel_norm, a->residual_r, a->mixer_residual, NULL, p->rows, p->s.D, m->config.norm_eps);
}

// Gradients of one layer's activations; one set serves all layers. Once they have been passed on, `gated` holds the bonus's
// part of dv, and `p` what goes through the key's convolution or, in a selective decay, back to u.
typedef struct {
    real *n, *u, *shift_k, *shift_v;                          // (rows,D), (rows,U), (rows,D) with a token shift
    real *q_proj, *k_proj, *v_proj, *low, *z, *g, *ssm;
    real *q, *k, *v, *a, *bonus;
    real *scan, *p, *gated;
    real *prod, *l1, *l2;                                     // (rows,F)
} layer_gradients;

// Each as wide as the wider of two activations.
static const struct { size_t member; enum width width, other; } gradient_members[] = {
    {offsetof(layer_gradients, n), PER_D, PER_D}, {offsetof(layer_gradients, u), PER_D, PER_U},
    {offsetof(layer_gradients, shift_k), PER_SHIFT, PER_SHIFT}, {offsetof(layer_gradients, shift_v), PER_SHIFT, PER_SHIFT},
    {offsetof(layer_gradients, v), PER_V, PER_P}, {offsetof(layer_gradients, g), PER_G, PER_G},
    {offsetof(layer_gradients, p), PER_P, PER_P}, {offsetof(layer_gradients, gated), PER_P, PER_P},
    {offsetof(layer_gradients, q), PER_Q, PER_Q}, {offsetof(layer_gradients, k), PER_K, PER_K},
    {offsetof(layer_gradients, z), PER_Z, PER_Z}, {offsetof(layer_gradients, a), PER_ALPHA, PER_ALPHA},
    {offsetof(layer_gradients, q_proj), PER_Q_PROJ, PER_Q_PROJ}, {offsetof(layer_gradients, k_proj), PER_K_PROJ, PER_K_PROJ},
    {offsetof(layer_gradients, v_proj), PER_V_PROJ, PER_V_PROJ}, {offsetof(layer_gradients, low), PER_LOW, PER_LOW},
    {offsetof(layer_gradients, ssm), PER_SSM, PER_SSM}, {offsetof(layer_gradients, bonus), PER_BONUS, PER_BONUS},
    {offsetof(layer_gradients, scan), PER_SCAN, PER_SCAN}, {offsetof(layer_gradients, prod), PER_F, PER_F},
    {offsetof(layer_gradients, l1), PER_F, PER_F}, {offsetof(layer_gradients, l2), PER_F, PER_F}};

// As place_activations.
static size_t place_gradients(layer_gradients *d, real *block, const metala_config *c, size_t B, size_t T) {
    sizes s = sizes_of(c);
    size_t used = 0;
    for (size_t i = 0; i < sizeof gradient_members / sizeof *gradient_members; i++) {
        size_t count = member_count(c, gradient_members[i].width, B, T);
        size_t other = member_count(c, gradient_members[i].other, B, T);
        if (other > count) count = other;
        if (block && count) *(real **)(void *)((char *)d + gradient_members[i].member) = block + used;
        used = plus(used, round_up(count, 16));
        if (used > SIZE_MAX / 64) return SIZE_MAX / 64;
    }
    if (block && !s.own_q) d->q_proj = d->q;
    if (block && !s.own_k) d->k_proj = d->k;
    if (block && !s.own_v && c->row.value != METALA_VALUE_INPUT) d->v_proj = d->v;
    return used;
}

#define GRAD(offset) ((offset) == ABSENT ? NULL : grads + (offset))

// From dx, the gradient of h = x + W_o y (+ d ⊙ u), to d->p, that of p.
static void mixer_output_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                                  const layer_gradients *d, real *grads, const real *dh, const pass *p) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    const sizes *s = &p->s;
    size_t rows = p->rows, count = rows * s->p;
    real *dnorm = r->norm == METALA_NORM_RMS || r->norm == METALA_NORM_WIDTH ? d->v : d->p;     // rms_backward adds to d->p
    linear_backward(ctx, be, r->gate ? d->gated : dnorm, GRAD(w->out), NULL, dh, a->gated, m->parameters + w->out, rows, s->D,
                    s->p, 0);
    if (has_gated_norm(r)) {
        be->head_norm_backward(ctx, d->p, d->g, d->gated, a->group_norm, a->rho, a->g, rows, s->H, s->V);
        return;
    }
    switch (r->gate) {
        case METALA_GATE_SILU: be->silu_gate_backward(ctx, d->g, dnorm, NULL, d->gated, a->g, a->group_norm, count); break;
        case METALA_GATE_SIGMOID: be->sigmoid_gate_backward(ctx, d->g, dnorm, d->gated, a->g, a->group_norm, count); break;
        case METALA_GATE_LINEAR: be->multiply_backward(ctx, d->g, dnorm, d->gated, a->g, a->group_norm, count); break;
    }
    if (r->norm == METALA_NORM_LAYER)
        be->head_norm_backward(ctx, d->p, NULL, dnorm, a->group_norm, a->rho, NULL, rows, s->H, s->V);
    if (r->norm == METALA_NORM_RMS || r->norm == METALA_NORM_WIDTH) be->zero(ctx, d->p, count * sizeof(real));
    if (r->norm == METALA_NORM_RMS) be->rms_backward(ctx, d->p, dnorm, a->aug_out, a->rho, NULL, rows * s->H, s->V);
    if (r->norm == METALA_NORM_WIDTH) be->rms_backward(ctx, d->p, dnorm, a->aug_out, a->rho, NULL, rows, s->p);
}

// From d->p to d->q, d->k, d->v, d->a (and d->bonus): self term, normaliser, scan.
static void mixer_scan_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                                const layer_gradients *d, real *grads, const pass *p) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    const sizes *s = &p->s;
    size_t rows = p->rows, H = s->H, K = s->K, V = s->V;
    real *dO = d->p;
    int one_angle;
    const real *theta = s->complex_values ? mixer_angles(m, layer, a, p, &one_angle) : NULL;
    real *dtheta = r->phase == METALA_PHASE_DECAY ? d->ssm + H * s->states : GRAD(w->theta);
    if (theta) be->rotate_backward(ctx, dO, dtheta, dO, a->scan_out, theta, p->B, p->T, H, 2, one_angle, p->position, 0);
    if (s->ones) {
        dO = d->scan;
        be->normalise_backward(ctx, dO, d->bonus, d->bonus ? d->gated : NULL, d->p, a->aug_out, a->scan_out, a->bonus, a->v_proj,
                               rows, H, V, normaliser_eps(r));
    }
    if (r->decay == METALA_DECAY_SOFTMAX)
        be->attention_backward(ctx, d->q, d->k, d->v, dO, a->scan_out, a->lse, a->q, a->k, a->v, p->mask, p->B, p->T, H, K, V,
                               s->scale);
    else
        be->scan_backward(ctx, p->form, d->q, d->k, d->v, s->learned_decay ? d->a : NULL, NULL, dO, a->states, a->q, a->k, a->v,
                          a->alpha, p->B, p->T, H, K, V + s->ones, s->scale, s->shared);
    if (r->self == METALA_SELF_AUGMENT)
        be->augment_backward(ctx, d->q, d->k, d->v, GRAD(w->b), d->p, a->q, a->k, a->v, P + w->b, rows, H, K, V);
    if (r->self == METALA_SELF_SKIP && !s->complex_values) {
        int input = r->value == METALA_VALUE_INPUT;
        be->skip_backward(ctx, input ? d->u : d->v, GRAD(w->skip), d->p, input ? a->conv_out : a->v, P + w->skip, rows, s->p);
    }
}

// Its constant's gradient is added to dconstant.
static void feature_backward(metala_context *ctx, const metala_model *m, int choice, real *dx, real *dconstant,
                             const real *dy, const real *x, const pass *p) {
    const metala_backend *be = m->backend;
    size_t H = p->s.H, K = p->s.K;
    switch (choice) {
        case METALA_QUERY_SILU: be->map_backward(ctx, dx, dy, x, p->rows * H * K, METALA_MAP_SILU); break;
        case METALA_QUERY_ELU1: be->map_backward(ctx, dx, dy, x, p->rows * H * K, METALA_MAP_ELU1); break;
        case METALA_QUERY_TAYLOR: be->taylor_backward(ctx, dx, dy, x, p->rows, H, (size_t)m->config.feature_dim); break;
        case METALA_QUERY_CONSTANT: add_rows(ctx, be, dconstant, dy, key_sequences(p) * p->T, H * K); break;
        case METALA_QUERY_SHARED: if (dx != dy) be->copy_heads_backward(ctx, dx, dy, p->rows, H, K); break;
    }
}

static void value_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                           const layer_gradients *d, real *grads, const pass *p) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    size_t rows = p->rows, H = p->s.H, V = p->s.V;
    switch (r->value) {
        case METALA_VALUE_LINEAR:
            if (p->s.ones)
                be->extend_backward(ctx, d->v_proj, d->v, p->mask, r->self == METALA_SELF_BONUS, p->B, p->T, H, V);
            if (r->self == METALA_SELF_BONUS) be->add(ctx, d->v_proj, d->v_proj, d->gated, rows * H * V);
            break;
        case METALA_VALUE_COMPLEX:
            be->scale_pairs_backward(ctx, d->v_proj, d->ssm + 2 * H, d->v, a->v_proj, a->ssm + 2 * H, rows, H);
            break;
        case METALA_VALUE_SILU: be->map_backward(ctx, d->v_proj, d->v, a->v_proj, rows * H * V, METALA_MAP_SILU); break;
        case METALA_VALUE_INPUT:
            if (r->decay != METALA_DECAY_SELECTIVE) be->add(ctx, d->u, d->u, d->v, rows * p->s.u);
            break;
        case METALA_VALUE_PRODUCT:
            be->multiply_backward(ctx, d->p, d->v_proj, d->v, a->conv_in, a->v_proj, rows * H * V);
            be->conv_backward(ctx, d->k_proj, GRAD(w->conv), d->p, NULL, a->k_proj, m->parameters + w->conv, NULL, p->B, p->T,
                              p->s.k);
            break;
    }
}

static void decay_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                           const layer_gradients *d, real *grads, const pass *p) {
    const metala_backend *be = m->backend;
    const metala_config *c = &m->config;
    const metala_row *r = &c->row;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    size_t rows = p->rows, H = p->s.H, K = p->s.K, HK = H * K, HN = H * p->s.states;
    real *tied = r->key == METALA_KEY_TIED ? d->k : NULL;
    switch (r->decay) {
        case METALA_DECAY_DYNAMIC: case METALA_DECAY_LOWRANK: case METALA_DECAY_FIXED:
            be->gate_backward(ctx, d->z, d->a, tied, a->z, a->alpha, rows * HK, c->tau);
            break;
        case METALA_DECAY_BOUNDED:
            be->bounded_gate_backward(ctx, d->z, p->dbounds + (size_t)layer * HK, d->a, tied, a->z,
                                      p->bounds + (size_t)layer * HK, rows, HK);
            break;
        case METALA_DECAY_EXP:
            be->wkv_backward(ctx, d->k_proj, GRAD(w->time_decay), GRAD(w->time_first), d->k, d->a, d->bonus, a->k, a->bonus,
                             P + w->time_decay, p->mask, p->B, p->T, H);
            break;
        case METALA_DECAY_LRU: case METALA_DECAY_ZOH: case METALA_DECAY_DSS:
            be->copy_heads_backward(ctx, d->ssm, d->a, HN, HK / HN, 1);
            be->ssm_backward(ctx, (metala_ssm)(r->decay - METALA_DECAY_LRU), GRAD(w->ssm_decay), GRAD(w->ssm_phase),
                             GRAD(w->ssm_step), d->ssm, d->ssm + HN, d->ssm + 2 * HN, P + w->ssm_decay, P + w->ssm_phase,
                             P + w->ssm_step, H, p->s.states, (size_t)c->length);
            break;
        case METALA_DECAY_SELECTIVE:
            be->selective_backward(ctx, d->z, d->p, GRAD(w->A), d->a, d->v, a->z, a->conv_out, P + w->A, rows, H, K);
            be->add(ctx, d->u, d->u, d->p, rows * H);
            break;
    }
}

// From those to the gradients of the projections, and of the parameters of decays and phases.
static void mixer_choices_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                                   const layer_gradients *d, real *grads, const pass *p) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    size_t H = p->s.H, K = p->s.K, HN = H * p->s.states;
    real *dtheta = r->phase == METALA_PHASE_DECAY ? d->ssm + HN : GRAD(w->theta), *db = d->ssm ? d->ssm + 2 * HN : NULL;
    size_t sequences = key_sequences(p);
    int one_angle, minus = r->phase == METALA_PHASE_DECAY;
    const real *theta = mixer_angles(m, layer, a, p, &one_angle);
    if (theta && p->s.complex_values)
        be->rotate_backward(ctx, d->v, dtheta, d->v, a->v, theta, p->B, p->T, H, 2, one_angle, p->position, 1);
    else if (theta) {
        be->rotate_backward(ctx, d->q, dtheta, d->q, a->q, theta, sequences, p->T, H, K, one_angle, p->position, minus);
        be->rotate_backward(ctx, d->k, dtheta, d->k, a->k, theta, sequences, p->T, H, K, one_angle, p->position, minus);
    }
    value_backward(ctx, m, layer, a, d, grads, p);
    feature_backward(ctx, m, r->query, d->q_proj, GRAD(w->C), d->q, a->q_proj, p);
    feature_backward(ctx, m, key_choice(r), d->k_proj, db, d->k, a->k_proj, p);
    decay_backward(ctx, m, layer, a, d, grads, p);
}

// Do linear maps alone add to δu? Otherwise d->u begins as zeros, for what adds its part before them.
static int only_maps_add_to_du(const metala_row *r, const sizes *s) {
    return r->value != METALA_VALUE_INPUT && !(r->self == METALA_SELF_SKIP && s->complex_values);
}

// From the gradients of the projections to that of n, returned: it may lie in d->u.
static real *mixer_input_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                                  const layer_gradients *d, real *grads, const pass *p) {
    const metala_backend *be = m->backend;
    const metala_row *r = &m->config.row;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    const sizes *s = &p->s;
    size_t rows = p->rows, D = s->D, U = s->u;
    int on = r->conv == METALA_CONV_ON, shift = r->conv == METALA_CONV_SHIFT, value = r->conv == METALA_CONV_VALUE;
    if (s->low) linear_backward(ctx, be, d->low, GRAD(w->z), GRAD(w->z_bias), d->z, a->low, P + w->z, rows, s->z, s->low, 0);
    else if (r->decay == METALA_DECAY_FIXED) add_rows(ctx, be, GRAD(w->z), d->z, rows, s->z);
    if (p->mask && s->v && !value) be->mask_rows(ctx, d->v_proj, p->mask, rows, s->v);
    real *const dy[MIXER_MAPS] = {
        [MAP_G] = d->g, [MAP_V] = d->v_proj, [MAP_Q] = d->q_proj, [MAP_K] = d->k_proj, [MAP_Z] = s->low ? d->low : d->z};
    real *const dx[MIXER_MAPS] = {                              // maps that read the same x add to the same dx
        [MAP_G] = value ? d->n : d->u, [MAP_V] = shift ? d->shift_v : d->u, [MAP_Q] = d->u, [MAP_K] = shift ? d->shift_k : d->u,
        [MAP_Z] = d->u};
    mixer_map maps[MIXER_MAPS];
    mixer_maps(maps, m, layer, a, p);
    int nothing_yet = only_maps_add_to_du(r, s);                // in d->u
    for (int i = 0; i < MIXER_MAPS; i++) {
        metala_linear_gradient layers[MIXER_MAPS];
        int same_x[MIXER_MAPS], count = maps_of_x(same_x, maps, i);
        for (int n = 0; n < count; n++) {
            const mixer_map *map = &maps[same_x[n]];
            const metala_linear_gradient l = {GRAD(map->weight), GRAD(map->bias), dy[same_x[n]], P + map->weight, map->out};
            layers[n] = l;
        }
        if (!count) continue;
        int first = nothing_yet && dx[i] == d->u;
        be->matmul_backward(ctx, dx[i], layers, count, maps[i].x, rows, maps[i].in, !first);
        if (first) nothing_yet = 0;
    }
    if (nothing_yet) be->zero(ctx, d->u, rows * U * sizeof(real));          // a token shift without a gate: nobody reads u
    if (p->mask && r->value == METALA_VALUE_INPUT) be->mask_rows(ctx, d->u, p->mask, rows, U);

    if (on) be->conv_backward(ctx, d->n, GRAD(w->conv), d->u, a->conv_in, a->token_norm, P + w->conv, NULL, p->B, p->T, D);
    if (shift) {
        be->shift_backward(ctx, d->n, GRAD(w->shift_g), d->u, a->token_norm, P + w->shift_g, NULL, p->B, p->T, D);
        be->shift_backward(ctx, d->n, GRAD(w->shift_k), d->shift_k, a->token_norm, P + w->shift_k, NULL, p->B, p->T, D);
        be->shift_backward(ctx, d->n, GRAD(w->shift_v), d->shift_v, a->token_norm, P + w->shift_v, NULL, p->B, p->T, D);
    }
    if (value) {
        be->conv_backward(ctx, d->v_proj, GRAD(w->conv), d->u, a->conv_in, a->v_proj, P + w->conv, NULL, p->B, p->T, U);
        linear_backward(ctx, be, d->n, GRAD(w->v), NULL, d->v_proj, a->token_norm, P + w->v, rows, U, D, 1);
    }
    return s->shared_u ? d->u : d->n;
}

// dx: gradient of the layer's output in, of its input out. Gradients of parameters are added to `grads`, a block laid
// out like the parameters. Read it against layer_forward from below to above: with δ for "gradient in", and for MetaLA,
//
//     δprod = W_3ᵀ δx'    δn' = W_2ᵀ δl2 + W_1ᵀ δl1    δh = δx' + rms'(δn')
//     δy = W_oᵀ δh        δg, δnorm from y = silu(g) ⊙ norm(p)    δo = δp    δq, δk, δv, δa from the scan, plus those of w v
//     δu = W_gᵀ δg + W_vᵀ δv + W_qᵀ δq + W_αᵀ δz    δn = conv'(δu)    δx = δh + rms'(δn)    and δW = δyᵀ x for each y = W x
static void layer_backward(metala_context *ctx, const metala_model *m, int layer, const activations *a,
                           const layer_gradients *d, real *grads, real *dx, const pass *p) {
    const metala_backend *be = m->backend;
    const layer_offsets *w = &m->layers[layer];
    const real *P = m->parameters;
    const sizes *s = &p->s;
    size_t rows = p->rows, D = s->D, F = s->F;

    const metala_linear_gradient swiglu[] = {{GRAD(w->l1), GRAD(w->l1_bias), NULL, P + w->l1, F},
                                             {GRAD(w->l2), GRAD(w->l2_bias), NULL, P + w->l2, F},
                                             {GRAD(w->l3), GRAD(w->l3_bias), dx, P + w->l3, D}};
    be->swiglu_backward(ctx, d->n, swiglu, a->glu_prod, d->prod, d->l1, d->l2, a->l1, a->l2, a->channel_norm, rows, D);
    be->rms_backward(ctx, dx, d->n, a->mixer_residual, a->residual_r, NULL, rows, D);        // dx is now dh

    if (!only_maps_add_to_du(&m->config.row, s)) be->zero(ctx, d->u, rows * s->u * sizeof(real));
    if (m->config.row.conv != METALA_CONV_ON) be->zero(ctx, d->n, rows * D * sizeof(real));     // which conv_backward sets
    if (d->shift_k) be->zero(ctx, d->shift_k, rows * D * sizeof(real));
    if (d->shift_v) be->zero(ctx, d->shift_v, rows * D * sizeof(real));
    if (d->ssm) be->zero(ctx, d->ssm, member_count(&m->config, PER_SSM, p->B, p->T) * sizeof(real));
    if (m->config.row.self == METALA_SELF_SKIP && s->complex_values)
        be->skip_backward(ctx, d->u, GRAD(w->skip), dx, a->conv_out, P + w->skip, rows, D);
    mixer_output_backward(ctx, m, layer, a, d, grads, dx, p);
    mixer_scan_backward(ctx, m, layer, a, d, grads, p);
    mixer_choices_backward(ctx, m, layer, a, d, grads, p);
    real *dn = mixer_input_backward(ctx, m, layer, a, d, grads, p);
    be->rms_backward(ctx, dx, dn, a->input, a->input_r, p->mask, rows, D);
}
#undef GRAD

// Lower bounds of the decays of all layers: (L,H·K) of the pass.
static size_t bounds_count(const metala_config *c) {
    sizes s = sizes_of(c);
    return c->row.decay == METALA_DECAY_BOUNDED ? times((size_t)c->layers, times(s.H, s.K)) : 0;
}

// What lives on one device cannot be computed with on another.
static int same_device(metala_context *ctx, const metala_backend *backend, const char *what) {
    if (ctx->backend == backend) return 0;
    return fail(ctx, "%s: the context's device is '%s', the model's '%s'; open the context with the backend that the model"
                " was created with", what, ctx->backend->name, backend->name);
}

static double embedding_scale(const metala_config *c) { return c->scale_embedding ? sqrt((double)c->width) : 1; }

// The numbers of a token in the caller's arrays: one, or a patch.
static size_t token_size(const metala_config *c) { return c->patch_dim ? (size_t)c->patch_dim : 1; }

// What the first layer reads: rows of the embedding, or W_p patch + b_p, where `patches` (rows,C) keeps what dW_p needs.
static void input_forward(metala_context *ctx, const metala_model *m, real *x, real *patches, const int *tokens, size_t rows) {
    const metala_backend *be = m->backend;
    const metala_config *c = &m->config;
    const real *P = m->parameters;
    size_t D = (size_t)c->width, C = (size_t)c->patch_dim;
    if (!C) {
        be->embedding_forward(ctx, x, tokens, P + m->embedding, rows, D, embedding_scale(c));
        return;
    }
    be->patch_forward(ctx, patches, tokens, rows * C);
    const metala_linear patch = {.y = x, .w = P + m->embedding, .bias = P + m->patch_bias, .out = D};
    be->matmul_forward(ctx, &patch, 1, patches, rows, C);
}

static void input_backward(metala_context *ctx, const metala_model *m, real *grads, const real *dx, const real *patches,
                           const int *tokens, size_t rows) {
    const metala_backend *be = m->backend;
    const metala_config *c = &m->config;
    size_t D = (size_t)c->width, C = (size_t)c->patch_dim;
    if (!C) be->embedding_backward(ctx, grads + m->embedding, dx, tokens, rows, D, embedding_scale(c), c->pad_token_id);
    else linear_backward(ctx, be, NULL, grads + m->embedding, grads + m->patch_bias, dx, patches, m->parameters + m->embedding,
                         rows, D, C, 0);
}

// Tokens and targets come from outside: none may reach past the vocabulary, and what is in a patch is a byte.
static int check_tokens(metala_context *ctx, const metala_config *c, const int *tokens, size_t count, int targets) {
    if (c->patch_dim && !targets) {
        for (size_t i = 0; i < count * token_size(c); i++)
            if (tokens[i] < 0 || tokens[i] > 255)
                return fail(ctx, "number %zu of the patches is %d, expected 0 to 255", i, tokens[i]);
        return 0;
    }
    for (size_t i = 0; i < count; i++)
        if ((tokens[i] < 0 || tokens[i] >= c->vocab_size) && !(targets && tokens[i] == METALA_IGNORE))
            return fail(ctx, "%s %d at place %zu: the vocabulary has 0 to %d; retrain or convert the data with the"
                        " model's vocabulary", targets ? "target" : "token", tokens[i], i, c->vocab_size - 1);
    return 0;
}

// Rows of logits that are formed at a time: with a large vocabulary they outweigh everything else.
static size_t head_rows(const metala_model *m, size_t rows) {
    size_t some = m->backend->logits_at_once / (size_t)m->config.vocab_size + 64;
    return rows < some ? rows : some;
}

// ============================================================== 9. Training: trainer, gradient, update

struct metala_trainer {
    metala_model *model;
    const metala_backend *backend;
    size_t B, T;                        // the largest batch
    metala_keep keep;
    size_t last_B, last_T;              // of the last gradient, whose activations are there
    uint64_t step;
    real *grads, *first, *second;       // gradients, AdamW's m and v, each laid out like the parameters
    real *memory;                       // all activations and their gradients
    activations *layers;
    layer_gradients d;
    real *final_input, *final_r, *final_norm, *dx, *d_final, *bounds, *dbounds;
    real *patches;                      // (rows,C)
    real *logits, *loss, *lse;          // (head_rows,N), (rows), (rows)
    int *tokens, *targets;              // the backend's memory
    uint8_t *mask;
    real *host_loss;
};

// Sets all pointers into `block` (NULL to only count) and returns how many numbers they take.
static size_t place_trainer(metala_trainer *t, real *block) {
    const metala_config *c = &t->model->config;
    size_t B = t->B, T = t->T, rows = times(B, T), D = (size_t)c->width;
    const struct part parts[] = {
        {&t->final_input, times(rows, D)}, {&t->final_r, rows}, {&t->final_norm, times(rows, D)},
        {&t->dx, times(rows, D)}, {&t->d_final, times(rows, D)}, {&t->patches, times(rows, (size_t)c->patch_dim)},
        {&t->logits, times(head_rows(t->model, rows), (size_t)c->vocab_size)}, {&t->loss, rows}, {&t->lse, rows},
        {&t->bounds, bounds_count(c)}, {&t->dbounds, bounds_count(c)},
    };
    size_t used = place_parts(block, parts, sizeof parts / sizeof *parts);
    used += place_gradients(&t->d, block ? block + used : NULL, c, B, T);
    if (used > SIZE_MAX / 64) return SIZE_MAX / 64;
    activations shared = {0};                                 // what is not kept, for each layer in turn
    enum cost least = t->keep == METALA_KEEP_ALL ? CHEAP : t->keep == METALA_KEEP_COSTLY ? COSTLY : NEEDED;
    used += place_activations(&shared, block ? block + used : NULL, c, B, T, ROOM, least - 1, 1);
    for (int l = 0; l < c->layers; l++) {
        activations a = shared;
        used += place_activations(&a, block ? block + used : NULL, c, B, T, least, NEEDED, 1);
        if (used > SIZE_MAX / 64) return SIZE_MAX / 64;
        if (block) t->layers[l] = a;
        if (block && l > 0) t->layers[l - 1].output = a.input;
    }
    if (block) t->layers[c->layers - 1].output = t->final_input;
    return used;
}

metala_memory metala_trainer_memory(const metala_backend *backend, const metala_config *config, int B, size_t T,
                                    metala_keep keep, int threads) {
    metala_memory memory = {0};
    metala_context *ctx = metala_open(backend, threads);
    metala_model *m = ctx ? model_outline(ctx, config, REAL_TYPE) : NULL;
    if (m) {
        metala_trainer t = {0};
        t.model = m, t.B = (size_t)B, t.T = T, t.keep = keep;
        sizes s = sizes_of(config);
        size_t V = s.V + s.ones, conv = times(times((size_t)B, T), s.u);
        portion p = portion_of(METALA_CHUNKWISE, (size_t)B, s.H, s.K, V, s.shared);
        size_t scan = plus(times((size_t)ctx->threads, scan_scratch(METALA_CHUNKWISE, p, T, s.K, V, 1)),
                           parts_of(p, (size_t)B, T, s.H, s.K, s.shared).count);
        memory.parameters = memory.gradients = times(m->size, sizeof(real));
        memory.moments = times(2, memory.parameters);
        size_t inputs = times(times(t.B, T), (token_size(config) + 1) * sizeof(int) + 1);     // tokens, targets, mask
        memory.activations = plus(times(place_trainer(&t, NULL), sizeof(real)), inputs);
        memory.scratch = times(conv > scan ? conv : scan, sizeof(real));
        memory.total = plus(times(4, memory.parameters), plus(memory.activations, memory.scratch));
    }
    metala_model_free(m);
    metala_close(ctx);
    return memory;
}

void metala_trainer_free(metala_trainer *t) {
    if (!t) return;
    t->backend->free(t->grads);
    t->backend->free(t->first);
    t->backend->free(t->second);
    t->backend->free(t->memory);
    t->backend->free(t->tokens);
    t->backend->free(t->targets);
    t->backend->free(t->mask);
    free(t->layers);
    free(t->host_loss);
    free(t);
}

metala_trainer *metala_trainer_create(metala_context *ctx, metala_model *model, int B, size_t T, metala_keep keep) {
    if (same_device(ctx, model->backend, "training")) return NULL;
    if (need_reals(ctx, model, "training")) return NULL;
    if (B < 1 || T < 1 || times((size_t)B, T) > INT_MAX) {
        fail(ctx, "training: the batch must have at least 1 and at most %d tokens, got %d sequences of %zu", INT_MAX, B,
             T);
        return NULL;
    }
    const metala_backend *be = model->backend;
    metala_trainer *t = calloc(1, sizeof *t);
    size_t parameter_bytes = times(model->size, sizeof(real)), rows = (size_t)B * T, numbers = 0;
    if (t) {
        t->model = model, t->backend = be, t->B = (size_t)B, t->T = T, t->keep = keep;
        numbers = place_trainer(t, NULL);
        t->layers = calloc((size_t)model->config.layers, sizeof *t->layers);
        t->host_loss = malloc(times(rows, sizeof(real)));
        t->grads = be->alloc(parameter_bytes);
        t->first = be->alloc(parameter_bytes);
        t->second = be->alloc(parameter_bytes);
        t->memory = be->alloc(times(numbers, sizeof(real)));
        t->tokens = be->alloc(times(rows, token_size(&model->config) * sizeof(int)));
        t->targets = be->alloc(times(rows, sizeof(int)));
        t->mask = be->alloc(rows);
    }
    if (!t || !t->layers || !t->host_loss || !t->grads || !t->first || !t->second || !t->memory || !t->tokens ||
        !t->targets || !t->mask) {
        fail_memory(ctx, "training", 3.0 * (double)parameter_bytes + (double)numbers * sizeof(real));
        metala_trainer_free(t);
        return NULL;
    }
    place_trainer(t, t->memory);
    return t;
}

// Loss and gradient at the output layer, some rows of logits at a time: d_final receives the gradient of final_norm.
static void head_loss(metala_context *ctx, metala_trainer *t, real *grads, size_t rows, double weight) {
    const metala_backend *be = t->backend;
    const metala_model *m = t->model;
    size_t N = (size_t)m->config.vocab_size, D = (size_t)m->config.width, most = head_rows(m, t->B * t->T);
    for (size_t row = 0; row < rows; row += most) {
        size_t n = rows - row < most ? rows - row : most;
        const real *in = t->final_norm + row * D;
        linear(ctx, m, t->logits, in, m->head, ABSENT, NULL, n, N, D);
        be->cross_entropy_forward(ctx, t->loss + row, t->lse + row, t->logits, t->targets + row, n, N);
        be->output_backward(ctx, t->d_final + row * D, grads + m->head, t->logits, t->lse + row, t->targets + row, in,
                            m->parameters + m->head, n, N, D, weight);
    }
}

int metala_trainer_zero(metala_context *ctx, metala_trainer *t) {
    t->backend->zero(ctx, t->grads, t->model->size * sizeof(real));
    return 0;
}

int metala_gradient(metala_context *ctx, metala_trainer *t, metala_form form, const int *inputs, const int *targets,
                    const uint8_t *mask, int batch, size_t T, double weight, double *loss) {
    const metala_backend *be = t->backend;
    const metala_model *m = t->model;
    const metala_config *c = &m->config;
    size_t B = (size_t)batch, rows, D = (size_t)c->width, counted = 0;
    if (same_device(ctx, be, "gradient") || need_reals(ctx, m, "gradient")) return -1;
    if (batch < 1 || T < 1 || B > t->B || T > t->T)
        return fail(ctx, "gradient: this trainer takes up to %zu sequences of %zu tokens, got %d of %zu", t->B, t->T,
                    batch, T);
    rows = B * T;
    if (check_tokens(ctx, c, inputs, rows, 0) || check_tokens(ctx, c, targets, rows, 1)) return -1;
    for (size_t row = 0; row < rows; row++) counted += targets[row] != METALA_IGNORE;
    if (!counted) return fail(ctx, "gradient: no target in this batch counts, all are %d (ignored); try a larger batch",
                               METALA_IGNORE);
    be->upload(ctx, t->tokens, inputs, rows * token_size(c) * sizeof(int));
    be->upload(ctx, t->targets, targets, rows * sizeof(int));
    if (mask) be->upload(ctx, t->mask, mask, rows);
    pass p = pass_of(c, B, T, mask ? t->mask : NULL, form, 0);
    size_t bounds = bounds_count(c);
    if (bounds) {
        be->bounds_forward(ctx, t->bounds, m->parameters + m->bounds, (size_t)c->layers, bounds / (size_t)c->layers);
        be->zero(ctx, t->dbounds, bounds * sizeof(real));
        p.bounds = t->bounds, p.dbounds = t->dbounds;
    }

    input_forward(ctx, m, t->layers[0].input, t->patches, t->tokens, rows);
    for (int l = 0; l < c->layers; l++) layer_forward(ctx, m, l, &t->layers[l], &p, NULL);
    be->rms_forward(ctx, t->final_norm, t->final_r, t->final_input, NULL, rows, D, c->norm_eps);
    head_loss(ctx, t, t->grads, rows, weight / (double)counted);
    be->zero(ctx, t->dx, rows * D * sizeof(real));
    be->rms_backward(ctx, t->dx, t->d_final, t->final_input, t->final_r, NULL, rows, D);
    for (int l = c->layers - 1; l >= 0; l--) {                // what the layer above has overwritten comes back first
        int lost = l < c->layers - 1;
        if (lost && t->keep == METALA_KEEP_COSTLY) layer_recompute(ctx, m, l, &t->layers[l], &p);
        if (lost && t->keep == METALA_KEEP_INPUTS) layer_forward(ctx, m, l, &t->layers[l], &p, NULL);
        layer_backward(ctx, m, l, &t->layers[l], &t->d, t->grads, t->dx, &p);
    }
    if (bounds)
        be->bounds_backward(ctx, t->grads + m->bounds, t->dbounds, m->parameters + m->bounds, (size_t)c->layers,
                            bounds / (size_t)c->layers);
    input_backward(ctx, m, t->grads, t->dx, t->patches, t->tokens, rows);

    be->download(ctx, t->host_loss, t->loss, rows * sizeof(real));       // a GPU's errors show here
    if (metala_context_failed(ctx)) {                         // half a gradient must not be taken for one
        metala_trainer_zero(ctx, t);
        return -1;
    }
    double sum = 0;
    for (size_t row = 0; row < rows; row++) sum += t->host_loss[row];
    if (loss) *loss = sum / (double)counted;
    t->last_B = B, t->last_T = T;
    return 0;
}

uint64_t metala_trainer_step(const metala_trainer *t) { return t->step; }

int metala_update(metala_context *ctx, metala_trainer *t, const metala_adamw *adamw, double *norm) {
    const metala_backend *be = t->backend;
    metala_model *m = t->model;
    if (same_device(ctx, be, "update") || need_reals(ctx, m, "update")) return -1;
    double length = sqrt(be->sum_squares(ctx, t->grads, m->size)), scale = 1;
    if (norm) *norm = length;
    if (metala_context_failed(ctx)) return -1;
    if (!(length <= DBL_MAX)) {
        metala_trainer_zero(ctx, t);
        return fail(ctx, "update %llu: the gradient is not finite (norm %g); the parameters are as before; use a lower"
                    " learning rate", (unsigned long long)t->step + 1, length);
    }
    if (adamw->clip_norm > 0) scale = fmin(1, adamw->clip_norm / (length + 1e-6));
    t->step++;
    m->version++;
    for (int i = 0, end; i < m->tensor_count; i = end) {      // neighbours with the same decay, which lie side by side, at once
        size_t at = m->tensors[i].offset, count = 0;
        int decay = m->tensors[i].decay;
        for (end = i; end < m->tensor_count && m->tensors[end].decay == decay; end++) count += m->tensors[end].count;
        be->adamw(ctx, m->parameters + at, t->first + at, t->second + at, t->grads + at, count, adamw, t->step, scale,
                  decay ? adamw->weight_decay : 0);
    }
    return metala_trainer_zero(ctx, t);
}

int metala_trainer_gradient(metala_context *ctx, const metala_trainer *t, const char *name, real *out) {
    const metala_tensor *tensor = find_parameter(ctx, t->model, name);
    if (!tensor) return -1;
    t->backend->download(ctx, out, t->grads + tensor->offset, tensor->count * sizeof(real));
    return metala_context_failed(ctx);
}

int metala_trainer_activation(metala_context *ctx, const metala_trainer *t, const char *name, real *out,
                              size_t *count) {
    const metala_config *c = &t->model->config;
    const real *from = NULL;
    size_t n = 0;
    int layer, used = 0;
    if (!t->last_B) return fail(ctx, "activation %s: no gradient was computed yet", name);
    if (t->keep != METALA_KEEP_ALL) return fail(ctx, "activation %s: only a trainer that keeps all has it", name);
    if (!strcmp(name, "final_norm")) {
        from = t->final_norm;
        n = member_count(c, PER_D, t->last_B, t->last_T);
    } else if (sscanf(name, "layer%8d.%n", &layer, &used) == 1 && used && layer >= 0 && layer < c->layers) {
        const activations *a = &t->layers[layer];
        if (!strcmp(name + used, "output")) {
            from = a->output;
            n = member_count(c, PER_D, t->last_B, t->last_T);
        }
        for (int i = 0; i < ACTIVATION_MEMBERS; i++)
            if (!strcmp(name + used, activation_members[i].name)) {
                from = *(real *const *)(const void *)((const char *)a + activation_members[i].member);
                n = activation_count(c, &activation_members[i], t->last_B, t->last_T);
                if (out && activation_members[i].cost == ROOM) t->backend->silu_gate_forward(ctx, a->glu_prod, a->l1, a->l2, n);
            }
    }
    if (!from || !n) return fail(ctx, "there is no activation called %s", name);
    if (count) *count = n;
    if (out) t->backend->download(ctx, out, from, n * sizeof(real));
    return metala_context_failed(ctx);
}

// ============================================================== 10. Inference: states, steps, prefill, scoring

enum { SEGMENT = 256 };                 // tokens of a sequence that go through the layers together

struct metala_state {
    const metala_model *model;
    const metala_backend *backend;
    size_t B, tokens_most;              // tokens of one sequence that the buffers hold
    uint64_t position;
    real *S;                            // (L,B,H,K,V)
    real *tails;                        // (L,…), see tail_count
    real *keys, *values;                // (L,B,room,H·K), (L,B,room,H·V) of softmax attention
    uint8_t *seen;                      // (B,room) the tokens that are not padding
    size_t room;
    real *bounds;                       // (L,H·K) lower bounds of decays, or NULL
    real *ssm;                          // (L,6,H·states) constants of complex decays, or NULL
    uint64_t ssm_version;               // of the parameters that they were computed from
    real *memory;                       // one layer's activations, used by every layer in turn
    activations a;
    real *patches;                      // (B,tokens_most,C)
    real *final_norm, *final_r, *last, *logits, *loss, *lse;
    int *tokens, *targets;
    uint8_t *mask;
    int *host_tokens, *host_targets;
    uint8_t *host_mask;
    real *host_loss;
    void *recording;                    // of a step, or NULL
    int unrecordable;                   // the device could not
    uint64_t step_version;              // of the parameters of the last step with logits, UINT64_MAX without one
    const void *step_scratch;           // the scratch memory that it used: a recording has its address
    size_t step_scratch_bytes;
};

static size_t state_count(const metala_config *c) {       // numbers in S of one sequence and layer
    sizes s = sizes_of(c);
    return c->row.decay == METALA_DECAY_SOFTMAX ? 0 : times(times(s.H, s.K), s.V + s.ones);
}

// Keys and values of one token in all layers, and whether it counts: what softmax attention keeps of it.
static size_t cache_bytes(const metala_config *c) {
    sizes s = sizes_of(c);
    size_t each = times(s.H, s.K + s.V);
    return c->row.decay == METALA_DECAY_SOFTMAX ? plus(times(times((size_t)c->layers, each), sizeof(real)), 1) : 0;
}

size_t metala_state_bytes(const metala_config *c, uint64_t tokens) {
    size_t fixed = times((size_t)c->layers, times(state_count(c) + tail_count(c), sizeof(real)));
    return plus(fixed, times(cache_bytes(c), tokens > SIZE_MAX ? SIZE_MAX : (size_t)tokens));
}

uint64_t metala_state_position(const metala_state *s) { return s->position; }

static void forget_step(metala_state *s) {
    if (s->recording) s->backend->forget(s->recording);
    s->recording = NULL, s->step_version = UINT64_MAX;
}

static void free_buffers(metala_state *s) {
    forget_step(s);
    s->backend->free(s->memory);
    s->backend->free(s->tokens);
    s->backend->free(s->targets);
    s->backend->free(s->mask);
    free(s->host_tokens);
    free(s->host_targets);
    free(s->host_mask);
    free(s->host_loss);
    s->memory = s->host_loss = NULL;
    s->tokens = s->targets = s->host_tokens = s->host_targets = NULL;
    s->mask = s->host_mask = NULL;
    s->tokens_most = 0;
}

void metala_state_free(metala_state *s) {
    if (!s) return;
    free_buffers(s);
    s->backend->free(s->S);
    s->backend->free(s->tails);
    s->backend->free(s->keys);
    s->backend->free(s->values);
    s->backend->free(s->seen);
    s->backend->free(s->bounds);
    s->backend->free(s->ssm);
    free(s);
}

// Room for `tokens` of softmax attention, what is there included.
static int make_room(metala_context *ctx, metala_state *s, size_t tokens) {
    const metala_backend *be = s->backend;
    sizes z = sizes_of(&s->model->config);
    size_t HK = z.H * z.K, HV = z.H * z.V, LB = (size_t)s->model->config.layers * s->B;
    size_t room = 2 * s->room, held = (size_t)s->position;
    if (tokens <= s->room || !cache_bytes(&s->model->config)) return 0;
    if (room < tokens) room = round_up(tokens, SEGMENT);
    real *keys = be->alloc(times(times(LB, room), times(HK, sizeof(real))));
    real *values = be->alloc(times(times(LB, room), times(HV, sizeof(real))));
    uint8_t *seen = be->alloc(times(s->B, room));
    if (!keys || !values || !seen) {
        be->free(keys);
        be->free(values);
        be->free(seen);
        return fail_memory(ctx, "the keys and values of softmax attention",
                           (double)room * (double)s->B * (double)cache_bytes(&s->model->config));
    }
    for (size_t i = 0; i < LB && s->room; i++) {
        be->copy(ctx, keys + i * room * HK, s->keys + i * s->room * HK, held * HK * sizeof(real));
        be->copy(ctx, values + i * room * HV, s->values + i * s->room * HV, held * HV * sizeof(real));
        if (i < s->B) be->copy(ctx, seen + i * room, s->seen + i * s->room, held);
    }
    be->free(s->keys);
    be->free(s->values);
    be->free(s->seen);
    s->keys = keys, s->values = values, s->seen = seen, s->room = room;
    return 0;
}

// Sets the pointers of a state's buffers for n tokens of each sequence, in a block of memory, and returns how many numbers
// that takes; block may be NULL.
static size_t place_state(metala_state *s, real *block, size_t n) {
    const metala_config *c = &s->model->config;
    size_t rows = times(s->B, n), D = (size_t)c->width, logits = head_rows(s->model, rows);
    if (logits < s->B) logits = s->B;
    const struct part parts[] = {
        {&s->patches, times(rows, (size_t)c->patch_dim)}, {&s->final_norm, times(rows, D)}, {&s->final_r, rows},
        {&s->loss, rows}, {&s->lse, rows}, {&s->last, times(s->B, D)}, {&s->logits, times(logits, (size_t)c->vocab_size)},
    };
    size_t used = place_parts(block, parts, sizeof parts / sizeof *parts);
    used = plus(used, place_activations(&s->a, block ? block + used : NULL, c, s->B, n, ROOM, NEEDED, 0));
    if (block) s->a.output = s->a.input;                   // the residual stream is updated in place
    return used;
}

// Buffers for n tokens of each sequence; what is there already is kept when it is large enough.
static int reserve(metala_context *ctx, metala_state *s, size_t n) {
    if (n <= s->tokens_most) return 0;
    const metala_backend *be = s->backend;
    const metala_config *c = &s->model->config;
    size_t rows = times(s->B, n), numbers = place_state(s, NULL, n);
    free_buffers(s);
    s->memory = be->alloc(times(numbers, sizeof(real)));
    s->tokens = be->alloc(times(rows, token_size(c) * sizeof(int)));
    s->targets = be->alloc(times(rows, sizeof(int)));
    s->mask = be->alloc(rows);
    s->host_tokens = malloc(times(rows, token_size(c) * sizeof(int)));
    s->host_targets = malloc(times(rows, sizeof(int)));
    s->host_mask = malloc(rows);
    s->host_loss = malloc(times(rows, sizeof(real)));
    if (!s->memory || !s->tokens || !s->targets || !s->mask || !s->host_tokens || !s->host_targets || !s->host_mask ||
        !s->host_loss) {
        free_buffers(s);
        return fail_memory(ctx, "a state's buffers", (double)numbers * sizeof(real));
    }
    memset(&s->a, 0, sizeof s->a);
    place_state(s, s->memory, n);
    s->tokens_most = n;
    return 0;
}

metala_state *metala_state_create(metala_context *ctx, const metala_model *model, int B) {
    if (B < 1) {
        fail(ctx, "state: the number of sequences must be at least 1, got %d", B);
        return NULL;
    }
    if (same_device(ctx, model->backend, "state")) return NULL;
    metala_state *s = calloc(1, sizeof *s);
    size_t bytes = times((size_t)B, metala_state_bytes(&model->config, 0)), bounds = bounds_count(&model->config);
    size_t ssm = times((size_t)model->config.layers, member_count(&model->config, PER_SSM, 1, 1));
    if (s) {
        const metala_config *c = &model->config;
        s->model = model, s->backend = model->backend, s->B = (size_t)B;
        size_t count = times((size_t)c->layers, s->B);
        s->S = s->backend->alloc(times(times(count, state_count(c)), sizeof(real)) + 1);   // 1: never of nothing
        s->tails = s->backend->alloc(times(times(count, tail_count(c)), sizeof(real)) + 1);
        if (bounds) s->bounds = s->backend->alloc(times(bounds, sizeof(real)));
        if (ssm) s->ssm = s->backend->alloc(times(ssm, sizeof(real)));
        s->ssm_version = s->step_version = UINT64_MAX;
    }
    if (!s || !s->S || !s->tails || (bounds && !s->bounds) || (ssm && !s->ssm)) {
        fail_memory(ctx, "a state", (double)bytes);
        metala_state_free(s);
        return NULL;
    }
    if (reserve(ctx, s, 1)) {
        metala_state_free(s);
        return NULL;
    }
    return s;
}

static size_t all_states(const metala_state *s) { return (size_t)s->model->config.layers * s->B; }

int metala_state_reset(metala_context *ctx, metala_state *s) {
    const metala_config *c = &s->model->config;
    s->backend->zero(ctx, s->S, all_states(s) * state_count(c) * sizeof(real));
    s->backend->zero(ctx, s->tails, all_states(s) * tail_count(c) * sizeof(real));
    s->position = 0;
    return 0;
}

int metala_state_copy(metala_context *ctx, metala_state *to, const metala_state *from) {
    const metala_config *c = &from->model->config;
    if (to->model != from->model || to->B != from->B)
        return fail(ctx, "state: a copy needs the same model and %zu sequences, the target has %zu%s", from->B, to->B,
                    to->model != from->model ? " of another model" : "");
    to->position = 0;
    if (make_room(ctx, to, from->room)) return -1;
    for (size_t i = 0; i < all_states(from) && from->room; i++) {
        sizes s = sizes_of(c);
        size_t HK = s.H * s.K, HV = s.H * s.V, held = (size_t)from->position;
        from->backend->copy(ctx, to->keys + i * to->room * HK, from->keys + i * from->room * HK, held * HK * sizeof(real));
        from->backend->copy(ctx, to->values + i * to->room * HV, from->values + i * from->room * HV,
                            held * HV * sizeof(real));
        if (i < from->B) from->backend->copy(ctx, to->seen + i * to->room, from->seen + i * from->room, held);
    }
    from->backend->copy(ctx, to->S, from->S, all_states(from) * state_count(c) * sizeof(real));
    from->backend->copy(ctx, to->tails, from->tails, all_states(from) * tail_count(c) * sizeof(real));
    to->position = from->position;
    return 0;
}

// The tensors of one layer in a state's file, number `which` of STATE_TENSORS: its name, and its shape, of which the first is
// 0 where the row has no such thing. Returns where the state has it, or NULL.
enum { STATE_TENSORS = 4 };
static real *state_tensor(const metala_state *s, int layer, int which, metala_tensor *t) {
    static const char *const names[STATE_TENSORS] = {"state", "conv_state", "keys", "values"};
    const metala_config *c = &s->model->config;
    sizes z = sizes_of(c);
    int shift = c->row.conv == METALA_CONV_SHIFT, softmax = c->row.decay == METALA_DECAY_SOFTMAX;
    size_t l = (size_t)layer, channels = which == 3 ? z.V : z.K;
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s.%d", shift && which == 1 ? "shift_state" : names[which], layer);
    t->dtype = REAL_TYPE;
    const size_t shapes[STATE_TENSORS][4] = {{s->B, z.H, z.K, z.V + z.ones}, {s->B, tail_width(c), METALA_CONV, 0},
                                             {s->B, (size_t)s->position, z.H, channels},
                                             {s->B, (size_t)s->position, z.H, channels}};
    int there = which == 0 ? !softmax : which == 1 ? tail_width(c) > 0 : softmax && s->position > 0;
    t->ndim = which == 1 ? 3 : 4;
    t->count = 1;
    for (int d = 0; d < t->ndim; d++) t->count *= t->shape[d] = shapes[which][d];
    if (shift && which == 1) t->ndim = 2, t->shape[1] = METALA_CONV * z.D;
    if (!there) {
        t->count = t->shape[0] = 0;
        return NULL;
    }
    return which == 0 ? s->S + l * s->B * state_count(c) : which == 1 ? s->tails + l * s->B * tail_count(c)
         : (which == 2 ? s->keys : s->values) + l * s->B * s->room * z.H * channels;
}

// The authors' cache has the convolution's inputs as (B,D,4), ours is (B,4,D).
static void swap_tail(real *to, const real *from, size_t B, size_t rows, size_t columns) {
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++) to[(b * columns + j) * rows + i] = from[(b * rows + i) * columns + j];
}

// Copies a tensor of a layer out to `host`, in the authors' layout; or in from it, with `work` as large as the tensor.
static int move_state(metala_context *ctx, const metala_state *s, int layer, int which, real *host, int in) {
    const metala_backend *be = s->backend;
    metala_tensor t;
    real *at = state_tensor(s, layer, which, &t), *swapped = NULL;
    size_t D = t.shape[1], row = t.count / s->B, stride = which < 2 ? row : row / (size_t)s->position * s->room;
    int swap = which == 1 && t.ndim == 3;
    if (swap && !(swapped = malloc(t.count * sizeof(real))))
        return fail_memory(ctx, "a copy of the convolution's state", (double)t.count * sizeof(real));
    real *outside = swap ? swapped : host;
    if (swap && in) swap_tail(swapped, host, s->B, D, METALA_CONV);
    for (size_t b = 0; b < s->B; b++) {
        if (in) be->upload(ctx, at + b * stride, outside + b * row, row * sizeof(real));
        else be->download(ctx, outside + b * row, at + b * stride, row * sizeof(real));
    }
    if (swap && !in) swap_tail(host, swapped, s->B, METALA_CONV, D);
    free(swapped);
    return metala_context_failed(ctx);
}

int metala_state_get(metala_context *ctx, const metala_state *s, const char *name, real *out) {
    for (int l = 0; l < s->model->config.layers; l++)
        for (int which = 0; which < STATE_TENSORS; which++) {
            metala_tensor t;
            state_tensor(s, l, which, &t);
            if (t.count && !strcmp(name, t.name)) return move_state(ctx, s, l, which, out, 0);
        }
    return fail(ctx, "a state has no tensor called %s", name);
}

// From the tokens, which are with the device, through all layers to final_norm.
static void run_layers(metala_context *ctx, metala_state *s, metala_form form, size_t n, int masked) {
    const metala_backend *be = s->backend;
    const metala_model *m = s->model;
    const metala_config *c = &m->config;
    size_t rows = s->B * n, D = (size_t)c->width;
    pass p = pass_of(c, s->B, n, masked ? s->mask : NULL, form, s->position);
    size_t bounds = bounds_count(c), L = (size_t)c->layers;
    if (bounds) be->bounds_forward(ctx, s->bounds, m->parameters + m->bounds, L, bounds / L);
    p.bounds = s->bounds;
    p.ssm_ready = s->ssm_version == m->version;
    input_forward(ctx, m, s->a.input, s->patches, s->tokens, rows);
    for (size_t l = 0; l < L; l++) {
        size_t keys = s->room * p.s.H * p.s.K, values = s->room * p.s.H * p.s.V;
        memory_of_layer past = {s->S + l * s->B * state_count(c), s->tails + l * s->B * tail_count(c), NULL, NULL, s->seen,
                                s->room};
        if (!tail_count(c)) past.tail = NULL;
        if (s->ssm) s->a.ssm = s->ssm + l * member_count(c, PER_SSM, 1, 1);
        if (s->keys) past.keys = s->keys + l * s->B * keys, past.values = s->values + l * s->B * values;
        layer_forward(ctx, m, (int)l, &s->a, &p, &past);
    }
    be->rms_forward(ctx, s->final_norm, s->final_r, s->a.output, NULL, rows, D, c->norm_eps);
}

// Reads one segment of n <= tokens_most tokens (already in the host's buffers); leaves final_norm.
static int read_segment(metala_context *ctx, metala_state *s, metala_form form, size_t n, int masked) {
    const metala_backend *be = s->backend;
    size_t rows = s->B * n;
    be->upload(ctx, s->tokens, s->host_tokens, rows * token_size(&s->model->config) * sizeof(int));
    if (masked) be->upload(ctx, s->mask, s->host_mask, rows);
    run_layers(ctx, s, form, n, masked);
    if (metala_context_failed(ctx)) return -1;
    s->ssm_version = s->model->version;
    s->position += n;
    return 0;
}

// What a reading needs before it starts: arguments that are in range, and memory.
static int ready_to_read(metala_context *ctx, metala_state *s, const int *tokens, const int *targets, size_t T) {
    const metala_config *c = &s->model->config;
    if (T < 1) return fail(ctx, "state: no tokens to read");
    if (same_device(ctx, s->backend, "state")) return -1;
    if (check_tokens(ctx, c, tokens, s->B * T, 0)) return -1;
    if (targets && check_tokens(ctx, c, targets, s->B * T, 1)) return -1;
    return reserve(ctx, s, T < SEGMENT ? T : SEGMENT) || make_room(ctx, s, plus((size_t)s->position, T)) ? -1 : 0;
}

// Reads T tokens in segments. `logits` (B,T,N) of all positions, `last` (B,N) of the last one, or targets to score;
// each may be NULL.
static int read_tokens(metala_context *ctx, metala_state *s, metala_form form, const int *tokens, const uint8_t *mask,
                       size_t T, real *logits, real *last, const int *targets, double *nats, size_t *counted) {
    const metala_backend *be = s->backend;
    const metala_model *m = s->model;
    size_t N = (size_t)m->config.vocab_size, D = (size_t)m->config.width, B = s->B, C = token_size(&m->config);
    if (ready_to_read(ctx, s, tokens, targets, T)) return -1;
    int masked = mask || cache_bytes(&m->config);             // what is kept of every token needs a mask
    for (size_t t0 = 0; t0 < T; t0 += SEGMENT) {
        size_t n = T - t0 < SEGMENT ? T - t0 : SEGMENT, rows = B * n;
        for (size_t b = 0; b < B; b++) {
            memcpy(s->host_tokens + b * n * C, tokens + (b * T + t0) * C, n * C * sizeof(int));
            if (mask) memcpy(s->host_mask + b * n, mask + b * T + t0, n);
            else if (masked) memset(s->host_mask + b * n, 1, n);
            if (targets) memcpy(s->host_targets + b * n, targets + b * T + t0, n * sizeof(int));
        }
        if (read_segment(ctx, s, form, n, masked)) return -1;
        size_t most = head_rows(m, rows);
        for (size_t b = 0; b < B && logits; b++)
            for (size_t t = 0; t < n; t += most) {
                size_t count = n - t < most ? n - t : most;
                linear(ctx, m, s->logits, s->final_norm + (b * n + t) * D, m->head, ABSENT, NULL, count, N, D);
                be->download(ctx, logits + (b * T + t0 + t) * N, s->logits, count * N * sizeof(real));
            }
        if (last && t0 + n == T) {
            for (size_t b = 0; b < B; b++)
                be->copy(ctx, s->last + b * D, s->final_norm + (b * n + n - 1) * D, D * sizeof(real));
            linear(ctx, m, s->logits, s->last, m->head, ABSENT, NULL, B, N, D);
            be->download(ctx, last, s->logits, B * N * sizeof(real));
        }
        if (targets) {
            be->upload(ctx, s->targets, s->host_targets, rows * sizeof(int));
            for (size_t row = 0; row < rows; row += most) {
                size_t count = rows - row < most ? rows - row : most;
                linear(ctx, m, s->logits, s->final_norm + row * D, m->head, ABSENT, NULL, count, N, D);
                be->cross_entropy_forward(ctx, s->loss + row, s->lse + row, s->logits, s->targets + row, count, N);
            }
            be->download(ctx, s->host_loss, s->loss, rows * sizeof(real));
            for (size_t row = 0; row < rows; row++)
                if (s->host_targets[row] != METALA_IGNORE) {
                    *nats += s->host_loss[row];
                    ++*counted;
                }
        }
    }
    return metala_context_failed(ctx);
}

int metala_forward(metala_context *ctx, metala_state *s, metala_form form, const int *tokens, const uint8_t *mask,
                   size_t T, real *logits) {
    return read_tokens(ctx, s, form, tokens, mask, T, logits, NULL, NULL, NULL, NULL);
}

int metala_prefill(metala_context *ctx, metala_state *s, const int *tokens, const uint8_t *mask, size_t T,
                   real *logits) {
    return read_tokens(ctx, s, METALA_CHUNKWISE, tokens, mask, T, NULL, logits, NULL, NULL, NULL);
}

int metala_score(metala_context *ctx, metala_state *s, metala_form form, const int *tokens, const int *targets,
                 const uint8_t *mask, size_t T, double *nats, size_t *counted) {
    return read_tokens(ctx, s, form, tokens, mask, T, NULL, NULL, targets, nats, counted);
}

// Does a step depend on how many tokens came before, other than by the state?
static int counts_tokens(const metala_row *r) {
    return r->phase != METALA_PHASE_OFF || r->decay == METALA_DECAY_SOFTMAX || r->decay == METALA_DECAY_EXP;
}

// From the tokens of one step, which are with the device, to its logits.
static void step_kernels(metala_context *ctx, metala_state *s, metala_form form) {
    const metala_config *c = &s->model->config;
    run_layers(ctx, s, form, 1, 0);
    linear(ctx, s->model, s->logits, s->final_norm, s->model->head, ABSENT, NULL, s->B, (size_t)c->vocab_size, (size_t)c->width);
}

// A step of small kernels, which may take a GPU longer to start than to run, and which are the same the next time: so it is
// recorded and replayed. The first step is an ordinary one, and so is the first after the parameters or the scratch memory
// have changed; what it needed is there for the second, which is recorded.
static int recorded_step(metala_context *ctx, metala_state *s, metala_form form, const int *tokens, real *logits) {
    const metala_backend *be = s->backend;
    const metala_model *m = s->model;
    if (ready_to_read(ctx, s, tokens, NULL, 1)) return -1;
    be->upload(ctx, s->tokens, tokens, s->B * token_size(&m->config) * sizeof(int));
    if (metala_context_failed(ctx)) return -1;
    int same = s->step_version == m->version && s->step_scratch == ctx->scratch && s->step_scratch_bytes <= ctx->scratch_bytes;
    if (!same) forget_step(s);
    if (same && !s->recording && !s->unrecordable) {
        if (!be->begin_recording(ctx)) {
            step_kernels(ctx, s, form);
            s->recording = be->end_recording(ctx);
        }
        if (!s->recording || ctx->failed) {                   // then nothing has been done yet
            forget_step(s);
            s->unrecordable = 1;
            metala_context_failed(ctx);
        }
    }
    if (s->recording) be->replay(ctx, s->recording);
    else step_kernels(ctx, s, form);
    be->download(ctx, logits, s->logits, s->B * (size_t)m->config.vocab_size * sizeof(real));
    if (metala_context_failed(ctx)) {
        forget_step(s);
        return -1;
    }
    s->step_version = s->ssm_version = m->version;
    s->step_scratch = ctx->scratch, s->step_scratch_bytes = ctx->scratch_bytes;
    s->position++;
    return 0;
}

int metala_step(metala_context *ctx, metala_state *s, const int *tokens, real *logits) {
    const metala_config *c = &s->model->config;
    sizes z = sizes_of(c);                                    // of narrow heads, the chunkwise form takes many at a time
    metala_form form = is_narrow(z.K, z.V + z.ones) ? METALA_CHUNKWISE : METALA_RECURRENT;
    if (logits && s->backend->begin_recording && !counts_tokens(&c->row)) return recorded_step(ctx, s, form, tokens, logits);
    return read_tokens(ctx, s, form, tokens, NULL, 1, NULL, logits, NULL, NULL, NULL);
}

// ============================================================== 11. Files: safetensors, configuration, models, states

// A safetensors file: 8 bytes little-endian length n, n bytes of JSON
//     {"__metadata__": {"key": "value", …}, "name": {"dtype": "F32", "shape": [2,3], "data_offsets": [0,24]}, …}
// and the tensors' bytes, little-endian, without holes. Nothing in a file is trusted before it has been checked.

static const struct { const char *name; size_t bytes; } dtypes[] = {      // in the order of metala_dtype
    {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4}, {"U32", 4}, {"I16", 2},
    {"U16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

size_t metala_dtype_bytes(metala_dtype dtype) { return dtypes[dtype].bytes; }
const char *metala_dtype_name(metala_dtype dtype) { return dtypes[dtype].name; }

struct metala_file {
    FILE *stream;
    char *path;
    uint64_t data_start;                 // bytes
    metala_tensor *tensors;              // sorted by offset
    size_t count;
    char **keys, **values;               // metadata
    size_t pairs;
};

// ---- JSON, as much of it as these headers and config.json contain.

typedef struct {
    const char *at, *end;
    const char *problem;                 // the first one found
} json;

static int json_fail(json *j, const char *problem) {
    if (!j->problem) j->problem = problem;
    return -1;
}

static void json_space(json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) j->at++;
}

// Takes the character c when it comes next.
static int json_take(json *j, char c) {
    json_space(j);
    if (j->at >= j->end || *j->at != c) return 0;
    j->at++;
    return 1;
}

static int json_hex(json *j, unsigned *code) {
    *code = 0;
    for (int i = 0; i < 4; i++) {
        char c = j->at < j->end ? *j->at++ : 0;
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                  : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return json_fail(j, "a \\u escape without four hexadecimal digits");
        *code = *code * 16 + (unsigned)digit;
    }
    return 0;
}

static void put_utf8(char **to, unsigned code) {
    char *p = *to;
    if (code < 0x80) *p++ = (char)code;
    else if (code < 0x800) *p++ = (char)(0xC0 | code >> 6), *p++ = (char)(0x80 | (code & 63));
    else if (code < 0x10000)
        *p++ = (char)(0xE0 | code >> 12), *p++ = (char)(0x80 | (code >> 6 & 63)), *p++ = (char)(0x80 | (code & 63));
    else
        *p++ = (char)(0xF0 | code >> 18), *p++ = (char)(0x80 | (code >> 12 & 63)),
        *p++ = (char)(0x80 | (code >> 6 & 63)), *p++ = (char)(0x80 | (code & 63));
    *to = p;
}

// A string, in memory of its own; NULL on failure.
static char *json_string(json *j) {
    if (!json_take(j, '"')) {
        json_fail(j, "a string expected");
        return NULL;
    }
    const char *close = j->at;
    while (close < j->end && *close != '"') close += *close == '\\' ? 2 : 1;
    char *text = close < j->end ? malloc((size_t)(close - j->at) + 1) : NULL, *to = text;
    if (!text) {
        json_fail(j, close < j->end ? "out of memory" : "a string without end");
        return NULL;
    }
    while (j->at < close) {
        unsigned char c = (unsigned char)*j->at++;
        unsigned code, low;
        if (c < ' ') json_fail(j, "a control character in a string");
        if (c != '\\') {
            *to++ = (char)c;
            continue;
        }
        static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        char escape = *j->at++;
        const char *known = escape ? strchr(escapes, escape) : NULL;
        if (known) *to++ = meanings[known - escapes];
        else if (escape != 'u') json_fail(j, "an unknown escape in a string");
        else if (!json_hex(j, &code)) {
            if (code >= 0xD800 && code < 0xDC00) {                   // a pair of surrogates
                if (close - j->at < 6 || j->at[0] != '\\' || j->at[1] != 'u') json_fail(j, "half a surrogate pair");
                else {
                    j->at += 2;
                    if (!json_hex(j, &low) && (low < 0xDC00 || low > 0xDFFF)) json_fail(j, "half a surrogate pair");
                    else code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
                }
            }
            if (code == 0 || code > 0x10FFFF) json_fail(j, "a NUL or invalid character in a string");
            if (!j->problem) put_utf8(&to, code);
        }
        if (j->problem) break;
    }
    if (j->problem || j->at != close) {
        json_fail(j, "a malformed string");
        free(text);
        return NULL;
    }
    *to = 0;
    j->at = close + 1;
    return text;
}

// A whole number below 2^63.
static int json_whole(json *j, uint64_t *value) {
    json_space(j);
    if (j->at >= j->end || *j->at < '0' || *j->at > '9') return json_fail(j, "a whole number expected");
    for (*value = 0; j->at < j->end && *j->at >= '0' && *j->at <= '9'; j->at++) {
        if (*value > (INT64_MAX - 9) / 10) return json_fail(j, "a number that is too large");
        *value = *value * 10 + (uint64_t)(*j->at - '0');
    }
    if (j->at < j->end && (*j->at == '.' || *j->at == 'e' || *j->at == 'E'))
        return json_fail(j, "a whole number expected");
    return 0;
}

// Skips any value. Brackets are counted, not matched by recursion: depth costs nothing.
static int json_skip(json *j) {
    size_t depth = 0;
    do {
        json_space(j);
        if (j->at >= j->end) return json_fail(j, "the text ends inside a value");
        char c = *j->at;
        if (c == '"') {
            char *text = json_string(j);
            if (!text) return -1;
            free(text);
        } else {
            j->at++;
            if (c == '{' || c == '[') depth++;
            else if (c == '}' || c == ']') {
                if (!depth) return json_fail(j, "a value expected");
                depth--;
            } else if (c == ',' || c == ':') {
                if (!depth) return json_fail(j, "a value expected");
                continue;
            } else
                while (j->at < j->end && !strchr(",:{}[]\" \t\r\n", *j->at)) j->at++;
        }
    } while (depth);
    return 0;
}

static int add_pair(metala_file *f, json *j, char *key, char *value) {
    if ((f->pairs & (f->pairs + 1)) == 0) {                          // room grows by doubling
        size_t room = 2 * f->pairs + 1;
        char **keys = realloc(f->keys, room * sizeof *keys);
        if (keys) f->keys = keys;
        char **values = keys ? realloc(f->values, room * sizeof *values) : NULL;
        if (values) f->values = values;
        if (!values) {
            free(key);
            free(value);
            return json_fail(j, "out of memory");
        }
    }
    f->keys[f->pairs] = key;
    f->values[f->pairs++] = value;
    return 0;
}

// The members of an object as pairs of strings. Strings only (strict), or any scalars as they are written, others
// skipped (config.json).
static int json_pairs(json *j, metala_file *f, int strict) {
    if (!json_take(j, '{')) return json_fail(j, "an object expected");
    if (json_take(j, '}')) return 0;
    do {
        char *key = json_string(j), *value = NULL;
        if (!key) return -1;
        if (!json_take(j, ':')) json_fail(j, "':' expected");
        json_space(j);
        if (strict || (j->at < j->end && *j->at == '"')) {
            if (!j->problem) value = json_string(j);
        } else if (!j->problem) {
            const char *start = j->at;
            if (!json_skip(j) && *start != '{' && *start != '[') {
                value = calloc(1, (size_t)(j->at - start) + 1);
                if (value) memcpy(value, start, (size_t)(j->at - start));
                else json_fail(j, "out of memory");
            }
        }
        if (j->problem || !value) {
            free(key);
            if (j->problem) return -1;
        } else if (add_pair(f, j, key, value)) return -1;
    } while (json_take(j, ','));
    return json_take(j, '}') ? 0 : json_fail(j, "',' or '}' expected");
}

static int json_tensor(json *j, metala_tensor *t, uint64_t *begin, uint64_t *end) {
    int has_dtype = 0, has_shape = 0, has_offsets = 0;
    if (!json_take(j, '{')) return json_fail(j, "a tensor's object expected");
    do {
        char *key = json_string(j);
        if (!key) return -1;
        int dtype = !strcmp(key, "dtype"), shape = !strcmp(key, "shape"), offsets = !strcmp(key, "data_offsets");
        free(key);
        if (!json_take(j, ':')) return json_fail(j, "':' expected");
        if (dtype) {
            char *name = json_string(j);
            if (!name) return -1;
            int i = 0;
            while (i < DTYPES && strcmp(name, dtypes[i].name)) i++;
            free(name);
            if (i == DTYPES) return json_fail(j, "an unknown dtype (F64, F32, F16, BF16 and integers are known)");
            t->dtype = (metala_dtype)i;
            has_dtype++;
        } else if (shape) {
            if (!json_take(j, '[')) return json_fail(j, "'[' expected");
            t->count = 1;
            t->ndim = 0;
            if (!json_take(j, ']')) {
                do {
                    uint64_t n;
                    if (json_whole(j, &n)) return -1;
                    if (t->ndim == 8) return json_fail(j, "a tensor of more than 8 dimensions");
                    if (n > SIZE_MAX / 16 || (n && t->count > SIZE_MAX / 16 / n))
                        return json_fail(j, "a shape whose product is too large");
                    t->shape[t->ndim++] = (size_t)n;
                    t->count *= (size_t)n;
                } while (json_take(j, ','));
                if (!json_take(j, ']')) return json_fail(j, "',' or ']' expected");
            }
            has_shape++;
        } else if (offsets) {
            if (!json_take(j, '[') || json_whole(j, begin) || !json_take(j, ',') || json_whole(j, end) ||
                !json_take(j, ']'))
                return json_fail(j, "data_offsets must be two whole numbers");
            has_offsets++;
        } else return json_fail(j, "an unknown member in a tensor's object");
    } while (json_take(j, ','));
    if (!json_take(j, '}')) return json_fail(j, "',' or '}' expected");
    if (has_dtype != 1 || has_shape != 1 || has_offsets != 1)
        return json_fail(j, "a tensor needs dtype, shape and data_offsets, once each");
    return 0;
}

// ---- Reading

void metala_file_close(metala_file *f) {
    if (!f) return;
    if (f->stream) fclose(f->stream);
    for (size_t i = 0; i < f->pairs; i++) {
        free(f->keys[i]);
        free(f->values[i]);
    }
    free(f->keys);
    free(f->values);
    free(f->tensors);
    free(f->path);
    free(f);
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const metala_tensor *const *)a)->name, (*(const metala_tensor *const *)b)->name);
}

static int by_offset(const void *a, const void *b) {
    const metala_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->count < y->count ? -1 : x->count > y->count;           // empty tensors before what starts there
}

static int parse_header(metala_context *ctx, metala_file *f, const char *text, size_t length, uint64_t data_bytes) {
    json j = {text, text + length, NULL};
    size_t room = 0;
    char name[128] = "";
    int metadata_seen = 0;
    if (!json_take(&j, '{')) json_fail(&j, "the header must be a JSON object");
    if (!j.problem && !json_take(&j, '}')) {
        do {
            char *key = json_string(&j);
            if (!key) break;
            size_t key_length = strlen(key);
            snprintf(name, sizeof name, "%s", key);
            int metadata = !strcmp(key, "__metadata__");
            free(key);
            if (!json_take(&j, ':')) json_fail(&j, "':' expected");
            else if (metadata) {
                if (metadata_seen++) json_fail(&j, "__metadata__ twice");
                else json_pairs(&j, f, 1);
            } else if (key_length >= sizeof f->tensors->name) json_fail(&j, "a tensor name of more than 127 bytes");
            else {
                if (f->count == room) {
                    room = 2 * room + 16;
                    metala_tensor *more = realloc(f->tensors, room * sizeof *more);
                    if (!more) return fail_memory(ctx, f->path, (double)room * sizeof *more);
                    f->tensors = more;
                }
                metala_tensor *t = &f->tensors[f->count];
                uint64_t begin = 0, end = 0;
                memset(t, 0, sizeof *t);
                memcpy(t->name, name, sizeof name);
                if (json_tensor(&j, t, &begin, &end)) break;
                if (begin > end || end > data_bytes)
                    return fail(ctx, "%s: tensor %s: data_offsets [%llu,%llu] do not lie in the %llu bytes of data that"
                                " the file has; it may be cut short", f->path, name, (unsigned long long)begin,
                                (unsigned long long)end, (unsigned long long)data_bytes);
                if (end - begin != (uint64_t)t->count * dtypes[t->dtype].bytes)
                    return fail(ctx, "%s: tensor %s: %zu numbers of type %s take %llu bytes, data_offsets give %llu",
                                f->path, name, t->count, dtypes[t->dtype].name,
                                (unsigned long long)t->count * dtypes[t->dtype].bytes,
                                (unsigned long long)(end - begin));
                t->offset = (size_t)begin;
                f->count++;
            }
        } while (!j.problem && json_take(&j, ','));
        if (!j.problem && !json_take(&j, '}')) json_fail(&j, "',' or '}' expected");
    }
    json_space(&j);
    if (!j.problem && j.at != j.end) json_fail(&j, "text after the end");
    if (j.problem)
        return fail(ctx, "%s: bad header at byte %zu%s%s: %s; this is not a safetensors file, or it is damaged", f->path,
                    (size_t)(j.at - text) + 8, *name ? ", near " : "", name, j.problem);

    if (f->count) qsort(f->tensors, f->count, sizeof *f->tensors, by_offset);
    uint64_t at = 0;
    for (size_t i = 0; i < f->count; i++) {
        const metala_tensor *t = &f->tensors[i];
        if (t->offset != at)
            return fail(ctx, "%s: tensor %s starts at byte %zu of the data, expected %llu: tensors %s", f->path, t->name,
                        t->offset, (unsigned long long)at, t->offset < at ? "overlap" : "leave a hole");
        at += (uint64_t)t->count * dtypes[t->dtype].bytes;
    }
    if (at != data_bytes)
        return fail(ctx, "%s: tensors cover %llu bytes, the file has %llu bytes of data", f->path,
                    (unsigned long long)at, (unsigned long long)data_bytes);
    const metala_tensor **sorted = malloc((f->count + 1) * sizeof *sorted);
    if (!sorted) return fail_memory(ctx, f->path, (double)f->count * sizeof *sorted);
    for (size_t i = 0; i < f->count; i++) sorted[i] = &f->tensors[i];
    qsort(sorted, f->count, sizeof *sorted, by_name);
    const char *twice = NULL;
    for (size_t i = 1; i < f->count; i++)
        if (!strcmp(sorted[i - 1]->name, sorted[i]->name)) twice = sorted[i]->name;
    free(sorted);
    return twice ? fail(ctx, "%s: tensor %s is there twice", f->path, twice) : 0;
}

static char *copy_text(const char *text) {
    char *copy = malloc(strlen(text) + 1);
    return copy ? strcpy(copy, text) : NULL;
}

// The size of a file that is open for reading, or a failure.
static int file_size(metala_context *ctx, FILE *stream, const char *path, uint64_t *size) {
    int c = getc(stream);                                            // opening a folder works, reading it does not
    if (c == EOF && ferror(stream)) return fail(ctx, "%s: cannot be read; is it a file?", path);
    long end = fseek(stream, 0, SEEK_END) ? -1 : ftell(stream);
    if (end < 0 || end == LONG_MAX) return fail(ctx, "%s: its size cannot be told; is it a regular file?", path);
    rewind(stream);
    *size = (uint64_t)end;
    return 0;
}

static int open_and_parse(metala_context *ctx, metala_file *f) {
    enum { MOST = 100 << 20 };
    unsigned char prefix[8];
    uint64_t size = 0, length = 0;
    f->stream = fopen(f->path, "rb");
    if (!f->stream) return fail(ctx, "%s: cannot be opened; check the name and the permissions", f->path);
    if (file_size(ctx, f->stream, f->path, &size)) return -1;
    if (size < 8 || fread(prefix, 1, 8, f->stream) != 8)
        return fail(ctx, "%s: not a safetensors file: %llu bytes, at least 8 expected", f->path,
                    (unsigned long long)size);
    for (int i = 8; i-- > 0;) length = length << 8 | prefix[i];
    if (length > MOST || length > size - 8)
        return fail(ctx, "%s: not a safetensors file, or cut short: its first 8 bytes announce a header of %llu bytes, %llu"
                    " follow (at most %d are accepted)", f->path, (unsigned long long)length,
                    (unsigned long long)(size - 8), MOST);
    char *text = malloc((size_t)length + 1);
    if (!text) return fail_memory(ctx, f->path, (double)length);
    text[length] = 0;
    int status = fread(text, 1, (size_t)length, f->stream) == length
                     ? parse_header(ctx, f, text, (size_t)length, size - 8 - length)
                     : fail(ctx, "%s: the header cannot be read", f->path);
    f->data_start = 8 + length;
    free(text);
    return status;
}

metala_file *metala_file_open(metala_context *ctx, const char *path) {
    metala_file *f = calloc(1, sizeof *f);
    if (f) f->path = copy_text(path);
    if (!f || !f->path) {
        fail_memory(ctx, "opening a file", 1000);
        metala_file_close(f);
        return NULL;
    }
    if (open_and_parse(ctx, f)) {
        metala_file_close(f);
        return NULL;
    }
    return f;
}

size_t metala_file_tensors(const metala_file *f) { return f->count; }
const metala_tensor *metala_file_tensor(const metala_file *f, size_t i) {
    return i < f->count ? &f->tensors[i] : NULL;
}
const metala_tensor *metala_file_find(const metala_file *f, const char *name) {
    for (size_t i = 0; i < f->count; i++)
        if (!strcmp(f->tensors[i].name, name)) return &f->tensors[i];
    return NULL;
}

static const char *find_pair(const metala_file *f, const char *key) {
    for (size_t i = 0; i < f->pairs; i++)
        if (!strcmp(f->keys[i], key)) return f->values[i];
    return NULL;
}
const char *metala_file_metadata(const metala_file *f, const char *key) { return find_pair(f, key); }

// A whole number in the metadata, of digits only and at most 2^53, as a double holds it.
static int whole_metadata(const metala_file *f, const char *key, uint64_t *value) {
    const char *text = find_pair(f, key);
    if (!text || !*text || strlen(text) > 16 || strspn(text, "0123456789") != strlen(text)) return -1;
    *value = strtoull(text, NULL, 10);
    return *value > (uint64_t)1 << 53 ? -1 : 0;
}

// One number of a file as a 64-bit pattern, whatever this machine's byte order.
static uint64_t get_little(const unsigned char *p, size_t bytes) {
    uint64_t x = 0;
    for (size_t i = bytes; i-- > 0;) x = x << 8 | p[i];
    return x;
}

static void put_little(unsigned char *p, uint64_t x, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) p[i] = (unsigned char)(x >> 8 * i);
}

// Half precision: 1 sign, 5 exponent (bias 15), 10 fraction bits; exponent 0 is denormal, 31 infinity or NaN.
static float float_of_half(uint32_t half) {
    uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) {
        float x = (float)fraction * (1.0f / 16777216);               // 2^-24
        return sign ? -x : x;
    }
    return float_of_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

static double floating(const unsigned char *p, metala_dtype dtype) {
    uint64_t bits = get_little(p, dtypes[dtype].bytes);
    if (dtype == METALA_F32) return float_of_bits((uint32_t)bits);
    if (dtype == METALA_BF16) return float_of_bits((uint32_t)bits << 16);
    if (dtype == METALA_F16) return float_of_half((uint32_t)bits);
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int64_t integer(const unsigned char *p, metala_dtype dtype) {
    uint64_t bits = get_little(p, dtypes[dtype].bytes);
    switch (dtype) {
        case METALA_I64: return bits >> 63 ? -(int64_t)(~bits) - 1 : (int64_t)bits;
        case METALA_I32: return bits >> 31 ? (int64_t)bits - ((int64_t)1 << 32) : (int64_t)bits;
        case METALA_I16: return bits >> 15 ? (int64_t)bits - 65536 : (int64_t)bits;
        case METALA_I8: return bits >> 7 ? (int64_t)bits - 256 : (int64_t)bits;
        default: return (int64_t)bits;
    }
}

static int is_floating(metala_dtype dtype) { return dtype <= METALA_BF16; }

int metala_file_read(metala_context *ctx, metala_file *f, const metala_tensor *t, metala_dtype as, void *out) {
    unsigned char buffer[8192];
    size_t bytes = dtypes[t->dtype].bytes, most = sizeof buffer / bytes;
    int stored = t->dtype == as && (as == METALA_BF16 || as == METALA_I8);
    if (!stored && (is_floating(t->dtype) != (as != METALA_I32) || (as != METALA_I32 && as != METALA_F32 && as != METALA_F64)))
        return fail(ctx, "%s: tensor %s has type %s and cannot be read as %s", f->path, t->name,
                    dtypes[t->dtype].name, dtypes[as].name);
    if (f->data_start + t->offset > LONG_MAX || fseek(f->stream, (long)(f->data_start + t->offset), SEEK_SET))
        return fail(ctx, "%s: tensor %s cannot be reached at byte %llu of the file", f->path, t->name,
                    (unsigned long long)(f->data_start + t->offset));
    for (size_t i = 0; i < t->count;) {
        size_t n = t->count - i < most ? t->count - i : most;
        if (fread(buffer, bytes, n, f->stream) != n)
            return fail(ctx, "%s: tensor %s cannot be read to its end; the file has been cut short", f->path, t->name);
        for (size_t e = 0; e < n; e++, i++) {
            const unsigned char *p = buffer + e * bytes;
            if (as == METALA_BF16) ((uint16_t *)out)[i] = (uint16_t)get_little(p, 2);
            else if (as == METALA_I8) ((int8_t *)out)[i] = (int8_t)integer(p, as);
            else if (as == METALA_F32) ((float *)out)[i] = (float)floating(p, t->dtype);
            else if (as == METALA_F64) ((double *)out)[i] = floating(p, t->dtype);
            else {
                int64_t x = integer(p, t->dtype);
                if (x < INT32_MIN || x > INT32_MAX)
                    return fail(ctx, "%s: tensor %s: number %zu is %lld, beyond 32 bits", f->path, t->name, i,
                                (long long)x);
                ((int32_t *)out)[i] = (int32_t)x;
            }
        }
    }
    return 0;
}

// ---- Writing

typedef struct {                         // text that grows; text is NULL once memory has run out
    char *text;
    size_t length, room;
} buffer;

static void append(buffer *b, const char *format, ...) {
    for (int attempt = 0; b->text && attempt < 2; attempt++) {
        va_list arguments;
        va_start(arguments, format);
        int n = vsnprintf(b->text + b->length, b->room - b->length, format, arguments);
        va_end(arguments);
        if (n >= 0 && (size_t)n < b->room - b->length) {
            b->length += (size_t)n;
            return;
        }
        b->room = 2 * b->room + (size_t)(n < 0 ? 0 : n);
        char *more = realloc(b->text, b->room);
        if (!more) free(b->text);
        b->text = more;
    }
}

static void append_string(buffer *b, const char *text) {
    append(b, "\"");
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') append(b, "\\%c", *text);
        else if ((unsigned char)*text < ' ') append(b, "\\u%04x", (unsigned)*text);
        else append(b, "%c", *text);
    }
    append(b, "\"");
}

static int write_numbers(FILE *stream, const void *data, metala_dtype dtype, size_t count) {
    unsigned char out[8192];
    size_t bytes = dtypes[dtype].bytes, most = sizeof out / bytes;
    for (size_t i = 0; i < count;) {
        size_t n = count - i < most ? count - i : most;
        for (size_t e = 0; e < n; e++, i++) {
            uint64_t bits = 0;
            uint32_t low;
            if (bytes == 8) memcpy(&bits, (const unsigned char *)data + 8 * i, 8);
            else if (bytes == 4) memcpy(&low, (const unsigned char *)data + 4 * i, 4), bits = low;
            else bits = bytes == 2 ? ((const uint16_t *)data)[i] : ((const uint8_t *)data)[i];
            put_little(out + e * bytes, bits, bytes);
        }
        if (fwrite(out, bytes, n, stream) != n) return -1;
    }
    return 0;
}

int metala_file_write(metala_context *ctx, const char *path, const metala_tensor *tensors, const void *const *data,
                      size_t count, const metala_pair *metadata, size_t pairs) {
    int status = -1;
    FILE *stream = NULL;
    buffer header = {malloc(4096), 0, 4096};
    char *temporary = malloc(strlen(path) + 5);
    if (!temporary) {
        fail_memory(ctx, path, (double)strlen(path));
        goto done;
    }
    sprintf(temporary, "%s.tmp", path);
    append(&header, "{\"__metadata__\":{");
    for (size_t i = 0; i < pairs; i++) {
        if (i) append(&header, ",");
        append_string(&header, metadata[i].key);
        append(&header, ":");
        append_string(&header, metadata[i].value);
    }
    append(&header, "}");
    uint64_t at = 0;
    for (size_t i = 0; i < count; i++) {
        const metala_tensor *t = &tensors[i];
        size_t elements = 1;
        append(&header, ",");
        append_string(&header, t->name);
        append(&header, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[t->dtype].name);
        for (int d = 0; d < t->ndim; d++) {
            append(&header, d ? ",%zu" : "%zu", t->shape[d]);
            elements *= t->shape[d];
        }
        append(&header, "],\"data_offsets\":[%llu,", (unsigned long long)at);
        at += (uint64_t)elements * dtypes[t->dtype].bytes;
        append(&header, "%llu]}", (unsigned long long)at);
    }
    append(&header, "}");
    while (header.text && header.length % 8) append(&header, " ");       // the data starts aligned
    if (!header.text) {
        fail_memory(ctx, path, 200.0 * (double)count);
        goto done;
    }
    stream = fopen(temporary, "wb");
    if (!stream) {
        fail(ctx, "%s: cannot be created; check that the folder exists and can be written to", temporary);
        goto done;
    }
    unsigned char prefix[8];
    put_little(prefix, header.length, 8);
    int bad = fwrite(prefix, 1, 8, stream) != 8 || fwrite(header.text, 1, header.length, stream) != header.length;
    for (size_t i = 0; i < count && !bad; i++) {
        size_t elements = 1;
        for (int d = 0; d < tensors[i].ndim; d++) elements *= tensors[i].shape[d];
        bad = write_numbers(stream, data[i], tensors[i].dtype, elements);
    }
    bad |= fflush(stream) != 0 || ferror(stream);
    bad |= fclose(stream) != 0;
#ifdef _WIN32
    if (!bad) remove(path);                                          // rename does not replace there
#endif
    if (bad) fail(ctx, "%s: writing failed, is the disk full? %llu bytes are needed; nothing was replaced", temporary,
                  (unsigned long long)(8 + header.length + at));
    else if (rename(temporary, path)) fail(ctx, "%s: cannot be written; is it a folder, or not yours?", path);
    else status = 0;
    if (status) remove(temporary);
done:
    free(header.text);
    free(temporary);
    return status;
}

// ---- Configuration, under the authors' keys

enum { VALUE_BYTES = 32 };               // room for a number
enum config_kind { WHOLE, TRUTH, NOT_TRUTH, NUMBER };
static const struct config_key {
    const char *key;
    enum config_kind kind;
    size_t member;
} config_keys[] = {
    {"vocab_size", WHOLE, offsetof(metala_config, vocab_size)},
    {"decoder_embed_dim", WHOLE, offsetof(metala_config, width)},
    {"decoder_layers", WHOLE, offsetof(metala_config, layers)},
    {"decoder_attention_heads", WHOLE, offsetof(metala_config, heads)},
    {"glu_dim", WHOLE, offsetof(metala_config, glu_dim)},
    {"bias", TRUTH, offsetof(metala_config, glu_bias)},
    {"patch_dim", WHOLE, offsetof(metala_config, patch_dim)},
    {"tie_word_embeddings", TRUTH, offsetof(metala_config, tie_word_embeddings)},
    {"no_scale_embedding", NOT_TRUTH, offsetof(metala_config, scale_embedding)},
    {"pad_token_id", WHOLE, offsetof(metala_config, pad_token_id)},
    {"bos_token_id", WHOLE, offsetof(metala_config, bos_token_id)},
    {"eos_token_id", WHOLE, offsetof(metala_config, eos_token_id)},
    {"norm_eps", NUMBER, offsetof(metala_config, norm_eps)},
    {"group_norm_eps", NUMBER, offsetof(metala_config, head_norm_eps)},
    {"tau", NUMBER, offsetof(metala_config, tau)},
    {"expand", WHOLE, offsetof(metala_config, expand)},
    {"state_size", WHOLE, offsetof(metala_config, state_size)},
    {"low_rank", WHOLE, offsetof(metala_config, low_rank)},
    {"feature_dim", WHOLE, offsetof(metala_config, feature_dim)},
    {"length", WHOLE, offsetof(metala_config, length)},
};
enum { CONFIG_KEYS = sizeof config_keys / sizeof *config_keys };

// What the authors' code fixes and this one has no choice in: other values are refused.
static const struct { const char *key, *values[3]; } fixed_keys[] = {
    {"glu_act", {"silu", "swish", NULL}}, {"norm_type", {"simplermsnorm", NULL, NULL}}, {"conv_width", {"4", NULL, NULL}}};
enum { FIXED_KEYS = sizeof fixed_keys / sizeof *fixed_keys };

// The row: "mixer" is its name, "custom" when it has none, and each column stands beside it, as in "decay": "dynamic". A file
// without them, as the authors write it, is MetaLA.
enum { CONFIG_PAIRS = CONFIG_KEYS + FIXED_KEYS + METALA_COLUMNS + 1 };

static int read_row(metala_context *ctx, const metala_file *pairs, metala_config *c) {
    const char *name = find_pair(pairs, "mixer");
    if (name && strcmp(name, "custom") && metala_config_row(ctx, c, name)) {
        char reason[sizeof ctx->error];
        snprintf(reason, sizeof reason, "%s", metala_error(ctx));
        return fail(ctx, "%s: configuration: mixer: %.400s", pairs->path, reason);
    }
    for (int i = 0; i < METALA_COLUMNS && name; i++) {
        const char *value = find_pair(pairs, columns[i].name);
        int v = 0;
        if (!value) continue;
        while (columns[i].values[v] && strcmp(columns[i].values[v], value)) v++;
        if (!columns[i].values[v])
            return fail(ctx, "%s: configuration: %s is \"%.40s\", which is none of its choices (%s, %s, ...)", pairs->path,
                        columns[i].name, value, columns[i].values[0], columns[i].values[1]);
        *metala_row_column(&c->row, i) = v;
    }
    return 0;
}

static int parse_config_value(metala_config *c, const struct config_key *k, const char *text) {
    void *member = (char *)c + k->member;
    char *end;
    if (k->kind == NUMBER) {                                         // files have a point, strtod reads the locale's
        char local[VALUE_BYTES], *point;
        if (!*text || strlen(text) >= sizeof local) return -1;
        strcpy(local, text);
        point = strchr(local, '.');
        if (point) *point = *localeconv()->decimal_point;
        *(double *)member = strtod(local, &end);
        return *end ? -1 : 0;
    }
    if (k->kind == WHOLE) {
        int none = (k->member == offsetof(metala_config, pad_token_id) ||
                    k->member == offsetof(metala_config, bos_token_id) ||
                    k->member == offsetof(metala_config, eos_token_id)) && (!strcmp(text, "null") || !strcmp(text, "None"));
        long value = none ? -1 : strtol(text, &end, 10);
        if (!none && (!*text || *end || value < INT_MIN || value > INT_MAX)) return -1;
        *(int *)member = (int)value;
        return 0;
    }
    int truth = !strcmp(text, "true") || !strcmp(text, "True");
    if (!truth && strcmp(text, "false") && strcmp(text, "False")) return -1;
    *(int *)member = k->kind == TRUTH ? truth : !truth;
    return 0;
}

// The pairs of config.json in the same folder as f.
static metala_file *open_config_json(metala_context *ctx, const metala_file *f) {
    size_t folder = strlen(f->path);
    while (folder && f->path[folder - 1] != '/' && f->path[folder - 1] != '\\') folder--;
    metala_file *pairs = calloc(1, sizeof *pairs);
    char *text = NULL;
    uint64_t size = 0;
    if (pairs) pairs->path = malloc(folder + sizeof "config.json");
    if (!pairs || !pairs->path) {
        fail_memory(ctx, "reading config.json", 1000);
        goto failed;
    }
    memcpy(pairs->path, f->path, folder);
    strcpy(pairs->path + folder, "config.json");
    pairs->stream = fopen(pairs->path, "rb");
    if (!pairs->stream) {
        fail(ctx, "%s: no configuration: neither decoder_embed_dim in its metadata nor a file %s beside it", f->path,
             pairs->path);
        goto failed;
    }
    if (file_size(ctx, pairs->stream, pairs->path, &size)) goto failed;
    text = size < 1 << 24 ? malloc((size_t)size + 1) : NULL;
    if (!text && size < 1 << 24) {
        fail_memory(ctx, pairs->path, (double)size);
        goto failed;
    }
    if (!text || fread(text, 1, (size_t)size, pairs->stream) != size) {
        fail(ctx, "%s: cannot be read", pairs->path);
        goto failed;
    }
    text[size] = 0;
    json j = {text, text + size, NULL};
    if (json_pairs(&j, pairs, 0)) {
        fail(ctx, "%s: byte %zu: %s", pairs->path, (size_t)(j.at - text), j.problem);
        goto failed;
    }
    free(text);
    return pairs;
failed:
    free(text);
    metala_file_close(pairs);
    return NULL;
}

int metala_file_config(metala_context *ctx, const metala_file *f, metala_config *config) {
    metala_config c = metala_config_default();
    metala_file *beside = NULL;
    int status = -1;
    if (!find_pair(f, "decoder_embed_dim")) {
        beside = open_config_json(ctx, f);
        if (!beside) return -1;
    }
    const metala_file *pairs = beside ? beside : f;
    c.glu_dim = -1;                                                  // the authors' defaults
    c.pad_token_id = 2;
    c.tie_word_embeddings = !metala_file_find(f, "lm_head.weight");
    if (read_row(ctx, pairs, &c)) goto done;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const char *value = find_pair(pairs, config_keys[i].key);
        if (!value && i < 4) {                                       // the sizes have no default
            fail(ctx, "%s: the configuration has no %s", pairs->path, config_keys[i].key);
            goto done;
        }
        if (value && parse_config_value(&c, &config_keys[i], value)) {
            fail(ctx, "%s: configuration: %s is \"%.40s\", expected %s", pairs->path, config_keys[i].key, value,
                 config_keys[i].kind == WHOLE ? "a whole number" : config_keys[i].kind == NUMBER ? "a number"
                                                                                               : "true or false");
            goto done;
        }
    }
    for (int i = 0; i < FIXED_KEYS; i++) {
        const char *value = find_pair(pairs, fixed_keys[i].key), *const *allowed = fixed_keys[i].values;
        int known = !value;
        for (int a = 0; a < 3 && allowed[a] && !known; a++) known = !strcmp(value, allowed[a]);
        if (!known) {
            fail(ctx, "%s: configuration: %s is \"%.40s\", only %s is supported", pairs->path, fixed_keys[i].key,
                 value, allowed[0]);
            goto done;
        }
    }
    if (c.glu_dim == -1) c.glu_dim = c.width;
    if (metala_config_check(ctx, &c)) {
        char reason[sizeof ctx->error];
        snprintf(reason, sizeof reason, "%s", metala_error(ctx));
        fail(ctx, "%s: %.300s", pairs->path, reason);
        goto done;
    }
    *config = c;
    status = 0;
done:
    metala_file_close(beside);
    return status;
}

// ---- Models, checkpoints, states

typedef struct {                         // a file being put together: tensors in host memory, metadata
    metala_tensor *tensors;
    const void **data;
    metala_pair *pairs;
    char (*values)[VALUE_BYTES];
    size_t count, pair_count;
    real *host;
} collection;

static void collection_free(collection *c) {
    free(c->tensors);
    free(c->data);
    free(c->pairs);
    free(c->values);
    cpu_free(c->host);
}

static int collection_create(metala_context *ctx, collection *c, size_t tensors, size_t pairs, size_t numbers) {
    memset(c, 0, sizeof *c);
    c->tensors = calloc(tensors + 1, sizeof *c->tensors);
    c->data = calloc(tensors + 1, sizeof *c->data);
    c->pairs = calloc(pairs + 1, sizeof *c->pairs);
    c->values = calloc(pairs + 1, sizeof *c->values);
    c->host = cpu_alloc(times(numbers, sizeof(real)));
    if (c->tensors && c->data && c->pairs && c->values && c->host) return 0;
    collection_free(c);
    return fail_memory(ctx, "a copy for saving", (double)numbers * sizeof(real));
}

static void collect_pair(collection *c, const char *key, const char *value) {
    metala_pair *pair = &c->pairs[c->pair_count++];
    pair->key = key;
    pair->value = value;
}

static void collect_number(collection *c, const char *key, const char *format, double value) {
    char *text = c->values[c->pair_count], *point;
    snprintf(text, VALUE_BYTES, format, value);
    point = strchr(text, *localeconv()->decimal_point);              // a point in every locale
    if (point) *point = '.';
    collect_pair(c, key, text);
}

static void collect_config(collection *c, const metala_config *config) {
    collect_pair(c, "format", "pt");                                 // what Python's readers expect
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const struct config_key *k = &config_keys[i];
        const void *member = (const char *)config + k->member;
        if (k->member == offsetof(metala_config, patch_dim) && !config->patch_dim) continue;     // a key of ours alone
        if (k->kind == NUMBER) collect_number(c, k->key, "%.17g", *(const double *)member);
        else if (k->kind == WHOLE) collect_number(c, k->key, "%.0f", *(const int *)member);
        else collect_pair(c, k->key, (*(const int *)member != 0) == (k->kind == TRUTH) ? "true" : "false");
    }
    for (int i = 0; i < FIXED_KEYS; i++) collect_pair(c, fixed_keys[i].key, fixed_keys[i].values[0]);
    collect_pair(c, "mixer", metala_config_row_name(config));
    for (int i = 0; i < METALA_COLUMNS; i++) collect_pair(c, columns[i].name, columns[i].values[row_value(&config->row, i)]);
}

// The scales of an int8 weight in a file: <name>.scale [out,groups].
static metala_tensor scale_tensor(const metala_tensor *weight) {
    metala_tensor t = *weight;
    snprintf(t.name, sizeof t.name, "%.100s.scale", weight->name);
    t.dtype = METALA_F32;
    t.shape[1] = groups(weight->shape[1]);
    t.count = t.shape[0] * t.shape[1];
    return t;
}

// All parameters, or a block laid out like them, under prefix + name. Quantized weights follow the reals in `host`.
static void collect_parameters(metala_context *ctx, collection *c, const metala_model *m, const real *block,
                               const char *prefix, real *host) {
    unsigned char *weights = (unsigned char *)(host + round_up(m->reals, ALIGN));
    m->backend->download(ctx, host, block, m->reals * sizeof(real));
    if (m->quantized_bytes) m->backend->download(ctx, weights, m->quantized, m->quantized_bytes);
    for (int i = 0; i < m->tensor_count; i++) {
        metala_tensor *t = &c->tensors[c->count];
        *t = m->tensors[i];
        snprintf(t->name, sizeof t->name, "%s%.100s", prefix, m->tensors[i].name);
        int real_type = t->dtype == REAL_TYPE;
        c->data[c->count++] = real_type ? (const void *)(host + m->places[i]) : weights + m->places[i];
        if (t->dtype != METALA_I8) continue;
        c->tensors[c->count] = scale_tensor(t);
        c->data[c->count++] = weights + m->places[i] + scales_start(t->shape[0], t->shape[1]);
    }
}

// trainer NULL: the model alone.
static int save(metala_context *ctx, const metala_model *m, const metala_trainer *trainer, const char *path,
                const metala_pair *extra, size_t extras) {
    collection c;
    size_t blocks = trainer ? 3 : 1, numbers = times(blocks, m->reals);
    if (m->quantized_bytes) numbers = plus(numbers, ALIGN + m->quantized_bytes / sizeof(real));
    if (collection_create(ctx, &c, (blocks + 1) * (size_t)m->tensor_count, CONFIG_PAIRS + 3 + extras, numbers))
        return -1;
    collect_config(&c, &m->config);
    if (m->weights != REAL_TYPE) collect_pair(&c, "weights", weights_name(m->weights));
    collect_parameters(ctx, &c, m, m->parameters, "", c.host);
    if (trainer) {
        collect_parameters(ctx, &c, m, trainer->first, "adamw.m.", c.host + m->size);
        collect_parameters(ctx, &c, m, trainer->second, "adamw.v.", c.host + 2 * m->size);
        collect_number(&c, "step", "%.0f", (double)trainer->step);
    }
    for (size_t i = 0; i < extras; i++) collect_pair(&c, extra[i].key, extra[i].value);
    int status = metala_context_failed(ctx);                      // what could not be read must not replace a file
    if (!status) status = metala_file_write(ctx, path, c.tensors, c.data, c.count, c.pairs, c.pair_count);
    collection_free(&c);
    return status;
}

int metala_model_save(metala_context *ctx, const metala_model *m, const char *path) {
    return save(ctx, m, NULL, path, NULL, 0);
}

int metala_checkpoint_save(metala_context *ctx, const metala_trainer *t, const char *path, const metala_pair *extra,
                           size_t extras) {
    if (need_reals(ctx, t->model, path)) return -1;
    return save(ctx, t->model, t, path, extra, extras);
}

static void shape_text(char *text, size_t room, const metala_tensor *t) {
    size_t used = (size_t)snprintf(text, room, "[");
    for (int d = 0; d < t->ndim && used < room; d++)
        used += (size_t)snprintf(text + used, room - used, d ? ",%zu" : "%zu", t->shape[d]);
    if (used < room) snprintf(text + used, room - used, "]");
}

// The tensor of a file that has this name and the shape of `want`.
static const metala_tensor *find_fitting(metala_context *ctx, const metala_file *f, const metala_model *m,
                                         const char *name, const metala_tensor *want, const char *when_missing) {
    char expected[100], got[100];
    const metala_tensor *t = metala_file_find(f, name);
    if (!t) {
        fail(ctx, "%s: tensor %s is missing; %s", f->path, name, when_missing);
        return NULL;
    }
    shape_text(expected, sizeof expected, want);
    shape_text(got, sizeof got, t);
    if (!strcmp(expected, got)) return t;
    fail(ctx, "%s: tensor %s has shape %s, this model (D=%d) needs %s; load it with its own configuration or train anew",
         f->path, name, got, m->config.width, expected);
    return NULL;
}

static const char *const not_this_model = "this is not a model with this configuration";

// Reads prefix + name of every parameter into a block laid out like the parameters, in host memory.
static int read_parameters(metala_context *ctx, metala_file *f, const metala_model *m, const char *prefix, real *host) {
    for (int i = 0; i < m->tensor_count; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%.100s", prefix, m->tensors[i].name);
        const metala_tensor *t = find_fitting(ctx, f, m, name, &m->tensors[i], !*prefix ? not_this_model
            : "this is a model without optimizer state, so training can start from it but not resume");
        if (!t || metala_file_read(ctx, f, t, REAL_TYPE, host + m->tensors[i].offset)) return -1;
    }
    return 0;
}

// How the weights of a file are to be kept: as its metadata says, int8 also where it says nothing.
static int weights_of_file(metala_context *ctx, const metala_file *f, metala_dtype *weights) {
    const char *name = find_pair(f, "weights");
    const metala_tensor *some = metala_file_find(f, "model.layers.0.token_mixer.out_proj.weight");
    const metala_dtype types[] = {METALA_BF16, METALA_I8};
    *weights = !name && some && some->dtype == METALA_I8 ? METALA_I8 : REAL_TYPE;
    if (!name) return 0;
    for (int i = 0; i < 2; i++)
        if (!strcmp(name, weights_name(types[i]))) {
            *weights = types[i];
            return 0;
        }
    return fail(ctx, "%s: weights is \"%.40s\" in its metadata, expected bf16 or int8", f->path, name);
}

// Tensor i of a file, as the model stores it, into host memory.
static int read_stored(metala_context *ctx, metala_file *f, const metala_model *m, int i, void *host) {
    const metala_tensor *t = &m->tensors[i];
    if (metala_file_read(ctx, f, metala_file_find(f, t->name), t->dtype, host)) return -1;
    if (t->dtype != METALA_I8) return 0;
    metala_tensor scale = scale_tensor(t);
    float *scales = (float *)(void *)((unsigned char *)host + scales_start(t->shape[0], t->shape[1]));
    if (metala_file_read(ctx, f, metala_file_find(f, scale.name), METALA_F32, scales)) return -1;
    for (size_t j = 0; j < scale.count; j++)
        if (!isfinite(scales[j]))
            return fail(ctx, "%s: tensor %s: number %zu is not finite; the file is damaged", f->path, scale.name, j);
    return 0;
}

// Reads all parameters, one after the other through `host`.
static int fill_model(metala_context *ctx, metala_file *f, metala_model *m, void *host, unsigned char *head) {
    for (int i = 0; i < m->tensor_count; i++) {
        const metala_tensor *t = &m->tensors[i];
        if (read_stored(ctx, f, m, i, host)) return -1;
        if (t->dtype == REAL_TYPE)
            m->backend->upload(ctx, m->parameters + m->places[i], host, t->count * sizeof(real));
        else m->backend->upload(ctx, m->quantized + m->places[i], host, quantized_size(t->dtype, t->shape[0], t->shape[1]));
        if (head && i == 0 && put_quantized(ctx, m, m->head, t->name, host, t->shape[0], t->shape[1], head)) return -1;
    }
    return 0;
}

metala_model *metala_model_load(metala_context *ctx, const char *path) {
    metala_config config;
    metala_dtype weights;
    metala_file *f = metala_file_open(ctx, path);
    metala_model *m = NULL, *outline = NULL;
    unsigned char *host = NULL, *head = NULL;
    if (!f || metala_file_config(ctx, f, &config) || weights_of_file(ctx, f, &weights)) goto done;
    if ((size_t)config.layers > f->count) {                          // before memory is taken for a false promise
        fail(ctx, "%s: the configuration says %d layers, the file has only %zu tensors; this is not a model with this"
                  " configuration", path, config.layers, f->count);
        goto done;
    }
    outline = model_outline(ctx, &config, weights);
    if (!outline) goto done;
    for (int i = 0; i < outline->tensor_count; i++) {
        const metala_tensor *t = &outline->tensors[i];
        metala_tensor scale = scale_tensor(t);
        if (!find_fitting(ctx, f, outline, t->name, t, not_this_model)) goto done;
        if (t->dtype == METALA_I8 && !find_fitting(ctx, f, outline, scale.name, &scale,
                                                   "int8 weights need their scales, quantize the model anew"))
            goto done;
    }
    size_t room = largest_tensor(outline);
    int tied = weights != REAL_TYPE && config.tie_word_embeddings;   // the head is quantized from the embedding
    host = cpu_alloc(room);
    head = tied ? cpu_alloc(room) : NULL;
    if (!host || (tied && !head)) fail_memory(ctx, path, (double)room);
    else if ((m = create_model(ctx, &config, weights)) && fill_model(ctx, f, m, host, head)) {
        metala_model_free(m);
        m = NULL;
    }
done:
    cpu_free(host);
    cpu_free(head);
    metala_model_free(outline);
    metala_file_close(f);
    return m;
}

int metala_checkpoint_load(metala_context *ctx, metala_trainer *t, const char *path) {
    metala_model *m = t->model;
    if (need_reals(ctx, m, path)) return -1;
    metala_file *f = metala_file_open(ctx, path);
    int status = -1;
    real *host = NULL;
    if (!f) return -1;
    uint64_t step;
    if (whole_metadata(f, "step", &step)) {
        fail(ctx, "%s: no training step in its metadata; it is not a checkpoint, train from it as a model instead",
             path);
        goto done;
    }
    host = cpu_alloc(times(times(3, m->size), sizeof(real)));
    if (!host) {
        fail_memory(ctx, path, 3.0 * (double)m->size * sizeof(real));
        goto done;
    }
    if (read_parameters(ctx, f, m, "", host) || read_parameters(ctx, f, m, "adamw.m.", host + m->size) ||
        read_parameters(ctx, f, m, "adamw.v.", host + 2 * m->size))
        goto done;
    t->backend->upload(ctx, m->parameters, host, m->size * sizeof(real));
    t->backend->upload(ctx, t->first, host + m->size, m->size * sizeof(real));
    t->backend->upload(ctx, t->second, host + 2 * m->size, m->size * sizeof(real));
    metala_trainer_zero(ctx, t);
    m->version++;
    t->step = step;
    status = 0;
done:
    cpu_free(host);
    metala_file_close(f);
    return status;
}

// A state's file: of each layer state.<layer> [B,H,K,V] and conv_state.<layer> [B,D,4] or shift_state.<layer> [B,4D], or of
// softmax attention keys.<layer> [B,T,H,K] and values.<layer> [B,T,H,V], and once seen [B,T]; configuration and position.
int metala_state_save(metala_context *ctx, const metala_state *s, const char *path, const metala_pair *extra,
                      size_t extras) {
    const metala_config *config = &s->model->config;
    collection c;
    size_t layers = (size_t)config->layers, held = (size_t)s->position, numbers = 0, cached = cache_bytes(config) ? held : 0;
    metala_tensor t;
    int status = 0;
    for (int which = 0; which < STATE_TENSORS; which++) {
        state_tensor(s, 0, which, &t);
        numbers = plus(numbers, times(layers, t.count));
    }
    uint8_t *seen = malloc(times(s->B, cached) + 1);
    if (!seen) return fail_memory(ctx, path, (double)s->B * (double)cached);
    if (collection_create(ctx, &c, STATE_TENSORS * layers + 1, CONFIG_PAIRS + 2 + extras, numbers)) {
        free(seen);
        return -1;
    }
    collect_config(&c, config);
    collect_number(&c, "position", "%.0f", (double)s->position);
    for (size_t i = 0; i < extras; i++) collect_pair(&c, extra[i].key, extra[i].value);
    real *at = c.host;
    for (int l = 0; l < config->layers && !status; l++)
        for (int which = 0; which < STATE_TENSORS && !status; which++) {
            metala_tensor *tensor = &c.tensors[c.count];
            state_tensor(s, l, which, tensor);
            if (!tensor->count) continue;
            status = move_state(ctx, s, l, which, at, 0);
            c.data[c.count++] = at;
            at += tensor->count;
        }
    if (cached && !status) {
        const metala_tensor mask = {"seen", METALA_U8, 2, {s->B, held}, s->B * held, 0, 0};
        for (size_t b = 0; b < s->B; b++) s->backend->download(ctx, seen + b * held, s->seen + b * s->room, held);
        c.tensors[c.count] = mask;
        c.data[c.count++] = seen;
        status = metala_context_failed(ctx);
    }
    if (!status) status = metala_file_write(ctx, path, c.tensors, c.data, c.count, c.pairs, c.pair_count);
    collection_free(&c);
    free(seen);
    return status;
}

// All is read into a state of its own, which takes the place of this one when it is complete.
int metala_state_load(metala_context *ctx, metala_state *s, const char *path) {
    const metala_config *config = &s->model->config;
    metala_file *f = metala_file_open(ctx, path);
    metala_state *to = NULL;
    real *host = NULL;
    int32_t *seen = NULL;
    uint8_t *bytes = NULL;
    int status = -1;
    if (!f) return -1;
    uint64_t position;
    metala_config saved = *config;
    if (whole_metadata(f, "position", &position)) {
        fail(ctx, "%s: no position in its metadata; it is not a saved state", path);
        goto done;
    }
    if (read_row(ctx, f, &saved)) goto done;
    for (int i = 0; i < METALA_COLUMNS; i++) {                       // rows may have states of the same shapes
        int its = row_value(&saved.row, i), ours = row_value(&config->row, i);
        if (its == ours) continue;
        fail(ctx, "%s: a state of another model: its %s is %s, this model's is %s; load a state that this model saved", path,
             columns[i].name, columns[i].values[its], columns[i].values[ours]);
        goto done;
    }
    size_t held = cache_bytes(config) ? (size_t)position : 0;
    const metala_tensor *mask = metala_file_find(f, "seen");
    if (held && (!mask || mask->ndim != 2 || mask->shape[0] != s->B || mask->shape[1] != held)) {   // before memory is taken
        fail(ctx, "%s: tensor seen is missing, or not of shape [%zu,%zu]; load a state that this model saved", path, s->B, held);
        goto done;
    }
    to = metala_state_create(ctx, s->model, (int)s->B);
    if (!to || make_room(ctx, to, held)) goto done;
    to->position = position;
    for (int l = 0; l < config->layers; l++)
        for (int which = 0; which < STATE_TENSORS; which++) {
            metala_tensor want;
            char expected[100], got[100];
            state_tensor(to, l, which, &want);
            if (!want.count) continue;
            const metala_tensor *t = metala_file_find(f, want.name);
            shape_text(expected, sizeof expected, &want);
            if (t) shape_text(got, sizeof got, t);
            if (!t || strcmp(expected, got)) {
                fail(ctx, "%s: tensor %s %s%s, this model and batch need %s; load a state that this model saved", path,
                     want.name, t ? "has shape " : "is missing", t ? got : "", expected);
                goto done;
            }
            cpu_free(host);
            host = cpu_alloc(want.count * sizeof(real));
            if (!host) {
                fail_memory(ctx, path, (double)want.count * sizeof(real));
                goto done;
            }
            if (metala_file_read(ctx, f, t, want.dtype, host) || move_state(ctx, to, l, which, host, 1)) goto done;
        }
    if (held) {
        seen = malloc(s->B * held * sizeof *seen);
        bytes = malloc(s->B * held);
        if (!seen || !bytes) {
            fail_memory(ctx, path, (double)(s->B * held) * (sizeof *seen + 1));
            goto done;
        }
        if (metala_file_read(ctx, f, mask, METALA_I32, seen)) goto done;
        for (size_t i = 0; i < s->B * held; i++) bytes[i] = seen[i] != 0;
        for (size_t b = 0; b < s->B; b++) s->backend->upload(ctx, to->seen + b * to->room, bytes + b * held, held);
    }
    metala_state old = *s;
    *s = *to;
    *to = old;
    status = 0;
done:
    free(seen);
    free(bytes);
    cpu_free(host);
    metala_state_free(to);
    metala_file_close(f);
    return status;
}

// ============================================================== 12. Data: text and safetensors datasets

typedef struct {                        // shared by the parts of a split
    int owners;
    unsigned char *text;                // a text's bytes, or NULL
    int32_t *inputs, *targets, *labels; // (N,T) or (N,T,C), (N,T) or (N)
    int32_t *mask;                      // (N,T) or NULL
    int vocab, patch;                   // C, 0 of tokens
} dataset_source;

struct metala_dataset {
    dataset_source *source;
    size_t first, count;                // bytes of a text, or sequences
    size_t T;
};

void metala_dataset_free(metala_dataset *d) {
    if (!d) return;
    if (d->source && --d->source->owners == 0) {
        free(d->source->text);
        free(d->source->inputs);
        free(d->source->targets);
        free(d->source->labels);
        free(d->source->mask);
        free(d->source);
    }
    free(d);
}

static int read_text(metala_context *ctx, metala_dataset *d, FILE *stream, const char *path) {
    uint64_t size = 0;
    if (file_size(ctx, stream, path, &size)) return -1;
    if (size < 2) return fail(ctx, "%s: %llu byte%s, a text needs at least 2", path, (unsigned long long)size,
                              size == 1 ? "" : "s");
    if (size > SIZE_MAX / 2) return fail(ctx, "%s: too large for this machine's memory", path);
    d->source->text = malloc((size_t)size);
    if (!d->source->text) return fail_memory(ctx, path, (double)size);
    if (fread(d->source->text, 1, (size_t)size, stream) != size) return fail(ctx, "%s: cannot be read to its end", path);
    d->count = (size_t)size;
    d->source->vocab = 256;
    return 0;
}

// Bytes of shape [N,P,C], or brightnesses from 0 to 1 that stand for them.
static int is_image(const metala_tensor *t) {
    return t->ndim == 3 && (t->dtype == METALA_U8 || is_floating(t->dtype));
}

// The bytes round(255 x) of brightnesses x.
static int32_t *read_brightness(metala_context *ctx, metala_file *f, const metala_tensor *t) {
    float *x = malloc(times(t->count, sizeof *x));
    int32_t *bytes = malloc(times(t->count, sizeof *bytes));
    int status = !x || !bytes ? fail_memory(ctx, f->path, (double)t->count * (sizeof *x + sizeof *bytes))
                              : metala_file_read(ctx, f, t, METALA_F32, x);
    for (size_t i = 0; !status && i < t->count; i++) {
        if (x[i] >= 0 && x[i] <= 1) bytes[i] = (int32_t)(255 * x[i] + 0.5f);
        else status = fail(ctx, "%s: %s: number %zu is %g, expected a brightness from 0 to 1; divide bytes by 255, or give"
                                " them as U8", f->path, t->name, i, (double)x[i]);
    }
    free(x);
    if (!status) return bytes;
    free(bytes);
    return NULL;
}

static int32_t *read_integers(metala_context *ctx, metala_file *f, const metala_tensor *t) {
    int32_t *numbers = malloc(times(t->count, sizeof *numbers));
    if (!numbers) fail_memory(ctx, f->path, (double)t->count * sizeof *numbers);
    else if (metala_file_read(ctx, f, t, METALA_I32, numbers)) {
        free(numbers);
        numbers = NULL;
    }
    return numbers;
}

// What belongs to the inputs, whole numbers of shape [N,T], or [N] (T = 0).
static int32_t *read_beside(metala_context *ctx, metala_file *f, const char *name, size_t N, size_t T) {
    const metala_tensor *t = metala_file_find(f, name);
    if (t->ndim == (T ? 2 : 1) && t->shape[0] == N && (!T || t->shape[1] == T)) return read_integers(ctx, f, t);
    char got[100];
    shape_text(got, sizeof got, t);
    if (T) fail(ctx, "%s: %s has shape %s, expected [%zu,%zu], one for each token of inputs", f->path, name, got, N, T);
    else fail(ctx, "%s: %s has shape %s, expected [%zu], one for each sequence", f->path, name, got, N);
    return NULL;
}

static int check_range(metala_context *ctx, const char *path, const char *name, const int32_t *numbers, size_t count,
                       int ignore, int *vocab) {
    for (size_t i = 0; i < count; i++) {
        if (ignore && numbers[i] == METALA_IGNORE) continue;
        if (numbers[i] < 0 || numbers[i] >= 1 << 24)
            return fail(ctx, "%s: %s: number %zu is %d, expected a token from 0 to %d%s", path, name, i,
                        (int)numbers[i], (1 << 24) - 1, ignore ? " or -100" : "");
        if (numbers[i] >= *vocab) *vocab = (int)numbers[i] + 1;
    }
    return 0;
}

static int read_sequences(metala_context *ctx, metala_dataset *d, const char *path) {
    dataset_source *s = d->source;
    metala_file *f = metala_file_open(ctx, path);
    int status = -1;
    if (!f) return -1;
    const metala_tensor *inputs = metala_file_find(f, "inputs");
    if (!inputs) {
        fail(ctx, "%s: no tensor called inputs; a dataset has inputs [N,T] and targets [N,T] or labels [N]", path);
        goto done;
    }
    if (inputs->count < 1 || (!is_image(inputs) && (inputs->ndim != 2 || is_floating(inputs->dtype)))) {
        char got[100];
        shape_text(got, sizeof got, inputs);
        fail(ctx, "%s: inputs are %s %s, expected whole numbers of shape [N,T], or images of shape [N,P,C], U8 or floats"
                  " from 0 to 1", path, metala_dtype_name(inputs->dtype), got);
        goto done;
    }
    d->count = inputs->shape[0];
    d->T = inputs->shape[1];
    if (is_image(inputs) && inputs->shape[2] > 1 << 24) {
        fail(ctx, "%s: inputs have patches of %zu bytes, expected at most %d; cut the images into more", path, inputs->shape[2],
             1 << 24);
        goto done;
    }
    if (is_image(inputs) && inputs->shape[2] > 1) s->patch = (int)inputs->shape[2];
    else if (is_image(inputs)) s->vocab = 256;                       // bytes, whether they are all there or not
    int has_targets = metala_file_find(f, "targets") != NULL, has_labels = metala_file_find(f, "labels") != NULL;
    if (has_targets == has_labels) {
        fail(ctx, "%s: a dataset needs either targets [N,T] or labels [N], this one has %s", path,
             has_targets ? "both" : "neither");
        goto done;
    }
    s->inputs = is_floating(inputs->dtype) ? read_brightness(ctx, f, inputs) : read_integers(ctx, f, inputs);
    if (!s->inputs) goto done;
    if (!s->patch && check_range(ctx, path, "inputs", s->inputs, d->count * d->T, 0, &s->vocab)) goto done;
    if (has_targets) {
        s->targets = read_beside(ctx, f, "targets", d->count, d->T);
        if (!s->targets || check_range(ctx, path, "targets", s->targets, d->count * d->T, 1, &s->vocab)) goto done;
    } else {
        s->labels = read_beside(ctx, f, "labels", d->count, 0);
        if (!s->labels || check_range(ctx, path, "labels", s->labels, d->count, 0, &s->vocab)) goto done;
    }
    if (metala_file_find(f, "mask") && !(s->mask = read_beside(ctx, f, "mask", d->count, d->T))) goto done;
    const char *stated = find_pair(f, "vocab_size");
    if (stated) {
        char *end;
        long vocab = strtol(stated, &end, 10);
        if (*end || end == stated || vocab < s->vocab || vocab > 1 << 24) {
            fail(ctx, "%s: vocab_size in the metadata is '%.20s', expected a number from %d, which the data needs, to %d",
                 path, stated, s->vocab, 1 << 24);
            goto done;
        }
        s->vocab = (int)vocab;
    }
    status = 0;
done:
    metala_file_close(f);
    return status;
}

metala_dataset *metala_dataset_open(metala_context *ctx, const char *path, size_t T) {
    metala_dataset *d = calloc(1, sizeof *d);
    int status = -1;
    if (d) d->source = calloc(1, sizeof *d->source);
    if (!d || !d->source) fail_memory(ctx, path, sizeof *d + sizeof *d->source);
    else {
        d->source->owners = 1;
        FILE *stream = fopen(path, "rb");
        if (!stream) fail(ctx, "%s: cannot be opened; check the name and the permissions", path);
        else if (ends_with(path, ".safetensors")) {
            status = read_sequences(ctx, d, path);
            if (!status && T && d->T > T)
                status = fail(ctx, "%s: sequences of %zu tokens, at most %zu are wanted", path, d->T, T);
        } else if (T < 1) fail(ctx, "%s: a text is cut into windows, whose length must be at least 1", path);
        else {
            status = read_text(ctx, d, stream, path);
            d->T = T;
        }
        if (stream) fclose(stream);
    }
    if (!status) return d;
    metala_dataset_free(d);
    return NULL;
}

metala_dataset *metala_dataset_split(metala_context *ctx, metala_dataset *d, double fraction) {
    size_t least = d->source->text ? 2 : 1, taken;
    if (!(fraction > 0 && fraction < 1) || d->count < 2 * least) {
        fail(ctx, "data: a share of %g of %zu %s cannot be split off; give a file of its own", fraction, d->count,
             d->source->text ? "bytes" : "sequences");
        return NULL;
    }
    taken = (size_t)((double)d->count * fraction + 0.5);
    if (taken < least) taken = least;
    if (taken > d->count - least) taken = d->count - least;
    metala_dataset *part = malloc(sizeof *part);
    if (!part) {
        fail_memory(ctx, "a dataset", sizeof *part);
        return NULL;
    }
    *part = *d;
    part->source->owners++;
    d->count -= taken;
    part->first += d->count;
    part->count = taken;
    return part;
}

size_t metala_dataset_length(const metala_dataset *d) { return d->T; }
size_t metala_dataset_sequences(const metala_dataset *d) {
    return d->source->text ? (d->count - 1 + d->T - 1) / d->T : d->count;
}
size_t metala_dataset_tokens(const metala_dataset *d) { return d->source->text ? d->count : d->count * d->T; }
int metala_dataset_vocab(const metala_dataset *d) { return d->source->vocab; }
int metala_dataset_patch(const metala_dataset *d) { return d->source->patch; }
int metala_dataset_is_text(const metala_dataset *d) { return d->source->text != NULL; }

static size_t token_numbers(const metala_dataset *d) { return d->source->patch ? (size_t)d->source->patch : 1; }

// The window of a text that starts at byte `start` of this part.
static void text_window(const metala_dataset *d, size_t start, int *inputs, int *targets, uint8_t *mask) {
    const unsigned char *text = d->source->text + d->first;
    for (size_t t = 0; t < d->T; t++) {
        int inside = start + t + 1 < d->count;
        inputs[t] = inside ? text[start + t] : 0;
        targets[t] = inside ? text[start + t + 1] : METALA_IGNORE;
        mask[t] = (uint8_t)inside;
    }
}

void metala_dataset_sequence(const metala_dataset *d, size_t i, int *inputs, int *targets, uint8_t *mask) {
    const dataset_source *s = d->source;
    if (s->text) {
        text_window(d, i * d->T, inputs, targets, mask);
        return;
    }
    size_t row = d->first + i, numbers = d->T * token_numbers(d);
    for (size_t j = 0; j < numbers; j++) inputs[j] = s->inputs[row * numbers + j];
    for (size_t t = 0; t < d->T; t++) {
        targets[t] = s->targets ? s->targets[row * d->T + t] : t + 1 == d->T ? s->labels[row] : METALA_IGNORE;
        mask[t] = s->mask ? s->mask[row * d->T + t] != 0 : 1;
    }
}

static uint64_t hash(uint64_t a, uint64_t b) {
    uint64_t state = a * 0x9E3779B97F4A7C15u ^ b;
    metala_random(&state);
    return metala_random(&state);
}

// Place i of a shuffled 0 … n-1 without storing the order: a Feistel network permutes the next power of four, and
// results beyond n are permuted again until they fall inside.
static size_t shuffled(size_t i, size_t n, uint64_t key) {
    int half = 1;
    while (half < 31 && ((uint64_t)1 << 2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1, x = i;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t next = left ^ (hash(key + round, right) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= n);
    return (size_t)x;
}

void metala_dataset_batch(const metala_dataset *d, uint64_t seed, uint64_t index, int B, int *inputs, int *targets,
                          uint8_t *mask) {
    for (int b = 0; b < B; b++) {
        uint64_t number = index * (uint64_t)B + (uint64_t)b;
        size_t at = (size_t)b * d->T;
        if (d->source->text) {
            size_t starts = d->count > d->T ? d->count - d->T : 1;
            text_window(d, (size_t)(hash(seed, number) % starts), inputs + at, targets + at, mask + at);
        } else {
            size_t i = shuffled((size_t)(number % d->count), d->count, hash(seed, number / d->count));
            metala_dataset_sequence(d, i, inputs + at * token_numbers(d), targets + at, mask + at);
        }
    }
}
