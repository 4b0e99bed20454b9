#!/usr/bin/env python3
"""Writes tests/golden/chat.jsonl: conversations that Jinja renders with models' chat templates, and small templates that use
every construct of the language.

    pip install jinja2
    python3 tokenizer/chat.py tests/golden/chat.jsonl [DIRECTORY]

The templates are the published ones, except that branches for tools in long templates only contain "...". If a directory of
published templates is given (such as llama.cpp's models/templates), the script checks that these render the same.
"""

import json
import os
import sys

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)


def chatml(default, start=""):
    first = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n%s<|im_end|>\n' }}{% endif %}"
    return start + "{% for message in messages %}" + (first.replace("%s", default) if default else "") + "{{" + CHATML + "}}{% endfor %}" + GENERATION


QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are not this.' }}
    {%- endif %}
    {{- "..." }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- "..." }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- "..." }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN3 = r"""{%- if tools %}
    {{- "..." }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {{- "..." }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- "..." }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
# The version of later models.
QWEN3_STRINGS = (
    QWEN3.replace('"user" and not(', '"user" and message.content is string and not(')
    .replace(
        """{%- for message in messages %}
    {%- if (message.role == "user")""",
        """{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user")""",
    )
    .replace(r"'\n' + message.content + '<|im_end|>'", r"'\n' + content + '<|im_end|>'")
    .replace("""        {%- set content = message.content %}
        {%- set reasoning""", "        {%- set reasoning")
    .replace("reasoning_content is defined and message.reasoning_content is not none", "reasoning_content is string")
)
_first = QWEN3_STRINGS.index("                {%- set content = message.content.split")
_second = QWEN3_STRINGS.index("                {%- set reasoning_content = message.content.split")
_end = QWEN3_STRINGS.index("            {%- endif %}", _second)
QWEN3_STRINGS = (
    QWEN3_STRINGS[:_first] + QWEN3_STRINGS[_second:_end] + QWEN3_STRINGS[_first:_second] + QWEN3_STRINGS[_end:]
).replace("in message.content %", "in content %").replace("message.content.split", "content.split")
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message != false %}"
    r"{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "..." }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- "..." }}
    {%- else %}
        {{- "..." }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{#- Custom tools are passed in a user message with some extra guidance #}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("...") }}
{%- endif %}
    {{- "..." -}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- "..." }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "..." }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA32 = (
    LLAMA31.replace('''    {%- set date_string = "26 Jul 2024" %}
''', '''    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
''')
    .replace("builtin_tools is defined or tools", "tools")
    .replace('''{%- if builtin_tools is defined %}
    {{- "..." }}
{%- endif %}
''', "")
)
MISTRAL_01 = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token%s}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


ALTERNATE_BEFORE = r"""{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate") }}
    {%- endif %}
{%- endfor %}
"""
ALTERNATE_COUNTED = r"""{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{#- This block checks for alternating user/assistant messages, skipping tool calling messages #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

"""


def mistral(first, user, close, answer, before="", inside=""):
    return r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
BEFORE{{- bos_token }}
{%- for message in loop_messages %}
INSIDE    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "..." }}
        {%- endif %}
        {%- if FIRST and system_message is defined %}
            {{- "USER" + system_message + "\n\n" + message["content"] + "CLOSE" }}
        {%- else %}
            {{- "USER" + message["content"] + "CLOSE" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "..." }}
    {%- elif message["role"] == "assistant" %}
        {{- ANSWER + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- "..." }}
    {%- else %}
        {{- raise_exception("only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
""".replace("BEFORE", before).replace("INSIDE", inside).replace("FIRST", first).replace("USER", user).replace("CLOSE", close).replace("ANSWER", answer)


ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Like the template of Tulu 3, which has Zephyr's tokens.
TULU = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
EOS_AFTER_ANSWERS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}{% else %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ANSWER_IN_A_VARIABLE = (
    "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + content + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_BEFORE_INST = (
    "{% set system_message = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    r"{% set system_message = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% endif %}{{ bos_token + system_message }}"
    "{% for message in rest %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_FIRST = (
    "{% set ns = namespace(first=true) %}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}{% if loop.first and system %}"
    r"{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# Templates with the tokens of a known template that render differently: variations of the above, each with a small change.
ODD = {
    "Yi": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}",
    "ChatML, trimmed": chatml("").replace("message['content']", "message['content'] | trim"),
    "ChatML, no line": chatml("").replace("'<|im_end|>' + '\n'", "'<|im_end|>'"),
    "ChatML, text between": chatml("").replace("{% if add", "Now:{% if add"),
    "ChatML, line shown": chatml("").replace("}}{% endfor", "}}\n{% endfor"),
    "ChatML, default always": chatml("Be good.").replace("loop.first and messages[0]['role'] != 'system'", "loop.first"),
    "ChatML, open end": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}{% if (loop.last and add_generation_prompt) or "
    "not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}" + GENERATION,
    "ChatML, thinking": chatml("").replace("'<|im_start|>assistant\n'", r"'<|im_start|>assistant\n<think>\n'"),
    "ChatML, escaped default": chatml(r"It\'s you."),
    "ChatML, line before": "\n" + chatml(""),
    "ChatML, other branch": chatml("").replace("{{'<|im", "{% if message['role'] == 'user' %}{{'<|im").replace("}}{% endfor", "}}{% elif message.role == 'assistant' %}{{ '' }}{% endif %}{% endfor"),
    "ChatML, joined words": chatml("").replace("if add_generation", "ifadd_generation"),
    "ChatML, quotes inside": chatml("").replace("'<|im_start|>' + message['role'] + '\n'", '''"<|im_start|>'+message.role+'\n"'''),
    "Qwen2.5, tools always": QWEN25.replace("{%- if tools %}", "{%- if true %}"),
    "Qwen3, opens with thoughts": QWEN3.replace(r"{{- '<|im_start|>assistant\n' }}", r"{{- '<|im_start|>assistant\n<think>\n' }}"),
    "Qwen3, keeps all thoughts": QWEN3.replace("loop.index0 > ns.last_query_index", "loop.index0 > -1"),
    "Llama-2, default": LLAMA2.replace("system_message = false", "system_message = 'Be safe.'"),
    "Llama-2, loop.first": LLAMA2_FIRST,
    "Llama-2, one tag of two": LLAMA2.replace("%}{% else", "% else", 1),
    "Llama-3, default": LLAMA3.replace("{{ content }}", "{% if loop.first and message['role'] != 'system' %}{{ 'Be safe.' }}{% endif %}{{ content }}"),
    "Llama-3, other answer": LLAMA3.replace("<|start_header_id|>assistant", "<|start_header_id|>ai"),
    "Llama-3, always open": LLAMA3.replace("{% if add_generation_prompt %}", "").replace("\n\n' }}{% endif %}", "\n\n' }}"),
    "Llama-3.1, other date": LLAMA31.replace("26 Jul", "27 Jul"),
    "Mistral, default": mistral("loop.first", "[INST] ", " [/INST]", "message['content']", ALTERNATE_BEFORE).replace("messages %}\n{%- endif", "messages %}{%- set system_message = 'Be safe.' %}\n{%- endif"),
    "Mistral, answer in a variable": ANSWER_IN_A_VARIABLE,
    "Mistral, system before": SYSTEM_BEFORE_INST,
    "Mistral, other spaces": mistral("loop.last", "[INST]", " [/INST]", 'message["content"]', ALTERNATE_COUNTED),
    "Tulu": TULU,
    "Zephyr, end after answers": EOS_AFTER_ANSWERS,
    "Zephyr, no lines": ZEPHYR.replace("}}\n", "}}"),
}
# name: (template, file name of the published template)
TEMPLATES = {
    "SmolLM2": (chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), None),
    "Qwen2": (chatml("You are a helpful assistant.").replace("\n", r"\n"), None),
    "Qwen2.5": (QWEN25, "Qwen-Qwen2.5-7B-Instruct.jinja"),
    "ChatML": (chatml(""), None),
    "ChatML with BOS": (chatml("", "{{bos_token}}"), None),
    "Dolphin": (chatml("", "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"), None),
    "ChatML, other quotes": (chatml("You are a bot.").replace("'", '"').replace('["role"]', ".role"), None),
    "Qwen3": (QWEN3, "Qwen-Qwen3-0.6B.jinja"),
    "Qwen3, strings": (QWEN3_STRINGS, None),
    "Llama-2": (LLAMA2, None),
    "Llama-2, trimmed by a filter": (LLAMA2.replace(".strip()", " | trim"), None),
    "Llama-3": (LLAMA3, None),
    "Llama-3.1": (LLAMA31, "meta-llama-Llama-3.1-8B-Instruct.jinja"),
    "Llama-3.2": (LLAMA32, "meta-llama-Llama-3.2-3B-Instruct.jinja"),
    "Mistral 0.2": (MISTRAL_01.replace("%s", ""), None),
    "Mistral 0.1": (MISTRAL_01.replace("%s", " + ' '"), None),
    "Mixtral": (mistral("loop.first", " [INST] ", " [/INST]", "' ' + message['content']", inside=ALTERNATE + "\n"), None),
    "Mistral 0.3": (mistral("loop.last", "[INST] ", "[/INST]", '" " + message["content"]|trim', ALTERNATE_COUNTED), None),
    "Mistral-Nemo": (mistral("loop.last", "[INST]", "[/INST]", 'message["content"]', ALTERNATE_COUNTED), "mistralai-Mistral-Nemo-Instruct-2407.jinja"),
    "Mistral 0.3, checked before": (mistral("loop.last", "[INST] ", "[/INST]", '" " + message["content"]|trim', ALTERNATE_BEFORE), None),
    "Zephyr": (ZEPHYR, None),
    **{name: (template, None) for name, template in ODD.items()},
    "unknown": ("{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", None),
}
S, U, A = "system", "user", "assistant"
CONVERSATIONS = [
    [(U, "Hello")],
    [(S, "You are terse."), (U, "Who are you?")],
    [(U, "Hi"), (A, "Hello there."), (U, "  What is 2+2? \n")],
    [(S, "  Be kind.\n"), (U, " a\t"), (A, "\n b "), (U, "c"), (A, "d")],
    [(S, ""), (U, "")],
    [(U, "")],
    [(U, " \n")],
    [(U, "Hi"), (A, "Yes?"), (U, "")],
    [(S, "Short."), (U, "")],
    [(U, "é 你好 👍\u00a0"), (A, "<|im_end|></s>[/INST]<|eot_id|>"), (U, "<|im_start|>system\n")],
    [(A, "first"), (U, "second")],
    [(U, "one"), (S, "late"), (U, "two")],
    [(U, "one"), (A, "<think>\nmuch\n</think>\n\ntwo"), (U, "three"), (A, "\n<think>\n\n</think>\nfour\n")],
    [(U, "one"), (U, "<tool_response>x</tool_response>"), (A, "\nthinking</think>a"), (A, "plain"), (A, "\nlast")],
]


# Templates that test the language, each with variables.
V = {
    "s": "  Hello, World \n", "t": "a,b,,c", "u": "é Ünï 漢字 😀", "n": 7, "m": -3, "f": 2.5, "z": None, "yes": True,
    "list": [3, 1, 2], "names": ["b", "A", "c", "a"], "d": {"x": 1, "y": [1, {"z": None}], "k": "v"}, "empty": [],
    "people": [{"name": "Ann", "age": 30, "tags": ["x"]}, {"name": "bob", "age": 25}, {"name": "Cy", "age": 30, "tags": []}],
}
EXPRESSIONS = """
1 + 2 * 3 - 4 // 3 % 5|2 ** 3 ** 2|-2 ** 2|7 / 2|-7 // 2|-7 % 3|7 % -3|7.5 // 2|7.5 % 2|1e3|1e16|1e-5|0.1 + 0.2|1/3|100000000000000000000.0 * 10
'a' ~ 1 ~ none ~ true|'a' 'b' "c"|'x' * 3|[1] * 2 + [2]|'\\n\\t\\x41\\u00e9\\\\\\'' + "\\q"|(1, 'a', none)|(1,)|[1, 'it''s', "it's", 'q"', true, none, 1.0]|{'a': 1, 2: 'b'}
1 < 2 < 3|1 < 3 < 2|'a' < 'b'|[1, 2] < [1, 3]|1 == 1.0|true == 1|'1' == 1|none == none|x == y|not 1|not not ''|1 and 0 or 'c'|'' or 'd'|0 and x.y
'a' in 'cat'|4 not in list|'k' in d|'a' if n > 3 else 'b'|'a' if n > 9|('a' if n > 9 else 'b' if n > 5 else 'c')|list[0] + list[-1]|list[7]|d.k + d['k']|d.nothing|s[2]|u[0] + u[-1]
list[1:]|list[:-1]|list[::-1]|list[::2]|s[2:7]|u[2:5]|u[::-1]|t[-3:]|t[5:2]|list[2:0:-1]|d.y[1].z|d['y'][0]
s.strip()|s.lstrip() + '.'|s.rstrip() + '.'|'xxaxx'.strip('x')|'abcba'.lstrip('ab')|t.split(',')|t.split(',', 1)|t.rsplit(',', 1)|t.rsplit(',', 2)|t.rsplit(',', 9)|s.split()|'a--b--c'.split('--')[-1]
t.startswith('a,')|t.endswith(('x', 'c'))|t.replace(',', ';')|t.replace(',', ';', 2)|s.upper()|s.lower()|'hELLO wORLD-x'.title()|'hELLO'.capitalize()|u.upper()|u.lower()|'ПРИВЕТ Ω'.lower()|'привет ω ÿ'.replace('ÿ', '').upper()
t.find('c')|t.find('z')|u.find('漢')|t.rfind(',')|t.count(',')|'-'.join(['a', 'b'])|'a\\nb\\r\\nc\\n'.splitlines()|'abc'.removeprefix('a')|'abc'.removesuffix('bc')|'12'.isdigit()|'1a'.isdigit()|' '.isspace()|'{} {1} {a} {{}}'.format(1, 2, a='x')
d.items() | list|d.keys() | list|d.values() | list|d.get('x')|d.get('q')|d.get('q', 5)|list.index(1)|list.count(2)|d|d.y|'%' in s|range(3) | list|range(5, 0, -2) | list|dict(a=1, b=[2])
s | trim|'xax' | trim('x')|s | length|u | length|list | length|d | length|x | length|s | upper|'hello wORLD (it)' | title|'hELLO' | capitalize|t | replace(',', '')|list | join('-')|list | join|people | join(', ', attribute='name')
list | first|list | last|empty | first|s | first|'ab' | list|d | list|people | map(attribute='name') | list|people | map(attribute='tags', default='none') | list|names | map('upper') | list|names | map('replace', 'a', 'x') | join
list | select('odd') | list|list | reject('gt', 1) | list|people | selectattr('age', 'equalto', 30) | map(attribute='name') | join(' ')|people | rejectattr('tags') | list | length|people | selectattr('tags', 'defined') | list | length|[0, 1, '', 'a'] | select | list
x | default('q')|'' | default('q')|'' | default('q', true)|z | default('q')|z | d('q', true)|'a<b' | safe|5 | string + 'a'|'42' | int + 1|'4.7' | int|'x' | int|'x' | int(3)|'2.50' | float|'1e3' | float|3.9 | int|-3.9 | int|true | int
d | items | list|{'b': 1, 'a': 2} | dictsort|{'b': 1, 'a': 2} | dictsort(by='value', reverse=true)|list | sort|names | sort|names | sort(case_sensitive=true)|list | sort(reverse=true)|people | sort(attribute='age') | map(attribute='name') | list|[1, 2, 1, 'a', 'A'] | unique | list
list | reverse | list|'abc' | reverse|'a\\nb\\n\\nc' | indent|'a\\nb' | indent(2, true)|'a\\n\\nb' | indent(2, blank=true)|m | abs|2.567 | round|2.567 | round(2)|2.1 | round(method='ceil')|list | sum|people | sum(attribute='age')|list | min|list | max|names | min
d | tojson|d | tojson(indent=2)|list | tojson|u | tojson|u | tojson(ensure_ascii=true)|'a"b\\\\c\\n<&>' | tojson|{'b': 1.0, 'a': 1e20, 'c': none, 'd': true} | tojson(sort_keys=true)|d | tojson(separators=(',', ':'))|[] | tojson(indent=2)|{} | tojson|5 | tojson|-0.0 | tojson
x is defined|z is defined|x is undefined|z is none|s is string|d is mapping|list is sequence|s is sequence|list is iterable|5 is iterable|n is number|n is integer|f is float|yes is boolean|yes is true|0 is false|n is not odd|n is even|n is divisibleby 7|n is divisibleby(2)|n is eq 7|n is gt(3)|n is in [7]|'a' is lower|'A' is upper|none is none|n is sameas n
['\\xa0\\u200b\\u2028\\x85', '\\U000e0001'] | string|d.items is defined|d.keys is callable|d['items'] is callable|{'items': 1}.items is callable|{'items': 1}['items']|{'pop': 1}.pop is defined|''.strip is callable
x is sameas x|dict([['a', 1], ('b', 2)])|dict([1])|'h\\xe9y'.replace('', '-')|'h\\xe9y'.replace('', '-', 2)|x | reverse | list|'a\\u2028b\\x0bc\\r\\nd' | indent|'a\\n' | indent(blank=true)|'' | indent(2, true)|'a\\x85b\\x1cc'.splitlines()|[[[7]]] | map(attribute='0.00') | list
loop is defined|namespace(a=1).a|x.y|1 / 0|list | nothing_like_it|raise_exception('no')|5 + 'a'|'a' < 1|list.append(1)|none | length|5 | join
list.0|list. 1|{10: 'Bob'}.10|d.y.1.z|[[1, [2, 3]]].0.1.1|'abc'.1|list.7|d.0|x.0|5.0|list.1.5|list.01|list. 1.5|list.1e1|list.1_0|d[] is undefined|d[] | default('q')|{(): 5}[]|list[]|'a'[]|x[]|x[] is undefined
'a' is escaped|'a' | safe is escaped|5 is escaped|x is escaped|('a' | safe + 'b') is escaped|('a' ~ ('b' | safe)) is escaped|[' a<b ' | safe | trim, 'aB' | safe | upper, 'a b' | safe | title, 'a b' | safe | capitalize, 'ab' | safe | replace('a', '<'), ['<'] | join(',' | safe)]
[(' aB ' | safe).strip(), (' aB ' | safe).upper(), (' aB ' | safe).title(), ('a,b' | safe).split(','), ('a b' | safe).split(), ('a\nb' | safe).splitlines(), ('ab' | safe)[1:], ('ab' | safe)[::-1], ('ab' | safe)[0], ('ab' | safe) * 2, ('ab' | safe) | reverse, ('ab' | safe) | first, ('ab' | safe) | last, ('ab' | safe) | list]
[('a-b' | safe).replace('-', '<'), ('a-b' | safe).replace('-', '<' | safe), 'a-b'.replace('-', '<' | safe), (', ' | safe).join(['<', '&' | safe]), ', '.join(['<' | safe]), ('{}&{}{}' | safe).format('<', '>' | safe, ['"']), '{}'.format('<' | safe), ('ab' | safe).removeprefix('a'), ('a\nb' | safe) | indent, 'a\nb' | indent('<' | safe)]
('a<b' | safe | trim) + '<'|('a<b' | safe).strip() + '<'|('ab' | safe)[:1] + '<'|'<' + ('ab' | safe | upper)|('ab' | safe | title) + '<'|('ab' | safe | string) is escaped|('a' | safe) == 'a'|{'a' | safe: 1}.a|['<' | safe] | tojson|('a' | safe) is escaped == true
'trim' is filter|'wordwrap' is filter|'truncate' is filter|'from_json' is filter|'' is filter|x is filter|5 is filter|[] is filter|{} is filter|none is not filter|d.items() is filter|'sequence' is test|'==' is test|'<=' is test|'=' is test|'escaped' is test|'nothing' is test|x is test|[1] is test|namespace() is test|'trim' is filter 5|'a' is string 'b'|x is callable
['e', 'xmlattr', 'urlize', 'attr', 'tojson', 'tests', 'strftime'] | select('filter') | list|['in', 'odd', 'x', '>', 'filter', 'test'] | select('test') | list|list | select('>', 1) | list|list | select('<=', 2) | list|list | reject('>=', 2) | list|list | select('!=', 2) | list|people | selectattr('age', '<', 30) | list | length|['a' | safe, 'b'] | select('escaped') | list
'foo bar baz qux' | truncate(9)|'foo bar baz qux' | truncate(9, true)|'foo bar baz qux' | truncate(10)|'foo bar baz qux' | truncate(11, false, '...', 0)|'foo bar baz qux' | truncate(length=6, end='', leeway=0)|'foo bar' | truncate(3, leeway=0)|' bar baz qux' | truncate(4, leeway=0)|u | truncate(7, true, '…', 0)|u | truncate(7, false, '…', 0)|'foobarbaz' | truncate(5, leeway=none)
s | truncate|'x' * 260|'x' * 261|('x ' * 140) | truncate|('x' * 260) | truncate == 'x' * 260|('x' * 261) | truncate | length|x | truncate(9)|x | truncate is undefined|list | truncate|[1] * 9|([1] * 9) | truncate(3)|([1] * 9) | truncate(3, true)|d | truncate|d | truncate(3, leeway=0)|5 | truncate|none | truncate|true | truncate(true, false, '')
'abcdefghi' | truncate(2)|'abcdefghi' | truncate(-1, end='')|'abcdefghi' | truncate(4, leeway=-1)|'abcdefghi' | truncate(none)|'abcdefghi' | truncate(4, end=5)|'abcdefghi' | truncate('4')|'a<b c<d e' | safe | truncate(6, end='<', leeway=0)|'a<b c<d e' | truncate(6, end='<' | safe, leeway=0)|('a b c d e f' | safe | truncate(6, leeway=0)) is escaped|'abcdefghi' | truncate(3, leeway=0)|'abc' | truncate(1, 2, 3, 4, 5)
'0x1f' | int(base=16)|'1F' | int(0, 16)|'0b101' | int(base=2)|'0o17' | int(base=0)|'010' | int(base=0)|'00' | int(base=0)|'0x_1f' | int(base=0)|'zz' | int(base=36)|'12' | int(base=1)|'9' | int(5, base=8)|'1_000' | int|'1__0' | int|'_1' | int|'007' | int|'-0x1f' | int(7, 16)|'+5' | int|'' | int|'-' | int|'0x' | int(3, 16)|'99999999999999999999x' | int(1)|'99999999999999999999e-10' | int|'٣٤' | int|5 | int(base=16)|z | int(1, 16)|[] | int
'.5' | float|'5.' | float|'.' | float(1)|'007.50' | float|'1_0.2_5' | float|'1_.5' | float(1)|'1e+03' | float|'-1E-2' | float|'1e' | float(1)|'inf' | float|'-Infinity' | float|'nan' | float|'infinite' | float(1)|'inf' | int(2)|'nan' | int(2)|'1e3' | int|'.5' | int|'٣.٥' | float|'1e999' | float|'²' | int(9)
1.115 | round(2)|2.675 | round(2)|0.5 | round|1.5 | round|-2.5 | round|42 | round|42 | round(2)|true | round|1234 | round(-2)|1250 | round(-2)|1350.0 | round(-2)|7 | round(-1, 'floor')|42 | round(1, 'ceil')|2.15 | round(1, 'floor')|1 | round(method='x')|2.5 | round(20)|'a' | round
'a b  c ' .split(none, 1)|' a b c '.split(maxsplit=0)|' a b c '.rsplit(none, 1)|' a b  c '.rsplit(maxsplit=1)|' a b'.rsplit(none, 0)|'  '.split(none, 1)|'a b'.split(none, 9)|' a b c '.rsplit(none, 2)|'a\\x1cb\\x85c\\u3000d'.split()|'a b'.split(none, -1)|('a b c' | safe).split(none, 1)[1] is escaped
u.index('Ü')|t.index('z')|t.rindex(',')|t.index(',', 2)|t.find(',', 2)|t.find(',', -3)|t.find(',', 2, 3)|t.rfind(',', 0, 3)|t.count(',', 2)|t.count(',', none, 4)|t.find('')|t.rfind('')|u.count('')|t.find('', 9)|t.find('', 6)|t.find('', 4, 2)|''.count('')|t.startswith('b', 2)|t.startswith('b', 2, 3)|t.endswith('b', 0, 3)|t.startswith('', 9)|t.endswith(('x', 'b'), -5, -3)|u.find('😀', 5)|t.find('a', 'b')|t.count('c', true)
'٣'.isdigit()|'²'.isdigit()|'③'.isdigit()|'½'.isdigit()|'Ⅷ'.isdigit()|'𝟘'.isdigit()|'1٣'.isdigit()|'é'.isdigit()|''.isdigit()|'\\u2003\\u3000'.isspace()|'\\x1c'.isspace()|'\\u200b'.isspace()|' é'.isspace()|''.isspace()
d.items() | length|d.keys() | length|d.values() | count|d.items()|d.keys() ~ ''|d.values() | string|d.keys() is sequence|d.items() is iterable|list | select('odd') is sequence|('y' if list | select('gt', 9) else 'n')|('y' if {}.items() else 'n')|list | reverse | length|(list | reverse)[0] is defined|d | reverse | list|d.keys() | reverse | list|list | unique | length|namespace(a=1)|namespace(a=1) ~ 'x'|d.keys()[0] is defined
[[1], [2]] | sum(start=[])|[[1], 2] | sum(start=[])|['a'] | sum(start='')|[1, 2.5, true] | sum|list | sum(none, 5)|people | sum('age', 0.5)|[(1,), (2,)] | sum(start=())|(1, 'a') * 2|'ab' * true|false * [1]|[1] * -1|(list | map('string')) * 2|d.keys() + d.keys()|[d.keys()] | sum(start=[])|namespace(a=1) | tojson
people | sort(attribute='age,name') | map(attribute='name') | list|people | sort(attribute='age,name', reverse=true) | map(attribute='name') | list|people | sort(attribute='nothing') | map(attribute='name') | list|people | sort(attribute='age, name') | map(attribute='name') | list|[[2, 'b'], [1, 'B'], [1, 'a']] | sort(attribute='0,1')|['b', 'A'] | sort(attribute=none)|list | min(attribute=none)|list | join('-', none)|d | dictsort(by='x')|x | dictsort
'a\\nb' | indent(100)|'a\\nb' | indent(-1)|'a\\nb' | indent(true)|'a\\nb' | indent(1.5)|n | indent|z | indent|x | indent|d | tojson(indent=0)|d | tojson(indent=-1)|d | tojson(indent='--')|d | tojson(indent=true)|list | tojson(indent=70)|list | tojson(indent=1.5)|list | tojson(indent=none)
3.0 is odd|2.5 is odd|2.5 is even|true is odd|-3 is odd|'a' is odd|7.5 is divisibleby 2.5|7 is divisibleby(0)|1.0 is divisibleby 0.1|1.0 // 0.1|1e308 % 3|0.0 % -3|5.5 % 1e400|-5.5 % 1e400|-7.5 // 2|-0.0 // 3|7 // -2.5|true is divisibleby 1|list[true:]|t[:false]|list[2.0:]|z[:2]|list[::0]|list | select('string', 1) | list|list | map('upper', 1) | list|[] | map('upper', 1) | list|[1, 'a'] < [1, 'b']|[x] < [x]|[1, x] < [1, 2]
'{}'.format()|'}'.format()|'{0}{}'.format(1, 2)|kwargs is defined|varargs
'' | wordcount|'foo bar, b_z-q 1.5' | wordcount|u | wordcount|'e\u0301a x\u00b2 \u2167 \u200b' | wordcount|x | wordcount|5.25 | wordcount|list | wordcount|d | wordcount|none | wordcount|'a' | wordcount(1)|list | map('string') | map('wordcount') | sum
"""
STATEMENTS = [
    "{% for i in list %}{{ loop.index }}/{{ loop.index0 }}/{{ loop.first }}/{{ loop.last }}/{{ loop.length }}/{{ loop.revindex }}/{{ loop.revindex0 }}:{{ i }} {% endfor %}",
    "{% for i in list %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }} {{ loop.cycle('a', 'b') }}{% for j in 'xy' %}{{ loop.depth }}{{ j }}{% endfor %}\n{% endfor %}",
    "{% for i in list if i > 1 %}{{ loop.index }}{{ i }}{% else %}none{% endfor %}{% for i in empty %}x{% else %}none{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set a = 1 %}{% for i in list %}{% set a = i %}{{ a }}{% endfor %}{{ a }}{% set ns = namespace(a=0) %}{% for i in list %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
    "{% set a, b = 1, 'x' %}{{ a }}{{ b }}{% set c %}block {{ a }}{% endset %}[{{ c }}]{% set e | upper | trim %} up {% endset %}[{{ e }}]",
    "{% macro m(a, b='B', c=none) %}({{ a }}{{ b }}{{ c }}){% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(1, c=3) }}{{ m() }}{{ m('a' ~ m(2)) }}",
    "{% macro outer(x) %}{% if x > 0 %}{{ x }}{{ outer(x - 1) }}{% endif %}{% endmacro %}{{ outer(5) }}",
    "{% if n > 9 %}a{% elif n > 5 %}b{% else %}c{% endif %}{% if x %}{% elif z %}{% else %}d{% endif %}",
    "  {% if yes %}\n  line\n  {% endif %}\n\tend {%- if yes -%}  x  {%- endif %} y\n{{ n }}\n{{- n -}}\n z\n",
    "a {# note #} b\n  {# own line #}\nc {#- stripped -#} d{##}",
    "  {%+ if yes %} kept {% endif +%}\n next {% raw %}{{ raw }} {% if %}{% endraw %} {%- raw -%} {{ x }} {%- endraw -%} .",
    "{% filter upper %}a{{ s }}{% endfilter %}{% with a = 1, b = n %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% generation %}text{% endgeneration %}\n{{ {'a': {'b': [1, 2]}}.a.b[1] }}{{ '}}' }}{{ \"%}\" }}",
    "{{ '{{' }}{{ messages }}{{ bos_token }}{{ tools }}{{ add_generation_prompt }}",
    "{%- for message in messages -%}{{- message.role }}: {{ message['content'] | trim }}{{ '\\n' }}{%- endfor -%}",
    "line\r\nend\rlast\n\n",
    "{{ 'a<b>' | safe + '<c>&' }}{{ ('x' | safe) ~ '<y>' }}",
    "{% macro m(a, b='B') %}<{{ a }}{{ b }}{{ caller() }}>{% endmacro %}{% call m(1) %}x{{ n }}{% endcall %}{% call m(b=2) %}{% endcall %}",
    "{% macro m(l) %}{% for i in l %}{{ caller(i, b=loop.index) }}{% endfor %}{% endmacro %}{% call(a, b=0, c='C') m(list) %}{{ a }}{{ b }}{{ c }};{% endcall %}",
    "{% macro m() %}{{ caller }}{{ caller is defined }}{{ 'y' if caller }}{% endmacro %}{{ m() }}{{ m(caller=5) }}{{ m(caller=none) }}",
    "{% macro m() %}{{ caller is callable }}{{ caller is undefined }}{% endmacro %}{% set caller = 'x' %}{{ m() }}{% call m() %}{% endcall %}{{ caller }}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{% for i in list %}{% call m() %}{{ i }}{{ loop.index }}{% set i = 9 %}{{ i }}{% endcall %}{{ i }};{% endfor %}",
    "{% macro m(n) %}{% if n %}{% call(x) m(n - 1) %}{{ n }}{{ x }},{% endcall %}{% endif %}{{ caller(n) }}{% endmacro %}{% call(x) m(3) %}({{ x }}){% endcall %}",
    "{% macro o() %}[{{ caller() }}]{% endmacro %}{% macro m() %}{% set up = caller %}{% call o() %}{{ up() }}{% endcall %}{% endmacro %}{% call m() %}x{% endcall %}",
    "{% macro o() %}[{{ caller() }}]{% endmacro %}{% macro m() %}{% call o() %}{{ caller is defined }}{% endcall %}{% endmacro %}{% call m() %}x{% endcall %}",
    "{% macro o() %}[{{ caller() }}]{% endmacro %}{% macro m() %}{{ caller() }}{% call o() %}{{ caller is defined }}{% endcall %}{% endmacro %}{% call m() %}x{% endcall %}",
    "{% macro o() %}{{ caller() }}{% endmacro %}{% filter upper %}{% call o() %}  a{% endcall %}{% endfilter %}{% set x %}{% call o() -%} b {%- endcall %}{% endset %}[{{ x }}]",
    "{% macro m(caller=none) %}{{ caller() if caller }}.{% endmacro %}{{ m() }}{% call m() %}x{% endcall %}",
    "{% macro m(caller=none) %}{{ caller() if caller }}.{% endmacro %}{% call m(1) %}x{% endcall %}",
    "{% macro m(caller) %}{{ caller }}{% endmacro %}{{ m(1) }}",
    "{% macro m(caller) %}{% endmacro %}{% call m() %}x{% endcall %}.",
    "{% macro m() %}a{% endmacro %}{% call m() %}x{% endcall %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{% set caller = 1 %}{{ caller }}{% endmacro %}{{ m() }}{% call m() %}x{% endcall %}",
    "{% macro m() %}{% for caller in caller %}{{ caller }}{% endfor %}{% endmacro %}{% set caller = 'ab' %}{{ m() }}",
    "{% macro m() %}{% with caller = 1 %}{{ caller }}{% endwith %}{% endmacro %}{{ m() }}",
    "{% macro o(caller=2) %}{{ caller }}{% endmacro %}{% macro m() %}{{ o(caller=1) }}{% endmacro %}{{ m() }}{% call m() %}x{% endcall %}",
    "{% macro o(caller=2) %}{{ caller }}{% endmacro %}{% macro m() %}{{ o(caller=1) }}{{ caller() }}{% endmacro %}{% call m() %}x{% endcall %}",
    "{% macro m() %}{% set ns = namespace(caller=1) %}{% set ns.caller = 2 %}{{ ns.caller }}{% endmacro %}{{ m() }}{% call m() %}x{% endcall %}",
    "{% macro m(a=caller) %}{{ a is defined }}{% endmacro %}{{ m() }}{% call m() %}x{% endcall %}",
    "{% macro m(x) %}{{ caller(caller) }}{% endmacro %}{% call(f) m(caller=1) %}x{% endcall %}",
    "{% macro m() %}{{ caller(1, 2) }}{% endmacro %}{% call(f) m() %}x{% endcall %}",
    "{% call range(3) %}x{% endcall %}",
    "{% call x() %}x{% endcall %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() | upper %}x{% endcall %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{% call m %}x{% endcall %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{% for i in list %}{% call m() %}{% break %}{% endcall %}{% endfor %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}x{% endmacro %}",
    "{% macro m(a, b=1, c) %}{{ c }}{% endmacro %}{{ m(1, 2, 3) }}",
    "{% macro m(kwargs, varargs=2) %}{{ kwargs }}{{ varargs }}{% endmacro %}{{ m(kwargs=1) }}{% set joiner = 1 %}{{ joiner }}",
    "{% macro cycler(x) %}[{{ x }}]{% endmacro %}{{ cycler(1) }}{% for self in list %}{{ self }}{% endfor %}",
    "{% for i in list %}{% macro m(a) %}{{ i }}{{ a }}{{ loop.index }};{% endmacro %}{{ m(i) }}{% endfor %}{{ m is defined }}",
    "{% macro o(a) %}{% macro m() %}[{{ a }}]{% endmacro %}{{ m() }}{{ m() }}{% endmacro %}{{ o(1) }}{{ o(2) }}{{ m is defined }}",
    "{% with a = 1 %}{% macro m() %}{{ a }}{% endmacro %}{{ m() }}{% endwith %}{% set i = 5 %}{% macro m() %}{{ i }}{% endmacro %}{% set i = 6 %}{{ m() }}",
    "{% for i in [3, 2] %}{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(i) }}{% set i = 9 %}{{ m(0) }}{% endfor %}",
    "{% macro m() %}{% set kwargs = 1 %}{{ kwargs }}{% endmacro %}{{ m() }}{{ kwargs }}{{ varargs is defined }}",
    "{% set ns = namespace() %}{% for i in list %}{% set ns.l = loop %}{% if i == 1 %}{% break %}{% endif %}{% endfor %}{{ ns.l.index }}{{ ns.l.first }}{{ ns.l.previtem }}{{ ns.l.nextitem }}",
    "{% set ns = namespace() %}{% for i in list %}{% set ns.l = loop %}{% endfor %}{{ ns.l.index }}{{ ns.l.last }}{{ ns.l.revindex0 }}{{ ns.l.nextitem }}",
]


def refuse(message):
    raise TemplateError(message)


class Generation(Extension):
    """{% generation %}, which transformers defines to mark the assistant's text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller):
        return caller()


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    """Returns Jinja with the settings of transformers, except for the date."""
    settings = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    settings.globals["raise_exception"] = refuse
    settings.filters["tojson"] = to_json
    return settings


def render(template, **variables):
    """Renders a conversation. Returns None if that fails."""
    try:
        return environment().from_string(template).render(tools=None, documents=None, bos_token="<s>", eos_token="</s>", **variables)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, SyntaxError, TemplateError, TypeError, ValueError):
        return None


def main(output, directory=None):
    with open(output, "w", encoding="utf-8", newline="\n") as file:
        def write(name, template, cases):
            line = {"name": name, "template": template, "cases": cases}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")

        for name, (template, published) in TEMPLATES.items():
            cases = []
            for conversation in CONVERSATIONS:
                for open_answer in (True, False):
                    messages = [{"role": role, "content": content} for role, content in conversation]
                    date = {"date_string": "26 Jul 2024"}
                    text = render(template, messages=messages, add_generation_prompt=open_answer, **date)
                    cases.append({"messages": conversation, "open": open_answer, "text": text, "variables": json.dumps(date)})
                    if directory and published:
                        with open(os.path.join(directory, published), encoding="utf-8") as other:
                            assert render(other.read(), messages=messages, add_generation_prompt=open_answer, **date) == text, (name, conversation)
            write(name, template, cases)
        expressions = ["{{ " + e + " }}" for e in EXPRESSIONS.strip().replace("\n", "|").replace(" | ", "\0").split("|")]
        for template in [e.replace("\0", " | ") for e in expressions] + STATEMENTS:
            conversation = [(U, " Hi\n")]
            text = render(template, messages=[{"role": U, "content": " Hi\n"}], add_generation_prompt=False, **V)
            write(template, template, [{"messages": conversation, "open": False, "text": text, "variables": json.dumps(V)}])


if __name__ == "__main__":
    main(*sys.argv[1:])
