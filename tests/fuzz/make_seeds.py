"""Writes `tiny/`, the model around a file that is fuzzed, and the seeds of `corpus/`: python3 tests/fuzz/make_seeds.py

Needs nothing but Python. What comes out is in the repository; the program is here so that a format that changes can
change its seeds.
"""

import json
import struct
from pathlib import Path

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"


def write(path: str, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    path = HERE / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def compact(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---- the tiny model ----

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True},
        {"id": 1, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True},
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    "model": {
        "type": "BPE",
        "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "Ġ": 5, "Ġab": 6, "Ċ": 7},
        "merges": [["a", "b"], ["Ġ", "ab"]],
    },
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": [8, 4],
    "model.norm.weight": [4],
    "lm_head.weight": [8, 4],
    LAYER + "input_layernorm.weight": [4],
    LAYER + "post_attention_layernorm.weight": [4],
    **{LAYER + f"self_attn.{part}_proj.weight": [4, 4] for part in "qkvo"},
    **{LAYER + f"mlp.{part}_proj.weight": [4, 4] for part in ["gate", "up", "down"]},
}
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
ADAPTER_SHAPES = {
    f"base_model.model.{LAYER}self_attn.q_proj.lora_A.weight": [2, 4],
    f"base_model.model.{LAYER}self_attn.q_proj.lora_B.weight": [4, 2],
}
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


def safetensors(shapes: dict, dtype: str, others: dict = {}) -> bytes:
    """Tensors of a type, but for those whose names have another one."""
    header, at = {}, 0
    for name, shape in shapes.items():
        own = others.get(name, dtype)
        size = SIZES[own]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": own, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = compact(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


tokenizer = write("tiny/tokenizer.json", compact(TOKENIZER))
write("tiny/config.json", compact(CONFIG))
model = write("tiny/model.safetensors", safetensors(SHAPES, "BF16"))
write("tiny/adapter_config.json", compact(ADAPTER))
adapter = write("tiny/adapter_model.safetensors", safetensors(ADAPTER_SHAPES, "F32"))

# ---- files of a folder ----

for fixture in ["gemma2-lm", "llama-pm", "mistral-pm", "neox-pm", "openrlhf-pm", "qwen3-lm"]:
    config = json.loads((FIXTURES / fixture / "config.json").read_bytes())
    write(f"corpus/config/{fixture}", compact(config))
write("corpus/config/adapter", compact(ADAPTER))
write("corpus/config/adapter-full", compact(json.loads((FIXTURES / "lora-lm/adapter_config.json").read_bytes())))

write("corpus/safetensors/model", model)
write("corpus/safetensors/model-f32", safetensors(SHAPES, "F32"))
write("corpus/safetensors/model-tied", safetensors({k: v for k, v in SHAPES.items() if k != "lm_head.weight"}, "F16"))
# Matrices of the stack, each with a scale for every output.
matrices = [name for name, shape in SHAPES.items() if name.startswith(LAYER) and len(shape) == 2]
scales = {f"{name}_scale": [SHAPES[name][0], 1] for name in matrices}
write("corpus/safetensors/model-e4m3", safetensors({**SHAPES, **scales}, "BF16", dict.fromkeys(matrices, "F8_E4M3")))
write("corpus/safetensors/adapter", adapter)
shards = {**dict.fromkeys(SHAPES, "a.safetensors"), **dict.fromkeys(ADAPTER_SHAPES, "b.safetensors")}
write("corpus/safetensors/index", compact({"weight_map": shards}))

write("corpus/manifest/good", compact({"format": 1, "files": {"config.json": "0" * 64, "tokenizer.json": "f" * 64}}))
write("corpus/manifest/outside", compact({"format": 1, "files": {"../config.json": "0" * 64}}))

# ---- GGUF ----

U32, F32, STRING, ARRAY = 4, 6, 8, 9
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34)}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(kind: int, content) -> bytes:
    if kind == ARRAY:
        inner, items = content
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return {U32: lambda: struct.pack("<I", content), F32: lambda: struct.pack("<f", content), STRING: lambda: text(content)}[kind]()


def gguf(architecture: str, dtype: str, tokenizer: dict) -> bytes:
    """A model of one layer, whose hidden size is a block of its type; all weights are 0."""
    kind, block, size = KINDS[dtype]
    hidden = max(block, 4)
    metadata = {
        "general.architecture": (STRING, architecture),
        **{
            f"{architecture}.{key}": (U32, number)
            for key, number in {
                "embedding_length": hidden, "block_count": 1, "feed_forward_length": hidden, "context_length": 64,
                "attention.head_count": 2, "attention.head_count_kv": 1,
            }.items()
        },
        f"{architecture}.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        **tokenizer,
    }
    tokens = len(tokenizer["tokenizer.ggml.tokens"][1][1])
    matrices = {"token_embd": tokens, "blk.0.attn_q": hidden, "blk.0.attn_k": hidden // 2, "blk.0.attn_v": hidden // 2}
    matrices |= {"blk.0.attn_output": hidden, "blk.0.ffn_gate": hidden, "blk.0.ffn_up": hidden, "blk.0.ffn_down": hidden}
    tensors = [(f"{name}.weight", [hidden, rows], kind, rows * hidden // block * size) for name, rows in matrices.items()]
    tensors += [(f"{name}.weight", [hidden], 0, hidden * 4) for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]]
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, content) in metadata.items():
        out += text(key) + struct.pack("<I", kind) + value(kind, content)
    at = 0
    for name, dims, kind, size in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        at += (size + 31) // 32 * 32
    return out + bytes(-len(out) % 32) + bytes(at)


SPACED = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"]
SENTENCE_PIECE = {
    "tokenizer.ggml.model": (STRING, "llama"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, SPACED)),
    "tokenizer.ggml.scores": (ARRAY, (F32, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0])),
    "tokenizer.ggml.token_type": (ARRAY, (U32, [2, 3, 3, 1, 1, 1, 1, 4])),
    "tokenizer.ggml.bos_token_id": (U32, 1),
    "tokenizer.ggml.eos_token_id": (U32, 2),
}
BYTE_LEVEL = {
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "qwen2"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, ["a", "b", "ab", "<|end|>"])),
    "tokenizer.ggml.token_type": (ARRAY, (U32, [1, 1, 1, 3])),
    "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
    "tokenizer.ggml.eos_token_id": (U32, 3),
    "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
}
for dtype in ["F32", "F16", "Q4_0", "Q8_0"]:
    write(f"corpus/gguf/llama-{dtype.lower()}", gguf("llama", dtype, SENTENCE_PIECE))
write("corpus/gguf/qwen2-f32", gguf("qwen2", "F32", BYTE_LEVEL))
write("corpus/gguf/qwen2-q8_0", gguf("qwen2", "Q8_0", BYTE_LEVEL))

# ---- tokenizers ----

TEXT = "ab  ab\n\nA<s>é</s> 12345 Don't"
TOKENIZER_CONFIG = compact({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ bos_token }}"})


def tokenizer_seed(name: str, **changed) -> None:
    parts = {**TOKENIZER, **changed}
    texts = [compact({k: v for k, v in parts.items()}), TOKENIZER_CONFIG, compact({"eos_token_id": [1, 2]}), TEXT]
    write(f"corpus/tokenizer/{name}", "\0".join(texts))


SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "##b": 5, "▁": 6, "▁ab": 7}
tokenizer_seed("byte-level")
tokenizer_seed(
    "split",
    normalizer={"type": "NFC"},
    pre_tokenizer={
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
)
tokenizer_seed(
    "sentencepiece",
    normalizer={
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    pre_tokenizer=None,
    decoder={
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    model={
        "type": "BPE", "dropout": None, "unk_token": "<s>", "fuse_unk": True, "byte_fallback": True,
        "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "▁": 5, "▁ab": 6, "<0x41>": 7},
        "merges": ["a b", "▁ ab"],
    },
)
tokenizer_seed(
    "unigram",
    normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAAAAA=="},
    pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    model={
        "type": "Unigram", "unk_id": 0, "byte_fallback": False,
        "vocab": [["<s>", 0.0], ["</s>", 0.0], ["a", -1.5], ["b", -2.0], ["ab", -1.0], ["▁", -3.0], ["▁ab", -0.5]],
    },
)
tokenizer_seed(
    "wordpiece",
    normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    pre_tokenizer={"type": "BertPreTokenizer"},
    post_processor={"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]},
    decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    model={
        "type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": WORDS,
    },
)
tokenizer_seed(
    "words",
    normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "NFKC"}]},
    pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Punctuation", "behavior": "Isolated"}, {"type": "FixedLength", "length": 5}]},
    post_processor={"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": True, "add_prefix_space": True},
    decoder={"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    model={"type": "WordLevel", "unk_token": "<s>", "vocab": WORDS},
)

# ---- chat templates ----

for fixture in ["llama-lm", "llama-pm"]:
    source = (FIXTURES / fixture / "chat_template.jinja").read_text()
    write(f"corpus/template/{fixture}", "\0".join([source, "system:Be brief.", "user:Hello?", "assistant: Yes. "]))
    write(f"corpus/template/{fixture}-generate", "\0".join([source, "user:Hello?"]))
write(
    "corpus/template/features",
    "\0".join(
        [
            "{%- macro turn(m, i=0) -%}[{{ m.role | upper ~ loop_index }}]{% generation %}{{ m['content'].strip() | tojson(indent=2) }}"
            "{% endgeneration %}{%- endmacro -%}{%- set ns = namespace(n=0, text='') -%}{%- for m in messages if m.role != 'tool' -%}"
            "{%- set ns.n = ns.n + 1 -%}{{ turn(m, i=ns.n) }}{%- if loop.last %}{{ eos_token }}{% elif loop.index0 % 2 == 0 %}"
            "{% continue %}{% endif -%}{%- set ns.text = ns.text + m.content.split('\\n')[-1][:3] -%}{%- endfor -%}"
            "{{ ns.text.title().replace('a', 'bb') | trim }}{% if tools is defined and tools %}{{ tools | length }}{% endif %}"
            "{{ strftime_now('%d %b %Y') }}{{ range(3) | list | join(',') }}{{ 'x' * 3 }}{{ [1, 2] + [3] }}{{ {'a': 1}.items() }}"
            "{% if messages[0].role != 'user' %}{{ raise_exception('no: ' + messages[0].role) }}{% endif %}",
            "user:What is 1 + 1?\nSay it.",
            "assistant:2",
        ]
    ),
)

# ---- the server's options ----

write(
    "corpus/options/full",
    'model = ["pm=./pm/3", "lm=org/name"]\nadapter = "pm=./lora"\nrevision = ["lm=main"]\ndtype = "bf16"\n'
    "max-batch-tokens = 8192\ndecode_share = 0.25\nno-prefix-cache = true\nkv-cache-mib = 64\nthreads = 2\n"
    'max-connection-age-secs = 60.5\nhostname = "::1"\nport = 0\napi-key = ["a", "b"]\nlog = "info,h2=warn"\n'
    'otlp-endpoint = "http://localhost:4317"\n',
)
write("corpus/options/keys", 'model-id = "./pm"\napi-key-file = "none"\nhhh-prompt-file = "none"\n')

# ---- requests ----


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, value) -> bytes:
    """A field of a message: bytes and texts with their length, whole numbers as such, others as 32-bit floats."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def turns(*texts: tuple[str, str]) -> bytes:
    return field(1, b"".join(field(1, field(1, role) + field(2, content)) for role, content in texts))


CHAT = turns(("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."))
PROMPT = turns(("user", "Why is the sky blue?"))
IDS = field(3, field(1, bytes([5, 6, 7, 8])) + field(2, 2))
FULL = field(1, 1) + field(2, 0) + field(3, 2) + field(4, 32)
REQUESTS = {
    "score": (0, field(2, CHAT) + field(2, field(2, "The text.")) + field(2, IDS) + field(5, 1)),
    "score-language": (0, field(1, field(1, "lm")) + field(2, CHAT) + field(3, FULL) + field(4, 3)),
    "score-hhh": (0, field(2, CHAT) + field(3, field(1, 2) + field(2, 2))),
    "score-stream": (1, field(1, field(2, CHAT) + field(6, "id")) + field(2, CHAT) + field(7, 3)),
    "rank": (2, field(2, PROMPT) + field(3, field(1, "Rayleigh.")) + field(3, field(1, "It is not.")) + field(7, 3)),
    "rank-ids": (2, field(2, IDS) + field(3, field(2, field(1, bytes([9, 9])))) + field(3, field(2, field(1, b"\x0a")))),
    "generate": (3, field(2, PROMPT)),
    "generate-best": (
        3,
        field(1, field(1, "lm") + field(2, 1))
        + field(2, PROMPT)
        + field(4, field(1, 1.25) + field(2, "the") + field(3, 0.5) + field(4, 8) + field(5, 0.5) + field(6, 0.125) + field(7, 9))
        + field(5, field(1, 3) + field(2, "\n\n") + field(3, 1))
        + field(6, 2)
        + field(7, field(1, 3) + field(2, field(1, "pm")))
        + field(8, "id")
        + field(9, 1),
    ),
    "tokenize": (4, field(2, "The text.") + field(2, "") + field(3, 0)),
    "render": (5, field(2, CHAT) + field(4, 1)),
    "get": (6, field(1, field(1, "pm") + field(2, 1))),
    "list": (7, b""),
    "watch": (8, field(1, "pm")),
    "load": (9, field(1, "pm") + field(2, 7) + field(3, "./pm/7") + field(5, "main")),
    "unload": (10, field(1, "pm") + field(2, 7)),
    "label": (11, field(1, "pm") + field(2, "stable") + field(3, 1)),
}
for name, (rpc, message) in REQUESTS.items():
    write(f"corpus/proto/{name}", bytes([rpc]) + message)

# ---- requests over HTTP ----

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": [{"type": "text", "text": "So."}, "No."]}]
RERANK = {"query": "Why is the sky blue?", "documents": ["Rayleigh.", {"text": "It is not."}]}
BODIES = {
    "get-reward": (0, {"query": ["The text.", "Another."], "prompts": ["The"], "labels": [None, {"x": 1}]}),
    "get-reward-many": (0, {"query": [str(i) for i in range(20)], "request_id": "id"}),
    "score": (1, {"model": "pm@1", "text_1": "Why?", "text_2": ["Because.", "So."], "use_activation": True}),
    "score-pairs": (1, {"queries": ["a", "b"], "documents": ["c", {"text": "d"}], "activation": None}),
    "score-items": (1, {"queries": ["a"], "items": ["b"], "truncate_prompt_tokens": 8, "truncation_side": "left"}),
    "score-data": (1, {"data_1": "a", "data_2": "b", "model": "/checkpoints/pm/1"}),
    "classify": (2, {"input": "The text.", "truncate_prompt_tokens": -1}),
    "classify-turns": (2, {"messages": TURNS, "add_generation_prompt": False, "chat_template": None}),
    "pooling-ids": (3, {"input": [[5, 6, 7], [8]], "add_special_tokens": False, "encoding_format": "base64"}),
    "pooling-one": (3, {"input": [5, 6, 7], "model": "org/lm"}),
    "rerank": (4, {**RERANK, "top_n": 1, "return_documents": False}),
    "rerank-cohere": (5, {**RERANK, "documents": ["a"] * 12, "model": "pm", "return_documents": True}),
    "embeddings": (6, {"input": ["a", "b"], "encoding_format": "float", "dimensions": None, "user": {"deep": [[]]}}),
}
for name, (route, body) in BODIES.items():
    write(f"corpus/gateway/{name}", bytes([route]) + compact(body).encode())
