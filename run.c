// run.c - reads a MetaLA model and lets it write: generation, chat, scoring and a look at its parameters.
//
// The model is a recurrence, so what it has read is a state of fixed size. Everything here follows from that: a chat
// never fills up, a continuation is a copy of the state, and a run that was saved goes on where it stopped.
//
// Contents: options - terminal and time - tokens in and out - sampling - reading and writing - state files - the five
// things it does (generate, chat, evaluate, inform, quantize) - main. Exit status: 0, 1 failure, 2 usage, 130 Ctrl-C.

#if !defined(_POSIX_C_SOURCE) && (defined(__unix__) || defined(__APPLE__))
#define _POSIX_C_SOURCE 200809L         // isatty and clock_gettime; everything else is C99
#endif

#include "metala.h"

#include <errno.h>
#include <float.h>
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

enum {
    WINDOW = 1024,                      // tokens that are remembered, for --repeat-window and --stop
    PIECE = 4096                        // tokens between two looks at Ctrl-C and at the progress line
};

// Every failure is one line on stderr; the -1 lets callers write `return complain(...)`.
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
static int complain(const char *format, ...) {
    char line[640];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    for (char *c = line; *c; c++)                            // whatever a prompt or a file name contains
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "run: %s\n", line);
    return -1;
}

// ------------------------------------------------------------------------------------------------ options

typedef struct {
    const char *model, *prompt, *prompt_file, *stop, *save_state, *load_state, *eval, *form_name, *weights, *quantize;
    const char *device, *math;
    uint64_t tokens, samples, seed, top_k, repeat_window, context, threads;
    double temperature, top_p, min_p, repeat_penalty;
    int chat, info, models, conditions, no_echo, quiet, help, version;
    metala_form form;
    metala_dtype type;                  // of the weights, as --weights names it; METALA_F32: full precision
    metala_math math_type;
} settings;

typedef enum { HEADING, FLAG, COUNT, NUMBER, TEXT } option_kind;      // int, uint64_t, double, const char * in settings

typedef struct {
    char letter;
    const char *name, *argument, *help;
    option_kind kind;
    size_t offset;
    double initial, least, most;
} option;

#define AT(member) offsetof(settings, member)
static const option options[] = {        // letter, name, argument, help, kind, member, default, least, most
    {0, "Text", 0, 0, HEADING, 0, 0, 0, 0},
    {'n', "tokens", "N", "tokens to write; 0 only reads the prompt", COUNT, AT(tokens), 256, 0, 1e15},
    {0, "prompt-file", "FILE", "read the prompt from FILE", TEXT, AT(prompt_file), 0, 0, 0},
    {0, "no-echo", 0, "do not repeat the prompt in the output", FLAG, AT(no_echo), 0, 0, 0},
    {0, "stop", "TEXT", "stop when the output ends with TEXT (in a chat: a blank line)", TEXT, AT(stop), 0, 0, 0},
    {0, "samples", "N", "write N continuations of the prompt", COUNT, AT(samples), 1, 1, 1e6},
    {0, "chat", 0, "read a line, write a reply, and so on; /help lists its commands", FLAG, AT(chat), 0, 0, 0},
    {0, "Sampling, in this order", 0, 0, HEADING, 0, 0, 0, 0},
    {0, "repeat-penalty", "X", "make recent tokens less likely; 1 = off", NUMBER, AT(repeat_penalty), 1, 0.1, 10},
    {0, "repeat-window", "N", "how many tokens are recent", COUNT, AT(repeat_window), 64, 0, WINDOW},
    {0, "temperature", "X", "below 1 bolder, above 1 wilder; 0 = the likeliest", NUMBER, AT(temperature), 0.8, 0, 100},
    {0, "top-k", "N", "choose among the N likeliest tokens; 0 = all", COUNT, AT(top_k), 0, 0, 1e9},
    {0, "top-p", "X", "choose among the likeliest that together reach X", NUMBER, AT(top_p), 1, 0, 1},
    {0, "min-p", "X", "only tokens at least X times as likely as the likeliest", NUMBER, AT(min_p), 0, 0, 1},
    {0, "seed", "N", "random numbers; 0 takes the clock and prints what it took", COUNT, AT(seed), 0, 0, 1e19},
    {0, "State", 0, 0, HEADING, 0, 0, 0, 0},
    {0, "save-state", "FILE", "at the end, save what was read and written", TEXT, AT(save_state), 0, 0, 0},
    {0, "load-state", "FILE", "continue exactly where a saved run stopped", TEXT, AT(load_state), 0, 0, 0},
    {0, "Instead of writing", 0, 0, HEADING, 0, 0, 0, 0},
    {0, "eval", "FILE", "score a text, or a .safetensors dataset", TEXT, AT(eval), 0, 0, 0},
    {0, "context", "T", "forget everything after T tokens of a text; 0 = never", COUNT, AT(context), 0, 0, 1 << 24},
    {0, "info", 0, "configuration, parameters, size of the state", FLAG, AT(info), 0, 0, 0},
    {0, "models", 0, "every row of the general form: equation, choices, sizes as in MODEL, or without one\n"
     "as by default", FLAG, AT(models), 0, 0, 0},
    {0, "conditions", 0, "the paper's three conditions for each of them, computed; takes a minute", FLAG, AT(conditions),
     0, 0, 0},
    {0, "quantize", "FILE", "write the model to FILE with smaller weights; --weights says which [int8]", TEXT,
     AT(quantize), 0, 0, 0},
    {0, "General", 0, 0, HEADING, 0, 0, 0, 0},
    {0, "form", "NAME", "chunkwise, recurrent or parallel: how a prompt or a text is read; the\n"
     "numbers are the same [chunkwise]", TEXT, AT(form_name), 0, 0, 0},
    {0, "weights", "TYPE", "f32, bf16 (half the memory) or int8 (a quarter): writing is two to four\n"
     "times as fast, the text a little worse; --eval tells how much [as the file]", TEXT, AT(weights), 0, 0, 0},
    {0, "device", "NAME", "cpu, or cuda: an NVIDIA GPU, where the programs were built with CUDA=1 [cpu]", TEXT,
     AT(device), 0, 0, 0},
    {0, "math", "NAME", "of large matrix products on the GPU: exact, or tensor cores: tf32 or bf16 [exact]", TEXT,
     AT(math), 0, 0, 0},
    {0, "threads", "N", "0 = one per core", COUNT, AT(threads), 0, 0, 1024},
    {'q', "quiet", 0, "no speeds, no progress", FLAG, AT(quiet), 0, 0, 0},
    {'h', "help", 0, "this text", FLAG, AT(help), 0, 0, 0},
    {0, "version", 0, "version and precision", FLAG, AT(version), 0, 0, 0}};
enum { OPTIONS = sizeof options / sizeof *options };

static void print_help(void) {
    puts("usage: run MODEL [PROMPT] [options]\n\n"
         "Continues PROMPT with a MetaLA model (a .safetensors file). PROMPT - reads it from standard input. Without\n"
         "one, a state that was loaded goes on, and a new text begins as after the model's begin token (train\n"
         "--bos-token) or a newline. A model with a vocabulary of 256 reads and writes bytes, others numbers of\n"
         "tokens, separated by spaces; its end token (train --eos-token) ends the text. The text goes to standard\n"
         "output, everything else to standard error.\n\n"
         "  run model.safetensors \"Once upon a time\" --temperature 0.7\n"
         "  run model.safetensors --prompt-file story.txt -n 0 --save-state story.state\n"
         "  run model.safetensors --load-state story.state --samples 3\n"
         "  run model.safetensors --eval story.txt --weights int8\n"
         "  run model.safetensors --quantize small.safetensors --weights bf16");
    for (const option *o = options; o < options + OPTIONS; o++) {
        char left[40];
        if (o->kind == HEADING) {
            printf("\n%s\n", o->name);
            continue;
        }
        const char letter[] = {o->letter ? '-' : ' ', o->letter ? o->letter : ' ', o->letter ? ',' : ' ', 0};
        snprintf(left, sizeof left, "%s --%s %s", letter, o->name, o->argument ? o->argument : "");
        printf("  %-25s ", left);
        for (const char *c = o->help; *c; c++) *c == '\n' ? printf("\n%28s", "") : putchar(*c);
        if (o->kind == COUNT || o->kind == NUMBER) printf(" [%g]", o->initial);
        putchar('\n');
    }
    puts("\nOptions may be written --name value or --name=value; -- ends them.\n"
         "Exit status: 0 finished, 1 failure, 2 wrong usage, 130 Ctrl-C.");
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

// The option that argv[i] names, as -n, --name or --name=value; *value is what follows the '='.
static const option *find_option(const char *argument, const char **value) {
    char name[64];
    size_t length = strcspn(argument, "=");
    *value = argument[length] ? argument + length + 1 : NULL;
    snprintf(name, sizeof name, "%.*s", (int)(length < sizeof name ? length : sizeof name - 1), argument);
    const option *nearest = NULL;
    int least = 4;                                           // a hint further away than this would be none
    for (const option *o = options; o < options + OPTIONS; o++) {
        if (o->kind == HEADING) continue;
        if (o->letter && name[1] == o->letter && !name[2]) return o;
        int distance = name[1] == '-' ? edit_distance(name + 2, o->name) : 64;
        if (!distance) return o;
        if (distance < least) least = distance, nearest = o;
    }
    if (nearest) complain("unknown option %s; did you mean --%s?", name, nearest->name);
    else complain("unknown option %s; run --help lists the options", name);
    return NULL;
}

// A whole number, of digits only; -1 when text is not one or does not fit.
static int parse_count(const char *text, uint64_t *count) {
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    *count = n;
    return *text < '0' || *text > '9' || *end || errno ? -1 : 0;
}

static int parse_number(const char *text, double *number) {
    char *end;
    *number = strtod(text, &end);
    return !*text || strspn(text, " \t\n\v\f\r") || *end || !isfinite(*number) ? -1 : 0;
}

static int set_option(settings *s, const option *o, const char *value) {
    char *member = (char *)s + o->offset;
    if (o->kind == FLAG) *(int *)(void *)member = 1;
    if (o->kind == TEXT) *(const char **)(void *)member = value;
    if (o->kind == TEXT && !*value) return complain("--%s: got nothing, expected %s", o->name, o->argument);
    if (o->kind == COUNT) {
        uint64_t count;
        if (parse_count(value, &count) || (double)count < o->least || (double)count > o->most)
            return complain("--%s: got '%s', expected a whole number from %.0f to %.0f", o->name, value, o->least,
                            o->most);
        *(uint64_t *)(void *)member = count;
    }
    if (o->kind == NUMBER) {
        double number;
        if (parse_number(value, &number) || number < o->least || number > o->most)
            return complain("--%s: got '%s', expected a number from %g to %g", o->name, value, o->least, o->most);
        *(double *)(void *)member = number;
    }
    return 0;
}

static int on_cuda(const settings *s) { return s->device && !strcmp(s->device, "cuda"); }

// What no single option can see.
static int check_settings(settings *s) {
    static const char *const forms[] = {"chunkwise", "recurrent", "parallel"};       // in the order of metala_form
    static const char *const weights[] = {"f32", "bf16", "int8"}, *const maths[] = {"exact", "tf32", "bf16"};
    static const metala_dtype types[] = {METALA_F32, METALA_BF16, METALA_I8};
    int from_stdin = s->prompt && !strcmp(s->prompt, "-"), type = 0, math = 0;
    if (s->help || s->version || s->models || s->conditions) return 0;
    if (!s->model) return complain("no model given; usage: run MODEL [PROMPT] [options], run --help says more");
    if (s->prompt && s->prompt_file) return complain("got a prompt and --prompt-file, expected one of them");
    if (s->chat + s->info + (s->eval != NULL) + (s->quantize != NULL) > 1)
        return complain("expected one of --chat, --info, --eval and --quantize");
    if (s->chat && from_stdin) return complain("--chat reads its lines from standard input, the prompt cannot be -");
    if (s->chat && s->samples > 1) return complain("--chat has one sequence, expected --samples 1");
    if ((s->info || s->eval || s->quantize) && (s->prompt || s->prompt_file || s->load_state || s->save_state))
        return complain("%s starts from an empty state; expected no prompt, --load-state or --save-state",
                        s->info ? "--info" : s->eval ? "--eval" : "--quantize");
    if (s->quantize && !s->weights) s->weights = "int8";
    while (s->weights && type < 3 && strcmp(s->weights, weights[type])) type++;
    if (type == 3) return complain("--weights: got '%s', expected f32, bf16 or int8", s->weights);
    if (s->quantize && !type) return complain("--quantize: got --weights f32, expected bf16 or int8");
    s->type = types[type];
    if (s->save_state && s->samples > 1) return complain("--save-state keeps one sequence, expected --samples 1");
    if (s->device && strcmp(s->device, "cpu") && strcmp(s->device, "cuda"))
        return complain("--device: got '%s', expected cpu or cuda", s->device);
    if (s->math && !on_cuda(s)) return complain("--math: expected --device cuda with it");
    while (s->math && math < 3 && strcmp(s->math, maths[math])) math++;
    if (math == 3) return complain("--math: got '%s', expected exact, tf32 or bf16", s->math);
    s->math_type = (metala_math)math;
    for (int i = 0; i < 3 && s->form_name; i++)
        if (!strcmp(s->form_name, forms[i])) {
            s->form = (metala_form)i;
            return 0;
        }
    return s->form_name ? complain("--form: got '%s', expected chunkwise, recurrent or parallel", s->form_name) : 0;
}

static int parse_options(settings *s, int argc, char **argv) {
    int only_arguments = 0;
    memset(s, 0, sizeof *s);
    for (const option *o = options; o < options + OPTIONS; o++) {
        if (o->kind == COUNT) *(uint64_t *)(void *)((char *)s + o->offset) = (uint64_t)o->initial;
        if (o->kind == NUMBER) *(double *)(void *)((char *)s + o->offset) = o->initial;
    }
    for (int i = 1; i < argc; i++) {
        const char *value;
        if (!only_arguments && !strcmp(argv[i], "--")) only_arguments = 1;
        else if (!only_arguments && argv[i][0] == '-' && argv[i][1]) {
            const option *o = find_option(argv[i], &value);
            if (!o) return -1;
            if (o->kind == FLAG && value) return complain("--%s: got '%s', expected no value", o->name, value);
            if (o->kind != FLAG && !value && !(value = argv[++i]))
                return complain("--%s: got nothing, expected --%s %s", o->name, o->name, o->argument);
            if (set_option(s, o, value)) return -1;
        } else if (!s->model) s->model = argv[i];
        else if (!s->prompt) s->prompt = argv[i];
        else return complain("got a third argument '%s', expected MODEL and PROMPT; quote a prompt that has spaces",
                             argv[i]);
    }
    return check_settings(s);
}

// ------------------------------------------------------------------------------------------------ terminal and time

// The first Ctrl-C asks for a stop at the next token; the handler is gone then, so that a second one ends the program.
static volatile sig_atomic_t interrupted;

static void on_interrupt(int number) {
    interrupted = 1;
    signal(number, SIG_DFL);
}

static void watch_interrupts(void) {
    interrupted = 0;
    signal(SIGINT, on_interrupt);
}

#ifdef _POSIX_C_SOURCE
static int is_terminal(FILE *stream) { return isatty(fileno(stream)); }
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#else
static int is_terminal(FILE *stream) {
    (void)stream;
    return 0;
}
static double seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }
#endif

static uint64_t seed_from_clock(void) {
    uint64_t state = (uint64_t)time(NULL) * 1000003 + (uint64_t)(1e6 * seconds());
    return (metala_random(&state) >> 40) + 1;                // short enough to type
}

// ------------------------------------------------------------------------------------------------ tokens in and out

// A sequence is what the model has read so far. The last token is chosen or given, but not read yet: reading it is
// what gives the logits of the one after it.
typedef struct {
    metala_state *state;
    int next;                           // that last token; -1 when there is none yet
    int recent[WINDOW];                 // the last tokens, oldest first, `next` included
    size_t recent_count;
    uint64_t random;
} sequence;

typedef struct {
    double likelihood;                  // the logit, later the probability up to a common factor
    int token;
} candidate;

typedef struct {
    const settings *s;
    metala_context *ctx;
    metala_model *model;
    const metala_config *config;
    metala_real *logits;                // (N)
    candidate *candidates;              // (N)
    int *stop;                          // the tokens of --stop
    size_t stop_count;
    int bytes;                          // tokens are bytes, not numbers
    int last_written;                   // -1 at the start of a line of numbers
    uint64_t seed;                      // 0 when the random numbers continue those of a saved state
    size_t tokens_read, tokens_written;
    double read_seconds, write_seconds;
    char no_device[300];                // why the CPU has to do it; or empty
} program;

static int library_failed(const program *p) { return complain("%s", metala_error(p->ctx)); }

static int is_quantized(const metala_model *model) {
    metala_dtype type = metala_model_weights(model);
    return type == METALA_BF16 || type == METALA_I8;
}

// Makes the weights what --weights asks for.
static int quantize(const program *p) {
    const settings *s = p->s;
    if (!s->weights) return 0;
    if (s->type == METALA_F32 && is_quantized(p->model))
        return complain("--weights f32: the weights of %s are %s, expected full precision", s->model,
                        metala_dtype_name(metala_model_weights(p->model)));
    return s->type != METALA_F32 && metala_model_quantize(p->ctx, p->model, s->type) ? library_failed(p) : 0;
}

static void put_token(program *p, int token) {
    if (p->bytes) putchar(token);
    else printf(p->last_written < 0 ? "%d" : " %d", token);
    p->last_written = token;
}

static int flush_output(void) {
    if ((fflush(stdout) || ferror(stdout)) && !interrupted)  // Ctrl-C may interrupt a write as well
        return complain("standard output: cannot be written, %s", strerror(errno));
    return 0;
}

static int echo_prompt(program *p, const int *prompt, size_t count) {
    for (size_t i = 0; i < count && !p->s->no_echo && p->s->tokens; i++) put_token(p, prompt[i]);
    return flush_output();
}

// Ends the current line: needed after numbers, and after a text that does not end by itself.
static int end_line(program *p) {
    if (p->last_written >= 0 && !(p->bytes && p->last_written == '\n')) putchar('\n');
    p->last_written = -1;
    return flush_output();
}

// Reads a stream up to and including the byte `end`, or to its end (EOF). NULL when there is no memory.
static char *read_stream(FILE *stream, int end, size_t *size) {
    size_t room = 256;
    char *text = malloc(room);
    *size = 0;
    for (int c = 0; text && c != end && (c = getc(stream)) != EOF;) {
        text[(*size)++] = (char)c;
        if (*size + 2 < room) continue;                     // for the 0, and a newline that chat may add
        char *larger = room < SIZE_MAX / 2 ? realloc(text, room *= 2) : NULL;
        if (!larger) free(text);
        text = larger;
    }
    if (!text) complain("out of memory after %zu bytes of input", *size);
    else text[*size] = 0;
    return text;
}

// The tokens whose numbers stand in a text, separated by white space; `what` names the text in messages.
static int *parse_tokens(const program *p, const char *what, const char *text, size_t *count) {
    static const char space[] = " \t\r\n";
    int *tokens = malloc((strlen(text) + 1) * sizeof *tokens);
    *count = 0;
    if (!tokens) complain("out of memory: %s has %zu bytes", what, strlen(text));
    for (text += strspn(text, space); tokens && *text; text += strspn(text, space)) {
        char word[24];
        uint64_t number;
        size_t length = strcspn(text, space);
        snprintf(word, sizeof word, "%.*s", (int)(length < sizeof word ? length : sizeof word - 1), text);
        text += length;
        if (!parse_count(word, &number) && number < (uint64_t)p->config->vocab_size) tokens[(*count)++] = (int)number;
        else {
            complain("%s: word %zu is '%s', expected the number of a token, from 0 to %d", what, *count + 1, word,
                     p->config->vocab_size - 1);
            free(tokens);
            tokens = NULL;
        }
    }
    return tokens;
}

// The tokens of a text: its bytes, or the numbers in it. NULL on failure.
static int *encode(const program *p, const char *what, const char *text, size_t size, size_t *count) {
    if (!p->bytes && memchr(text, 0, size)) {
        complain("%s: a byte is 0, expected numbers of tokens", what);
        return NULL;
    }
    if (!p->bytes) return parse_tokens(p, what, text, count);
    int *tokens = malloc((size + 1) * sizeof *tokens);
    if (!tokens) complain("out of memory: %s has %zu bytes", what, size);
    for (*count = 0; tokens && *count < size; ++*count) tokens[*count] = (unsigned char)text[*count];
    return tokens;
}

// The prompt of the command line, a file or standard input; no tokens when there is none.
static int *read_prompt(const program *p, size_t *count) {
    const settings *s = p->s;
    const char *name = s->prompt_file ? s->prompt_file : "standard input";
    if (!s->prompt_file && (!s->prompt || strcmp(s->prompt, "-")))
        return encode(p, "prompt", s->prompt ? s->prompt : "", s->prompt ? strlen(s->prompt) : 0, count);
    FILE *stream = s->prompt_file ? fopen(s->prompt_file, "rb") : stdin;
    if (!stream) {
        complain("%s: cannot be opened, %s", name, strerror(errno));
        return NULL;
    }
    size_t size;
    errno = 0;
    char *text = read_stream(stream, EOF, &size);
    int *tokens = NULL;
    if (text && ferror(stream) && !interrupted) complain("%s: cannot be read, %s", name, strerror(errno));
    else if (text) tokens = encode(p, name, text, size, count);
    if (stream != stdin) fclose(stream);
    free(text);
    return tokens;
}

// ------------------------------------------------------------------------------------------------ sampling

// Candidates as a heap, no one likelier than what is above, at half its place: the likeliest few of many without sorting all.
static int is_likelier(const candidate *x, const candidate *y) {          // ties by token
    return x->likelihood != y->likelihood ? x->likelihood > y->likelihood : x->token < y->token;
}
static void swap_candidates(candidate *x, candidate *y) {
    candidate old = *x;
    *x = *y, *y = old;
}
static void sink(candidate *c, size_t i, size_t n) {         // number i of n, below all that are likelier
    for (size_t next; (next = 2 * i + 1) < n; i = next) {
        if (next + 1 < n && is_likelier(c + next + 1, c + next)) next++;
        if (is_likelier(c + i, c + next)) return;
        swap_candidates(c + i, c + next);
    }
}
// The likelihood of number k of N from the likeliest on; those that have left the heap lie behind it, the first one last.
static double likelihood_of(candidate *c, size_t N, size_t *left, size_t k) {
    for (; *left <= k; sink(c, 0, N - ++*left)) swap_candidates(c, c + (N - 1 - *left));
    return c[N - 1 - k].likelihood;
}

// Draws the next token from logits l (N); -1 when they are not numbers. In this order:
//
//     repeat penalty r    l_i ← l_i / r if l_i > 0, else l_i · r,  for the tokens of the window   (Keskar et al. 2019)
//     temperature τ       w_i = exp((l_i - max l) / τ),  p_i = w_i / Σ w                          τ = 0: argmax l
//     top-k               only the k largest
//     top-p               only the shortest prefix, by falling p, with Σ p >= P                  (Holtzman et al. 2020)
//     min-p               only p_i >= M max p
//
// Sums are taken in double.
static int choose_token(const program *p, sequence *q) {
    const settings *s = p->s;
    const metala_real *l = p->logits;
    candidate *c = p->candidates;
    size_t N = (size_t)p->config->vocab_size, kept = N;
    size_t window = s->repeat_window < q->recent_count ? (size_t)s->repeat_window : q->recent_count;
    for (size_t i = 0; i < N; i++) {
        if (!isfinite(l[i])) return -1;
        c[i].likelihood = l[i];
        c[i].token = (int)i;
    }
    for (size_t j = q->recent_count - window; j < q->recent_count; j++) {
        int i = q->recent[j];                                // from l, so that a token is punished once
        c[i].likelihood = l[i] > 0 ? l[i] / s->repeat_penalty : l[i] * s->repeat_penalty;
    }
    if (s->temperature <= 0) {
        const candidate *best = c;
        for (size_t i = 1; i < N; i++) best = c[i].likelihood > best->likelihood ? c + i : best;
        return best->token;
    }
    double most = c[0].likelihood, total = 0, sum = 0;
    size_t end = 0, left = 0, i = 0;
    for (i = 1; i < N; i++) most = c[i].likelihood > most ? c[i].likelihood : most;
    for (i = 0; i < N; i++) total += c[i].likelihood = exp((c[i].likelihood - most) / s->temperature);
    for (i = N / 2; i-- > 0;) sink(c, i, N);
    if (s->top_k && s->top_k < N) {
        kept = (size_t)s->top_k;
        for (i = 0, total = 0; i < kept; i++) total += likelihood_of(c, N, &left, i);
    }
    if (s->top_p >= 1 && s->min_p <= 0) end = kept, sum = total;
    else                                                     // the first one always stays, its likelihood is 1
        do sum += likelihood_of(c, N, &left, end++);
        while (end < kept && sum < s->top_p * total && likelihood_of(c, N, &left, end) >= s->min_p);
    double point = metala_uniform(&q->random) * sum;
    for (i = 0; i + 1 < end && (point -= likelihood_of(c, N, &left, i)) >= 0;) i++;
    likelihood_of(c, N, &left, i);
    return c[N - 1 - i].token;
}

// ------------------------------------------------------------------------------------------------ reading and writing

static void set_next(sequence *q, int token) {
    if (q->recent_count == WINDOW) memmove(q->recent, q->recent + 1, --q->recent_count * sizeof *q->recent);
    q->recent[q->recent_count++] = q->next = token;
}

// Lets the model read all of the tokens but the last, which becomes `next`. Ctrl-C stops between two pieces.
static int read_tokens(program *p, sequence *q, const int *tokens, size_t count) {
    double start = seconds();
    size_t done = 0;
    while (done < count && !interrupted) {
        int piece[PIECE];
        size_t n = 0;
        while (n < PIECE && done < count) {
            if (q->next >= 0) piece[n++] = q->next;
            set_next(q, tokens[done++]);
        }
        if (n && metala_forward(p->ctx, q->state, p->s->form, piece, NULL, n, NULL)) return library_failed(p);
    }
    p->tokens_read += done;
    p->read_seconds += seconds() - start;
    return 0;
}

// Writes up to n tokens, each chosen from what the model expects after the one before.
static int write_tokens(program *p, sequence *q, uint64_t n, const int *stop, size_t stop_count) {
    const metala_config *c = p->config;
    double start = seconds();
    if (q->next < 0) set_next(q, c->bos_token_id >= 0 ? c->bos_token_id : c->vocab_size > '\n' ? '\n' : 0);
    for (uint64_t written = 1; written <= n && !interrupted; written++) {
        if (metala_step(p->ctx, q->state, &q->next, p->logits)) return library_failed(p);
        int token = choose_token(p, q);
        if (token < 0)
            return complain("%s: the logits after token %llu are not finite numbers; the parameters are broken",
                            p->s->model, (unsigned long long)metala_state_position(q->state));
        set_next(q, token);
        p->tokens_written++;
        if (token == c->eos_token_id) break;
        put_token(p, token);
        if (flush_output()) return -1;
        if (stop_count && written >= stop_count &&
            !memcmp(stop, q->recent + q->recent_count - stop_count, stop_count * sizeof *stop))
            break;
    }
    p->write_seconds += seconds() - start;
    return 0;
}

// Tokens of the whole sequence: those in the state and the one that waits.
static unsigned long long position(const sequence *q) { return metala_state_position(q->state) + (q->next >= 0); }

static void report(const program *p, const sequence *q) {
    if (p->s->quiet) return;
    double read_rate = (double)p->tokens_read / (p->read_seconds + 1e-9);
    double write_rate = (double)p->tokens_written / (p->write_seconds + 1e-9);
    if (p->tokens_read > 1) fprintf(stderr, "read %zu tokens, %.0f/s; ", p->tokens_read, read_rate);   // 1 waits only
    if (p->tokens_written) fprintf(stderr, "wrote %zu tokens, %.0f/s; ", p->tokens_written, write_rate);
    fprintf(stderr, "position %llu", position(q));
    if (p->seed && p->s->temperature > 0) fprintf(stderr, "; seed %llu", (unsigned long long)p->seed);
    fputc('\n', stderr);
}

// ------------------------------------------------------------------------------------------------ state files

// What is written replaces the file of its name. That must not be the model or the prompt, and cannot be a folder; where POSIX
// can tell, ./a is a, and a device such as /dev/null is not replaced either.
static int check_target(const program *p, const char *path) {
    const char *const read[] = {p->s->model, p->s->prompt_file};
    for (int i = 0; i < 2; i++) {
        int same = read[i] && !strcmp(path, read[i]);
#ifdef _POSIX_C_SOURCE
        struct stat to, from;
        int there = !stat(path, &to);
        if (there && !S_ISREG(to.st_mode)) return complain("%s: is not a regular file; give another name", path);
        if (there && read[i] && !stat(read[i], &from)) same = to.st_dev == from.st_dev && to.st_ino == from.st_ino;
#endif
        if (same) return complain("%s would be overwritten; give another name", read[i]);
    }
    return 0;
}

// The state, with what a sequence has beside it in the file's metadata.
static int save_sequence(const program *p, const sequence *q, const char *path) {
    char next[16], random[24], recent[12 * WINDOW + 1] = "", *end = recent;
    int status = check_target(p, path);
    snprintf(next, sizeof next, "%d", q->next);
    snprintf(random, sizeof random, "%llu", (unsigned long long)q->random);
    for (size_t i = 0; i < q->recent_count; i++) end += sprintf(end, i ? " %d" : "%d", q->recent[i]);
    const metala_pair pairs[] = {{"next_token", next}, {"random", random}, {"recent", recent}};
    if (!status && metala_state_save(p->ctx, q->state, path, pairs, 3)) status = library_failed(p);
    if (!status && !p->s->quiet) fprintf(stderr, "%s: saved at position %llu\n", path, position(q));
    return status;
}

// A state saved by the library alone has no more than the state: then there is no token that waits.
static int load_metadata(program *p, const metala_file *file, const char *path, sequence *q) {
    const char *next = metala_file_metadata(file, "next_token"), *random = metala_file_metadata(file, "random");
    const char *recent = metala_file_metadata(file, "recent");
    uint64_t token = 0;
    q->next = -1;
    q->recent_count = 0;
    if (next && strcmp(next, "-1")) {
        if (parse_count(next, &token) || token >= (uint64_t)p->config->vocab_size)
            return complain("%s: next_token is '%s', expected a token of this model", path, next);
        q->next = (int)token;
    }
    if (random && !p->s->seed) {
        if (parse_count(random, &q->random)) return complain("%s: random is '%s', expected a number", path, random);
        p->seed = 0;
    }
    size_t count = 0;
    int *tokens = recent ? parse_tokens(p, path, recent, &count) : NULL;
    if (recent && !tokens) return -1;
    if (count > WINDOW) count = WINDOW;
    if (count) memcpy(q->recent, tokens, count * sizeof *tokens);
    q->recent_count = count;
    free(tokens);
    return 0;
}

// Changes nothing when it fails.
static int load_sequence(program *p, sequence *q, const char *path) {
    metala_file *file = metala_file_open(p->ctx, path);
    if (!file) return library_failed(p);
    sequence loaded = *q;
    int status = load_metadata(p, file, path, &loaded);
    metala_file_close(file);
    if (!status && metala_state_load(p->ctx, q->state, path)) status = library_failed(p);
    if (status) return -1;
    *q = loaded;
    if (!p->s->quiet) fprintf(stderr, "%s: continuing at position %llu\n", path, position(q));
    return 0;
}

// ------------------------------------------------------------------------------------------------ generate

// The prompt is read once; each sample continues a copy of the state. Sample i draws with seed + i.
static int generate(program *p, sequence *q) {
    const settings *s = p->s;
    size_t count;
    int *prompt = read_prompt(p, &count);
    metala_state *fork = prompt && s->samples > 1 ? metala_state_create(p->ctx, p->model, 1) : NULL;
    int status = !prompt ? -1 : s->samples > 1 && !fork ? library_failed(p) : read_tokens(p, q, prompt, count);
    const sequence start = *q;
    for (uint64_t i = 0; i < s->samples && !status && !interrupted; i++) {
        if (i) puts("---");
        if (fork) {
            *q = start;
            q->state = fork;
            q->random += i;
            if (metala_state_copy(p->ctx, fork, start.state)) status = library_failed(p);
        }
        if (!status) status = echo_prompt(p, prompt, count);
        if (!status) status = write_tokens(p, q, s->tokens, p->stop, p->stop_count);
        if (!status && (!p->bytes || s->samples > 1 || is_terminal(stdout))) status = end_line(p);
    }
    if (!status) report(p, q);
    if (!status && s->save_state) status = save_sequence(p, q, s->save_state);
    metala_state_free(fork);
    free(prompt);
    q->state = start.state;
    return status;
}

// ------------------------------------------------------------------------------------------------ chat

// Runs a line that starts with '/'; 1 ends the chat. A command that fails says so and changes nothing.
static int run_command(program *p, sequence *q, char *line) {
    line[strcspn(line, "\r\n")] = 0;
    char *file = strchr(line, ' ');
    if (file) *file++ = 0;
    if (!strcmp(line, "/quit")) return 1;
    if (!strcmp(line, "/reset")) {
        if (metala_state_reset(p->ctx, q->state)) library_failed(p);
        q->next = -1;
        q->recent_count = 0;
    } else if (!strcmp(line, "/save") && file) save_sequence(p, q, file);
    else if (!strcmp(line, "/load") && file) load_sequence(p, q, file);
    else if (!strcmp(line, "/help"))
        fputs("/reset      forget everything\n/save FILE  save the state\n/load FILE  go back to a saved state\n"
              "/quit       end, as does the end of the input; Ctrl-C ends a reply\n", stderr);
    else complain("unknown command or no FILE: %s; /help lists the commands", line);
    return 0;
}

// One line in, one reply out. The state reads what the screen shows: also the newline that ends a reply cut short.
static int take_turn(program *p, sequence *q, const char *line, size_t size) {
    static const int blank_line[] = {'\n', '\n'}, newline = '\n';
    size_t count;
    int *tokens = encode(p, "line", line, size, &count);
    if (!tokens) return p->bytes ? -1 : 0;                   // numbers can be typed again
    int status = read_tokens(p, q, tokens, count);
    free(tokens);
    if (!status && (p->stop || !p->bytes)) status = write_tokens(p, q, p->s->tokens, p->stop, p->stop_count);
    else if (!status) status = write_tokens(p, q, p->s->tokens, blank_line, 2);
    watch_interrupts();
    if (!status && p->bytes && p->last_written >= 0 && p->last_written != '\n') status = read_tokens(p, q, &newline, 1);
    return status ? -1 : end_line(p);
}

static int chat(program *p, sequence *q) {
    size_t count;
    int *prompt = read_prompt(p, &count), terminal = is_terminal(stdin);
    int status = prompt && !echo_prompt(p, prompt, count) && !end_line(p) ? read_tokens(p, q, prompt, count) : -1;
    for (int done = 0; !done && !status;) {
        size_t size;
        watch_interrupts();
        if (terminal) fputs("> ", stderr);
        char *line = read_stream(stdin, '\n', &size);
        if (!line) status = -1;
        else if (!size || interrupted) done = 1;
        else if (*line == '/') done = run_command(p, q, line);
        else {
            if (line[size - 1] != '\n') strcpy(line + size++, "\n");   // the input's last line
            status = take_turn(p, q, line, size);
        }
        free(line);
    }
    if (terminal) fputc('\n', stderr);
    free(prompt);
    if (!status) report(p, q);
    return !status && p->s->save_state ? save_sequence(p, q, p->s->save_state) : status;
}

// ------------------------------------------------------------------------------------------------ evaluate

static void show_progress(const program *p, size_t done, size_t total, double loss, double *shown) {
    if (p->s->quiet || !is_terminal(stderr) || seconds() < *shown + 0.2) return;
    fprintf(stderr, "\r%zu of %zu tokens, loss %.4f ", done, total, loss);
    *shown = seconds();
}

// What the tokens are of a dataset or a model with this patch_dim.
enum { KIND = 40 };
static const char *kind_text(char text[KIND], int patch_dim) {
    snprintf(text, KIND, patch_dim ? "patches of %d bytes" : "tokens", patch_dim);
    return text;
}

// Numbers of a token in a dataset's inputs: one, or a patch.
static size_t token_size(const program *p) { return p->config->patch_dim ? (size_t)p->config->patch_dim : 1; }

// Adds up the cross-entropy of all sequences. A text is one sequence, cut into windows that continue each other, or,
// with --context, start from nothing. The sequences of a safetensors dataset have nothing to do with each other.
static int score_dataset(program *p, metala_state *state, const metala_dataset *d, int *inputs, int *targets,
                         uint8_t *mask, double *nats, size_t *counted) {
    const size_t T = metala_dataset_length(d), total = metala_dataset_tokens(d), C = token_size(p);
    const int is_text = metala_dataset_is_text(d);
    double shown = seconds();
    for (size_t i = 0; i < metala_dataset_sequences(d) && !interrupted; i++) {
        size_t n = T;
        metala_dataset_sequence(d, i, inputs, targets, mask);
        if (is_text && n > total - 1 - i * T) n = total - 1 - i * T;     // the last byte is only a target
        if ((!is_text || p->s->context) && metala_state_reset(p->ctx, state)) return library_failed(p);
        for (size_t t = 0; t < n && !interrupted; t += PIECE) {
            size_t most = n - t < PIECE ? n - t : PIECE;
            if (metala_score(p->ctx, state, p->s->form, inputs + t * C, targets + t, mask + t, most, nats, counted))
                return library_failed(p);
            p->tokens_read += most;
            show_progress(p, i * T + t + most, total, *nats / (double)(*counted ? *counted : 1), &shown);
        }
    }
    if (!p->s->quiet && is_terminal(stderr)) fputs("\r\033[K", stderr);
    return 0;
}

static void print_score(const program *p, const metala_dataset *d, double loss, size_t counted) {
    const char *unit = metala_dataset_is_text(d) ? "byte" : "token";
    printf("%-12s %zu %ss", "predicted", counted, unit);
    if (!metala_dataset_is_text(d)) printf(" of %zu sequences", metala_dataset_sequences(d));
    else if (p->s->context) printf(", %zu at a time", metala_dataset_length(d));
    printf("%s\n%-12s %.6f nats per %s\n", interrupted ? ", stopped early" : "", "loss", loss, unit);
    printf("%-12s %.4f\n%-12s %.6f per %s\n", "perplexity", exp(loss), "bits", loss / log(2), unit);
}

// The mean cross-entropy of the model as it is now.
static int score(program *p, metala_state *state, const metala_dataset *d, double *loss, size_t *counted) {
    size_t T = metala_dataset_length(d);
    int *inputs = malloc(T * token_size(p) * sizeof *inputs), *targets = malloc(T * sizeof *targets), status;
    uint8_t *mask = malloc(T);
    double nats = 0;
    *counted = 0;
    if (!inputs || !targets || !mask) status = complain("out of memory: sequences of %zu tokens", T);
    else status = score_dataset(p, state, d, inputs, targets, mask, &nats, counted);
    *loss = nats / (double)*counted;
    if (!status && !*counted) status = complain("%s: nothing to predict, all targets are %d", p->s->eval, METALA_IGNORE);
    else if (!status && !isfinite(*loss))
        status = complain("%s: the loss is %f, expected a finite number; the parameters are broken", p->s->model, *loss);
    free(inputs);
    free(targets);
    free(mask);
    return status;
}

// With --weights bf16 or int8 the model is scored twice, with its own weights first, and the difference is shown.
static int evaluate(program *p, metala_state *state) {
    const char *path = p->s->eval, *ending = strrchr(path, '.');
    const int twice = p->s->type != METALA_F32 && !is_quantized(p->model);
    size_t window = (size_t)p->s->context, counted;
    if (!window && !(ending && !strcmp(ending, ".safetensors"))) window = PIECE;
    metala_dataset *d = metala_dataset_open(p->ctx, path, window);
    if (!d) return library_failed(p);
    double loss, full = 0, start = seconds();
    int status = 0;
    if (metala_dataset_patch(d) != p->config->patch_dim) {
        char its[KIND], ours[KIND];
        status = complain("%s: has %s, %s reads %s; score data of the kind that it was trained on", path,
                          kind_text(its, metala_dataset_patch(d)), p->s->model, kind_text(ours, p->config->patch_dim));
    } else if (metala_dataset_vocab(d) > p->config->vocab_size)
        status = complain("%s: has %s up to %d, expected at most %d, the model's last one", path,
                          p->config->patch_dim ? "classes" : "tokens", metala_dataset_vocab(d) - 1, p->config->vocab_size - 1);
    if (!status && twice) status = score(p, state, d, &full, &counted);
    if (!status && twice && metala_state_reset(p->ctx, state)) status = library_failed(p);
    if (!status) status = quantize(p);
    if (!status) status = score(p, state, d, &loss, &counted);
    if (!status) print_score(p, d, loss, counted);
    if (!status && twice) {
        printf("%-12s loss %.6f, perplexity %.4f\n", "unquantized", full, exp(full));
        printf("%-12s loss %+.6f, perplexity %+.4f\n", "difference", loss - full, exp(loss) - exp(full));
    }
    if (!status) status = flush_output();
    if (!status && !p->s->quiet)
        fprintf(stderr, "read %zu tokens, %.0f/s\n", p->tokens_read, (double)p->tokens_read / (seconds() - start));
    metala_dataset_free(d);
    return status;
}

// ------------------------------------------------------------------------------------------------ inform

static const char *size_text(char text[24], double bytes) {
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB", "PB"};
    int i = 0;
    while (bytes >= 1000 && i < 5) bytes /= 1000, i++;
    snprintf(text, 24, i ? "%.2f %s" : "%.0f %s", bytes, units[i]);
    return text;
}

static void print_config(const metala_config *c) {
    metala_row row = c->row;
    printf("vocabulary   %d%s; pad %d, begin %d, end %d (-1: none)\n", c->vocab_size,
           c->patch_dim ? " classes" : c->vocab_size == 256 ? " bytes" : "", c->pad_token_id, c->bos_token_id, c->eos_token_id);
    printf("width        %d\nlayers       %d\n", c->width, c->layers);
    if (c->row.query <= METALA_QUERY_TAYLOR) printf("heads        %d\n", c->heads);
    printf("model        %s:", metala_config_row_name(c));
    for (int i = 0; i < METALA_COLUMNS; i++)
        printf(" %s %s%s", metala_columns()[i].name, metala_columns()[i].values[*metala_row_column(&row, i)],
               i + 1 < METALA_COLUMNS ? "," : "\n");
    printf("GLU width    %d%s\n", c->glu_dim, c->glu_bias ? ", with biases" : "");
    char kind[KIND];
    if (c->patch_dim) printf("embedding    a linear map of %s\n", kind_text(kind, c->patch_dim));
    else printf("embedding    %s, %s\n", c->tie_word_embeddings ? "also the output layer" : "apart from the output layer",
                c->scale_embedding ? "times the root of the width" : "not scaled");
    printf("numerics     decay temperature %g, epsilon %g, of the head norm %g\n", c->tau, c->norm_eps,
           c->head_norm_eps);
}

static void print_parameters(const metala_model *model) {
    char text[24];
    for (int i = 0; i < metala_model_tensors(model); i++) {
        const metala_tensor *t = metala_model_tensor(model, i);
        char shape[200] = "[", *end = shape + 1;
        for (int j = 0; j < t->ndim; j++) end += sprintf(end, j ? ",%zu" : "%zu", t->shape[j]);
        printf("  %-52s %-16s %-4s %12zu\n", t->name, strcat(shape, "]"), metala_dtype_name(t->dtype), t->count);
    }
    printf("  %-52s %-16s %-4s %12zu\n", "total", "", "", metala_model_size(model));
    printf("  weights are %s; all parameters take %s", metala_dtype_name(metala_model_weights(model)),
           size_text(text, (double)metala_model_bytes(model)));
    printf(", as float32 %s\n", size_text(text, 4.0 * (double)metala_model_size(model)));
}

// Softmax attention of the same width keeps a key and a value of D numbers for every token and layer; a state is as large
// as it is, however much it has read.
static void print_state_size(const metala_config *c) {
    static const double lengths[] = {1 << 10, 32 << 10, 1 << 20};
    static const char *const names[] = {"1k", "32k", "1M"};
    char text[24];
    double state = (double)metala_state_bytes(c, 0), token = 2.0 * c->width * c->layers * sizeof(metala_real);
    if (c->row.decay == METALA_DECAY_SOFTMAX) puts("keys and values of a sequence, which grow with it:");
    else
        printf("state of a sequence, whatever its length: %s\nkeys and values that softmax attention would keep:\n"
               "  %8.0f tokens %12s, as much as the state\n", size_text(text, state), ceil(state / token),
               size_text(text, state));
    for (int i = 0; i < 3; i++) {
        printf("  %8s tokens %12s", names[i], size_text(text, token * lengths[i]));
        if (c->row.decay != METALA_DECAY_SOFTMAX) printf(", %.0f times the state", token * lengths[i] / state);
        putchar('\n');
    }
}

// --models: every row of the general form, in the sizes of a model, or of the default.
static void print_models(const metala_config *of) {
    const metala_column *columns = metala_columns();
    printf("The general form  S_t = diag(α_t) S_{t-1} + k_t v_tᵀ   o_t = s S_tᵀ q_t   y_t = W_o ( gate ⊙ norm(o_t + self) )\n"
           "and its rows, at D%d L%d H%d F%d N%d:\n\n", of->width, of->layers, of->heads, of->glu_dim, of->vocab_size);
    for (const metala_named_row *r = metala_rows(); r->name; r++) {
        metala_config c = *of;
        metala_row row = r->row;
        char text[24];
        c.row = r->row, c.expand = r->expand;
        size_t parameters = metala_trainer_memory(NULL, &c, 1, 1, METALA_KEEP_INPUTS, 1).parameters / sizeof(metala_real);
        printf("%-14s %s\n%15s", r->name, r->equation, "");
        for (int i = 0; i < METALA_COLUMNS; i++)
            printf("%s %s%s", columns[i].name, columns[i].values[*metala_row_column(&row, i)],
                   i + 1 < METALA_COLUMNS ? ", " : "\n");
        printf("%15s%.2f M parameters, state %s%s\n%15s%s\n\n", "", (double)parameters / 1e6,
               size_text(text, (double)(metala_state_bytes(&c, 1) - metala_state_bytes(&c, 0) ? metala_state_bytes(&c, 1)
                                                                                              : metala_state_bytes(&c, 0))),
               metala_state_bytes(&c, 1) - metala_state_bytes(&c, 0) ? " for each token" : "", "", r->source);
    }
}

static int models(program *p) {
    metala_config c = metala_config_default();
    if (p->s->model && !(p->model = metala_model_load(p->ctx, p->s->model))) return library_failed(p);
    print_models(p->model ? metala_model_config(p->model) : &c);
    return flush_output();
}

static int inform(const program *p) {
    print_config(p->config);
    puts("\nparameters");
    print_parameters(p->model);
    putchar('\n');
    print_state_size(p->config);
    return flush_output();
}

static int write_quantized(const program *p) {
    char text[24];
    if (check_target(p, p->s->quantize)) return -1;
    if (metala_model_save(p->ctx, p->model, p->s->quantize)) return library_failed(p);
    if (!p->s->quiet)
        fprintf(stderr, "%s: %s weights, %s\n", p->s->quantize, p->s->weights,
                size_text(text, (double)metala_model_bytes(p->model)));
    return 0;
}

// ------------------------------------------------------------------------------------------------ the three conditions

// --conditions: the paper's three conditions of an optimal linear approximation to softmax attention, computed for every row.
//
//   dynamic memory   what a layer's state keeps of a sequence's first token, S(a,…,x) - S(b,…,x), depends on a later x when the
//                    decay does. Shown: the largest change between two x's, relative to what is kept.
//   static           maps of softmax attention, of random logits, are fitted by the maps of the row,
//   approximation        A_tj = l_t r_j Σ_i q_ti k_ji Π_{j<r<=t} α_ri Re( c_i e^{iθ_i(t-j)} ),   j <= t,
//                    by gradient descent: what a row makes of its input is free for each token, what it has learned once for
//                    each channel. Shown: what remains, |A - P|² / |P|², over the number of channels.
//   parameters       of a layer's mixer, in units of D².
enum { MAP = 16, MAPS = 4, FIT_STEPS = 1000, STARTS = 4, MOST_CHANNELS = 16,
       MOST_FREE = MAP * (3 * MOST_CHANNELS + 2) + 5 * MOST_CHANNELS + 1 };

typedef struct {                         // where the free numbers of a fit stand, SIZE_MAX for what the row has not
    const metala_row *row;
    size_t K, q, k, z, left, right, A, c, s, theta, u, count;
    int per_token;                       // z is free for each token, not once for each channel
} fit;

static fit fit_of(const metala_row *row, size_t K) {
    fit f = {row, K, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, 0, 0};
    int q = row->query, k = row->key, a = row->decay, waves = q == METALA_QUERY_ONE || q == METALA_QUERY_CONSTANT;
    size_t *at = &f.count;
#define TAKE(member, n) (f.member = *at, *at += (n))
    if (q <= METALA_QUERY_TAYLOR || q == METALA_QUERY_SHARED) TAKE(q, MAP * K);
    if ((k >= METALA_KEY_LINEAR && k <= METALA_KEY_TAYLOR) || k == METALA_KEY_SHARED) TAKE(k, MAP * K);
    if (k == METALA_KEY_EXP) TAKE(k, MAP * K);
    if (row->self == METALA_SELF_BONUS) TAKE(u, 1);
    if (row->value == METALA_VALUE_PRODUCT) TAKE(left, MAP), TAKE(right, MAP);
    if (waves) TAKE(c, K), TAKE(s, K);
    if (waves && row->phase) TAKE(theta, K);
    f.per_token = a == METALA_DECAY_DYNAMIC || a == METALA_DECAY_LOWRANK || a == METALA_DECAY_BOUNDED;
    if (f.per_token) TAKE(z, MAP * K);
    else if (a == METALA_DECAY_SELECTIVE) TAKE(z, MAP), TAKE(A, K);
    else if (a == METALA_DECAY_FIXED || (a >= METALA_DECAY_EXP && a <= METALA_DECAY_DSS)) TAKE(z, K);
#undef TAKE
    return f;
}

static double logistic(double x) { return 1 / (1 + exp(-x)); }
static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

// f(x) of a query or key, and its slope; maps are those of the first values of both columns.
static double feature(int query, double x, double *slope) {
    double s = logistic(x);
    if (query == METALA_QUERY_SILU) return *slope = s * (1 + x * (1 - s)), x * s;
    if (query == METALA_QUERY_ELU1) return *slope = x > 0 ? 1 : exp(x), x > 0 ? x + 1 : exp(x);
    return *slope = 1, x;
}

// The log decay of channel i between tokens t - 1 and t, and its slopes in z and A.
static double log_decay(const fit *f, const double *x, size_t t, size_t i, double *dz, double *dA) {
    double z, a;
    *dz = *dA = 0;
    if (f->row->decay == METALA_DECAY_HEADS) return log(1 - 0.03125);                      // of the first head
    if (f->row->decay == METALA_DECAY_DEPTH) return -0.5;
    if (f->z == SIZE_MAX) return 0;
    if (f->A != SIZE_MAX) {
        z = softplus(x[f->z + t]), a = -exp(x[f->A + i]);
        *dz = a * logistic(x[f->z + t]), *dA = z * a;
        return z * a;
    }
    z = x[f->z + (f->per_token ? t * f->K : 0) + i];
    *dz = logistic(-z);
    return -softplus(-z);
}

// |A - P|² of the map that x stands for, and its gradient in d.
static double fit_loss(const fit *f, const double *x, const double *P, double *d) {
    static const double none[MAP * MOST_CHANNELS];
    const metala_row *r = f->row;
    size_t K = f->K;
    double q[MAP * MOST_CHANNELS], k[MAP * MOST_CHANNELS], dq[MAP * MOST_CHANNELS], dk[MAP * MOST_CHANNELS];
    double sq[MAP * MOST_CHANNELS], sk[MAP * MOST_CHANNELS], b[MAP * MOST_CHANNELS], db[MAP * MOST_CHANNELS], loss = 0;
    int taylor = r->query == METALA_QUERY_TAYLOR, exponential = r->key == METALA_KEY_EXP, tied = r->key == METALA_KEY_TIED;
    memset(d, 0, f->count * sizeof *d);
    memcpy(dq, none, sizeof dq), memcpy(dk, none, sizeof dk), memcpy(db, none, sizeof db);
    for (size_t t = 0; t < MAP; t++)
        for (size_t i = 0; i < K; i++) {
            size_t at = t * K + i;
            double dz, dA, a = log_decay(f, x, t, i, &dz, &dA);
            q[at] = k[at] = 1, sq[at] = sk[at] = 0;
            if (f->q != SIZE_MAX) q[at] = feature(r->query, x[f->q + at], &sq[at]);
            if (tied) k[at] = -expm1(a), sk[at] = -exp(a);
            else if (exponential) k[at] = sk[at] = exp(x[f->k + at]);
            else if (f->k != SIZE_MAX) k[at] = feature(r->key - METALA_KEY_LINEAR, x[f->k + at], &sk[at]);
            b[at] = a + (t ? b[at - K] : 0);
        }
    for (size_t t = 0; t < MAP; t++) {
        double U[MAP], dU[MAP], sum = 0, along = 0, s[MAP] = {0};
        for (size_t j = 0; j <= t; j++) {                             // the row of the map before it is normalised
            U[j] = 0;
            for (size_t i = 0; i < K; i++) {
                double wave = 1, lag = (double)(t - j);
                if (f->c != SIZE_MAX) {
                    double angle = f->theta != SIZE_MAX ? x[f->theta + i] * lag : 0;
                    wave = x[f->c + i] * cos(angle) - x[f->s + i] * sin(angle);
                }
                U[j] += q[t * K + i] * k[j * K + i] * exp(b[t * K + i] - b[j * K + i]) * wave;
            }
            if (taylor) s[j] = U[j] / sqrt((double)K), U[j] = 1 + s[j] + s[j] * s[j] / 2;
            if (f->left != SIZE_MAX) U[j] *= x[f->left + t] * x[f->right + j];
            if (f->u != SIZE_MAX && j == t) U[j] *= exp(x[f->u]);
            sum += U[j];
        }
        if (!r->normaliser) sum = 1;
        for (size_t j = 0; j <= t; j++) {
            double error = U[j] / sum - P[t * MAP + j];
            loss += error * error;
            dU[j] = 2 * error / sum;
            along += dU[j] * U[j] / sum;
        }
        for (size_t j = 0; j <= t; j++) {
            double g = dU[j] - (r->normaliser ? along : 0), lag = (double)(t - j);
            if (f->u != SIZE_MAX && j == t) d[f->u] += g * U[j], g *= exp(x[f->u]);
            if (f->left != SIZE_MAX) {
                double inner = U[j] / (x[f->left + t] * x[f->right + j]);
                d[f->left + t] += g * inner * x[f->right + j], d[f->right + j] += g * inner * x[f->left + t];
                g *= x[f->left + t] * x[f->right + j];
            }
            if (taylor) g *= (1 + s[j]) / sqrt((double)K);
            for (size_t i = 0; i < K; i++) {
                size_t ti = t * K + i, ji = j * K + i;
                double e = exp(b[ti] - b[ji]), qk = q[ti] * k[ji] * e, wave = 1;
                if (f->c != SIZE_MAX) {
                    double angle = f->theta != SIZE_MAX ? x[f->theta + i] * lag : 0, cosine = cos(angle), sine = sin(angle);
                    wave = x[f->c + i] * cosine - x[f->s + i] * sine;
                    d[f->c + i] += g * qk * cosine, d[f->s + i] -= g * qk * sine;
                    if (f->theta != SIZE_MAX) d[f->theta + i] -= g * qk * lag * (x[f->c + i] * sine + x[f->s + i] * cosine);
                }
                dq[ti] += g * k[ji] * e * wave, dk[ji] += g * q[ti] * e * wave;
                db[ti] += g * qk * wave, db[ji] -= g * qk * wave;
            }
        }
    }
    for (size_t i = 0; i < K; i++) {
        double suffix = 0;
        for (size_t t = MAP; t-- > 0;) {
            size_t at = t * K + i;
            double dz, dA, a;
            log_decay(f, x, t, i, &dz, &dA);
            suffix += db[at];
            a = suffix + (tied ? dk[at] * sk[at] : 0);
            if (f->q != SIZE_MAX) d[f->q + at] += dq[at] * sq[at];
            if (f->k != SIZE_MAX) d[f->k + at] += dk[at] * sk[at];
            if (f->A != SIZE_MAX) d[f->A + i] += a * dA;
            if (f->z != SIZE_MAX) d[f->z + (f->A != SIZE_MAX ? t : (f->per_token ? t * K : 0) + i)] += a * dz;
        }
    }
    return loss;
}

// What remains of a softmax map after Adam has fitted a row with K channels to it.
static double fit_map(const metala_row *row, size_t K, const double *P, uint64_t *random) {
    double x[MOST_FREE], d[MOST_FREE], m[MOST_FREE] = {0}, v[MOST_FREE] = {0}, size = 0, best = DBL_MAX;
    fit f = fit_of(row, K);
    for (size_t i = 0; i < f.count; i++) x[i] = metala_uniform(random) - 0.5;
    for (size_t i = 0; i < K && f.theta != SIZE_MAX; i++) x[f.theta + i] = 3.14159 * (double)i / (double)K;
    for (size_t i = 0; i < MAP && f.left != SIZE_MAX; i++) x[f.left + i] += 1, x[f.right + i] += 1;
    for (size_t i = 0; i < MAP * MAP; i++) size += P[i] * P[i];
    for (int step = 1; step <= FIT_STEPS; step++) {
        double loss = fit_loss(&f, x, P, d), rate = 0.05 * 0.5 * (1 + cos(3.14159 * step / FIT_STEPS));
        if (loss < best) best = loss;
        for (size_t i = 0; i < f.count; i++) {
            m[i] = 0.9 * m[i] + 0.1 * d[i], v[i] = 0.99 * v[i] + 0.01 * d[i] * d[i];
            x[i] -= rate * m[i] / (1 - pow(0.9, step)) / (sqrt(v[i] / (1 - pow(0.99, step))) + 1e-12);
        }
    }
    return best / size;
}

// Causal softmax maps of independent logits from N(0, 2²), each row a distribution that no structure of positions explains.
static void random_map(double *P, uint64_t *random) {
    memset(P, 0, MAP * MAP * sizeof *P);
    for (size_t t = 0; t < MAP; t++) {
        double sum = 0;
        for (size_t j = 0; j <= t; j++) {
            double radius = sqrt(-2 * log(1 - metala_uniform(random)));
            sum += P[t * MAP + j] = exp(2 * radius * cos(6.283185307179586 * metala_uniform(random)));
        }
        for (size_t j = 0; j <= t; j++) P[t * MAP + j] /= sum;
    }
}

// S(first, 4 tokens, x) of a small model with random parameters. The scan of RWKV keeps S e^{-M}, to stay in range.
static int probe_state(program *p, metala_state *state, int first, int x, double *S, size_t count) {
    const metala_config *c = metala_model_config(p->model);
    const int tokens[6] = {first, 2, 3, 4, 5, x};
    metala_real numbers[4096];
    if (metala_state_reset(p->ctx, state) || metala_forward(p->ctx, state, METALA_RECURRENT, tokens, NULL, 6, NULL) ||
        metala_state_get(p->ctx, state, "state.0", numbers))
        return library_failed(p);
    for (size_t i = 0; i < count; i++) S[i] = (double)numbers[i];
    if (c->row.decay != METALA_DECAY_EXP) return 0;
    if (metala_state_get(p->ctx, state, "shift_state.0", numbers)) return library_failed(p);
    for (size_t i = 0; i < count; i++) S[i] *= exp((double)numbers[2 * (size_t)c->width + i / (count / (size_t)c->width)]);
    return 0;
}

// How much of what the state keeps of the first token depends on a later one; -1 for a failure.
static double probe(program *p, const metala_named_row *row) {
    enum { MOST = 4096 };
    static const metala_init init = {0.5, 1, 4, 0};
    metala_config c = metala_config_default();
    double S[4][MOST], most = 0, change = 0;
    c.width = 16, c.layers = 1, c.heads = 8, c.vocab_size = 16, c.glu_dim = 8;
    c.feature_dim = c.low_rank = c.state_size = 4;
    c.row = row->row, c.expand = row->expand;
    size_t count = metala_state_bytes(&c, 0) / sizeof(metala_real), tail = 4 * 16 * (size_t)c.expand;
    if (row->row.conv != METALA_CONV_OFF) count -= row->row.conv == METALA_CONV_VALUE ? tail : 64;
    p->model = metala_model_create(p->ctx, &c);
    metala_state *state = p->model && count <= MOST ? metala_state_create(p->ctx, p->model, 1) : NULL;
    int status = !state || metala_model_init(p->ctx, p->model, 7, &init) ? library_failed(p) : 0;
    for (int i = 0; i < 4 && !status; i++) status = probe_state(p, state, i / 2, 6 + i % 2, S[i], count);
    for (size_t i = 0; i < count && !status; i++) {
        double one = S[0][i] - S[2][i], other = S[1][i] - S[3][i];
        most = fmax(most, fabs(one)), change = fmax(change, fabs(one - other));
    }
    metala_state_free(state);
    metala_model_free(p->model);
    p->model = NULL;
    return status ? -1 : change / most;
}

static int print_conditions(program *p) {
    static const size_t sizes[] = {1, 2, 4, 8, 16};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    double P[MAPS][MAP * MAP];
    uint64_t random = 1;
    for (int i = 0; i < MAPS; i++) random_map(P[i], &random);
    printf("%-15s %-16s %-47s %s\n%-15s %-16s", "", "dynamic memory", "static approximation, what remains at", "parameters", "",
           "change");
    for (int k = 0; k < SIZES; k++) printf(k ? " K %-6zu" : "K %-6zu", sizes[k]);
    printf("of D²\n");
    for (const metala_named_row *r = metala_rows(); r->name; r++) {
        metala_config c = metala_config_default();
        c.row = r->row, c.expand = r->expand, c.width = 512, c.layers = 1;
        size_t bytes = metala_trainer_memory(NULL, &c, 1, 1, METALA_KEEP_INPUTS, 1).parameters;
        double all = (double)(bytes / sizeof(metala_real)), D = c.width;
        double mixer = all - 2.0 * c.vocab_size * D - 3.0 * c.glu_dim * D;
        int softmax = r->row.decay == METALA_DECAY_SOFTMAX, one = r->row.query == METALA_QUERY_EXP;
        double change = softmax ? 0 : probe(p, r);
        if (change < 0) return -1;
        if (softmax) printf("%-15s %-16s", r->name, "keeps all");
        else printf("%-15s %-4s %-11.1e", r->name, change > 1e-3 ? "yes" : "no", change);
        for (int k = 0; k < SIZES; k++) {
            double error = 0;
            uint64_t start = 2;
            if (one && k > 0) printf(" %-8s", "-");                    // its channels have one each
            if (one && k > 0) continue;
            for (int i = 0; i < MAPS && !softmax; i++) {              // the best of some starts
                double best = DBL_MAX;
                for (int j = 0; j < STARTS; j++) best = fmin(best, fit_map(&r->row, one ? 1 : sizes[k], P[i], &start));
                error += best / MAPS;
            }
            printf("%s%-8.4f", k ? " " : "", error);
        }
        printf("%8.2f\n", mixer / D / D);
        fflush(stdout);
    }
    return flush_output();
}

// ------------------------------------------------------------------------------------------------ main

static int run(program *p) {
    const settings *s = p->s;
    sequence q = {0};
    p->model = metala_model_load(p->ctx, s->model);
    if (!p->model) return library_failed(p);
    p->config = metala_model_config(p->model);
    p->bytes = p->config->vocab_size == 256;
    if (!s->eval && quantize(p)) return -1;
    if (s->info) return inform(p);
    if (s->quantize) return write_quantized(p);
    if (p->config->patch_dim && !s->eval)
        return complain("%s: reads patches of %d bytes and cannot write; --eval FILE scores a dataset of them", s->model,
                        p->config->patch_dim);
    size_t N = (size_t)p->config->vocab_size;
    p->logits = malloc(N * sizeof *p->logits);
    p->candidates = malloc(N * sizeof *p->candidates);
    if (!p->logits || !p->candidates) return complain("out of memory: a vocabulary of %zu tokens", N);
    if (s->stop && !(p->stop = encode(p, "--stop", s->stop, strlen(s->stop), &p->stop_count))) return -1;
    if (p->stop_count > WINDOW)
        return complain("--stop: got %zu tokens, expected at most %d", p->stop_count, WINDOW);
    q.state = metala_state_create(p->ctx, p->model, 1);
    if (!q.state) return library_failed(p);
    q.next = -1;
    q.random = p->seed = s->seed ? s->seed : seed_from_clock();
    watch_interrupts();
    if (s->save_state && check_target(p, s->save_state)) return metala_state_free(q.state), -1;
    int status = s->load_state ? load_sequence(p, &q, s->load_state) : 0;
    if (!status && *p->no_device) complain("--device cuda: %s; going on with the CPU", p->no_device);
    if (!status) status = s->eval ? evaluate(p, q.state) : s->chat ? chat(p, &q) : generate(p, &q);
    metala_state_free(q.state);
    return status;
}

#ifdef _POSIX_C_SOURCE
// What a runtime library reads from the environment before main() begins can only be set here when the program then starts
// again, once. OpenMP's threads would spin while they wait for each other, which on a busy machine starves the one that they
// wait for; whoever sets OMP_WAIT_POLICY has the last word. And glibc's malloc shall ask for large pages: every token reads
// all weights, and looking up small pages takes a fifth of that time.
static void start_with_environment(char **argv) {
    const char *policy = getenv("OMP_WAIT_POLICY"), *tunables = getenv("GLIBC_TUNABLES");
    if ((policy && tunables) || setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", 0) ||
        (!policy && (setenv("OMP_WAIT_POLICY", "passive", 1) || setenv("GOMP_SPINCOUNT", "2000", 0))))
        return;
    execvp(argv[0], argv);               // returns only when it failed; all works without it
}
#endif

// What --device asks for, or the CPU and why.
static const metala_backend *backend_of(program *p) {
    const metala_backend *backend = NULL;
    if (on_cuda(p->s)) backend = metala_cuda(p->s->math_type, p->no_device, sizeof p->no_device);
    if (backend) *p->no_device = 0;
    return backend ? backend : metala_cpu();
}

int main(int argc, char **argv) {
    settings s;
    program p = {0};
#ifdef _POSIX_C_SOURCE
    start_with_environment(argv);
#endif
    if (parse_options(&s, argc, argv)) return 2;
    if (s.help) print_help();
    if (s.version && !s.help) printf("metala %s, float%d\n", METALA_VERSION, 8 * (int)sizeof(metala_real));
    if (s.help || s.version) return flush_output() ? 1 : 0;
    p.s = &s;
    p.last_written = -1;
    p.ctx = metala_open(backend_of(&p), (int)s.threads);
    int status = !p.ctx ? complain("%s", metala_error(NULL)) : s.models ? models(&p)
               : s.conditions ? print_conditions(&p) : run(&p);
    free(p.logits);
    free(p.candidates);
    free(p.stop);
    metala_model_free(p.model);
    metala_close(p.ctx);
    return status ? 1 : interrupted ? 130 : 0;
}
