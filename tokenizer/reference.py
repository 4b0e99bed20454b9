"""Reference tokenizers (Hugging Face `tokenizers`, `sentencepiece`) made from GGUF files, and texts to test them with.

    pip install tokenizers sentencepiece gguf protobuf unicodedataplus==16.0.0.post1
"""

import random

import unicodedataplus as unicode
import sentencepiece
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Punctuation, Sequence, Split

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


# ---- Classes of code points, as in llm.h ----

BITS = {"Lu": 1, "Lt": 1, "Ll": 2, "Lm": 4, "Lo": 4, "M": 8, "N": 16, "P": 32, "S": 64}
WHITE_SPACE = 128


def class_bits(c):
    category = unicode.category(c)
    if c.isspace() and c not in "\x1c\x1d\x1e\x1f":
        return WHITE_SPACE
    return BITS.get(category) or BITS.get(category[0], 0)


# ---- Tokenizers ----


class Vocabulary:
    """The tokenizer's data in a GGUF file."""

    def __init__(self, path):
        self.fields = GGUFReader(path).fields
        self.model = self.get("tokenizer.ggml.model")
        self.pre = self.get("tokenizer.ggml.pre")
        self.unk = self.get("tokenizer.ggml.unknown_token_id", 0)
        self.tokens = self.strings("tokenizer.ggml.tokens")
        self.types = self.numbers("tokenizer.ggml.token_type") or [NORMAL] * len(self.tokens)
        self.merges = self.strings("tokenizer.ggml.merges")
        self.scores = self.numbers("tokenizer.ggml.scores")

    def get(self, key, missing=None):
        return self.fields[key].contents() if key in self.fields else missing

    def strings(self, key):
        field = self.fields.get(key)
        return [bytes(field.parts[i]).decode() for i in field.data] if field else []

    def numbers(self, key):
        field = self.fields.get(key)
        return [field.parts[i][0].item() for i in field.data] if field else []

    def of_type(self, *types):
        return [token for token, type_ in zip(self.tokens, self.types) if type_ in types]


def isolated(pattern):
    return Split(Regex(pattern), "isolated")


GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
SPACES = r"\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + SPACES
)
QWEN2 = LLAMA3.replace("{1,3}", "")
UP, LOW, START = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
REST = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + SPACES
TEKKEN = START + UP + "*" + LOW + "+|" + START + UP + "+" + LOW + "*" + REST
FOLDED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = START + UP + "*" + LOW + "+" + FOLDED + "|" + START + UP + "+" + LOW + "*" + FOLDED + REST.replace(r"\p{N}|", r"\p{N}{1,3}|")
DEEPSEEK_CODER = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"]
PRE_TOKENIZERS = {  # name in GGUF: pre-tokenizer, normaliser, ignore_merges
    "gpt-2": (GPT2, None, False),
    "mpt": (GPT2, normalizers.NFC(), False),
    "smollm": (Sequence([Digits(individual_digits=True), GPT2]), None, False),
    "starcoder": (Sequence([Digits(individual_digits=True), GPT2]), None, False),
    "refact": (Sequence([Digits(individual_digits=True), GPT2]), None, False),
    "command-r": (Sequence([Digits(individual_digits=True), GPT2]), normalizers.NFC(), False),
    "llama-bpe": (Sequence([isolated(LLAMA3), BYTES]), None, True),
    "dbrx": (Sequence([isolated(LLAMA3), BYTES]), None, False),
    "qwen2": (Sequence([isolated(QWEN2), BYTES]), normalizers.NFC(), False),
    "gpt-4o": (Sequence([isolated(GPT4O), BYTES]), None, False),
    "tekken": (Sequence([isolated(TEKKEN), BYTES]), None, True),
    "falcon": (Sequence([Punctuation("contiguous"), GPT2, isolated("[0-9][0-9][0-9]")]), None, False),
    "deepseek-coder": (Sequence([isolated(p) for p in DEEPSEEK_CODER] + [Digits(individual_digits=True), BYTES]), None, False),
}


def byte_level(vocabulary, pre=None):
    """The Hugging Face tokenizer of a byte-level BPE vocabulary."""
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    pre_tokenizer, normalizer, ignore_merges = PRE_TOKENIZERS[pre or vocabulary.pre]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in vocabulary.of_type(CONTROL, UNKNOWN)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in vocabulary.of_type(USER_DEFINED)])
    return tokenizer


def scored_merges(vocabulary):
    """Returns the merges of a SentencePiece vocabulary, as transformers makes them: every split of a piece into two pieces."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = []
    for id_, (token, score, type_) in enumerate(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types)):
        if type_ != NORMAL:
            continue
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        merges += [(-score, id_, pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    return [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:2])]


def characters(vocabulary, how="legacy"):
    """Converts a SentencePiece vocabulary to a Hugging Face tokenizer."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    model = models.BPE(ids, scored_merges(vocabulary), unk_token=vocabulary.tokens[vocabulary.unk], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if how == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif how == "split":
        tokenizer.pre_tokenizer = Metaspace("▁", prepend_scheme="always", split=True)
    else:
        tokenizer.pre_tokenizer = Metaspace("▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in vocabulary.of_type(CONTROL, UNKNOWN)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in vocabulary.of_type(USER_DEFINED)])
    return tokenizer


def sentencepiece_model(vocabulary):
    """The tokenizer.model of a SentencePiece vocabulary."""
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, type_ in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types):
        model.pieces.add(piece=token, score=score, type=type_)
    model.pieces[vocabulary.unk].type = UNKNOWN
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


class HuggingFace:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text, special):
        self.tokenizer.encode_special_tokens = not special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class SentencePiece:
    """The sentencepiece library, which does not recognise special tokens in texts."""

    def __init__(self, model):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, text, special):
        return None if special else self.processor.encode(text)

    def decode(self, ids):
        return self.processor.decode(ids)


# ---- Texts ----

SAMPLES = """The quick brown fox jumps over the lazy dog, doesn't it? We've seen THEM'LL and I'M'D; she'd say "no".
In 1984, 3.14159 was π; 1,234,567.89 € and ½ of Ⅻ, ²³ and ٣٤٥ or १२३ too.
Größe, Übermut, straße — naïve façade, coöperate; Çeşme'de ığdır İSTANBUL.
Съешь ещё этих мягких французских булок, да выпей чаю. Київ, Београд, Ѣ.
Η γρήγορη καφέ αλεπού πηδάει πάνω από το σκυλί. Ἐν ἀρχῇ ἦν ὁ λόγος.
天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。「你好」！我有3個蘋果。
いろはにほへと ちりぬるを。カタカナ、ひらがな、漢字１２３ｶﾅ。
다람쥐 헌 쳇바퀴에 타고파. 한국어 ㄱㄴㄷ 각각 값.
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. ١٢٣
דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם עֲלֵיכֶם
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। क़ ख़ १२३
আমার সোনার বাংলা, আমি তোমায় ভালোবাসি। ড় ঢ় য়
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน
ქართული ენა Հայերեն լեզու አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ தமிழ் മലയാളം ಕನ್ನಡ తెలుగు
Tiếng Việt: Thử nghiệm một, hai, ba… Đặng Thị Hồng
👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☃️ ❤️‍🔥 🧑🏿‍🚀 ⌨️ 1️⃣ © ® ™ 🫠
int main(int argc, char **argv) { return printf("%d\\n", x[i]++) != 0 ? -1 : 0x1F; }
def f(x):\n\tif x is None:\n\t\treturn {'a': [1, 2], "b": f"{x!r:>10}"}\n\n    # done\n
<html><body class="a-b_c">&nbsp;&lt;</body></html>\r\n<!-- x -->\r\n
SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%'; -- comment\n/* multi\nline */
https://example.com/a/b?c=d&e=f#g user@host:~$ ls -la | grep '^d' > /dev/null 2>&1
\\alpha + \\frac{1}{2} \\sum_{i=0}^{n} x_i^2 \\le \\infty ∀x∈ℝ ∃y: x²≤y ⇒ ∑∏√∞≠
A\u030angstro\u0308m e\u0301 n\u0303 q\u0323\u0307 q\u0307\u0323 \u1100\u1161\u11a8 \uac00\u11a8 \u212b \u2126 \ufb01 \uf900
ʼn ǆ ǅ ᾳ ᾼ ẞ ſ 'ſ I'ſ ﬀ ŀ ŉ ％ ＄ ＡＢＣ ａｂｃ ﾊﾟ"""
LINES = [line.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r") for line in SAMPLES.split("\n")]
WORDS = [word for line in LINES for word in line.split(" ") if word]
PIECES = list(" \t\n\r'\"sStTdDmMaAzZ019.,!?-_/\\<|>(){}$%é日\u00a0\u3000\u200b") + [
    "  ", "    ", "\n\n", "\r\n", " \n", "'s", "'S", "'re", "'VE", "'Ll", "'ſ", "\u0301", "²", "١", "ǅ", "한", "🙂", "▁"]
ASSIGNED = [c for c in range(0x110000) if unicode.category(chr(c)) not in ("Cn", "Cs", "Co")]
COMMON = [c for c in ASSIGNED if c < 0x3100 or 0xF900 <= c < 0x10000]
MARKS = [c for c in ASSIGNED if unicode.combining(chr(c)) or unicode.decomposition(chr(c))[:1].isalnum()]
JAMO = [*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A7, 0x11C3), 0xAC00, 0xAC01, 0xD7A3, 0x1113, 0x1176]


def one_text(rng, specials, size):
    """A text of one of several kinds, about `size` parts long."""
    kind = rng.randrange(12)
    parts = range(rng.randint(1, size))
    if kind < 3:
        return " ".join(rng.choice(WORDS) for _ in parts)
    if kind < 5:
        return "".join(rng.choice(PIECES) for _ in parts)
    if kind == 5:
        return "".join(rng.choice(PIECES) * rng.choice([1, 1, 2, 3, 8, 17]) for _ in range(rng.randint(1, 4)))
    if kind == 6:
        return "".join(rng.choice(WORDS) + rng.choice([" ", "  ", "\n", "\t", "", "\r\n"]) for _ in parts)
    if kind == 7:
        return "".join(chr(rng.choice(COMMON)) for _ in parts)
    if kind == 8:
        return "".join(chr(rng.choice(ASSIGNED)) for _ in parts)
    if kind == 9:
        return "".join(chr(rng.choice(rng.choice([MARKS, JAMO, [97, 0x41, 0x3B1, 32]]))) for _ in parts)
    if kind == 10:
        return "".join(str(rng.randrange(10 ** rng.randint(1, 9))) + rng.choice([" ", "", ".", ",", "a"]) for _ in range(rng.randint(1, 4)))
    joints = ["", " ", "\n", "  ", "x", " é", "\u3000"]
    return "".join(rng.choice(joints) + rng.choice(specials or [""]) + rng.choice(joints) for _ in range(rng.randint(1, 3)))


def texts(count, specials, seed=1, size=5):
    rng = random.Random(seed)
    controls = [chr(c) for c in range(0xA0)]
    pairs = ["a" + c + "b" for c in controls] + [" " + chr(c) for c in (0x85, 0xA0, 0xAD, 0x2028, 0x3000, 0xFEFF, 0xFFFD)]
    mixed = ["".join(pair) for special in specials for pair in ((special, ""), ("a" + special, " b"), (special, special), ("", special[:-1]), ("", special[1:]))]
    fixed = ["", " ", "  ", "\n", "\0", "\0\0a"] + LINES + controls + pairs + mixed[:300]
    seen = dict.fromkeys(fixed)
    while len(seen) < count:
        seen.setdefault(one_text(rng, specials, size))
    return list(seen)[:count]
