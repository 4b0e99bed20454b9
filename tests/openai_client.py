#!/usr/bin/env python3
"""Tests build/server with OpenAI's own client: openai_client.py SERVER MODEL. The model gets the template tests/tools.jinja.

    pip install openai
"""
import json
import os
import re
import subprocess
import sys
import tempfile

import openai
from pydantic import BaseModel

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import with_template
from server_tools import HISTORY, QUESTION, TIME, WEATHER


class Place(BaseModel):
    city: str
    people: int


class GetWeather(BaseModel):
    """Tells the weather."""
    city: str


def check(name, holds):
    print(f"{'ok' if holds else 'not ok'} - {name}", flush=True)
    if not holds:
        check.failed += 1


check.failed = 0


def raises(kind, words, call, **args):
    try:
        call(**args)
    except kind as error:
        return words in error.message
    return False


def plain(client):
    args = {"model": "any", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**args, logprobs=True, top_logprobs=2)
    text = answer.choices[0].message.content
    check("a chat", bool(text) and answer.usage.completion_tokens == 12)
    check("its log-probabilities", "".join(e.token for e in answer.choices[0].logprobs.content) == text)
    pieces = list(client.chat.completions.create(**args, stream=True, stream_options={"include_usage": True}))
    check("a stream", "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text)
    check("its usage", pieces[-1].usage.completion_tokens == 12)
    check("a text", bool(client.completions.create(model="any", prompt="one two three", max_tokens=4).choices[0].text))
    check("models", len(list(client.models.list())) == 1)


def formats(client):
    parsed = client.chat.completions.parse(model="any", messages=QUESTION, response_format=Place, max_tokens=200, seed=1)
    check("an answer as a pydantic model", isinstance(parsed.choices[0].message.parsed, Place))


def tools(client):
    args = {"model": "any", "temperature": 0, "max_tokens": 100, "tools": [WEATHER, TIME], "parallel_tool_calls": False}
    forced = client.chat.completions.create(**args, messages=QUESTION, tool_choice="required")
    call = forced.choices[0].message.tool_calls[0]
    check("a required call", forced.choices[0].finish_reason == "tool_calls" and json.loads(call.function.arguments))
    messages = HISTORY + QUESTION
    answer = client.chat.completions.create(**args, messages=messages).choices[0]
    call = answer.message.tool_calls[0]
    check("a call", (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"}))
    messages = messages + [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rainy"}]
    check("the answer after it", "rain" in client.chat.completions.create(**args, messages=messages).choices[0].message.content)
    with client.chat.completions.stream(**args, messages=HISTORY + QUESTION) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    check("a call in a stream", len(done) == 1 and json.loads(done[0].arguments) == {"city": "Paris"})
    check("the client joins its pieces", final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.name == "weather")
    strict = openai.pydantic_function_tool(GetWeather)
    parsed = client.chat.completions.parse(model="any", messages=QUESTION, tools=[strict], tool_choice="required",
                                           parallel_tool_calls=False, temperature=0, max_tokens=100)
    check("arguments as a pydantic model", isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather))


def errors(client, url):
    create = client.chat.completions.create
    check("a bad request", raises(openai.BadRequestError, "tool_choice", create, model="any", messages=QUESTION, tool_choice="required"))
    check("a bad schema", raises(openai.BadRequestError, "bad", create, model="any", messages=QUESTION, tool_choice="required", tools=[
        {"type": "function", "function": {"name": "bad", "parameters": {"nonsense": 1}}}]))
    check("an unknown address", raises(openai.NotFoundError, "address", client.embeddings.create, model="any", input="a"))
    stranger = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
    check("a wrong key", raises(openai.AuthenticationError, "key", stranger.chat.completions.create, model="any", messages=QUESTION))


def main(server, model):
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "tools.gguf")
        with_template.main(model, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools.jinja"), copy)
        process = subprocess.Popen([server, "-m", copy, "-p", "0", "--key", "secret"], stderr=subprocess.PIPE, text=True)
        try:
            url = re.search("http:.*", process.stderr.readline()).group()
            client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
            plain(client)
            formats(client)
            tools(client)
            errors(client, url)
        finally:
            process.terminate()
            process.wait()
    raise SystemExit(1 if check.failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
