"""Measures Plumb on a GPU, and PyTorch beside it, in one run: the kernels beside the GPU's limits, then the server, then
training.

Models have the shapes of published ones and random weights, which are written to a folder first. Takes a machine with a
GPU, CUDA's libraries, PyTorch, Transformers and safetensors, a C compiler for what PyTorch compiles, and 40 GB for the
models; `tests/gpu.sh build FOLDER` packs this and the programs. What PyTorch does is done by processes of its own, so
that it leaves no memory taken.

Beside Plumb's attention stands PyTorch's: `torch flash`, which are the kernels of FlashAttention-2 that candle-flash-attn
is made of too, `torch cudnn` and `torch efficient`; and `flash_attn`, the package of FlashAttention's own, if it is
installed. `transformers` is the same model there, in bf16. Beside training stands `torch compiled`: that model through
torch.compile, its f32 weights turned into bf16 by autocast, and a fused AdamW, with the same pairs, loss and clipping.
"""

import argparse
import functools
import json
import multiprocessing
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import plumb
import process

HERE = pathlib.Path(__file__).resolve().parent
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "dtype": "bfloat16",
          "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
# A class, the fixture whose tokenizer it gets where tokens are numbers, and its configuration.
SHAPES = {
    "pm-135m": ("LlamaForSequenceClassification", None, {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5,
        "tie_word_embeddings": True}),
    "pm-1b": ("LlamaForSequenceClassification", None, {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5,
        "tie_word_embeddings": True}),
    "pm-0.6b": ("Qwen3ForSequenceClassification", "qwen3-pm", {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6,
        "tie_word_embeddings": True}),
    "pm-8b": ("LlamaForSequenceClassification", "llama-pm", {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5,
        "tie_word_embeddings": False}),
}  # fmt: skip
SHAPES["lm-8b"] = ("LlamaForCausalLM", *SHAPES["pm-8b"][1:])
# Calls in flight, so that a batch is ready when the last one is done.
IN_FLIGHT = 16
# None of them is to be refused, and all are to find room in the cache.
FLAGS = ["--max-batch-tokens", 8192, "--max-queue-tokens", 1 << 20]
START_SECONDS = 600
# As kernels/benches/gpu.rs names it.
ATTENTION_OF = "attention, {} x {} tokens, 32 heads of {}"
ATTENTION = [(8, 1024, 64), (2, 4096, 64), (8, 1024, 128), (2, 4096, 128)]
# Pairs of a step of training, and tokens of each side. All go through the model at once.
PAIRS, SIDE_TOKENS = 16, 512
# The median counts of so many steps, after those in which memory is taken and PyTorch compiles.
STEPS, FIRST_STEPS = 10, 3
LR, BETAS, CLIP = 1e-5, (0.9, 0.95), 1.0
TRAIN = f"train {{}}, {PAIRS} pairs of {SIDE_TOKENS}"
# The first tokens of a tokenizer of words; every other token is the word of its number.
UNKNOWN, END, PAD = range(3)


def main():
    options = parse()
    job = Job(options)
    for name in options.only or list(ALL):
        try:
            ALL[name](job)
        except Exception as error:
            job.failures.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    job.finish()
    sys.exit(f"failed: {', '.join(job.failures)}" if job.failures else 0)


def parse():
    names = "".join(f"  {name:12} {function.__doc__}\n" for name, function in ALL.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="measurements:\n" + names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("programs", type=pathlib.Path, help="folder with plumb-server, plumb, plumb-train and kernel-benchmark")
    add("--fixtures", type=pathlib.Path, default=HERE.parent / "fixtures", help="folder with tokenizers")
    add("--models", type=pathlib.Path, metavar="DIR", help="where models are written, and kept [default: not kept]")
    add("--only", nargs="+", choices=ALL, metavar="NAME", help="only these measurements")
    add("--out", type=pathlib.Path, metavar="FILE", help="raw values, as JSON")
    add("--quick", action="store_true", help="tiny models and few requests, to try the script")
    return parser.parse_args()


class Job:
    """Where values go, and models come from."""

    def __init__(self, options):
        self.options, self.values, self.failures = options, [], []
        self.temporary = None if options.models else tempfile.mkdtemp(prefix="plumb-gpu-")
        self.models = options.models or pathlib.Path(self.temporary)
        self.programs = options.programs.resolve()
        self.device = "cpu" if options.quick else "cuda:0"

    def add(self, work, who, value, unit, raw=None):
        self.values.append({"work": work, "who": who, "value": value, "unit": unit, "raw": raw})
        print(f"{work:52} {who:24} {value:12.1f} {unit}", flush=True)

    def value(self, work, who):
        return next((v["value"] for v in self.values if (v["work"], v["who"]) == (work, who)), None)

    def requests(self, count):
        return 4 if self.options.quick else count

    def shape(self, name):
        """The configuration of a model, and its class."""
        kind, fixture, config = SHAPES[name]
        config = {**COMMON, **config, "architectures": [kind], "num_labels": 1}
        if self.options.quick:
            hidden = 16 * config["num_attention_heads"]
            config |= {"num_hidden_layers": 2, "hidden_size": hidden, "intermediate_size": 512, "vocab_size": 1024}
        return kind, fixture, config

    def checkpoint(self, name):
        """The folder of a model, which is written when it is first asked for."""
        folder = self.models / name
        if not (folder / "done").exists():
            kind, fixture, config = self.shape(name)
            folder.mkdir(parents=True, exist_ok=True)
            if fixture:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(self.options.fixtures / fixture / file, folder / file)
            else:
                write_words(folder, config["vocab_size"])
            config.pop("num_labels")
            if "Classification" in kind:
                config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
            (folder / "config.json").write_text(json.dumps(config))
            apart(write_weights, folder / "model.safetensors", kind, config)
            (folder / "done").touch()
        return folder

    def server(self, name, *flags):
        flags = ["--device", self.device, *FLAGS, *flags]
        models = {"model": self.checkpoint(name)}
        return plumb.Server(self.programs, self.models, models, flags, START_SECONDS)

    def finish(self):
        for who, bars in BARS.items():
            value = self.value(*who)
            if value is not None:
                print(f"{' '.join(who)}: {value:.1f}, to be at least {bars}")
        if self.options.out:
            self.options.out.write_text(json.dumps({"device": gpu_name(), "values": self.values}, indent=1))
        if self.temporary:
            shutil.rmtree(self.temporary)


def apart(function, *arguments):
    """What a function answers in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_weights(path, kind, config):
    """Random weights, in the names of Transformers."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, device=device).mul_(0.02).bfloat16().cpu()  # noqa: E731
    ones = lambda size: torch.ones(size, dtype=torch.bfloat16)  # noqa: E731
    tensors = {"model.embed_tokens.weight": random(vocabulary, hidden), "model.norm.weight": ones(hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes = {"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden),
                  "o": (hidden, heads * dim)}  # fmt: skip
        tensors |= {f"{name}self_attn.{part}_proj.weight": random(*shape) for part, shape in shapes.items()}
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        tensors |= {f"{name}mlp.{part}_proj.weight": random(*shape) for part, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = ones(hidden)
        if config["model_type"] == "qwen3":
            tensors |= {f"{name}self_attn.{part}_norm.weight": ones(dim) for part in "qk"}
    if "Classification" in kind:
        tensors["score.weight"] = random(1, hidden)
    elif not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(vocabulary, hidden)
    save_file(tensors, path, metadata={"format": "pt"})


def write_words(folder, size):
    """A tokenizer of so many words."""
    special = {"<unk>": UNKNOWN, "</s>": END, "<pad>": PAD}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    words = special | {str(number): number for number in range(len(special), size)}
    tokenizer = {
        "version": "1.0", "added_tokens": [{"id": id, "content": token, **flags} for token, id in special.items()],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))


def kernels(job):
    """the kernels, beside the rates of copies and of a large product"""
    done = process.run([job.programs / "kernel-benchmark", "--json"], PLUMB_REQUIRE_GPU="1")
    for line in map(json.loads, done.stdout.splitlines()):
        job.add(line["name"], "plumb", line["rate"], line["unit"], line)
        if not line["name"].startswith("limit"):
            job.add(f"{line['name']}, of the limit", "plumb", line["percent"], "%")


def attention(job):
    """attention by PyTorch and flash_attn, at the kernels' shapes"""
    shapes = [(1, 128, 64)] if job.options.quick else ATTENTION
    for shape, rates in zip(shapes, apart(attention_rates, shapes), strict=True):
        work = ATTENTION_OF.format(*shape)
        for who, rate in rates.items():
            job.add(work, who, rate, "TFLOP/s")
        own = job.value(work, "plumb")
        if own and rates:
            job.add(f"{work}, of the best", "plumb", 100 * own / max(rates.values()), "%")


def attention_rates(shapes):
    """TFLOP/s by half of the products, as the others are masked, of whatever runs here."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def torch_attention(backend, q, k, v):
        # Which takes no key heads that several heads share.
        if backend == SDPBackend.EFFICIENT_ATTENTION:
            k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        how = {"is_causal": True, "enable_gqa": k.shape != q.shape}
        with sdpa_kernel(backend):
            return torch_seconds(lambda: scaled_dot_product_attention(q, k, v, **how))

    def flash_attn(q, k, v):
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return torch_seconds(lambda: flash_attn_func(q, k, v, causal=True))

    ways = {
        "torch flash": functools.partial(torch_attention, SDPBackend.FLASH_ATTENTION),
        "torch cudnn": functools.partial(torch_attention, SDPBackend.CUDNN_ATTENTION),
        "torch efficient": functools.partial(torch_attention, SDPBackend.EFFICIENT_ATTENTION),
        "flash_attn": flash_attn,
    }
    found = []
    for count, length, dim in shapes:
        shape = lambda heads: (count, heads, length, dim)  # noqa: B023, E731
        q, k, v = (torch.randn(shape(heads), device=device, dtype=torch.bfloat16) for heads in (32, 8, 8))
        rates = {}
        for who, seconds in ways.items():
            try:
                rates[who] = 2.0 * count * length**2 * dim * 32 / seconds(q, k, v) / 1e12
            except (ImportError, RuntimeError) as error:
                print(f"{who}, heads of {dim}: {error}", file=sys.stderr)
        found.append(rates)
    return found


def small(job):
    """scores of 300 tokens by the shape of Qwen3-0.6B, 10 a call"""
    with job.server("pm-0.6b") as server:
        sizes = ["--items", 10, "--tokens", 300, "--concurrency", IN_FLIGHT, "--requests", job.requests(2000)]
        report = server.bench("unique", "--model", "model", *sizes)
    job.add("score 0.6B, 300 tokens", "plumb", report["sequences_per_s"], "items/s", report)
    job.add("score 0.6B, 300 tokens, p99", "plumb", report["latency_ms"]["p99"], "ms")


def large(job):
    """scores of 1,024 tokens by the shape of Llama 8B, and the same by Transformers"""
    with job.server("pm-8b") as server:
        sizes = ["--items", 8, "--tokens", 1024, "--concurrency", 4, "--requests", job.requests(60)]
        report = server.bench("unique", "--model", "model", *sizes)
    job.add("score 8B, 1024 tokens", "plumb", report["input_tokens_per_s"], "tok/s", report)
    rate = job.value("limit: product of 8192 x 8192 x 8192", "plumb")
    if rate:
        _, _, config = job.shape("pm-8b")
        share = 100 * report["input_tokens_per_s"] * 2 * weights(config) / (rate * 1e12)
        job.add("score 8B, of the matrix rate", "plumb", share, "%")
    kind, _, _ = job.shape("pm-8b")
    rate = apart(transformers_rate, kind, job.checkpoint("pm-8b"), 8, 1024)
    job.add("score 8B, 1024 tokens", "transformers", rate, "tok/s")


def rank(job):
    """16 candidates of 256 tokens behind 2,048 shared ones, by the shape of Llama 8B"""
    sizes = ["--prompts", 4, "--candidates", 16, "--prompt-tokens", 2048, "--tokens", 256]
    with job.server("pm-8b") as server:
        report = server.bench("rank", "--model", "model", *sizes, "--requests", job.requests(24))
    job.add("rank 8B, 2048 + 16 x 256", "plumb", report["sequences_per_s"], "seq/s", report)
    alone = job.value("score 8B, 1024 tokens", "plumb")
    if alone:
        predicted = alone / (256 + 2048 / 16)
        job.add("rank 8B, of what the saved work predicts", "plumb", 100 * report["sequences_per_s"] / predicted, "%")


def decode(job):
    """one stream, and 16, by the shape of Llama 8B"""
    with job.server("lm-8b") as server:
        for streams in (1, 16):
            sizes = ["--prompt-tokens", 128, "--new-tokens", 32 if job.options.quick else 256, "--streams", streams]
            report = server.bench("generate", "--model", "model", *sizes, "--requests", job.requests(4 * streams))
            rate = report["generation"]["stream_tokens_per_s"]["p50"]
            job.add(f"decode 8B, {streams} streams, each", "plumb", rate, "tok/s", report)


def invariant(job):
    """what it costs that scores have the same bits whatever the batch"""
    sizes = ["--items", 10, "--tokens", 300, "--concurrency", IN_FLIGHT, "--requests", job.requests(1000)]
    rates = []
    for flags in ([], ["--batch-invariant"]):
        with job.server("pm-0.6b", *flags) as server:
            rates.append(server.bench("unique", "--model", "model", *sizes)["sequences_per_s"])
    job.add("score 0.6B, invariant, of the usual rate", "plumb", 100 * rates[1] / rates[0], "%", rates)


def train_small(job):
    """steps of preference training by the shape of SmolLM2 135M, and the same by PyTorch"""
    train(job, "pm-135m", TRAIN.format("135M"))


def train_large(job):
    """the same by the shape of Llama 3.2 1B"""
    train(job, "pm-1b", TRAIN.format("1B"))


def train(job, name, work):
    """With pairs whose first half both sides share, and with others; PyTorch computes every token of both."""
    pairs, length = (2, 64) if job.options.quick else (PAIRS, SIDE_TOKENS)
    kind, _, config = job.shape(name)
    tokens = 2 * pairs * length
    for shared in (True, False):
        sides = made_up(config["vocab_size"], pairs, length, shared)
        steps = training_steps(job, name, sides)
        label = f"{work}, half shared" if shared else work
        job.add(label, "plumb", tokens / statistics.median(steps), "tok/s", steps)
    steps = apart(torch_steps, kind, job.checkpoint(name), sides)
    job.add(work, "torch compiled", tokens / statistics.median(steps), "tok/s", steps)
    for label in (f"{work}, half shared", work):
        share = 100 * job.value(label, "plumb") / job.value(work, "torch compiled")
        job.add(f"{label}, of PyTorch's", "plumb", share, "%")


def made_up(vocabulary, pairs, length, shared):
    """Tokens of the sides of pairs, a rejected one behind each chosen one: as many of a prompt as of a response, each
    behind the word that says whose turn it is."""
    half = length // 2

    def side(number):
        def token(i):
            seed = 2 * pairs + number if i >= half else number // 2 if shared else number
            return PAD + 1 + (seed * 104_729 + i * 7919) % (vocabulary - PAD - 1)

        tokens = [token(i) for i in range(length)]
        tokens[0], tokens[half - 1], tokens[-1] = UNKNOWN, UNKNOWN, END
        return tokens

    return [side(number) for number in range(2 * pairs)]


def training_steps(job, name, sides):
    """Seconds of steps of Plumb. The run is ended as soon as there are enough: it would write its state at its end."""
    length = len(sides[0])
    tokens, half = length * len(sides), length // 2

    def dialogue(side):
        words = " ".join
        turns = {"user": words(map(str, side[1 : half - 1])), "assistant": words(map(str, side[half:-1]))}
        return [{"role": role, "content": content} for role, content in turns.items()]

    with tempfile.TemporaryDirectory(dir=job.models) as folder:
        folder = pathlib.Path(folder)
        pairs = [{"chosen": dialogue(a), "rejected": dialogue(b)} for a, b in zip(sides[::2], sides[1::2], strict=True)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        options = {
            "objective": "preference", "init": job.checkpoint(name), "train": folder / "pairs.jsonl",
            "output": folder / "run", "batch": len(pairs), "epochs": 100 * STEPS, "save-every": 100 * STEPS,
            "max-tokens": length, "micro-batch-tokens": tokens, "language-weight": 0, "device": job.device,
            "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "clip": CLIP,
        }  # fmt: skip
        argv = [job.programs / "plumb-train", "run", *(f"--{name}={value}" for name, value in options.items())]
        metrics, log = folder / "run/metrics.jsonl", folder / "log"
        with log.open("w") as out:
            run = subprocess.Popen(argv, stdout=out, stderr=out, env=plumb.environment())
        try:
            lines, deadline = [], time.monotonic() + START_SECONDS
            while len(lines) < FIRST_STEPS + STEPS and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                # The last line may be half written.
                lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        finally:
            run.kill()
            run.wait()
        steps = [json.loads(line) for line in lines[FIRST_STEPS : FIRST_STEPS + STEPS]]
        if len(steps) < STEPS or any(step["tokens"] != tokens for step in steps):
            raise RuntimeError(f"plumb-train: {lines[-1:]} {log.read_text()[-500:]}")
        return [step["seconds"] for step in steps]


def torch_steps(kind, folder, sides):
    """Seconds of the same steps of PyTorch."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = getattr(transformers, kind).from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    model.config.pad_token_id = PAD
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    compiled = torch.compile(model)
    ids = torch.tensor(sides, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16):
            rewards = compiled(ids, use_cache=False).logits[:, 0].float()
        loss = torch.nn.functional.softplus(rewards[1::2] - rewards[::2]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        optimiser.zero_grad()
        # Which waits for the step, as Plumb does for its loss.
        return loss.item()

    seconds = []
    for _ in range(FIRST_STEPS + STEPS):
        wait_for_torch()
        started = time.perf_counter()
        step()
        wait_for_torch()
        seconds.append(time.perf_counter() - started)
    return seconds[FIRST_STEPS:]


def weights(config):
    """Weights that every token is multiplied by."""
    heads = (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * config["head_dim"]
    return config["num_hidden_layers"] * config["hidden_size"] * (heads + 3 * config["intermediate_size"])


def transformers_rate(kind, folder, count, length):
    """Tokens a second of a forward pass without padding."""
    import torch
    import transformers

    load = getattr(transformers, kind).from_pretrained
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()
    ids = torch.randint(5, 200, (count, length), device=device)
    with torch.inference_mode():
        return count * length / torch_seconds(lambda: model(ids, use_cache=False))


def torch_seconds(run, times=5, least=0.03):
    """The median of several runs of many calls without a pause between them."""

    def seconds(calls):
        wait_for_torch()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        wait_for_torch()
        return time.perf_counter() - started

    seconds(3)
    calls = 1
    while seconds(calls) < least:
        calls *= 2
    return statistics.median(seconds(calls) / calls for _ in range(times))


def wait_for_torch():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu_name():
    argv = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


BARS = {
    ("score 0.6B, 300 tokens", "plumb"): "2,000 items/s",
    ("score 8B, of the matrix rate", "plumb"): "55 %",
    ("rank 8B, of what the saved work predicts", "plumb"): "85 %",
    ("decode 8B, 1 streams, each", "plumb"): "150 tok/s",
    **{(f"{ATTENTION_OF.format(*shape)}, of the best", "plumb"): "100 %" for shape in ATTENTION},
    **{(f"{TRAIN.format(size)}, of PyTorch's", "plumb"): "100 %" for size in ("135M", "1B")},
}
ALL = {f.__name__: f for f in (kernels, attention, small, large, rank, decode, invariant, train_small, train_large)}

if __name__ == "__main__":
    main()
