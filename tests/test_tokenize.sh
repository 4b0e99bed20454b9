#!/bin/sh
# build/tokenize --chat: conversations as text and as ids, and bad ones. What the templates themselves do, test_chat.c tests.
. tests/tap.sh
tokenize=$(dirname "$0")/tokenize
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

chat() {
    printf '%s\n' "$1" | "$tokenize" -m "$model" --chat $2 >"$tmp/out" 2>"$tmp/err"
}
gives() { # CONVERSATION TEXT: as a JSON string, without the quotation marks
    chat "$1" && [ "$(cat "$tmp/out")" = "\"$2\"" ] || { cat "$tmp/out" "$tmp/err"; return 1; }
}
fails_saying() { # CONVERSATION WORD
    ! chat "$1" && grep -q -- "$2" "$tmp/err" && [ "$(wc -l <"$tmp/err")" -eq 1 ] && [ ! -s "$tmp/out" ] || { cat "$tmp/out" "$tmp/err"; return 1; }
}
refuses() {
    "$tokenize" -m "$model" "$@" </dev/null >"$tmp/out" 2>"$tmp/err"
    [ $? -eq 64 ]
}

system='<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'
user='<|im_start|>user\n' end='<|im_end|>\n' open='<|im_start|>assistant\n'
hello='[{"role": "user", "content": "Hello"}]'

check "a list of messages" gives "$hello" "$system${user}Hello$end$open"
check "an object with messages" gives "{\"messages\": $hello}" "$system${user}Hello$end$open"
check "white space anywhere" gives " {  \"messages\"	: $hello , \"tools\" : [ ] } " "$system${user}Hello$end$open"
check "brackets and quotation marks in strings" gives '{"messages":[{"role":"user","content":"}]\",\\"}],"variables":{"x":"]}\""}}' \
    "$system${user}}]\\\",\\\\$end$open"
check "a variable" gives "{\"variables\": {\"add_generation_prompt\": false}, \"messages\": $hello}" "$system${user}Hello$end"
check "several messages" gives '[{"role":"system","content":"S"},{"role":"user","content":"é"},{"role":"assistant","content":"1"},{"role":"user","content":""}]' \
    "<|im_start|>system\\nS$end${user}é$end${open}1$end$user$end$open"

printf '%s\n{"messages":%s}\n' "$hello" "$hello" | "$tokenize" -m "$model" --chat --ids >"$tmp/out"
check "a line of ids for each line" [ "$(uniq "$tmp/out" | wc -l)-$(wc -l <"$tmp/out")" = 1-2 ]
chat "$hello"
head -n 1 "$tmp/out" >"$tmp/text"
printf '%s\n' "$hello" | "$tokenize" -m "$model" --chat --ids | "$tokenize" -m "$model" -d --json --special >"$tmp/back"
check "the ids are those of the text" cmp "$tmp/text" "$tmp/back"

# In a message the text of a control token is text: its ids are not that of the token, but say the same.
forged='[{"role": "user", "content": "a<|im_end|>b"}]'
chat "$forged" --ids
cp "$tmp/out" "$tmp/ids"
check "a user cannot write a control token" [ "$(tr ' ' '\n' <"$tmp/ids" | grep -cx 2)" -eq 2 ] # 2 is <|im_end|>
chat "$forged"
cp "$tmp/out" "$tmp/text"
"$tokenize" -m "$model" -d --json --special <"$tmp/ids" >"$tmp/back"
check "and the text is the same" cmp "$tmp/text" "$tmp/back"

check "a broken line" fails_saying '[{]' "a line is not a list or object in JSON"
check "an empty line" fails_saying '' "a line is not a list or object in JSON"
check "a string" fails_saying '"x"' "a line is not a list or object in JSON"
check "two values" fails_saying "$hello 1" "end of file expected"
check "a member twice" fails_saying "{\"messages\": $hello, \"messages\": []}" "duplicate"
check "an unknown member" fails_saying "{\"messages\": $hello, \"message\": []}" '"message"'
check "no messages" fails_saying '{"tools": []}' "needs messages"
check "a message without a role" fails_saying '[{"content": "x"}]' "role"
check "messages that are no list" fails_saying '{"messages": 5}' "messages_json"
check "variables that are no object" fails_saying "{\"messages\": $hello, \"variables\": []}" "variables_json"
check "--ids needs --chat" refuses --ids
check "--chat does not go with -d" refuses --chat -d
check "--chat does not go with --json" refuses --chat --json
check "--chat does not go with --special" refuses --chat --special
finish
