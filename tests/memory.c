// memory.c - what happens when there is no memory: every allocation of metala.c is refused once, by malloc, calloc,
// realloc or the backend's alloc (which are all of libc's here).
//
//   build/memory-asan           a line for each way to fail, "N passed, N failed" last (make asan builds and runs it)
//
// The tour below uses everything that the library has, with the models of every row. It is made once for each of its allocations, which fails: the call
// that needed it must return failure, say that it was memory, and leave no half-written file. Then
//   once       there is memory again, and the same call is repeated: it must succeed, and at the end of the tour all
//              numbers must have the bits of an undisturbed tour
//   for good   nothing more is to be had: everything must still be freed
// After each tour nothing may be left allocated. The sanitizers watch.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long calls, refused_from = -1, refused_to, alive;

static int refuse(void) {
    calls++;
    return refused_from > 0 && calls >= refused_from && calls <= refused_to;
}
static void *counted(void *memory) {
    alive += memory != NULL;
    return memory;
}
static void *scarce_malloc(size_t bytes) { return refuse() ? NULL : counted(malloc(bytes)); }
static void *scarce_calloc(size_t n, size_t bytes) { return refuse() ? NULL : counted(calloc(n, bytes)); }
static void *scarce_realloc(void *old, size_t bytes) {
    void *memory = refuse() ? NULL : realloc(old, bytes);
    if (memory && !old) alive++;
    return memory;
}
static void scarce_free(void *memory) {
    alive -= memory != NULL;
    free(memory);
}

#define malloc scarce_malloc
#define calloc scarce_calloc
#define realloc scarce_realloc
#define free scarce_free
#include "../metala.c"

// ------------------------------------------------------------------------------------------------ the tour

enum { B = 2, T = 5, N = 256, D = 8, IMAGES = 12 };
#define PLACE "build/memory."
static const char *const text_path = PLACE "txt", *const images_path = PLACE "images.safetensors";
static const char *const checkpoint_path = PLACE "checkpoint.safetensors", *const model_path = PLACE "model.safetensors";
static const char *const plain_path = PLACE "plain.safetensors", *const config_path = "build/config.json";
static const char *const state_path = PLACE "state.safetensors", *const small_path = PLACE "small.safetensors";
static const char *const all_paths[] = {PLACE "txt", PLACE "images.safetensors", PLACE "checkpoint.safetensors",
    PLACE "model.safetensors", PLACE "plain.safetensors", "build/config.json", PLACE "state.safetensors",
    PLACE "small.safetensors"};

static struct {
    metala_context *ctx;
    metala_dataset *text, *tail, *images;
    metala_model *model, *other, *loaded, *plain, *small, *again;
    metala_trainer *trainer, *next;
    metala_state *state, *fork, *quick;
    metala_file *file;
    int inputs[B * T], targets[B * T];
    uint8_t mask[B * T];
    real logits[B * T * N], numbers[N * D];
    double results[64];                  // whatever was computed
    int result_count;
} w;

static void result(double x) {
    if (w.result_count < 64) w.results[w.result_count++] = x;
}
static void results_of(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)(i % 7 + 1);
    result(sum);
}

static const metala_named_row *row;      // of the models of this tour

static metala_config small_sizes(void) {
    metala_config c = metala_config_default();
    c.vocab_size = N, c.width = D, c.layers = 2, c.heads = 2, c.glu_dim = 5, c.glu_bias = 1;
    c.row = row->row, c.expand = row->expand, c.state_size = c.low_rank = c.feature_dim = 2, c.length = T;
    return c;
}

// Each returns 0 for success; one that is repeated begins anew.
static int open_context(void) { return !(w.ctx = metala_open(metala_cpu(), 1)); }
static int open_text(void) { return !(w.text = metala_dataset_open(w.ctx, text_path, T)); }
static int split_text(void) { return !(w.tail = metala_dataset_split(w.ctx, w.text, 0.25)); }
static int write_images(void) {
    static const metala_tensor tensors[] = {{"inputs", METALA_F32, 3, {IMAGES / 4, 2, 2}, IMAGES, 0, 0},
        {"labels", METALA_I32, 1, {IMAGES / 4}, IMAGES / 4, 0, 0}, {"mask", METALA_U8, 2, {IMAGES / 4, 2}, IMAGES / 2, 0, 0}};
    static const metala_pair pairs[] = {{"vocab_size", "256"}, {"title", "four\tpixels"}};
    float pixels[IMAGES];
    int32_t labels[IMAGES / 4] = {3, 2, 1};
    uint8_t mask[IMAGES / 2];
    const void *data[] = {pixels, labels, mask};
    for (int i = 0; i < IMAGES; i++) pixels[i] = (float)(i * 20) / 255, mask[i / 2] = i / 2 % 2 > 0;
    return metala_file_write(w.ctx, images_path, tensors, data, 3, pairs, 2);
}
static int open_images(void) { return !(w.images = metala_dataset_open(w.ctx, images_path, 0)); }
static int make_model(void) {
    metala_config c = small_sizes();
    return !(w.model = metala_model_create(w.ctx, &c));
}
static int init_model(void) { return metala_model_init(w.ctx, w.model, 7, NULL); }
static int create_trainer(void) { return !(w.trainer = metala_trainer_create(w.ctx, w.model, B, T, METALA_KEEP_ALL)); }
static int gradient_in(metala_form form) {
    double loss = 0;
    metala_dataset_batch(w.text, 1, 0, B, w.inputs, w.targets, w.mask);
    w.mask[0] = 0;
    metala_trainer_zero(w.ctx, w.trainer);
    if (metala_gradient(w.ctx, w.trainer, form, w.inputs, w.targets, w.mask, B, T, 0.5, &loss)) return -1;
    result(loss);
    return 0;
}
static int gradient_recurrent(void) { return gradient_in(METALA_RECURRENT); }
static int gradient_parallel(void) { return gradient_in(METALA_PARALLEL); }
static int gradient_chunkwise(void) { return gradient_in(METALA_CHUNKWISE); }
static int read_gradient(void) {
    if (metala_trainer_gradient(w.ctx, w.trainer, "model.embed_tokens.weight", w.numbers)) return -1;
    results_of(w.numbers, N * D);
    return 0;
}
static int read_activation(void) {
    size_t count = 0;
    if (metala_trainer_activation(w.ctx, w.trainer, "layer1.scan_out", w.numbers, &count)) return -1;
    results_of(w.numbers, count);
    return 0;
}
static int update(void) {
    static const metala_adamw a = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1};
    double norm = 0;
    if (metala_update(w.ctx, w.trainer, &a, &norm)) return -1;
    result(norm);
    return 0;
}
static int save_checkpoint(void) {
    static const metala_pair pairs[] = {{"train.name", "a \"tour\""}, {"train.step", "1"}};
    return metala_checkpoint_save(w.ctx, w.trainer, checkpoint_path, pairs, 2);
}
static int create_other(void) {
    metala_config c = small_sizes();
    return !(w.other = metala_model_create(w.ctx, &c));
}
static int create_next(void) { return !(w.next = metala_trainer_create(w.ctx, w.other, B, T, METALA_KEEP_INPUTS)); }
static int load_checkpoint(void) { return metala_checkpoint_load(w.ctx, w.next, checkpoint_path); }
static int go_on(void) {
    double loss = 0;
    metala_trainer_zero(w.ctx, w.next);
    if (metala_gradient(w.ctx, w.next, METALA_CHUNKWISE, w.inputs, w.targets, NULL, B, T, 1, &loss)) return -1;
    result(loss);
    return 0;
}
static int save_model(void) { return metala_model_save(w.ctx, w.other, model_path); }
static int load_model(void) { return !(w.loaded = metala_model_load(w.ctx, model_path)); }
static int open_file(void) { return !(w.file = metala_file_open(w.ctx, model_path)); }
static int read_file(void) {
    const metala_tensor *t = metala_file_find(w.file, "model.embed_tokens.weight");
    metala_config c;
    if (metala_file_config(w.ctx, w.file, &c) || metala_file_read(w.ctx, w.file, t, REAL_TYPE, w.numbers)) return -1;
    result(c.width);
    results_of(w.numbers, N * D);
    return 0;
}
static int load_plain(void) { return !(w.plain = metala_model_load(w.ctx, plain_path)); }
static int read_and_set(void) {
    if (metala_model_get(w.ctx, w.plain, "model.embed_tokens.weight", w.numbers)) return -1;
    results_of(w.numbers, N * D);
    return metala_model_set(w.ctx, w.plain, "model.embed_tokens.weight", w.numbers);
}
static int create_state(void) { return !(w.state = metala_state_create(w.ctx, w.loaded ? w.loaded : w.model, B)); }
static int prefill(void) {
    metala_state_reset(w.ctx, w.state);
    if (metala_prefill(w.ctx, w.state, w.inputs, w.mask, T, w.logits)) return -1;
    results_of(w.logits, B * N);
    return 0;
}
static int create_fork(void) { return !(w.fork = metala_state_create(w.ctx, w.loaded ? w.loaded : w.model, B)); }
static int copy_state(void) { return metala_state_copy(w.ctx, w.fork, w.state); }
static int save_state(void) { return metala_state_save(w.ctx, w.state, state_path, NULL, 0); }
static int read_state(void) {
    if (metala_state_get(w.ctx, w.state, "state.1", w.numbers)) return -1;
    results_of(w.numbers, B * (D / 4) * (D / 2));
    if (metala_state_get(w.ctx, w.state, "conv_state.1", w.numbers)) return -1;
    results_of(w.numbers, B * D * METALA_CONV);
    return 0;
}
static int load_state(void) { return metala_state_load(w.ctx, w.fork, state_path); }
static int step(void) {
    if (metala_step(w.ctx, w.fork, w.inputs, w.logits)) return -1;
    results_of(w.logits, B * N);
    return 0;
}
static int forward_in(metala_form form) {
    metala_state_reset(w.ctx, w.state);
    if (metala_forward(w.ctx, w.state, form, w.inputs, w.mask, T, w.logits)) return -1;
    results_of(w.logits, B * T * N);
    return 0;
}
static int forward_recurrent(void) { return forward_in(METALA_RECURRENT); }
static int forward_parallel(void) { return forward_in(METALA_PARALLEL); }
static int forward_chunkwise(void) { return forward_in(METALA_CHUNKWISE); }
static int score(void) {
    double nats = 0;
    size_t counted = 0;
    metala_state_reset(w.ctx, w.state);
    if (metala_score(w.ctx, w.state, METALA_CHUNKWISE, w.inputs, w.targets, NULL, T, &nats, &counted)) return -1;
    result(nats), result((double)counted);
    return 0;
}
static int load_small(void) { return !(w.small = metala_model_load(w.ctx, model_path)); }
static int quantize(void) { return metala_model_quantize(w.ctx, w.small, METALA_I8); }
static int save_small(void) { return metala_model_save(w.ctx, w.small, small_path); }
static int load_again(void) { return !(w.again = metala_model_load(w.ctx, small_path)); }
static int create_quick(void) { return !(w.quick = metala_state_create(w.ctx, w.again, B)); }
static int quick_step(void) {
    metala_state_reset(w.ctx, w.quick);
    if (metala_step(w.ctx, w.quick, w.inputs, w.logits)) return -1;
    results_of(w.logits, B * N);
    return 0;
}

#define STOP(function) {#function, function, 1}
#define FIRST(function) {#function, function, 0}                      // only with the models of the first row, MetaLA
static const struct stop { const char *name; int (*go)(void), every_row; } stops[] = {
    STOP(open_context), STOP(open_text), FIRST(split_text), FIRST(write_images), FIRST(open_images), STOP(make_model),
    STOP(init_model), STOP(create_trainer), STOP(gradient_recurrent), STOP(gradient_parallel), STOP(gradient_chunkwise),
    FIRST(read_gradient), FIRST(read_activation), STOP(update), FIRST(save_checkpoint), FIRST(create_other),
    FIRST(create_next), FIRST(load_checkpoint), FIRST(go_on), FIRST(save_model), FIRST(load_model), FIRST(open_file),
    FIRST(read_file), FIRST(load_plain), FIRST(read_and_set), STOP(create_state), STOP(prefill), STOP(create_fork),
    STOP(copy_state), STOP(save_state), FIRST(read_state), STOP(load_state), STOP(step), STOP(forward_recurrent),
    STOP(forward_parallel), STOP(forward_chunkwise), STOP(score), FIRST(load_small), FIRST(quantize), FIRST(save_small),
    FIRST(load_again), FIRST(create_quick), FIRST(quick_step)};
enum { STOPS = sizeof stops / sizeof *stops };

static void home(void) {
    metala_file_close(w.file);
    metala_state_free(w.state), metala_state_free(w.fork), metala_state_free(w.quick);
    metala_trainer_free(w.trainer), metala_trainer_free(w.next);
    metala_model_free(w.model), metala_model_free(w.other), metala_model_free(w.loaded), metala_model_free(w.plain);
    metala_model_free(w.small), metala_model_free(w.again);
    metala_dataset_free(w.text), metala_dataset_free(w.tail), metala_dataset_free(w.images);
    metala_close(w.ctx);
}

// ------------------------------------------------------------------------------------------------ refusing

static int passed, failed;

static void check(int truth, const char *mode, long n, const char *name, const char *what) {
    if (truth) return;
    failed++;
    printf("%s, allocation %ld, in %s: %s   FAILED\n", mode, n, name, what);
}

static int is_there(const char *path) {
    FILE *stream = fopen(path, "rb");
    if (stream) fclose(stream);
    return stream != NULL;
}

static int half_written(void) {
    int found = 0;
    for (size_t i = 0; i < sizeof all_paths / sizeof *all_paths; i++) {
        char name[80];
        snprintf(name, sizeof name, "%s.tmp", all_paths[i]);
        found |= is_there(name);
    }
    return found;
}

// The tour in which the allocation number n fails, or n and all that follow. Returns 1 when there was such an allocation.
static int tour(const char *mode, long n, int for_good) {
    int hurt = 0, lost = 0;
    memset(&w, 0, sizeof w);
    calls = 0, refused_from = n, refused_to = for_good ? LONG_MAX : n;
    for (int i = 0; i < STOPS && !lost; i++) {
        if (row != metala_rows() && !stops[i].every_row) continue;
        int results = w.result_count, wrong = stops[i].go(), was_refused = n > 0 && calls >= n && !hurt;
        check(!wrong == !was_refused, mode, n, stops[i].name, wrong ? "failed, although there was memory" : "did not notice");
        if (!was_refused && !wrong) continue;
        hurt = 1;
        if (!strstr(metala_error(w.ctx), "memory")) check(0, mode, n, stops[i].name, metala_error(w.ctx));
        check(!half_written(), mode, n, stops[i].name, "left half a file");
        lost = for_good || !wrong;
        w.result_count = results;
        if (!lost && stops[i].go()) {
            check(0, mode, n, stops[i].name, "failed again, although there was memory");
            lost = 1;
        }
    }
    refused_from = -1;
    home();
    check(alive == 0, mode, n, "all", "something was not freed");
    alive = 0;
    return hurt;
}

// The files that the tour finds.
static int prepare(void) {
    FILE *stream = fopen(text_path, "wb");
    if (!stream) return printf("%s cannot be written; start this in the project's folder, after mkdir build\n", text_path), -1;
    for (int i = 0; i < 400; i++) fputc("to be or not "[i % 13], stream);
    fclose(stream);
    metala_config c = small_sizes();
    metala_context *ctx = metala_open(NULL, 1);
    metala_model *m = metala_model_create(ctx, &c);
    metala_tensor tensors[64];
    const void *data[64];
    int count = metala_model_tensors(m);
    for (int i = 0; i < count; i++) {
        tensors[i] = *metala_model_tensor(m, i);
        data[i] = m->parameters + tensors[i].offset;
    }
    int status = metala_file_write(ctx, plain_path, tensors, data, (size_t)count, NULL, 0);
    metala_model_free(m);
    metala_close(ctx);
    stream = fopen(config_path, "wb");
    if (!stream || status) return -1;
    fprintf(stream, "{\"vocab_size\": %d, \"decoder_embed_dim\": %d, \"decoder_layers\": 2, \"decoder_attention_heads\": 2,\n"
            " \"glu_dim\": 5, \"bias\": true, \"tie_word_embeddings\": false, \"architectures\": [\"MetaLA\"]}\n", N, D);
    fclose(stream);
    return 0;
}

static void check_row(int for_good) {
    double undisturbed[64];
    int before = failed;
    long n = 1;
    check(!tour("undisturbed", -1, 0), "undisturbed", 0, "all", "a tour with all the memory failed");
    int results = w.result_count;
    long all = calls;
    memcpy(undisturbed, w.results, sizeof undisturbed);
    for (; tour(for_good ? "for good" : "once", n, for_good); n++)
        check(for_good || (w.result_count == results && !memcmp(w.results, undisturbed, sizeof undisturbed)), "once", n, "all",
              "other numbers than undisturbed");
    check(n == all + 1, "all", n, "all", "the tour has another number of allocations");
    printf("every allocation refused %-8s %-12s %5ld allocations, %d results   %s\n", for_good ? "for good" : "once", row->name,
           n - 1, results, failed > before ? "FAILED" : "ok");
    fflush(stdout);
    passed += failed == before;
}

int main(void) {
    row = metala_rows();
    if (prepare()) return 1;
    for (; row->name; row++) check_row(0), check_row(1);
    for (size_t i = 0; i < sizeof all_paths / sizeof *all_paths; i++) remove(all_paths[i]);
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
