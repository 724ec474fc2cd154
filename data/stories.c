// stories.c - writes endless short stories for children: the corpus of `make demo`.
//
//     cc -std=c99 -O2 -o stories data/stories.c && ./stories --bytes 4M --seed 1 > stories.txt
//
// A model that reads them byte by byte learns to spell, then grammar, then who has what. The last is the point: things
// are given, lost, found and swapped, and every story ends with questions that only its reader can answer. The language
// is kept small and every sentence names who and what, so that a small model gets that far within minutes.
//
// A story is a small world (people, things, who holds which) in which events happen: each is possible only in some
// states of the world, changes it, and is then told. So nothing is ever in two hands, and every answer is true.
// Reading order: the words, the telling, main. The same seed gives the same bytes everywhere: integers only, a generator
// of its own, no locale.

#include "common.h"

// ============================================================== 1. The words
//
// In a text [a|b] is one of the alternatives, and {...} is a field; a capital in the field is a capital in the story:
//     {who} Mia   {whom} Tom, to whom it is done   {friends} Mia, Tom and Ben   {at} in the park   {spot} under a bench
//     {thing} kite   {a thing} a new kite   {other} the other thing of a swap
//     {owner} who has the thing now   {first} who had it first   {elder} Grandma   {moral} of the story

static const char *const children[] = {"Mia", "Tom", "Lily", "Ben", "Anna", "Sam", "Rosa", "Paul"};
static const char *const elders[] = {"Mama", "Papa", "Grandma", "Grandpa"};         // they ask the questions
static const char *const nouns[] = {"kite", "ball", "drum", "flag", "boat", "hat", "cup", "ring", "lamp", "pear", "nut", "sock"};
static const char *const sizes[] = {"", "", "", "new ", "big ", "little ", "old "}; // told once, at the first mention
static const struct { const char *at, *spots[3]; } places[] = {
    {"in the park",   {"under a bench", "behind a tree", "near the pond"}},
    {"in the garden", {"under a bush", "behind the shed", "near the gate"}},
    {"at the beach",  {"under a towel", "behind a rock", "in the sand"}},
    {"by the river",  {"under a bridge", "behind a log", "in the reeds"}},
    {"in the forest", {"under the leaves", "behind a tree", "in the moss"}},
    {"on the hill",   {"under a bush", "behind a wall", "in the grass"}},
};

static const char opening[] =
    "[One day, {friends} [met|played|were] {at}.|One [sunny|warm|fine] day, {friends} [met|played|were] {at}."
    "|{Friends} [met|played|were] {at}.|Once upon a time, {friends} [met|played|were] {at}.]";
static const char bringing[] = "[{Who} had {a thing}.|{Who} came with {a thing}.]";

// What may happen to a thing that {who} has: who has it afterwards, and the words.
enum { KEEPS, GIVES, SWAPS };
static const struct { int change; const char *words; } events[] = {
    {GIVES, "{Who} gave the {thing} to {whom}."},
    {GIVES, "\"May I have the {thing}?\" asked {whom}. \"[Yes|Of course|Here you are],\" said {who}, and gave the {thing} to "
            "{whom}."},
    {GIVES, "{Whom} wanted the {thing}, so {who} gave the {thing} to {whom}."},
    {GIVES, "\"This {thing} is for you, {whom},\" said {who}. Now {whom} had the {thing}."},
    {GIVES, "It was the birthday of {whom}. \"Happy birthday, {whom}!\" said {who}, and gave the {thing} to {whom}."},
    {GIVES, "{Whom} was sad. \"Do not cry, {whom},\" said {who}. \"Take my {thing}.\" Now {whom} had the {thing}."},
    {SWAPS, "\"Shall we swap?\" asked {who}. So {who} gave the {thing} to {whom}, and {whom} gave the {other} to {who}."},
    {SWAPS, "{Who} and {whom} swapped. Now {who} had the {other}, and {whom} had the {thing}."},
    {KEEPS, "Then {who} lost the {thing}. \"Where is my {thing}?\" cried {who}. {Whom} [looked|ran and looked] {spot}, and there "
            "was the {thing}! \"Thank you, {whom},\" said {who}."},
    {KEEPS, "Then the wind took the {thing} from {who}. {Whom} found the {thing} {spot} and gave it back to {who}."},
    {KEEPS, "{Who} [liked|loved] the {thing}."},
    {KEEPS, "{Who} [sat down|played|ran up and down|danced] with the {thing}."},
    {KEEPS, "{Who} showed the {thing} to {whom}. \"What a [fine|lovely] {thing}!\" said {whom}."},
    {KEEPS, "They [played and laughed|ran and jumped|sang a song|told stories] [for a long time|all day]."},
};

static const struct { const char *ask, *answer; } questions[] = {
    {"who has the {thing}?", "{Owner} has the {thing}"},
    {"who has the {thing} now?", "{Owner} has the {thing}"},
    {"what does {owner} have?", "{Owner} has the {thing}"},
    {"who had the {thing} first?", "{First} had the {thing} first"},
};
static const char first_question[] = "\n[In the evening|At home|At bedtime|After supper], {elder} asked, \"";
static const char next_question[] = " \"And ";
static const char closing[] = "\n[{Elder} [smiled|nodded|laughed]. \"{moral},\" said {elder}.|And they were the best of friends."
                              "|What a good day it was!|{moral}.]";
static const char *const morals[] = {
    "It is good to share", "A friend is the best gift", "Friends help each other", "It is fun to play with a friend",
    "A kind heart loves to give",
};

// ============================================================== 2. The telling

enum { PEOPLE = 3 };                                        // at most; each brings one thing

typedef struct {
    uint64_t random;
    int people;                                             // of this story, and things
    const char *who[PEOPLE], *things[PEOPLE], *sizes[PEOPLE];   // thing i was brought by person i
    int owner[PEOPLE];                                      // of thing i now
    int giver, receiver, thing, other;                      // what the fields stand for in this sentence
    int place;
    const char *elder, *moral;
    size_t length;
    char text[4096];
} story;

// A number in [0, n) that is not among the bits of `taken`, and now is.
static int draw(story *s, int n, unsigned *taken) {
    int i;
    do i = below(&s->random, n); while (*taken >> i & 1);
    *taken |= 1u << i;
    return i;
}

static void put(story *s, const char *text, size_t length) {
    if (length > sizeof s->text - s->length) length = sizeof s->text - s->length;
    memcpy(s->text + s->length, text, length);
    s->length += length;
}

static void put_word(story *s, const char *word) { put(s, word, strlen(word)); }

static void capitalise(story *s, size_t at) {               // not toupper, which asks the locale
    if (at < s->length && s->text[at] >= 'a' && s->text[at] <= 'z') s->text[at] = (char)(s->text[at] - 'a' + 'A');
}

static void put_friends(story *s) {
    for (int i = 0; i < s->people; i++) {
        put_word(s, i == 0 ? "" : i == s->people - 1 ? " and " : ", ");
        put_word(s, s->who[i]);
    }
}

static void put_new(story *s, int thing) {                  // "a big kite", "an old kite"
    const char *size = s->sizes[thing];
    put_word(s, size[0] == 'o' ? "an " : "a ");
    put_word(s, size);
    put_word(s, s->things[thing]);
}

// A field, without the braces. One that does not exist is written as it stands, for all to see.
static void put_field(story *s, const char *text, size_t length) {
    char name[32] = "";
    size_t at = s->length;
    memcpy(name, text, length < sizeof name ? length : sizeof name - 1);
    bool capital = name[0] >= 'A' && name[0] <= 'Z';
    if (capital) name[0] = (char)(name[0] - 'A' + 'a');
    if (!strcmp(name, "a thing")) put_new(s, s->thing);
    else if (!strcmp(name, "thing")) put_word(s, s->things[s->thing]);
    else if (!strcmp(name, "other")) put_word(s, s->things[s->other]);
    else if (!strcmp(name, "owner")) put_word(s, s->who[s->owner[s->thing]]);
    else if (!strcmp(name, "first")) put_word(s, s->who[s->thing]);
    else if (!strcmp(name, "whom")) put_word(s, s->who[s->receiver]);
    else if (!strcmp(name, "who")) put_word(s, s->who[s->giver]);
    else if (!strcmp(name, "friends")) put_friends(s);
    else if (!strcmp(name, "at")) put_word(s, places[s->place].at);
    else if (!strcmp(name, "spot")) put_word(s, places[s->place].spots[below(&s->random, COUNT(places[0].spots))]);
    else if (!strcmp(name, "elder")) put_word(s, s->elder);
    else if (!strcmp(name, "moral")) put_word(s, s->moral);
    else put(s, text - 1, length + 2);
    if (capital) capitalise(s, at);
}

// From `text`, behind a '[', to the matching ']': puts one of the alternatives, returns the place behind the bracket.
static const char *put_alternative(story *s, const char *text);

static void expand(story *s, const char *text, const char *end) {
    while (text < end) {
        const char *mark = text;
        while (mark < end && *mark != '[' && *mark != '{') mark++;
        put(s, text, (size_t)(mark - text));
        if (mark == end) return;
        if (*mark == '[') {
            text = put_alternative(s, mark + 1);
        } else {
            size_t length = strcspn(mark, "}");
            put_field(s, mark + 1, length - 1);
            text = mark + length + 1;
        }
    }
}

static const char *put_alternative(story *s, const char *text) {
    enum { MOST = 16 };
    const char *start[MOST + 1] = {text};                   // of the alternatives; each ends one before the next
    int n = 0;
    for (int depth = 1; depth > 0; text++) {
        depth += (*text == '[') - (*text == ']');
        if ((depth == 0 || (depth == 1 && *text == '|')) && n < MOST) start[++n] = text + 1;
    }
    int chosen = below(&s->random, n);
    expand(s, start[chosen], start[chosen + 1] - 1);
    return text;
}

static void put_text(story *s, const char *text) { expand(s, text, text + strlen(text)); }

static void say(story *s, const char *text) {               // after a space, or the newline that the text brings
    if (s->length && text[0] != '\n' && text[0] != ' ') put_word(s, " ");
    put_text(s, text);
}

// Somebody does something with a thing, if the world allows it: a swap needs something in return.
static void happen(story *s) {
    int e = below(&s->random, COUNT(events));
    s->thing = below(&s->random, s->people);
    s->giver = s->owner[s->thing];
    do s->receiver = below(&s->random, s->people); while (s->receiver == s->giver);
    if (events[e].change == SWAPS) {
        for (s->other = 0; s->other < s->people && s->owner[s->other] != s->receiver; s->other++) {}
        if (s->other == s->people) return;
        s->owner[s->other] = s->giver;
    }
    if (events[e].change != KEEPS) s->owner[s->thing] = s->receiver;
    say(s, events[e].words);
}

// Whether a question has one answer: what somebody has, only of who has one thing.
static bool can_ask(const story *s, int question) {
    int held = 0;
    for (int i = 0; i < s->people; i++) held += s->owner[i] == s->owner[s->thing];
    return held == 1 || !strstr(questions[question].ask, "what");
}

static void ask(story *s, int thing, const char *before) {
    int q;
    s->thing = thing;
    do q = below(&s->random, COUNT(questions)); while (!can_ask(s, q));
    say(s, before);
    size_t at = s->length;
    put_text(s, questions[q].ask);
    if (before == first_question) capitalise(s, at);
    put_word(s, "\" \"");
    put_text(s, questions[q].answer);
    put_word(s, ".\"");
}

// Tells a story. No two of its people or things are alike.
static void tell(story *s) {
    unsigned names = 0, things = 0;
    *s = (story){.random = s->random};
    s->people = 2 + below(&s->random, PEOPLE - 1);
    s->place = below(&s->random, COUNT(places));
    s->elder = elders[below(&s->random, COUNT(elders))];
    s->moral = morals[below(&s->random, COUNT(morals))];
    for (int i = 0; i < s->people; i++) {
        s->who[i] = children[draw(s, COUNT(children), &names)];
        s->things[i] = nouns[draw(s, COUNT(nouns), &things)];
        s->sizes[i] = sizes[below(&s->random, COUNT(sizes))];
        s->owner[i] = i;
    }
    say(s, opening);
    for (int i = 0; i < s->people; i++) {
        s->thing = s->giver = i;
        say(s, bringing);
    }
    for (int n = 2 + below(&s->random, 3); n > 0; n--) happen(s);
    int first = below(&s->random, s->people);
    ask(s, first, first_question);
    ask(s, (first + 1) % s->people, next_question);
    say(s, closing);
    put_word(s, "\n");
}

// ============================================================== 3. The command line

static const char help[] =
    "usage: stories [--bytes N] [--seed S]\n"
    "Writes short stories for children to standard output, a text to train small language models on.\n"
    "  --bytes N   as many whole stories as fit in N bytes, but at least one (default 4M);\n"
    "              k, M and G behind N are thousands, millions and thousand millions\n"
    "  --seed S    the same number tells the same stories on every machine (default 1)\n"
    "  --help      this text\n";

int main(int count, char **arguments) {
    uint64_t bytes = 4000000, written = 0;
    story s = {.random = 1};
    const option options[] = {{"--bytes", &bytes, true}, {"--seed", &s.random, false}};
    if (asks_for_help(count, arguments)) {
        fputs(help, stdout);
        return finish("stories");
    }
    int status = read_options("stories", count, arguments, 1, options, COUNT(options), "--bytes N or --seed S");
    if (status) return status;
    write_bytes_as_they_are();
    for (;;) {
        tell(&s);
        size_t gap = written > 0;                           // the blank line between two stories
        if (gap && (written > bytes || s.length + gap > bytes - written)) break;
        if ((gap && putchar('\n') == EOF) || fwrite(s.text, 1, s.length, stdout) != s.length) break;
        written += gap + s.length;
    }
    return finish("stories");
}
