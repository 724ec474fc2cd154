// tasks.c - writes three of the tasks on which linear models are compared, as datasets for ./train.
//
//     cc -std=c99 -O2 -o tasks data/tasks.c && ./tasks recall > recall.safetensors && ./train recall.safetensors
//
// recall: multi-query associative recall (Arora et al., "Zoology", 2023), the first experiment of the MetaLA paper. A
// sequence tells pairs of a key and a value. Behind them, among values drawn at random, each key comes once more, most of
// them soon, some much later, and there the target is its value:
//
//     inputs    3 93  1 88  5 71 | 1 64 90  3 75 62  5 81        keys are below vocab/2, values are not
//     targets   .  .  .  .  .  . |88  .  . 93  .  . 71  .
//
// What a model has to keep grows with the pairs: this is the test of what a state can hold, and whether it is used.
//
// listops: the value of a nested expression (Nangia and Bowman, 2018), a task of the Long Range Arena, on which the paper
// compares as well. The label of a sequence is a digit:
//
//     [MAX 2 9 [MIN 4 7] 0 ]      9        operators: MIN, MAX, MED the median, rounded down, SM the last digit of the sum
//
// Tokens 0 to 9 are the digits, 10 to 13 the operators with their bracket, 14 closes it, 15 is padding, which stands on the
// left and is masked.
//
// pathfinder: are two dots the ends of one path (Linsley et al. 2018)? Another task of the Long Range Arena. A picture of S × S
// bytes has two long dashed paths, which wind and keep apart, shorter ones between them, and two dots: with the label 1 at both
// ends of a long path, with 0 at one end of each, as far from each other. It is written in squares of P × P, row by row, to be
// read patch by patch; with --patch 1 byte by byte.
//
// The same seed gives the same bytes everywhere. A file has one tensor behind the other, and so the sequences are drawn once
// for each: none is kept.

#include "common.h"

#include <stdlib.h>

enum { DIGITS = 10, MIN = DIGITS, MAX, MED, SM, CLOSE, PADDING, LISTOPS_VOCAB };
enum { MOST_LENGTH = 1 << 16, MOST_SIZE = 1 << 8, MOST_ARGUMENTS = 5, NO_TARGET = -100 };

typedef struct {
    uint64_t random;
    int length, pairs, vocab;
    int inputs[MOST_LENGTH], targets[MOST_LENGTH];          // of a sequence
    int first, label;                                       // of listops: what comes before the first is padding
    int size, patch;                                        // of pathfinder, whose inputs are the picture, row by row
    bool taken[MOST_LENGTH];                                // near a path
} task;

// ============================================================== 1. Recall

// One of the places 0 … n-1 that is not taken, place i with weight 1/(i+1), nearly the power law of Zoology.
static int draw_place(task *t, const int *taken, int n) {
    int total = 0, i = 0;
    for (int j = 0; j < n; j++) total += taken[j] < 0 ? (1 << 24) / (j + 1) : 0;
    for (int at = below(&t->random, total); taken[i] >= 0 || (at -= (1 << 24) / (i + 1)) >= 0;) i++;
    return i;
}

// The pairs, each key once more at a drawn place, and values where nothing is yet.
static void draw_recall(task *t) {
    const int keys = t->vocab / 2, values = t->vocab - keys, start = 2 * t->pairs;
    for (int i = 0; i < t->length; i++) t->inputs[i] = -1, t->targets[i] = NO_TARGET;
    for (int p = 0; p < start; p += 2) {
        bool known = true;
        while (known) {
            t->inputs[p] = below(&t->random, keys), known = false;
            for (int other = 0; other < p; other += 2) known = known || t->inputs[other] == t->inputs[p];
        }
        t->inputs[p + 1] = keys + below(&t->random, values);
    }
    for (int p = 0; p < start; p += 2) {
        int i = start + draw_place(t, t->inputs + start, t->length - start);
        t->inputs[i] = t->inputs[p], t->targets[i] = t->inputs[p + 1];
    }
    for (int i = start; i < t->length; i++)
        if (t->inputs[i] < 0) t->inputs[i] = keys + below(&t->random, values);
}

// ============================================================== 2. Listops

// The value of the expression at *at, which moves behind it.
static int value_of(const int **at) {
    int op = *(*at)++, value[MOST_ARGUMENTS], n = 0, sum = 0;
    if (op < DIGITS) return op;
    while (**at != CLOSE) {
        int x = value_of(at), i = n++;
        for (; i > 0 && value[i - 1] > x; i--) value[i] = value[i - 1];      // in order
        value[i] = x, sum += x;
    }
    ++*at;
    return op == MIN ? value[0] : op == MAX ? value[n - 1] : op == MED ? (value[(n - 1) / 2] + value[n / 2]) / 2 : sum % 10;
}

// An expression grows from one digit: again and again, one of its digits becomes an operator with 2 to 5 new digits, until one
// does not fit into a length drawn beforehand, half to all of T.
static void draw_listops(task *t) {
    int *x = t->inputs, n = 1, most = t->length / 2 + below(&t->random, t->length - t->length / 2 + 1);
    x[0] = below(&t->random, DIGITS);
    for (;;) {
        int arguments = 2 + below(&t->random, MOST_ARGUMENTS - 1), at;
        if (n + arguments + 1 > most) break;
        do at = below(&t->random, n); while (x[at] >= DIGITS);
        memmove(x + at + arguments + 2, x + at + 1, (size_t)(n - at - 1) * sizeof *x);
        x[at] = MIN + below(&t->random, CLOSE - MIN);
        for (int i = 1; i <= arguments; i++) x[at + i] = below(&t->random, DIGITS);
        x[at + arguments + 1] = CLOSE;
        n += arguments + 1;
    }
    const int *start = x;
    t->label = value_of(&start);
    t->first = t->length - n;
    memmove(x + t->first, x, (size_t)n * sizeof *x);
    for (int i = 0; i < t->first; i++) x[i] = PADDING;
}

// ============================================================== 3. Pathfinder

enum { DASH = 3, GAP = 2, APART = 3, RECENT = 8, TURNS = 32, GREY = 128, WHITE = 255 };

// 256 cos of a direction, of which TURNS are a circle.
static int cosine(int direction) {
    static const int quarter[TURNS / 4 + 1] = {256, 251, 237, 213, 181, 142, 98, 50, 0};
    int d = direction % TURNS;
    d = d > TURNS / 2 ? TURNS - d : d;
    return d > TURNS / 4 ? -quarter[TURNS / 2 - d] : quarter[d];
}

// A path of so many dashes, each of which turns a little, from ends[0] to ends[1]. It keeps away from the edge, from other
// paths, and from itself but for its last steps; where it cannot go on nothing is drawn.
static bool draw_path(task *t, int dashes, int ends[2]) {
    const int size = t->size, count = 1 + dashes * (DASH + GAP) - GAP + 1;               // one more at each end, under a dot
    int xs[MOST_SIZE] = {0}, ys[MOST_SIZE] = {0}, direction = below(&t->random, TURNS);
    int x = below(&t->random, size << 8), y = below(&t->random, size << 8);              // in 1/256
    for (int n = 0; n < count; n++) {
        xs[n] = x >> 8, ys[n] = y >> 8;
        if (xs[n] < 2 || ys[n] < 2 || xs[n] >= size - 2 || ys[n] >= size - 2 || t->taken[ys[n] * size + xs[n]]) return false;
        for (int i = 0; i < n - RECENT; i++)
            if (abs(xs[n] - xs[i]) <= APART && abs(ys[n] - ys[i]) <= APART) return false;
        if (n % (DASH + GAP) == 0) direction += TURNS + below(&t->random, 5) - 2;
        x += cosine(direction), y += cosine(direction + TURNS * 3 / 4);
    }
    for (int n = 0; n < count; n++) {
        if (n == 0 || n + 1 == count || (n - 1) % (DASH + GAP) < DASH) t->inputs[ys[n] * size + xs[n]] = GREY;
        for (int v = ys[n] - APART; v <= ys[n] + APART; v++)
            for (int u = xs[n] - APART; u <= xs[n] + APART; u++)
                if (u >= 0 && v >= 0 && u < size && v < size) t->taken[v * size + u] = true;
    }
    ends[0] = ys[0] * size + xs[0], ends[1] = ys[count - 1] * size + xs[count - 1];
    return true;
}

// The square of the distance of two places.
static int distance(const task *t, int a, int b) {
    int x = a % t->size - b % t->size, y = a / t->size - b / t->size;
    return x * x + y * y;
}

// Two long paths, anew until both find room and an end of each is as far from the other as the ends of one: or the distance
// would tell the label. Of short ones, as many as find room in some tries.
static void draw_pathfinder(task *t) {
    enum { TRIES = 50 };
    const int dashes = t->size * 5 / 32;
    const size_t room = (size_t)t->size * (size_t)t->size;
    int ends[3][2], same[2], other[2], drawn = 0;
    for (int tries = 0; drawn < 3; tries++) {
        if (tries % TRIES == 0 || drawn == 2) {
            memset(t->inputs, 0, room * sizeof *t->inputs), memset(t->taken, 0, room * sizeof *t->taken);
            drawn = 0;
        }
        drawn += draw_path(t, dashes, ends[drawn]);
        for (int i = 0; i < 8 && drawn == 2; i++) {         // path, its end, the other's end
            const int *path = ends[i / 4], from = path[i / 2 % 2], to = ends[!(i / 4)][i % 2];
            const int length = distance(t, path[0], path[1]);
            if (abs(distance(t, from, to) - length) * 32 > length) continue;
            same[0] = path[0], same[1] = path[1], other[0] = from, other[1] = to, drawn = 3;
        }
    }
    for (int i = 0; i < t->size; i++) draw_path(t, (dashes + 2) / 3, ends[2]);
    t->label = below(&t->random, 2);
    const int *dots = t->label ? same : other;
    for (int i = 0; i < 2; i++)
        for (int y = -1; y <= 1; y++)
            for (int x = -1; x <= 1; x++) t->inputs[dots[i] + y * t->size + x] = WHITE;
}

// ============================================================== 4. The file

// A tensor of the file: numbers of a sequence, bytes of a number, and how they are made.
typedef struct {
    const char *name, *type;
    int bytes;
    bool one;                                               // for a sequence, not for each token
    int (*number)(const task *t, int i);
} tensor;
static int input_of(const task *t, int i) { return t->inputs[i]; }
static int pixel_of(const task *t, int i) {                 // patch after patch
    int C = t->patch * t->patch, across = t->size / t->patch, patch = i / C, place = i % C;
    return t->inputs[(patch / across * t->patch + place / t->patch) * t->size + patch % across * t->patch + place % t->patch];
}
static int target_of(const task *t, int i) { return t->targets[i]; }
static int label_of(const task *t, int i) { (void)i; return t->label; }
static int mask_of(const task *t, int i) { return i >= t->first; }

static const struct {
    const char *name;
    void (*draw)(task *t);
    int least_length, first_option, options;                // its options: the first of those in main, and how many
    const char *flags;
    tensor tensors[3];
} kinds[] = {
    {"recall", draw_recall, 3, 2, 5, "--sequences N, --length T, --seed S, --pairs P or --vocab V",
     {{"inputs", "U16", 2, false, input_of}, {"targets", "I32", 4, false, target_of}}},
    {"listops", draw_listops, 12, 2, 3, "--sequences N, --length T or --seed S",
     {{"inputs", "U16", 2, false, input_of}, {"labels", "I32", 4, true, label_of}, {"mask", "U8", 1, false, mask_of}}},
    {"pathfinder", draw_pathfinder, 1, 0, 4, "--sequences N, --size S, --patch P or --seed S",
     {{"inputs", "U8", 1, false, pixel_of}, {"labels", "I32", 4, true, label_of}}},
};

// Safetensors: the length of the header in 8 bytes, the header, the numbers with their lowest byte first.
static void put_number(uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) putchar((int)(x >> 8 * i & 0xFF));
}

static void write_file(task *t, int kind, uint64_t sequences) {
    const tensor *const all = kinds[kind].tensors, *const end = all + COUNT(kinds[kind].tensors);
    const uint64_t seed = t->random;
    char header[600];
    size_t n = (size_t)snprintf(header, sizeof header, "{\"__metadata__\":{\"vocab_size\":\"%d\"}", t->vocab);
    uint64_t at = 0;
    for (const tensor *x = all; x < end && x->name; x++) {
        char length[30] = "";
        uint64_t size = sequences * (uint64_t)(x->one ? 1 : t->length) * (uint64_t)x->bytes;
        if (!x->one) snprintf(length, sizeof length, ",%d", t->patch ? t->length / t->patch / t->patch : t->length);
        if (!x->one && t->patch) snprintf(length + strlen(length), sizeof length - strlen(length), ",%d", t->patch * t->patch);
        n += (size_t)snprintf(header + n, sizeof header - n, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%llu%s],\"data_offsets\":"
                              "[%llu,%llu]}", x->name, x->type, (unsigned long long)sequences, length,
                              (unsigned long long)at, (unsigned long long)(at + size));
        at += size;
    }
    n += (size_t)snprintf(header + n, sizeof header - n, "}%*s", (int)(7 - n % 8), "");      // numbers begin at a multiple of 8
    put_number(n, 8);
    fwrite(header, 1, n, stdout);
    for (const tensor *x = all; x < end && x->name; x++) {
        t->random = seed;
        for (uint64_t s = 0; s < sequences && !ferror(stdout); s++) {
            kinds[kind].draw(t);
            for (int i = 0; i < (x->one ? 1 : t->length); i++) put_number((uint64_t)x->number(t, i), x->bytes);
        }
    }
}

// ============================================================== 5. The command line

static const char help[] =
    "usage: tasks recall [--sequences N] [--length T] [--pairs P] [--vocab V] [--seed S]\n"
    "       tasks listops [--sequences N] [--length T] [--seed S]\n"
    "       tasks pathfinder [--sequences N] [--size S] [--patch P] [--seed S]\n"
    "Writes a dataset for train to standard output, a .safetensors file.\n"
    "  recall         pairs of a key and a value are told, then values are asked for\n"
    "  listops        the value of a nested expression\n"
    "  pathfinder     is there a path between two dots of a picture?\n"
    "  --sequences N  how many; k, M and G behind N are thousands, millions and thousand millions (default 20k)\n"
    "  --length T     tokens of a sequence, 3 (listops 12) to 65536 (default 128)\n"
    "  --pairs P      pairs that are told, each is asked for once; up to T/3 and V/2 (default T/8, if V has as many keys)\n"
    "  --vocab V      keys and values, half of each; up to 65536 (default 256)\n"
    "  --size S       pictures have S rows of S bytes, 16 to 256 (default 32)\n"
    "  --patch P      and are read in patches of P x P, which divides S (default 4)\n"
    "  --seed S       the same number draws the same sequences on every machine (default 1)\n"
    "  --help         this text\n";

int main(int count, char **arguments) {
    static task t;
    uint64_t sequences = 20000, length = 128, seed = 1, vocab = 256, size = 32, patch = 4, pairs = UINT64_MAX;   // not given
    const option options[] = {{"--size", &size, false}, {"--patch", &patch, false}, {"--sequences", &sequences, true},
                              {"--seed", &seed, false}, {"--length", &length, false}, {"--pairs", &pairs, false},
                              {"--vocab", &vocab, false}};
    int kind = 0;
    if (asks_for_help(count, arguments)) {
        fputs(help, stdout);
        return finish("tasks");
    }
    const char *name = count > 1 ? arguments[1] : "nothing";
    while (kind < COUNT(kinds) && strcmp(name, kinds[kind].name)) kind++;
    if (kind == COUNT(kinds)) return complain("tasks", "", name, "recall, listops or pathfinder first");
    int status = read_options("tasks", count, arguments, 2, options + kinds[kind].first_option, kinds[kind].options,
                              kinds[kind].flags);
    if (status) return status;
    if (pairs == UINT64_MAX) pairs = length < 16 ? 1 : length / 8 < vocab / 2 ? length / 8 : vocab / 2;
    const struct { const char *name; uint64_t value, least, most; const char *range; } limits[] = {
        {"--sequences", sequences, 1, (uint64_t)1 << 40, "1 to 2^40"},
        {"--length", length, (uint64_t)kinds[kind].least_length, MOST_LENGTH, "at least 3, of listops 12, at most 65536"},
        {"--vocab", vocab, 2, 1 << 16, "2 to 65536"},
        {"--pairs", pairs, 1, length / 3, "1 to a third of --length"},
        {"--pairs", pairs, 1, vocab / 2, "1 to half of --vocab"},
        {"--size", size, 16, MOST_SIZE, "16 to 256"},
        {"--patch", patch, 1, size, "1 to --size"},
    };
    for (int i = 0; i < COUNT(limits); i++)
        if (limits[i].value < limits[i].least || limits[i].value > limits[i].most) {
            char got[30];
            snprintf(got, sizeof got, "%llu", (unsigned long long)limits[i].value);
            return complain("tasks", limits[i].name, got, limits[i].range);
        }
    if (size % patch) {
        char got[30];
        snprintf(got, sizeof got, "%llu", (unsigned long long)patch);
        return complain("tasks", "--patch", got, "a divisor of --size");
    }
    t.random = seed, t.length = (int)length, t.pairs = (int)pairs;
    t.vocab = kinds[kind].draw == draw_recall ? (int)vocab : LISTOPS_VOCAB;
    if (kinds[kind].draw == draw_pathfinder) {
        t.size = (int)size, t.patch = (int)patch, t.length = t.size * t.size;
        t.vocab = patch > 1 ? 2 : WHITE + 1;                // classes, or bytes
    }
    write_bytes_as_they_are();
    write_file(&t, kind, sequences);
    return finish("tasks");
}
