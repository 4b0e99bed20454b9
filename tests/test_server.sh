#!/bin/sh
# server.c: OpenAI's API, limits, clients that hang up, and shutdown. Without libmicrohttpd or curl the test is skipped.
. tests/tap.sh
server=$(dirname "$0")/server
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
if [ ! -x "$server" ] || ! command -v curl >/dev/null; then
    echo "ok 1 # SKIP libmicrohttpd, jansson or curl is not installed"
    echo "1..1"
    exit
fi
tmp=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -9 $pid 2>/dev/null; rm -rf "$tmp"' EXIT
out=$tmp/out

start() {
    : >"$tmp/log" # removes the log of the previous server
    "$server" -m "$model" -p 0 "$@" 2>"$tmp/log" &
    pid=$!
    wait_until grep -q listens "$tmp/log"
    url=$(sed -n 's/.*\(http:.*\)/\1/p' "$tmp/log")
}
# post PATH BODY [CURL OPTIONS]: the answer goes to $out, the HTTP status to $code.
post() {
    path=$1 body=$2
    shift 2
    code=$(curl -sN -o "$out" -w '%{http_code}' -H "Content-Type: ${type:-application/json}" -d "$body" "$@" "$url$path")
}
get() { code=$(curl -s -o "$out" -w '%{http_code}' "$url$1"); }
out_has() { grep -qF -- "$1" "$out" || { sed 's/^/# /' "$out"; return 1; }; }
# refuses CODE WORD PATH BODY [CURL OPTIONS]
refuses() {
    expected=$1 word=$2
    shift 2
    post "$@"
    [ "$code" = "$expected" ] && out_has '"error"' && out_has "$word"
}
metric() { curl -s "$url/metrics" | sed -n "s/^llm_$1 //p"; }
metric_is() { [ "$(metric "$1")" = "$2" ]; }

chat=/v1/chat/completions text=/v1/completions
question='"messages":[{"role":"user","content":"What is the capital of France?"}],"max_tokens":12'
long='"messages":[{"role":"user","content":"Count to one thousand."}],"max_tokens":2000,"logit_bias":{"2":-100,"0":-100}'

check "starts" start --parallel 2 --queue 1 --ctx 3000 --max-body 20000
get /health
check "/health" out_has '"ok"'
get /v1/models
check "/v1/models names the file" out_has "\"id\":\"$(basename "$model")\""

post $chat "{$question,\"temperature\":0}"
check "a chat is answered" test "$code" = 200
for part in '"object":"chat.completion"' '"role":"assistant"' '"finish_reason":"length"' '"completion_tokens":12' '"id":"chatcmpl-'; do
    check "the answer has $part" out_has "$part"
done
whole=$(sed 's/.*"content":"\([^"]*\)".*/\1/' "$out")
post $chat "{$question,\"temperature\":0,\"stream\":true,\"stream_options\":{\"include_usage\":true}}"
check "a streamed answer ends with [DONE]" test "$(grep . "$out" | tail -n 1)" = "data: [DONE]"
check "it reports the usage" out_has '"completion_tokens":12'
check "it has the same text" test "$(sed -n 's/.*"content":"\([^"]*\)".*/\1/p' "$out" | tr -d '\n')" = "$whole"
check "only the first piece has the role" test "$(grep -c '"role"' "$out")" = 1
post $text '{"prompt":"one two three one two three one two","temperature":0,"stop":[" way","xyz"]}'
check "a text ends at a stop string" out_has '"finish_reason":"stop"'
check "which is not shown" test "$(grep -c way "$out")" = 0
for i in 1 2; do
    post $text '{"prompt":[504,253,216],"seed":7,"temperature":1.5,"max_tokens":30}'
    sed 's/.*"text"/"text"/; s/"usage".*//' "$out" >"$tmp/seed$i"
done
check "a seed gives the same text" cmp "$tmp/seed1" "$tmp/seed2"
post $chat '{"messages":[{"role":"user","content":[{"type":"text","text":"Say "},{"type":"text","text":"hi."}]}],"max_tokens":2}'
check "content may come in parts" test "$code" = 200

schema='{"type":"object","properties":{"city":{"enum":["Paris","Rome"]},"people":{"type":"integer","minimum":1,"maximum":9}},"required":["city","people"],"additionalProperties":false}'
post $chat "{${question%,*},\"max_tokens\":60,\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\",\"schema\":$schema}}}"
fits() { python3 -c 'import json, sys; a = json.loads(json.load(open(sys.argv[1]))["choices"][0]["message"]["content"]); assert list(a) == ["city", "people"] and a["city"] in ("Paris", "Rome") and 1 <= a["people"] <= 9' "$out"; }
check "an answer matches its schema" fits
check "and ends when it is complete" out_has '"finish_reason":"stop"'
post $chat "{$question,\"temperature\":0,\"logprobs\":true,\"top_logprobs\":3}"
# log_probs CODE: runs Python code in which c is the first choice of the answer
log_probs() { python3 -c "import json, math, sys; c = json.load(open(sys.argv[1]))['choices'][0]; $1" "$out"; }
check "logprobs of a chat" log_probs 'e = c["logprobs"]["content"]; assert len(e) == 12 and "".join(x["token"] for x in e) == c["message"]["content"]'
check "the most likely token was chosen" log_probs 'e = c["logprobs"]["content"]; assert all(len(x["top_logprobs"]) == 3 and x["top_logprobs"][0]["token"] == x["token"] and x["top_logprobs"][0]["logprob"] == x["logprob"] <= 0 for x in e)'
check "its bytes are its text" log_probs 'e = c["logprobs"]["content"]; assert all(bytes(x["bytes"]).decode() == x["token"] for x in e)'
post $chat "{$question,\"temperature\":0,\"logprobs\":true,\"stream\":true}"
check "logprobs come with the pieces of a stream" test "$(grep -o '"logprob":' "$out" | wc -l)" = 12
post $text '{"prompt":"one two three","temperature":0,"logprobs":2,"max_tokens":4}'
check "logprobs of a text are lists" log_probs 'l = c["logprobs"]; assert len(l["tokens"]) == len(l["token_logprobs"]) == len(l["top_logprobs"]) == 4 and "".join(l["tokens"]) == c["text"]'
# The answer begins with the prompt, and has the log-probabilities of its tokens.
post $text '{"prompt":"one two three four five","temperature":0,"echo":true,"logprobs":2,"max_tokens":1}'
check "echo: the answer begins with the prompt" log_probs 'assert c["text"].startswith("one two three four five") and c["text"] == "".join(c["logprobs"]["tokens"])'
check "its tokens have log-probabilities, except the first" log_probs 'l = c["logprobs"]; assert len(l["tokens"]) == 6 and l["token_logprobs"][0] is None and l["top_logprobs"][0] is None and all(v < 0 and max(t.values()) >= v and len(t) == 2 for v, t in zip(l["token_logprobs"][1:], l["top_logprobs"][1:]))'
cp "$out" "$tmp/echo"
post $text '{"prompt":"one two three four five","temperature":0,"echo":true,"logprobs":2,"max_tokens":0}'
same_start() { python3 -c 'import json, sys; a, b = (json.load(open(x))["choices"][0]["logprobs"]["token_logprobs"][:5] for x in sys.argv[1:]); sys.exit(a != b)' "$out" "$tmp/echo"; }
check "they are the same in the next request" same_start
check "max_tokens 0 generates nothing" log_probs 'assert c["text"] == "one two three four five" and len(c["logprobs"]["tokens"]) == 5 and c["finish_reason"] == "length"'
post $text '{"prompt":"one two three four five","temperature":0,"echo":true,"logprobs":2,"max_tokens":1,"stream":true}'
check "echo in a stream" eval 'test "$(sed -n "s/.*\"text\":\"\([^\"]*\)\".*/\1/p" "$out" | tr -d "\n")" = "$(python3 -c "import json; print(json.load(open(\"$tmp/echo\"))[\"choices\"][0][\"text\"])")"'
post $text '{"prompt":[504,253,216],"echo":true,"max_tokens":0}'
check "echo of ids is their text" log_probs 'assert c["text"] and c["logprobs"] is None'
# Several prompts: each gets the same answer as alone.
for prompt in '"one two three"' '[504,253,216]'; do
    post $text "{\"prompt\":$prompt,\"temperature\":0,\"max_tokens\":9}"
    cp "$out" "$tmp/alone${prompt%%[!\[]*}"
done
several() { python3 -c 'import json, sys
got = json.load(open(sys.argv[1])); alone = [json.load(open(x)) for x in sys.argv[2:]]
assert [c["index"] for c in got["choices"]] == list(range(len(alone)))
assert [c["text"] for c in got["choices"]] == [a["choices"][0]["text"] for a in alone]
assert got["usage"]["completion_tokens"] == sum(a["usage"]["completion_tokens"] for a in alone)' "$out" "$@"; }
post $text '{"prompt":["one two three","one two three","one two three","one two three","one two three"],"temperature":0,"max_tokens":9}'
check "five texts with two places" several "$tmp/alone" "$tmp/alone" "$tmp/alone" "$tmp/alone" "$tmp/alone"
post $text '{"prompt":[[504,253,216],[504,253,216]],"temperature":0,"max_tokens":9}'
check "two lists of ids" several "$tmp/alone[" "$tmp/alone["
post $text '{"prompt":["one two three",[504,253,216]],"temperature":0,"max_tokens":9}'
check "a text and a list of ids" several "$tmp/alone" "$tmp/alone["
post $text '{"prompt":["one two three",[504,253,216]],"temperature":0,"max_tokens":9,"stream":true}'
streamed() { python3 -c 'import json, sys
got = ["", ""]
for line in open(sys.argv[1]):
    if line.startswith("data: {"):
        for c in json.loads(line[6:])["choices"]: got[c["index"]] += c["text"]
assert got == [json.load(open(x))["choices"][0]["text"] for x in sys.argv[2:]]' "$out" "$tmp/alone" "$tmp/alone["; }
check "both in one stream" streamed

post $text '{"prompt":"a a a a a a a a","temperature":0,"max_tokens":8}'
cp "$out" "$tmp/repeated"
post $text '{"prompt":"a a a a a a a a","temperature":0,"max_tokens":8,"frequency_penalty":2,"presence_penalty":2}'
cmp_text() { python3 -c 'import json, sys; a, b = (json.load(open(x))["choices"][0]["text"] for x in sys.argv[1:]); sys.exit(a != b)' "$out" "$1"; }
differs() { ! cmp_text "$tmp/repeated"; }
check "penalties change the answer" differs

# Options of other servers.
post $text '{"prompt":"a a a a a a a a","temperature":0,"max_tokens":8,"repetition_penalty":5}'
check "repetition_penalty changes the answer" differs
cp "$out" "$tmp/penalty"
post $text '{"prompt":"a a a a a a a a","temperature":0,"max_tokens":8,"repeat_penalty":5}'
check "repeat_penalty, too" eval 'differs && cmp_text "$tmp/penalty"'
post $text '{"prompt":"a a a a a a a a","temperature":0,"max_tokens":8,"repeat_penalty":5,"repeat_last_n":0}'
check "but not with repeat_last_n 0" cmp_text "$tmp/repeated"
check "both are refused" refuses 400 combined $text '{"prompt":"a","repetition_penalty":2,"repeat_penalty":2}'
for rule in '"top_k":1' '"min_p":1' '"top_p":0' '"typical_p":0,"top_k":1' '"top_n_sigma":0.001'; do
    post $text "{\"prompt\":\"a a a a a a a a\",\"temperature\":2,\"max_tokens\":8,$rule}"
    check "$rule gives the most likely text" cmp_text "$tmp/repeated"
done
post $text '{"prompt":"a a a a","top_k":-1,"top_n_sigma":-1,"typical_p":1,"max_tokens":1}'
check "the values that switch rules off work" test "$code" = 200
ends='"messages":[{"role":"user","content":"Say only the word Yes."}],"temperature":0,"max_tokens":150'
post $chat "{$ends}"
check "an answer ends before max_tokens" out_has '"finish_reason":"stop"'
post $chat "{$ends,\"ignore_eos\":true}"
check "with ignore_eos it does not" out_has '"completion_tokens":150'
post $chat "{$question}"
prompt_tokens=$(grep -o '"prompt_tokens":[0-9]*' "$out")
post $chat "{$question,\"chat_template_kwargs\":{\"add_generation_prompt\":false}}"
check "chat_template_kwargs reach the template" eval 'test "$code" = 200 && ! out_has "$prompt_tokens" >"$tmp/shown"'
check "refuses other chat_template_kwargs" refuses 400 chat_template_kwargs $chat "{$question,\"chat_template_kwargs\":[1]}"
check "refuses them for a text" refuses 400 chat_template_kwargs $text '{"prompt":"a","chat_template_kwargs":{}}'
harmless='"model":"x","user":"x","store":true,"metadata":{"a":"b"},"service_tier":"auto","safety_identifier":"x","prompt_cache_key":"x","prompt_cache_retention":"24h","prediction":{"type":"content","content":"x"},"cache_prompt":true,"n":1,"modalities":["text"],"functions":[],"function_call":"auto","echo":false,"reasoning_effort":null,"stop_token_ids":[],"min_tokens":0,"length_penalty":1.0,"skip_special_tokens":true,"logit_bias":{},"tools":[],"stream":false'
post $chat "{$question,\"temperature\":0,$harmless}"
check "options that change nothing are accepted" out_has "$whole"
for other in '"reasoning_effort":"high"' '"min_tokens":5' '"guided_json":{"type":"object"}' '"grammar":"root ::= \"a\""' '"length_penalty":2' '"temprature":0' '"skip_special_tokens":false' '"verbosity":"low"' '"web_search_options":{}' '"functions":[{"name":"a"}]' '"modalities":["audio"]' '"suffix":"x"' '"prompt":"x"' '"xtc_probability":0.5'; do
    name=${other#?}
    check "refuses $other" refuses 400 "${name%%\"*} is not supported" $chat "{$question,$other}"
done
check "refuses a long name" refuses 400 "$(yes é | head -n 30 | tr -d '\n') is not supported" $chat "{$question,\"$(yes é | head -n 300 | tr -d '\n')\":1}"
check "cuts it between characters" refuses 400 "a$(yes é | head -n 29 | tr -d '\n') is not supported" $chat "{$question,\"a$(yes é | head -n 300 | tr -d '\n')\":1}"
check "refuses messages for a text" refuses 400 "messages is not" $text "{$question,\"prompt\":\"a\"}"
check "refuses a wrong stream" refuses 400 "stream must" $chat "{$question,\"stream\":\"yes\"}"
check "refuses wrong stream_options" refuses 400 stream_options $chat "{$question,\"stream\":true,\"stream_options\":[]}"
check "refuses a wrong include_usage" refuses 400 include_usage $chat "{$question,\"stream\":true,\"stream_options\":{\"include_usage\":1}}"
check "refuses a wrong ignore_eos" refuses 400 ignore_eos $chat "{$question,\"ignore_eos\":1}"

check "refuses a body that is not JSON" refuses 400 JSON $chat '{"messages":'
check "refuses an empty list of messages" refuses 400 messages $chat '{"messages":[]}'
check "refuses a picture" refuses 400 text $chat '{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}'
check "refuses tools that the template does not take" refuses 400 template $chat "{$question,\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a\"}}]}"
check "refuses an unknown format" refuses 400 response_format $chat "{$question,\"response_format\":{\"type\":\"xml\"}}"
check "refuses a format without a schema" refuses 400 schema $chat "{$question,\"response_format\":{\"type\":\"json_schema\"}}"
check "refuses a wrong schema" refuses 400 type $chat "{$question,\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"type\":7}}}}"
check "refuses echo in a chat" refuses 400 echo $chat "{$question,\"echo\":true}"
check "refuses a wrong echo" refuses 400 echo $text '{"prompt":"a","echo":1}'
check "refuses a wrong number of logprobs" refuses 400 logprobs $text '{"prompt":"a","logprobs":21}'
check "refuses top_logprobs without logprobs" refuses 400 needs $chat "{$question,\"top_logprobs\":2}"
check "refuses a wrong penalty" refuses 400 presence $chat "{$question,\"presence_penalty\":3}"
check "refuses two choices" refuses 400 "n is not" $chat "{$question,\"n\":2}"
check "refuses a wrong temperature" refuses 400 temperature $chat "{$question,\"temperature\":\"hot\"}"
check "refuses a wrong stop" refuses 400 stop $chat "{$question,\"stop\":[1]}"
check "refuses an id outside the vocabulary" refuses 400 token $text '{"prompt":[1,99999999]}'
check "refuses a missing prompt" refuses 400 prompt $text '{}'
check "refuses a number as a prompt" refuses 400 prompt $text '{"prompt":7}'
check "refuses an empty list" refuses 400 "no tokens" $text '{"prompt":[]}'
check "refuses an empty list among others" refuses 400 "no tokens" $text '{"prompt":[[1],[]]}'
check "refuses a list in a list in a list" refuses 400 "token id" $text '{"prompt":[[[1]]]}'
check "refuses ids among texts" refuses 400 prompt $text '{"prompt":["a",7]}'
check "refuses a text among ids" refuses 400 "token id" $text '{"prompt":[7,"a"]}'
check "refuses a text among ids of a list" refuses 400 "token id" $text '{"prompt":[[7,"a"]]}'
check "refuses too many prompts" refuses 400 1024 $text "{\"prompt\":[$(yes '[5],' | head -n 1024 | tr -d '\n')[5]]}"
check "refuses a schema for several prompts" refuses 400 response_format $text '{"prompt":["a","b"],"response_format":{"type":"json_object"}}'
check "refuses several prompts if one is too long" refuses 400 3000 $text "{\"prompt\":[[1],[$(yes 5, | head -n 3001 | tr -d '\n')5]]}"
check "refuses max_tokens of 0 in a chat" refuses 400 max_tokens $chat "{${question%,*},\"max_tokens\":0}"
check "refuses a long prompt" refuses 400 3000 $text "{\"prompt\":[$(yes 5, | head -n 3001 | tr -d '\n')5]}"
check "refuses a large body" refuses 413 large $text "{\"prompt\":\"$(head -c 30000 /dev/zero | tr '\0' a)\"}"
type=text/plain
check "refuses a content type that a web page could send" refuses 415 json $text '{"prompt":"a"}'
type=
check "refuses another address" refuses 404 address /v1/embeddings '{}'
check "refuses another method" refuses 405 POST $chat '{}' -X PUT

# Two requests run and one waits, so the fourth is refused. Clients that hang up free their places, streaming or not,
# also while they wait.
ask() { # ask BODY: in the background, sets $user
    curl -sN -o "$tmp/last" -H 'Content-Type: application/json' -d "$1" "$url$chat" &
    user=$!
    users="$users $user"
}
users=
ask "{$long,\"stream\":true}"
ask "{$long,\"stream\":false}"
check "two are answered" wait_until metric_is requests_running 2
for streams in true false true; do
    ask "{$long,\"stream\":$streams}"
    check "one waits, stream: $streams" wait_until metric_is requests_waiting 1
    check "one more is refused" refuses 429 many $chat "{$question}"
    [ "$streams$((hung_up += 1))" = true3 ] && break
    kill $user
    check "if it hangs up, it leaves the queue" wait_until metric_is requests_waiting 0
    check "while the others are answered" metric_is requests_running 2
done
kill $users 2>/dev/null # some are dead
check "clients that hang up free their places" wait_until metric_is requests_running 0
check "and leave the queue" metric_is requests_waiting 0
check "and are counted" metric_is requests_hung_up_total 5
post $chat "{$question,\"temperature\":0}"
check "the next answer is the usual one" out_has "$whole"

# Shutdown completes a running answer and refuses new requests.
curl -sN -o "$tmp/last" -H 'Content-Type: application/json' -d "{${question%,*},\"max_tokens\":300,\"stream\":true}" "$url$chat" &
user=$!
wait_until metric_is requests_running 1
kill -TERM $pid
check "after SIGTERM new requests are refused" wait_until refuses 503 "shutting down" $text '{"prompt":"a","max_tokens":1}'
wait $user
check "a running answer is completed" grep -q DONE "$tmp/last"
wait $pid
check "and then the server exits with 0" test $? -eq 0
pid=

check "starts again" start
# Requests take turns: one prompt does not wait for all the prompts of an earlier request.
curl -s -o "$tmp/many" -H 'Content-Type: application/json' \
    -d "{\"prompt\":[$(yes '[504,253,216],' | head -n 400 | tr -d '\n')[5]],\"max_tokens\":40,\"ignore_eos\":true}" "$url$text" &
user=$!
wait_until metric_is requests_running 8
post $chat "{$question,\"temperature\":0}"
check "a request is answered before an earlier one with many prompts" eval 'out_has "$whole" && metric_is requests_waiting 1 && [ ! -s "$tmp/many" ]'
kill $user
wait_until metric_is requests_running 0

# A second SIGTERM ends the program.
: >"$tmp/last"
curl -sN -o "$tmp/last" -H 'Content-Type: application/json' -d "{$long,\"ignore_eos\":true,\"stream\":true}" "$url$chat" &
user=$!
wait_until grep -q content "$tmp/last"
kill -TERM $pid
wait_until refuses 503 "shutting down" $text '{"prompt":"a","max_tokens":1}'
kill -TERM $pid
wait $pid
check "a second SIGTERM ends the server at once" test $? -eq 1
pid=
wait $user
check "in the middle of an answer" eval '! grep -q DONE "$tmp/last"'

# A chat that is longer than the context.
turns() { for i in $(seq "$1"); do printf '{"role":"user","content":"%s, what do you think of the number?"},{"role":"assistant","content":"I like it."},' "$i"; done; }
talk='"messages":[{"role":"system","content":"Be brief."},%s{"role":"user","content":"%s"}],"max_tokens":10,"temperature":0'
short=$(printf "$talk" "" "What is the capital of France?")
long_chat=$(printf "$talk" "$(turns 60)" "What is the capital of France?")
check "starts with --ctx" start --ctx 256
check "refuses a long chat" refuses 400 256 $chat "{$long_chat}"
kill $pid
wait $pid
check "starts with --keep-free" start --ctx 256 --keep-free 50
post $chat "{$short}"
cp "$out" "$tmp/short"
check "leaves nothing out of a short chat" metric_is chats_shortened_total 0
post $chat "{$long_chat}"
check "answers a long chat" test "$code" = 200
check "with a prompt that leaves the room" python3 -c 'import json, sys; n, short = (json.load(open(x))["usage"]["prompt_tokens"] for x in sys.argv[1:]); assert short < n <= 206, n' "$out" "$tmp/short"
check "and counts it" metric_is chats_shortened_total 1
post $chat "{$long_chat,\"stream\":true}"
check "also in a stream" out_has "data: [DONE]"
check "refuses a last turn that is too long" refuses 400 "the limit is 206" $chat "{$(printf "$talk" "$(turns 3)" "$(yes word | head -n 220 | tr '\n' ' ')")}"
post $chat "{\"messages\":[$(turns 60)$(turns 1 | sed 's/,{"role":"assistant".*//')],\"max_tokens\":3}"
check "answers a long chat without a system message" test "$code" = 200
post $text "{\"prompt\":[$(yes 5, | head -n 250 | tr -d '\n')5],\"max_tokens\":1}"
check "a text may use the whole context" test "$code" = 200
kill $pid
wait $pid
check "explains a --keep-free that is too large" eval '! "$server" -m "$model" --ctx 256 --keep-free 256 2>"$out" && out_has keep-free'

check "starts with a key" start --key secret
post $chat "{$question}"
check "a missing key is refused" test "$code" = 401
post $chat "{$question}" -H 'Authorization: Bearer secret'
check "the right key is accepted" test "$code" = 200
check "a wrong key is refused" refuses 401 key $chat "{$question}" -H 'Authorization: Bearer secreT'
get /health
check "/health needs no key" test "$code" = 200
kill $pid
wait $pid

# Tools need a template that takes them. In the second template, the mark of a call is a control token.
python3 tests/with_template.py "$model" tests/tools.jinja "$tmp/model.gguf"
check "starts with another template" start --model "$tmp/model.gguf"
for case in $(python3 tests/server_tools.py); do check "tools: $case" python3 tests/server_tools.py "$url" "$case"; done
kill $pid
wait $pid
python3 tests/with_template.py "$model" tests/tools-mistral.jinja "$tmp/model.gguf" '<|im_start|>=[TOOL_CALLS]' '<issue_start>=[INST]' '<issue_comment>=[/INST]'
check "starts with Mistral's marks" start --model "$tmp/model.gguf"
check "tools: mistral" python3 tests/server_tools.py "$url" mistral
kill $pid
wait $pid

# A model whose template cannot be run continues texts, and its chats fail with the reason, which is also printed.
echo '{{ messages|groupby("role") }}' >"$tmp/template"
python3 tests/with_template.py "$model" "$tmp/template" "$tmp/model.gguf"
check "starts with a template that it cannot run" start --model "$tmp/model.gguf"
check "the reason is printed at the start" grep -q "will fail.*the filter groupby is not supported" "$tmp/log"
check "a chat fails with the reason" refuses 400 "the filter groupby is not supported" $chat "{$question}"
post $text '{"prompt":"Hi","max_tokens":2}'
check "a text is continued" test "$code" = 200
kill $pid
wait $pid

# The server answers more connections than select() can handle.
if ulimit -n 3000 2>/dev/null; then
    check "starts for many connections" start --queue 2000
    many() { python3 -c 'import socket, sys
all = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(1200)]
all[-1].sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"); all[-1].settimeout(60)
assert b"200 OK" in all[-1].recv(100)' "${url##*:}"; }
    check "the 1200th connection is answered" many
    files() { test "$(find /proc/$pid/fd -mindepth 1 | wc -l)" -le "$1"; }
    check "and all are closed" wait_until files 20
    kill $pid
    wait $pid
fi

check "explains a missing model" eval '! "$server" -m "$tmp/absent" 2>"$out" && out_has absent'
check "explains a wrong address" eval '! "$server" -m "$model" --host nowhere.invalid 2>"$out" && out_has nowhere'
finish
