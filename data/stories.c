// stories.c - writes endless short stories for children: the corpus of `make demo`.
//
//     cc -std=c99 -O2 -o stories stories.c && ./stories --bytes 4M --seed 1 > stories.txt
//
// A model that reads them byte by byte learns to spell, then grammar, then who has what. The last is the point: things
// are given, lost, found and swapped, and every story ends with questions that only its reader can answer.
//
// A story is a small world (people, things, who holds which) and a plot: a list of beats such as GIVES HERO FRIEND TOY.
// A beat happens only if the world allows it, changes the world, and is then told. What the world forbids is neither
// done nor told, so nothing is ever in two hands. Reading order: the cast, the plots, the questions, the telling, main.
// The same seed gives the same bytes everywhere: integers only, a generator of its own, no locale.

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

// ============================================================== 1. The cast

#define HE  {"he", "him", "his"}
#define SHE {"she", "her", "her"}
typedef struct { const char *name, *kind; bool animal; struct { const char *he, *him, *his; } is; } character;

static const character children[] = {
    {"Mia",   "girl",   false, SHE},    {"Tom",   "boy",      false, HE},
    {"Lily",  "girl",   false, SHE},    {"Ben",   "boy",      false, HE},
    {"Anna",  "girl",   false, SHE},    {"Sam",   "boy",      false, HE},
    {"Rosa",  "girl",   false, SHE},    {"Max",   "boy",      false, HE},
    {"Nell",  "rabbit", true,  SHE},    {"Pip",   "mouse",    true,  HE},
    {"Tilly", "duck",   true,  SHE},    {"Bruno", "bear",     true,  HE},
    {"Dora",  "fox",    true,  SHE},    {"Otto",  "frog",     true,  HE},
    {"Hetty", "hen",    true,  SHE},    {"Hugo",  "hedgehog", true,  HE},
};
static const character elders[] = {                         // they ask the questions
    {"Grandma",   "woman", false, SHE}, {"Grandpa",   "man", false, HE},
    {"Mama",      "woman", false, SHE}, {"Papa",      "man", false, HE},
    {"Aunt Rose", "woman", false, SHE}, {"Uncle Joe", "man", false, HE},
};
static const char *const traits[] = {"kind", "little", "happy", "clever", "brave", "merry", "friendly", "gentle"};

enum { PLAY = 1, SMALL = 2, SKY = 4, RAIN = 8, FOOD = 16, TOOL = 32, LIGHT = 64, PRIZE = 128, BREAKS = 256 };
static const struct { const char *noun; int kinds; } nouns[] = {
    {"kite",   PLAY | SKY | BREAKS},   {"drum",    PLAY | BREAKS},   {"balloon", PLAY | SKY},   {"ball",     PLAY},
    {"flute",  PLAY | SMALL | BREAKS}, {"boat",    PLAY | BREAKS},   {"flag",    PLAY | SKY},   {"book",     PLAY},
    {"doll",   PLAY | BREAKS},         {"whistle", PLAY | SMALL},    {"scarf",   SKY},          {"key",      SMALL},
    {"puppet", PLAY | BREAKS},         {"marble",  PLAY | SMALL},    {"hat",     SKY},          {"ring",     SMALL},
    {"ribbon", SKY | PRIZE},           {"bell",    PLAY | SMALL},    {"button",  SMALL},        {"shell",    SMALL},
    {"cup",    PRIZE},                 {"medal",   PRIZE},           {"crown",   PRIZE},        {"umbrella", RAIN},
    {"lamp",   LIGHT},                 {"lantern", LIGHT},           {"candle",  LIGHT},        {"ladder",   TOOL},
    {"hammer", TOOL},                  {"rope",    TOOL},            {"bucket",  TOOL},         {"brush",    TOOL},
    {"pie", FOOD}, {"cake", FOOD}, {"melon", FOOD}, {"pudding", FOOD}, {"pancake", FOOD}, {"muffin", FOOD},
};
static const char *const colours[] = {"red", "blue", "green", "yellow", "white", "black", "orange", "purple"};
static const char *const tastes[] = {"sweet", "fresh", "soft", "tasty", "round", "big"};
static const char *const sizes[] = {"", "", "big ", "small ", "new ", "old "};      // told once, at the first mention
static const char *const works[] = {"a little hut", "a raft", "a bridge", "a fence", "a tower", "a tree house"};

enum { SPOTS = 4 };                                         // a thing is lost at one and searched for at the others
static const struct { const char *name, *at, *spots[SPOTS]; } places[] = {
    {"the park",   "in the park",   {"under the bench", "behind the fountain", "next to the swing", "near the pond"}},
    {"the garden", "in the garden", {"under the rose bush", "behind the shed", "next to the gate", "near the beans"}},
    {"the meadow", "in the meadow", {"under the oak tree", "behind the rock", "in the tall grass", "near the path"}},
    {"the beach",  "at the beach",  {"under the pier", "behind the rocks", "in the warm sand", "near the steps"}},
    {"the river",  "by the river",  {"under the bridge", "behind a log", "in the reeds", "next to a big stone"}},
    {"the forest", "in the forest", {"under the leaves", "behind a log", "in the moss", "near the stream"}},
    {"the farm",   "at the farm",   {"under the cart", "behind the hay", "in the barn", "next to the well"}},
    {"the hill",   "on the hill",   {"under the apple tree", "behind the wall", "in the bushes", "near the top"}},
};

// ============================================================== 2. The plots
//
// In a text [a|b] is one of the alternatives, and {...} is a field; a capital in the field is a capital in the story:
//     {hero}   Pip        {a hero}  a kind mouse         {hero full}  Pip the mouse     {Hero he} {hero him} {hero his}
//     {toy}    red kite   {a toy}   a big red kite       {toy noun}   kite              {toy colour}  red
//     {place}  the park   {at}  in the park     {spot} {wrong}  where lost things are, and are not     {work}  a raft
//
// A beat is {verb, who, whom, thing, words}. {who}, {whom} and {thing} in its words are its own, and 0 stands for the
// usual words of its verb. Beats that exclude each other may follow one another: only the possible one is told.

enum {
    NOBODY, HERO, FRIEND, THIRD, ELDER, PEOPLE,             // these are people,
    WHO = PEOPLE, WHOM, FINDER, WINNER, LOSER,              // these are what they become in the course of the story,
    OWNER, FIRST, GIVER, EATER, SPEAKER, ANSWER, PARTS      // and these concern the thing that is spoken of
};
static const char *const part_names[PARTS] = {
    "nobody", "hero", "friend", "third", "elder", "who", "whom", "finder", "winner", "loser",
    "owner", "first", "giver", "eater", "speaker", "answer",
};
enum { TOY, OTHER, EXTRA, THINGS, THING = THINGS };
static const char *const thing_names[THINGS + 1] = {"toy", "other", "extra", "thing"};

enum {
    END,
    TELL, OPEN, JOIN,                                       // always possible, change nothing
    HAS,                                                    // changes nothing, told only if it is true
    OWNS,                                                   // brings the thing into the world
    GIVES, SWAPS, LOSES, SEARCHES, FINDS, EATS, RACES,
    TAKES,                                                  // what one has hidden oneself
    SUM,                                                    // who has what now
    VERBS,
    MAYBE = 32                                              // a coin decides whether the beat is tried
};
typedef struct { int verb, who, whom, thing; const char *words; } beat;

static const char *const usual_words[VERBS] = {             // of beats that bring none of their own
    [OPEN] = "[One [||sunny |warm |fine ][day|day|morning], {who full} [went|walked] to {place} with {whom full}."
             "|One [||sunny |warm |quiet ][day|day|morning], {who full} and {whom full} [met|played|were] {at}."
             "|Once there was {a who} named {who}. One day, {who he} [went to {place}|played {at}] with {whom full}."
             "|Once there were two friends, {who full} and {whom full}. One day, they [went to {place}|"
             "played {at}|met {at}].]",
    [JOIN] = "{Who full} [came, too|came along|was there, too|came to play with them].",
    [OWNS] = "{Who} had {a thing}[|||, and {who he} [liked|loved] it very much].",
    [GIVES] = "{Who} gave the {thing} to {whom}.",
    [LOSES] = "[But then|Suddenly|After a while,] {who} stopped. \"Oh no! Where is my {thing noun}?\" [{who he} cried|"
              "cried {who}|asked {who}]. The {thing} was [gone|lost].",
    [SEARCHES] = "{Who} [looked|searched] {wrong}, but [the {thing noun} was not there|{who he} did not find it].",
    [FINDS] = "[Then {who} looked {spot}, and there was the {thing}!|{Who} looked {spot} and found the {thing}!|"
              "\"I see it!\" [called|cried] {who}. {Who he} found the {thing} {spot}.]",
    [EATS] = "{Who} ate the {thing}.",
};

typedef struct {
    int people, kinds[THINGS];                              // how many children; what the things may be, 0 for no thing
    const char *moral;
    beat beats[20];
} plot;

static const plot plots[] = {
// ---- A lost thing
{3, {PLAY | SMALL, PLAY}, "[Six eyes see more than two|Good friends help you look|What is lost can be found]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {MAYBE | OWNS, HERO, 0, OTHER, "{Who he} also had {a thing}."},
    {OWNS, FRIEND, 0, OTHER, 0},
    {JOIN, THIRD, 0, 0, 0},
    {TELL, 0, 0, 0, "They [ran and jumped|sang and danced|played tag|played hide and seek] for a long time."},
    {LOSES, HERO, 0, TOY, 0},
    {TELL, 0, 0, 0, "\n\"Do not [cry|worry], {hero}. We will help you,\" said [{friend}|{third}]."},
    {SEARCHES, HERO, 0, TOY, 0},
    {MAYBE | SEARCHES, FRIEND, 0, TOY, 0},
    {MAYBE | FINDS, THIRD, 0, TOY, 0},
    {FINDS, FRIEND, 0, TOY, 0},
    {GIVES, FINDER, HERO, TOY, "{Who} gave it back to {whom}. \"Thank you, {who}!\" said {whom}."},
    {MAYBE | GIVES, HERO, FINDER, OTHER, "{Who} was so glad that {who he} gave the {thing} to {whom}."},
    {SUM, 0, 0, 0, 0}}},

// ---- The wind
{3, {SKY, PLAY}, "[The wind takes, but friends bring back|A true friend brings back what you lose]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {OWNS, FRIEND, 0, OTHER, 0},
    {LOSES, HERO, 0, TOY,
        "[Then|Suddenly] a strong wind came. It took the {thing} from {who} and blew it away. \"Come back, "
        "{thing noun}!\" cried {who}."},
    {SEARCHES, HERO, 0, TOY, "{Who} ran after it and looked {wrong}, but the {thing noun} was not there."},
    {FINDS, THIRD, 0, TOY,
        "\n{Who full} [was out for a walk|was on {who his} way home]. {Who he} saw the {thing} {spot} and [picked it "
        "up|took it]. \"Whose {thing noun} is this?\" {who he} asked."},
    {MAYBE | GIVES, THIRD, FRIEND, TOY,
        "\"I know! It is {hero}'s {thing noun},\" said {whom}. So {who} gave it to {whom}."},
    {GIVES, THIRD, HERO, TOY,
        "\"It is mine!\" cried {whom}. So {who} gave the {thing} back to {whom}, and {whom he} [laughed|danced] with "
        "joy."},
    {MAYBE | GIVES, FRIEND, HERO, TOY,
        "{Who} ran to {whom} and gave the {thing} back to {whom him}. \"Thank you!\" said {whom}."},
    {HAS, FRIEND, 0, TOY, "But {hero} had gone home, so {friend} kept the {thing} for {hero him} until the next day."},
    {SUM, 0, 0, 0, 0}}},

// ---- A swap
{2, {PLAY, PLAY | SMALL}, "[When friends swap, both are happy|It is fun to swap with a friend|Fair is fair]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {OWNS, FRIEND, 0, OTHER, 0},
    {TELL, 0, 0, 0,
        "\n{Hero} looked at the {other}. \"[What a fine|What a lovely|I like your] {other noun}!\" {hero he} said. "
        "\"And I like your {toy noun},\" said {friend}. \"[Shall we swap|Do you want to swap]?\""},
    {SWAPS, HERO, FRIEND, TOY,
        "{Who} said yes. {Who he} gave the {toy} to {whom}, and {whom} gave the {other} to {who}."},
    {SUM, 0, 0, 0, 0},
    {TELL, 0, 0, 0, "They played [all day|for a long time|until the sun went down]."},
    {MAYBE | SWAPS, FRIEND, HERO, TOY,
        "\nBut [then|soon] {whom} [missed the {toy}|wanted the {toy} back]. \"Can we swap back?\" asked {whom}. "
        "\"[Yes|Of course]!\" said {who}. So {who} gave the {toy} back to {whom}, and {whom} gave the {other} back to "
        "{who}."},
    {MAYBE | GIVES, HERO, FRIEND, OTHER,
        "\nBefore they went home, {who} gave the {thing} to {whom}, too. \"[Keep it|It is for you|You may have "
        "both],\" said {who}."}}},

// ---- A gift
{3, {PLAY | SMALL, PLAY}, "[A gift makes two people happy|It is good to give|A kind heart loves to give]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {MAYBE | OWNS, FRIEND, 0, OTHER, 0},
    {OWNS, HERO, 0, OTHER, "{Who he} also had {a thing}."},
    {TELL, 0, 0, 0,
        "\nBut {friend} [did not smile|was very quiet|looked sad]. \"What is wrong?\" asked {hero}. \"It is my "
        "birthday, and [nobody knows|I have no present|everyone forgot],\" said {friend}."},
    {GIVES, HERO, FRIEND, TOY,
        "\"[Then this is for you|Happy birthday, {whom}]!\" said {who}, and gave the {thing} to {whom him}. {Whom} "
        "[smiled|laughed|danced] with joy."},
    {TELL, 0, 0, 0, "\nThen {third full} came. {Third he} was sad, because {third he} had nothing to play with."},
    {MAYBE | GIVES, FRIEND, THIRD, TOY, "\"You need it more than I do,\" said {who}, and gave the {thing} to {whom}."},
    {MAYBE | GIVES, HERO, THIRD, OTHER,
        "\"[Take this|This is for you], {whom},\" said {who}, and gave {whom him} the {thing}."},
    {MAYBE | GIVES, FRIEND, THIRD, OTHER,
        "\"[Here you are|This is for you],\" said {who}, and gave {whom him} the {thing}."},
    {TELL, 0, 0, 0,
        "[They all played together|They sang a song, and {third} felt better|{Third} was not sad any more]."},
    {SUM, 0, 0, 0, 0}}},

// ---- A race
{3, {PRIZE, PLAY}, "[It is good to win, but a friend is better|The best prize is a friend|Running is fun for all]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {MAYBE | OWNS, HERO, 0, OTHER, 0},
    {OWNS, FRIEND, 0, OTHER, 0},
    {OWNS, THIRD, 0, TOY,
        "{Who full} came with {a thing}. \"[Who wants to race?|Let us have a race!] The winner gets the "
        "{thing noun},\" said {who}."},
    {RACES, HERO, FRIEND, 0,
        "\n\"One, two, three, go!\" called {third}. {Hero} and {friend} ran [very fast|like the wind|as fast as they "
        "could]. [{Loser} was faster at first, but then {loser he} [fell|got tired|stopped to rest].|{Winner} was "
        "faster, and {loser} could not catch {winner him}.] {Winner} won the race!"},
    {GIVES, THIRD, WINNER, TOY, 0},
    {MAYBE | GIVES, LOSER, WINNER, OTHER, "\"You are so fast!\" said {who}, and gave {whom him} the {thing}, too."},
    {MAYBE | GIVES, WINNER, LOSER, TOY,
        "\n{Whom} was sad. \"You ran well, too,\" said {who}, and gave the {thing} to {whom}."},
    {MAYBE | GIVES, WINNER, LOSER, OTHER, "\"Here, take this, {whom},\" said {who}, and gave {whom him} the {thing}."},
    {SUM, 0, 0, 0, 0}}},

// ---- Rain
{2, {RAIN, PLAY}, "[There is always room for a friend|Rain is fun with a friend|After the rain comes the sun]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {OWNS, FRIEND, 0, OTHER, 0},
    {TELL, 0, 0, 0,
        "\n[Soon|Then|After a while,] dark clouds came, and it began to rain. \"My {other noun} will get wet!\" said "
        "{friend}. \"Come under my {toy noun},\" said {hero}. \"There is room for two.\" They sat close together and "
        "[told stories|sang a song|listened to the rain]."},
    {MAYBE | GIVES, FRIEND, HERO, OTHER, "{Who} was so thankful that {who he} gave the {thing} to {whom}."},
    {MAYBE | GIVES, HERO, FRIEND, TOY,
        "\nIt still rained when they went home. \"Your way is long. Take my {thing noun},\" said {who}, and gave it to "
        "{whom}."},
    {SUM, 0, 0, 0, 0},
    {MAYBE | GIVES, FRIEND, HERO, TOY,
        "\nThe next day, the sun was out again. {Who} went to see {whom} and gave the {thing} back."},
    {MAYBE | GIVES, HERO, FRIEND, OTHER, "{Who} gave the {thing} back to {whom}. \"It is yours,\" {who he} said."}}},

// ---- A picnic
{3, {FOOD, FOOD, FOOD}, "[Food is best when friends share it|Sharing makes everything taste better]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {JOIN, THIRD, 0, 0, 0},
    {TELL, 0, 0, 0, "They wanted to have a picnic."},
    {OWNS, HERO, 0, TOY, "{Who} brought {a thing}."},
    {OWNS, FRIEND, 0, OTHER, "{Who} brought {a thing}."},
    {OWNS, THIRD, 0, EXTRA, "And {who} brought {a thing}."},
    {TELL, 0, 0, 0,
        "\nThey sat down [in the sun|in the shade|in the grass]. \"[Let us share|Take what you like|I am so hungry]!\" "
        "said [{hero}|{friend}|{third}]."},
    {MAYBE | EATS, HERO, 0, OTHER, 0},
    {EATS, HERO, 0, EXTRA, 0},
    {MAYBE | EATS, FRIEND, 0, TOY, 0},
    {EATS, FRIEND, 0, EXTRA, 0},
    {EATS, FRIEND, 0, TOY, 0},
    {EATS, THIRD, 0, TOY, 0},
    {EATS, THIRD, 0, OTHER, 0},
    {EATS, THIRD, 0, EXTRA, 0},
    {TELL, 0, 0, 0,
        "\"[This is so good|It tastes very good|I love picnics]!\" said [{hero}|{friend}|{third}]. [A bird ate what "
        "was left.|Then they lay down and looked at the clouds.|They ate and laughed until they were full.]"}}},

// ---- Building something
{2, {TOOL, TOOL}, "[Many hands make light work|Together we can build anything|Two can do more than one]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {TELL, 0, 0, 0, "\"Let us build {work}!\" said {hero}."},
    {OWNS, HERO, 0, TOY, "{Who} ran home and came back with {a thing}."},
    {OWNS, FRIEND, 0, OTHER, "{Who} brought {a thing}."},
    {TELL, 0, 0, 0, "\nThey worked [hard|all morning|for a long time]."},
    {MAYBE | GIVES, FRIEND, HERO, OTHER,
        "\"May I have the {thing noun}?\" asked {whom}. \"Here you are,\" said {who}, and gave {whom him} the "
        "{thing}."},
    {MAYBE | GIVES, HERO, FRIEND, TOY,
        "\"[Now I|I] need your {thing noun},\" said {whom}. {Who} smiled and gave {whom him} the {thing}."},
    {SUM, 0, 0, 0, 0},
    {TELL, 0, 0, 0,
        "\n[At last|In the afternoon|Soon], it was done. \"[What a fine thing|We did it|Look at it], {hero}!\" said "
        "{friend}. They [danced|laughed] with joy."},
    {MAYBE | GIVES, HERO, FRIEND, OTHER, "{Who} [thanked {whom} and ]gave the {thing} back to {whom him}."},
    {MAYBE | GIVES, FRIEND, HERO, TOY, "{Who} gave the {thing} back to {whom}."}}},

// ---- A secret
{3, {PLAY | SMALL, PLAY}, "[Some secrets are sweet|A good secret makes a friend happy|Surprises are fun]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {OWNS, FRIEND, 0, OTHER, 0},
    {TELL, 0, 0, 0,
        "\n\"I have a secret,\" said {hero}. \"Tomorrow is the birthday of {third full}. My {toy noun} is for "
        "{third him}.\""},
    {LOSES, HERO, 0, TOY, "{Who} hid the {thing} {spot}. \"I will not tell,\" said {friend}."},
    {MAYBE | FINDS, THIRD, 0, TOY,
        "\nBut soon {who} came. {Who he} looked {spot} and found the {thing}! \"Surprise! It is yours!\" called "
        "{hero}. {Who} was very happy."},
    {TAKES, HERO, 0, TOY, "\nThe next day, {who} went back and took the {thing} from its place {spot}."},
    {GIVES, HERO, THIRD, TOY,
        "\"Happy birthday, {whom}!\" said {who}, and gave {whom him} the {thing}. {Whom} [smiled|laughed|was very "
        "happy]."},
    {MAYBE | GIVES, FRIEND, THIRD, OTHER,
        "[{Who} wanted to give something, too.|\"Here is one more,\" said {who}.] {Who he} gave the {thing} to "
        "{whom}."},
    {SUM, 0, 0, 0, 0}}},

// ---- A shy new friend
{2, {PLAY | SMALL, PLAY}, "[A shy friend needs a little time|One kind word can make a friend|It is easy to be kind]", {
    {TELL, 0, 0, 0,
        "One [|sunny |warm ][day|morning], {hero full} saw someone new {at}. It was {friend full}. {Friend} was shy "
        "and sat alone {wrong}."},
    {OWNS, FRIEND, 0, TOY, 0},
    {OWNS, HERO, 0, OTHER, 0},
    {TELL, 0, 0, 0,
        "\n\"Hello! I am {hero}. [What is your name|Who are you]?\" asked {hero}. {Friend} looked down and said "
        "nothing. {Hero} [sat down|waited a little] and smiled."},
    {MAYBE | GIVES, HERO, FRIEND, OTHER,
        "\"Do you like my {thing noun}? It is for you,\" {who he} said, and gave the {thing} to {whom}."},
    {HAS, HERO, 0, OTHER, "{Hero} let {friend} look at the {other}."},
    {TELL, 0, 0, 0,
        "Then {friend} smiled, too. \"I am {friend},\" {friend he} said[| softly]. \"[Will you play with me|Shall we "
        "play]?\" They [played all day|laughed and played|played until the sun went down]."},
    {MAYBE | GIVES, FRIEND, HERO, TOY,
        "\nBefore they went home, {who} gave the {thing} to {whom}. \"You are my first friend here,\" {who he} said."},
    {SUM, 0, 0, 0, 0}}},

// ---- A broken thing
{3, {BREAKS, PLAY}, "[What is broken can be mended|Helping hands can mend a lot|Good friends mend what breaks]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, HERO, 0, TOY, 0},
    {OWNS, FRIEND, 0, OTHER, 0},
    {TELL, 0, 0, 0,
        "Then {hero} fell, and the {toy} broke. \"Oh no! My poor {toy noun}!\" cried {hero}.\n{Third full} heard "
        "{hero him}. \"I can mend it,\" {third he} said."},
    {GIVES, HERO, THIRD, TOY, 0},
    {MAYBE | GIVES, FRIEND, HERO, OTHER,
        "\"You can have my {thing noun},\" said {who}, and gave the {thing} to {whom}."},
    {SUM, 0, 0, 0, 0},
    {MAYBE | GIVES, THIRD, HERO, TOY,
        "\n[The next day|Soon|After a while], the {thing} was as good as new. {Who} gave it back to {whom}. \"Thank "
        "you, {who}!\" said {whom}."},
    {HAS, THIRD, 0, TOY,
        "\n\"It takes a long time. [Come back tomorrow|You must wait a little],\" said {third}. {Third he} kept the "
        "{toy} and worked on it."},
    {MAYBE | GIVES, HERO, FRIEND, OTHER, "{Who} gave the {thing} back to {whom}."},
    {MAYBE | GIVES, HERO, THIRD, OTHER, "To thank {whom}, {who} gave {whom him} the {thing}."}}},

// ---- The dark
{2, {LIGHT, PLAY}, "[With a friend, the night is not so dark|A small light helps a lot|Friends make you brave]", {
    {OPEN, HERO, FRIEND, 0, 0},
    {OWNS, FRIEND, 0, TOY, 0},
    {OWNS, HERO, 0, OTHER, 0},
    {TELL, 0, 0, 0,
        "\nThey played so long that it got dark. \"I am afraid,\" said {hero}. \"I cannot see the way home.\""},
    {GIVES, FRIEND, HERO, TOY,
        "\n\"[Do not be afraid|Be brave]. Take my {thing noun},\" said {who}, and gave the {thing} to {whom}. Now "
        "{whom} could see the way."},
    {MAYBE | GIVES, HERO, FRIEND, OTHER, "\"Thank you, {whom},\" said {who}, and gave {whom him} the {thing}."},
    {TELL, 0, 0, 0, "They walked home together and [sang|looked at the stars|looked at the moon]."},
    {SUM, 0, 0, 0, 0},
    {MAYBE | GIVES, HERO, FRIEND, TOY,
        "\nThe next day, {who} [gave the {thing} back to {whom}|went to see {whom} and gave the {thing} back]."}}},
};

// ============================================================== 3. The questions
//
// A question is asked about a thing of the story, and only where the world has an answer.

enum { ANYTIME, MOVED, ALONE, LOST };                       // of what was handed over, is all one has, was lost
static const struct { int about, when; bool food; const char *ask, *answer, *answer_of_oneself; } questions[] = {
    {OWNER,  ANYTIME, false, "who has the {thing}[| now]?", "{Answer} has it", "[I have it|I do]"},
    {OWNER,  ANYTIME, false, "do you have the {thing}, {speaker}?", "No, {answer} has it", "Yes, I have it"},
    {OWNER,  ALONE,   false, "what does {owner} have[| now]?", "{Answer he} has the {thing}", "I have the {thing}"},
    {FIRST,  MOVED,   false, "who had the {thing} first?", "{Answer} had it", "I had it"},
    {GIVER,  MOVED,   false, "who gave the {thing} to {owner}?", "{Answer} did", "I did"},
    {FINDER, LOST,    false, "who found the {thing}?", "{Answer} found it", "I found it"},
    {FINDER, LOST,    false, "where was the {thing}?", "It was {spot}", "It was {spot}"},
    {FIRST,  ANYTIME, false, "what colour is the {thing noun}?", "It is {thing colour}", "It is {thing colour}"},
    {WINNER, ANYTIME, false, "who won the race?", "{Answer} won", "I won"},
    {FIRST,  ANYTIME, true,  "who brought the {thing}?", "{Answer} brought it", "I did"},
    {EATER,  ANYTIME, true,  "who ate the {thing}?", "{Answer} ate it", "I ate it"},
    {EATER,  ANYTIME, true,  "what did {eater} eat?", "{Answer he} ate the {thing}", "I ate the {thing}"},
};

static const char evening[] =
    "\n[In the evening|At home|After supper|At bedtime], {elder} "
    "[asked about the day|wanted to hear all about it|listened to their story].";
static const char closing[] =
    "\n[{Elder} [smiled|nodded|laughed]. \"{moral},\" {elder he} said.|{moral}.]"
    "[|| And they were the best of friends.| What a good day it was!]";

// ============================================================== 4. The telling

typedef struct {
    const char *noun, *colour, *size;                       // noun is NULL where the plot has no such thing
    bool food;
    int owner, first, giver, eater;                         // people, or NOBODY
} thing;

typedef struct {
    uint64_t random;
    const plot *plot;
    const character *people[PEOPLE];
    const char *traits[PEOPLE], *work;
    int role[PARTS];                                        // who plays which part
    thing things[THINGS];
    int subject, lost, asked;                               // things: spoken of, lost, asked about; or THINGS
    int place, spot, searches;
    size_t length;
    char text[4096];
} story;

// splitmix64, and from it a number in [0, n): the high half, scaled.
static int below(story *s, int n) {
    uint64_t z = (s->random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (int)(((z ^ (z >> 31)) >> 32) * (uint64_t)n >> 32);
}

// A number in [0, n) that is not among the bits of `taken`, and now is.
static int draw(story *s, int n, uint64_t *taken) {
    int i;
    do i = below(s, n); while (*taken >> i & 1);
    *taken |= (uint64_t)1 << i;
    return i;
}

static void put(story *s, const char *text, size_t length) {
    if (length > sizeof s->text - s->length) length = sizeof s->text - s->length;
    memcpy(s->text + s->length, text, length);
    s->length += length;
}

static void put_word(story *s, const char *word) { put(s, word, strlen(word)); }

static void put_article(story *s, const char *next) { put_word(s, strchr("aeiou", next[0]) ? "an " : "a "); }

static void capitalise(story *s, size_t at) {               // not toupper, which asks the locale
    if (at < s->length && s->text[at] >= 'a' && s->text[at] <= 'z') s->text[at] = (char)(s->text[at] - 'a' + 'A');
}

static void put_person(story *s, int who, bool article, const char *form) {
    const character *c = s->people[who];
    if (!strcmp(form, "he")) put_word(s, c->is.he);
    else if (!strcmp(form, "him")) put_word(s, c->is.him);
    else if (!strcmp(form, "his")) put_word(s, c->is.his);
    else {
        if (article) put_article(s, s->traits[who]);
        put_word(s, article ? s->traits[who] : c->name);
        bool full = !strcmp(form, "full") && c->animal;
        if (article || full) {
            put_word(s, full ? " the " : " ");
            put_word(s, c->kind);
        }
    }
}

static void put_thing(story *s, const thing *t, bool article, const char *form) {
    bool noun = !strcmp(form, "noun"), colour = !strcmp(form, "colour");
    if (article) {
        put_article(s, t->size[0] ? t->size : t->colour);
        put_word(s, t->size);
    }
    if (!noun) put_word(s, t->colour);
    if (!noun && !colour) put_word(s, " ");
    if (!colour) put_word(s, t->noun);
}

static void put_text(story *s, const char *text);

// {name}, {a name} or {name form}, without the braces. One that does not exist is written as it stands, for all to see.
static void put_field(story *s, const char *text, size_t length) {
    char words[32] = "";
    size_t at = s->length;
    memcpy(words, text, length < sizeof words ? length : sizeof words - 1);
    bool capital = words[0] >= 'A' && words[0] <= 'Z';
    if (capital) words[0] = (char)(words[0] - 'A' + 'a');
    bool article = !strncmp(words, "a ", 2);
    char *name = article ? words + 2 : words, *space = strchr(name, ' ');
    const char *form = space ? space + 1 : "";
    if (space) *space = 0;
    int part = 0, which = 0;
    while (part < PARTS && strcmp(name, part_names[part])) part++;
    while (which <= THING && strcmp(name, thing_names[which])) which++;
    if (part < PARTS) put_person(s, s->role[part], article, form);
    else if (which <= THING) put_thing(s, &s->things[which == THING ? s->subject : which], article, form);
    else if (!strcmp(name, "place")) put_word(s, places[s->place].name);
    else if (!strcmp(name, "at")) put_word(s, places[s->place].at);
    else if (!strcmp(name, "spot")) put_word(s, places[s->place].spots[s->spot]);
    else if (!strcmp(name, "wrong")) put_word(s, places[s->place].spots[(s->spot + s->searches) % SPOTS]);
    else if (!strcmp(name, "work")) put_word(s, s->work);
    else if (!strcmp(name, "moral")) put_text(s, s->plot->moral);
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
    int chosen = below(s, n);
    expand(s, start[chosen], start[chosen + 1] - 1);
    return text;
}

static void put_text(story *s, const char *text) { expand(s, text, text + strlen(text)); }

static void say(story *s, const char *text) {               // after a space, or the newline that the text brings
    if (s->length && text[0] != '\n') put_word(s, " ");
    put_text(s, text);
}

// From here {thing}, {owner}, {first}, {giver} and {eater} are about this thing.
static void speak_of(story *s, int which) {
    const thing *t = &s->things[which];
    s->subject = which;
    s->role[OWNER] = t->owner;
    s->role[FIRST] = t->first;
    s->role[GIVER] = t->giver;
    s->role[EATER] = t->eater;
}

static void hand_over(thing *t, int giver, int receiver) {
    t->giver = giver;
    t->owner = receiver;
}

// If the world allows the beat, true, and the world has changed.
static bool happens(story *s, const beat *b) {
    int who = s->role[WHO] = s->role[b->who], whom = s->role[WHOM] = s->role[b->whom];
    thing *t = &s->things[b->thing], *other = &s->things[b->thing == TOY ? OTHER : TOY];
    bool missing = s->lost == b->thing && !t->owner;
    switch (b->verb & ~MAYBE) {
    case HAS:
        return t->owner == who;
    case OWNS:
        if (t->first) return false;                         // somebody brought it already
        t->owner = t->first = who;
        return true;
    case GIVES:
        if (t->owner != who) return false;
        hand_over(t, who, whom);
        return true;
    case SWAPS:
        if (t->owner != who || other->owner != whom) return false;
        hand_over(t, who, whom);
        hand_over(other, whom, who);
        return true;
    case LOSES:
        if (t->owner != who) return false;
        t->owner = NOBODY;
        s->lost = b->thing;
        return true;
    case SEARCHES:
        s->searches += missing;
        return missing;
    case FINDS:
        if (missing) s->role[FINDER] = t->owner = who;
        return missing;
    case TAKES:                                             // who hid it does not find it
        if (missing) t->owner = who;
        return missing;
    case EATS:
        for (int i = 0; i < THINGS; i++)
            if (s->things[i].eater == who) return false;    // one each
        if (!t->owner) return false;
        t->owner = NOBODY;
        t->eater = who;
        return true;
    case RACES:
        s->role[WINNER] = below(s, 2) ? who : whom;
        s->role[LOSER] = who + whom - s->role[WINNER];
        return true;
    default:
        return true;
    }
}

// Who has what, as the world knows it.
static void sum_up(story *s) {
    const thing *t = s->things;
    for (int i = TOY; i <= OTHER; i++) {
        speak_of(s, i);
        if (t[TOY].owner == t[OTHER].owner) {
            say(s, "[Now|So now|So] {owner} had both the {toy} and the {other}.");
            return;
        }
        say(s, i != TOY ? "and " : t[i].owner != t[i].first ? "[|So |Now ]" : "");
        put_text(s, t[i].owner != t[i].first ? "{owner} had the {thing}"
                  : t[i].giver ? "{owner} had the {thing} again" : "{owner} still had the {thing}");
        put_word(s, i == TOY ? "," : ".");
    }
}

static bool can_ask(const story *s, int q, int which) {
    const thing *t = &s->things[which];
    int held = 0;
    for (int i = 0; i < THINGS; i++) held += s->things[i].owner == t->owner;
    return t->noun && t->food == questions[q].food && s->role[questions[q].about] && which != s->asked
        && (questions[q].when != MOVED || t->giver)
        && (questions[q].when != ALONE || held == 1)
        && (questions[q].when != LOST || which == s->lost);
}

static void ask(story *s) {
    int q, which;
    bool again = s->asked < THINGS;                         // then about something else
    do {
        q = below(s, COUNT(questions));
        which = below(s, THINGS);
        speak_of(s, which);
    } while (!can_ask(s, q, which));
    s->asked = which;
    s->role[ANSWER] = s->role[questions[q].about];
    s->role[SPEAKER] = HERO + below(s, s->plot->people);
    say(s, again ? "\"And " : "\"");
    size_t at = s->length;
    put_text(s, questions[q].ask);
    if (!again) capitalise(s, at);
    put_text(s, again ? "\" asked {elder}. \"" : "\" [asked {elder}|{elder he} asked]. \"");
    put_text(s, s->role[SPEAKER] == s->role[ANSWER] ? questions[q].answer_of_oneself : questions[q].answer);
    put_text(s, ",\" said {speaker}.");
}

// A new plot, and for it a place, people and things, of which no two are alike.
static void set_the_stage(story *s) {
    static const character nobody = {"nobody", "nobody", false, HE};
    uint64_t names = 0, manners = 0, things = 0, looks = 0;
    *s = (story){.random = s->random, .lost = THINGS, .asked = THINGS, .searches = 1};
    s->plot = &plots[below(s, COUNT(plots))];
    s->place = below(s, COUNT(places));
    s->spot = below(s, SPOTS);
    s->work = works[below(s, COUNT(works))];
    for (int i = 0; i < PEOPLE; i++) {
        s->role[i] = i;
        s->people[i] = &children[draw(s, COUNT(children), &names)];
        s->traits[i] = traits[draw(s, COUNT(traits), &manners)];
    }
    s->people[NOBODY] = &nobody;
    s->people[ELDER] = &elders[below(s, COUNT(elders))];
    for (int i = 0; i < THINGS && s->plot->kinds[i]; i++) {
        thing *t = &s->things[i];
        int noun;
        do noun = below(s, COUNT(nouns)); while (!(nouns[noun].kinds & s->plot->kinds[i]) || things >> noun & 1);
        things |= (uint64_t)1 << noun;
        t->noun = nouns[noun].noun;
        t->food = nouns[noun].kinds == FOOD;
        t->colour = t->food ? tastes[draw(s, COUNT(tastes), &looks)] : colours[draw(s, COUNT(colours), &looks)];
        t->size = t->food ? "" : sizes[below(s, COUNT(sizes))];
    }
}

// Tells a story; returns the number of its words.
static int tell(story *s) {
    set_the_stage(s);
    for (const beat *b = s->plot->beats; b->verb != END; b++) {
        if ((b->verb & MAYBE && below(s, 2)) || !happens(s, b)) continue;
        speak_of(s, b->thing);
        if (b->verb == SUM) sum_up(s);
        else say(s, b->words ? b->words : usual_words[b->verb & ~MAYBE]);
    }
    say(s, evening);
    ask(s);
    if (below(s, 3)) ask(s);
    say(s, closing);
    put_word(s, "\n");
    int words = 0;
    for (size_t i = 0; i < s->length; i++) words += s->text[i] == ' ' || s->text[i] == '\n';
    return words;
}

// ============================================================== 5. The command line

static const char help[] =
    "usage: stories [--bytes N] [--seed S]\n"
    "Writes short stories for children to standard output, a text to train small language models on.\n"
    "  --bytes N   as many whole stories as fit in N bytes, but at least one (default 4M);\n"
    "              k, M and G behind N are thousands, millions and thousand millions\n"
    "  --seed S    the same number tells the same stories on every machine (default 1)\n"
    "  --help      this text\n";

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

// Wrong usage: one line, whatever the arguments contain.
static int complain(const char *what, size_t length, const char *got, const char *expected) {
    char line[256];
    snprintf(line, sizeof line, "%.*s%s'%.99s', expected %s", (int)length, what, length ? ": got " : "got ", got, expected);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "stories: %s; see stories --help\n", line);
    return 2;
}

int main(int count, char **arguments) {
    enum { SHORTEST = 80, LONGEST = 160 };                  // words in a story
    uint64_t bytes = 4000000, written = 0;
    story s = {.random = 1};
    for (int i = 1; i < count; i++) {
        const char *argument = arguments[i];
        size_t length = strcspn(argument, "=");
        bool is_bytes = length == 7 && !strncmp(argument, "--bytes", 7);
        bool is_seed = length == 6 && !strncmp(argument, "--seed", 6);
        if (!strcmp(argument, "--help") || !strcmp(argument, "-h")) {
            fputs(help, stdout);
            goto finish;
        }
        if (!is_bytes && !is_seed) return complain("", 0, argument, "--bytes N or --seed S");
        const char *value = argument[length] ? argument + length + 1 : i + 1 < count ? arguments[++i] : "nothing";
        if (!parse(value, is_bytes, is_bytes ? &bytes : &s.random))
            return complain(argument, length, value, is_bytes ? "a number such as 500000, 500k or 4M" : "a number such as 1");
    }
#ifdef _WIN32
    _setmode(1, _O_BINARY);                                 // a newline is one byte everywhere
#endif
    for (;;) {
        int words;
        do words = tell(&s); while (words < SHORTEST || words > LONGEST);
        size_t gap = written > 0;                           // the blank line between two stories
        if (gap && (written > bytes || s.length + gap > bytes - written)) break;
        if ((gap && putchar('\n') == EOF) || fwrite(s.text, 1, s.length, stdout) != s.length) goto failed;
        written += gap + s.length;
    }
finish:
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
failed:
    fprintf(stderr, "stories: cannot write to standard output: %s; make room or write elsewhere\n", strerror(errno));
    return 1;
}
