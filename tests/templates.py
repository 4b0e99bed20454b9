#!/usr/bin/env python3
"""Compares chat templates with jinja2, which uses the settings of Hugging Face transformers. The templates are those of llama.cpp: the
published ones in its models/templates, with random conversations, and the small ones in its tests, with the variables of these tests.
The library and jinja2 must give the same text, or both must refuse the conversation. Prints TAP.

    make test-templates         or, with jinja2 installed:  tests/templates.py build/libllm.so LLAMA.CPP [CONVERSATIONS [SEED]]

LLAMA.CPP is the folder of llama.cpp's source. CONVERSATIONS is the number of conversations for each published template.
"""

import ctypes
import datetime
import json
import os
import pathlib
import random
import re
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tokenizer"))

import chat  # noqa: E402

# ---- The two programs ----------------------------------------------------------------------------------------------------------

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER = {"added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "</s>", "special": True}],
             "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
             "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
UNSUPPORTED = 4  # LLM_ERROR_UNSUPPORTED


class ChatDesc(ctypes.Structure):
    """llm_chat_desc"""

    _fields_ = [("messages", ctypes.c_void_p), ("n_messages", ctypes.c_int), ("messages_json", ctypes.c_char_p),
                ("tools_json", ctypes.c_char_p), ("variables_json", ctypes.c_char_p), ("open_answer", ctypes.c_bool)]


class Error(ctypes.Structure):
    """llm_error"""

    _fields_ = [("code", ctypes.c_int), ("message", ctypes.c_char * 500)]


def to_json(value):
    return None if value is None else json.dumps(value, ensure_ascii=False).encode()


class Ours:
    """One chat template in the library, with a tokenizer of five tokens."""

    def __init__(self, library, template):
        self.library, self.tokenizer, err = library, ctypes.c_void_p(), Error()
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (("tokenizer.json", json.dumps(TOKENIZER)), ("tokenizer_config.json", json.dumps(TOKENS)),
                               ("chat_template.jinja", template)):
                pathlib.Path(folder, name).write_text(text, encoding="utf-8", newline="")
            if library.llm_tokenizer_load(ctypes.byref(self.tokenizer), os.fsencode(folder), None, ctypes.byref(err)):
                raise SystemExit(err.message.decode())

    def render(self, messages, tools, variables, open_answer):
        """Returns the text and None, or None and (code, message)."""
        desc, err = ChatDesc(None, 0, to_json(messages), to_json(tools), to_json(variables), open_answer), Error()
        text = ctypes.create_string_buffer(1 << 16)
        while True:
            n = self.library.llm_chat_render(self.tokenizer, ctypes.byref(desc), text, ctypes.c_size_t(len(text)), ctypes.byref(err))
            if n < 0:
                return None, (err.code, err.message.decode())
            if n < len(text):
                return text.raw[:n].decode(), None
            text = ctypes.create_string_buffer(n + 1)

    def refusal(self):
        """Returns the library's message if it does not support the template; None if it does."""
        _, err = self.render([{"role": "user", "content": "a"}], None, {}, False)
        found = re.match(r"the chat template, line \d+: (.*)", err[1]) if err and err[0] == UNSUPPORTED else None
        return found and found[1]

    def close(self):
        self.library.llm_tokenizer_free(self.tokenizer)


class Theirs:
    """The same template in jinja2."""

    def __init__(self, template):
        environment = chat.environment()
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self.template, self.error = environment.from_string(template), None
        except Exception as error:
            self.template, self.error = None, error

    def render(self, messages, tools, variables, open_answer):
        """Returns the text and None, or None and the error. A hostile template may raise any exception."""
        if not self.template:
            return None, self.error
        every = {**TOKENS, "documents": None, "tools": tools, "add_generation_prompt": open_answer, **variables, "messages": messages}
        try:
            return self.template.render(**every), None
        except Exception as error:
            return None, error


# ---- Random conversations ------------------------------------------------------------------------------------------------------

WORDS = ("Hello", "the weather in Z\u00fcrich", "\u4f60\u597d\uff0c\u4e16\u754c", "\U0001f44d\U0001f3fd", "e\u0301", "caf\u00e9\u00a0\u2028", "a\u200bb", "2+2?",
         "'single' \"double\"", "back\\slash", "<b>&amp;</b>", "{{ not }} {% a %} {# tag #}", "<|im_end|>", "<|im_start|>system\n", "</s>", "[INST]",
         "[/INST]", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "\n", "\n\n", "\t", " ", "   ", "\r\n", "0",
         "true", "null", "{\"a\": 1}", "[1, 2]", "\u0416\u0443\u043a", "\u0130\u0131\u1e9e\u00df", "\u05e9\u05dc\u05d5\u05dd", "/think", "/no_think", "<|eot_id|>")


class Random(random.Random):
    def chance(self, p):
        return self.random() < p

    def text(self, most=6):
        return self.choice(("", " ", "", "\n")).join(self.choices(WORDS, k=self.randint(0, most)))

    def name(self):
        return self.choice(("get_weather", "search", "run.code", "\u00fcbersetzen", "ipython", "a", "multi_tool_use.parallel", "send-mail"))

    def value(self, depth=2):
        """A JSON value."""
        kind = self.randint(0, 8 if depth else 5)
        if kind <= 1:
            return self.text(3)
        if kind == 2:
            return self.choice((0, 1, -1, 7, 42, -365, 1234567890123, 2**53, 123456789012345678))
        if kind == 3:
            return self.choice((0.5, -2.25, 3.0, 1e-7, 0.1, 1e16, 1.5e300, 2.718281828459045))
        if kind == 4:
            return self.choice((True, False))
        if kind == 5:
            return None
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.randint(0, 3))]
        return self.object(depth - 1)

    def object(self, depth=2):
        return {self.choice(("city", "unit", "n", "query", "k\u00e9y", "with space", "items", "id", "values", "")): self.value(depth) for _ in range(self.randint(0, 3))}

    def schema(self, depth=2):
        kind = self.choice(("string", "number", "integer", "boolean", "array", "object") if depth else ("string", "integer", "boolean"))
        schema = {"type": [kind, "null"] if self.chance(0.03) else kind}
        if self.chance(0.7):
            schema["description"] = self.text(3)
        if kind == "string" and self.chance(0.3):
            schema["enum"] = [self.text(1) for _ in range(self.randint(1, 3))]
        if kind == "array" and self.chance(0.8):
            schema["items"] = self.schema(depth - 1)
        if kind == "object":
            names = self.sample(("city", "unit", "n", "query", "k\u00e9y"), self.randint(0, 3))
            schema["properties"] = {name: self.schema(depth - 1) for name in names}
            if self.chance(0.6):
                schema["required"] = self.sample(names, self.randint(0, len(names)))
            if self.chance(0.2):
                schema["additionalProperties"] = False
        if self.chance(0.15):
            schema["default"] = self.value(1)
        if self.chance(0.1):
            schema["nullable"] = self.chance(0.5)
        if self.chance(0.05):
            schema = {"anyOf": [schema, {"type": "null"}]}
        return schema

    def tool(self):
        function = {"name": self.name(), "description": self.text(4), "parameters": {"type": "object", **self.schema(2)}}
        if self.chance(0.7):
            function["parameters"] = {"type": "object", "properties": {"city": self.schema(1), "n": self.schema(1)}, "required": ["city"]}
        if self.chance(0.15):
            function["return"] = self.schema(1)
        if self.chance(0.05):
            del function[self.choice(("description", "parameters"))]
        return function if self.chance(0.01) else {"type": "function", "function": function}

    def content(self):
        if self.chance(0.03):
            return [{"type": "text", "text": self.text()} if self.chance(0.9) else {"type": "image"} for _ in range(self.randint(0, 3))]
        return self.text()

    def call(self):
        arguments = self.object()
        function = {"name": self.name(), "arguments": json.dumps(arguments, ensure_ascii=False) if self.chance(0.3) else arguments}
        call = {"type": "function", "function": function}
        if self.chance(0.8):
            call["id"] = self.choice(("123456789", "123456789", "abcdefghi", "functions.search:0"))
        return function if self.chance(0.01) else call

    def answer(self):
        """Returns an assistant's message and the answers of the tools that it calls."""
        message = {"role": "assistant", "content": self.content()}
        messages = [message]
        if self.chance(0.25):
            message[self.choice(("reasoning_content", "reasoning_content", "reasoning", "thinking"))] = self.text()
        if self.chance(0.1):
            message["content"] = "<think>" + self.text() + "</think>" + self.text()
        if self.chance(0.05):
            message["tool_calls"] = self.choice(([], None))
        if self.chance(0.35):
            message["tool_calls"] = [self.call() for _ in range(self.choice((1, 1, 1, 2, 3)))]
            if self.chance(0.5):
                message["content"] = self.choice(("", "", None))
            if self.chance(0.04):
                del message["content"]
            for call in message["tool_calls"] if self.chance(0.9) else ():
                result = {"role": self.choice(("tool",) * 9 + ("ipython",)), "content": self.content()}
                if self.chance(0.8):
                    result["tool_call_id"] = call.get("id", "call_1")
                if self.chance(0.5):
                    result["name"] = call.get("function", call)["name"]
                messages.append(result)
            if self.chance(0.6):
                messages += self.answer()
        return messages

    def plain_conversation(self):
        roles = ["system"] * self.chance(0.3) + ["user", "assistant"] * self.randint(1, 4)
        return [{"role": role, "content": self.text()} for role in roles[:len(roles) - self.chance(0.7)]]

    def conversation(self):
        messages = [{"role": self.choice(("system",) * 9 + ("developer",)), "content": self.content()}] if self.chance(0.5) else []
        for _ in range(self.choice((1, 1, 2, 2, 3, 4))):
            messages.append({"role": "user", "content": self.content()})
            messages += self.answer()
        if self.chance(0.6):
            messages.append({"role": "user", "content": self.content()})
        if self.chance(0.04):
            self.shuffle(messages)
        return messages

    def variables(self):
        choices = {"enable_thinking": (True, False), "thinking": (True, False), "reasoning_effort": ("low", "high", "none"), "date_string": ("26 Jul 2024",),
                   "tools_in_user_message": (True, False), "builtin_tools": (["code_interpreter", "brave_search"],), "clear_thinking": (True, False),
                   "current_date": ("2026-01-02",), "model_identity": ("You are \u00c9va.",), "controls": ({"length": "short"},),
                   "documents": ([{"title": "T", "text": self.text(3)}], []), "add_thoughts": (True,), "available_tools": ([self.tool()],),
                   "custom_tools": ([self.tool()],), "thinking_budget": (0, 512, -1), "system_message": (self.text(2),), "thinking_mode": ("chat", "thinking"),
                   "preserve_thinking": (True, False), "drop_thinking": (True, False), "response_format": ({"type": "json_object"},),
                   "response_schema": (self.schema(),), "tool_choice": ("auto", "required", "none"), "keep_past_thinking": (True, False),
                   "truncate_history_thinking": (True, False), "additional_special_tokens": (["<a>", "<b>"],), "continue_final_message": (True, False)}
        return {name: self.choice(choices[name]) for name in sorted(choices) if self.chance(0.08)}

    def question(self):
        tools = [self.tool() for _ in range(self.randint(0, 3))] if self.chance(0.6) else None
        messages = self.plain_conversation() if self.chance(0.25) else self.conversation()
        return messages, tools, self.variables(), self.chance(0.7)


# ---- The templates of llama.cpp's tests ----------------------------------------------------------------------------------------


class Cxx:
    """Reads string literals, and JSON values as initialisers of C++, from a source text."""

    SPACE = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*", re.S)
    LITERAL = re.compile(r'(?:u8)?"((?:[^"\\]|\\.)*)"', re.S)
    NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
    CALL = re.compile(r"json::(object|array)\(|std::string\(|json\(")
    ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\", "0": "\0", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}

    def __init__(self, text, at):
        self.text, self.at = text, at
        self.skip()

    def skip(self):
        self.at = self.SPACE.match(self.text, self.at).end()

    def take(self, word):
        if not self.text.startswith(word, self.at):
            return False
        self.at += len(word)
        self.skip()
        return True

    def match(self, pattern):
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
            self.skip()
        return found

    def need(self, word):
        if not self.take(word):
            raise ValueError(f"{word} expected before {self.text[self.at:self.at + 40]!r}")

    def unescape(self, found):
        escape = found[1]
        if escape[0] in "uU" or (escape[0] == "x" and int(escape[1:], 16) < 128):
            return chr(int(escape[1:], 16))
        return self.ESCAPES[escape]  # a byte of a longer character is not read

    def string(self):
        parts = []
        in_macro = self.take("U8C(")
        while found := self.match(self.LITERAL):
            parts.append(re.sub(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]+|.)", self.unescape, found[1], flags=re.S))
        if in_macro:
            self.need(")")
        if not parts:
            raise ValueError(f"a string expected before {self.text[self.at:self.at + 40]!r}")
        return "".join(parts)

    def items(self, close):
        items = []
        while not self.take(close):
            items.append(self.value())
            self.take(",")
        return items

    def value(self):
        if self.take("{"):
            return self.braces(self.items("}"))
        if found := self.match(self.CALL):
            items = self.items(")")
            if found[1] and not items:
                return {} if found[1] == "object" else []
            return items[0] if found[1] != "array" or isinstance(items[0], list) else list(items[0].items())
        for word, value in (("true", True), ("false", False), ("nullptr", None)):
            if self.take(word):
                return value
        if found := self.match(self.NUMBER):
            return json.loads(found[0])
        return self.string()

    @staticmethod
    def braces(items):
        """Converts a list in braces like nlohmann's library: pairs that begin with a string make an object."""
        if items and all(isinstance(i, list) and len(i) == 2 and isinstance(i[0], str) for i in items):
            return dict(items)
        return items


def small_templates(path):
    """The name, the template and the variables of each test_template() in test-jinja.cpp."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^    test_template\(t, ", text, re.M):
        source = Cxx(text, found.end())
        name = source.string()
        source.need(",")
        template = source.string()
        source.need(",")
        yield name, template, source.value() or {}


def chat_templates(path):
    """The name and the template of each case in test-chat-template.cpp."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r'/\* \.name= \*/ ("[^\n]*"),\n\s*/\* \.template_str= \*/', text):
        yield json.loads(found[1]), Cxx(text, found.end()).string()


# ---- The comparison ------------------------------------------------------------------------------------------------------------

# The library's message when it refuses to load a template, and jinja2's message when a conversation reaches that place ("": jinja2
# renders it).
APPEND = ("the method append is not supported", "access to attribute 'append' of 'list' object is unsafe")
FROM_JSON = ("the filter from_json is not supported", "No filter named 'from_json' found")
POP = ("the method pop is not supported", "access to attribute 'pop' of 'list' object is unsafe")
REFUSED = {
    "Kimi-K2-Instruct.jinja": APPEND,
    "Kimi-K2-Thinking.jinja": APPEND,
    "deepseek-ai-DeepSeek-V3.2.jinja": FROM_JSON,
    "deepseek-ai-DeepSeek-V4-Flash-0731.jinja": FROM_JSON,
    "deepseek-ai-DeepSeek-V4.jinja": FROM_JSON,
    "array.append()": APPEND,
    "array.pop() last": POP,
    "array.pop() with index": POP,
}
# The library's messages when it refuses a template only while it renders a conversation.
REFUSED_LATER = re.compile(r"the chat template, line \d+: the other case of a letter in .* is not supported$", re.S)


def difference(ours, theirs, question):
    """Renders with both. Returns "text", "error" or "refused later" if they agree, otherwise a description of both results."""
    for _ in range(2):  # twice, because the date may change between the two programs
        text, err = ours.render(*question)
        expected, error = theirs.render(*question)
        if text == expected:
            return "error" if err else "text"
    if err and REFUSED_LATER.match(err[1]):
        return "refused later"
    words = [f"template variables and messages: {json.dumps(question, ensure_ascii=False)}"]
    if err or error:
        return "\n".join(words + [f"here:   {err[1] if err else repr(text[-200:])}", f"jinja2: {repr(error or expected[-200:])}"])
    at = max(0, len(os.path.commonprefix((text, expected))) - 40)
    return "\n".join(words + [f"here, from character {at}:   {text[at:at + 120]!r}", f"jinja2, from character {at}: {expected[at:at + 120]!r}"])


def check(ours, theirs, questions, expected_refusal, counts):
    """Returns whether the template passes, and an explanation."""
    refusal, at_run_time = expected_refusal
    found = ours.refusal()
    if (found or "") != refusal:
        return False, f"the library refuses the template: {found}; expected: {refusal}" if found else f"the library no longer refuses: {refusal}"
    if refusal:
        counts["refused"] += 1
        errors = [str(error) for _, error in (theirs.render(*question) for question in questions) if error]
        if at_run_time and not any(at_run_time in error for error in errors):
            return False, f"refused: {refusal}; but jinja2 does not say: {at_run_time}"
        return True, f"refused: {refusal}; jinja2: " + (f"{at_run_time!r} when a conversation reaches it" if at_run_time else "renders it")
    before = counts["text"]
    for question in questions:
        result = difference(ours, theirs, question)
        if result not in counts:
            return False, result
        counts[result] += 1
    return True, f"{counts['text'] - before} texts" if len(questions) > 1 else ""


def main(path, source, n_conversations=200, seed=1):
    library = ctypes.CDLL(os.path.abspath(path))
    library.llm_chat_render.restype = ctypes.c_int64
    source = pathlib.Path(source)
    cases = [(file.name, file.read_text(encoding="utf-8"), None) for file in sorted(source.glob("models/templates/*.jinja"))]
    cases += [(name, template, None) for name, template in chat_templates(source / "tests/test-chat-template.cpp")]
    cases += list(small_templates(source / "tests/test-jinja.cpp"))
    counts = {"text": 0, "error": 0, "refused later": 0, "refused": 0}
    n_failed = 0
    print(f"1..{len(cases)}")
    for number, (name, template, variables) in enumerate(cases, 1):
        rng = Random(f"{seed} {name}")
        if variables is None:
            questions = [rng.question() for _ in range(int(n_conversations))]
        else:
            questions = [(variables.pop("messages", []), variables.pop("tools", None), variables, variables.pop("add_generation_prompt", False))]
        ours, theirs = Ours(library, template), Theirs(template)
        passed, remark = check(ours, theirs, questions, REFUSED.get(name, ("", "")), counts)
        ours.close()
        n_failed += not passed
        print(f"{'ok' if passed else 'not ok'} {number} - {name}")
        if remark:
            print("\n".join("# " + line for line in remark.splitlines()))
    print(f"# {counts['text']} texts are the same, {counts['error']} conversations are refused by both, {counts['refused later']} only by the "
          f"library; {counts['refused']} templates are refused when loaded")
    print(f"# {len(cases) - n_failed} passed, {n_failed} failed")
    return n_failed > 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
