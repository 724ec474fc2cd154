// common.h - what the programs that write training data share: random numbers that are the same everywhere, and the command
// line. Included by one file of a program, and so everything is static.

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#define COUNT(table) ((int)(sizeof(table) / sizeof((table)[0])))

// splitmix64, and from it a number in [0, n): the high half, scaled.
static int below(uint64_t *random, int n) {
    uint64_t z = (*random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (int)(((z ^ (z >> 31)) >> 32) * (uint64_t)n >> 32);
}

// --name N or --name=N; in N, a `suffix` k, M or G may stand for thousands, millions and thousand millions.
typedef struct { const char *name; uint64_t *value; bool suffix; } option;

// Wrong usage: one line, whatever the arguments contain; the exit status.
static int complain(const char *program, const char *what, const char *got, const char *expected) {
    char line[320];
    snprintf(line, sizeof line, "%s%sgot '%.99s', expected %s", what, *what ? ": " : "", got, expected);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "%s: %s; see %s --help\n", program, line, program);
    return 2;
}

// Not strtoull, which accepts signs and spaces.
static bool parse(const char *text, bool suffix, uint64_t *number) {
    uint64_t value = 0, unit = 1;
    size_t digits = strspn(text, "0123456789");
    for (size_t i = 0; i < digits; i++) {
        uint64_t digit = (uint64_t)(text[i] - '0');
        if (value > (UINT64_MAX - digit) / 10) return false;
        value = value * 10 + digit;
    }
    const char *end = text + digits;
    if (suffix && *end && strchr("kMG", *end)) {
        unit = *end == 'k' ? 1000 : *end == 'M' ? 1000000 : 1000000000;
        end++;
    }
    *number = value * unit;
    return digits && !*end && value <= UINT64_MAX / unit;
}

// The options from argument number `first` on. 0, or the exit status of wrong usage; `flags` says what was expected.
static int read_options(const char *program, int count, char **arguments, int first, const option *options, int option_count,
                        const char *flags) {
    for (int i = first; i < count; i++) {
        size_t length = strcspn(arguments[i], "=");
        const option *o = options, *end = options + option_count;
        while (o < end && (strlen(o->name) != length || strncmp(o->name, arguments[i], length))) o++;
        if (o == end) return complain(program, "", arguments[i], flags);
        const char *value = arguments[i][length] ? arguments[i] + length + 1 : i + 1 < count ? arguments[++i] : "nothing";
        if (!parse(value, o->suffix, o->value))
            return complain(program, o->name, value, o->suffix ? "a number such as 500000, 500k or 4M" : "a number such as 1");
    }
    return 0;
}

static bool asks_for_help(int count, char **arguments) {
    for (int i = 1; i < count; i++)
        if (!strcmp(arguments[i], "--help") || !strcmp(arguments[i], "-h")) return true;
    return false;
}

static void write_bytes_as_they_are(void) {                 // a newline is one byte everywhere
#ifdef _WIN32
    _setmode(1, _O_BINARY);
#endif
}

// The exit status, after all has been written that could be.
static int finish(const char *program) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
    fprintf(stderr, "%s: cannot write to standard output: %s; make room or write elsewhere\n", program, strerror(errno));
    return 1;
}
