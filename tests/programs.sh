#!/bin/sh
# Do the programs do what their --help says? Tries every flag of ./train, ./run, ./test, data/stories and data/tasks, and
# every way in which they can fail, on models so small that all of it takes seconds.
#
#   make test-programs             a line per check, "N passed, N failed" last; exit status 0 when none failed
#
# Needs the built programs and POSIX tools. Reading order: the checking, files that are made, then stories, tasks, train, run, test.
set -u
LC_ALL=C
export LC_ALL
: "${OMP_WAIT_POLICY=passive}"           # or each program would start itself once more to set it
export OMP_WAIT_POLICY
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
for program in train run test data/stories data/tasks build/train-failing; do
    [ -x "$root/$program" ] || { echo "programs.sh: $program is not there; start it with make test-programs" >&2; exit 1; }
done
work=$root/build/programs.$$
mkdir -p "$work" && cd "$work" || exit 1
started=                                 # the program that runs in the background, if one does
clean() {
    [ -z "$started" ] || kill -9 "$started" 2> /dev/null
    cd / && rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ============================================================== The checking

passed=0 failed=0
pass() { passed=$((passed + 1)); printf 'ok      %s\n' "$1"; }
miss() { failed=$((failed + 1)); printf 'FAILED  %s: %s\n' "$1" "$2"; }

equal() {                                # DESCRIPTION EXPECTED GOT
    if [ "$2" = "$3" ]; then pass "$1"; else miss "$1" "expected '$2', got '$3'"; fi
}
differ() {                               # DESCRIPTION A B
    if [ "$2" != "$3" ]; then pass "$1"; else miss "$1" "expected two different values, got '$2' twice"; fi
}
same_bytes() {                           # DESCRIPTION FILE FILE; two empty files would prove nothing
    if [ -s "$2" ] && cmp -s "$2" "$3"; then pass "$1"
    else miss "$1" "expected $2 and $3 alike, got different bytes or none"; fi
}
other_bytes() {                          # DESCRIPTION FILE FILE
    if [ -s "$2" ] && [ -s "$3" ] && ! cmp -s "$2" "$3"; then pass "$1"
    else miss "$1" "expected $2 and $3 to differ, got the same bytes or none"; fi
}
has() {                                  # DESCRIPTION FILE TEXT...
    file=$2 name=$1
    shift 2
    for text; do
        grep -F -q -e "$text" "$file" || { miss "$name" "expected '$text', got '$(tail -n 1 "$file")'"; return; }
    done
    pass "$name"
}
absent() {                               # DESCRIPTION FILE
    if [ -e "$2" ]; then miss "$1" "expected no file $2, got one"; else pass "$1"; fi
}
holds() {                                # DESCRIPTION CONDITION, an awk expression of numbers
    if awk "BEGIN { exit !($2) }"; then pass "$1"; else miss "$1" "expected $2, got the contrary"; fi
}

# A program that hangs ends after a minute where there is `timeout`; its arguments are remembered in used.<program>.
limit=
if command -v timeout > /dev/null && timeout 9 true 2> /dev/null; then limit="timeout 60"; fi
train()   { printf '%s\n' "$@" >> used.train; $limit "$root/train" "$@"; }
run()     { printf '%s\n' "$@" >> used.run; $limit "$root/run" "$@"; }
checks()  { printf '%s\n' "$@" >> used.checks; $limit "$root/test" "$@"; }
stories() { printf '%s\n' "$@" >> used.stories; $limit "$root/data/stories" "$@"; }
tasks()   { printf '%s\n' "$@" >> used.tasks; $limit "$root/data/tasks" "$@"; }

works() {                                # DESCRIPTION COMMAND...: exit status 0; the output is in out and err
    name=$1
    shift
    "$@" > out 2> err < /dev/null
    status=$?
    if [ $status -eq 0 ]; then pass "$name"
    else miss "$name" "expected exit 0, got exit $status, '$(tail -n 1 err)'"; fi
}
# Exit status, and one line on standard error that has this text and no control characters.
fails() {                                # STATUS TEXT DESCRIPTION COMMAND...
    want=$1 text=$2 name="$3: exit $1, one clear line"
    shift 3
    "$@" > out 2> err < /dev/null
    complained "$?"
}
# The same of what is noticed before anything is done: nothing is printed but that line.
fails_at_once() {                        # STATUS TEXT DESCRIPTION COMMAND...
    fails "$@"
    equal "$3: nothing else is printed" 0 "$(size out)"
}
complained() {                           # STATUS, for want, text and name
    lines=$(wc -l < err) odd=$(tr -d '\n' < err | tr -d '[:print:]' | tr -d '\200-\377' | wc -c)
    if [ "$1" -eq "$want" ] && [ "$lines" -eq 1 ] && [ "$odd" -eq 0 ] && grep -F -q -e "$text" err; then pass "$name"
    else miss "$name" "expected exit $want, '$text', got exit $1, $((lines)) lines, '$(tail -n 1 err)'"; fi
}

# For long lists of values: a PROGRAM refuses a FLAG with a MESSAGE, or the flag is added to `wrong`.
refused() {                              # PROGRAM FLAG MESSAGE [VALUE]
    program=$1 flag_=$2 message=$3
    shift 3
    $program missing.txt "$flag_" "$@" > out 2> err < /dev/null
    [ $? -eq 2 ] && [ "$(lines err)" -eq 1 ] && grep -q -e "^$program: $flag_: $message" err || wrong="$wrong $flag_ $*"
}

# Programs in the background: `begin` starts one, `await` waits until a command succeeds, at most half a minute.
begin() {                                # PROGRAM ARGUMENT...
    name=$1
    shift
    printf '%s\n' "$@" >> "used.$name"
    rm -f back.out back.err
    "$root/$name" "$@" > back.out 2> back.err < "${input:-/dev/null}" & started=$!
}
pause() { sleep 0.1 2> /dev/null || sleep 1; }
await() {                                # DESCRIPTION COMMAND...
    waited=$1 tries=0
    shift
    until "$@" 2> /dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || { miss "$waited" "expected it within half a minute, got nothing"; return; }
        pause
    done
}
runs_on() {                              # DESCRIPTION
    if kill -0 "$started" 2> /dev/null; then pass "$1"; else miss "$1" "expected it to go on, got its end"; fi
}
finish() { wait "$started" 2> /dev/null; status=$?; started=; }

size() { echo $(($(wc -c < "$1"))); }
lines() { echo $(($(wc -l < "$1"))); }
flags_of() { sed -n 's/^  \(-[a-z], \)\{0,1\} *\(--[a-z0-9-]*\).*/\2/p'; }
tried() {                                # NAME COMMAND...: everything in its help was used above
    name=$1
    shift
    "$@" --help | flags_of > flags
    for flag in $(cat flags); do
        grep -q -e "^$flag\$" -e "^$flag=" "used.$name" && continue
        miss "every flag of $name" "expected $flag to be tried, got no check of it"
        return
    done
    if [ -s flags ]; then pass "every flag of $name --help was tried ($(lines flags))"
    else miss "every flag of $name" "expected a list in its help, got none"; fi
}

# ============================================================== Files that are made

escapes() { awk '{ for (i = 1; i <= NF; i++) printf "\\%03o", $i }'; }
put_u8() { printf "$(echo "$*" | escapes)"; }
put_i32() {                              # -100 and small numbers, little-endian
    printf "$(echo "$*" | awk '{ for (i = 1; i <= NF; i++) { x = $i < 0 ? $i + 65536 : $i; h = $i < 0 ? 255 : 0
        printf "%d %d %d %d ", x % 256, x / 256, h, h } }' | escapes)"
}
put_header() { printf "$(echo "$((${#1} % 256)) $((${#1} / 256)) 0 0 0 0 0 0" | escapes)"; printf '%s' "$1"; }
tensor() { printf '"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}' "$1" "$2" "$3" "$4" "$5"; }

# 12 sequences of 4 tokens 0 … 11: the first is to be remembered.
tokens=$(awk 'BEGIN { for (n = 0; n < 12; n++) print n, (n * 5 + 1) % 12, (n * 7 + 2) % 12, (n + 6) % 12 }' | tr '\n' ' ')
next=$(awk 'BEGIN { for (n = 0; n < 12; n++) print (n * 5 + 1) % 12, -100, (n + 6) % 12, n }' | tr '\n' ' ')
first=$(awk 'BEGIN { for (n = 0; n < 12; n++) print n }' | tr '\n' ' ')
ones=$(awk 'BEGIN { for (n = 0; n < 12; n++) print 1, 1, 1, 1 }' | tr '\n' ' ')
left=$(awk 'BEGIN { for (n = 0; n < 12; n++) print 0, n % 2, 1, 1 }' | tr '\n' ' ')
inputs=$(tensor inputs U8 12,4 0 48)
{ put_header "{$inputs,$(tensor labels I32 12 48 96)}"; put_u8 "$tokens"; put_i32 "$first"; } > labels.safetensors
{ put_header "{$inputs,$(tensor targets I32 12,4 48 240)}"; put_u8 "$tokens"; put_i32 "$next"; } > targets.safetensors
for mask in ones left; do
    { put_header "{$inputs,$(tensor labels I32 12 48 96),$(tensor mask U8 12,4 96 144)}"; put_u8 "$tokens"
      put_i32 "$first"; eval "put_u8 \"\$$mask\""; } > $mask.safetensors
done
# 12 images of 4 patches of 3 bytes: the label is the number of the brightest patch.
pixels=$(awk 'BEGIN { for (i = 0; i < 144; i++) print int(i / 3) % 4 == int(i / 12) * 3 % 4 ? 255 - i : i % 60 }' | tr '\n' ' ')
bright=$(awk 'BEGIN { for (n = 0; n < 12; n++) print n * 3 % 4 }' | tr '\n' ' ')
images=$(tensor inputs U8 12,4,3 0 144)
{ put_header "{$images,$(tensor labels I32 12 144 192)}"; put_u8 "$pixels"; put_i32 "$bright"; } > images.safetensors
{ put_header "{$images,$(tensor targets I32 12,4 144 336),$(tensor mask U8 12,4 336 384)}"; put_u8 "$pixels"; put_i32 "$next"
  put_u8 "$left"; } > each.safetensors
{ put_header "{$images,$(tensor targets I32 4,12 144 336)}"; put_u8 "$pixels"; put_i32 "$next"; } > unlike.safetensors
{ put_header "{$inputs}"; put_u8 "$tokens"; } > neither.safetensors
{ put_header "{$inputs,$(tensor labels I32 12 48 96),$(tensor targets I32 12,4 96 288)}"; put_u8 "$tokens"; put_i32 "$first"
  put_i32 "$next"; } > both.safetensors
{ put_header "{$inputs,$(tensor labels I32 6,2 48 96)}"; put_u8 "$tokens"; put_i32 "$first"; } > shape.safetensors
{ put_header "{$(tensor inputs F32 3,4 0 48),$(tensor labels I32 3 48 60)}"; put_u8 "$tokens"; put_i32 1 2 3; } > floats.safetensors
{ put_header "{$(tensor inputs U8 1,4 0 4),$(tensor labels I32 1 4 8)}"; put_u8 1 2 3 4; put_i32 -5; } > negative.safetensors
{ put_header "{$(tensor inputs U8 1,4 0 4),$(tensor targets I32 1,4 4 20)}"; put_u8 1 2 3 4; put_i32 -100 -100 -100 -100; } > ignored.safetensors
{ put_header "{$(tensor inputs U8 2,4 0 8),$(tensor targets I32 2,4 8 40)}"; put_u8 1 2 3 4 5 6 7 8
  put_i32 1 2 3 4 -100 -100 -100 -100; } > half.safetensors
{ put_header "{$(tensor inputs U8 1,4 0 4)"; put_u8 1 2 3 4; } > json.safetensors

# A model of the smallest size, all zero: HEAD is the shape of its output layer, END its end token.
zero_model() {                           # HEAD END
    header=$(awk -v head="$1" -v end="$2" 'BEGIN {
        n = split("model.embed_tokens 2,2 conv1d 2,1,4 q_proj 1,2 k_gate 1,2 v_proj 2,2 g_proj 2,2 g_proj.bias 2 " \
                  "aug_balance 1 out_proj 2,2 l1 1,2 l2 1,2 l3 2,1 lm_head " head, part, " ")
        printf "{\"__metadata__\":{\"vocab_size\":\"2\",\"decoder_embed_dim\":\"2\",\"decoder_layers\":\"1\"," \
               "\"decoder_attention_heads\":\"1\",\"glu_dim\":\"1\",\"eos_token_id\":\"%s\"}", end
        for (i = 1; i < n; i += 2) {
            count = 1
            dims = split(part[i + 1], size, ",")
            for (d = 1; d <= dims; d++) count *= size[d]
            name = part[i] (part[i] ~ /bias|balance/ ? "" : ".weight")
            if (part[i] ~ /^l[123]$/) name = "model.layers.0.channel_mixer." name
            else if (part[i] !~ /embed|lm_head/) name = "model.layers.0.token_mixer." name
            printf ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%d,%d]}", name, part[i + 1], at, at + 4 * count
            at += 4 * count
        }
        printf "}"
    }')
    put_header "$header"
    dd if=/dev/zero bs=4 count=41 2> /dev/null
}
zero_model 2,2 -1 > zero.safetensors
zero_model 2,2 0 > ending.safetensors
zero_model 4,1 -1 > shaped.safetensors
put_header '{"__metadata__":{"vocab_size":"256","decoder_embed_dim":"4096","decoder_layers":"9999","decoder_attention_heads":"1"}}' > promise.safetensors
put_header '{"__metadata__":{"vocab_size":"256","decoder_embed_dim":"15","decoder_layers":"1","decoder_attention_heads":"2"}}' > odd.safetensors

mkdir folder
: > empty.txt
printf a > one.txt
printf ab > two.txt
"$root/data/stories" --bytes 20k > text.txt
"$root/data/stories" --bytes 2k --seed 7 > other.txt
printf 'a\000b\033[1m\377\r\n' > odd.txt

# ============================================================== stories

works "stories --bytes N" stories --bytes 5000
mv out 5k
holds "stories --bytes N: at most N bytes, and whole stories nearly fill them" "$(size 5k) <= 5000 && $(size 5k) > 3500"
equal "stories --bytes N: ends with a whole story" "" "$(tail -c 1 5k | tr -d '\n')"
stories --bytes 100000 > 100k
stories --bytes=100k > again
same_bytes "stories --bytes=100k is --bytes 100000" 100k again
stories --bytes 5k --seed 1 > again
same_bytes "stories --seed 1 is the default, same seed same bytes" 5k again
stories --bytes 5k --seed=2 > again
other_bytes "stories --seed 2 tells others" 5k again
stories --bytes 0 > again
holds "stories --bytes 0 tells one story" "$(size again) > 200 && $(size again) < 1500 && $(grep -c '^$' again) == 0"
stories > again
holds "stories writes 4M unless told" "$(size again) <= 4000000 && $(size again) > 3998000"
stories --bytes 4M > 4M                  # a million has 1000 thousands, or there would be more
same_bytes "stories --bytes 4M" 4M again
dd if=4M bs="$(size 5k)" count=1 > start 2> /dev/null
same_bytes "stories: more bytes continue fewer" 5k start
rm -f 4M again
stories --bytes 1G 2> err | dd bs="$(size 5k)" count=1 > start 2> /dev/null
cmp -s 5k start || dd if=5k bs=512 count="$(($(size start) / 512))" of=5k.start 2> /dev/null
holds "stories --bytes 1G starts at once, and ends without a word when nobody reads on" \
    "$(size start) > 0 && $(size err) == 0"
works "stories --help" stories --help
has "stories --help explains every flag" out --bytes --seed --help
cp out help
works "stories -h" stories -h
same_bytes "stories -h is --help" help out
fails 2 "see stories --help" "stories --unknown" stories --unknown
fails 2 "got 'nothing'" "stories --bytes without a value" stories --bytes
fails 2 "got '-1'" "stories --bytes -1" stories --bytes -1
fails 2 "got '5x'" "stories --bytes 5x" stories --bytes 5x
fails 2 "got ''" "stories --bytes=" stories --bytes=
fails 2 "got '99999999999999999999'" "stories --bytes beyond 64 bits" stories --bytes 99999999999999999999
fails 2 "got '99999999999999G'" "stories --bytes beyond 64 bits by its suffix" stories --bytes 99999999999999G
fails 2 "got '1k'" "stories --seed 1k" stories --seed 1k
fails 2 "got 'text.txt'" "stories with an argument" stories text.txt
fails 2 "got 'a?b'" "stories with a control character" stories --seed "$(printf 'a\nb')"
if [ -c /dev/full ]; then
    for flags in "--bytes 100k" "--bytes 0" --help; do
        want=1 text="cannot write to standard output" name="stories $flags > /dev/full: exit 1, one clear line"
        stories $flags > /dev/full 2> err
        complained $?
    done
fi
tried stories stories

# ============================================================== tasks

# The numbers of a file behind its header: FILE TYPE (of od: u2, d4, u1) FIRST COUNT, bytes from the first number on.
numbers_of() {
    dd if="$1" bs=1 skip=$((8 + $(od -A n -t u4 -N 4 "$1") + $3)) count="$4" 2> /dev/null | od -A n -v -t "$2" | tr -s ' ' '\n' |
        sed '/^$/d'
}
works "tasks recall" tasks recall --sequences 40 --length 24 --pairs 6 --vocab 20 --seed 5
cp out recall.safetensors
equal "tasks recall: the file ends with its last target" \
    $((8 + $(od -A n -t u4 -N 4 recall.safetensors) + 40 * 24 * 6)) "$(size recall.safetensors)"
{ numbers_of recall.safetensors u2 0 $((40 * 24 * 2))
  numbers_of recall.safetensors d4 $((40 * 24 * 2)) $((40 * 24 * 4)); } > numbers
equal "tasks recall: each key comes twice, at its second place is its value, elsewhere no target" "40 sequences, 240 targets" \
    "$(awk '{ x[NR - 1] = $1 } END { for (n = 0; n < 40; n++) { split("", value); split("", asked); right = 1
        for (i = 0; i < 24; i++) { token = x[n * 24 + i]; target = x[960 + n * 24 + i]
            if (i < 12 && i % 2 == 0) { right = right && token < 10 && !(token in value); value[token] = x[n * 24 + i + 1] }
            else if (i < 12) right = right && token >= 10 && token < 20
            if (i < 12 || token >= 10) right = right && target == -100
            else { right = right && target == value[token] && !(token in asked); asked[token] = 1; targets++ } }
        good += right }
        printf "%d sequences, %d targets", good, targets }' numbers)"
tasks recall --sequences=40 --length=24 --pairs=6 --vocab=20 --seed=5 > again
same_bytes "tasks recall: the same seed, the same bytes" recall.safetensors again
tasks recall --sequences 40 --length 24 --pairs 6 --vocab 20 --seed 6 > again
other_bytes "tasks recall --seed 6: another file" recall.safetensors again
tasks recall > again
equal "tasks recall: 20k sequences of 128 tokens unless told" $((8 + $(od -A n -t u4 -N 4 again) + 20000 * 128 * 6)) "$(size again)"
tasks recall --sequences 1 --length 30 --pairs 10 --vocab 20 > again
equal "tasks recall: as many pairs as keys and places" 10 "$(numbers_of again d4 60 120 | grep -c -v -e -100)"
tasks recall --sequences 1 --length 30 --vocab 4 > again
equal "tasks recall: fewer pairs where there are few keys" 2 "$(numbers_of again d4 60 120 | grep -c -v -e -100)"
small="--width 32 --layers 1 --heads 2 --batch 4 --max-steps 5 --threads 1 --out again"
works "train reads recall" train recall.safetensors --val recall.safetensors $small
has "train reads recall: keys and values" out "of 24 tokens" "N20:"
works "tasks listops" tasks listops --sequences 60 --length 33
cp out listops.safetensors
{ numbers_of listops.safetensors u2 0 3960
  numbers_of listops.safetensors d4 3960 240; numbers_of listops.safetensors u1 4200 1980; } > numbers
equal "tasks listops: every label is the value of its sequence, padding is on the left and masked" "60 right" \
    "$(awk 'function value(    op, v, n, i, s, j) { op = x[at++]; if (op < 10) return op
            while (x[at] != 14) { v[++n] = value(); for (i = n; i > 1 && v[i - 1] > v[i]; i--) { j = v[i]; v[i] = v[i - 1]; v[i - 1] = j } }
            at++; for (i = 1; i <= n; i++) s += v[i]
            return op == 10 ? v[1] : op == 11 ? v[n] : op == 12 ? int((v[int((n + 1) / 2)] + v[int(n / 2) + 1]) / 2) : s % 10 }
        { x[NR - 1] = $1 }
        END { for (n = 0; n < 60; n++) { at = n * 33; while (x[at] == 15) { masks += x[2040 + at]; at++ }
            for (i = at; i < n * 33 + 33; i++) masks += 1 - x[2040 + i]
            good += value() == x[1980 + n] && at == n * 33 + 33 }
        printf "%d right", good - masks }' numbers)"
works "train reads listops" train listops.safetensors $small
has "train reads listops: its tokens" out "of 33 tokens" "N16:"
works "tasks pathfinder" tasks pathfinder --sequences 60 --size 24 --patch 3
cp out paths.safetensors
{ numbers_of paths.safetensors u1 0 34560; numbers_of paths.safetensors d4 34560 240; } > numbers
# From the middle of a dot, over what is grey and no more than 3 away: the next dash of a path is, another path is not.
equal "tasks pathfinder: the dots of a label 1 are on one path, of a label 0 on two" "60 right, both labels" \
    "$(awk 'function near(a, b) { return (a % 24 - b % 24) ^ 2 <= 9 && (int(a / 24) - int(b / 24)) ^ 2 <= 9 }
        { x[NR - 1] = $1 }
        END { for (n = 0; n < 60; n++) { split("", grey); dots = 0
            for (i = 0; i < 576; i++) { p = int(i / 9); j = i % 9
                picture[(int(p / 8) * 3 + int(j / 3)) * 24 + p % 8 * 3 + j % 3] = x[n * 576 + i] }
            for (i = 0; i < 576; i++) { if (picture[i] == 128) grey[i]
                if (picture[i] == 255 && picture[i - 25] == 255 && picture[i + 25] == 255) dot[dots++] = i }
            reached = 1; at[0] = dot[0]
            for (k = 0; k < reached; k++) for (i in grey) if (near(at[k], i)) { at[reached++] = i; delete grey[i] }
            joined = 0
            for (k = 0; k < reached; k++) joined += near(at[k], dot[1])
            label = x[34560 + n]; labels[label]
            good += dots == 2 && (joined > 0) == label }
        printf "%d right%s", good, (0 in labels) && (1 in labels) ? ", both labels" : "" }' numbers)"
works "train reads pathfinder" train paths.safetensors $small
has "train reads pathfinder: patches, two classes" out "of 64 patches of 9 bytes" "N2 C9:"
tasks pathfinder --sequences 2 --size 16 > again
equal "tasks pathfinder: patches of 4 x 4 unless told" $((8 + $(od -A n -t u4 -N 4 again) + 2 * 16 * 16 + 8)) "$(size again)"
has "tasks pathfinder: patches of 4 x 4, says the file" again '"shape":[2,16,16]'
tasks pathfinder --sequences 20 --size 16 --patch 1 > paths.safetensors
works "train reads pathfinder --patch 1" train paths.safetensors $small
has "train reads pathfinder --patch 1: bytes" out "of 256 tokens" "N256"
works "tasks --help" tasks --help
has "tasks --help explains every flag" out --sequences --length --pairs --vocab --size --patch --seed --help
fails 2 "got 'nothing', expected recall, listops or pathfinder" "tasks without a task" tasks
fails 2 "got 'other', expected recall, listops or pathfinder" "tasks with another task" tasks other
fails 2 "got '--pairs', expected --sequences N, --length T or --seed S" "tasks listops --pairs" tasks listops --pairs 3
fails 2 "got '--length', expected --sequences N, --size S, --patch P or --seed S" "tasks pathfinder --length" \
    tasks pathfinder --length 64
fails 2 "got '15', expected 16 to 256" "tasks --size 15" tasks pathfinder --size 15
fails 2 "got '257', expected 16 to 256" "tasks --size beyond the most" tasks pathfinder --size 257
fails 2 "got '0', expected 1 to --size" "tasks --patch 0" tasks pathfinder --patch 0
fails 2 "got '5', expected a divisor of --size" "tasks --patch that does not divide --size" tasks pathfinder --patch 5
fails 2 "got '4x'" "tasks --length 4x" tasks recall --length 4x
fails 2 "got 'nothing'" "tasks --vocab without a value" tasks recall --vocab
fails 2 "got '0', expected 1 to 2^40" "tasks --sequences 0" tasks recall --sequences 0
fails 2 "got '11', expected at least 3, of listops 12, at most 65536" "tasks listops --length 11" tasks listops --length 11
fails 2 "got '65537', expected at least 3" "tasks --length beyond the most" tasks listops --length 65537
fails 2 "got '11', expected 1 to a third of --length" "tasks --pairs for which there is no place" tasks recall --pairs 11 --length 32
fails 2 "got '11', expected 1 to half of --vocab" "tasks --pairs for which there are no keys" tasks recall --pairs 11 --vocab 21
fails 2 "got '0', expected 1 to a third of --length" "tasks --pairs 0" tasks recall --pairs 0
fails 2 "got '1', expected 2 to 65536" "tasks --vocab 1" tasks recall --vocab 1
if [ -c /dev/full ]; then
    want=1 text="cannot write to standard output" name="tasks > /dev/full: exit 1, one clear line"
    tasks recall > /dev/full 2> err
    complained $?
fi
tried tasks tasks

# ============================================================== train: data, model, optimisation

tiny="--width 16 --layers 1 --heads 2 --context 16 --batch 2 --threads 1 --sample-every 0"
six="$tiny --max-steps 6 --log-every 1 --eval-every 3 --quiet"
numbers() { cut -d , -f 1,4-8 "$1"; }    # the columns that are the same in every run
column() {                               # FILE NAME: its values, on one line
    awk -F , -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) c = i; next } { print $c }' "$1" | tr '\n' ' '
}
last() { column "$1" "$2" | awk '{ print $NF }'; }

works "train FILE --out --log" train text.txt $six --out base.st --log base.csv
equal "train --quiet says nothing" "0 0" "$(size out) $(size err)"
equal "train --log: header" \
    "step,tokens,seconds,loss,val_loss,val_accuracy,gradient_norm,learning_rate,tokens_per_second,val_bits_per_byte,gflops_per_second" \
    "$(head -n 1 base.csv)"
equal "train --log, --log-every 1, --max-steps 6: a row for each step" "1 2 3 4 5 6 " "$(column base.csv step)"
equal "train --log: eleven columns in each row" 11 "$(awk -F , '{ print NF }' base.csv | sort -u)"
holds "train --log: bits per byte are val_loss / log 2" "($(last base.csv val_bits_per_byte) * log(2) / $(last base.csv val_loss) - 1) ^ 2 < 1e-12"
equal "train --log: bits per byte stand where val_loss does" "$(column base.csv val_loss | tr -d '0-9.')" \
    "$(column base.csv val_bits_per_byte | tr -d '0-9.')"
holds "train --log: GFLOP/s are 6 times 12376 parameters times tokens/s" \
    "($(last base.csv gflops_per_second) - 6e-9 * 12376 * $(last base.csv tokens_per_second)) ^ 2 < 1e-5"
equal "train: a step has --batch times --context tokens" "32 64 96 128 160 192 " "$(column base.csv tokens)"
equal "train --eval-every 3: validates twice" 2 "$(column base.csv val_loss | wc -w | tr -d ' ')"
holds "train: the loss falls" "$(last base.csv loss) < $(column base.csv loss | awk '{ print $1 }') - 0.01"
train text.txt $six --init-std 0.02 --out again.st --log small.csv 2> err
holds "train: small weights start at log 256, the loss of knowing nothing" \
    "($(column small.csv loss | awk '{ print $1 }') - log(256)) ^ 2 < 0.01"
train text.txt $six --out base.st 2> err         # without --log, whose name is in the checkpoint as well
train text.txt $six --out again.st
same_bytes "train: same command, same checkpoint" base.st again.st
train --data text.txt $six --seed 1 --out again.st 2> err
same_bytes "train --data FILE --seed 1 is train FILE" base.st again.st
train text.txt $tiny --max-steps 1 --out again.st > out 2> err
has "train: says that --out is there already and is replaced" err "again.st is there already and will be replaced"
train text.txt $six -o again.st -T 16 -B=2 --lr 0.006 2> err
same_bytes "train -o -T -B --lr are --out --context --batch --learning-rate" base.st again.st
cp text.txt ./-dash
train $six --out again.st -- -dash 2> err
holds "train -- FILE: a name may start with a dash" "$(size again.st) > 1000"

# Each option: its default changes nothing, another value changes what is computed.
effect() {                               # FLAG DEFAULT OTHER
    if [ -n "$2" ]; then
        train text.txt $six "$1" "$2" --out same.st 2> err
        same_bytes "train $1 $2 is the default" base.st same.st
    fi
    train text.txt $six "$1" $3 --out effect.st --log effect.csv 2> err
    differ "train $1 $3 has an effect" "$(numbers base.csv)" "$(numbers effect.csv)"
    rm -f same.st effect.st
}
effect --seed 1 2
effect --context 16 8
effect --batch 2 3
effect --accumulate 1 2
effect --width 16 32
train two.txt $six --out again.st --log mean1.csv 2> err
train two.txt $six --accumulate 3 --out again.st --log mean3.csv 2> err
train text.txt $six --accumulate 3 --out again.st --log mean3x2.csv 2> err
train text.txt $six --batch 6 --out again.st --log mean6.csv 2> err
holds "train --accumulate 3 --batch 2: the sequences of --batch 6" "($(last mean3x2.csv loss) - $(last mean6.csv loss)) ^ 2 < 1e-8"
train two.txt $six --seed 2 --out again.st --log mean2.csv 2> err
differ "train --seed: the initial weights" "$(numbers mean1.csv)" "$(numbers mean2.csv)"
train text.txt $six --init base.st --out again.st --log init1.csv 2> err
train text.txt $six --init base.st --seed 2 --out again.st --log init2.csv 2> err
differ "train --seed: the batches" "$(numbers init1.csv)" "$(numbers init2.csv)"
norm_of() { column "$1" gradient_norm | awk '{ print $1 }'; }
holds "train --accumulate 3: the mean gradient, not the sum" "($(norm_of mean1.csv) / $(norm_of mean3.csv) - 1) ^ 2 < 1e-8"
effect --layers 1 2
effect --heads 2 4
effect --glu-dim 64 32
effect --vocab 256 300
effect --tau 16 4
effect --norm-eps 1e-6 0.5
effect --head-norm-eps 1e-5 0.5
effect --pad-token -1 101                # e
for flag in bos-token eos-token; do
    train text.txt $six --$flag 101 --out $flag.st --log effect.csv
    equal "train --$flag changes no number" "$(numbers base.csv)" "$(numbers effect.csv)"
    train text.txt $six --$flag=-1 --out again.st 2> err
    same_bytes "train --$flag -1 is the default" base.st again.st
done
effect --init-std 0 0.05
effect --residual-scale "" 0.1
effect --gate-scale 8 1
effect --gate-mean 0 200
effect --learning-rate 0.006 0.01
effect --min-lr 0.01 0.9
effect --warmup 0 4
effect --schedule cosine linear
effect --beta1 0.9 0.5
effect --beta2 0.95 0.5
effect --eps 1e-8 0.01
effect --weight-decay 0.1 10
effect --clip 1 0.01
effect --val-fraction 0.1 0.5
effect --eval-batches 64 1
for choice in "--model metala gla" "--conv on off" "--self augment off" "--key tied linear" "--decay dynamic fixed" \
    "--query linear silu" "--phase off rope" "--norm layer rms" "--gate silu sigmoid" "--channels half full" \
    "--expand 0 2"; do
    effect $choice
done
shaped() {                               # FLAG DEFAULT OTHER MODEL that it matters to
    train text.txt $six --model "$4" --out own.st --log own.csv 2> err
    train text.txt $six --model "$4" "$1" "$2" --out same.st --log own.csv 2> err
    same_bytes "train --model $4 $1 $2 is the default" own.st same.st
    train text.txt $six --model "$4" "$1" "$3" --out effect.st --log effect.csv 2> err
    differ "train --model $4 $1 $3 has an effect" "$(numbers own.csv)" "$(numbers effect.csv)"
    rm -f own.st own.csv same.st effect.st
}
shaped --state-size 16 4 s4d
shaped --low-rank 16 4 gla
shaped --feature-dim 16 4 based
shaped --length 0 64 dss
shaped --normaliser on off linear
for unused in "metala state-size" "metala low-rank" "metala feature-dim" "metala length" "mamba heads" "lru tau"; do
    flag=--${unused#* }
    train text.txt $tiny --model "${unused% *}" "$flag" 2 --max-steps 1 --out row.st > out 2> err
    has "train $flag: nothing in model ${unused% *}" err "$flag changes nothing in model ${unused% *}"
    train text.txt $tiny --model "${unused% *}" "$flag" 2 --max-steps 1 --out row.st --quiet > out 2> err
    equal "train $flag --quiet: no word of it" "" "$(cat err)"
done
rm -f row.st
for model in $(run --models | sed -n 's/^\([a-z][a-z0-9-]*\)  .*/\1/p'); do
    train text.txt $six --model "$model" --match-params --out row.st --log row.csv > out 2> err
    equal "train --model $model: the loss is a number" yes "$(awk -F, 'END { print ($4 > 0 && $4 < 20 ? "yes" : "no") }' row.csv)"
    works "run --info of $model" run row.st --info
    has "run --info of $model: its row" out "model        $model: conv " "total"
    equal "train --model $model --match-params: within 5 % of metala" yes \
        "$(awk -v m="$(run base.st --info | awk '$1 == "total" { print $NF }')" \
            '$1 == "total" { print ($NF > 0.95 * m && $NF < 1.05 * m ? "yes" : "no") }' out)"
    works "run of $model" run row.st "a" -n 40 --temperature 0 --quiet
    cp out whole.txt
    works "run of $model, half" run row.st "a" -n 20 --temperature 0 --quiet --save-state row.state
    cp out half.txt
    works "run of $model, the other half" run row.st -n 20 --temperature 0 --quiet --load-state row.state
    cat half.txt out > both.txt
    same_bytes "run of $model: a saved state goes on" whole.txt both.txt
    if [ "$model" = lru ]; then cp row.state lru.state; fi                      # of the same shapes as that of s5
    if [ "$model" = s5 ]; then
        fails 1 "its decay is lru, this model's is zoh" "run --load-state of another row" run row.st --load-state lru.state
    fi
    train text.txt $six --model "$model" --match-params --stop-at 3 --out half.st --log row.csv 2> err
    train --resume --out half.st --quiet --profile > out 2> err
    same_bytes "train --model $model: a resumed run, its kernels timed, is the same" row.st half.st
    has "train --model $model --profile" out "kernel, ms of a step" "matrix products"
done
fails 2 "metala, metala-noconv" "train --model: a row that is not" train text.txt --model nosuch
fails 2 "dynamic|lowrank|fixed" "train --decay: a value that is not" train text.txt --decay nosuch
fails 2 "query taylor and key taylor belong together" "train: choices that do not fit" train text.txt $six --query taylor
fails 2 "the normaliser divides by a sum of weights that must be positive" "train: a normaliser of signed weights" \
    train text.txt $six --model linear --query silu --key silu
train text.txt $six --model gla --out gla.st 2> err
fails 1 "--model: got retnet, but gla.st has gla" "train --resume --model another" train --resume --out gla.st --model retnet
fails 1 "--match-params: metala has " "train --match-params: a mixer that is too large" train text.txt $six --model retnet --expand 16 --match-params
works "run --models" run --models
has "run --models: rows, equations, choices, sizes, papers" out "mamba " "decay selective" "M parameters, state " "Peng 2023"
works "run --conditions" run --conditions
has "run --conditions: a line for each row" out "dynamic memory" "metala  " "no " "keeps all"
for flag in tie glu-bias scale-embedding; do
    train text.txt $six --$flag --out $flag.st --log effect.csv
    differ "train --$flag has an effect" "$(numbers base.csv)" "$(numbers effect.csv)"
    train text.txt $six --$flag=0 --out again.st 2> err
    same_bytes "train --$flag=0 turns it off" base.st again.st
done
train text.txt $six --form recurrent --out again.st --log recurrent.csv 2> err
train text.txt $six --form parallel --out again.st --log parallel.csv 2> err
for form in recurrent parallel; do
    works "train --bench --form $form" train --bench $tiny --form $form
    has "train --form $form is the form that runs" out ", $form, "
    holds "train --form $form: the loss is that of chunkwise" \
        "($(last $form.csv loss) - $(last base.csv loss)) ^ 2 < 1e-8"
done

# The schedule, value by value. The warm-up is 4 of 10 steps, then x = 0 … 1.
rates() {                                # SCHEDULE FORMULA of x
    train text.txt $tiny --quiet --log-every 1 --eval-every 0 --max-steps 10 --warmup 4 --learning-rate 0.01 \
        --min-lr 0.2 \
        --schedule "$1" --out again.st --log rates.csv 2> err
    column rates.csv learning_rate > rates
    if awk "{ for (i = 1; i <= NF; i++) { x = i <= 4 ? 0 : (i - 5) / 6; rate = 0.01 * ($2) * (i <= 4 ? i / 4 : 1)
              if ((\$i / rate - 1) ^ 2 > 1e-10) exit 1 } exit NF != 10 }" rates; then pass "train --schedule $1 --warmup --min-lr: every rate"
    else miss "train --schedule $1 --warmup --min-lr" "expected 0.01 * ($2), got $(cat rates)"; fi
}
rates constant 1
rates linear "0.2 + 0.8 * (1 - x)"
rates cosine "0.2 + 0.8 * (1 + cos(3.14159265358979 * x)) / 2"

# ============================================================== train: validation, samples, progress, memory

works "train --val FILE --eval-batches 0" \
    train text.txt $tiny --max-steps 3 --log-every 1 --eval-every 0 --val other.txt --eval-batches 0 --out val.st \
        --log val.csv
has "train --val FILE: names it" out \
    "text.txt: $(size text.txt) bytes to train on, $(size other.txt) for validation in other.txt"
run val.st --eval other.txt --context 16 --quiet > out
holds "train --val: the loss that run --eval --context finds" \
    "($(last val.csv val_loss) - $(awk '/^loss/ { print $2 }' out)) ^ 2 < 1e-8"
equal "train --eval-every 0: only the last step validates" 1 "$(column val.csv val_loss | wc -w | tr -d ' ')"
works "train --val-fraction 0" train text.txt $tiny --max-steps 1 --val-fraction 0 --out again.st
has "train --val-fraction 0: trains on all, validates nothing" out "$(size text.txt) bytes, no validation"
works "train --val-fraction 0.5" train text.txt $tiny --max-steps 1 --val-fraction 0.5 --out again.st
has "train --val-fraction 0.5: holds out half" out "for validation" "$((($(size text.txt) + 1) / 2)) for"
has "train prints the memory that it takes" out "memory   " "parameters" "gradients" "moments" "activations"
has "train prints the size of the model" out "model    metala D16 L1 H2 F64 N256: 12.4k parameters"
works "train on a text of two bytes" train two.txt $tiny --max-steps 1 --out again.st
has "train on a text of two bytes: too few to hold some out" out "data     two.txt: 2 bytes, no validation: too few"
works "train on bytes of every kind" train odd.txt $tiny --max-steps 1 --out again.st

# Validation on what the training data never has gets worse and worse: the best step is the first.
printf '\001\002\003\004\005\006\007\010\001\002\003\004\005\006\007\010' > never.txt
works "train --keep-best FILE" \
    train text.txt $tiny --max-steps 20 --init-std 0.02 --lr 0.02 --warmup 0 --log-every 1 --eval-every 1 --val never.txt \
        --keep-best best.st --out late.st --log best.csv
has "train --keep-best: says which step was the best" out "at step 1, kept in best.st"
holds "train --keep-best: the validation got worse" \
    "$(last best.csv val_loss) > $(column best.csv val_loss | awk '{ print $1 }')"
run best.st --eval never.txt --context 16 --quiet > out
holds "train --keep-best: the file is the best one" \
    "($(awk '/^loss/ { print $2 }' out) - $(column best.csv val_loss | awk '{ print $1 }')) ^ 2 < 1e-8"

sample_of() { sed -n '/^------ sample at step '"$1"'$/,/^------$/p' "$2" | sed '1d;$d'; }
works "train --sample-every 2 --sample-tokens --prompt --temperature" \
    train text.txt $tiny --max-steps 4 --sample-every 2 --sample-tokens 40 --prompt "The Sun" --out again.st
cp out samples
equal "train --sample-every 2: two samples in 4 steps" 2 "$(grep -c '^------ sample at step [24]$' samples)"
sample_of 2 samples > sample
equal "train --prompt TEXT: a sample continues it" "The Sun" "$(dd if=sample bs=7 count=1 2> /dev/null)"
holds "train --sample-tokens 40: 40 bytes, a newline at the start apart" "$(size sample) == 48 || $(size sample) == 47"
train text.txt $tiny --max-steps 4 --sample-every 4 --sample-tokens 40 --prompt "The Sun" --temperature 0 \
    --out again.st > out 2> err
sample_of 4 samples > sample
sample_of 4 out > greedy
other_bytes "train --temperature 0 samples something else" sample greedy
train text.txt $tiny --max-steps 4 --sample-every 4 --sample-tokens 40 --prompt "The Sun" --temperature 1e-9 \
    --out again.st > out 2> err
sample_of 4 out > sample
same_bytes "train --temperature 0 is the limit of small ones" sample greedy
equal "train --sample-every 0: no sample" 0 \
    "$(train text.txt $tiny --max-steps 2 --out again.st 2> err | grep -c sample)"

train text.txt $tiny --quiet --max-steps 6 --log-every 2 --eval-every 0 --val-fraction 0 --out again.st \
    --log again.csv 2> err
equal "train --log-every 2: rows and the last" "2 4 6 " "$(column again.csv step)"
train text.txt $tiny --quiet --max-steps 6 --log-every 4 --eval-every 0 --val-fraction 0 --out again.st \
    --log again.csv 2> err
equal "train --log-every 4: rows and the last" "4 6 " "$(column again.csv step)"
works "train --max-seconds" train text.txt $tiny --max-seconds 0.3 --log-every 1 --out timed.st --log timed.csv
has "train --max-seconds: says so" out "; 0.3 seconds"
holds "train --max-seconds: stops at the clock, not earlier" \
    "$(last timed.csv seconds) >= 0.3 && $(last timed.csv seconds) < 30"
holds "train --max-seconds: the schedule follows the clock" "$(last timed.csv learning_rate) < 0.002"
works "train --resume --max-seconds that have passed" train --resume --out timed.st
has "train --resume: nothing left to do" out "nothing left to do"

works "train --bench" train --bench $tiny
has "train --bench: sizes, time, speed" out "bench metala D16 L1 H2 F64 N256 B2 T16 P 12.4k: " "ms/step" "tokens/s" \
    "GFLOP/s" "1 thread"
equal "train --bench: one line" 1 "$(lines out)"
works "train --bench: 6 layers unless given" train --bench --width 16 --heads 2 --context 8 --batch 1 --threads 1
has "train --bench: 6 layers unless given, the line" out "D16 L6"
works "train --version" train --version
has "train --version: version and precision" out "metala " "float"
works "train --help" train --help
cp out help
works "train -h" train -h
same_bytes "train -h is --help" help out
equal "train --help: no line is longer than 120" 0 "$(awk 'length > 120' help | wc -l | tr -d ' ')"
works "train -q" train text.txt $tiny --max-steps 1 -q --out quiet.st
equal "train -q is --quiet" 0 "$(size out)"

# More work than fits one thread's share, so that threads do start.
for threads in 1 2 3; do
    train text.txt --width 32 --layers 2 --heads 2 --context 64 --batch 4 --max-steps 3 --sample-every 0 --quiet \
        --threads $threads --out threads$threads.st
done
same_bytes "train --threads 1 and 2: the same checkpoint" threads1.st threads2.st
same_bytes "train --threads 1 and 3: the same checkpoint" threads1.st threads3.st
works "train --threads 3" train --bench $tiny --threads 3
if grep -q openmp "$root/build/flags" 2> /dev/null || train --bench $tiny --threads 2 | grep -q "2 threads"; then
    has "train --threads 3 starts 3" out "3 threads"
else has "train --threads 3 without OpenMP: one" out "1 thread"; fi

# Without a GPU, or a build for one, the CPU does it and says why; with one, the line says so.
works "train --device cpu" train --bench $tiny --device cpu
has "train --device cpu is the default" out "1 thread"
for math in exact tf32 bf16; do
    works "train --device cuda --math $math" train --bench $tiny --device cuda --math $math
    if [ -s err ]; then
        has "train --device cuda, which is not there" err "--device cuda: " "going on with the CPU"
        has "train --device cuda, which is not there: the CPU" out "1 thread"
    else has "train --device cuda --math $math" out "cuda"; fi
done

train text.txt $six --layers 2 --out all.st > out 2> err
for flag in "" --keep-all --checkpoint-layers; do
    train --bench $tiny --layers 2 --context 64 --batch 16 $flag | sed 's/.*, \([0-9.]*\) MB$/\1/' > "memory$flag"
    rm -f kept.st
    train text.txt $six --layers 2 $flag --out kept.st > out 2> err
    same_bytes "train $flag: the same checkpoint" all.st kept.st
done
holds "train --keep-all: more memory" "$(cat memory--keep-all) > $(cat memory)"
holds "train --checkpoint-layers: less memory" "$(cat memory--checkpoint-layers) < $(cat memory)"
fails_at_once 2 "--keep-all and --checkpoint-layers: expected one of them" "train --keep-all --checkpoint-layers" \
    train text.txt --keep-all --checkpoint-layers
rm -f kept.st
train text.txt $six --layers 2 --profile --out kept.st > out 2> err
same_bytes "train --profile: the same checkpoint" all.st kept.st
has "train --profile: the time of each kernel" out "kernel, ms of a step" "matrix products" "decay scan" AdamW
equal "train --profile: says no more than that with --quiet" "" "$(grep -v -e '^[a-zA-Z]' -e '^$' out)"
works "train --bench --profile" train --bench $tiny --profile
has "train --bench --profile: the table, and the line" out "kernel, ms of a step" "bench metala D16"

# ============================================================== train: stopping, going on, starting from a model

works "train --stop-at 3" train text.txt $six --stop-at 3 --out cut.st --log cut.csv
equal "train --stop-at 3: three steps" "1 2 3 " "$(column cut.csv step)"
other_bytes "train --stop-at 3: not finished yet" base.st cut.st
works "train --resume" train --resume --quiet --threads 1 --out cut.st
equal "train --resume: continues the table, with the same numbers" "$(numbers base.csv)" "$(numbers cut.csv)"
train text.txt $six --out unbroken.st --log cut.csv
same_bytes "train --stop-at 3, --resume: the checkpoint of an unbroken run" unbroken.st cut.st
train text.txt $six --accumulate 3 --no-augment --tie --out unbroken.st 2> err
train text.txt $six --accumulate 3 --no-augment --tie --stop-at 2 --out cut.st 2> err
train --resume --stop-at 5 --quiet --threads 1 --out cut.st
train --resume --quiet --threads 1 --out cut.st
same_bytes "train --accumulate 3, twice stopped and resumed: the same bytes" unbroken.st cut.st
wide="--norm-eps 0.01 --head-norm-eps 0.02 --scale-embedding --pad-token 101 --bos-token 84 --eos-token 10"
train text.txt $six $wide --out unbroken.st 2> err
train text.txt $six $wide --stop-at 2 --out cut.st 2> err
train --resume --quiet --threads 1 --out cut.st
same_bytes "train $wide, stopped and resumed: the same bytes" unbroken.st cut.st
works "run --info of it" run cut.st --info
has "run --info: epsilons, scale and tokens of train's flags" out "pad 101, begin 84, end 10" "times the root of the width" \
    "epsilon 0.01, of the head norm 0.02"
fails 1 "--norm-eps: got 0.03, but cut.st has 0.01" "train --resume --norm-eps of another value" \
    train --resume --out cut.st --max-steps 8 --norm-eps 0.03
fails 1 "--eos-token: got 11, but cut.st has 10" "train --resume --eos-token of another value" \
    train --resume --out cut.st --eos-token 11
train labels.safetensors $six --out unbroken.st 2> err
train labels.safetensors $six --stop-at 4 --out cut.st 2> err
train --resume --quiet --threads 1 --out cut.st
same_bytes "train on sequences, stopped and resumed: the same bytes" unbroken.st cut.st
works "train --resume of a run that has finished" train --resume --out cut.st
has "train --resume: says that nothing is left" out "nothing left to do; a larger --max-steps"
works "train --resume --max-steps 8 --lr" train --resume --out cut.st --max-steps 8 --lr 0.001
has "train --resume: says which settings are others" err "--learning-rate is now 0.001, was 0.006" \
    "--max-steps is now 8, was 6"
has "train --resume --max-steps 8: goes on to 8" out "resumed  cut.st after step 6" "the model after step 8"
train text.txt $six --stop-at 3 --out cut.st --log other.csv
sed '1s/,gflops_per_second//' other.csv > old.csv
cp old.csv other.csv
fails 1 "other.csv: cannot go on with a table of other columns" "train --resume on a log with other columns" \
    train --resume --threads 1 --out cut.st
same_bytes "train --resume on a log with other columns: it stays as it was" old.csv other.csv
works "train --resume --log of another name" train --resume --quiet --threads 1 --out cut.st --log new.csv
equal "train --resume --log of another name: begins with the columns" "$(head -n 1 base.csv)" "$(head -n 1 new.csv)"
equal "train --resume --log of another name: goes on with the next step" "4 5 6 " "$(column new.csv step)"
rm -f new.csv
train text.txt $six --stop-at 3 --out model.safetensors
train --resume --quiet --threads 1
same_bytes "train --resume without --out goes on with model.safetensors" base.st model.safetensors
rm -f model.safetensors
train text.txt $tiny --quiet --max-steps 1
holds "train writes model.safetensors unless told" "$(size model.safetensors) > 1000"

works "train --init FILE" \
    train text.txt --init base.st --context 16 --batch 2 --threads 1 --sample-every 0 --max-steps 6 --log-every 1 \
        --out init.st --log init.csv
has "train --init: the configuration of the file holds" out "model    metala D16 L1 H2 F64 N256"
holds "train --init: starts where the model was" \
    "$(column init.csv loss | awk '{ print $1 }') < $(column base.csv loss | awk '{ print $1 }') - 0.01"
equal "train --init: counts steps from 1" "1 2 3 4 5 6 " "$(column init.csv step)"
cp base.st own.st
works "train --init FILE --out FILE" train text.txt --init own.st $six --out own.st
other_bytes "train --init FILE --out FILE: the same file may be both" base.st own.st
works "train --bench --init of a plain model" train --bench --init zero.safetensors --batch 1 --context 4 --threads 1
has "train --bench --init: its sizes" out "bench metala D2 L1 H1 F1 N2 B1 T4"

# Ctrl-C: the step is finished, the checkpoint is that of this step, and the printed command goes on.
# Long enough to be interrupted, but nothing that is not noticed goes on for ever.
long="text.txt $tiny --max-steps 200000 --schedule constant --eval-every 0 --log-every 1"
for signal in HUP INT TERM; do
    case $signal in INT) code=130 ;; TERM) code=143 ;; *) code=129 ;; esac
    begin train $long --out "it's $signal.st" --log $signal.csv
    await "train starts" [ -s $signal.csv ]
    kill -$signal $started
    finish
    equal "train, kill -$signal: exit status" $code $status
    has "train, kill -$signal: says how to go on" back.out "stopped; go on with:" \
        "--resume --out 'it'\\''s $signal.st' --threads 1"
    steps=$(last $signal.csv step)
    train $long --quiet --stop-at "$steps" --out stopped.st --log $signal.csv
    same_bytes "train, kill -$signal: the checkpoint of step $steps, whole" "it's $signal.st" stopped.st
    rm -f stopped.st
done
command=$(sed -n 's/^stopped; go on with: //p' back.out)
eval "$command --stop-at $((steps + 2))" > out 2> err
has "train, kill: the printed command does go on" out "resumed  it's TERM.st after step $steps" \
    "the model after step $((steps + 2))"

# A step that takes minutes: the first Ctrl-C waits for its end, the second does not.
begin train text.txt $tiny --accumulate 50000 --out never.st
await "train starts" grep -q AdamW back.out
pause
kill -INT $started
pause
runs_on "train, first Ctrl-C: waits for the step"
kill -INT $started
finish
equal "train, second Ctrl-C: exit status" 130 $status
absent "train, second Ctrl-C: no checkpoint of half a step" never.st

for every in 1 0; do
    begin train $long --save-every $every --out saved$every.st --log saved$every.csv
    await "train starts" [ -s saved$every.csv ]
    [ $every = 0 ] || await "train --save-every 1 saves" [ -s saved1.st ]
    await "train goes on" grep -q '^3,' saved$every.csv
    kill -9 $started
    finish
done
works "train --save-every 1, kill -9: a whole checkpoint is there" run saved1.st --info
absent "train --save-every 0, kill -9: none is there" saved0.st

# ============================================================== train: sequences of tokens

six="--width 16 --layers 1 --heads 2 --batch 4 --threads 1 --max-steps 6 --log-every 1 --eval-every 3"
works "train on labels" train labels.safetensors $six --out labels.st --log labels.csv
has "train on labels: describes them" out "11 sequences of 4 tokens to train on, 1 for validation" "N12"
has "train on labels: accuracy and perplexity" out perplexity accuracy
train labels.safetensors $six --init-std 0.02 --out again.st --log small.csv 2> err
holds "train on labels: small weights start at log 12" "($(column small.csv loss | awk '{ print $1 }') - log(12)) ^ 2 < 0.01"
holds "train on labels: the accuracy is in the table" \
    "$(last labels.csv val_accuracy) >= 0 && $(last labels.csv val_accuracy) <= 1"
train labels.safetensors --width 32 --layers 1 --heads 2 --batch 11 --threads 1 --max-steps 200 --lr 0.02 --quiet \
    --out recall.st \
    --val labels.safetensors --log recall.csv
equal "train on labels: learns the first token by heart" 1 "$(last recall.csv val_accuracy)"
works "train on targets" train targets.safetensors $six --out targets.st --log targets.csv
differ "train on targets: they are not labels" "$(numbers labels.csv)" "$(numbers targets.csv)"
train ones.safetensors $six --quiet --out again.st --log ones.csv 2> err
train left.safetensors $six --quiet --out again.st --log left.csv 2> err
equal "train with a mask of ones: as without one" "$(numbers labels.csv)" "$(numbers ones.csv)"
differ "train with padding on the left: not as without" "$(numbers labels.csv)" "$(numbers left.csv)"
works "train --vocab 40 on tokens up to 11" train labels.safetensors $six --vocab 40 --out again.st
has "train --vocab 40: has them" out "N40"
works "train --context 4 on sequences of 4" train labels.safetensors $six --context 4 --out again.st
fails 1 "sequences of 4 tokens, at most 3 are wanted" "train --context 3 on sequences of 4" \
    train labels.safetensors $six --context 3 --out new.st
fails 1 "either targets [N,T] or labels [N], this one has neither" "train on neither targets nor labels" \
    train neither.safetensors $six --out new.st
fails 1 "this one has both" "train on both targets and labels" train both.safetensors $six --out new.st
fails 1 "labels has shape [6,2], expected [12]" "train on labels of a wrong shape" \
    train shape.safetensors $six --out new.st
fails 1 "inputs are F32 [3,4], expected whole numbers" "train on inputs that are not whole numbers" \
    train floats.safetensors $six --out new.st
fails 1 "number 0 is -5, expected a token" "train on a negative label" train negative.safetensors $six --out new.st
fails 1 "no target in it counts" "train where all targets are ignored" \
    train ignored.safetensors $six --out new.st --quiet
fails 1 "no target in it counts" "train --val where all targets are ignored" \
    train half.safetensors --width 16 --layers 1 --batch 1 --max-steps 1 --val ignored.safetensors --out new.st --quiet
works "train where some batches have no target" \
    train half.safetensors --width 16 --layers 1 --val-fraction 0 --batch 1 --max-steps 6 --out half.st --quiet
{ put_header "{\"__metadata__\":{\"vocab_size\":\"4x\"},$(tensor inputs U8 1,4 0 4),$(tensor labels I32 1 4 8)}"
  put_u8 1 2 3 4; put_i32 1; } > vocab.safetensors
fails 1 "vocab_size in the metadata is '4x', expected a number from 5" "train on a vocabulary that is not a number" \
    train vocab.safetensors --width 16 --layers 1 --out new.st
fails 1 "bad header" "train on a damaged header" train json.safetensors $six --out new.st
fails 1 "no tensor called inputs" "train on a safetensors file without inputs" train zero.safetensors $six --out new.st
fails 1 "labels.safetensors holds tokens and text.txt holds text" "train on sequences, --val on a text" \
    train labels.safetensors $six --val text.txt --out new.st
fails 2 "needs a vocabulary of 12, the model has 5; leave out --vocab" "train --vocab below what the data needs" \
    train labels.safetensors $six --vocab 5 --out new.st
absent "train: what fails before it starts leaves no file" new.st

# ============================================================== train: images patch by patch

works "train on patches" train images.safetensors $six --out images.st --log images.csv
has "train on patches: describes them" out "11 sequences of 4 patches of 3 bytes to train on, 1 for validation" "N4 C3:"
train images.safetensors --val images.safetensors --width 32 --layers 1 --heads 2 --batch 6 --threads 1 --max-steps 150 \
    --lr 0.02 --quiet --out bright.st --log bright.csv
equal "train on patches: finds the brightest" 1 "$(last bright.csv val_accuracy)"
train images.safetensors $six --stop-at 3 --out again.st --log images.csv 2> err
works "train --resume on patches" train --resume --out again.st --threads 1
same_bytes "train --resume on patches: the same bits" images.st again.st
works "train --init on patches" train images.safetensors --init bright.st --max-steps 3 --threads 1 --out again.st
has "train --init on patches: the configuration of the file holds" out "D32 L1" "N4 C3:"
works "train on a target for each patch, with a mask" train each.safetensors $six --out each.st
has "train on a target for each patch: their classes" out "N12 C3:"
works "train --bench --init of patches" train --bench --init images.st --batch 2 --context 5 --threads 1
fails 1 "targets has shape [4,12], expected [12,4]" "train on targets of another shape than patches" \
    train unlike.safetensors $six --out new.st
fails 1 "images.safetensors holds patches of 3 bytes and labels.safetensors holds tokens" "train on patches, --val on tokens" \
    train images.safetensors $six --val labels.safetensors --out new.st
fails 1 "images.safetensors holds patches of 3 bytes, the model reads tokens; give data of this kind or train anew" "train --init of tokens on patches" \
    train images.safetensors --init labels.st --max-steps 6 --out new.st
fails 1 "labels.safetensors holds tokens, the model reads patches of 3 bytes" "train --init of patches on tokens" \
    train labels.safetensors --init images.st --max-steps 6 --out new.st
fails 1 "text.txt holds text, the model reads patches of 3 bytes" "train --init of patches on a text" \
    train text.txt --init images.st --max-steps 6 --out new.st
fails 1 "text.txt holds text, the model reads patches of 3 bytes" "train --resume of patches on a text" \
    train text.txt --resume --out images.st --max-steps 9
for flag in tie scale-embedding; do
    fails 2 "needs an embedding, patches (patch_dim 3) have none; leave it out" "train --$flag on patches" \
        train images.safetensors $six --$flag --out new.st
done
fails 2 "needs 4 classes, the model has 3; leave out --vocab" "train --vocab below the classes of patches" \
    train images.safetensors $six --vocab 3 --out new.st
fails 1 "each.safetensors needs 12 classes, the model has 4" "train --init of patches with fewer classes" \
    train each.safetensors --init images.st --max-steps 6 --out new.st
absent "train on patches: what fails before it starts leaves no file" new.st

# ============================================================== train: what must fail

cp text.txt copy.txt
fails_at_once 2 "no data given" "train without data" train
fails_at_once 2 "got a second argument 'other.txt'" "train with two files" train text.txt other.txt
fails_at_once 2 "unknown option --learning-rat; did you mean --learning-rate?" "train --learning-rat" \
    train text.txt --learning-rat 1
fails_at_once 2 "unknown option --xyzzyplugh; train --help" "train --xyzzyplugh" train missing.txt --xyzzyplugh
fails_at_once 2 "unknown option -z; train --help" "train -z" train missing.txt -z
fails_at_once 2 "unknown option --a?b" "train with a control character in an option" train "$(printf -- '--a\nb')"
fails_at_once 1 "c?d: cannot be opened" "train with a control character in a name" train "$(printf 'c\033d')"
fails_at_once 2 "got '2', expected a whole number from 0 to 1" "train --tie=2" train missing.txt --tie=2
fails_at_once 2 "got 'sine', expected cosine|constant|linear" "train --schedule sine" train missing.txt --schedule sine
fails_at_once 2 "got 'loop', expected chunkwise|recurrent|parallel" "train --form loop" train missing.txt --form loop
fails_at_once 2 "got 'gpu', expected cpu|cuda" "train --device gpu" train missing.txt --device gpu
fails_at_once 2 "got 'fast', expected exact|tf32|bf16" "train --math fast" train missing.txt --device cuda --math fast
fails_at_once 2 "expected --device cuda" "train --math without a GPU" train missing.txt --math tf32
fails_at_once 2 "got nothing, expected TEXT" "train --prompt with an empty text" train missing.txt --prompt ""
fails_at_once 2 "got '1e3', expected a whole number" "train --width 1e3" train missing.txt --width 1e3
fails_at_once 2 "got 'nan', expected a number" "train --learning-rate nan" train missing.txt --learning-rate nan
fails_at_once 2 "got '', expected a number" "train --tau=" train missing.txt --tau=
# Every option with an argument needs it, and every number has limits.
train --help | sed -n 's/^  \(--[a-z0-9-]*\), *-[-a-zA-Z]*/  \1/; s/^  --\([a-z0-9-]*\) \([A-Za-z|]\).*/\1 \2/p' > arguments
wrong=
while read -r flag rest; do refused train "--$flag" "got nothing, expected"; done < arguments
equal "train: each of the $(lines arguments) options with an argument says so when it is missing" "" "$wrong"
wrong=
for flag in val-fraction context batch accumulate width layers heads glu-dim vocab tau norm-eps head-norm-eps pad-token \
    bos-token eos-token init-std residual-scale gate-scale gate-mean \
    learning-rate min-lr warmup max-steps max-seconds beta1 beta2 eps weight-decay clip seed log-every eval-every eval-batches save-every \
    sample-every sample-tokens temperature stop-at threads; do
    for value in -2 1e31 x 5x 1- -; do refused train "--$flag" "got '$value', expected a .*number from" $value; done
done
equal "train: numbers out of range are refused" "" "$wrong"

fails_at_once 1 "missing.txt: cannot be opened" "train on a file that is not there" train missing.txt $tiny --out new.st
fails_at_once 1 "folder: cannot be read; is it a file?" "train on a folder" train folder $tiny --out new.st
fails_at_once 1 "empty.txt: 0 bytes" "train on an empty text" train empty.txt $tiny --out new.st
fails_at_once 1 "one.txt: 1 byte" "train on a text of one byte" train one.txt $tiny --out new.st
fails_at_once 1 "missing.txt: cannot be opened" "train --val that is not there" \
    train text.txt $tiny --val missing.txt --out new.st
fails_at_once 2 "heads must divide width/2 = 8; try --heads 2 or --width 18" "train --heads 3 --width 16" \
    train text.txt $tiny --heads 3 --out new.st
fails_at_once 2 "heads must divide width/2 = 10; try --heads 2 or --width 24" "train --width 20, with 4 heads unless given" \
    train text.txt --width 20 --out new.st
fails_at_once 2 "heads must divide width/2 = 4; try --heads 4 or --width 18" "train --heads 9 --width 8" \
    train text.txt --width 8 --heads 9 --out new.st
fails_at_once 2 "--width: got 7, expected an even number; try --width 8" "train --width 7" \
    train text.txt $tiny --width 7 --out new.st
fails_at_once 2 "--width: got 7, expected an even number" "train --bench --width 7" train --bench --width 7
fails_at_once 2 "try --heads 2 or --width 258" "train --bench --heads 3, of the width 256" train --bench --heads 3
fails_at_once 2 "needs a vocabulary of 256, the model has 100; leave out --vocab" "train --vocab 100 on a text" \
    train text.txt $tiny --vocab 100 --out new.st
for flag in pad-token bos-token eos-token; do
    fails_at_once 2 "--$flag: got 256, expected a token of the vocabulary, 0 to 255" "train --$flag 256 on a text" \
        train text.txt $tiny --$flag 256 --out new.st
done
fails_at_once 1 "out of memory" "train --width 4194304" train text.txt $tiny --width 4194304 --glu-dim 16 --out new.st
fails_at_once 2 "expected at most 6291456 without --glu-dim" "train --width 16777216" \
    train text.txt $tiny --width 16777216 --out new.st
fails_at_once 1 "out of memory" "train --layers 16000000" train text.txt $tiny --layers 16000000 --out new.st
fails_at_once 2 "--layers: got '1000000000', expected a whole number from 1 to 16777216" "train --layers 1000000000" train text.txt $tiny --layers 1000000000 --out new.st
fails_at_once 2 "expected at most 2147483647 tokens" "train --batch 1000000000" train text.txt $tiny --batch 1000000000 --out new.st
fails_at_once 1 "out of memory" "train --context 1000000000" train text.txt $tiny --batch 1 --context 1000000000 --out new.st
fails_at_once 2 "--vocab: got '1000000000', expected" "train --vocab 1000000000" train text.txt $tiny --vocab 1000000000 --out new.st
fails_at_once 1 "out of memory" "train --bench --width 4194304" train --bench --width 4194304 --glu-dim 16
fails_at_once 1 "missing.st: cannot be opened" "train --bench --init that is not there" train --bench --init missing.st
fails_at_once 1 "no/model.st.tmp: cannot be written" "train --out in a folder that is not there" \
    train text.txt $tiny --out no/model.st
fails_at_once 1 "folder: is not a regular file" "train --out a folder" train text.txt $tiny --out folder
fails_at_once 1 "folder: is not a regular file" "train --keep-best a folder" \
    train text.txt $tiny --out new.st --keep-best folder
fails_at_once 1 "folder: cannot be written" "train --log a folder" train text.txt $tiny --out new.st --log folder
fails_at_once 1 "no/log.csv: cannot be written" "train --log in a folder that is not there" \
    train text.txt $tiny --out new.st --log no/log.csv
fails_at_once 1 "no/log.csv: cannot be written" "train --log in a folder that is not there, also of data that is not there" \
    train missing.txt $tiny --out base.st --log no/log.csv
cp base.csv kept.csv
fails_at_once 1 "out of memory" "train --log on a table, --layers 16000000" \
    train text.txt $tiny --layers 16000000 --out base.st --log base.csv
same_bytes "train: a log stays as it was until training begins" base.csv kept.csv
mkfifo pipe
fails_at_once 1 "pipe: is not a regular file" "train --out that is no file" train text.txt $tiny --out pipe
fails_at_once 2 "text.txt would be overwritten" "train --out on its data" train text.txt $tiny --out text.txt
fails_at_once 2 "text.txt would be overwritten" "train --out on its data by another name" \
    train text.txt $tiny --out ./folder/../text.txt
fails_at_once 2 "other.txt would be overwritten" "train --keep-best on --val" \
    train text.txt $tiny --val other.txt --keep-best other.txt --out new.st
fails_at_once 2 "new.st would be overwritten" "train --keep-best on --out" train text.txt $tiny --keep-best new.st --out new.st
fails_at_once 2 "base.st would be overwritten" "train --log on --init" \
    train text.txt $tiny --init base.st --log base.st --out new.st
same_bytes "train: none of these touched the text" text.txt copy.txt
absent "train: none of these left a file" new.st
absent "train: none of these left a file" log.csv
works "train --quiet where --out is there already" train text.txt $tiny --max-steps 1 --quiet --out quiet.st
equal "train --quiet says nothing about it" "0 0" "$(size out) $(size err)"
works "train --resume --quiet with other settings" train --resume --quiet --threads 1 --max-steps 2 --lr 0.001 --out quiet.st
equal "train --resume --quiet says nothing about them" "0 0" "$(size out) $(size err)"
if [ "$(id -u)" -ne 0 ]; then
    mkdir locked && chmod 500 locked
    fails_at_once 1 "locked/model.st.tmp: cannot be written" "train --out in a folder that cannot be written to" \
        train text.txt $tiny --out locked/model.st
fi
fails_at_once 2 "got --resume and --init" "train --resume --init" train --resume --init base.st
fails_at_once 1 "missing.st: cannot be opened" "train --resume without a checkpoint" train --resume --out missing.st
fails_at_once 1 "not a safetensors file" "train --resume of a text" train --resume --out text.txt
fails_at_once 1 "no settings in it; start from it with --init" "train --resume of a plain model" \
    train --resume --out zero.safetensors
for bytes in 0 7 100 5000; do
    dd if=base.st of=short.st bs=1 count=$bytes 2> /dev/null
    fails_at_once 1 "short.st: " "train --resume of a checkpoint cut to $bytes bytes" train --resume --out short.st
    fails_at_once 1 "short.st: " "train --init of a model cut to $bytes bytes" train text.txt $tiny --init short.st --out new.st
    fails_at_once 1 "short.st: " "run a model cut to $bytes bytes" run short.st
done
dd if=base.st of=short.st bs=$(($(size base.st) - 1)) count=1 2> /dev/null
fails_at_once 1 "short.st: " "run a model without its last byte" run short.st
cp base.st kept.st
fails_at_once 1 "--width: got 32, but base.st has 16" "train --resume --width of another size" \
    train --resume --out base.st --max-steps 9 --width 32
fails_at_once 2 "text.txt would be overwritten" "train --resume --log on the data" \
    train --resume --out base.st --max-steps 9 --log text.txt
fails_at_once 1 "--tau: got 3, but base.st has 16" "train --resume --tau of another value" train --resume --out base.st --tau 3
fails_at_once 1 "--layers: got 2, but base.st has 1" "train --init --layers of another number" \
    train text.txt --init base.st --layers 2 --out new.st
same_bytes "train: none of these touched the checkpoint" base.st kept.st

# A run that diverges ends with a line, and the checkpoint before it stays.
fails 1 "training has diverged; no checkpoint was written yet; try a lower --learning-rate than 1e+30" "train --learning-rate 1e30" \
    train text.txt $tiny --lr 1e30 --warmup 0 --out new.st
absent "train --learning-rate 1e30: writes no broken model" new.st
train --resume --out base.st --lr 1e30 --max-steps 60 --save-every 1 > out 2> err
equal "train --resume --learning-rate 1e30: exit status" 1 $?
has "train --resume --learning-rate 1e30: which checkpoint is left" err \
    "training has diverged; base.st is still that of step"
steps=$(sed -n 's/.*is still that of step \([0-9]*\);.*/\1/p' err)
works "train: what a diverging run leaves can be used" run base.st hello -n 5 --quiet
works "train: what a diverging run leaves can be trained" \
    train --resume --out base.st --lr 0 --stop-at $((steps + 1))
has "train: what a diverging run leaves is of the step that it says" out "resumed  base.st after step $steps"
rm -f base.st && cp kept.st base.st
train --resume --out base.st --lr 1e30 --clip 0 --warmup 0 --schedule constant --max-steps 60 \
    --save-every 0 > out 2> err
same_bytes "train: a diverging run leaves the last good checkpoint as it was" base.st kept.st

# Not a number in the first row of the embedding: whatever reads a byte 0 sees it.
cp base.st broken.st
start=$(od -A n -t u1 -N 2 base.st | awk '{ print 8 + $1 + 256 * $2 }')
put_u8 255 255 255 255 255 255 255 255 | dd of=broken.st bs=1 seek="$start" conv=notrunc 2> /dev/null
printf '\000\000\000\000\000\000\000\000' > zeros.txt
fails 1 "the loss is not a number, training has diverged" "train --init of broken parameters" \
    train zeros.txt --init broken.st $tiny --out new.st
fails 1 "are not finite numbers; the parameters are broken" "run with broken parameters" \
    run broken.st --prompt-file zeros.txt -q --no-echo
fails 1 "the parameters are broken" "run --eval with broken parameters" run broken.st --eval zeros.txt -q

# Memory that runs out, or anything else that stops a kernel: what was learnt before it is kept, and goes on.
failing() {                              # FROM TO ARGUMENT...: the calls of a pass that fail
    FAIL_FROM=$1 FAIL_TO=$2
    export FAIL_FROM FAIL_TO
    shift 2
    $limit "$root/build/train-failing" "$@"
}
four="text.txt $tiny --max-steps 4 --log-every 1"
keeps() {                                # DESCRIPTION STEP FROM TO FLAG...: what is kept is of that step
    name=$1 step=$2 from=$3 to=$4
    shift 4
    rm -f failed.st
    fails 1 "call $from failed on request" "$name" failing $from $to $four "$@" --out failed.st
    train $four "$@" --out unbroken.st > out 2> err
    train --resume --threads 1 --out failed.st > out 2> err
    has "$name: what was learnt by step $step is kept" out "resumed  failed.st after step $step"
    same_bytes "$name: and goes on as if nothing had been" unbroken.st failed.st
}
keeps "train, memory runs out in step 4" 3 4 2000000000 --val-fraction 0
keeps "train, the gradient of step 3 fails once" 2 3 3 --val-fraction 0
keeps "train, memory runs out in the second pass of step 2" 1 4 2000000000 --val-fraction 0 --accumulate 2
keeps "train, memory runs out in a validation" 2 3 2000000000 --eval-every 2
keeps "train, memory runs out in a sample" 2 3 2000000000 --val-fraction 0 --sample-every 2
fails 1 "call 1 failed on request" "train, memory runs out in step 1" failing 1 2000000000 $four --out never.st
absent "train, memory runs out in step 1: there is nothing to keep" never.st
cp unbroken.st failed.st
fails 1 "call 1 failed on request" "train --resume, memory runs out" \
    failing 1 2000000000 --resume --max-steps 9 --threads 1 --quiet --out failed.st
same_bytes "train --resume, memory runs out: the checkpoint stays" unbroken.st failed.st

# Full disks: /dev/full for what is printed, a limit on the size of files for what is saved.
if [ -c /dev/full ]; then
    text="standard output: cannot be written"
    for command in "train --help" "train --bench $tiny" "train text.txt --max-steps 1 --out full.st $tiny" \
        "run --help" "run --version" "run base.st --info" "run base.st hello" "run base.st --eval other.txt -q"; do
        want=1 name="${command%% --width*} > /dev/full: exit 1, one clear line"
        $command > /dev/full 2> err
        complained $?
    done
    rm -f full.st
    fails 1 "/dev/full: cannot be written" "train --log /dev/full" train text.txt $tiny --out full.st --log /dev/full
    absent "train --log /dev/full: noticed before the first step" full.st
fi
cp base.st disk.st
if (trap '' XFSZ && ulimit -f 64) 2> /dev/null; then
    (trap '' XFSZ; ulimit -f 64; train --resume --out disk.st --max-steps 8 > out 2> err; echo $? > status)
    equal "train on a full disk: exit status" 1 "$(cat status)"
    has "train on a full disk: says so" err "disk.st.tmp: writing failed, is the disk full?"
    same_bytes "train on a full disk: the checkpoint before stays" disk.st base.st
    absent "train on a full disk: nothing half is left" disk.st.tmp
    (trap '' XFSZ; ulimit -f 1; run threads1.st hello -n 2 -q --save-state disk.state > out 2> err; echo $? > status)
    equal "run --save-state on a full disk: exit status" 1 "$(cat status)"
    has "run --save-state on a full disk: says so" err "disk.state.tmp: writing failed, is the disk full?"
    absent "run --save-state on a full disk: nothing half is left" disk.state.tmp
fi
tried train train

# ============================================================== run: writing and sampling

train text.txt --width 32 --layers 2 --heads 2 --context 64 --batch 8 --threads 1 --max-steps 150 --lr 0.01 \
    --quiet --out m.st
ask() { run m.st "One day" --threads 1 "$@"; }
quiet() { ask --quiet "$@"; }
works "run MODEL PROMPT" ask -n 60 --temperature 0
mv out greedy
equal "run: 60 tokens behind the prompt" 67 "$(size greedy)"
equal "run: the prompt is repeated" "One day" "$(dd if=greedy bs=7 count=1 2> /dev/null)"
has "run: says what it read and wrote" err "read 7 tokens" "wrote 60 tokens" "position 67"
quiet -n 60 --temperature 0 > out 2> err
equal "run --quiet: nothing but the text" 0 "$(size err)"
same_bytes "run --quiet: the same text" greedy out
ask -q -n 60 --temperature 0 > out 2> err
equal "run -q is --quiet" 0 "$(size err)"
quiet --tokens=60 --temperature=0 > out
same_bytes "run --tokens=60 is -n 60" greedy out
quiet --tokens 0 > out
equal "run --tokens 0: nothing" 0 "$(size out)"
equal "run: 256 tokens unless told" 263 "$(quiet --temperature 0 | wc -c | tr -d ' ')"
quiet -n 60 --temperature 0 --no-echo > out
tail -c +8 greedy > rest
same_bytes "run --no-echo: without the prompt" rest out
printf 'One day' | run m.st - -q --threads 1 -n 60 --temperature 0 > out
same_bytes "run MODEL -: the prompt from standard input" greedy out
printf 'One day' > prompt.txt
run m.st --prompt-file prompt.txt -q --threads 1 -n 60 --temperature 0 > out
same_bytes "run --prompt-file" greedy out
works "run --prompt-file with a byte 0, control characters and bytes above 127" \
    run m.st --prompt-file odd.txt -q -n 1 --temperature 0
dd if=out of=start bs="$(size odd.txt)" count=1 2> /dev/null
same_bytes "run --prompt-file: repeats these bytes as they are" odd.txt start
works "run without a prompt" run m.st -n 5 --temperature 0 --quiet
equal "run without a prompt: writes" 5 "$(size out)"
printf '\n' | run m.st - -q --threads 1 -n 60 --temperature 0 --no-echo > expected
run m.st -q --threads 1 -n 60 --temperature 0 > out
same_bytes "run without a prompt: as after a newline" expected out
run bos-token.st e -q --threads 1 -n 60 --temperature 2 --seed 1 --no-echo > expected
run bos-token.st -q --threads 1 -n 60 --temperature 2 --seed 1 > out
same_bytes "run a model with a begin token without a prompt: as after that" expected out
run base.st hello -q --threads 1 -n 2000 --temperature 2 --seed 1 --no-echo | tr '\n' ' ' | sed 's/e.*//' > expected
run eos-token.st hello -q --threads 1 -n 2000 --temperature 2 --seed 1 --no-echo | tr '\n' ' ' > out
holds "run a model with an end token: it came in time" "$(size expected) > 0 && $(size expected) < 1990"
same_bytes "run a model with an end token: the text without it, up to it" expected out
run m.st -q -n 5 --temperature 0 -- --eval > out
equal "run MODEL -- PROMPT: a prompt may start with dashes" "--eval" "$(dd if=out bs=6 count=1 2> /dev/null)"
for form in chunkwise recurrent parallel; do
    quiet -n 60 --temperature 0 --form $form > out
    same_bytes "run --form $form: the same text" greedy out
done
quiet -n 60 --temperature 0 --device cpu > out
same_bytes "run --device cpu: the same text" greedy out
run m.st "One day" -q -n 60 --temperature 0 --threads 1 --device cuda --math exact > out 2> err
if [ -s err ]; then has "run --device cuda, which is not there" err "--device cuda: " "going on with the CPU"; fi
same_bytes "run --device cuda: the same text" greedy out
run m.st "One day" -q -n 60 --temperature 0 --threads 2 > out
same_bytes "run --threads 2: the same text" greedy out

for flags in "--top-k 1" "--top-p 0" "--min-p 1" "--temperature 0 --seed 9" \
    "--temperature 0 --repeat-penalty 10 --repeat-window 0"; do
    quiet -n 60 --seed 5 --temperature 2 $flags > out
    same_bytes "run $flags: the likeliest" greedy out
done
quiet -n 60 --seed 5 --temperature 2 > wild
other_bytes "run --temperature 2: not the likeliest" greedy wild
for flags in "--top-k 2" "--top-p 0.5" "--min-p 0.3" "--temperature 0.5" "--seed 6" "--repeat-penalty 3"; do
    quiet -n 60 --seed 5 --temperature 2 $flags > out
    other_bytes "run $flags: has an effect" wild out
    other_bytes "run $flags: is not the likeliest" greedy out
done
for flags in "--top-k 0" "--top-k 256" "--top-p 1" "--min-p 0" "--repeat-penalty 1" "--seed 5"; do
    quiet -n 60 --seed 5 --temperature 2 $flags > out
    same_bytes "run $flags: changes nothing" wild out
done
quiet -n 60 --seed 5 > cool
quiet -n 60 --seed 5 --temperature 0.8 > out
same_bytes "run --temperature 0.8 is the default" cool out
kinds() { tail -c +8 "$1" | od -A n -v -t u1 | tr -s ' ' '\n' | sort -u | wc -l; }
quiet -n 60 --temperature 0 --repeat-penalty 10 > out
holds "run --repeat-penalty 10: fewer repetitions" "$(kinds out) > $(kinds greedy) + 5"
quiet -n 60 --temperature 0 --repeat-penalty 10 --repeat-window 64 > again
same_bytes "run --repeat-window 64 is the default" out again
quiet -n 60 --temperature 0 --repeat-penalty 10 --repeat-window 2 > again
other_bytes "run --repeat-window 2: has an effect" out again
works "run --seed 0" ask -n 60 --seed 0
seed=$(sed -n 's/.*; seed \([0-9]*\)$/\1/p' err)
quiet -n 60 --seed "${seed:-none}" > again
same_bytes "run --seed 0: says what it took, and that gives the same text" out again

letter=$(tail -c +12 greedy | dd bs=3 count=1 2> /dev/null)
quiet -n 60 --temperature 0 --stop "$letter" > out
equal "run --stop TEXT: ends with it" "$letter" "$(tail -c 3 out)"
holds "run --stop TEXT: earlier" "$(size out) <= 14"
dd if=greedy of=start bs="$(size out)" count=1 2> /dev/null
same_bytes "run --stop TEXT: otherwise the same" start out
quiet -n 60 --temperature 0 --stop "no such text" > out
same_bytes "run --stop with what never comes: changes nothing" greedy out
quiet -n 20 --samples 3 --seed 5 --no-echo > out
equal "run --samples 3: two lines between three" 2 "$(grep -c '^---$' out)"
sed -n '/^---$/,/^---$/p' out | sed '1d;$d' > second
quiet -n 20 --samples 2 --seed 6 --no-echo | sed '/^---$/,$d' > out
same_bytes "run --samples: the second with seed 5 is the first with seed 6" second out

works "run --save-state" ask -n 20 --temperature 0 --save-state s.state
has "run --save-state: says so" err "s.state: saved at position 27"
cp out halves
works "run --load-state" run m.st --threads 1 -n 40 --temperature 0 --load-state s.state
has "run --load-state: says so" err "s.state: continuing at position 27"
cat out >> halves
same_bytes "run --save-state, --load-state: the text of an unbroken run" greedy halves
quiet -n 20 --temperature 2 --seed 5 --save-state s.state > halves
run m.st -q --threads 1 -n 40 --temperature 2 --load-state s.state >> halves
same_bytes "run --load-state: the random numbers go on as well" wild halves
quiet -n 60 --temperature 0 --repeat-penalty 3 > whole
quiet -n 20 --temperature 0 --repeat-penalty 3 --save-state s.state > halves
run m.st -q --threads 1 -n 40 --temperature 0 --repeat-penalty 3 --load-state s.state >> halves
same_bytes "run --load-state: the penalty still knows the tokens before" whole halves
quiet -n 0 --save-state s.state
run m.st -q --threads 1 -n 60 --temperature 0 --load-state s.state > out
same_bytes "run -n 0 --save-state: the state of the prompt" rest out
run m.st "One" -q --threads 1 -n 0 --save-state s.state
run m.st " day" -q --threads 1 -n 60 --temperature 0 --load-state s.state --no-echo > out
same_bytes "run --load-state PROMPT: reads on" rest out
run m.st -q --threads 1 -n 9 --load-state s.state --samples 2 --seed 3 > out
equal "run --load-state --samples 2" 1 "$(grep -c '^---$' out)"

input=
begin run m.st "One day" -n 1000000 --temperature 0 --threads 1 --save-state stopped.state
await "run starts" [ -s back.out ]
kill -INT $started
finish
equal "run, Ctrl-C: exit status" 130 $status
has "run, Ctrl-C: still says what it did" back.err "position"
holds "run, Ctrl-C: the state is saved" "$(size stopped.state) > 1000"

# ============================================================== run: --eval, --info, --chat, numbers

value() { awk -v name="$1" '$1 == name { print $2 }' out; }
works "run --eval FILE" run m.st --eval text.txt --threads 1
has "run --eval: says how fast" err "read 1" "tokens"
equal "run --eval: predicts all bytes but the first" $(($(size text.txt) - 1)) "$(value predicted)"
loss=$(value loss)
holds "run --eval: perplexity is exp(loss)" "($(value perplexity) / exp($loss) - 1) ^ 2 < 1e-8"
holds "run --eval: bits are loss / log 2" "($(value bits) - $loss / log(2)) ^ 2 < 1e-8"
holds "run --eval: the trained model knows something" "$loss < 3"
for form in recurrent parallel; do
    run m.st --eval text.txt --threads 1 --form $form -q > out
    holds "run --eval --form $form: the loss of chunkwise" "($(value loss) - $loss) ^ 2 < 1e-9"
done
works "run --eval --context 16" run m.st --eval text.txt --threads 1 --context 16 --quiet
has "run --eval --context 16: says so" out "16 at a time"
equal "run --eval --quiet: nothing but the numbers" 0 "$(size err)"
holds "run --eval --context 16: it costs something" "$(value loss) > $loss"
run m.st --eval text.txt --threads 1 --context 0 -q > out
equal "run --eval --context 0 is the default" "$loss" "$(value loss)"
works "run --eval of labels" run recall.st --eval labels.safetensors --quiet
has "run --eval of labels: one target of each sequence" out "predicted    12 tokens of 12 sequences" "per token"
holds "run --eval of labels: the loss of train" "($(value loss) - $(last recall.csv val_loss)) ^ 2 < 1e-8"
train targets.safetensors --width 16 --layers 1 --heads 2 --batch 4 --threads 1 --max-steps 40 --lr 0.02 --quiet \
    --val targets.safetensors --eval-batches 0 --out half.st --log half.csv
works "run --eval of targets" run half.st --eval targets.safetensors --quiet
equal "run --eval of targets: without those that are -100" 36 "$(value predicted)"
holds "run --eval of targets: each sequence from an empty state, the loss of train" \
    "($(value loss) - $(last half.csv val_loss)) ^ 2 < 1e-10"
works "run --eval of labels with a mask" run recall.st --eval left.safetensors --quiet

works "run --eval of patches" run bright.st --eval images.safetensors --quiet
has "run --eval of patches: one target of each image" out "predicted    12 tokens of 12 sequences"
holds "run --eval of patches: the loss of train" "($(value loss) - $(last bright.csv val_loss)) ^ 2 < 1e-8"
loss=$(value loss)
works "run --eval of a target for each patch" run each.st --eval each.safetensors --quiet --form recurrent
equal "run --eval of a target for each patch: without those that are -100" 36 "$(value predicted)"
works "run --quantize of patches" run bright.st --quantize small.safetensors --quiet
run small.safetensors --eval images.safetensors --quiet > out
holds "run --quantize of patches: nearly the same loss" "($(value loss) - $loss) ^ 2 < 1e-3"
works "run --info of patches" run small.safetensors --info
has "run --info of patches: says so" out "vocabulary   4 classes" "embedding    a linear map of patches of 3 bytes" \
    "model.patch_embed.weight                             [32,3]           F32"
fails 1 "bright.st: reads patches of 3 bytes and cannot write; --eval FILE scores" "run: text from patches" run bright.st "1 2"
fails 1 "bright.st: reads patches of 3 bytes and cannot write" "run --chat with patches" run bright.st --chat
fails 1 "text.txt: has tokens, bright.st reads patches of 3 bytes" "run --eval of a text with patches" \
    run bright.st --eval text.txt
fails 1 "labels.safetensors: has tokens, bright.st reads patches" "run --eval of tokens with patches" \
    run bright.st --eval labels.safetensors
fails 1 "images.safetensors: has patches of 3 bytes, recall.st reads tokens" "run --eval of patches with tokens" \
    run recall.st --eval images.safetensors
fails 1 "each.safetensors: has classes up to 11, expected at most 3" "run --eval of patches with other classes" \
    run bright.st --eval each.safetensors

works "run --info" run base.st --info
has "run --info: sizes" out "vocabulary   256 bytes" "width        16" "layers       1" \
    "heads        2" "GLU width    64"
has "run --info: state and softmax cache" out "state of a sequence" "1M tokens" "model        metala: conv on, query linear, key tied,"
equal "run --info: the parameters add up" yes \
    "$(awk '$1 ~ /^model|^lm_head/ { sum += $NF } $1 == "total" { print (sum == $NF && sum > 0 ? "yes" : "no") }' out)"
for pair in "tie:also the output layer" "glu-bias:with biases"; do
    run "${pair%%:*}.st" --info > out
    has "run --info of train --${pair%%:*}" out "${pair#*:}"
done
works "run --version" run --version
has "run --version: version and precision" out "metala " "float"
works "run --help" run --help
cp out help
works "run -h" run -h
same_bytes "run -h is --help" help out
has "run --help: what happens without a prompt" help "Without" "begin token" "a newline"

# A conversation; replies have 8 bytes, for the stop never comes.
chat() { run m.st --chat --threads 1 -n 8 --temperature 0 --stop "no such text" "$@"; }
printf 'hello\n' | chat > first 2> err
equal "run --chat: exit status" 0 $?
holds "run --chat: a reply of 8 bytes, and the end of its line" "$(size first) == 9 || $(size first) == 8"
position() { sed -n 's/.*position \([0-9]*\).*/\1/p' err; }
one=$(position)
printf 'hello' | chat > out 2> err
same_bytes "run --chat: the last line may have no newline" first out
printf 'hello\nabc\n' | chat > both 2> err
tail -c +$(($(size first) + 1)) both > second
holds "run --chat: the second reply knows the first" "$(position) > $one && $(size second) >= 8"
printf 'hello\n/reset\nhello\n' | chat > out 2> err
cat first first > expected
same_bytes "run --chat, /reset: the first reply again" expected out
equal "run --chat, /reset: and its position" "$one" "$(position)"
printf 'hello\n/save chat.state\nabc\n/load chat.state\nabc\n' | chat > out 2> err
cat both second > expected
same_bytes "run --chat, /save and /load: the second reply again" expected out
has "run --chat, /save and /load: say so" err "chat.state: saved at position $one" \
    "chat.state: continuing at position $one"
printf 'abc\n' | chat --load-state chat.state > out 2> err
same_bytes "run --chat --load-state: goes on with what /save wrote" second out
printf 'hello\n' | chat --save-state chat.state > out 2> err
printf 'abc\n' | chat --load-state chat.state > out 2> err
same_bytes "run --chat --save-state" second out
printf '/quit\nhello\n' | chat > out 2> err
equal "run --chat, /quit: reads no further" "0 0" "$? $(size out)"
printf '/help\n' | chat > out 2> err
has "run --chat, /help: all commands" err /reset /save /load /quit
printf '/what\n/save\n/load missing.state\n/load text.txt\n/save m.st\n/save folder\nhello\n' | chat > out 2> err
equal "run --chat: a command that fails does not end it" 0 $?
has "run --chat: a command that fails says so" err "unknown command or no FILE: /what" "unknown command or no FILE: /save" \
    "missing.state: cannot be opened" "text.txt: " "m.st would be overwritten" "folder: is not a regular file"
same_bytes "run --chat: a command that fails changes nothing" first out
printf '' | chat > out 2> err
equal "run --chat without a line: nothing" "0 0" "$? $(size out)"
printf 'hello\n' | run m.st "Hi" --chat -q --threads 1 -n 8 --temperature 0 --stop "no such text" > out
equal "run --chat PROMPT: it comes first" "Hi" "$(head -n 1 out)"
printf 'a\000b\033c\n' | chat > out 2> err
equal "run --chat: a byte 0 and control characters in a line" 0 $?
awk 'BEGIN { for (n = 0; n < 300; n++) print "ab\n" }' > blank.txt
train blank.txt --width 16 --layers 1 --heads 2 --context 16 --batch 4 --threads 1 --max-steps 100 --lr 0.02 --quiet --out blank.st
printf 'ab\n' | run blank.st --chat -q --threads 1 -n 400 --temperature 0 > out
equal "run --chat: a blank line ends a reply, also one that begins with a newline" "/ab//" "$(tr '\n' / < out)"
mkfifo lines
input=lines
begin run m.st --chat --threads 1 -n 1000000 --temperature 0 --stop "no such text"
exec 3> lines
echo hello >&3
await "run --chat replies" [ -s back.out ]
kill -INT $started
pause
runs_on "run --chat, Ctrl-C: ends the reply, not the program"
echo /quit >&3
exec 3>&-
finish
input=
equal "run --chat, Ctrl-C, /quit: exit status" 0 $status

# Vocabularies other than 256 are numbers.
works "run: numbers" run recall.st "3 1 4" -q -n 5 --temperature 0
equal "run: numbers on a line, the prompt first" "3 1 4 5" "$(awk '{ print $1, $2, $3, NF - 3 }' out)"
equal "run: numbers of this vocabulary" 0 "$(tr ' ' '\n' < out | awk '$1 !~ /^[0-9]+$/ || $1 > 11' | wc -l | tr -d ' ')"
next=$(awk '{ print $4 }' out)
run recall.st "3 1 4" -q -n 5 --temperature 0 --no-echo --stop "$next" > out
equal "run --stop with a number" "$next" "$(cat out)"
printf '3 1\n4\n' | run recall.st - -q -n 1 --temperature 0 > out
equal "run -: numbers from standard input" "3 1 4 $next" "$(cat out)"
run recall.st 3 -q -n 2 --samples 2 --seed 1 > out
equal "run --samples with numbers" 3 "$(lines out)"
fails 1 "prompt: word 2 is 'x', expected the number of a token, from 0 to 11" "run: a word among the numbers" \
    run recall.st "3 x"
fails 1 "prompt: word 1 is '12'" "run: a number beyond the vocabulary" run recall.st 12
fails 1 "--stop: word 1 is 'end'" "run --stop with a word among numbers" run recall.st 3 --stop end
fails 1 "odd.txt: a byte is 0" "run --prompt-file with a byte 0 among numbers" run recall.st --prompt-file odd.txt
printf '3\nx\n99\n4\n' | run recall.st --chat -q -n 3 --temperature 0 > out 2> err
equal "run --chat with numbers: what is not a number can be typed again" "0 2 2" "$? $(lines out) $(lines err)"
run zero.safetensors 1 -q -n 4 --temperature 0 > out
equal "run a model that was made by hand" "1 0 0 0 0" "$(cat out)"
run ending.safetensors 1 -q -n 4 --temperature 0 > out
equal "run: the end token ends" "1" "$(cat out)"

# ============================================================== run: what must fail

fails 2 "no model given" "run without a model" run
fails 2 "got a third argument 'c'" "run with three arguments" run m.st b c
fails 2 "unknown option --tokns; did you mean --tokens?" "run --tokns" run m.st --tokns 3
fails 2 "unknown option --xyzzyplugh; run --help" "run --xyzzyplugh" run m.st --xyzzyplugh
fails 2 "unknown option -z; run --help" "run -z" run m.st -z
fails 2 "unknown option --a?b" "run with a control character in an option" run "$(printf -- '--a\nb')"
fails 1 "c?d: cannot be opened" "run with a control character in a name" run "$(printf 'c\033d')"
fails 2 "--quiet: got '1', expected no value" "run --quiet=1" run m.st --quiet=1
fails 2 "got 'loop', expected chunkwise, recurrent or parallel" "run --form loop" run m.st --form loop
fails 2 "got 'gpu', expected cpu or cuda" "run --device gpu" run m.st --device gpu
fails 2 "got 'fast', expected exact, tf32 or bf16" "run --math fast" run m.st --device cuda --math fast
fails 2 "expected --device cuda" "run --math without a GPU" run m.st --math tf32
fails 2 "got a prompt and --prompt-file" "run PROMPT --prompt-file" run m.st hello --prompt-file prompt.txt
fails 2 "expected one of --chat, --info, --eval" "run --chat --info" run m.st --chat --info
fails 2 "the prompt cannot be -" "run - --chat" run m.st - --chat
fails 2 "expected --samples 1" "run --chat --samples 2" run m.st --chat --samples 2
fails 2 "expected --samples 1" "run --save-state --samples 2" run m.st --save-state new.state --samples 2
for flags in "--info hello" "--info --save-state new.state" "--eval other.txt --load-state s.state" \
    "--eval other.txt --prompt-file prompt.txt"; do
    fails 2 "starts from an empty state" "run $flags" run m.st $flags
done
wrong=
run --help | sed -n 's/^  \(-[a-z], \)\{0,1\} *--\([a-z-]*\) \([A-Z]\).*/\2/p' > arguments
while read -r flag; do
    refused run "--$flag" "got nothing, expected"
    refused run "--$flag" "got .*, expected" ""
done < arguments
equal "run: each of the $(lines arguments) options with an argument says so when it is missing" "" "$wrong"
wrong=
for flag in tokens samples repeat-penalty repeat-window temperature top-k top-p min-p seed context threads; do
    for value in -1 1e31 x 5x 11000000000000000000 99999999999999999999; do
        refused run "--$flag" "got '$value', expected a .*number from" $value
    done
done
equal "run: numbers out of range are refused" "" "$wrong"
fails 1 "missing.st: cannot be opened" "run a model that is not there" run missing.st
fails 1 "folder: cannot be read; is it a file?" "run a folder" run folder
fails 1 "empty.txt: not a safetensors file: 0 bytes" "run an empty file" run empty.txt
fails 1 "not a safetensors file" "run a text" run text.txt
fails 1 "no configuration: neither" "run a dataset" run labels.safetensors
fails 1 "layers, the file has only" "run a model that promises more than it has" run promise.safetensors
fails 1 "number of heads must divide" "run a model with a wrong configuration" run odd.safetensors
fails 1 "tensor lm_head.weight has shape [4,1], this model (D=2) needs [2,2]" "run a model with a wrong shape" \
    run shaped.safetensors
fails 1 "missing.txt: cannot be opened" "run --prompt-file that is not there" run m.st --prompt-file missing.txt
fails 1 "folder: cannot be read" "run --prompt-file a folder" run m.st --prompt-file folder
fails 1 "missing.txt: cannot be opened" "run --eval of what is not there" run m.st --eval missing.txt
fails 1 "folder: cannot be read" "run --eval of a folder" run m.st --eval folder
fails 1 "empty.txt: 0 bytes" "run --eval of an empty text" run m.st --eval empty.txt
fails 1 "one.txt: 1 byte" "run --eval of one byte" run m.st --eval one.txt
fails 1 "has tokens up to 255, expected at most 11" "run --eval of a text with another vocabulary" \
    run recall.st --eval text.txt
fails 1 "nothing to predict" "run --eval where all targets are ignored" run recall.st --eval ignored.safetensors
fails 1 "sequences of 4 tokens, at most 3 are wanted" "run --eval --context 3 of sequences of 4" \
    run recall.st --eval labels.safetensors --context 3
fails 1 "missing.state: cannot be opened" "run --load-state that is not there" run m.st --load-state missing.state
fails 1 "not a safetensors file" "run --load-state of a text" run m.st --load-state text.txt
fails 1 "it is not a saved state" "run --load-state of a model" run m.st --load-state m.st
fails 1 "this model and batch need" "run --load-state of another model's state" run base.st --load-state s.state
dd if=s.state of=short.state bs=1 count=3000 2> /dev/null
fails 1 "short.state: " "run --load-state of a state cut short" run m.st --load-state short.state
cp m.st kept.st
fails 1 "m.st would be overwritten" "run --save-state on the model" run m.st hello -n 2 --save-state m.st
fails 1 "m.st would be overwritten" "run --save-state on the model by another name" \
    run m.st hello -n 2 --save-state folder/../m.st
fails 1 "prompt.txt would be overwritten" "run --save-state on the prompt" \
    run m.st --prompt-file prompt.txt --save-state prompt.txt
same_bytes "run: none of these touched the model" m.st kept.st
fails 1 "folder: is not a regular file" "run --save-state a folder" run m.st hello -q --save-state folder
equal "run --save-state a folder: noticed before writing" 0 "$(size out)"
fails 1 "no/s.state.tmp: cannot be created" "run --save-state in a folder that is not there" \
    run m.st hello -q -n 2 --save-state no/s.state
# Weights of fewer bits: a smaller file that says the same, nearly.
works "run --quantize FILE: int8 unless told otherwise" run base.st --quantize int8.st
works "run --quantize FILE --weights bf16" run base.st --quantize bf16.st --weights bf16
holds "run --quantize: int8 is smaller than bf16, bf16 than float" \
    "$(size int8.st) < $(size bf16.st) && $(size bf16.st) < $(size base.st)"
run base.st --weights int8 hello -n 30 --temperature 0 --quiet > direct
run int8.st hello -n 30 --temperature 0 --quiet > out
same_bytes "run --weights int8 is what --quantize writes" direct out
works "run --eval --weights bf16" run base.st --eval text.txt --weights bf16
fails 2 "expected f32, bf16 or int8" "run --weights int4" run base.st --weights int4
fails 1 "for inference only" "train --init of quantized weights" train text.txt --init int8.st --max-steps 1 --out never.st

tried run run

# ============================================================== test: which checks run, golden folders

works "test --list" checks --list
cp out list
holds "test --list: a name for each check" "$(lines list) > 100"
equal "test --list: nothing was checked" 0 "$(grep -c -e '   ok$' -e ' passed, ' list)"
works "test --only TEXT" checks --only "matmul 1x4x4"
holds "test --only TEXT: those checks alone" "$(lines out) == $(grep -c 'matmul 1x4x4' list) + 1 && $(lines out) > 1"
equal "test: the last line" "$(grep -c 'matmul 1x4x4' list) passed, 0 failed" "$(tail -n 1 out)"
works "test --device cpu" checks --device cpu --only "matmul 1x4x4"
mkdir golden "golden folder" "golden folder/deeper"
cp base.st "golden folder/b.safetensors"
cp labels.safetensors "golden folder/a.safetensors"
cp base.st "golden folder/other"
cp base.st "golden folder/deeper/c.safetensors"
failed_names() { sed -n 's/^golden \([^ ]*\) .*FAILED$/\1/p' out | uniq | tr '\n' ' '; }
checks --golden "golden folder" --only golden > out 2> err
equal "test --golden DIR: each .safetensors file of the folder, which are none here" "1 a.safetensors b.safetensors " \
    "$? $(failed_names)"
has "test --golden DIR: says what is wrong" out "a.safetensors: no configuration" "b.safetensors: no input_ids" "0 passed, "
checks --golden "golden folder" --only golden --stop > out 2> err
equal "test --stop: after the first failure" "1 0 passed, 1 failed" "$? $(tail -n 1 out)"
METALA_GOLDEN="golden folder" checks --only golden > out 2> err
equal "test: METALA_GOLDEN is --golden" "1 a.safetensors b.safetensors " "$? $(failed_names)"
METALA_GOLDEN= checks --only "matmul 1x4x4" > out 2> err
equal "test: an empty METALA_GOLDEN is none" 0 $?
checks "golden folder/b.safetensors" > out 2> err
equal "test FILE: this file alone" "1 b.safetensors " "$? $(failed_names)"
fails_at_once 2 "no .safetensors file in the golden folder golden" "test --golden of an empty folder" checks --golden golden
fails_at_once 2 "cannot open the golden folder missing" "test --golden of a folder that is not there" checks --golden missing
fails_at_once 2 "unknown option --xyzzy" "test --xyzzy" checks --xyzzy
fails_at_once 2 "no value after --only" "test --only without a value" checks --only
fails_at_once 2 "--device is cpu or cuda, not gpu" "test --device gpu" checks --device gpu
fails_at_once 2 "--device cuda is needed for --math tf32" "test --math without a GPU" checks --math tf32
fails_at_once 2 "--device cuda is needed for --kernel add" "test --kernel without a GPU" checks --kernel add
checks missing.safetensors > out 2> err
equal "test FILE that is not there: exit status" 1 $?
has "test FILE that is not there: says so" err "missing.safetensors: cannot be opened"
golden=${GOLDEN:-$root/../shared/golden}
if [ -d "$golden" ]; then
    works "test --golden with the authors' numbers" checks --golden "$golden" --only golden
    equal "test --golden: each file is tried" "$(ls "$golden" | grep '\.safetensors$')" \
        "$(sed -n 's/^golden \([^ ]*\) .*ok$/\1/p' out | uniq)"
fi
tried checks checks

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
