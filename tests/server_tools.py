#!/usr/bin/env python3
"""Tests tools in chats with build/server. Without arguments it prints the names of the cases. server_tools.py URL CASE runs
one; the model's template must be tests/tools.jinja (for the case "mistral", tests/tools-mistral.jinja)."""
import json
import re
import sys
import urllib.error
import urllib.request


def tool(name, properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"Tells the {name}.", "parameters": schema}}


WEATHER = tool("weather", {"city": {"type": "string", "maxLength": 20}})
TIME = tool("time", {"zone": {"$ref": "#/$defs/zone"}})
TIME["function"]["parameters"]["$defs"] = {"zone": {"enum": ["UTC", "CET"]}}
NOW = {"type": "function", "function": {"name": "now"}}
QUESTION = [{"role": "user", "content": "How is the weather in Paris?"}]


def call(id, city):
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}


# After these messages, the model calls a tool without being required to.
HISTORY = [message for id, city in (("a", "Rome"), ("b", "Oslo"), ("c", "Berlin")) for message in (
    {"role": "user", "content": f"How is the weather in {city}?"},
    {"role": "assistant", "content": None, "tool_calls": [call(id, city)]},
    {"role": "tool", "tool_call_id": id, "content": "sunny"},
    {"role": "assistant", "content": f"It is sunny in {city}."})]


def post(body, path="/v1/chat/completions"):
    body = {"temperature": 0, "max_tokens": 120} | body
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def choice(body):
    code, text = post(body)
    assert code == 200, text
    return json.loads(text)["choices"][0]


def streamed(body):
    """Joins the pieces of a stream to one choice."""
    code, text = post(body | {"stream": True})
    assert code == 200, text
    events = [line[6:] for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    content, calls, reasons = "", [], []
    for event in events[:-1]:
        piece = json.loads(event)["choices"][0]
        content += piece["delta"].get("content", "")
        reasons.append(piece["finish_reason"])
        for part in piece["delta"].get("tool_calls", []):
            if part["index"] == len(calls):
                calls.append({"id": part["id"], "type": part["type"], "function": {"name": part["function"]["name"], "arguments": ""}})
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    assert not any(reasons[:-1])
    message = {"role": "assistant", "content": content or None} | ({"tool_calls": calls} if calls else {})
    return {"message": message, "finish_reason": reasons[-1]}


def calls_of(choice, content=None):
    """Returns the calls as a list of (name, arguments)."""
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and message["content"] == content and message["role"] == "assistant", choice
    ids = [c["id"] for c in message["tool_calls"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[0-9a-z]{9}", id) for id in ids)
    assert all(c["type"] == "function" for c in message["tool_calls"])
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]


def both(body, content=None):
    """Checks that a whole answer and a stream have the same calls, and returns them."""
    calls = calls_of(choice(body), content)
    assert calls == calls_of(streamed(body), content)
    return calls


def refuses(words, body, path="/v1/chat/completions"):
    code, text = post(({} if "prompt" in body else {"messages": QUESTION}) | body, path)
    error = json.loads(text).get("error", {})
    assert code == 400 and error["type"] == "invalid_request_error" and words in error["message"], text


def required():
    calls = both({"messages": QUESTION, "tools": [WEATHER, TIME], "tool_choice": "required"})
    for name, arguments in calls:
        assert list(arguments) == [{"weather": "city", "time": "zone"}[name]]


def named():
    for parallel in {}, {"parallel_tool_calls": False}:
        calls = both({"messages": QUESTION, "tools": [WEATHER, TIME], "tool_choice": {"type": "function", "function": {"name": "time"}}} | parallel)
        assert all(name == "time" and arguments["zone"] in ("UTC", "CET") for name, arguments in calls)
    assert len(calls) == 1


def random_answers():
    """At a high temperature, calls are only valid because of the grammar."""
    for seed in range(8):
        body = {"messages": QUESTION, "tools": [TIME, NOW], "tool_choice": "required", "parallel_tool_calls": False,
                "temperature": 5, "seed": seed}
        (name, arguments), = both(body)
        assert arguments == {} if name == "now" else arguments["zone"] in ("UTC", "CET")


def auto():
    body = {"messages": HISTORY + QUESTION, "tools": [WEATHER, TIME]}
    assert both(body)[0] == ("weather", {"city": "Paris"})
    assert both(body | {"tool_choice": "auto", "parallel_tool_calls": False}) == [("weather", {"city": "Paris"})]


def strict():
    """If no call is required, the model may answer with a text, but each call is valid."""
    exact = {"type": "function", "function": tool("weather", {"city": {"enum": ["Oslo", "Bern"]}})["function"] | {"strict": True}}
    body = {"tools": [exact], "max_tokens": 60}
    assert both(body | {"messages": HISTORY + QUESTION})[0][1]["city"] in ("Oslo", "Bern")
    for seed in range(8):
        answer = choice(body | {"messages": HISTORY + QUESTION, "temperature": 1, "seed": seed})
        if "tool_calls" in answer["message"]:
            calls = calls_of(answer, answer["message"]["content"])
            assert all(name == "weather" and arguments["city"] in ("Oslo", "Bern") for name, arguments in calls)
        else:
            assert answer["finish_reason"] == "length" or "<tool_call>" not in answer["message"]["content"], answer
    assert choice(body | {"messages": QUESTION, "max_tokens": 8})["message"]["content"]


def answer_after_call():
    message = choice({"messages": HISTORY + QUESTION, "tools": [WEATHER, TIME]})["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": [{"type": "text", "text": "rainy"}]}
    after = choice({"messages": HISTORY + QUESTION + [message, result], "tools": [WEATHER, TIME]})
    assert after["finish_reason"] == "stop" and "tool_calls" not in after["message"] and "rain" in after["message"]["content"], after


def text():
    """An answer without calls is the same whether it is streamed or not, including white space at its end."""
    body = {"messages": QUESTION, "tools": [WEATHER], "max_tokens": 30}
    for stop in {}, {"stop": [" is"]}:
        whole, pieces = choice(body | stop), streamed(body | stop)
        assert "tool_calls" not in whole["message"]
        assert whole["message"]["content"] == pieces["message"]["content"] and whole["finish_reason"] == pieces["finish_reason"]


def no_choice():
    """With tool_choice none, the prompt does not mention the tools."""
    body = {"messages": QUESTION, "max_tokens": 20}
    without = choice(body)["message"]
    assert choice(body | {"tools": [WEATHER], "tool_choice": "none"})["message"] == without
    assert choice(body | {"tools": [], "tool_choice": "auto"})["message"] == without


def cut():
    """An incomplete call is returned as text."""
    body = {"messages": HISTORY + QUESTION, "tools": [WEATHER], "max_tokens": 12}
    for tool_choice in "auto", "required":
        whole, pieces = (f(body | {"tool_choice": tool_choice}) for f in (choice, streamed))
        assert whole["finish_reason"] == pieces["finish_reason"] == "length" and "tool_calls" not in whole["message"], whole
        assert whole["message"]["content"] == pieces["message"]["content"] and whole["message"]["content"].startswith("<tool_call>")


def format_and_tools():
    """The answer is calls or matches response_format; a required call is made despite response_format."""
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"], "additionalProperties": False}
    body = {"tools": [WEATHER], "parallel_tool_calls": False, "response_format": {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}}
    for seed in range(6):
        answer = choice(body | {"messages": QUESTION, "temperature": 1.5, "seed": seed})
        if "tool_calls" in answer["message"]:
            assert calls_of(answer)[0][0] == "weather"
        else:
            assert json.loads(answer["message"]["content"])["sky"] in ("blue", "grey"), answer
    assert both(body | {"messages": HISTORY + QUESTION})[0][0] == "weather"
    assert both(body | {"messages": QUESTION, "tool_choice": "required"})[0][0] == "weather"
    assert json.loads(choice(body | {"messages": QUESTION, "tool_choice": "none"})["message"]["content"])["sky"]
    number = {"type": "object", "properties": {"x": {"type": "number", "minimum": 0.1, "maximum": 0.1}}, "required": ["x"], "additionalProperties": False}
    body["response_format"]["json_schema"]["schema"] = number
    assert json.loads(choice(body | {"messages": QUESTION, "tool_choice": "none"})["message"]["content"])["x"] == .1


def refusals():
    function = {"type": "function", "function": {"name": "weather"}}
    refuses("must be a list", {"tools": {}})
    refuses("type function", {"tools": [{}]})
    refuses("type function", {"tools": [{"type": "custom", "custom": {"name": "a"}}]})
    refuses("needs a function with a name", {"tools": [{"type": "function"}]})
    for name in "", "a b", "é", "a" * 65, 7:
        refuses("needs a function with a name", {"tools": [{"type": "function", "function": {"name": name}}]})
    refuses("same name", {"tools": [WEATHER, WEATHER]})
    refuses("description", {"tools": [{"type": "function", "function": {"name": "a", "description": 1}}]})
    refuses("parameters", {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]})
    refuses("128", {"tools": [tool(f"f{i}", {}) for i in range(129)]})
    refuses("tool_choice must", {"tools": [WEATHER], "tool_choice": "any"})
    refuses("tool_choice must", {"tools": [WEATHER], "tool_choice": {"type": "function"}})
    refuses("tool_choice must", {"tools": [WEATHER], "tool_choice": {"function": {"name": "weather"}}})
    refuses("not in tools", {"tools": [TIME], "tool_choice": function})
    refuses("not in tools", {"tool_choice": function})
    refuses("needs tools", {"tool_choice": "required"})
    refuses("parallel_tool_calls", {"tools": [WEATHER], "parallel_tool_calls": 1})
    refuses("strict", {"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]})
    bad = tool("bad", {"x": {"nonsense": 1}})
    refuses('tool "bad"', {"tools": [{"type": "function", "function": bad["function"] | {"strict": True}}]})
    refuses('tool "bad"', {"tools": [bad], "tool_choice": "required"})
    refuses("tools is not supported", {"prompt": "a", "tools": [WEATHER]}, "/v1/completions")
    for wrong, words in (({"id": 1}, "needs an id"), ({"type": "x"}, "type function"), ({"function": {}}, "with a name"),
                         ({"function": {"name": "weather"}}, "must be text"),
                         ({"function": {"name": "weather", "arguments": "{"}}, "JSON object"),
                         ({"function": {"name": "weather", "arguments": "[]"}}, "JSON object")):
        refuses(words, {"messages": QUESTION + [{"role": "assistant", "tool_calls": [call("a", "Rome") | wrong]}]})
    refuses("assistant's", {"messages": [{"role": "user", "content": "a", "tool_calls": [call("a", "Rome")]}]})
    refuses("assistant's", {"messages": [{"role": "assistant", "content": "a", "tool_calls": {}}]})
    refuses("does not match an earlier call", {"messages": HISTORY[:2] + [{"role": "tool", "tool_call_id": "b", "content": "a"}]})
    refuses("does not match an earlier call", {"messages": [{"role": "tool", "content": "a"}]})
    refuses("needs content", {"messages": HISTORY[:2] + [{"role": "tool", "tool_call_id": "a"}]})


def mistral():
    """The marks are control tokens."""
    body = {"tools": [WEATHER, TIME], "parallel_tool_calls": False}
    assert both(body | {"messages": QUESTION, "tool_choice": "required"})[0][0] in ("weather", "time")
    assert both(body | {"messages": HISTORY + QUESTION}) == [("weather", {"city": "Paris"})]


CASES = [required, named, random_answers, auto, strict, answer_after_call, text, no_choice, cut, format_and_tools, refusals]

if __name__ == "__main__":
    if len(sys.argv) < 3:
        print(*(case.__name__ for case in CASES))
    else:
        URL = sys.argv[1]
        next(case for case in CASES + [mistral] if case.__name__ == sys.argv[2])()
