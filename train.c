// train.c - trains a MetaLA model on the bytes of a file, or on sequences of tokens in a safetensors file.
//
// A step draws a batch, adds up its gradient and lets AdamW update the parameters. The batch and the learning rate are
// functions of the number of the step, and everything else is in the checkpoint: a run that was stopped goes on with
// the bits that it would have had anyway. The checkpoint is also the model that `run` loads.
//
// Contents: options - stopping and time - data - model - resuming and saving - validation - samples - a step -
// progress - the loop - profile - benchmark - main. Exit status: 0, 1 failure, 2 usage, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.

#if !defined(_POSIX_C_SOURCE) && (defined(__unix__) || defined(__APPLE__))
#define _POSIX_C_SOURCE 200809L         // clock_gettime and execvp; everything else is C99
#endif

#include "metala.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _POSIX_C_SOURCE
#include <sys/stat.h>
#include <unistd.h>
#endif

// Every failure is one line on stderr; the -1 lets callers write `return complain(...)`.
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
static int complain(const char *format, ...) {
    char line[640];
    va_list arguments;
    fflush(stdout);                                          // in the order in which things happened
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    for (char *c = line; *c; c++)                            // whatever a file name contains
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "train: %s\n", line);
    return -1;
}

// ------------------------------------------------------------------------------------------------ options

enum { MOST_OPTIONS = 120, MOST_SIZE = 1 << 24 };          // metala_config_check has the same limit
enum { COSINE, CONSTANT, LINEAR };        // --schedule
enum { ON_CPU, ON_CUDA };                 // --device

typedef struct {
    const char *data, *val, *init, *out, *keep_best, *prompt, *log, *model;
    int match_params;
    int context, batch, accumulate, warmup, schedule, max_steps, stop_at, seed, form;
    int resume, save_every, eval_every, eval_batches, sample_every, sample_tokens, log_every;
    int quiet, threads, device, math, keep_all, checkpoint_layers, profile, bench, help, version;
    double val_fraction, learning_rate, min_lr, max_seconds, temperature;
    metala_config config;
    metala_init initial;                 // 0 in std and residual_scale: what depends on the sizes
    metala_adamw adamw;
    double best_loss, seconds;           // so far: best validation loss, seconds of the runs before this one
    int best_step;
    const char *given[MOST_OPTIONS];     // what the command line says, in the order of `options`; or NULL
    char *restored[MOST_OPTIONS];        // what the checkpoint says; holds where the command line is silent
} settings;

// Everything about an option: parsing, --help, the checkpoint's metadata and --resume follow from this table.
// FLAG, WHOLE, CHOICE and COLUMN are an int in settings, NUMBER a double, TEXT a const char *. The choices of a COLUMN are
// in metala_columns, and the row of --model says which it is unless chosen.
typedef enum { HEADING, FLAG, WHOLE, CHOICE, COLUMN, NUMBER, TEXT } option_kind;

typedef struct {
    option_kind kind;
    const char *name, *alias, *argument, *initial, *help;    // help NULL: not for the command line
    double least, most;
    size_t offset;
} option;

#define AT(member) offsetof(settings, member)
#define IS_GROUP(title) {HEADING, title, 0, 0, 0, 0, 0, 0, 0}
#define IS_FLAG(name, alias, member, help) {FLAG, name, alias, 0, "0", help, 0, 1, AT(member)}
#define IS_WHOLE(name, alias, argument, initial, least, most, member, help) \
    {WHOLE, name, alias, argument, initial, help, least, most, AT(member)}
#define IS_NUMBER(name, alias, initial, least, most, member, help) \
    {NUMBER, name, alias, "X", initial, help, least, most, AT(member)}
#define IS_CHOICE(name, choices, initial, member, help) {CHOICE, name, 0, choices, initial, help, 0, 0, AT(member)}
#define IS_COLUMN(name, member, help) {COLUMN, name, 0, 0, 0, help, 0, 0, AT(config.member)}
#define IS_TEXT(name, alias, argument, initial, member, help) \
    {TEXT, name, alias, argument, initial, help, 0, 0, AT(member)}

static const option options[] = {
    IS_GROUP("Data"),
    IS_TEXT("data", 0, "FILE", 0, data, "what to train on; --data itself may be left out"),
    IS_TEXT("val", 0, "FILE", 0, val, "validation data; without it, the end of the training data is held out"),
    IS_NUMBER("val-fraction", 0, "0.1", 0, 0.9, val_fraction, "how much of it; 0 = none"),
    IS_WHOLE("context", "-T", "T", "128", 1, 1e9, context, "tokens of a sequence; a .safetensors file has its own"),
    IS_WHOLE("batch", "-B", "B", "8", 1, 1e9, batch, "sequences of one gradient pass"),
    IS_WHOLE("accumulate", 0, "N", "1", 1, 1e9, accumulate, "gradient passes of one step"),

    IS_GROUP("Model"),
    IS_WHOLE("width", 0, "D", "128", 2, MOST_SIZE, config.width, "channels, an even number"),
    IS_WHOLE("layers", 0, "L", "4", 1, MOST_SIZE, config.layers, "layers"),
    IS_WHOLE("heads", 0, "H", "4", 1, MOST_SIZE, config.heads, "heads; H divides D/2"),
    IS_WHOLE("glu-dim", 0, "F", "0", 0, MOST_SIZE, config.glu_dim,
             "channels in the GLU; 0 = 8/3 D, up to a multiple of 32"),
    IS_WHOLE("vocab", 0, "N", "0", 0, MOST_SIZE, config.vocab_size, "vocabulary; 0 = what the data needs, 256 for text"),
    IS_FLAG("tie", 0, config.tie_word_embeddings, "the output layer is the embedding"),
    IS_FLAG("scale-embedding", 0, config.scale_embedding, "embeddings times sqrt(D)"),
    IS_FLAG("glu-bias", 0, config.glu_bias, "biases in the GLU"),
    IS_NUMBER("tau", 0, "16", 1e-3, 1e6, config.tau, "decay temperature"),
    IS_NUMBER("norm-eps", 0, "1e-6", 0, 0.999999, config.norm_eps, "RMS norm: keeps the quotient finite"),
    IS_NUMBER("head-norm-eps", 0, "1e-5", 0, 0.999999, config.head_norm_eps, "the same of the norm of a head's output"),
    IS_WHOLE("pad-token", 0, "N", "-1", -1, MOST_SIZE - 1, config.pad_token_id,
             "its embedding starts as 0, its lookup passes no gradient; -1 = none"),
    IS_WHOLE("bos-token", 0, "N", "-1", -1, MOST_SIZE - 1, config.bos_token_id,
             "what run begins with when it has no prompt; -1 = none"),
    IS_WHOLE("eos-token", 0, "N", "-1", -1, MOST_SIZE - 1, config.eos_token_id, "where run stops; -1 = none"),
    IS_NUMBER("init-std", 0, "0", 0, 10, initial.std,
              "deviation of the initial weights; 0 = 1/sqrt(D); the authors' is 0.02"),
    IS_NUMBER("residual-scale", 0, "0", 0, 10, initial.residual_scale,
              "factor on those that end a residual branch; 0 = 1/sqrt(2L)"),
    IS_NUMBER("gate-scale", 0, "8", 0, 1000, initial.gate_scale, "factor on those that make the decay; the authors' is 1"),
    IS_NUMBER("gate-mean", 0, "0", 0, 1e6, initial.gate_mean,
              "and their means rise over the channels of a head up to X/D; 200 for a long memory"),

    IS_GROUP("Row of the general form (run --models shows them)"),
    IS_TEXT("model", 0, "NAME", "metala", model, "a model of the literature; what follows changes its choices"),
    IS_COLUMN("conv", row.conv, "how a token sees its neighbours"),
    IS_COLUMN("query", row.query, "what q is made of"),
    IS_COLUMN("key", row.key, "what k is made of"),
    IS_COLUMN("value", row.value, "what v is made of"),
    IS_COLUMN("decay", row.decay, "what the decay is made of"),
    IS_COLUMN("self", row.self, "what the current token adds by itself"),
    IS_COLUMN("normaliser", row.normaliser, "divide by the sum of the weights"),
    IS_COLUMN("phase", row.phase, "rotation with time"),
    IS_COLUMN("norm", row.norm, "of what was read from the state"),
    IS_COLUMN("gate", row.gate, "of the output"),
    IS_COLUMN("channels", row.channels, "q, k and the decay have half of D channels, or all"),
    IS_WHOLE("expand", 0, "E", "0", 0, 64, config.expand, "values have E D channels; 0 = as usual for the model"),
    IS_WHOLE("state-size", 0, "N", "16", 1, 1 << 16, config.state_size, "states of a channel in a state-space model"),
    IS_WHOLE("low-rank", 0, "R", "16", 1, 1 << 24, config.low_rank, "channels between the two matrices of a decay"),
    IS_WHOLE("feature-dim", 0, "d", "16", 1, 1024, config.feature_dim, "channels of a head before the Taylor features"),
    IS_WHOLE("length", 0, "T", "0", 0, INT_MAX, config.length, "tokens that decay dss normalises over; 0 = --context"),
    IS_FLAG("match-params", 0, match_params, "choose the GLU's width so that there are as many parameters as metala has"),

    IS_GROUP("Optimisation"),
    IS_NUMBER("learning-rate", "--lr", "0.006", 0, 1e30, learning_rate, "highest learning rate"),
    IS_NUMBER("min-lr", 0, "0.01", 0, 1, min_lr, "where the schedule ends, as a fraction of --learning-rate"),
    IS_WHOLE("warmup", 0, "N", "50", 0, 1e9, warmup, "steps up to it; unless given, at most a tenth of --max-steps"),
    IS_CHOICE("schedule", "cosine|constant|linear", "cosine", schedule, "from there on"),
    IS_WHOLE("max-steps", 0, "N", "1500", 0, 1e9, max_steps, "steps in all; 0 = no limit, as --max-seconds implies"),
    IS_NUMBER("max-seconds", 0, "0", 0, 1e9, max_seconds, "seconds in all; 0 = no limit. With it the schedule follows\n"
              "the clock as well, to the nearer limit: no two runs have the same bits"),
    IS_NUMBER("beta1", 0, "0.9", 0, 0.999999, adamw.beta1, "AdamW: memory of the first moment"),
    IS_NUMBER("beta2", 0, "0.95", 0, 0.9999999, adamw.beta2, "AdamW: memory of the second moment"),
    IS_NUMBER("eps", 0, "1e-8", 1e-30, 1, adamw.eps, "AdamW: keeps the quotient finite"),
    IS_NUMBER("weight-decay", 0, "0.1", 0, 100, adamw.weight_decay, "AdamW: decoupled weight decay"),
    IS_NUMBER("clip", 0, "1", 0, 1e30, adamw.clip_norm, "longest gradient; 0 = any length"),
    IS_WHOLE("seed", 0, "N", "1", 0, INT_MAX, seed, "of initial weights, batches and samples"),
    IS_CHOICE("form", "chunkwise|recurrent|parallel", "chunkwise", form, "how the scan is computed"),

    IS_GROUP("Progress"),
    IS_WHOLE("log-every", 0, "N", "25", 1, 1e9, log_every, "steps between lines of progress"),
    IS_TEXT("log", 0, "FILE.csv", 0, log, "progress as a table, losses in nats; --resume appends"),
    IS_WHOLE("eval-every", 0, "N", "250", 0, 1e9, eval_every, "steps between validations; 0 = only the last"),
    IS_WHOLE("eval-batches", 0, "N", "64", 0, 1e9, eval_batches, "batches of one, spread over the data; 0 = all of it"),
    IS_WHOLE("save-every", 0, "N", "500", 0, 1e9, save_every, "steps between checkpoints; 0 = only the last"),
    IS_TEXT("keep-best", 0, "FILE", 0, keep_best, "also keep the checkpoint with the best validation loss"),
    IS_WHOLE("sample-every", 0, "N", "500", 0, 1e9, sample_every, "steps between samples of text; 0 = none"),
    IS_WHOLE("sample-tokens", 0, "N", "300", 1, 1e9, sample_tokens, "length of a sample"),
    IS_TEXT("prompt", 0, "TEXT", "\n", prompt, "what a sample continues"),
    IS_NUMBER("temperature", 0, "0.8", 0, 100, temperature, "of a sample; 0 = the likeliest"),
    IS_NUMBER("best-loss", 0, "0", -1e300, 1e300, best_loss, 0),
    IS_WHOLE("best-step", 0, "N", "0", 0, INT_MAX, best_step, 0),
    IS_NUMBER("seconds", 0, "0", 0, 1e300, seconds, 0),

    IS_GROUP("This run alone (what is above comes back with --resume)"),
    IS_TEXT("out", "-o", "FILE", "model.safetensors", out, "checkpoint; run loads it too"),
    IS_FLAG("resume", 0, resume, "go on from --out with its settings; those given here win"),
    IS_TEXT("init", 0, "FILE", 0, init, "start from this model; its configuration holds"),
    IS_WHOLE("stop-at", 0, "N", "0", 0, 1e9, stop_at, "stop after step N, as Ctrl-C would; the schedule stays"),
    IS_WHOLE("threads", 0, "N", "0", 0, 1024, threads, "0 = one per core; the numbers are the same"),
    IS_CHOICE("device", "cpu|cuda", "cpu", device, "cuda: an NVIDIA GPU, where the programs were built with CUDA=1"),
    IS_CHOICE("math", "exact|tf32|bf16", "exact", math, "of large matrix products on the GPU: float, or tensor cores"),
    IS_FLAG("keep-all", 0, keep_all,
            "keep all that the layers compute for their gradients: more memory,\n"
            "less to compute again, the same numbers"),
    IS_FLAG("checkpoint-layers", 0, checkpoint_layers,
            "keep only what enters each layer and compute it again: less memory,\n"
            "a third more work, the same numbers"),
    IS_FLAG("profile", 0, profile, "at the end, the time that each kernel took"),
    IS_FLAG("quiet", "-q", quiet, "no progress, only errors"),
    IS_FLAG("bench", 0, bench, "time the step of these sizes (D256 L6 T256 unless given), without data"),
    IS_FLAG("help", "-h", help, "this text"),
    IS_FLAG("version", 0, version, "version and precision")};
enum { OPTIONS = sizeof options / sizeof *options };
typedef char options_fit[sizeof options / sizeof *options <= MOST_OPTIONS ? 1 : -1];      // `given` has room

static const option *option_named(const char *name) {
    const option *o = options;
    while (o->kind == HEADING || strcmp(o->name, name)) o++;
    return o;
}

// Part of the model's configuration, which is in its file.
static int is_config(const option *o) {
    return (o->kind != HEADING && o->offset >= AT(config) && o->offset < AT(config) + sizeof(metala_config)) ||
           (o->kind == TEXT && o->offset == AT(model)) || (o->kind == FLAG && o->offset == AT(match_params));
}

// Goes into the checkpoint's metadata and comes back with --resume.
static int is_kept(const option *o) { return o->kind != HEADING && o < option_named("out") && !is_config(o); }

static int is_given(const settings *s, const char *name) { return s->given[option_named(name) - options] != NULL; }

// The choices a|b|c of an option.
static const char *choices_of(const option *o, char room[160]) {
    const metala_column *c = metala_columns();
    if (o->kind != COLUMN) return o->argument;
    while (strcmp(c->name, o->name)) c++;
    *room = 0;
    for (int i = 0; c->values[i]; i++) strcat(strcat(room, i ? "|" : ""), c->values[i]);
    return room;
}

static void print_help(void) {
    puts("usage: train FILE [options]\n\n"
         "Trains a MetaLA model on the bytes of FILE, or on the sequences of a .safetensors file with the tensors\n"
         "inputs [N,T], or images in patches [N,P,C], and targets [N,T] or labels [N], and writes it to model.safetensors.\n\n"
         "  train corpus.txt\n"
         "  train corpus.txt --max-seconds 600 --layers 6 --out large.safetensors\n"
         "  train --resume --out large.safetensors          go on after Ctrl-C\n"
         "  train --bench --width 512");
    for (const option *o = options; o < options + OPTIONS; o++) {
        char left[200], room[160];
        const char *argument = choices_of(o, room);
        if (o->kind != HEADING && !o->help) continue;
        if (o->kind == HEADING) {
            printf("\n%s\n", o->name);
            continue;
        }
        snprintf(left, sizeof left, "--%s%s%s %s", o->name, o->alias ? ", " : "", o->alias ? o->alias : "",
                 argument ? argument : "");
        printf(strlen(left) > 25 ? "  %s\n%28s" : "  %-25s %s", left, "");
        for (const char *c = o->help; *c; c++) *c == '\n' ? printf("\n%28s", "") : putchar(*c);
        if (o->kind != FLAG && o->initial) printf(*o->initial == '\n' ? " [a newline]" : " [%s]", o->initial);
        putchar('\n');
    }
    puts("\nOptions may be written --name value or --name=value; an option without a value can be turned off by =0.\n"
         "Ctrl-C finishes the step and writes the checkpoint; a second one does not wait.\n"
         "Exit status: 0 finished, 1 failure, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.");
}

// Insertions, deletions and replacements that make b of a (Levenshtein), one row of the table at a time.
static int edit_distance(const char *a, const char *b) {
    int row[64], columns = (int)strlen(b);
    if (columns > 63) return 64;
    for (int j = 0; j <= columns; j++) row[j] = j;
    for (int i = 1; *a; a++, i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= columns; j++) {
            int replaced = diagonal + (*a != b[j - 1]);
            diagonal = row[j];
            if (row[j - 1] < row[j]) row[j] = row[j - 1];
            row[j] = row[j] + 1 < replaced ? row[j] + 1 : replaced;
        }
    }
    return row[columns];
}

// The option that an argument names, as --name, --name=value or an alias; *value is what follows the '='.
static const option *find_option(const char *argument, const char **value) {
    char name[64];
    size_t length = strcspn(argument, "=");
    *value = argument[length] ? argument + length + 1 : NULL;
    snprintf(name, sizeof name, "%.*s", (int)(length < sizeof name ? length : sizeof name - 1), argument);
    const option *nearest = NULL;
    int least = 4;                                           // a hint further away than this would be none
    for (const option *o = options; o < options + OPTIONS; o++) {
        if (!o->help) continue;
        if (o->alias && !strcmp(name, o->alias)) return o;
        int distance = name[1] == '-' ? edit_distance(name + 2, o->name) : 64;
        if (!distance) return o;
        if (distance < least) least = distance, nearest = o;
    }
    if (nearest) complain("unknown option %s; did you mean --%s?", name, nearest->name);
    else complain("unknown option %s; train --help lists the options", name);
    return NULL;
}

// The index of `name` among choices a|b|c, or -1.
static int find_choice(const char *choices, const char *name) {
    for (int i = 0;; i++) {
        size_t length = strcspn(choices, "|");
        if (strlen(name) == length && !strncmp(choices, name, length)) return i;
        if (!choices[length]) return -1;
        choices += length + 1;
    }
}

static int parse_number(const char *text, double *number) {
    char *end;
    *number = strtod(text, &end);
    return !*text || strspn(text, " \t\n\v\f\r") || *end || !isfinite(*number) ? -1 : 0;
}

static int set_option(settings *s, const option *o, const char *value) {
    void *member = (char *)s + o->offset;
    double number;
    if (o->kind == TEXT) {
        *(const char **)member = value;
        return value && !*value ? complain("--%s: got nothing, expected %s", o->name, o->argument) : 0;
    }
    if (o->kind == CHOICE || o->kind == COLUMN) {
        char room[160];
        int choice = find_choice(choices_of(o, room), value);
        if (choice < 0) return complain("--%s: got '%s', expected %s", o->name, value, choices_of(o, room));
        *(int *)member = choice;
        return 0;
    }
    if (parse_number(value, &number) || number < o->least || number > o->most ||
        (o->kind != NUMBER && value[(o->least < 0 && *value == '-') + strspn(value + (*value == '-'), "0123456789")]))
        return complain("--%s: got '%s', expected a %s from %.15g to %.15g", o->name, value,
                        o->kind == NUMBER ? "number" : "whole number", o->least, o->most);
    if (o->kind == NUMBER) *(double *)member = number;
    else *(int *)member = (int)number;
    return 0;
}

// The value as set_option would read it; `room` holds numbers.
enum { ROOM = 32 };
static const char *value_text(const settings *s, const option *o, char room[ROOM]) {
    const void *member = (const char *)s + o->offset;
    if (o->kind == TEXT) return *(const char *const *)member;
    if (o->kind == NUMBER) {                                 // the fewest digits that give the same number
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(room, ROOM, "%.*g", digits, *(const double *)member);
            if (!(strtod(room, NULL) < *(const double *)member) && !(strtod(room, NULL) > *(const double *)member)) break;
        }
    } else if (o->kind != CHOICE && o->kind != COLUMN) snprintf(room, ROOM, "%d", *(const int *)member);
    else {
        char choices[160];
        const char *name = choices_of(o, choices);
        for (int i = *(const int *)member; i > 0; i--) name += strcspn(name, "|") + 1;
        snprintf(room, ROOM, "%.*s", (int)strcspn(name, "|"), name);
    }
    return room;
}

// Whether two names are one file, which ./a and a are too, where POSIX can tell.
static int is_same_file(const char *a, const char *b) {
#ifdef _POSIX_C_SOURCE
    struct stat x, y;
    if (!stat(a, &x) && !stat(b, &y)) return x.st_dev == y.st_dev && x.st_ino == y.st_ino;
#endif
    return !strcmp(a, b);
}

// A file of sequences has a length of its own; texts are cut into --context.
static int has_own_length(const settings *s, const char *path) {
    size_t length = strlen(path), dot = sizeof ".safetensors" - 1;
    return length >= dot && !strcmp(path + length - dot, ".safetensors") && !is_given(s, "context");
}

// Sizes that no model can have, when it is the command line that says them all.
static int check_sizes(const settings *s) {
    int D = s->config.width, H = s->config.heads, fewer = H, parts = s->config.row.channels == METALA_CHANNELS_HALF ? 2 : 1;
    if (s->config.row.query > METALA_QUERY_TAYLOR) parts = 0;         // without heads of a chosen number
    if (parts && D % parts) return complain("--width: got %d, expected an even number; try --width %d", D, D + 1);
    while (parts && D / parts % fewer) fewer--;
    if (fewer < H)
        return complain("--width %d and --heads %d: the number of heads must divide width%s = %d; try --heads %d or"
                        " --width %.0f", D, H, parts > 1 ? "/2" : "", D / parts, fewer, parts * H * ceil(D / (1.0 * parts * H)));
    if (!s->config.glu_dim && D > MOST_SIZE / 8 * 3)
        return complain("--width: got %d, expected at most %d without --glu-dim", D, MOST_SIZE / 8 * 3);
    if ((s->bench || !has_own_length(s, s->data)) && (double)s->batch * s->context > INT_MAX)
        return complain("--batch %d of --context %d: expected at most %d tokens; try a smaller --batch and --accumulate",
                        s->batch, s->context, INT_MAX);
    metala_context *ctx = metala_open(NULL, 1);
    metala_config c = s->config;                                      // 0 is what the data will say
    if (!c.vocab_size) c.vocab_size = 1;
    if (!c.glu_dim) c.glu_dim = 1;
    if (!c.length) c.length = 1;
    int status = ctx && !metala_config_check(ctx, &c) ? 0 : complain("%s", metala_error(ctx));
    metala_close(ctx);
    return status;
}

// What no single option can see.
static int check_settings(settings *s) {
    const char *const files[] = {s->out, s->keep_best, s->log, s->data, s->val, s->init};   // the first 3 are written
    if (s->help || s->version) return 0;
    if (is_given(s, "math") && s->device != ON_CUDA) return complain("--math: expected --device cuda with it");
    if (s->keep_all && s->checkpoint_layers) return complain("--keep-all and --checkpoint-layers: expected one of them");
    if (s->bench && !is_given(s, "width")) s->config.width = 256;
    if (s->bench && !is_given(s, "layers")) s->config.layers = 6;
    if (s->bench && !is_given(s, "context")) s->context = 256;
    if (s->bench) return check_sizes(s);
    if (!s->data && !s->resume) return complain("no data given; usage: train FILE [options], train --help says more");
    if (s->resume && s->init) return complain("got --resume and --init, expected one of them");
    for (int i = 0; i < 3; i++)
        for (int j = i + 1; j < 6; j++)
            if (files[i] && files[j] && is_same_file(files[i], files[j]) && (files[j] != s->init || files[i] == s->log))
                return complain("%s would be overwritten; give --out, --keep-best and --log other names", files[j]);
    return s->resume || s->init ? 0 : check_sizes(s);
}

// The row that --model names, with the choices made on the command line in place of its own.
static int choose_row(settings *s) {
    metala_context *ctx = metala_open(NULL, 1);
    int expand = s->config.expand;
    int status = ctx && !metala_config_row(ctx, &s->config, s->model) ? 0 : complain("--model: %s", metala_error(ctx));
    if (expand) s->config.expand = expand;
    metala_close(ctx);
    for (int i = 0; i < OPTIONS && !status; i++)
        if (options[i].kind == COLUMN && s->given[i]) status = set_option(s, &options[i], s->given[i]);
    return status;
}

static int parse_options(settings *s, int argc, char **argv) {
    int only_arguments = 0;
    memset(s, 0, sizeof *s);
    s->config = metala_config_default();
    for (const option *o = options; o < options + OPTIONS; o++)
        if (o->kind != HEADING && o->kind != COLUMN && set_option(s, o, o->initial)) return -1;
    for (int i = 1; i < argc; i++) {
        const option *o = option_named("data");
        const char *value = argv[i];
        if (!only_arguments && !strcmp(argv[i], "--")) {
            only_arguments = 1;
            continue;
        }
        if (!only_arguments && argv[i][0] == '-' && argv[i][1]) {
            o = find_option(argv[i], &value);
            if (!o) return -1;
            if (o->kind == FLAG && !value) value = "1";
            if (!value && !(value = argv[++i]))
                return complain("--%s: got nothing, expected %s", o->name, o->argument);
        } else if (s->data) return complain("got a second argument '%s', expected one file of data", argv[i]);
        if (set_option(s, o, value)) return -1;
        s->given[o - options] = value;
    }
    return choose_row(s) ? -1 : check_settings(s);
}

// ------------------------------------------------------------------------------------------------ stopping and time

// The first Ctrl-C asks for a stop after this step; the handler is gone then, so that a second one ends the program.
static volatile sig_atomic_t interrupted;

static void on_interrupt(int number) {
    interrupted = number;
    signal(number, SIG_DFL);
}

#ifdef _POSIX_C_SOURCE
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#else
static double seconds(void) { return (double)time(NULL); }    // clock() would add up the threads
#endif

typedef struct {
    settings *s;
    metala_context *ctx;
    metala_dataset *train, *val;         // val may be NULL
    metala_model *model;
    metala_trainer *trainer;
    metala_state *state;                 // of a batch of validation sequences
    metala_real *logits;                 // (B,T,N) of such a batch, when their accuracy is counted; or NULL
    int *inputs, *targets;               // (B,T) or of patches (B,T,C), (B,T)
    uint8_t *mask;                       // (B,T)
    FILE *log;
    double start;                        // when the run would have started, had it run without a break
    int saved;                           // step of the checkpoint in --out, -1 for none
    int log_failed, diverged, unsaved;   // what went wrong
    int misused;                         // the command line is what is wrong: exit status 2
    char no_device[300];                 // why the CPU has to do it; or empty
} program;

typedef struct {                         // since the last line of progress
    int steps;
    double loss, norm, seconds;          // sums over the steps
    double val_loss, accuracy;           // of the last one, when `evaluated`
    int evaluated;
} interval;

static int library_failed(const program *p) { return complain("%s", metala_error(p->ctx)); }
static int step_of(const program *p) { return (int)metala_trainer_step(p->trainer); }
static int is_text(const program *p) { return metala_dataset_is_text(p->train); }

#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
static void say(const program *p, const char *format, ...) {
    va_list arguments;
    if (p->s->quiet) return;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
}

// ------------------------------------------------------------------------------------------------ data

static metala_dataset *open_data(program *p, const char *path) {
    metala_dataset *d = metala_dataset_open(p->ctx, path, has_own_length(p->s, path) ? 0 : (size_t)p->s->context);
    if (!d) library_failed(p);
    return d;
}

// Below this there is more to lose by holding data out than to learn from it.
static int can_be_split(const metala_dataset *d) {
    return metala_dataset_is_text(d) ? metala_dataset_tokens(d) >= 100 : metala_dataset_sequences(d) >= 10;
}

// "text", "tokens", or "patches of 16 bytes".
static const char *kind_text(const metala_dataset *d, char text[ROOM]) {
    if (metala_dataset_patch(d)) snprintf(text, ROOM, "patches of %d bytes", metala_dataset_patch(d));
    else snprintf(text, ROOM, "%s", metala_dataset_is_text(d) ? "text" : "tokens");
    return text;
}

static int load_data(program *p) {
    settings *s = p->s;
    if (!(p->train = open_data(p, s->data))) return -1;
    if (s->val) {
        if (!(p->val = open_data(p, s->val))) return -1;
        char train[ROOM], val[ROOM];
        if (metala_dataset_is_text(p->val) != is_text(p) || metala_dataset_patch(p->val) != metala_dataset_patch(p->train))
            return complain("%s holds %s and %s holds %s; expected the same kind", s->data, kind_text(p->train, train), s->val,
                            kind_text(p->val, val));
    } else if (s->val_fraction > 0 && can_be_split(p->train)) {
        p->val = metala_dataset_split(p->ctx, p->train, s->val_fraction);
        if (!p->val) return library_failed(p);
    }
    s->context = (int)metala_dataset_length(p->train);
    return 0;
}

static size_t longest_sequence(const program *p) {
    size_t T = metala_dataset_length(p->train), val = p->val ? metala_dataset_length(p->val) : 0;
    return T > val ? T : val;
}

static void describe_data(const program *p) {
    const char *unit = is_text(p) ? "bytes" : "sequences";
    char kind[ROOM];
    size_t train = is_text(p) ? metala_dataset_tokens(p->train) : metala_dataset_sequences(p->train), val = 0;
    if (p->val) val = is_text(p) ? metala_dataset_tokens(p->val) : metala_dataset_sequences(p->val);
    say(p, "data     %s: %zu %s", p->s->data, train, unit);
    if (!is_text(p)) say(p, " of %d %s", p->s->context, kind_text(p->train, kind));
    if (p->val)
        say(p, " to train on, %zu for validation%s%s\n", val, p->s->val ? " in " : "", p->s->val ? p->s->val : "");
    else say(p, ", no validation%s\n", p->s->val_fraction > 0 ? ": too few to hold some out (--val FILE)" : "");
}

// ------------------------------------------------------------------------------------------------ model

// The configuration of a file holds; what the command line says about it must agree.
static int adopt_config(program *p, const char *path, const metala_config *config) {
    settings *s = p->s, wanted = *s;
    const char *have = metala_config_row_name(config), *want = metala_config_row_name(&wanted.config);
    s->config = *config;
    if (is_given(s, "model") && strcmp(want, have))
        return complain("--model: got %s, but %s has %s; leave it out or train anew", want, path, have);
    for (const option *o = options; o < options + OPTIONS; o++) {
        char asked[ROOM], there[ROOM];
        if (!s->given[o - options] || !is_config(o) || o->kind == TEXT || o->offset == AT(match_params)) continue;
        if (strcmp(value_text(&wanted, o, asked), value_text(s, o, there)))
            return complain("--%s: got %s, but %s has %s; leave it out or train anew", o->name, asked, path, there);
    }
    return 0;
}

static void complete_config(program *p) {
    metala_config *c = &p->s->config;
    if (c->length == 0) c->length = p->s->context;
    if (p->train) c->patch_dim = metala_dataset_patch(p->train);
    if (c->glu_dim == 0) c->glu_dim = (int)((8.0 / 3 * c->width + 31) / 32) * 32;
    if (c->vocab_size == 0 && p->train) c->vocab_size = metala_dataset_vocab(p->train);
    if (c->vocab_size == 0) c->vocab_size = 256;
    if (p->val && !is_given(p->s, "vocab") && metala_dataset_vocab(p->val) > c->vocab_size)
        c->vocab_size = metala_dataset_vocab(p->val);
}

static size_t parameters_of(const metala_config *c) {
    return metala_trainer_memory(NULL, c, 1, 1, METALA_KEEP_INPUTS, 1).parameters / sizeof(metala_real);
}

// --match-params: three more parameters for every layer, channel and channel of the GLU.
static int match_parameters(program *p) {
    metala_config *c = &p->s->config, metala = *c, one = *c;
    metala.row = metala_rows()->row, metala.expand = metala_rows()->expand;
    one.glu_dim = 1;
    double wanted = (double)parameters_of(&metala), least = (double)parameters_of(&one);
    double each = 3.0 * c->layers * c->width + (c->glu_bias ? 2.0 * c->layers : 0), F = (wanted - least) / each + 1;
    c->glu_dim = F < 8 ? 8 : (int)(F / 8 + 0.5) * 8;
    double got = (double)parameters_of(c);
    if (least > 0 && wanted > 0 && fabs(got - wanted) > 0.05 * wanted)
        return complain("--match-params: metala has %.0f parameters, this model %.0f even with a GLU of %d channels; give it"
                        " fewer of its own, by --expand or --state-size", wanted, got, c->glu_dim);
    return 0;
}

static int new_model(program *p) {
    const settings *s = p->s;
    p->model = metala_model_create(p->ctx, &s->config);
    metala_init init = s->initial;
    if (init.std == 0) init.std = 1 / sqrt((double)s->config.width);
    if (init.residual_scale == 0) init.residual_scale = 1 / sqrt(2.0 * s->config.layers);
    if (!p->model) return library_failed(p);
    return metala_model_init(p->ctx, p->model, (uint64_t)s->seed, &init) ? library_failed(p) : 0;
}

static int old_model(program *p, const char *path) {
    p->model = metala_model_load(p->ctx, path);
    if (!p->model) return library_failed(p);
    return adopt_config(p, path, metala_model_config(p->model));
}

static int check_vocabulary(program *p) {
    static const char *const specials[] = {"pad-token", "bos-token", "eos-token"};
    const metala_config *c = &p->s->config;
    const metala_dataset *const sets[] = {p->train, p->val};
    const char *const names[] = {p->s->data, p->s->val ? p->s->val : p->s->data};
    const int tokens[] = {c->pad_token_id, c->bos_token_id, c->eos_token_id};
    if (metala_dataset_patch(p->train) != c->patch_dim) {
        char kind[ROOM], reads[ROOM] = "tokens";
        if (c->patch_dim) snprintf(reads, sizeof reads, "patches of %d bytes", c->patch_dim);
        return complain("%s holds %s, the model reads %s; give data of this kind or train anew", p->s->data,
                        kind_text(p->train, kind), reads);
    }
    p->misused = !p->model && is_given(p->s, "vocab");
    for (int i = 0; i < 2; i++)
        if (sets[i] && metala_dataset_vocab(sets[i]) > c->vocab_size)
            return complain("%s needs %s%d%s, the model has %d%s", names[i], c->patch_dim ? "" : "a vocabulary of ",
                            metala_dataset_vocab(sets[i]), c->patch_dim ? " classes" : "", c->vocab_size, p->misused ? "; leave out --vocab" : "");
    p->misused = 1;
    for (int i = 0; i < 3; i++)
        if (is_given(p->s, specials[i]) && tokens[i] >= c->vocab_size)
            return complain("--%s: got %d, expected a token of the vocabulary, 0 to %d", specials[i], tokens[i],
                            c->vocab_size - 1);
    p->misused = 0;
    return 0;
}

static metala_keep kept_activations(const settings *s) {
    return s->keep_all ? METALA_KEEP_ALL : s->checkpoint_layers ? METALA_KEEP_INPUTS : METALA_KEEP_COSTLY;
}

// Numbers of a token in the inputs: one, or a patch.
static size_t input_size(const program *p) { return p->s->config.patch_dim ? (size_t)p->s->config.patch_dim : 1; }

static int allocate_batch(program *p, size_t T) {
    size_t rows = (size_t)p->s->batch * T;
    p->inputs = calloc(rows, input_size(p) * sizeof *p->inputs);
    p->targets = calloc(rows, sizeof *p->targets);
    p->mask = calloc(rows, 1);
    return p->inputs && p->targets && p->mask ? 0 : complain("out of memory: a batch of %zu tokens; try a smaller --batch", rows);
}

// Everything else that a step needs, and a validation.
static int allocate(program *p, size_t T) {
    const settings *s = p->s;
    size_t rows = (size_t)s->batch * T, N = (size_t)s->config.vocab_size;
    enum { MOST_LOGITS = 1 << 24 };
    p->trainer = metala_trainer_create(p->ctx, p->model, s->batch, T, kept_activations(s));
    if (!p->trainer) return library_failed(p);
    if (p->val && !(p->state = metala_state_create(p->ctx, p->model, s->batch))) return library_failed(p);
    if (p->val && !is_text(p) && rows <= MOST_LOGITS / N) p->logits = malloc(rows * N * sizeof *p->logits);
    return 0;
}

static const char *count_text(char text[ROOM], double n) {
    snprintf(text, ROOM, n < 1e4 ? "%.0f" : n < 1e6 ? "%.1fk" : n < 1e9 ? "%.2fM" : "%.2fG",
             n < 1e4 ? n : n < 1e6 ? n / 1e3 : n < 1e9 ? n / 1e6 : n / 1e9);
    return text;
}

static metala_memory memory_of(const program *p, size_t T) {
    const settings *s = p->s;
    int threads = metala_context_threads(p->ctx);
    metala_memory m = metala_trainer_memory(metala_context_backend(p->ctx), &s->config, s->batch, T, kept_activations(s),
                                            threads);
    if (m.total && s->form == METALA_PARALLEL) {              // the map and its gradient, T x T each
        double maps = 2.0 * (double)T * (double)T * threads * sizeof(metala_real);
        size_t more = maps < (double)(SIZE_MAX / 2 - m.total) ? (size_t)maps : SIZE_MAX / 2 - m.total;
        m.scratch += more, m.total += more;
    }
    return m;
}

// Where the numbers are computed: "2 threads", or "cuda".
static const char *device_text(const program *p, char text[ROOM]) {
    int threads = metala_context_threads(p->ctx);
    const char *name = metala_context_backend(p->ctx)->name;
    if (strcmp(name, "cpu")) snprintf(text, ROOM, "%s", name);
    else snprintf(text, ROOM, "%d thread%s", threads, threads > 1 ? "s" : "");
    return text;
}

// A system that promises more memory than it has ends the program without a word once it is used.
static int check_memory(const program *p, size_t T) {
    if (strcmp(metala_context_backend(p->ctx)->name, "cpu")) return 0;       // a GPU says so when it has no more
#if defined _POSIX_C_SOURCE && defined _SC_PHYS_PAGES
    double wanted = (double)memory_of(p, T).total;            // 0: not even the list of tensors fits
    if (wanted <= 0) return complain("out of memory: %d layers; try fewer --layers", p->s->config.layers);
    double there = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (there > 0 && wanted > there)
        return complain("out of memory: training needs %.1f MB, this machine has %.1f MB; try a smaller --batch,"
                        " --context, --width or --layers", wanted / 1e6, there / 1e6);
#else
    (void)p, (void)T;
#endif
    return 0;
}

static void describe_model(const program *p) {
    const metala_config *c = &p->s->config;
    metala_memory m = memory_of(p, longest_sequence(p));
    char count[ROOM];
    say(p, "model    %s D%d L%d H%d F%d N%d", metala_config_row_name(c), c->width, c->layers, c->heads, c->glu_dim,
        c->vocab_size);
    if (c->patch_dim) say(p, " C%d", c->patch_dim);
    say(p, "%s%s: %s parameters\n", c->tie_word_embeddings ? " tied" : "", c->glu_bias ? " glu-bias" : "",
        count_text(count, (double)(m.parameters / sizeof(metala_real))));
    say(p, "memory   %.1f MB: parameters %.1f, gradients %.1f, moments %.1f, activations %.1f, scratch %.1f\n",
        (double)m.total / 1e6, (double)m.parameters / 1e6, (double)m.gradients / 1e6, (double)m.moments / 1e6,
        (double)m.activations / 1e6, (double)m.scratch / 1e6);
}

static void describe_settings(const program *p) {
    const settings *s = p->s;
    char form[ROOM], schedule[ROOM], device[ROOM];
    double tokens = (double)s->accumulate * s->batch * s->context, all = (double)metala_dataset_tokens(p->train);
    say(p, "step     %.0f x %d = %.0f tokens, %s, %s", (double)s->accumulate * s->batch, s->context, tokens,
        value_text(s, option_named("form"), form), device_text(p, device));
    if (s->max_steps) say(p, "; %d steps pass %.3g times over the data", s->max_steps, tokens * s->max_steps / all);
    if (s->max_seconds > 0) say(p, "; %g seconds", s->max_seconds);
    value_text(s, option_named("schedule"), schedule);
    say(p, "\nAdamW    learning rate %g, %s to %g, warm-up %d; betas %g %g, weight decay %g, clip %g\n",
        s->learning_rate, schedule, s->learning_rate * (s->schedule == CONSTANT ? 1 : s->min_lr), s->warmup,
        s->adamw.beta1, s->adamw.beta2, s->adamw.weight_decay, s->adamw.clip_norm);
}

// ------------------------------------------------------------------------------------------------ resuming and saving

static const char *kept_key(const option *o, char key[ROOM]) {
    snprintf(key, ROOM, "train.%s", o->name);
    return key;
}

// One setting of the checkpoint: taken over, unless the command line says otherwise.
static int restore_option(settings *s, const option *o, const char *value) {
    char *copy = malloc(strlen(value) + 1);
    if (!copy) return complain("out of memory");
    s->restored[o - options] = strcpy(copy, value);
    return s->given[o - options] ? 0 : set_option(s, o, copy);
}

static int restore_settings(program *p) {
    settings *s = p->s;
    int found = 0, status = 0;
    metala_file *f = metala_file_open(p->ctx, s->out);
    if (!f) return library_failed(p);
    for (const option *o = options; o < options + OPTIONS && !status; o++) {
        char key[ROOM];
        const char *value = is_kept(o) ? metala_file_metadata(f, kept_key(o, key)) : NULL;
        if (value) found = 1;
        if (value && restore_option(s, o, value)) status = complain("%s: its setting %s is damaged", s->out, key);
    }
    metala_file_close(f);
    if (!status && !found) return complain("%s: no settings in it; start from it with --init", s->out);
    if (!status && check_settings(s)) p->misused = status = -1;
    return status;
}

// Looks at the next batch: parameters whose loss or gradient is not finite must not replace a good checkpoint.
static int check_health(program *p);

static int save(program *p, const char *path) {
    settings *s = p->s;
    metala_pair pairs[OPTIONS];
    char keys[OPTIONS][ROOM], values[OPTIONS][ROOM];
    size_t count = 0;
    if (check_health(p)) return -1;
    if (s->max_seconds > 0) s->seconds = seconds() - p->start;
    for (int i = 0; i < OPTIONS; i++) {
        const char *value = is_kept(&options[i]) ? value_text(s, &options[i], values[i]) : NULL;
        if (!value) continue;
        pairs[count].key = kept_key(&options[i], keys[i]);
        pairs[count++].value = value;
    }
    return metala_checkpoint_save(p->ctx, p->trainer, path, pairs, count) ? library_failed(p) : 0;
}

static int save_checkpoint(program *p) {
    if (p->saved == step_of(p)) return 0;
    p->unsaved = save(p, p->s->out);
    if (p->unsaved) return -1;
    p->saved = step_of(p);
    return 0;
}

// Hours of training should not end at a folder that is not there. Saving replaces the file by name: a folder cannot
// be replaced, and a device such as /dev/null must not be.
static int check_writable(const char *path) {
#ifdef _POSIX_C_SOURCE
    struct stat is;
    if (!stat(path, &is) && !S_ISREG(is.st_mode)) return complain("%s: is not a regular file; give another name", path);
#endif
    size_t length = strlen(path) + sizeof ".tmp";
    char *name = malloc(length);
    if (!name) return complain("out of memory");
    snprintf(name, length, "%s.tmp", path);                   // what saving will write first
    FILE *stream = fopen(name, "wb");
    if (!stream) complain("%s: cannot be written: %s", name, strerror(errno));
    else fclose(stream), remove(name);
    free(name);
    return stream ? 0 : -1;
}

static const char log_columns[] = "step,tokens,seconds,loss,val_loss,val_accuracy,gradient_norm,learning_rate,"
                                  "tokens_per_second,val_bits_per_byte,gflops_per_second\n";

// The log is opened when training begins; until then it stays as it is. What is appended to must have the same columns.
static int check_log(const settings *s) {
    char line[sizeof log_columns + 1] = "";
    FILE *stream = fopen(s->log, "rb");
    int is_there = stream != NULL, odd;
#ifdef _POSIX_C_SOURCE
    struct stat is;
    if (!stat(s->log, &is) && !S_ISREG(is.st_mode) && !S_ISDIR(is.st_mode)) {               // a terminal, say
        if (stream) fclose(stream);
        return 0;
    }
#endif
    if (stream && !fgets(line, sizeof line, stream)) *line = 0;
    if (stream) fclose(stream);
    odd = s->resume && *line && strcmp(line, log_columns);
    if (odd) return complain("%s: cannot go on with a table of other columns than %.*s; give --log another name", s->log,
                             (int)strlen(log_columns) - 1, log_columns);
    stream = fopen(s->log, "ab");
    if (!stream) return complain("%s: cannot be written: %s", s->log, strerror(errno));
    fclose(stream);
    if (!is_there) remove(s->log);
    return 0;
}

static int check_outputs(const settings *s) {
    if (check_writable(s->out) || (s->keep_best && check_writable(s->keep_best))) return -1;
    return s->log ? check_log(s) : 0;
}

// An option that the row has no use for is no error, but whoever gives one should know.
static void say_unused(const settings *s) {
    const metala_row *r = &s->config.row;
    const struct { const char *option; int used; } some[] = {
        {"heads", r->query <= METALA_QUERY_TAYLOR},
        {"tau", r->decay <= METALA_DECAY_FIXED},
        {"state-size", r->query == METALA_QUERY_SHARED || r->query == METALA_QUERY_CONSTANT},
        {"low-rank", r->decay == METALA_DECAY_LOWRANK || r->decay == METALA_DECAY_SELECTIVE},
        {"feature-dim", r->query == METALA_QUERY_TAYLOR},
        {"length", r->decay == METALA_DECAY_DSS}};
    for (size_t i = 0; i < sizeof some / sizeof *some; i++)
        if (is_given(s, some[i].option) && !some[i].used)
            complain("--%s changes nothing in model %s", some[i].option, metala_config_row_name(&s->config));
}

// What may surprise, once nothing is in the way any more.
static void say_notices(const program *p) {
    const settings *s = p->s;
    FILE *stream = s->quiet || s->resume || s->bench ? NULL : fopen(s->out, "rb");
    if (*p->no_device) complain("--device cuda: %s; going on with the CPU", p->no_device);
    if (!s->quiet) say_unused(s);
    for (int i = 0; i < OPTIONS && !s->quiet; i++) {
        char room[ROOM];
        if (s->given[i] && s->restored[i] && strcmp(value_text(s, &options[i], room), s->restored[i]))
            complain("--%s is now %s, was %s", options[i].name, s->given[i], s->restored[i]);
    }
    if (!stream) return;
    complain("%s is there already and will be replaced; --resume would go on with it", s->out);
    fclose(stream);
}

// ------------------------------------------------------------------------------------------------ validation

static uint8_t *mask_or_null(const program *p, size_t rows) { return memchr(p->mask, 0, rows) ? p->mask : NULL; }

// The validation sequences number i to i + B - 1 out of `wanted`, which are spread evenly over all.
static void load_validation(program *p, size_t i, size_t wanted) {
    size_t T = metala_dataset_length(p->val), all = metala_dataset_sequences(p->val);
    for (size_t b = 0; b < (size_t)p->s->batch; b++) {
        size_t j = i + b < wanted ? i + b : wanted - 1;       // beyond the end: any sequence, without targets
        int *targets = p->targets + b * T;
        metala_dataset_sequence(p->val, (size_t)((double)j * (double)all / (double)wanted), p->inputs + b * T * input_size(p),
                                targets, p->mask + b * T);
        for (size_t t = 0; t < T && i + b >= wanted; t++) targets[t] = METALA_IGNORE;
    }
}

// Cross-entropy of one position, log Σ exp(l_i) - l_target, and whether the target is the likeliest.
static void tally(const metala_real *l, size_t N, int target, double *nats, size_t *right) {
    size_t best = 0;
    double sum = 0;
    for (size_t i = 0; i < N; i++)
        if (l[i] > l[best]) best = i;
    for (size_t i = 0; i < N; i++) sum += exp((double)(l[i] - l[best]));
    *nats += log(sum) + (double)(l[best] - l[target]);
    *right += best == (size_t)target;
}

static int score_with_accuracy(program *p, size_t rows, double *nats, size_t *counted, size_t *right) {
    size_t N = (size_t)p->s->config.vocab_size;
    if (metala_forward(p->ctx, p->state, (metala_form)p->s->form, p->inputs, mask_or_null(p, rows),
                       rows / (size_t)p->s->batch, p->logits))
        return -1;
    for (size_t row = 0; row < rows; row++)
        if (p->targets[row] != METALA_IGNORE) {
            tally(p->logits + row * N, N, p->targets[row], nats, right);
            ++*counted;
        }
    return 0;
}

// Mean loss over the validation targets. Leaves `evaluated` 0 when Ctrl-C came first.
static int evaluate(program *p, interval *now) {
    size_t B = (size_t)p->s->batch, T = metala_dataset_length(p->val), wanted = metala_dataset_sequences(p->val);
    size_t most = (size_t)p->s->eval_batches * B, counted = 0, right = 0;
    double nats = 0;
    if (most && most < wanted) wanted = most;
    for (size_t i = 0; i < wanted; i += B) {
        if (interrupted) return 0;
        load_validation(p, i, wanted);
        metala_state_reset(p->ctx, p->state);
        if (p->logits ? score_with_accuracy(p, B * T, &nats, &counted, &right)
                      : metala_score(p->ctx, p->state, (metala_form)p->s->form, p->inputs, p->targets,
                                     mask_or_null(p, B * T), T, &nats, &counted))
            return library_failed(p);
    }
    if (!counted) return complain("the validation data has no target that counts");
    now->val_loss = nats / (double)counted;
    now->accuracy = (double)right / (double)counted;
    now->evaluated = 1;
    return 0;
}

static int evaluate_and_keep_best(program *p, interval *now) {
    settings *s = p->s;
    if (evaluate(p, now)) return -1;
    if (!now->evaluated || !isfinite(now->val_loss) || (s->best_step && now->val_loss >= s->best_loss)) return 0;
    s->best_loss = now->val_loss;
    s->best_step = step_of(p);
    return s->keep_best ? save(p, s->keep_best) : 0;
}

// ------------------------------------------------------------------------------------------------ samples

// p_i = exp((l_i - max l) / τ) / Σ; τ = 0: the likeliest. `l` is overwritten.
static int choose_token(metala_real *l, int N, double temperature, uint64_t *random) {
    int best = 0;
    double sum = 0;
    for (int i = 0; i < N; i++)
        if (l[i] > l[best]) best = i;
    if (temperature <= 0) return best;
    double most = (double)l[best];
    for (int i = 0; i < N; i++) sum += l[i] = (metala_real)exp(((double)l[i] - most) / temperature);
    sum *= metala_uniform(random);
    for (int i = 0; i < N; i++)
        if ((sum -= (double)l[i]) < 0) return i;
    return best;
}

// Bytes that could reprogram a terminal are shown as '?'.
static void put_byte(int c) { putchar((c < ' ' && c != '\n' && c != '\t') || c == 127 ? '?' : c); }

static int sample(program *p) {
    const settings *s = p->s;
    if (!is_text(p) || s->config.vocab_size != 256 || s->quiet) return 0;
    uint64_t random = (uint64_t)s->seed + ((uint64_t)step_of(p) << 32);
    size_t length = strlen(s->prompt);
    int N = s->config.vocab_size, status = -1;
    metala_state *state = metala_state_create(p->ctx, p->model, 1);
    metala_real *logits = malloc((size_t)N * sizeof *logits);
    int *tokens = malloc(length * sizeof *tokens);
    if (!logits || !tokens) complain("out of memory: a sample");
    if (!state) library_failed(p);
    if (!state || !logits || !tokens) goto done;
    for (size_t i = 0; i < length; i++) tokens[i] = (unsigned char)s->prompt[i];
    printf("------ sample at step %d\n%s", step_of(p), *s->prompt == '\n' ? "" : s->prompt);
    status = metala_prefill(p->ctx, state, tokens, NULL, length, logits);
    for (int i = 0; i < s->sample_tokens && !status && !interrupted; i++) {
        int token = choose_token(logits, N, s->temperature, &random);
        if (i > 0 || token != '\n') put_byte(token);
        status = metala_step(p->ctx, state, &token, logits);
    }
    puts("\n------");
    fflush(stdout);
    if (status) library_failed(p);
done:
    metala_state_free(state);
    free(logits);
    free(tokens);
    return status;
}

// ------------------------------------------------------------------------------------------------ a step

// How far the schedule has come, 0 to 1.
static double progress(const program *p, int step) {
    const settings *s = p->s;
    double by_steps = s->max_steps > s->warmup ? (double)(step - s->warmup) / (s->max_steps - s->warmup) : 0;
    double by_seconds = s->max_seconds > 0 ? (seconds() - p->start) / s->max_seconds : 0;
    return fmax(0, fmin(1, fmax(by_steps, by_seconds)));
}

// Learning rate of the update after `step` updates: a linear warm-up, then x = 0 … 1 along
//     cosine  m + (1-m) (1 + cos πx)/2      constant  1      linear  m + (1-m) (1-x)       m = --min-lr
static double learning_rate(const program *p, int step) {
    const settings *s = p->s;
    double x = progress(p, step), left = s->schedule == COSINE ? 0.5 * (1 + cos(3.141592653589793 * x)) : 1 - x;
    double factor = s->schedule == CONSTANT ? 1 : s->min_lr + (1 - s->min_lr) * left;
    if (step < s->warmup) factor *= (step + 1.0) / s->warmup;
    return s->learning_rate * factor;
}

static int counts(const int *targets, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (targets[i] != METALA_IGNORE) return 1;
    return 0;
}

// Is there anything to learn, and anything to tell it by? Usually the first sequence tells.
static int check_targets(const program *p) {
    const metala_dataset *const sets[] = {p->train, p->val};
    for (int set = 0; set < 2; set++) {
        size_t i = 0, all = sets[set] ? metala_dataset_sequences(sets[set]) : 0;
        for (int found = 0; i < all && !found; i += !found) {
            metala_dataset_sequence(sets[set], i, p->inputs, p->targets, p->mask);
            found = counts(p->targets, metala_dataset_length(sets[set]));
        }
        if (all && i == all)
            return complain("%s: no target%s counts, all are %d (ignored)", set && p->s->val ? p->s->val : p->s->data,
                            set && !p->s->val ? " in the part for validation" : " in it", METALA_IGNORE);
    }
    return 0;
}

// Adds weight times the gradient of batch number `index` of the stream.
static int add_gradient(program *p, uint64_t index, double weight, double *loss) {
    const settings *s = p->s;
    size_t T = (size_t)s->context;
    metala_dataset_batch(p->train, (uint64_t)s->seed, index, s->batch, p->inputs, p->targets, p->mask);
    *loss = 0;                                                // and no gradient, where no target counts
    if (!counts(p->targets, (size_t)s->batch * T)) return 0;
    return metala_gradient(p->ctx, p->trainer, (metala_form)s->form, p->inputs, p->targets,
                           mask_or_null(p, (size_t)s->batch * T), s->batch, T, weight, loss);
}

static int diverged(program *p, const char *what, double value) {
    char kept[2 * ROOM] = "";
    p->diverged = 1;
    if (p->saved >= 0) snprintf(kept, sizeof kept, " is still that of step %d", p->saved);
    return complain("step %d: the %s is %s, training has diverged; %s%s; try a lower --learning-rate than %g or a"
                    " longer --warmup than %d", step_of(p) + 1, what, isnan(value) ? "not a number" : "infinite",
                    p->saved >= 0 ? p->s->out : "no checkpoint was written yet", kept, p->s->learning_rate,
                    p->s->warmup);
}

// The accumulated gradient's length; without memory for a copy, NaN.
static double gradient_norm(program *p) {
    double sum = 0;
    for (int i = 0; i < metala_model_tensors(p->model); i++) {
        const metala_tensor *t = metala_model_tensor(p->model, i);
        metala_real *g = malloc(t->count * sizeof *g);
        if (!g || metala_trainer_gradient(p->ctx, p->trainer, t->name, g)) sum = NAN;
        for (size_t j = 0; g && j < t->count; j++) sum += (double)g[j] * (double)g[j];
        free(g);
    }
    return sqrt(sum);
}

static int check_health(program *p) {
    double loss, norm;
    int failed = add_gradient(p, (uint64_t)step_of(p) * (uint64_t)p->s->accumulate, 1, &loss);
    norm = failed ? 0 : gradient_norm(p);
    metala_trainer_zero(p->ctx, p->trainer);
    if (failed) return 0;                                     // no memory, say, which is not the parameters' fault
    return !isfinite(loss) ? diverged(p, "loss", loss) : !isfinite(norm) ? diverged(p, "gradient", norm) : 0;
}

// One update by the mean gradient of accumulate × B sequences.
static int train_step(program *p, interval *now) {
    metala_adamw adamw = p->s->adamw;
    double began = seconds(), loss = 0, norm = 0;
    int passes = p->s->accumulate;
    for (int i = 0; i < passes; i++) {
        double part;
        if (add_gradient(p, (uint64_t)step_of(p) * (uint64_t)passes + (uint64_t)i, 1.0 / passes, &part))
            return library_failed(p);
        loss += part / passes;
    }
    if (!isfinite(loss)) return diverged(p, "loss", loss);
    adamw.learning_rate = learning_rate(p, step_of(p));
    if (metala_update(p->ctx, p->trainer, &adamw, &norm))
        return isfinite(norm) ? library_failed(p) : diverged(p, "gradient", norm);
    now->steps++;
    now->loss += loss;
    now->norm += norm;
    now->seconds += seconds() - began;
    return 0;
}

// ------------------------------------------------------------------------------------------------ progress

static int open_log(program *p) {
    const char *path = p->s->log;
    if (!path) return 0;
    p->log = fopen(path, p->s->resume ? "a" : "w");
    if (!p->log) return complain("%s: cannot be written: %s", path, strerror(errno));
    fseek(p->log, 0, SEEK_END);
    if (ftell(p->log) <= 0) fputs(log_columns, p->log);
    return fflush(p->log) || ferror(p->log) ? complain("%s: cannot be written: %s", path, strerror(errno)) : 0;
}

// A log that fails later does not end the training, only its exit status tells.
static void write_log(program *p, const interval *now, double tokens_per_second, double gflops) {
    if (!p->log) return;
    double tokens = (double)p->s->accumulate * p->s->batch * p->s->context;
    fprintf(p->log, "%d,%.0f,%.3f,%.9g,", step_of(p), tokens * step_of(p), seconds() - p->start,
            now->loss / now->steps);
    if (now->evaluated) fprintf(p->log, "%.9g", now->val_loss);
    fputc(',', p->log);
    if (now->evaluated && p->logits) fprintf(p->log, "%.9g", now->accuracy);
    fprintf(p->log, ",%.9g,%.9g,%.1f,", now->norm / now->steps, learning_rate(p, step_of(p) - 1), tokens_per_second);
    if (now->evaluated && is_text(p)) fprintf(p->log, "%.9g", now->val_loss / log(2));
    fprintf(p->log, ",%.3f\n", gflops);
    if (!fflush(p->log) && !ferror(p->log)) return;
    complain("%s: cannot be written: %s; training goes on without it", p->s->log, strerror(errno));
    fclose(p->log);
    p->log = NULL;
    p->log_failed = 1;
}

static const char *time_text(char text[ROOM], double s) {
    if (s < 100) snprintf(text, ROOM, "%.0fs", s);
    else if (s < 6000) snprintf(text, ROOM, "%dm %02ds", (int)s / 60, (int)s % 60);
    else snprintf(text, ROOM, "%.0fh %02dm", floor(s / 3600), (int)(fmod(s, 3600) / 60));
    return text;
}

static void print_header(const program *p) {
    say(p, "\n%13s %9s", "step", "loss");
    if (p->val) say(p, " %9s %10s", "val loss", is_text(p) ? "bits/byte" : "perplexity");
    if (p->val && p->logits) say(p, " %8s", "accuracy");
    say(p, " %9s %9s %9s %8s %8s\n", "gradient", "rate", "tokens/s", "GFLOP/s", "left");
}

static void print_progress(program *p, const interval *now) {
    const settings *s = p->s;
    char step[ROOM], left[ROOM] = "";
    double tokens = (double)s->accumulate * s->batch * s->context, each = now->seconds / now->steps, rest = -1;
    double speed = each > 0 ? tokens / each : 0, gflops = 6e-9 * (double)metala_model_size(p->model) * speed;
    if (s->max_steps) snprintf(step, sizeof step, "%d/%d", step_of(p), s->max_steps);
    else snprintf(step, sizeof step, "%d", step_of(p));
    if (s->max_steps) rest = (s->max_steps - step_of(p)) * each;
    if (s->max_seconds > 0 && (rest < 0 || s->max_seconds - (seconds() - p->start) < rest))
        rest = fmax(0, s->max_seconds - (seconds() - p->start));
    say(p, "%13s %9.4f", step, now->loss / now->steps);
    if (p->val && now->evaluated) {
        say(p, " %9.4f %10.4f", now->val_loss, is_text(p) ? now->val_loss / log(2) : exp(now->val_loss));
        if (p->logits) say(p, " %7.2f%%", 100 * now->accuracy);
    } else if (p->val) say(p, " %9s %10s%s", "", "", p->logits ? "         " : "");
    say(p, " %9.3f %9.2e %9.0f %8.1f %8s\n", now->norm / now->steps, learning_rate(p, step_of(p) - 1), speed,
        gflops, rest < 0 ? "" : time_text(left, rest));
    fflush(stdout);
    write_log(p, now, speed, gflops);
}

// ------------------------------------------------------------------------------------------------ the loop

static int is_due(int step, int every) { return every > 0 && step % every == 0; }

static int is_finished(const program *p) {
    const settings *s = p->s;
    return (s->max_steps && step_of(p) >= s->max_steps) ||
           (s->max_seconds > 0 && seconds() - p->start >= s->max_seconds);
}

static int is_stopped(const program *p) { return interrupted || (p->s->stop_at && step_of(p) >= p->s->stop_at); }

// Steps until the end or a stop, and between them what is due.
static int train_until_stopped(program *p) {
    const settings *s = p->s;
    interval now = {0};
    for (int finished = 0, stopped = 0; !finished && !stopped;) {
        if (train_step(p, &now)) return -1;
        int step = step_of(p);
        finished = is_finished(p);
        if (p->val && (finished || is_due(step, s->eval_every)) && evaluate_and_keep_best(p, &now)) return -1;
        stopped = is_stopped(p);
        if (finished || stopped || now.evaluated || is_due(step, s->log_every)) {
            print_progress(p, &now);
            memset(&now, 0, sizeof now);
        }
        if (!stopped && is_due(step, s->sample_every) && sample(p)) return -1;
        if (is_due(step, s->save_every) && save_checkpoint(p)) return -1;
    }
    return 0;
}

// Whatever ends the training, memory that has run out for one, nothing that was learnt is lost; but parameters that have
// diverged are not worth keeping, and where a checkpoint could not be written there is no use in trying again.
static int train(program *p) {
    print_header(p);
    int failed = train_until_stopped(p), is_lost = p->diverged || p->unsaved || step_of(p) == 0;
    return (is_lost ? 0 : save_checkpoint(p)) || failed ? -1 : 0;
}

// A word as a shell takes it.
static void say_word(const program *p, const char *word) {
    if (!word[strcspn(word, " \t\n\"'\\$&|;<>()*?[]{}`!#~")]) {
        say(p, " %s", word);
        return;
    }
    say(p, " '");
    for (; *word; word++) say(p, *word == '\'' ? "'\\''" : "%c", *word);
    say(p, "'");
}

static void report(const program *p, const char *command) {
    const settings *s = p->s;
    if (s->best_step)
        say(p, "\nbest validation loss %.4f (%.4f %s) at step %d%s%s\n", s->best_loss,
            is_text(p) ? s->best_loss / log(2) : exp(s->best_loss), is_text(p) ? "bits per byte" : "perplexity",
            s->best_step, s->keep_best ? ", kept in " : "", s->keep_best ? s->keep_best : "");
    say(p, "%s: the model after step %d\n", s->out, step_of(p));
    if (is_finished(p)) return;
    say(p, "stopped; go on with:");
    say_word(p, command);
    say(p, " --resume");
    if (is_given(s, "out")) say(p, " --out"), say_word(p, s->out);
    if (is_given(s, "threads")) say(p, " --threads %d", s->threads);
    say(p, "\n");
}

// ------------------------------------------------------------------------------------------------ profile

// --profile: the device's backend table with a clock around every kernel. Each wrapper has its kernel's arguments.
// A download of nothing waits until a GPU has done what it was asked for.
enum kernel { EMBEDDING, RMS, CONV, SHIFT, MATMUL, SWIGLU, MASK, FEATURES, PHASE, GATE, SCAN, ATTENTION, NORMALISER, AUGMENT, SKIP,
              HEAD_NORM, SILU_GATE, ADD, CROSS_ENTROPY, NORM, ADAMW, KERNELS };
static const char *const kernel_names[KERNELS] = {"embedding", "rms norm", "convolution + SiLU", "token shift",
    "matrix products", "SwiGLU", "mask", "feature maps", "phase", "decay", "decay scan", "softmax attention", "normaliser",
    "self-augmentation", "skip", "head norm + gate", "gated products", "sums of gradients", "cross-entropy",
    "gradient norm", "AdamW"};
static struct { double seconds[2], operations[2]; long calls[2]; } spent[KERNELS];     // forward, backward
static const metala_backend *profiled;

static void clocked(enum kernel kernel, int backward, double began, double operations) {
    spent[kernel].seconds[backward] += seconds() - began;
    spent[kernel].operations[backward] += operations;
    spent[kernel].calls[backward]++;
}

typedef metala_context ctx_t;
typedef metala_real real;
typedef const metala_real in_t;
#define CLOCKED(function, kernel, backward, operations, parameters, arguments) \
    static void clocked_##function parameters {                                \
        double began = seconds();                                              \
        profiled->function arguments;                                          \
        profiled->download(c, NULL, NULL, 0);                                  \
        clocked(kernel, backward, began, operations);                          \
    }
CLOCKED(embedding_forward, EMBEDDING, 0, 0, (ctx_t *c, real *x, const int *t, in_t *E, size_t r, size_t D, double s),
        (c, x, t, E, r, D, s))
CLOCKED(embedding_backward, EMBEDDING, 1, 0,
        (ctx_t *c, real *dE, in_t *dx, const int *t, size_t r, size_t D, double s, int pad), (c, dE, dx, t, r, D, s, pad))
CLOCKED(patch_forward, EMBEDDING, 0, 0, (ctx_t *c, real *x, const int *t, size_t n), (c, x, t, n))
CLOCKED(rms_forward, RMS, 0, 0,
        (ctx_t *c, real *n, real *s, in_t *x, const uint8_t *m, size_t r, size_t D, double eps), (c, n, s, x, m, r, D, eps))
CLOCKED(rms_backward, RMS, 1, 0,
        (ctx_t *c, real *dx, in_t *dn, in_t *x, in_t *s, const uint8_t *m, size_t r, size_t D), (c, dx, dn, x, s, m, r, D))
CLOCKED(conv_forward, CONV, 0, 0,
        (ctx_t *c, real *u, real *p, in_t *n, in_t *w, real *tail, size_t B, size_t T, size_t D),
        (c, u, p, n, w, tail, B, T, D))
CLOCKED(conv_backward, CONV, 1, 0,
        (ctx_t *c, real *dn, real *dw, in_t *du, in_t *p, in_t *n, in_t *w, in_t *tail, size_t B, size_t T, size_t D),
        (c, dn, dw, du, p, n, w, tail, B, T, D))
CLOCKED(conv_step, CONV, 0, 0, (ctx_t *c, real *u, real *tail, in_t *x, in_t *w, size_t B, size_t D, double eps),
        (c, u, tail, x, w, B, D, eps))
static double flops_of_forward(const metala_linear *l, int count, size_t rows, size_t in) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += 2.0 * (double)rows * (double)l[i].out * (double)in;
    return sum;
}
static double flops_of_backward(in_t *dx, const metala_linear_gradient *l, int count, size_t rows, size_t in) {
    double sum = 0;
    for (int i = 0; i < count; i++) sum += 2.0 * ((dx != NULL) + (l[i].dw != NULL)) * (double)rows * (double)l[i].out * (double)in;
    return sum;
}
CLOCKED(matmul_forward, MATMUL, 0, flops_of_forward(l, count, r, in),
        (ctx_t *c, const metala_linear *l, int count, in_t *x, size_t r, size_t in), (c, l, count, x, r, in))
CLOCKED(swiglu_forward, SWIGLU, 0, flops_of_forward(l, 2, r, in) + flops_of_forward(l + 2, 1, r, l->out),
        (ctx_t *c, const metala_linear *l, metala_dtype type, real *h, in_t *n, size_t r, size_t in), (c, l, type, h, n, r, in))
CLOCKED(swiglu_backward, SWIGLU, 1, flops_of_backward(dn, l, 2, r, in) + flops_of_backward(dh, l + 2, 1, r, l->out),
        (ctx_t *c, real *dn, const metala_linear_gradient *l, real *h, real *dh, real *da, real *db, in_t *a, in_t *b, in_t *n,
         size_t r, size_t in), (c, dn, l, h, dh, da, db, a, b, n, r, in))
CLOCKED(swiglu_step, SWIGLU, 0, flops_of_forward(l, 2, r, in),
        (ctx_t *c, real *y, const metala_linear *l, metala_dtype type, real *n, real *s, in_t *x, size_t r, size_t in, double eps),
        (c, y, l, type, n, s, x, r, in, eps))
CLOCKED(matmul_backward, MATMUL, 1, flops_of_backward(dx, l, count, r, in),
        (ctx_t *c, real *dx, const metala_linear_gradient *l, int count, in_t *x, size_t r, size_t in, int add),
        (c, dx, l, count, x, r, in, add))
CLOCKED(mask_rows, MASK, 0, 0, (ctx_t *c, real *x, const uint8_t *m, size_t r, size_t D), (c, x, m, r, D))
CLOCKED(gate_forward, GATE, 0, 0, (ctx_t *c, real *a, real *k, in_t *z, size_t n, double tau), (c, a, k, z, n, tau))
CLOCKED(gate_backward, GATE, 1, 0,
        (ctx_t *c, real *dz, in_t *da, in_t *dk, in_t *z, in_t *a, size_t n, double tau), (c, dz, da, dk, z, a, n, tau))
CLOCKED(scan_forward, SCAN, 0, 4.0 * (double)(B * T * H * K) * (double)V,
        (ctx_t *c, metala_form f, real *o, real *S, real *states, in_t *q, in_t *k, in_t *v, in_t *a, size_t B, size_t T,
         size_t H, size_t K, size_t V, double s, int shared), (c, f, o, S, states, q, k, v, a, B, T, H, K, V, s, shared))
CLOCKED(scan_backward, SCAN, 1, 12.0 * (double)(B * T * H * K) * (double)V,
        (ctx_t *c, metala_form f, real *dq, real *dk, real *dv, real *da, real *dS, in_t *dO, in_t *states, in_t *q,
         in_t *k, in_t *v, in_t *a, size_t B, size_t T, size_t H, size_t K, size_t V, double s, int shared),
        (c, f, dq, dk, dv, da, dS, dO, states, q, k, v, a, B, T, H, K, V, s, shared))
CLOCKED(mixer_step, SCAN, 0, 0,
        (ctx_t *c, real *y, real *S, in_t *z, in_t *q, in_t *v, in_t *g, in_t *b, size_t B, size_t H, size_t K, size_t V, double tau,
         double scale, double eps), (c, y, S, z, q, v, g, b, B, H, K, V, tau, scale, eps))
CLOCKED(augment_forward, AUGMENT, 0, 0,
        (ctx_t *c, real *p, in_t *o, in_t *q, in_t *k, in_t *v, in_t *b, size_t r, size_t H, size_t K, size_t V),
        (c, p, o, q, k, v, b, r, H, K, V))
CLOCKED(augment_backward, AUGMENT, 1, 0,
        (ctx_t *c, real *dq, real *dk, real *dv, real *db, in_t *dp, in_t *q, in_t *k, in_t *v, in_t *b, size_t r,
         size_t H, size_t K, size_t V), (c, dq, dk, dv, db, dp, q, k, v, b, r, H, K, V))
CLOCKED(head_norm_forward, HEAD_NORM, 0, 0,
        (ctx_t *c, real *y, real *n, real *rho, in_t *p, in_t *g, size_t r, size_t H, size_t V, double eps),
        (c, y, n, rho, p, g, r, H, V, eps))
CLOCKED(head_norm_backward, HEAD_NORM, 1, 0,
        (ctx_t *c, real *dp, real *dg, in_t *dy, in_t *n, in_t *rho, in_t *g, size_t r, size_t H, size_t V),
        (c, dp, dg, dy, n, rho, g, r, H, V))
CLOCKED(silu_gate_forward, SILU_GATE, 0, 0, (ctx_t *c, real *y, in_t *a, in_t *b, size_t n), (c, y, a, b, n))
CLOCKED(silu_gate_backward, SILU_GATE, 1, 0, (ctx_t *c, real *da, real *db, real *y, in_t *dy, in_t *a, in_t *b, size_t n),
        (c, da, db, y, dy, a, b, n))
CLOCKED(add, ADD, 0, 0, (ctx_t *c, real *y, in_t *a, in_t *b, size_t n), (c, y, a, b, n))
CLOCKED(shift_forward, SHIFT, 0, 0,
        (ctx_t *c, real *y, in_t *n, in_t *mu, in_t *previous, size_t B, size_t T, size_t D), (c, y, n, mu, previous,
         B, T, D))
CLOCKED(shift_backward, SHIFT, 1, 0,
        (ctx_t *c, real *dn, real *dmu, in_t *dy, in_t *n, in_t *mu, in_t *previous, size_t B, size_t T, size_t D),
         (c, dn, dmu, dy, n, mu, previous, B, T, D))
CLOCKED(last_token, SHIFT, 0, 0,
        (ctx_t *c, real *to, in_t *x, size_t B, size_t T, size_t D), (c, to, x, B, T, D))
CLOCKED(map_forward, FEATURES, 0, 0,
        (ctx_t *c, real *y, in_t *x, size_t n, metala_map map), (c, y, x, n, map))
CLOCKED(map_backward, FEATURES, 1, 0,
        (ctx_t *c, real *dx, in_t *dy, in_t *x, size_t n, metala_map map), (c, dx, dy, x, n, map))
CLOCKED(taylor_forward, FEATURES, 0, 0,
        (ctx_t *c, real *y, in_t *x, size_t rows, size_t H, size_t d), (c, y, x, rows, H, d))
CLOCKED(taylor_backward, FEATURES, 1, 0,
        (ctx_t *c, real *dx, in_t *dy, in_t *x, size_t rows, size_t H, size_t d), (c, dx, dy, x, rows, H, d))
CLOCKED(rotate_forward, PHASE, 0, 0,
        (ctx_t *c, real *y, in_t *x, in_t *theta, size_t B, size_t T, size_t H, size_t K, int shared, uint64_t
         position, int negative), (c, y, x, theta, B, T, H, K, shared, position, negative))
CLOCKED(rotate_backward, PHASE, 1, 0,
        (ctx_t *c, real *dx, real *dtheta, in_t *dy, in_t *y, in_t *theta, size_t B, size_t T, size_t H, size_t K, int
         shared, uint64_t position, int negative), (c, dx, dtheta, dy, y, theta, B, T, H, K, shared, position,
         negative))
CLOCKED(bounded_gate_forward, GATE, 0, 0,
        (ctx_t *c, real *alpha, real *k, in_t *z, in_t *gamma, size_t rows, size_t n), (c, alpha, k, z, gamma, rows,
         n))
CLOCKED(bounded_gate_backward, GATE, 1, 0,
        (ctx_t *c, real *dz, real *dgamma, in_t *da, in_t *dk, in_t *z, in_t *gamma, size_t rows, size_t n), (c, dz,
         dgamma, da, dk, z, gamma, rows, n))
CLOCKED(bounds_forward, GATE, 0, 0,
        (ctx_t *c, real *gamma, in_t *G, size_t L, size_t n), (c, gamma, G, L, n))
CLOCKED(bounds_backward, GATE, 1, 0,
        (ctx_t *c, real *dG, in_t *dgamma, in_t *G, size_t L, size_t n), (c, dG, dgamma, G, L, n))
CLOCKED(ssm_forward, GATE, 0, 0,
        (ctx_t *c, metala_ssm kind, real *alpha, real *theta, real *b, in_t *decay, in_t *phase, in_t *step, size_t H,
         size_t N, size_t length), (c, kind, alpha, theta, b, decay, phase, step, H, N, length))
CLOCKED(ssm_backward, GATE, 1, 0,
        (ctx_t *c, metala_ssm kind, real *ddecay, real *dphase, real *dstep, in_t *da, in_t *dtheta, in_t *db, in_t
         *decay, in_t *phase, in_t *step, size_t H, size_t N, size_t length), (c, kind, ddecay, dphase, dstep, da,
         dtheta, db, decay, phase, step, H, N, length))
CLOCKED(scale_pairs_forward, FEATURES, 0, 0,
        (ctx_t *c, real *y, in_t *x, in_t *b, size_t rows, size_t n), (c, y, x, b, rows, n))
CLOCKED(scale_pairs_backward, FEATURES, 1, 0,
        (ctx_t *c, real *dx, real *db, in_t *dy, in_t *x, in_t *b, size_t rows, size_t n), (c, dx, db, dy, x, b, rows,
         n))
CLOCKED(selective_forward, GATE, 0, 0,
        (ctx_t *c, real *alpha, real *v, in_t *z, in_t *x, in_t *A, size_t rows, size_t C, size_t N), (c, alpha, v, z,
         x, A, rows, C, N))
CLOCKED(selective_backward, GATE, 1, 0,
        (ctx_t *c, real *dz, real *dx, real *dA, in_t *da, in_t *dv, in_t *z, in_t *x, in_t *A, size_t rows, size_t C,
         size_t N), (c, dz, dx, dA, da, dv, z, x, A, rows, C, N))
CLOCKED(copy_heads_forward, FEATURES, 0, 0,
        (ctx_t *c, real *y, in_t *x, size_t rows, size_t H, size_t K), (c, y, x, rows, H, K))
CLOCKED(copy_heads_backward, FEATURES, 1, 0,
        (ctx_t *c, real *dx, in_t *dy, size_t rows, size_t H, size_t K), (c, dx, dy, rows, H, K))
CLOCKED(wkv_forward, GATE, 0, 0,
        (ctx_t *c, real *q, real *key, real *alpha, real *bonus, in_t *k, in_t *w, in_t *u, const uint8_t *mask, real
         *previous, size_t B, size_t T, size_t D, uint64_t position), (c, q, key, alpha, bonus, k, w, u, mask,
         previous, B, T, D, position))
CLOCKED(wkv_backward, GATE, 1, 0,
        (ctx_t *c, real *dk, real *dw, real *du, in_t *dkey, in_t *da, in_t *dbonus, in_t *key, in_t *bonus, in_t *w,
         const uint8_t *mask, size_t B, size_t T, size_t D), (c, dk, dw, du, dkey, da, dbonus, key, bonus, w, mask, B,
         T, D))
CLOCKED(extend_forward, FEATURES, 0, 0,
        (ctx_t *c, real *y, in_t *v, const uint8_t *mask, in_t *previous, int delayed, size_t B, size_t T, size_t H,
         size_t V), (c, y, v, mask, previous, delayed, B, T, H, V))
CLOCKED(extend_backward, FEATURES, 1, 0,
        (ctx_t *c, real *dv, in_t *dy, const uint8_t *mask, int delayed, size_t B, size_t T, size_t H, size_t V), (c,
         dv, dy, mask, delayed, B, T, H, V))
CLOCKED(normalise_forward, NORMALISER, 0, 0,
        (ctx_t *c, real *y, in_t *o, in_t *bonus, in_t *v, size_t rows, size_t H, size_t V, double eps), (c, y, o,
         bonus, v, rows, H, V, eps))
CLOCKED(normalise_backward, NORMALISER, 1, 0,
        (ctx_t *c, real *dO, real *dbonus, real *dv, in_t *dy, in_t *y, in_t *o, in_t *bonus, in_t *v, size_t rows,
         size_t H, size_t V, double eps), (c, dO, dbonus, dv, dy, y, o, bonus, v, rows, H, V, eps))
CLOCKED(skip_forward, SKIP, 0, 0,
        (ctx_t *c, real *y, in_t *o, in_t *x, in_t *d, size_t rows, size_t n), (c, y, o, x, d, rows, n))
CLOCKED(skip_backward, SKIP, 1, 0,
        (ctx_t *c, real *dx, real *dd, in_t *dy, in_t *x, in_t *d, size_t rows, size_t n), (c, dx, dd, dy, x, d, rows,
         n))
CLOCKED(multiply_forward, SILU_GATE, 0, 0,
        (ctx_t *c, real *y, in_t *a, in_t *b, size_t n), (c, y, a, b, n))
CLOCKED(multiply_backward, SILU_GATE, 1, 0,
        (ctx_t *c, real *da, real *db, in_t *dy, in_t *a, in_t *b, size_t n), (c, da, db, dy, a, b, n))
CLOCKED(sigmoid_gate_forward, SILU_GATE, 0, 0,
        (ctx_t *c, real *y, in_t *a, in_t *b, size_t n), (c, y, a, b, n))
CLOCKED(sigmoid_gate_backward, SILU_GATE, 1, 0,
        (ctx_t *c, real *da, real *db, in_t *dy, in_t *a, in_t *b, size_t n), (c, da, db, dy, a, b, n))
CLOCKED(attention_forward, ATTENTION, 0, 2.0 * (double)(B * T * H) * ((double)past + 0.5 * (double)T) * (double)(K + V),
        (ctx_t *c, real *o, real *lse, in_t *q, in_t *k, in_t *v, const uint8_t *mask, size_t B, size_t T, size_t
         past, size_t stride, size_t H, size_t K, size_t V, double scale), (c, o, lse, q, k, v, mask, B, T, past,
         stride, H, K, V, scale))
CLOCKED(attention_backward, ATTENTION, 1, 2.5 * (double)(B * T * H) * (double)T * (double)(K + V),
        (ctx_t *c, real *dq, real *dk, real *dv, in_t *dO, in_t *o, in_t *lse, in_t *q, in_t *k, in_t *v, const
         uint8_t *mask, size_t B, size_t T, size_t H, size_t K, size_t V, double scale), (c, dq, dk, dv, dO, o, lse, q,
         k, v, mask, B, T, H, K, V, scale))
CLOCKED(cross_entropy_forward, CROSS_ENTROPY, 0, 0,
        (ctx_t *c, real *loss, real *lse, in_t *l, const int *t, size_t r, size_t N), (c, loss, lse, l, t, r, N))
CLOCKED(cross_entropy_backward, CROSS_ENTROPY, 1, 0,
        (ctx_t *c, real *dl, in_t *l, in_t *lse, const int *t, size_t r, size_t N, double w), (c, dl, l, lse, t, r, N, w))
CLOCKED(output_backward, MATMUL, 1, 4.0 * (double)r * (double)N * (double)in,
        (ctx_t *c, real *dx, real *dw, real *l, in_t *lse, const int *t, in_t *x, in_t *w, size_t r, size_t N, size_t in,
         double s),
        (c, dx, dw, l, lse, t, x, w, r, N, in, s))
CLOCKED(adamw, ADAMW, 1, 0,
        (ctx_t *c, real *p, real *m, real *v, in_t *g, size_t n, const metala_adamw *a, uint64_t step, double scale,
         double decay), (c, p, m, v, g, n, a, step, scale, decay))
static double clocked_sum_squares(ctx_t *c, in_t *x, size_t n) {
    double began = seconds(), sum = profiled->sum_squares(c, x, n);
    clocked(NORM, 1, began, 0);
    return sum;
}

static metala_backend clocked_backend(const metala_backend *device) {
    profiled = device;
    metala_backend b = *device;
    b.begin_recording = NULL;                                            // a clock waits, a recording cannot
#define USE(function) b.function = clocked_##function
    USE(embedding_forward), USE(embedding_backward), USE(patch_forward), USE(rms_forward), USE(rms_backward), USE(conv_forward);
    USE(conv_backward), USE(conv_step), USE(matmul_forward), USE(matmul_backward), USE(swiglu_forward), USE(swiglu_backward);
    USE(swiglu_step), USE(mask_rows), USE(gate_forward), USE(gate_backward);
    USE(scan_forward), USE(scan_backward), USE(mixer_step), USE(augment_forward), USE(augment_backward), USE(head_norm_forward);
    USE(head_norm_backward), USE(silu_gate_forward), USE(silu_gate_backward), USE(add), USE(cross_entropy_forward);
    USE(cross_entropy_backward), USE(output_backward), USE(sum_squares), USE(adamw);
    USE(shift_forward), USE(shift_backward), USE(last_token), USE(map_forward), USE(map_backward);
    USE(taylor_forward), USE(taylor_backward), USE(rotate_forward), USE(rotate_backward), USE(bounded_gate_forward);
    USE(bounded_gate_backward), USE(bounds_forward), USE(bounds_backward), USE(ssm_forward), USE(ssm_backward);
    USE(scale_pairs_forward), USE(scale_pairs_backward), USE(selective_forward), USE(selective_backward);
    USE(copy_heads_forward), USE(copy_heads_backward), USE(wkv_forward), USE(wkv_backward), USE(extend_forward);
    USE(extend_backward), USE(normalise_forward), USE(normalise_backward), USE(skip_forward), USE(skip_backward);
    USE(multiply_forward), USE(multiply_backward), USE(sigmoid_gate_forward), USE(sigmoid_gate_backward);
    USE(attention_forward), USE(attention_backward);
#undef USE
    return b;
}

// One direction of one kernel: milliseconds of a step, share of everything, GFLOP/s where operations are counted.
static void print_spent(int kernel, int backward, double steps, double all) {
    double s = spent[kernel].seconds[backward], operations = spent[kernel].operations[backward];
    char rate[ROOM] = "";
    if (operations > 0) snprintf(rate, sizeof rate, "%.1f", 1e-9 * operations / s);
    if (spent[kernel].calls[backward]) printf(" %10.2f %6.1f%% %8s", 1e3 * s / steps, 100 * s / all, rate);
    else printf(" %10s %7s %8s", "", "", "");
}

// What is computed again for the backward counts as forward, but for SwiGLU's silu(a) ⊙ b. Cross-entropy's backward counts with
// the products of the output layer.
static void print_profile(double steps) {
    double all = 0;
    for (int k = 0; k < KERNELS; k++) all += spent[k].seconds[0] + spent[k].seconds[1];
    printf("\n%-19s %10s %7s %8s %10s %7s %8s\n", "kernel, ms of a step", "forward", "share", "GFLOP/s", "backward",
           "share", "GFLOP/s");
    for (int k = 0; k < KERNELS; k++)
        if (spent[k].calls[0] || spent[k].calls[1]) {
            printf("%-20s", kernel_names[k]);
            print_spent(k, 0, steps, all);
            print_spent(k, 1, steps, all);
            putchar('\n');
        }
}

// ------------------------------------------------------------------------------------------------ benchmark

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// The median time of a training step on random tokens.
static int bench(program *p) {
    enum { WARM = 2, TIMED = 9 };
    settings *s = p->s;
    const metala_config *c = &s->config;
    uint64_t random = (uint64_t)s->seed;
    double times[TIMED], loss, norm;
    char count[ROOM], form[ROOM], device[ROOM];
    complete_config(p);
    if (s->match_params && match_parameters(p)) return -1;
    if (s->init ? old_model(p, s->init) : check_memory(p, (size_t)s->context) || new_model(p)) return -1;
    if (allocate_batch(p, (size_t)s->context) || allocate(p, (size_t)s->context)) return -1;
    say_notices(p);
    s->adamw.learning_rate = s->learning_rate;
    const size_t rows = (size_t)s->batch * (size_t)s->context;
    for (size_t i = 0; i < rows * input_size(p); i++)
        p->inputs[i] = (int)(metala_random(&random) % (uint64_t)(c->patch_dim ? 256 : c->vocab_size));
    for (size_t i = 0; i < rows; i++)
        p->targets[i] = (int)(metala_random(&random) % (uint64_t)c->vocab_size);
    for (int i = 0; i < WARM + TIMED; i++) {
        double began = seconds();
        if (interrupted) return 0;
        if (metala_gradient(p->ctx, p->trainer, (metala_form)s->form, p->inputs, p->targets, NULL, s->batch,
                            (size_t)s->context, 1, &loss) || metala_update(p->ctx, p->trainer, &s->adamw, &norm))
            return library_failed(p);
        if (i >= WARM) times[i - WARM] = seconds() - began;
    }
    qsort(times, TIMED, sizeof *times, by_size);
    if (s->profile) print_profile(WARM + TIMED);
    double step = times[TIMED / 2], parameters = (double)metala_model_size(p->model);
    double speed = step > 0 ? (double)s->batch * s->context / step : 0;
    printf("bench %s D%d L%d H%d F%d N%d B%d T%d P %s: ", metala_config_row_name(c), c->width, c->layers, c->heads,
           c->glu_dim, c->vocab_size, s->batch, s->context, count_text(count, parameters));
    printf("%.1f ms/step, %.0f tokens/s, %.1f GFLOP/s, %s, %s, %.1f MB\n", 1e3 * step, speed,
           6e-9 * parameters * speed, value_text(s, option_named("form"), form), device_text(p, device),
           (double)memory_of(p, (size_t)s->context).total / 1e6);
    return 0;
}

// ------------------------------------------------------------------------------------------------ main

static int prepare(program *p) {
    settings *s = p->s;
    if (s->resume && restore_settings(p)) return -1;
    if (!s->resume && s->max_seconds > 0 && !is_given(s, "max-steps")) s->max_steps = 0;
    if (!s->resume && s->max_steps && !is_given(s, "warmup") && s->warmup > s->max_steps / 10)
        s->warmup = s->max_steps / 10;
    if (check_outputs(s) || load_data(p)) return -1;
    if ((s->resume || s->init) && old_model(p, s->resume ? s->out : s->init)) return -1;
    if (!p->model) complete_config(p);
    if (!p->model && s->match_params && match_parameters(p)) return -1;
    if (metala_config_check(p->ctx, &s->config)) {
        p->misused = !p->model;                               // --tie or --scale-embedding of patches
        return library_failed(p);
    }
    if (check_vocabulary(p) || check_memory(p, longest_sequence(p)) || allocate_batch(p, longest_sequence(p)) ||
        check_targets(p))
        return -1;
    say_notices(p);
    describe_data(p);
    describe_model(p);
    describe_settings(p);
    fflush(stdout);                      // before memory is taken
    if ((!p->model && new_model(p)) || allocate(p, longest_sequence(p))) return -1;
    p->saved = -1;
    if (!s->resume) return 0;
    if (metala_checkpoint_load(p->ctx, p->trainer, s->out)) return library_failed(p);
    p->saved = step_of(p);
    say(p, "resumed  %s after step %d\n", s->out, step_of(p));
    return 0;
}

static int run(program *p, const char *command) {
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
#ifdef SIGHUP
    signal(SIGHUP, on_interrupt);                            // the terminal was closed
#endif
    if (p->s->bench) return bench(p);
    if (prepare(p)) return -1;
    p->start = seconds() - p->s->seconds;
    if (is_finished(p) || is_stopped(p)) {
        if (interrupted) say(p, "stopped before the first step\n");
        else say(p, "nothing left to do; a larger --max-steps, --max-seconds or --stop-at goes on\n");
        return 0;
    }
    int first = step_of(p);
    if (open_log(p) || train(p)) return -1;
    report(p, command);
    if (p->s->profile) print_profile(step_of(p) - first);
    return p->log_failed ? -1 : 0;
}

#if defined _OPENMP && defined _POSIX_C_SOURCE
// OpenMP's threads spin while they wait for work. Where other programs want the processors too, every loop then ends
// with waiting for a thread that is not running, and a step takes ten times as long. The runtime reads its settings
// when it is loaded, so the program starts itself once more with these: spin briefly, then sleep. (GNU's runtime knows
// how long, others sleep at once.) Whoever sets OMP_WAIT_POLICY has the last word.
static void wait_asleep(char **argv) {
    if (getenv("OMP_WAIT_POLICY") || setenv("OMP_WAIT_POLICY", "passive", 1) || setenv("GOMP_SPINCOUNT", "2000", 0))
        return;
    execvp(argv[0], argv);               // returns only when it failed; all works without it
}
#endif

static int close_all(program *p) {
    int status = 0;
    if (p->log && fclose(p->log)) status = complain("%s: cannot be written: %s", p->s->log, strerror(errno));
    for (int i = 0; i < MOST_OPTIONS; i++) free(p->s->restored[i]);
    metala_trainer_free(p->trainer);
    metala_state_free(p->state);
    metala_model_free(p->model);
    metala_dataset_free(p->val);
    metala_dataset_free(p->train);
    metala_close(p->ctx);
    free(p->logits);
    free(p->inputs);
    free(p->targets);
    free(p->mask);
    if (fflush(stdout) || ferror(stdout)) status = complain("standard output: cannot be written: %s", strerror(errno));
    return status;
}

// What --device asks for, or the CPU and why.
static const metala_backend *backend_of(program *p) {
    const settings *s = p->s;
    const metala_backend *backend = NULL;
    if (s->device == ON_CUDA) backend = metala_cuda((metala_math)s->math, p->no_device, sizeof p->no_device);
    if (backend) *p->no_device = 0;
    return backend ? backend : metala_cpu();
}

int main(int argc, char **argv) {
    settings s;
    program p = {0};
    metala_backend clocks;
    const metala_backend *backend = NULL;
#if defined _OPENMP && defined _POSIX_C_SOURCE
    wait_asleep(argv);
#endif
    if (parse_options(&s, argc, argv)) return 2;
    p.s = &s;
    int status = 0;
    if (!s.help && !s.version) {
        backend = backend_of(&p);
        clocks = clocked_backend(backend);
    }
    if (s.help) print_help();
    else if (s.version) printf("metala %s, float%d\n", METALA_VERSION, 8 * (int)sizeof(metala_real));
    else if ((p.ctx = metala_open(s.profile ? &clocks : backend, s.threads)) == NULL)
        status = complain("%s", metala_error(NULL));
    else status = run(&p, argv[0]);
    if (close_all(&p)) status = -1;
    return p.misused ? 2 : status ? 1 : interrupted ? 128 + (int)interrupted : 0;
}
