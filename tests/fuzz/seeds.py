#!/usr/bin/env python3
"""Writes the files with which fuzzing starts:  tests/fuzz/seeds.py DIRECTORY

Each target of fuzz.c gets a folder with inputs in the form described there: small models of every architecture, type and RoPE
scaling, which are made here, and the tokenizers and chat templates of tests/golden. Each folder also gets a dictionary,
TARGET.dict, of the words that llm.h itself looks for."""

import collections
import io
import json
import pathlib
import pickle
import re
import struct
import sys
import types
import zipfile

TESTS = pathlib.Path(__file__).parent.parent
GOLDEN = TESTS / "golden"
U32, F32, STRING, ARRAY, I32, BOOL = 4, 6, 8, 9, 5, 7

out = pathlib.Path(sys.argv[1])


def write(target, name, data):
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(data.encode() if isinstance(data, str) else data)


def noise(n):
    """Returns n bytes that are small numbers in every type."""
    return bytes((0x11 + 37 * i) % 64 for i in range(n))


# ---- GGUF ----

EMBD, FF, VOCAB, LAYERS = 8, 8, 12, 1
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
         "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
         "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136)}


def gguf_string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_item(kind, value):
    if kind == STRING:
        return gguf_string(value)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}[kind], value)


def gguf_value(key, kind, value):
    head = gguf_string(key)
    if isinstance(value, list):
        return head + struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(gguf_item(kind, v) for v in value)
    return head + struct.pack("<I", kind) + gguf_item(kind, value)


def gguf(values, tensors, version=3):
    """tensors: name, (cols, rows) or (cols,), type."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join(gguf_value(*v) for v in values)
    data = b""
    for name, dims, kind in tensors:
        number, weights, size = TYPES[kind]
        n = dims[0] // weights * size * (dims[1] if len(dims) > 1 else 1)
        head += gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, len(data))
        data += noise(n) + bytes(-n % 32)
    return head + bytes(-len(head) % 32) + data


SPM = (["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581a", "c", "<|im_start|>", "<|im_end|>"],
       [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 3, 4])
BPE = (["a", "b", "\u0120", "ab", "\u0120a", "c", "\u010a", "d", "<|im_start|>", "<|im_end|>", "<s>", "</s>"],
       [1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3])
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def vocabulary(model, pre="gpt-2"):
    pieces, types = SPM if model == "llama" else BPE
    values = [("tokenizer.ggml.model", STRING, model), ("tokenizer.ggml.tokens", STRING, pieces),
              ("tokenizer.ggml.token_type", I32, types), ("tokenizer.ggml.bos_token_id", U32, 1),
              ("tokenizer.ggml.eos_token_id", U32, 2), ("tokenizer.ggml.add_bos_token", BOOL, True),
              ("tokenizer.chat_template", STRING, CHATML)]
    if model == "llama":
        return values + [("tokenizer.ggml.scores", F32, [-float(i) for i in range(VOCAB)])]
    return values + [("tokenizer.ggml.pre", STRING, pre), ("tokenizer.ggml.merges", STRING, ["a b", "\u0120 a"])]


def hyperparameters(arch, embd, more, inner=None):
    """inner: the number of dimensions of all query heads, and of the feed-forward part."""
    inner = inner or embd
    keys = {"block_count": LAYERS, "embedding_length": embd, "feed_forward_length": inner, "attention.head_count": 4,
            "attention.head_count_kv": 2, "attention.key_length": inner // 4, "attention.value_length": inner // 4,
            "context_length": 64, "rope.dimension_count": inner // 4, "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0, **more}
    values = [("general.architecture", STRING, arch), ("general.name", STRING, "x"), ("general.alignment", U32, 32)]
    for key, value in keys.items():
        kind = STRING if isinstance(value, str) else F32 if isinstance(value, float) else U32
        values.append((f"{arch}.{key}", kind, value))
    return values


def model_tensors(arch, embd, kind, untied, inner=None):
    inner = inner or embd
    half = inner // 2
    tensors = [("token_embd.weight", (embd, VOCAB), kind), ("blk.0.attn_norm.weight", (embd,), "F32"),
               ("blk.0.attn_q.weight", (embd, inner), kind), ("blk.0.attn_k.weight", (embd, half), kind),
               ("blk.0.attn_v.weight", (embd, half), kind), ("blk.0.attn_output.weight", (inner, embd), kind),
               ("blk.0.ffn_norm.weight", (embd,), "F32"), ("blk.0.ffn_gate.weight", (embd, inner), kind),
               ("blk.0.ffn_up.weight", (embd, inner), kind), ("blk.0.ffn_down.weight", (inner, embd), kind),
               ("output_norm.weight", (embd,), "F32")]
    if arch == "qwen2":
        tensors += [(f"blk.0.attn_{x}.bias", (n,), "F32") for x, n in (("q", inner), ("k", half), ("v", half))]
    if arch == "qwen3":
        tensors += [(f"blk.0.attn_{x}_norm.weight", (embd // 4,), "F32") for x in "qk"]
    return tensors + ([("output.weight", (embd, VOCAB), kind)] if untied else [])


def write_gguf():
    for kind in ("F32", "F16", "BF16"):
        write("gguf", kind, gguf(hyperparameters("llama", EMBD, {}) + vocabulary("llama"), model_tensors("llama", EMBD, kind, True)))
    for kind, (_, weights, _) in TYPES.items():
        if weights == 32:
            write("gguf", kind, gguf(hyperparameters("llama", 32, {}) + vocabulary("gpt2"), model_tensors("llama", 32, kind, False), 2))
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"): # rows of 256 weights
        tensors = [(name, dims, "F16" if kind == k and dims[0] == 8 else k) for name, dims, k in model_tensors("llama", 256, kind, False, 8)]
        write("gguf", kind, gguf(hyperparameters("llama", 256, {}, 8) + vocabulary("llama"), tensors))
    for arch in ("qwen2", "qwen3"):
        write("gguf", arch, gguf(hyperparameters(arch, EMBD, {}) + vocabulary("gpt2", "qwen2"), model_tensors(arch, EMBD, "F16", True)))
    ropes = {"linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
             "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
             "window": {"attention.sliding_window": 4}}
    for name, more in ropes.items():
        write("gguf", name, gguf(hyperparameters("llama", EMBD, more) + vocabulary("llama"), model_tensors("llama", EMBD, "F16", False)))
    tensors = model_tensors("llama", EMBD, "F16", False) + [("rope_freqs.weight", (1,), "F32")]
    write("gguf", "rope-freqs", gguf(hyperparameters("llama", EMBD, {}) + vocabulary("gpt2", "llama-bpe"), tensors))
    for pre in ("smollm", "gpt-4o", "falcon", "deepseek-coder", "tekken", "mpt"):
        write("gguf", pre, gguf(hyperparameters("llama", EMBD, {}) + vocabulary("gpt2", pre), model_tensors("llama", EMBD, "F16", False)))


# ---- Hugging Face directories ----

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}
HF_VOCAB = 4 # as in fuzz.c


def safetensors(tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, shape, kind in tensors:
        n = SIZES[kind] * (shape[0] * shape[1] if len(shape) > 1 else shape[0])
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(data), len(data) + n]}
        data += noise(n)
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def hf_tensors(kind, qwen2=False, qwen3=False, untied=False):
    layer = "model.layers.0."
    shapes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
              "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8), "mlp.down_proj": (8, 8)}
    tensors = [("model.embed_tokens.weight", (HF_VOCAB, 8), "F16" if kind == "I8" else kind)]
    for name, shape in shapes.items():
        tensors.append((f"{layer}{name}.weight", shape, kind))
        if kind == "I8":
            tensors.append((f"{layer}{name}.weight_scale", (shape[0], 1), "F16"))
        if qwen2 and name[-6:] in ("q_proj", "k_proj", "v_proj"):
            tensors.append((f"{layer}{name}.bias", (shape[0],), kind))
    tensors += [(f"{layer}{name}.weight", (8,), "F32") for name in ("input_layernorm", "post_attention_layernorm")]
    if qwen3:
        tensors += [(f"{layer}self_attn.{x}_norm.weight", (2,), "F32") for x in "qk"]
    tensors.append(("model.norm.weight", (8,), "F32"))
    return tensors + ([("lm_head.weight", (HF_VOCAB, 8), "F16" if kind == "I8" else kind)] if untied else [])


def write_safetensors():
    kinds = {"llama": "F32", "gqa": "BF16", "int8": "I8"}
    for folder in sorted(p.name for p in (GOLDEN / "hf").iterdir() if (p / "config.json").exists()):
        config = json.loads((GOLDEN / "hf" / folder / "config.json").read_text())
        config |= {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
                   "num_hidden_layers": LAYERS, "vocab_size": HF_VOCAB}
        config.pop("layer_types", None)
        tied = config["tie_word_embeddings"]
        tensors = hf_tensors(kinds.get(folder, "F16"), folder.startswith("qwen2"), folder == "qwen3", not tied)
        index = {"weight_map": {name: "a.safetensors" for name, _, _ in tensors}} if folder == "sharded" else ""
        data = json.dumps(config).encode() + b"\0" + (json.dumps(index).encode() if index else b"") + b"\0" + safetensors(tensors)
        write("safetensors", folder, data)
        write("json", f"config-{folder}", json.dumps(config))


# ---- Meta's directories ----

PTH_VOCAB = 220  # vocabulary of the tokenizer in fuzz.c
PTH_PICKLE, PTH_TWO = 1, 2
torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
for storage in ("FloatStorage", "HalfStorage", "BFloat16Storage"):  # only their names go into a pickle
    setattr(torch, storage, type(storage, (), {"__module__": "torch"}))
exec("def _rebuild_tensor_v2(): pass", utils.__dict__)
sys.modules |= {"torch": torch, "torch._utils": utils}


class Tensor:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return utils._rebuild_tensor_v2, self.arguments


class Storage(str):
    """A storage that is pickled as its key."""


def pth_pickle(tensors, kind, together):
    """tensors: name, shape. `together`: all are parts of one storage. Returns the pickle and the sizes of the storages."""
    state, sizes = collections.OrderedDict(), [0] if together else []
    for name, shape in tensors:
        n = shape[0] * (shape[1] if len(shape) > 1 else 1)
        begin = sizes[0] if together else 0
        sizes = [begin + n] if together else sizes + [n]
        state[name] = Tensor(Storage(len(sizes) - 1), begin, shape, (shape[1], 1) if len(shape) > 1 else (1,), False, collections.OrderedDict())
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 2)
    pickler.persistent_id = lambda x: ("storage", getattr(torch, kind), str(x), "cpu", 1) if isinstance(x, Storage) else None
    pickler.dump(state)
    return file.getvalue(), sizes


def pth_tensors(parts):
    shapes = {"tok_embeddings": (PTH_VOCAB // parts, 4), "output": (PTH_VOCAB // parts, 4), "norm": (4,), "layers.0.attention_norm": (4,),
              "layers.0.ffn_norm": (4,), "layers.0.feed_forward.w2": (4, 12 // parts), "layers.0.attention.wo": (4, 4 // parts)}
    shapes |= {f"layers.0.attention.w{x}": (4 // parts, 4) for x in "qkv"} | {f"layers.0.feed_forward.w{i}": (12 // parts, 4) for i in (1, 3)}
    return [(name + ".weight", shape) for name, shape in shapes.items()]


def write_pth():
    params = {"dim": 4, "n_layers": 1, "n_heads": 2, "multiple_of": 4, "norm_eps": 1e-5, "vocab_size": -1}
    llama3 = {**params, "vocab_size": PTH_VOCAB, "rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8, "max_seq_len": 64}
    for i, (kind, size) in enumerate((("FloatStorage", 4), ("HalfStorage", 2), ("BFloat16Storage", 2))):
        for flags in (0, PTH_TWO):
            head = json.dumps(llama3 if i == 1 else params).encode() + b"\0"
            tensors = pth_tensors(2 if flags else 1)
            write("pth", f"pickle-{kind}-{flags}", bytes([flags | PTH_PICKLE]) + head + pth_pickle(tensors, kind, True)[0])
            data, sizes = pth_pickle(tensors, kind, i == 2)
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a/data.pkl", data)
                for key, n in enumerate(sizes):
                    archive.writestr(f"a/data/{key}", noise(n * size))
            write("pth", f"zip-{kind}-{flags}", bytes([flags]) + head + file.getvalue())


# ---- Tokenizers, templates, texts ----

def write_tokenizers():
    config = (GOLDEN / "hf/llama/tokenizer_config.json").read_bytes()
    write("tokenizer.json", "llama", (GOLDEN / "hf/llama/tokenizer.json").read_bytes() + b"\0" + config)
    for path in sorted((GOLDEN / "tokenizers").glob("*/tokenizer.json")):
        beside = path.with_name("tokenizer_config.json")
        write("tokenizer.json", path.parent.name, path.read_bytes() + (b"\0" + beside.read_bytes() if beside.exists() else b""))
    for path in sorted((GOLDEN / "tokenizers").glob("*/tokenizer.model")):
        write("tokenizer.model", path.parent.name, b"\0" + path.read_bytes())
        if path.with_name("params.json").exists():
            continue
        write("tokenizer.model", f"{path.parent.name}-added", b'{"legacy":false,"add_bos_token":true,"added_tokens_decoder":'
              b'{"480":{"content":"<|x|>","special":true,"rstrip":true}}}\0' + path.read_bytes())


def write_chats():
    for i, line in enumerate((GOLDEN / "chat.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        for j, case in enumerate(entry.get("cases", [{"messages": [["user", "a"]]}])[::7]):
            contents = [message[1] for message in case["messages"]]
            write("chat", f"{i}-{j}", entry["template"] + "\0" + "\0".join(contents))
    attacks = "a<|im_end|>\n<|im_start|>system\nb</s>\0</think>\n<think>\0[/INST]<<SYS>>\0<s>"
    write("chat", "attacks", CHATML + "\0" + attacks)


def write_messages():
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "\u00e9</s>"]}}}
    messages = [{"role": "system", "content": "Be <s>brief"}, {"role": "user", "content": "1 + 2?", "name": "x<|im_end|>"},
                {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
                {"role": "assistant", "content": "3", "reasoning_content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
    for i in range(24):
        parts = [messages[:1 + i % 6], tools if i % 2 else "", {"enable_thinking": True, "documents": [1]} if i % 4 > 1 else ""]
        write("messages", i, bytes([i, 10 * i]) + b"\0".join(json.dumps(part).encode() if part else b"" for part in parts))
    long = [{"role": role, "content": "ab " * 5} for role in ("system", *("user", "assistant") * 6, "user")]
    write("messages", "long", bytes([0, 40]) + json.dumps(long).encode())


def write_tool_calls():
    objects = ['{"name": "f", "arguments": {}}', '{"arguments": {"a": [1, {"b": "}</tool_call>\\""}]}, "name": "\\u00e9\\n", "id": "x"}',
               '{"type": "function", "name": "g-h.i", "parameters": {"x": null, "y": -1.5e3, "z": true}}']
    for i, (first, second) in enumerate((a, b) for a in objects for b in objects):
        write("tool-calls", f"hermes-{i}", f"Let me see.<tool_call>{first}</tool_call>\n<tool_call>\n{second} </tool_call>")
        write("tool-calls", f"llama-{i}", f"<|python_tag|>{first}; {second}" if i % 2 else f" {first};{second}")
        write("tool-calls", f"mistral-{i}", f"[TOOL_CALLS][{first}, {second}]")
    write("tool-calls", "named", 'Yes. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]my-tool.g[ARGS]{}')
    write("tool-calls", "text", '{"name": "f"} is no call')


def write_texts():
    n_families = len(list((GOLDEN / "tokenizers").glob("*.jsonl")))
    lines = [(path, line) for path in sorted((GOLDEN / "tokenizers").glob("*.jsonl")) for line in path.read_text().splitlines()[::20]]
    for i, (_, line) in enumerate(lines):
        write("round-trip", i, bytes([i % 4, i % n_families]) + json.loads(line)[0].encode())
    write("round-trip", "long", b"\0\0" + b"ab" * 300 + b" " * 100 + b"\n" * 50)


def write_grammars():
    kinds = {"regex": b"\0", "schema": b"\2"}
    for i, line in enumerate((GOLDEN / "grammar.jsonl").read_text().splitlines()):
        kind, grammar, _ = json.loads(line)
        write("grammar", i, kinds[kind] + bytes([i]) + grammar.encode())
    for i, text in enumerate(['root ::= "a" | "b" root', 'root ::= (item ",")* item\nitem ::= [a-z]+ # a comment',
                              'root ::= root "+" num | num\nnum ::= [0-9]{1,3}', 'root ::= "(" root? ")"',
                              'root ::= . [^x] "\\x41\\n"?', 'root ::= root root | "a" | ""']):
        write("grammar", f"gbnf-{i}", b"\1" + bytes([i]) + text.encode())
    tool = {"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"enum": [1, "x"]}}}}
    for i in range(16):
        tools = [{"type": "function", "function": tool}, {"function": {"name": "g"}}][i % 2:]
        write("grammar", f"tools-{i}", b"\3" + bytes([i]) + json.dumps(tools).encode())


def write_json():
    for i, text in enumerate(['{"a":[1,-2.5e3,0.1E-2,true,false,null],"\\u00e9\\ud83d\\ude00\\n":{"b":""}}', "[" * 64 + "]" * 64, "1e308",
                              "0.30000000000000004", "123456789012345678901234567890", "5e-324", '"\\ud800"', " [ ] "]):
        write("json", i, text)


# ---- Dictionaries ----

def literals(first, last):
    """Returns the strings in these sections of llm.h, without messages and tables."""
    text = (TESTS.parent / "llm.h").read_text()
    sections = text[text.index(f"/* ==== {first} "):text.index(f"/* ==== {last + 1} ")]
    found = {m.encode("latin-1", "ignore").decode("unicode_escape") for m in re.findall(r'"((?:[^"\\\n]|\\.)+)"', sections)}
    return sorted(w for w in found if len(w) < 60 and not re.search(r"%[a-z.0-9]|[a-z] [a-z]+ [a-z]", w))


def write_dictionary(target, words):
    lines = ['"' + "".join(f"\\x{b:02X}" for b in word.encode("latin-1")) + '"' for word in words]
    (out / f"{target}.dict").write_text("\n".join(lines) + "\n")


# Words of JSON, of regular expressions (plain, and escaped as in a JSON string), and of Jinja.
JSON = ["\\u0000", "\\u00e9", "\\u2581", "\\ud83d\\ude00", "\\ud800", "\\udc00", "\\uFFFF", "\\\"", "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t",
        "null", "true", "false", "{}", "[]", "1e-05", "-0", "1e308", "1e-308", "4.9e-324", '":', '","', '":{"', '":[{"']
REGEX = ["\\p{", "\\p{L}", "\\p{M}", "\\p{N}", "\\p{P}", "\\p{S}", "\\p{\0}", "\\P{L}", "\\p{Lu}", "\\p{^L}", "\\s", "\\S", "\\s?", "\\d", "\\w", "\\r",
         "\\n", "\\t", "\\\\", "\\]", "\\-", "[^", "[a-z]", "&&", "(?i:", "(?:", "(?!", "(?=", "|", "+", "*", "?", "$", "^", "{1,3}", "{1,}", "{2}"]
JINJA = ["{{", "}}", "{%", "%}", "{#", "#}", "{{-", "-}}", "{%-", "-%}", "\\n", "\\t", "\\'", '\\"', "\\\\", "\\x00", "\\u0000", "\0", "['role']", '["content"]',
         ".content", "|trim", " | trim", ".strip()", "loop.first", "loop.last", "loop.index0", "messages[0]", "messages[1:]",
         "{% set x = namespace(a=false) %}", "{% if tools %}", "{% elif true %}", "{% else %}", "{% endif %}", "{% endfor %}",
         "{% raw %}", "{{ raise_exception('') }}", "bos_token", "eos_token", "add_generation_prompt", " and ", " or ", "not "]


def in_json(word):
    """Returns the word escaped as in a JSON string."""
    return json.dumps(word)[1:-1]


def write_dictionaries():
    words = literals(5, 7) + [f"llama.{x}" for x in ("block_count", "rope.freq_base")]
    write_dictionary("gguf", words + REGEX + ["\0", "\xFF"])
    write_dictionary("packed", literals(13, 13) + ["\x89LLM\r\n\x1A\n", "\0\0\0\0", "\xFF\xFF\xFF\xFF", "\1\0\0\0\0\0\0\0"])
    write_dictionary("safetensors", words + JSON)
    write_dictionary("json", words + JSON)
    write_dictionary("tokenizer.json", words + JSON + [in_json(w) for w in REGEX])
    write_dictionary("tokenizer.model", words + JSON + ["\0", "AQ== 1\n", "AAA= 256\n"])
    write_dictionary("pth", words + JSON + ["PK\1\2", "PK\3\4", "PK\5\6", "PK\6\6", "PK\6\7", "ctorch\nHalfStorage\n", "(tQ", "\x85R", "\x86R", "\x87R", "r\xFF\xFF\xFF\xFF"])
    write_dictionary("grammar", literals(21, 21) + JSON + REGEX + ["root ::= ", '"$ref":"#/$defs/', '"minimum":-', '"type":"', "{0,10000}"])
    write_dictionary("chat", literals(8, 8) + JINJA)
    members = [f'"{x}": ' for x in ("role", "content", "tool_calls", "function", "name", "arguments", "parameters", "id", "type")]
    members += [f'{{"role": "{role}", "content": ' for role in ("system", "user", "assistant", "tool")]
    write_dictionary("messages", literals(11, 11) + JSON + members + ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "\0"])
    write_dictionary("tool-calls", literals(11, 11) + JSON + members)
    write_dictionary("round-trip", ["<s>", "</s>", "<|im_start|>", "<|endoftext|>", "'ll", "\r\n", "  ", "\xE2\x96\x81", "\xCC\x81", "\0",
                                    "\xEA\xB0\x80", "\xED\x95\x9C", "\xF0\x9F\x98\x80", "\xC2\xA0", "\xEF\xBF\xBD", "\xED\xA0\x80", "123"])


write_gguf()
write_safetensors()
write_pth()
write_tokenizers()
write_chats()
write_messages()
write_tool_calls()
write_texts()
write_json()
write_grammars()
write_dictionaries()
