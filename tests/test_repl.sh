#!/bin/sh
# The REPL: options, errors, use of standard output and standard error, the chat and its commands, Ctrl-C.  Variants: asan
. tests/tap.sh
repl=$(dirname "$0")/repl
tokenize=$(dirname "$0")/tokenize
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
out=$tmp/out err=$tmp/err

# `run` runs the REPL with the default model, `bare` without a model. They set $out, $err and $code. $input is the input.
bare() {
    printf "$input" | "$repl" "$@" >"$out" 2>"$err"
    code=$?
}
run() { bare -m "$model" --dtype int4 "$@"; } # the type of the file, which loads fast
input=

code_is() { [ "$code" -eq "$1" ] || { show; return 1; }; }
out_has() { grep -q -- "$1" "$out" || { show; return 1; }; }
err_has() { grep -q -- "$1" "$err" || { show; return 1; }; }
err_lines_are() { [ "$(wc -l <"$err")" -eq "$1" ] || { show; return 1; }; }
no_text() { [ ! -s "$out" ] || { show; return 1; }; }
both() { "$1" "$2" && "$3" ${4+"$4"}; }
show() { echo "code $code" && sed 's/^/out: /' "$out" && sed 's/^/err: /' "$err"; }
out_is() { grep -qxE -- "$1" "$out" || { show; return 1; }; }
json_is() { python3 -c "import json, sys; a = json.load(open(sys.argv[1])); sys.exit(not ($1))" "$out" || { show; return 1; }; }
same() { cmp "$1" "$2" || { head "$1" "$2"; return 1; }; }
differ() { ! cmp -s "$1" "$2"; }

# ---- Options and errors

bare --help
check "--help succeeds" code_is 0
for option in model prompt system raw tokens ids temp top-k top-p min-p seed threads dtype ctx draft draft-max json-schema grammar regex top-n-sigma typical mirostat mirostat-tau mirostat-eta xtc-probability xtc-threshold dry-multiplier dry-base dry-allowed-length dry-last-n dry-breaker tools set; do
    check "--help lists --$option" out_has "--$option"
done

bare -p hello
check "without a model it exits with 2" code_is 2
check "without a model it prints an error" err_has "-m"
check "without a model it prints no text" no_text

for wrong in "-n 0" "-n ten" "-t 0" "--temp hot" "--temp -1" "--temp nan" "--top-k -1" "--top-p 1.5" "--min-p x" \
    "--seed -1" "--seed 99999999999999999999" "--dtype q4" "--ctx 0" "--draft self:f32" "--draft-max 3" "--draft lookup --draft-max 16" "--mirostat-tau 3" "--typical 2" "--xtc-probability x" "--dry-last-n 0" "--set x" "--set =1" "--raw --tools F" "--raw --set x=1" "--nonsense" "stray" "--raw --system S"; do
    run -p hello $wrong
    check "$wrong is refused" code_is 2
done

# The default model's template does not use tools, but --tools is still read.
run -p hello -n 4 --tools "$tmp/absent.json"
check "a missing file of tools is an error" both err_has absent.json code_is 1
echo '[{"type": "function"' >"$tmp/tools.json"
run -p hello -n 4 --tools "$tmp/tools.json"
check "tools that are not JSON are an error" both err_has "tools_json: line" code_is 1
echo '[{"type": "function", "function": {"name": "add"}}]' >"$tmp/tools.json"
run -p hello -n 4 --tools "$tmp/tools.json"
check "--tools works" both err_has "prompt 31 tokens" code_is 0
for set in "add_generation_prompt=false:27" "add_generation_prompt=:27" "add_generation_prompt=x:31" "add_generation_prompt=[]:27" \
    'add_generation_prompt=[1,"x":2]:31' 'add_generation_prompt=0,"x":1:31' 'x={"a":"}"}:31' 'x="\:31'; do
    run -p hello -n 4 --set "${set%:*}"
    check "--set ${set%:*} gives a prompt of ${set##*:} tokens" both err_has "prompt ${set##*:} tokens" code_is 0
done

# A model whose template uses tools. The regular expression makes it call one.
sed 's/{{ message.content or/{{ "The result: " if message.role == "tool" }}&/' tests/tools.jinja >"$tmp/template"
python3 tests/with_template.py "$model" "$tmp/template" "$tmp/model.gguf"
calls='<tool_call>\{"name": "add", "arguments": \{"a": 1, "b": [2-9]\}\}</tool_call>'
tools() { bare -m "$tmp/model.gguf" --dtype int4 "$@"; }
tools -p hello -n 4 --set x=1
check "without --tools the prompt has none" both err_has "prompt 10 tokens" code_is 0
tools -p hello -n 4 --tools "$tmp/tools.json"
check "--tools puts them into the prompt" both err_has "prompt 66 tokens" code_is 0
check "an answer without a call shows none" [ "$(grep -c "^Call of" "$err")" -eq 0 ]
tools -p hello --tools "$tmp/tools.json" --regex "It is: ($calls){2}"
check "a call is part of the answer" both code_is 0 out_is "It is: ($calls){2}"
check "calls are read and shown" [ "$(grep -cE '^Call of add with \{"a": 1, "b": [2-9]\}$' "$err")" -eq 2 ]
tools -p hello --tools "$tmp/tools.json" --regex "$calls" -n 12
check "a call that is cut off is reported" both err_has "cannot be read: line 1" code_is 0
tools -p hello --regex "$calls"
check "without --tools no call is shown" [ "$(grep -c "^Call of" "$err")" -eq 0 ]
input='1 + 2?\n/tool 3\n/stats\n' tools --tools "$tmp/tools.json" --regex "$calls"
check "/tool gives the model a result" both err_has "prompt 117 tokens" code_is 0
check "the answer to a result can call again" [ "$(grep -c "^Call of" "$err")" -eq 2 ]
input='1 + 2?\n3\n/stats\n' tools --tools "$tmp/tools.json" --regex "$calls"
check "other lines are the user's" both err_has "prompt 113 tokens" code_is 0
input=
rm "$tmp/model.gguf"

bare -m "$tmp/absent.gguf" -p hello
check "a missing file is an error" code_is 1
check "a missing file gives one line on standard error" both err_lines_are 1 err_has absent.gguf
check "a missing file gives no text" no_text

LLM_ISA=abacus bare -m "$model" -p hello
check "LLM_ISA is obeyed" both code_is 1 err_has abacus

bare -m "$0" -p hello
check "a file that is not a model is an error" code_is 1
check "a file that is not a model gives one line on standard error" err_lines_are 1

"$repl" -m "$model" -p hello -n 4 >/dev/full 2>"$err"
code=$?
check "a full disk is an error" code_is 1
check "the error of a full disk names standard output" err_has "standard output"

# ---- One answer

run -p "What is the capital of France?" -n 12
check "-p answers" both code_is 0 out_has .
check "-p ends with one line of figures" both err_lines_are 1 err_has "^load .* tok/s .* MB/token .* MBU .* GB/s$"
cp "$out" "$tmp/answer"
run -p "What is the capital of France?" -n 12
check "-p is greedy" same "$tmp/answer" "$out"
run -p "What is the capital of France?" -n 12 -t 1
check "the number of threads changes nothing" same "$tmp/answer" "$out"
run -p "What is the capital of France?" -n 12 --system "Answer in French."
check "--system changes the answer" differ "$tmp/answer" "$out"
run -p "What is the capital of France?" -n 12 --dtype f32
check "--dtype f32 answers" both code_is 0 out_has .

run --raw -p "Hello, my name is" -n 20
check "--raw continues the text" both code_is 0 out_has .
check "--raw prints the prompt on standard error" err_has "^Hello, my name is"
cp "$out" "$tmp/text"
run --raw -p "Hello, my name is" -n 20 --ids
check "--ids prints one id per token" [ "$(wc -w <"$out")" -eq 20 ]
check "--ids prints one line of numbers" grep -qxE '[0-9]+( [0-9]+){19}' "$out"
decoded=$("$tokenize" -m "$model" -d <"$out")
check "--ids gives the ids of the text" [ "$decoded" = "$(cat "$tmp/text")" ]

run -p "Tell me a story." -n 16 --temp 1 --seed 7
cp "$out" "$tmp/seven"
run -p "Tell me a story." -n 16 --temp 1 --seed 7
check "the same seed gives the same text" same "$tmp/seven" "$out"
run -p "Tell me a story." -n 16 --temp 1 --seed 8
check "another seed gives another text" differ "$tmp/seven" "$out"
run -p "Tell me a story." -n 12 --temp 1 --top-k 1
cp "$out" "$tmp/top"
run -p "Tell me a story." -n 12
check "--top-k 1 is greedy" same "$tmp/top" "$out"

# ---- Grammars

echo '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}, "b": {"enum": ["x", "y"]}},
       "required": ["a", "b"], "additionalProperties": false}' >"$tmp/schema.json"
run -p "Tell me a story." --json-schema "$tmp/schema.json"
check "--json-schema gives an answer that fits" both code_is 0 json_is 'sorted(a) == ["a", "b"] and 10 <= a["a"] <= 99 and a["b"] in "xy"'
run -p "Tell me a story." --json-schema "$tmp/schema.json" --draft lookup
check "the same with a draft" both code_is 0 json_is '10 <= a["a"] <= 99'
echo 'root ::= "no " | "yes" [!?]{3}' >"$tmp/yes.gbnf"
run --raw -p "Do you like it?" --grammar "$tmp/yes.gbnf"
check "--grammar gives an answer that fits" both code_is 0 out_is 'no |yes[!?]{3}'
run --raw -p "What is the date?" --regex '[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9] \u00e9'
check "--regex gives an answer that fits" both code_is 0 out_is '[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9] é'
run -p hello --json-schema "$tmp/absent.json"
check "a missing schema is an error" both code_is 1 err_has absent.json
echo '{"format": 5, "colour": "red"}' >"$tmp/schema.json"
run -p hello --json-schema "$tmp/schema.json"
check "a schema that is refused is an error" both err_has colour code_is 1
run -p hello --regex '(a'
check "a wrong regular expression is an error" both err_has "character" code_is 1
run -p hello --regex a --grammar "$tmp/yes.gbnf"
check "two grammars are a wrong use" code_is 2

# ---- Drafts

run --raw -p "one two three one two three one two" -n 24 --ids
cp "$out" "$tmp/plain"
for draft in lookup self:int8 self:int4 "self:int4 --draft-max 1" "$model"; do
    run --raw -p "one two three one two three one two" -n 24 --ids --draft $draft
    check "--draft $draft gives the same text" same "$tmp/plain" "$out"
    check "--draft $draft shows its figures" err_has "guesses right"
done
run -p "Tell me a story." -n 16 --temp 1 --seed 7 --draft self:int4
check "a seed gives the same text with a draft" same "$tmp/seven" "$out"
run -p hello --draft "$tmp/absent.gguf"
check "a missing draft is an error" both code_is 1 err_has absent.gguf

# ---- A small context

run --raw -p "one two three four five six seven eight nine ten eleven twelve thirteen fourteen" --ctx 8
check "a prompt that does not fit is an error" code_is 1
check "a prompt that does not fit gives one line on standard error" err_lines_are 1
check "a prompt that does not fit gives no text" no_text
run --raw -p "Hello, my name is" --ctx 12
check "an answer ends at the end of the context" both code_is 0 err_has "12 positions"

# ---- Chat without a terminal

input='' run
check "no input ends the chat" both code_is 0 no_text
"$repl" -m "$model" <&- >"$out" 2>"$err"
code=$?
check "a closed input ends the chat" both code_is 0 no_text

# A model whose template cannot be run: a warning when the chat starts, none where no chat does.
echo '{{ messages|groupby("role") }}' >"$tmp/template"
python3 tests/with_template.py "$model" "$tmp/template" "$tmp/model.gguf"
input='' bare -m "$tmp/model.gguf" --dtype int4
check "a chat starts with a warning if the template cannot be run" both err_has "cannot chat: .*the filter groupby is not supported" code_is 0
input='' bare -m "$tmp/model.gguf" --dtype int4 --raw
check "--raw needs no template" both err_lines_are 0 code_is 0
rm "$tmp/model.gguf"

input='/stats\n/nonsense\n/help\n\n/quit\nnot answered\n' run
check "commands give no text" both code_is 0 no_text
check "/stats before the first answer" err_has "Nothing has been answered"
check "an unknown command is reported" err_has "Unknown command /nonsense"
check "/help lists /reset" err_has "/reset"
check "/help lists /tool" err_has "/tool RESULT"

hello='Hello, I am Ada.\n'
question='What is my name?\n'
long=$(printf 'word %.0s' $(seq 400))
input=$hello$question run --temp 0 -n 12
check "a chat answers every line" [ "$(wc -l <"$out")" -ge 2 ]
cp "$out" "$tmp/chat"
input=$hello$question/reset'\n'$hello$question run --temp 0 -n 12
cat "$tmp/chat" "$tmp/chat" >"$tmp/twice"
check "/reset starts over" same "$tmp/twice" "$out"
input=$hello$long'\n'$question run --temp 0 -n 12 --ctx 200
check "a line that does not fit leaves the chat unchanged" same "$tmp/chat" "$out"
check "a line that does not fit suggests --ctx" err_has "increase --ctx"
questions=$(printf "${question%??}"'\\n%.0s' $(seq 12))
input=$hello$questions run --temp 0 -n 12 --ctx 160
check "a chat goes on when the context is full" both code_is 0 err_lines_are 1
check "it says once that the oldest turns are left out" [ "$(grep -c "oldest turns" "$err")" -eq 1 ]
check "and still answers every line" [ "$(grep -c . "$out")" -ge 13 ]
input=$hello$questions/reset'\n'$hello$questions run --temp 0 -n 12 --ctx 160
check "after /reset it says so again" [ "$(grep -c "oldest turns" "$err")" -eq 2 ]
input="Repeat the word tree.$(printf ' tree%.0s' $(seq 140))\n" run --temp 0 -n 100 --ctx 200
check "a line that leaves less than a quarter of the context is answered" both code_is 0 err_has "200 positions"
input=$hello'/stats\n' run -n 4
check "/stats prints the figures" err_has "generated 4, .* tok/s"

# ---- Ctrl-C

: >"$out" # emptied here: after this, text in $out means that the program runs and catches the signal
"$repl" -m "$model" --raw -p "Once upon a time" --ids >>"$out" 2>"$err" &
pid=$!
wait_until [ -s "$out" ]
kill -INT $pid
wait $pid
code=$?
check "Ctrl-C stops the answer of -p" code_is 130
check "Ctrl-C still prints the figures" err_has "tok/s"

# A terminal: each key is typed when the screen shows the expected text.
screen=$tmp/screen
shows() { [ "$(grep -ac "$1" "$screen")" -ge "$2" ]; }
longer_than() { [ "$(wc -c <"$screen")" -gt "$1" ]; }
type_keys() {
    wait_until shows 'lists commands' 1
    printf 'Count from one to one thousand.\r'
    wait_until shows 'thousand' 1
    wait_until longer_than $(($(wc -c <"$screen") + 40))
    printf '\003'
    sleep 0.5
    printf 'forget this\003'
    wait_until shows 'forget this' 1
    printf '/stats\r'
    wait_until shows 'MBU' 1
    printf '\004'
}
: >"$screen"
type_keys | TERM=xterm script -qefc "exec $repl -m $model --temp 0 -n 2000" /dev/null >"$screen" 2>"$err"
code=$?
cp "$screen" "$out"
check "on a terminal, Ctrl-C stops the answer or clears a line, and the chat continues" shows 'MBU' 1
check "on a terminal, Ctrl-D ends the chat" code_is 0
finish
