// metala.h - MetaLA, the unified optimal linear approximation to softmax attention, in portable C99.
//
// A language model whose attention is a recurrence with a state of fixed size. One layer's mixer, per head:
//
//     u = silu(conv(n))        q = W_q u    z = W_α u    v = W_v u    g = W_g u + β
//     α = σ(z)^(1/τ)           k = 1 - α
//     S_t = diag(α_t) S_{t-1} + k_t v_tᵀ          o_t = K^(-1/2) S_tᵀ q_t                  the decay scan
//     y_t = W_o ( silu(g_t) ⊙ norm(o_t + σ((q_t⊙k_t)·b v_t)) )                             augmentation, norm, gate
//
// Source: "MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map", NeurIPS 2024. Other
// linear models are rows of the same general form, see there.
//
// A complete program (cc -O3 example.c metala.c -lm):
//
//     #include <stdio.h>
//     #include <stdlib.h>
//     #include "metala.h"
//
//     int main(int argc, char **argv) {
//         metala_context *ctx = metala_open(NULL, 0);                            // the CPU, all cores
//         metala_model *model = metala_model_load(ctx, argc > 1 ? argv[1] : "model.safetensors");
//         metala_state *state = model ? metala_state_create(ctx, model, 1) : NULL;  // one sequence
//         if (!state) { fprintf(stderr, "%s\n", metala_error(ctx)); return 1; }
//         int vocab = metala_model_config(model)->vocab_size, token = '\n';
//         metala_real *logits = malloc(sizeof *logits * (size_t)vocab);
//         for (int t = 0; logits && t < 500; t++) {                              // 500 bytes, greedily
//             if (metala_step(ctx, state, &token, logits)) { fprintf(stderr, "%s\n", metala_error(ctx)); return 1; }
//             for (int i = token = 0; i < vocab; i++) if (logits[i] > logits[token]) token = i;
//             putchar(token);
//         }
//         free(logits); metala_state_free(state); metala_model_free(model); metala_close(ctx);
//         return 0;
//     }
//
// Conventions
//   Letters   B batch, T time, D width, H heads, K query and decay channels of a head, V value channels of a head
//             (MetaLA: K = D/2/H, V = D/H), L layers, F GLU width, N vocabulary size.
//   Tensors   row-major, last index contiguous. Linear weights are [out,in], y = x Wᵀ + b.
//   Patches   A model with a `patch_dim` C reads images: each of its tokens is a patch of C numbers from 0 to 255. Tokens and
//             inputs are then (B,T,C), in metala_step (B,C); targets and mask stay (B,T), and N is the number of classes.
//   Errors    A function that can fail returns 0 for success and -1 for failure (or NULL for a pointer); then
//             metala_error(ctx) is one line that says what, where, what was expected and what to do. Nothing here
//             prints or exits. A call refused for its arguments or its file changes nothing. When memory runs out
//             inside a pass, a state has read part of the tokens (reset, copy or load it) and a trainer has dropped
//             its accumulated gradients.
//   Threads   There are no writable globals. A context is used by one thread at a time. A model that nobody trains
//             may be shared by any number of threads, each with a context and states of its own.
//   Precision metala_real is float; compiled with -DMETALA_FLOAT64 (all files alike) it is double.
//   Bits      Same seed, same input, same build: the same bits, for any number of threads.

#ifndef METALA_H
#define METALA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef METALA_FLOAT64
typedef double metala_real;
#else
typedef float metala_real;
#endif

#define METALA_VERSION "0.1"
#define METALA_CONV 4              // taps of the short convolution, the last one multiplies the current token
#define METALA_CHUNK 64            // the scan keeps the state at every METALA_CHUNK-th token for its backward
#define METALA_GROUP 64            // inputs of an int8 weight that share a scale
#define METALA_IGNORE (-100)       // a target with this value has no loss

// ------------------------------------------------------------------------------------------------ context, errors

typedef struct metala_backend metala_backend;   // the kernels of one kind of device, at the end of this file
typedef struct metala_context metala_context;   // where things run: backend, threads, scratch memory, last error

// Open a context. backend: NULL or metala_cpu() for the CPU. threads: 0 = one per physical core; without OpenMP always
// one. NULL when there is no memory.
metala_context *metala_open(const metala_backend *backend, int threads);
void metala_close(metala_context *ctx);

// The last failure in this context, one line without newline; "out of memory" when ctx is NULL.
const char *metala_error(const metala_context *ctx);
const metala_backend *metala_context_backend(const metala_context *ctx);
int metala_context_threads(const metala_context *ctx);

typedef struct { const char *key, *value; } metala_pair;      // of a file's metadata

// ------------------------------------------------------------------------------------------------ the general form

// Linear transformers, state-space models and linear RNNs are one recurrence (paper, section 3),
//
//     S_t = diag(α_t) S_{t-1} + k_t v_tᵀ        o_t = s S_tᵀ q_t        y_t = W_o ( f_g(n) ⊙ norm(o_t + self) )
//
// with different choices of where q, k, v, α and the gate come from. A choice is a value of a column, a model of the
// literature a row. n is the layer's normalised input, u what the convolution or the token shift makes of it.
enum { METALA_CONV_OFF,            // u = n
       METALA_CONV_ON,             // u = silu(conv(n)), 4 taps per channel
       METALA_CONV_SHIFT,          // u = μ n_t + (1-μ) n_{t-1}, one μ each for k, v and the gate
       METALA_CONV_VALUE,          // u = silu(conv(W_v n)): the values are made first, q, k and α of them
       METALA_CONV_KEY };          // u = n, and the projected key goes through 4 taps, without SiLU
enum { METALA_QUERY_LINEAR, METALA_QUERY_SILU, METALA_QUERY_ELU1, METALA_QUERY_TAYLOR,      // f(W_q u)
       METALA_QUERY_ONE,           // 1: the state is read as it is
       METALA_QUERY_CONSTANT,      // a learned complex C for each channel and state
       METALA_QUERY_SHARED,        // C = W_q u, one for all channels
       METALA_QUERY_EXP };         // what keeps the exponentials of the key in range
enum { METALA_KEY_TIED,            // 1 - α
       METALA_KEY_LINEAR, METALA_KEY_SILU, METALA_KEY_ELU1, METALA_KEY_TAYLOR,              // f(W_k u)
       METALA_KEY_ONE,
       METALA_KEY_CONSTANT,        // b of the discretised state-space model
       METALA_KEY_SHARED,          // B = W_k u, one for all channels
       METALA_KEY_EXP };           // e^(W_k u)
enum { METALA_VALUE_LINEAR,        // W_v u
       METALA_VALUE_COMPLEX,       // W_v u are complex numbers, a head each, scaled by the decay's b
       METALA_VALUE_SILU,          // silu(W_v u) are complex numbers
       METALA_VALUE_INPUT,         // u
       METALA_VALUE_PRODUCT };     // W_v u ⊙ the key's convolution
enum { METALA_DECAY_DYNAMIC,       // σ(W_α u)^(1/τ)
       METALA_DECAY_LOWRANK,       // σ(W_2 W_1 u + b)^(1/τ), `low_rank` channels between
       METALA_DECAY_FIXED,         // σ(z)^(1/τ), z learned, the same for every token
       METALA_DECAY_ONE,           // 1
       METALA_DECAY_HEADS,         // 1 - 2^(-5-h) in head h
       METALA_DECAY_DEPTH,         // exp(-8 (h+1)/H (1 - l/L)) in head h of layer l
       METALA_DECAY_BOUNDED,       // γ + (1-γ) σ(W_α u), with learned bounds γ that grow from layer to layer
       METALA_DECAY_EXP,           // exp(-e^w), w learned for each channel
       METALA_DECAY_LRU,           // exp(-e^ν + iθ), learned for each state
       METALA_DECAY_ZOH,           // exp(ΔA), complex A learned for each state, Δ for each channel
       METALA_DECAY_DSS,           // the same, with b normalised over `length` tokens
       METALA_DECAY_SELECTIVE,     // exp(-Δ e^A), Δ = softplus(W_2 W_1 u + b), A learned for each state
       METALA_DECAY_SOFTMAX };     // no recurrence: softmax attention, what all of this approximates
enum { METALA_SELF_OFF,
       METALA_SELF_AUGMENT,        // σ(((q⊙k)·b) v)
       METALA_SELF_BONUS,          // the current token counts e^u, u learned, instead of 1
       METALA_SELF_SKIP };         // d ⊙ v, d learned; d ⊙ u where values are complex
enum { METALA_NORMALISER_OFF, METALA_NORMALISER_ON };   // o divided by the same sum with v = 1
enum { METALA_PHASE_OFF,
       METALA_PHASE_ROPE,          // q and k rotate, by 10000^(-2i/K) t
       METALA_PHASE_FIRST,         // in the first layer only, by learned angles
       METALA_PHASE_LEARNED,       // every decay has a learned phase
       METALA_PHASE_DECAY };       // the decay is complex itself
enum { METALA_NORM_OFF,
       METALA_NORM_LAYER,          // layer norm of each head, without weights
       METALA_NORM_RMS,            // RMS norm of each head, without weights
       METALA_NORM_WIDTH };        // RMS norm of all heads together, without weights
enum { METALA_GATE_OFF,
       METALA_GATE_SILU,           // silu(W_g u + β)
       METALA_GATE_SIGMOID, METALA_GATE_LINEAR };       // f(W_g u) without a bias, of n in place of u with METALA_CONV_VALUE
enum { METALA_CHANNELS_HALF, METALA_CHANNELS_FULL };    // q, k and α have D/2 channels or D

typedef struct {
    int conv, query, key, value, decay, self, normaliser, phase, norm, gate, channels;      // one of the above each
} metala_row;

typedef struct {
    const char *name;          // "conv", "query", …
    const char *about;
    const char *values[16];    // names of the values, in the order above, ended by NULL
} metala_column;
enum { METALA_COLUMNS = 11 };
const metala_column *metala_columns(void);                 // METALA_COLUMNS of them, in the order of metala_row
int *metala_row_column(metala_row *row, int column);       // where the value of a column is

typedef struct {
    const char *name;          // "metala", "gla", …
    metala_row row;
    int expand;                // what `expand` is unless chosen
    const char *equation;      // one line
    const char *source;        // paper, and in what the row differs from it
} metala_named_row;
const metala_named_row *metala_rows(void);                 // ended by a name that is NULL

// ------------------------------------------------------------------------------------------------ configuration

typedef struct {
    int vocab_size;            // N
    int width;                 // D  `decoder_embed_dim`, even
    int layers;                // L  `decoder_layers`
    int heads;                 // H  `decoder_attention_heads`, divides D and D/2
    int glu_dim;               // F  `glu_dim`; -1 in a file means D
    int glu_bias;              // biases in the three GLU layers (`bias`)
    int patch_dim;             // C  a token is a patch of C bytes, of which x = W_p (patch/255) + b_p; 0: it is one of the N
    int tie_word_embeddings;   // the output layer is the embedding; not of patches, which have none
    int scale_embedding;       // embeddings times sqrt(D) (`no_scale_embedding` is its negation); not of patches
    int pad_token_id;          // its embedding lookup passes no gradient; -1 for none
    int bos_token_id;          // -1 for none
    int eos_token_id;          // -1 for none
    double norm_eps;           // RMS norm, 1e-6
    double head_norm_eps;      // head norm (`group_norm_eps`), 1e-5
    double tau;                // decay temperature τ, 16
    metala_row row;            // which model of the general form; all of the rest is for some rows only:
    int expand;                // E  values have E·D channels
    int state_size;            // states of a channel in a state-space model
    int low_rank;              // channels between the two matrices of a decay
    int feature_dim;           // channels of a head before the Taylor feature map
    int length;                // tokens that METALA_DECAY_DSS normalises over
} metala_config;

// The row called so, and its `expand`, into the configuration; -1 when there is none.
int metala_config_row(metala_context *ctx, metala_config *config, const char *name);
// The name of the configuration's row; "custom" when it is none of metala_rows.
const char *metala_config_row_name(const metala_config *config);

// N256 D256 L6 H4 F704, untied, the authors' epsilons and τ, no special tokens.
metala_config metala_config_default(void);
// 0 when the model can be built; otherwise -1 and the field that is wrong.
int metala_config_check(metala_context *ctx, const metala_config *config);

// ------------------------------------------------------------------------------------------------ model

typedef struct metala_model metala_model;   // configuration and parameters

typedef enum { METALA_F64, METALA_F32, METALA_F16, METALA_BF16, METALA_I64, METALA_I32, METALA_U32, METALA_I16,
               METALA_U16, METALA_I8, METALA_U8, METALA_BOOL } metala_dtype;

typedef struct {               // a tensor as a file or a model lists it
    char name[128];
    metala_dtype dtype;
    int ndim;
    size_t shape[8];
    size_t count;              // product of shape
    size_t offset;             // in elements, all parameters one after the other (model); in bytes into the data (file)
    int decay;                 // a model's: 1 when weight decay applies to it
} metala_tensor;

// A model with all parameters zero. The configuration is checked.
metala_model *metala_model_create(metala_context *ctx, const metala_config *config);
// Initialise: linear weights and embedding N(0, std²), `conv1d` U(-1/2,1/2), biases and `aug_balance` 0, the row of
// the padding token 0, and
//   `out_proj`, `l3`  residual_scale times as wide: 1/sqrt(2L) keeps the residual stream's size independent of depth
//   `k_gate`          N(gate_mean·(i+½)/(K·D), (gate_scale·std)²) in row i of the K of a head. A large gate_scale lets few
//                     tokens write much to a channel. The gate's input is SiLU's output, whose mean is positive (0.08
//                     here), so that the mean of the weights is a bias of the decay logits: with 200, from 0 to 16.
//                     With 16 and 200 the state is an associative memory before any training, which makes a model learn
//                     sooner to remember who has what; with 8 and 0 it models text best.
//   `decay_logit`     of a fixed decay: from -4 to 4 over the channels of a head
// NULL is {0.02, 1, 1, 0}, the authors' values; train's are {1/sqrt(D), 1/sqrt(2L), 8, 0}.
typedef struct {
    double std, residual_scale, gate_scale, gate_mean;
} metala_init;
int metala_model_init(metala_context *ctx, metala_model *model, uint64_t seed, const metala_init *init);
// Load a safetensors file with the authors' tensor names (F64, F32, F16 or BF16, or quantized, see below). The
// configuration is read from the file's metadata, or else from config.json in the same folder. Checkpoints load as well.
metala_model *metala_model_load(metala_context *ctx, const char *path);
int metala_model_save(metala_context *ctx, const metala_model *model, const char *path);
void metala_model_free(metala_model *model);

const metala_config *metala_model_config(const metala_model *model);
size_t metala_model_size(const metala_model *model);                         // number of parameters
int metala_model_tensors(const metala_model *model);                         // number of tensors
const metala_tensor *metala_model_tensor(const metala_model *model, int i);  // i-th tensor, in the file's order
// Copy one parameter tensor out or in, by name. Quantized weights come out as the numbers that they stand for.
int metala_model_get(metala_context *ctx, const metala_model *model, const char *name, metala_real *out);
int metala_model_set(metala_context *ctx, metala_model *model, const char *name, const metala_real *in);

// Generation is bound by reading weights: make those of the linear layers smaller. METALA_BF16 halves them; METALA_I8
// quarters them, in groups of METALA_GROUP inputs of a row with one float scale each: w = scale·q, |q| <= 127. The rest
// stays as it is: biases, `conv1d`, `aug_balance`, the embedding's lookup (a tied output layer gets a copy of its own),
// and all activations. A quantized model is for inference only: training and metala_model_set refuse it. Pointers from
// metala_model_tensor are invalid afterwards. A saved quantized model loads as one; in the file bfloat16 weights have
// their usual names, int8 weights also "<name>.scale" [out, ceil(in/64)], and `weights` is "bf16" or "int8" in the
// metadata. (BF16 tensors without that, as other programs write them, are loaded as reals.)
int metala_model_quantize(metala_context *ctx, metala_model *model, metala_dtype type);
metala_dtype metala_model_weights(const metala_model *model);                // METALA_BF16, METALA_I8 or the reals' type
size_t metala_model_bytes(const metala_model *model);                        // of all parameters in memory

// The scan's three computations of the same numbers (MetaLA section 3, general form):
typedef enum {
    METALA_CHUNKWISE,          // blocks of tokens: matrix products inside, the recurrence between; the fastest. Heads with
                               // K = 1 or V = 1 have no such products: the recurrence of many heads at once
    METALA_RECURRENT,          // token by token, state of fixed size
    METALA_PARALLEL            // the T×T attention map, written out; O(T²), for reading and testing
} metala_form;

// ------------------------------------------------------------------------------------------------ inference

typedef struct metala_state metala_state;   // what B sequences have read so far; only softmax attention's grows

// States of B sequences at position 0. The model must outlive it. All memory that steps need is taken here, but for the
// context's scratch space, which the first step takes, and for softmax attention's keys and values, which double when full.
metala_state *metala_state_create(metala_context *ctx, const metala_model *model, int B);
void metala_state_free(metala_state *state);
int metala_state_reset(metala_context *ctx, metala_state *state);                          // back to position 0
int metala_state_copy(metala_context *ctx, metala_state *to, const metala_state *from);    // fork; same model and B
// With the configuration, and any extra metadata of the caller's.
int metala_state_save(metala_context *ctx, const metala_state *state, const char *path, const metala_pair *extra,
                      size_t extras);
int metala_state_load(metala_context *ctx, metala_state *state, const char *path);         // same row and sizes required
uint64_t metala_state_position(const metala_state *state);                                 // tokens read
// Of one sequence after so many tokens; only softmax attention's depends on them.
size_t metala_state_bytes(const metala_config *config, uint64_t tokens);
// Copy out "state.<layer>" (B,H,K,V), or "conv_state.<layer>" (B,D,4): the last 4 inputs of the convolution (normalised
// and masked), oldest first; "shift_state.<layer>" of a token shift: n (B,D), key and largest exponent (B,2,D) and v (B,D)
// of the last token, one behind the other; "keys.<layer>" (B,T,H,K) and "values.<layer>" (B,T,H,V) of softmax attention.
int metala_state_get(metala_context *ctx, const metala_state *state, const char *name, metala_real *out);

// Read T more tokens of each sequence. tokens, mask (B,T); mask NULL or 1 token, 0 padding: as in the authors' code
// a masked token adds nothing to the state but still decays it, so padding belongs to the left.
// All three accept any T >= 1 and continue where the state stands, in memory that does not depend on T (but for softmax
// attention's keys and values); other ways to cut the tokens into calls give the same numbers up to rounding.
//   forward  logits (B,T,N) of every position, or NULL to only advance the state
//   prefill  logits (B,N) of the last position; the chunkwise form
//   score    adds the cross-entropy in nats over targets (B,T) that are not METALA_IGNORE to *nats, their number
//            to *counted
int metala_forward(metala_context *ctx, metala_state *state, metala_form form, const int *tokens, const uint8_t *mask,
                   size_t T, metala_real *logits);
int metala_prefill(metala_context *ctx, metala_state *state, const int *tokens, const uint8_t *mask, size_t T,
                   metala_real *logits);
int metala_score(metala_context *ctx, metala_state *state, metala_form form, const int *tokens, const int *targets,
                 const uint8_t *mask, size_t T, double *nats, size_t *counted);
// One token of each sequence: tokens (B), logits (B,N). Constant time and memory, but for softmax attention.
int metala_step(metala_context *ctx, metala_state *state, const int *tokens, metala_real *logits);

// ------------------------------------------------------------------------------------------------ training

typedef struct metala_trainer metala_trainer;   // gradients, AdamW's moments, activations for up to B×T tokens

typedef struct {               // bytes, before anything is allocated
    size_t parameters, gradients, moments, activations, scratch, total;
} metala_memory;

typedef struct {               // AdamW with decoupled weight decay and global-norm clipping
    double learning_rate, beta1, beta2, eps, weight_decay, clip_norm;   // clip_norm 0: no clipping
} metala_adamw;

// What the forward pass keeps of each layer for the backward pass; the rest is computed again. The bits are the same.
typedef enum {
    METALA_KEEP_COSTLY,        // of MetaLA: the input, q, z, v, g, scan plus augmentation, x + mixer and the two GLU
                               // products: 6 D + 2 F numbers per token and layer, and the scan's states, D·V/128;
                               // norms, convolution, gate and products of two are computed again
    METALA_KEEP_ALL,           // everything but silu(a) ⊙ b of SwiGLU, of MetaLA 14 D + 2 F and the states;
                               // metala_trainer_activation needs it
    METALA_KEEP_INPUTS         // the input of each layer, D; every layer but the last runs forward twice, a third more work
} metala_keep;

// Bytes that a trainer takes; backend: NULL for the CPU. scratch is that of the chunkwise form on the CPU; METALA_PARALLEL takes
// 2·T² numbers for each thread. All 0 for a configuration that cannot be.
metala_memory metala_trainer_memory(const metala_backend *backend, const metala_config *config, int B, size_t T,
                                    metala_keep keep, int threads);
// The model is updated in place and must outlive the trainer.
metala_trainer *metala_trainer_create(metala_context *ctx, metala_model *model, int B, size_t T, metala_keep keep);
void metala_trainer_free(metala_trainer *trainer);
// Mean cross-entropy over the targets that are not METALA_IGNORE, and weight times its gradient added to the
// gradients. inputs, targets, mask (B,T), mask may be NULL; B and T at most those of the trainer.
int metala_gradient(metala_context *ctx, metala_trainer *trainer, metala_form form, const int *inputs,
                    const int *targets, const uint8_t *mask, int B, size_t T, double weight, double *loss);
// One AdamW step with the accumulated gradients, which are zero afterwards. *norm is their 2-norm before clipping.
// A norm that is not finite is a failure: parameters and moments stay, the gradients are zero afterwards.
int metala_update(metala_context *ctx, metala_trainer *trainer, const metala_adamw *adamw, double *norm);
uint64_t metala_trainer_step(const metala_trainer *trainer);                 // updates done
int metala_trainer_zero(metala_context *ctx, metala_trainer *trainer);       // forget the accumulated gradients
// Copy out the gradient of a parameter, or, from a trainer that keeps all, an activation of the last metala_gradient
// call, by these names: "layer<i>.input", ".token_norm", ".conv_out", ".q", ".k_gate", ".k", ".v", ".g", ".alpha",
// ".scan_out", ".aug_out", ".group_norm", ".gated", ".mixer_residual", ".channel_norm", ".glu_prod", ".output", or
// "final_norm". *count receives the number of elements; out may be NULL to ask for it. ".q", ".k" and ".alpha" have the shapes
// that the scan takes (METALA_SHARED_QUERY and so on).
int metala_trainer_gradient(metala_context *ctx, const metala_trainer *trainer, const char *name, metala_real *out);
int metala_trainer_activation(metala_context *ctx, const metala_trainer *trainer, const char *name, metala_real *out,
                              size_t *count);

// Model, moments and step, with any extra metadata of the caller's, in one safetensors file that is also a model.
// Loading into a trainer whose model has the same shapes continues bit for bit.
int metala_checkpoint_save(metala_context *ctx, const metala_trainer *trainer, const char *path,
                           const metala_pair *extra, size_t extras);
int metala_checkpoint_load(metala_context *ctx, metala_trainer *trainer, const char *path);

// ------------------------------------------------------------------------------------------------ data

typedef struct metala_dataset metala_dataset;   // sequences of tokens with a target at each position

// A text file is the sequence of its bytes (vocabulary 256), cut into windows of T tokens, target = next byte.
// A safetensors file has `inputs` [N,T] (U8, U16, I32), or images [N,P,C] (U8, or floats x from 0 to 1 for the bytes
// 255·x), which are sequences of T = P patches of C bytes, of single bytes where C is 1; and either `targets` [N,T] (I32,
// METALA_IGNORE = no loss), or `labels` [N] (I32: the target of the last position), and optionally `mask` [N,T] (U8); T
// of the file is used and the argument is only an upper bound to check against (0: none).
metala_dataset *metala_dataset_open(metala_context *ctx, const char *path, size_t T);
// Split off the last part (0 < fraction < 1) as a dataset of its own. Both must be freed, from one thread at a time.
metala_dataset *metala_dataset_split(metala_context *ctx, metala_dataset *dataset, double fraction);
void metala_dataset_free(metala_dataset *dataset);
size_t metala_dataset_length(const metala_dataset *dataset);       // T of a sequence
size_t metala_dataset_sequences(const metala_dataset *dataset);    // disjoint sequences
size_t metala_dataset_tokens(const metala_dataset *dataset);       // bytes of a text, N·T of a file
int metala_dataset_vocab(const metala_dataset *dataset);           // smallest vocabulary that holds all of it; of patches, the classes
int metala_dataset_patch(const metala_dataset *dataset);           // C of patches, 0 of tokens
int metala_dataset_is_text(const metala_dataset *dataset);
// Sequence i in order, for evaluation; the last one of a text may be short: rest is METALA_IGNORE with mask 0.
// inputs, targets, mask have T entries, inputs of patches T·C.
void metala_dataset_sequence(const metala_dataset *dataset, size_t i, int *inputs, int *targets, uint8_t *mask);
// The index-th batch of B sequences of the stream that this seed stands for: windows at random places of a text,
// shuffled epochs of a file. Depends on nothing else, which is what makes a resumed run continue exactly.
void metala_dataset_batch(const metala_dataset *dataset, uint64_t seed, uint64_t index, int B, int *inputs,
                          int *targets, uint8_t *mask);

// A small generator (splitmix64) for sampling: 64 random bits, or uniform in [0,1).
uint64_t metala_random(uint64_t *state);
double metala_uniform(uint64_t *state);

// ------------------------------------------------------------------------------------------------ files

typedef struct metala_file metala_file;   // a safetensors file, its header read and checked

size_t metala_dtype_bytes(metala_dtype dtype);
const char *metala_dtype_name(metala_dtype dtype);
// Opens and checks everything in the header against the file: lengths, offsets, overlaps and holes, dtypes, shapes,
// duplicates.
metala_file *metala_file_open(metala_context *ctx, const char *path);
void metala_file_close(metala_file *file);
size_t metala_file_tensors(const metala_file *file);
const metala_tensor *metala_file_tensor(const metala_file *file, size_t i);
const metala_tensor *metala_file_find(const metala_file *file, const char *name);   // NULL when not there
const char *metala_file_metadata(const metala_file *file, const char *key);         // NULL when not there
// Read a tensor as F32, F64 (from any floating type), I32 (from any integer type, out of range is a failure), or what
// is BF16 or I8 as it is (uint16_t, int8_t).
int metala_file_read(metala_context *ctx, metala_file *file, const metala_tensor *tensor, metala_dtype as, void *out);
// The configuration in the metadata, or in config.json beside the file.
int metala_file_config(metala_context *ctx, const metala_file *file, metala_config *config);
// Write count tensors (name, dtype F64, F32, BF16, I32, U16, I8 or U8, ndim and shape are used) and metadata: to a
// temporary file beside path, which replaces whatever is at path, but only when all of it is written.
int metala_file_write(metala_context *ctx, const char *path, const metala_tensor *tensors, const void *const *data,
                      size_t count, const metala_pair *metadata, size_t pairs);

// ------------------------------------------------------------------------------------------------ backend

// For map: f(x) = x, silu(x), elu(x) + 1. For ssm: how a complex decay is made of what is learned.
typedef enum { METALA_MAP_NONE, METALA_MAP_SILU, METALA_MAP_ELU1 } metala_map;
typedef enum { METALA_SSM_LRU, METALA_SSM_ZOH, METALA_SSM_DSS } metala_ssm;
// What the scan's inputs share: q or k all heads, α all tokens, q and k all sequences. One bit each.
enum { METALA_SHARED_QUERY = 1, METALA_SHARED_KEY = 2, METALA_CONSTANT_DECAY = 4, METALA_SHARED_SEQUENCES = 8 };

// Linear layers that read the same x (rows,in), and their gradients: arrays of the host, with pointers to the backend's
// memory. A device may read x once for all of them.
typedef struct {                // y = x Wᵀ + bias + residual
    metala_real *y;             // (rows,out)
    const void *w;              // [out,in] reals, or quantized: bfloat16, or int8 with scales; all layers of a call alike
    const float *scales;        // [out,groups of METALA_GROUP inputs] of int8, or NULL
    const metala_real *bias;    // [out] or NULL
    const metala_real *residual;  // (rows,out), not y, or NULL
    size_t out;
} metala_linear;
typedef struct {                // dx = Σ_layers dy W      dW += dyᵀ x      dbias += Σ_rows dy
    metala_real *dw, *dbias;    // [out,in], [out]; NULL for what is not wanted
    const metala_real *dy;      // (rows,out)
    const metala_real *w;       // [out,in]
    size_t out;
} metala_linear_gradient;

// One function per kernel; metala.c fills the table with loops. `rows` is B·T. Every equation and its source stands
// above the function of the same name in metala.c. Backward functions ADD to gradients of parameters (dw, db, dE)
// and WRITE gradients of activations unless said otherwise. A kernel that fails (no scratch memory) marks the
// context, and the model reports it at the end of the pass. Pointers are the backend's memory, except where a
// comment says host.
struct metala_backend {
    const char *name;                                                                     // "cpu"
    size_t logits_at_once;                              // of the output layer: few, to fit into a CPU's cache; many fill a GPU
    void *(*alloc)(size_t bytes);                                                         // zeroed; NULL: no memory
    void (*free)(void *memory);
    void (*upload)(metala_context *ctx, void *to, const void *host, size_t bytes);
    void (*download)(metala_context *ctx, void *host, const void *from, size_t bytes);
    void (*copy)(metala_context *ctx, void *to, const void *from, size_t bytes);
    void (*zero)(metala_context *ctx, void *memory, size_t bytes);
    // Optional, for a device that takes long to start a kernel; begin_recording is NULL without it. Between begin_recording (0:
    // begun, -1: it cannot) and end_recording (NULL: it could not), kernels and copies are kept and not run; replay runs them on
    // what the same memory holds then.
    int (*begin_recording)(metala_context *ctx);
    void *(*end_recording)(metala_context *ctx);
    void (*replay)(metala_context *ctx, void *recording);
    void (*forget)(void *recording);

    void (*embedding_forward)(metala_context *ctx, metala_real *x, const int *tokens, const metala_real *E,
        size_t rows, size_t D, double scale);
    void (*embedding_backward)(metala_context *ctx, metala_real *dE, const metala_real *dx, const int *tokens,
        size_t rows, size_t D, double scale, int pad_token_id);
    void (*patch_forward)(metala_context *ctx, metala_real *x, const int *bytes, size_t n);
    void (*rms_forward)(metala_context *ctx, metala_real *n, metala_real *r, const metala_real *x,
        const uint8_t *mask, size_t rows, size_t D, double eps);
    void (*rms_backward)(metala_context *ctx, metala_real *dx, const metala_real *dn, const metala_real *x,
        const metala_real *r, const uint8_t *mask, size_t rows, size_t D);  // adds to dx
    void (*conv_forward)(metala_context *ctx, metala_real *u, metala_real *c, const metala_real *n,
        const metala_real *w, metala_real *tail, size_t B, size_t T, size_t D);  // u may be NULL: c alone; tail: read, then updated
    void (*conv_backward)(metala_context *ctx, metala_real *dn, metala_real *dw, const metala_real *du,
        const metala_real *c, const metala_real *n, const metala_real *w, const metala_real *tail, size_t B, size_t T,
        size_t D);  // c NULL: du is the gradient of c; tail: as it was before conv_forward
    void (*conv_step)(metala_context *ctx, metala_real *u, metala_real *tail, const metala_real *x, const metala_real *w,
        size_t B, size_t D, double eps);  // tail: read, then updated
    void (*matmul_forward)(metala_context *ctx, const metala_linear *layers, int count, const metala_real *x, size_t rows,
        size_t in);
    void (*matmul_backward)(metala_context *ctx, metala_real *dx, const metala_linear_gradient *layers, int count,
        const metala_real *x, size_t rows, size_t in, int accumulate);  // accumulate: adds to dx, which may be NULL
    void (*matmul_quantized)(metala_context *ctx, const metala_linear *layers, int count, const metala_real *x, size_t rows,
        size_t in);
    void (*mask_rows)(metala_context *ctx, metala_real *x, const uint8_t *mask, size_t rows, size_t D);
    void (*gate_forward)(metala_context *ctx, metala_real *alpha, metala_real *k, const metala_real *z, size_t n,
        double tau);  // k may be NULL
    void (*gate_backward)(metala_context *ctx, metala_real *dz, const metala_real *da, const metala_real *dk,
        const metala_real *z, const metala_real *alpha, size_t n, double tau);
    void (*scan_forward)(metala_context *ctx, metala_form form, metala_real *o, metala_real *S, metala_real *states,
        const metala_real *q, const metala_real *k, const metala_real *v, const metala_real *alpha, size_t B,
        size_t T, size_t H, size_t K, size_t V, double scale, int shared);
    void (*scan_backward)(metala_context *ctx, metala_form form, metala_real *dq, metala_real *dk, metala_real *dv,
        metala_real *da, metala_real *dS, const metala_real *dO, const metala_real *states, const metala_real *q,
        const metala_real *k, const metala_real *v, const metala_real *alpha, size_t B, size_t T, size_t H, size_t K,
        size_t V, double scale, int shared);  // da may be NULL
    void (*mixer_step)(metala_context *ctx, metala_real *y, metala_real *S, const metala_real *z, const metala_real *q,
        const metala_real *v, const metala_real *g, const metala_real *b, size_t B, size_t H, size_t K, size_t V, double tau,
        double scale, double eps);  // S: read, then updated; b may be NULL
    void (*augment_forward)(metala_context *ctx, metala_real *p, const metala_real *o, const metala_real *q,
        const metala_real *k, const metala_real *v, const metala_real *b, size_t rows, size_t H, size_t K, size_t V);
    void (*augment_backward)(metala_context *ctx, metala_real *dq, metala_real *dk, metala_real *dv, metala_real *db,
        const metala_real *dp, const metala_real *q, const metala_real *k, const metala_real *v, const metala_real *b,
        size_t rows, size_t H, size_t K, size_t V);  // adds to dq, dk, dv
    void (*head_norm_forward)(metala_context *ctx, metala_real *y, metala_real *n, metala_real *rho, const metala_real *p,
        const metala_real *g, size_t rows, size_t H, size_t V, double eps);  // g NULL: no gate, no y
    void (*head_norm_backward)(metala_context *ctx, metala_real *dp, metala_real *dg, const metala_real *dy,
        const metala_real *n, const metala_real *rho, const metala_real *g, size_t rows, size_t H,
        size_t V);  // dp may be dy; g NULL: dy is the gradient of n
    void (*silu_gate_forward)(metala_context *ctx, metala_real *y, const metala_real *a, const metala_real *b,
        size_t n);
    void (*silu_gate_backward)(metala_context *ctx, metala_real *da, metala_real *db, metala_real *y, const metala_real *dy,
        const metala_real *a, const metala_real *b, size_t n);  // y: made once more, or NULL; none of the three may be another
    void (*swiglu_forward)(metala_context *ctx, const metala_linear *layers, metala_dtype weights, metala_real *h,
        const metala_real *n, size_t rows, size_t in);  // h: room that it may use
    void (*swiglu_backward)(metala_context *ctx, metala_real *dn, const metala_linear_gradient *layers, metala_real *h,
        metala_real *dh, metala_real *da, metala_real *db, const metala_real *a, const metala_real *b, const metala_real *n,
        size_t rows, size_t in);  // h, dh, da, db: room that it may use
    void (*swiglu_step)(metala_context *ctx, metala_real *y, const metala_linear *layers, metala_dtype weights, metala_real *n,
        metala_real *r, const metala_real *x, size_t rows, size_t in, double eps);  // n, r and the layers' y: room that it may use
    void (*add)(metala_context *ctx, metala_real *y, const metala_real *a, const metala_real *b, size_t n);

    // ---- Kernels of the other rows of the general form.
    void (*shift_forward)(metala_context *ctx, metala_real *y, const metala_real *n, const metala_real *mu,
        const metala_real *previous, size_t B, size_t T, size_t D);
    void (*shift_backward)(metala_context *ctx, metala_real *dn, metala_real *dmu, const metala_real *dy,
        const metala_real *n, const metala_real *mu, const metala_real *previous, size_t B, size_t T,
        size_t D);  // adds to dn
    void (*last_token)(metala_context *ctx, metala_real *to, const metala_real *x, size_t B, size_t T, size_t D);
    void (*map_forward)(metala_context *ctx, metala_real *y, const metala_real *x, size_t n, metala_map map);
    void (*map_backward)(metala_context *ctx, metala_real *dx, const metala_real *dy, const metala_real *x, size_t n,
        metala_map map);  // dx may be dy
    void (*taylor_forward)(metala_context *ctx, metala_real *y, const metala_real *x, size_t rows, size_t H, size_t d);
    void (*taylor_backward)(metala_context *ctx, metala_real *dx, const metala_real *dy, const metala_real *x,
        size_t rows, size_t H, size_t d);
    void (*rotate_forward)(metala_context *ctx, metala_real *y, const metala_real *x, const metala_real *theta, size_t B,
        size_t T, size_t H, size_t K, int shared, uint64_t position, int negative);  // y may be x
    void (*rotate_backward)(metala_context *ctx, metala_real *dx, metala_real *dtheta, const metala_real *dy,
        const metala_real *y, const metala_real *theta, size_t B, size_t T, size_t H, size_t K, int shared,
        uint64_t position, int negative);  // dx may be dy; dtheta may be NULL
    void (*bounded_gate_forward)(metala_context *ctx, metala_real *alpha, metala_real *k, const metala_real *z,
        const metala_real *gamma, size_t rows, size_t n);  // k may be NULL
    void (*bounded_gate_backward)(metala_context *ctx, metala_real *dz, metala_real *dgamma, const metala_real *da,
        const metala_real *dk, const metala_real *z, const metala_real *gamma, size_t rows,
        size_t n);  // dk and dgamma may be NULL
    void (*bounds_forward)(metala_context *ctx, metala_real *gamma, const metala_real *G, size_t L, size_t n);
    void (*bounds_backward)(metala_context *ctx, metala_real *dG, const metala_real *dgamma, const metala_real *G, size_t L,
        size_t n);
    void (*ssm_forward)(metala_context *ctx, metala_ssm kind, metala_real *alpha, metala_real *theta, metala_real *b,
        const metala_real *decay, const metala_real *phase, const metala_real *step, size_t H, size_t N, size_t length);
    void (*ssm_backward)(metala_context *ctx, metala_ssm kind, metala_real *ddecay, metala_real *dphase, metala_real *dstep,
        const metala_real *da, const metala_real *dtheta, const metala_real *db, const metala_real *decay,
        const metala_real *phase, const metala_real *step, size_t H, size_t N, size_t length);
    void (*scale_pairs_forward)(metala_context *ctx, metala_real *y, const metala_real *x, const metala_real *b, size_t rows,
        size_t n);
    void (*scale_pairs_backward)(metala_context *ctx, metala_real *dx, metala_real *db, const metala_real *dy,
        const metala_real *x, const metala_real *b, size_t rows, size_t n);
    void (*selective_forward)(metala_context *ctx, metala_real *alpha, metala_real *v, const metala_real *z,
        const metala_real *x, const metala_real *A, size_t rows, size_t C, size_t N);
    void (*selective_backward)(metala_context *ctx, metala_real *dz, metala_real *dx, metala_real *dA, const metala_real *da,
        const metala_real *dv, const metala_real *z, const metala_real *x, const metala_real *A, size_t rows, size_t C,
        size_t N);
    void (*copy_heads_forward)(metala_context *ctx, metala_real *y, const metala_real *x, size_t rows, size_t H, size_t K);
    void (*copy_heads_backward)(metala_context *ctx, metala_real *dx, const metala_real *dy, size_t rows, size_t H,
        size_t K);
    void (*wkv_forward)(metala_context *ctx, metala_real *q, metala_real *key, metala_real *alpha, metala_real *bonus,
        const metala_real *k, const metala_real *w, const metala_real *u, const uint8_t *mask, metala_real *previous,
        size_t B, size_t T, size_t D, uint64_t position);  // previous: read, then updated
    void (*wkv_backward)(metala_context *ctx, metala_real *dk, metala_real *dw, metala_real *du, const metala_real *dkey,
        const metala_real *da, const metala_real *dbonus, const metala_real *key, const metala_real *bonus,
        const metala_real *w, const uint8_t *mask, size_t B, size_t T, size_t D);
    void (*extend_forward)(metala_context *ctx, metala_real *y, const metala_real *v, const uint8_t *mask,
        const metala_real *previous, int delayed, size_t B, size_t T, size_t H, size_t V);
    void (*extend_backward)(metala_context *ctx, metala_real *dv, const metala_real *dy, const uint8_t *mask, int delayed,
        size_t B, size_t T, size_t H, size_t V);
    void (*normalise_forward)(metala_context *ctx, metala_real *y, const metala_real *o, const metala_real *bonus,
        const metala_real *v, size_t rows, size_t H, size_t V, double eps);  // bonus may be NULL
    void (*normalise_backward)(metala_context *ctx, metala_real *dO, metala_real *dbonus, metala_real *dv,
        const metala_real *dy, const metala_real *y, const metala_real *o, const metala_real *bonus, const metala_real *v,
        size_t rows, size_t H, size_t V, double eps);
    void (*skip_forward)(metala_context *ctx, metala_real *y, const metala_real *o, const metala_real *x,
        const metala_real *d, size_t rows, size_t n);  // y may be o
    void (*skip_backward)(metala_context *ctx, metala_real *dx, metala_real *dd, const metala_real *dy,
        const metala_real *x, const metala_real *d, size_t rows, size_t n);  // adds to dx
    void (*multiply_forward)(metala_context *ctx, metala_real *y, const metala_real *a, const metala_real *b, size_t n);
    void (*multiply_backward)(metala_context *ctx, metala_real *da, metala_real *db, const metala_real *dy,
        const metala_real *a, const metala_real *b, size_t n);  // db may be dy
    void (*sigmoid_gate_forward)(metala_context *ctx, metala_real *y, const metala_real *a, const metala_real *b,
        size_t n);
    void (*sigmoid_gate_backward)(metala_context *ctx, metala_real *da, metala_real *db, const metala_real *dy,
        const metala_real *a, const metala_real *b, size_t n);
    void (*attention_forward)(metala_context *ctx, metala_real *o, metala_real *lse, const metala_real *q,
        const metala_real *k, const metala_real *v, const uint8_t *mask, size_t B, size_t T, size_t past, size_t stride,
        size_t H, size_t K, size_t V, double scale);
    void (*attention_backward)(metala_context *ctx, metala_real *dq, metala_real *dk, metala_real *dv, const metala_real *dO,
        const metala_real *o, const metala_real *lse, const metala_real *q, const metala_real *k, const metala_real *v,
        const uint8_t *mask, size_t B, size_t T, size_t H, size_t K, size_t V, double scale);

    void (*cross_entropy_forward)(metala_context *ctx, metala_real *loss, metala_real *lse, const metala_real *logits,
        const int *targets, size_t rows, size_t N);
    void (*cross_entropy_backward)(metala_context *ctx, metala_real *dlogits, const metala_real *logits,
        const metala_real *lse, const int *targets, size_t rows, size_t N, double weight);  // dlogits may be logits
    void (*output_backward)(metala_context *ctx, metala_real *dx, metala_real *dw, metala_real *logits, const metala_real *lse,
        const int *targets, const metala_real *x, const metala_real *w, size_t rows, size_t N, size_t in,
        double weight);  // sets dx, adds to dw; logits: read, then room, of which nobody knows what it holds
    double (*sum_squares)(metala_context *ctx, const metala_real *x, size_t n);  // result on the host
    void (*adamw)(metala_context *ctx, metala_real *p, metala_real *m, metala_real *v, const metala_real *g, size_t n,
        const metala_adamw *adamw, uint64_t step, double gradient_scale, double weight_decay);
};

const metala_backend *metala_cpu(void);

// The kernels of cuda_metala.cu, for an NVIDIA GPU; NULL when there is none that can run them, and why (one line of at
// most `size` bytes) says the reason. Built without them (make CUDA=1), always NULL. `math` is how the matrix products of
// more than 4 rows, and those inside the chunkwise scan, are computed; all else is float in each.
typedef enum {
    METALA_EXACT,              // float
    METALA_TF32,               // tensor cores: factors of 11 bits, sums in float
    METALA_BFLOAT16            // tensor cores: factors of 8 bits, sums in float
} metala_math;
const metala_backend *metala_cuda(metala_math math, char *why, size_t size);

// For backends. Memory of the context's backend for the duration of one kernel call, its content undefined; NULL marks
// the context as failed. And the mark of a kernel that fails for another reason, with its message.
void *metala_context_scratch(metala_context *ctx, size_t bytes);
void metala_context_fail(metala_context *ctx, const char *format, ...);

// 0 unless a kernel of this context failed since the last call; what it was is in metala_error.
int metala_context_failed(metala_context *ctx);

#ifdef __cplusplus
}
#endif
#endif
