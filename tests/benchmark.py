"""Measure npGPT against what people would use instead, on the same checkpoint, in one run.

    python tests/benchmark.py                                a random 124M made for the purpose
    python tests/benchmark.py --model_dir models/124M        this model
    python tests/benchmark.py --sizes 355M,774M,1558M        random ones of these sizes as well (up to 15 GB of disk)
    python tests/benchmark.py --quick                        only to see that it works: a small model, few runs

Peers take part when they are installed: pip install torch transformers, llama-cpp-python gguf, tiktoken. Each engine
has a process of its own; they take turns, with pauses in which the others' threads go to sleep, all with --threads
threads (2 unless told otherwise) and float32. A figure is the median over the turns, with the least and the largest.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from helpers import ROOT, SHARED, random_variables, write_model

SIZES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}
QUICK = {"n_vocab": 269, "n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2}
PEERS = {"transformers": ("torch", "transformers"), "llama.cpp": ("llama_cpp", "gguf"), "tiktoken": ("tiktoken",)}
INSTALL = {"transformers": "torch transformers", "llama.cpp": "llama-cpp-python gguf", "tiktoken": "tiktoken"}


def installed(peer):
    return all(importlib.util.find_spec(module) for module in PEERS[peer])


# The engines: prompt(ids) takes a prompt up to its next token, step() one token more


class NpGPT:
    def __init__(self, model_dir, threads):
        import gpt2
        from utils import load_encoder_hparams_and_params

        self.gpt2 = gpt2
        self.hparams, self.params = load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))[1:]

    def prompt(self, ids):
        n = self.hparams["n_ctx"] - len(ids) + 1
        self.ids = self.gpt2.stream(ids, self.params, self.hparams["n_head"], n)
        next(self.ids)

    def step(self):
        next(self.ids)

    def samples(self, n_samples, n):
        """Seconds per token where n_samples advance at once."""
        rows = self.gpt2.stream(list(range(10)), self.params, self.hparams["n_head"], n + 1, n_samples=n_samples)
        next(rows)
        return [timed(lambda: next(rows)) / n_samples for _ in range(n)]

    def products(self):
        """A function that does the matrix-vector products of one token, alone: it reads every parameter once."""
        vectors = {n: np.ones((1, n), np.float32) for n in (self.hparams["n_embd"], 4 * self.hparams["n_embd"])}
        matrices = [self.params["wte"].T]
        for block in self.params["blocks"]:
            matrices += [block[part][name]["w"] for part in ("attn", "mlp") for name in block[part]]

        def multiply():
            for matrix in matrices:
                vectors[len(matrix)] @ matrix

        return multiply


class Transformers:
    def __init__(self, model_dir, threads):
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = GPT2LMHeadModel.from_pretrained(model_dir / "transformers").eval()

    def prompt(self, ids):
        self.past = None
        self.advance(self.torch.tensor([ids]))

    def advance(self, ids):
        output = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.next_id = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)

    def step(self):
        self.advance(self.next_id)


class LlamaCpp:
    def __init__(self, model_dir, threads):
        from llama_cpp import Llama

        n_ctx = json.loads((model_dir / "hparams.json").read_text())["n_ctx"]
        path = str(model_dir / "model.gguf")
        self.model = Llama(path, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prompt(self, ids):
        self.model.reset()
        self.ids = self.model.generate(ids, temp=0.0)
        next(self.ids)

    def step(self):
        next(self.ids)


ENGINES = {"npGPT": NpGPT, "transformers": Transformers, "llama.cpp": LlamaCpp}


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def work(engine, model_dir, threads):
    """The process of one engine: answer requests, one a line, on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    engine = ENGINES[engine](Path(model_dir), threads)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        if method == "prompt":
            result = [timed(lambda: engine.prompt(arguments[0]))]  # noqa: B023
        elif method == "steps":
            engine.prompt(arguments[0])
            result = [timed(engine.step) for _ in range(arguments[1])]
        elif method == "steps and products":  # in turns
            engine.prompt(arguments[0])
            multiply = engine.products()
            result = [(timed(engine.step), timed(multiply)) for _ in range(arguments[1])]
        else:
            result = getattr(engine, method)(*arguments)
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    def __init__(self, engine, model_dir, threads):
        command = [sys.executable, __file__, "--worker", engine, str(model_dir), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{engine} did not start")

    def ask(self, *request):
        time.sleep(0.3)  # until the threads of whoever was last have gone to sleep
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# The same checkpoint for the peers


def convert_for_transformers(model_dir, hparams, variables):
    from make_reference import torch_model

    torch_model(hparams, variables).save_pretrained(model_dir / "transformers")


def convert_for_llama_cpp(model_dir, hparams, variables):
    import gguf

    writer = gguf.GGUFWriter(model_dir / "model.gguf", "gpt2")
    writer.add_block_count(hparams["n_layer"])
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = json.loads((model_dir / "encoder.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(tokens))
    writer.add_token_types([gguf.TokenType.CONTROL if t == "<|endoftext|>" else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges((model_dir / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1])
    writer.add_eos_token_id(tokens["<|endoftext|>"])
    names = {"wte": "token_embd.weight", "wpe": "position_embd.weight"}
    names |= {"ln_f/g": "output_norm.weight", "ln_f/b": "output_norm.bias"}
    parts = {"ln_1": "attn_norm", "attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output"}
    parts |= {"ln_2": "ffn_norm", "mlp/c_fc": "ffn_up", "mlp/c_proj": "ffn_down"}
    for layer in range(hparams["n_layer"]):
        for part, name in parts.items():
            for leaf in ("g", "b") if "ln" in part else ("w", "b"):
                kind = "bias" if leaf == "b" else "weight"
                names[f"h{layer}/{part}/{leaf}"] = f"blk.{layer}.{name}.{kind}"
    for name, array in variables.items():
        array = np.ascontiguousarray(array[0].T) if array.ndim == 3 else array
        writer.add_tensor(names[name.removeprefix("model/")], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def checkpoint_variables(model_dir):
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(model_dir / "model.ckpt"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def prepare(folder, size, hparams, model_dir, peers):
    """A checkpoint in folder/size (the one in model_dir, if there is one), its first load behind it, and converted."""
    target = folder / size
    if model_dir:
        target.mkdir()
        for path in model_dir.iterdir():
            (target / path.name).symlink_to(path.resolve())
    else:
        write_model(target, hparams)
    vocabulary = real_vocabulary(model_dir)
    if vocabulary and hparams["n_vocab"] == 50257 and not model_dir:
        for name in ("encoder.json", "vocab.bpe"):
            (target / name).write_bytes((vocabulary / name).read_bytes())
    if peers:
        variables = checkpoint_variables(target) if model_dir else random_variables(hparams)
        if "transformers" in peers:
            convert_for_transformers(target, hparams, variables)
        if "llama.cpp" in peers:
            convert_for_llama_cpp(target, hparams, variables)
    run_command(command_of("npGPT", target, 1), 2)
    return target


def apart(function, *arguments):
    """Call it in a process of its own. The memory that Linux reports of a child begins with its parent's."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def real_vocabulary(model_dir):
    places = [model_dir, ROOT / "models" / "124M", Path(SHARED or ".") / "gpt2-vocab"]
    return next((place for place in places if place and (place / "vocab.bpe").is_file()), None)


# Whole commands, from the start of the process to its exit

PROMPT = "Alan Turing theorized that computers would one day become"
LLAMA_SCRIPT = """
import sys
from llama_cpp import Llama
path, prompt, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = Llama(path + "/model.gguf", n_ctx=min(1024, len(prompt) + n), n_threads=threads, verbose=False)
ids = []
for id in model.generate(model.tokenize(prompt.encode(), add_bos=False), temp=0.0):
    ids.append(id)
    if len(ids) == n:
        break
print(model.detokenize(ids).decode("utf-8", "replace"))
"""
TRANSFORMERS_SCRIPT = """
import sys
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer
path, prompt, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
tokenizer = GPT2Tokenizer(path + "/encoder.json", path + "/vocab.bpe")
model = GPT2LMHeadModel.from_pretrained(path + "/transformers").eval()
ids = torch.tensor([tokenizer.encode(prompt)])
with torch.inference_mode():
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False)
print(tokenizer.decode(out[0, ids.shape[1]:]))
"""


def command_of(engine, model_dir, n_tokens, threads=2, prompt=PROMPT):
    if engine == "npGPT":
        where = ["--models_dir", str(model_dir.parent), "--model_size", model_dir.name]
        return [sys.executable, str(ROOT / "gpt2.py"), prompt, *where, "--n_tokens_to_generate", str(n_tokens)]
    script = {"llama.cpp": LLAMA_SCRIPT, "transformers": TRANSFORMERS_SCRIPT}[engine]
    return [sys.executable, "-c", script, str(model_dir), prompt, str(n_tokens), str(threads)]


def run_command(command, threads):
    """Run it -> (seconds, most memory in use in MB, of which mapped files are a part)."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed: {errors.decode()[-2000:]}")
    return seconds, usage.ru_maxrss / (1000 if sys.platform != "darwin" else 1e6) * 1.024


# What is measured


class Figures:
    """Rows of the table: what, who, in which unit, its values, and whom it is compared with."""

    def __init__(self):
        self.rows = []

    def add(self, what, who, unit, values):
        row = {"what": what, "who": who, "unit": unit, "median": statistics.median(values)}
        self.rows.append(row | {"min": min(values), "max": max(values), "n": len(values)})

    def table(self):
        """Markdown: the medians, with the least and the largest, and npGPT's ratio to each of the others."""

        def figure(row):
            return f"{row['median']:.4g} {row['unit']} ({row['min']:.4g} to {row['max']:.4g})"

        lines = ["| what | npGPT | others | ratio |", "|---|---|---|---|"]
        for what in dict.fromkeys(row["what"] for row in self.rows):
            ours, *others = sorted((r for r in self.rows if r["what"] == what), key=lambda row: row["who"] != "npGPT")
            cells = "<br>".join(f"{row['who']} {figure(row)}" for row in others)
            ratios = "<br>".join(f"{ours['median'] / row['median']:.2f}" for row in others)
            lines.append(f"| {what} | {figure(ours)} | {cells} | {ratios} |")
        return "\n".join(lines)


def measure_model(figures, model_dir, size, hparams, engines, rounds, threads):
    """Tokens, prompts and samples; whole commands for the first size, in which the peers take part."""
    n_ctx = hparams["n_ctx"]
    rng = np.random.default_rng(0)
    long_prompt = rng.integers(0, hparams["n_vocab"] - 1, n_ctx - 24).tolist()
    workers = {engine: Worker(engine, model_dir, threads) for engine in engines}
    taken = {}

    def take(what, who, seconds):
        taken.setdefault((what, who), []).append(1000 * statistics.median(seconds))

    token, late = f"{size}: one more token", f"{size}: one more token after {n_ctx - 24}"
    prompt, samples = f"{size}: a prompt of {n_ctx - 24}", f"{size}: a token, of 16 samples at once"
    for worker in workers.values():
        worker.ask("steps", long_prompt, 2)  # the first is for warming up
    for _ in range(rounds):
        for engine, worker in workers.items():
            if engine == "npGPT":
                steps, products = zip(*worker.ask("steps and products", long_prompt[:10], 20), strict=True)
                take(token, "floor", products)
            else:
                steps = worker.ask("steps", long_prompt[:10], 20)
            take(token, engine, steps)
            take(late, engine, worker.ask("steps", long_prompt, 20))
            if engine != "npGPT" or engines[1:]:
                take(prompt, engine, worker.ask("prompt", long_prompt))
        if engines[1:]:
            take(samples, "npGPT", workers["npGPT"].ask("samples", 16, 10))
    for worker in workers.values():
        worker.close()
    if engines[1:] or (samples, "npGPT") in taken:
        taken[samples, "of one sample"] = taken[token, "npGPT"]
    n_parameters = sum(array.size for array in leaves_of(hparams))
    cache_share = 2 * hparams["n_layer"] * hparams["n_embd"] * (n_ctx - 14) / n_parameters
    taken[late, "floor and the cache at its speed"] = [ms * (1 + cache_share) for ms in taken[token, "floor"]]
    for (what, who), values in sorted(taken.items(), key=lambda item: (item[0][0] != token, item[0][0])):
        figures.add(what, who, "ms", values)


def leaves_of(hparams):
    """Arrays of the sizes of a model's variables, without their memory."""
    import utils

    return [np.broadcast_to(np.float32(0), shape) for _, shape in utils._variable_shapes(hparams)]


def measure_commands(figures, model_dir, size, engines, rounds, threads):
    n_tokens = 40
    runs = {engine: [] for engine in engines}
    for _ in range(rounds + 1):
        for engine in engines:
            runs[engine].append(run_command(command_of(engine, model_dir, n_tokens, threads), threads))
            time.sleep(0.3)
    for engine, results in runs.items():
        figures.add(f"{size}: the whole command, {n_tokens} tokens", engine, "s", [result[0] for result in results[1:]])
    for engine, results in runs.items():
        figures.add(f"{size}: its memory", engine, "MB", [result[1] for result in results[1:]])
    data = model_dir / "model.ckpt.data-00000-of-00001"
    figures.add(f"{size}: its memory", "the checkpoint's size", "MB", [data.stat().st_size / 1e6])


LOAD = """
import json, sys, time
start = time.perf_counter()
import encoder, utils
imported = time.perf_counter()
encoder.get_encoder(sys.argv[2], sys.argv[1])
encoded = time.perf_counter()
hparams = json.load(open(f"{sys.argv[1]}/{sys.argv[2]}/hparams.json"))
loaded = time.perf_counter()
utils.load_gpt2_params_from_tf_ckpt(f"{sys.argv[1]}/{sys.argv[2]}/model.ckpt", hparams)
print(encoded - imported, time.perf_counter() - loaded)
"""


def measure_loading(figures, model_dir, size, rounds):
    command = [sys.executable, "-c", LOAD, str(model_dir.parent), model_dir.name]
    results = [subprocess.check_output(command, cwd=ROOT, text=True).split() for _ in range(rounds)]
    encoder, params = ([1000 * float(value) for value in values] for values in zip(*results, strict=True))
    figures.add(f"{size}: encoder.json and vocab.bpe read", "npGPT", "ms", encoder)
    figures.add(f"{size}: parameters of a warm load", "npGPT", "ms", params)


ENCODE = """
import json, sys, time
who, folder, name, path = sys.argv[1:]
text = open(path, encoding="utf-8").read()
if who == "npGPT":
    from encoder import get_encoder
    coder = get_encoder(name, folder)
    encode, decode = coder.encode, coder.decode
else:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    ranks = data_gym_to_mergeable_bpe_ranks(f"{folder}/{name}/vocab.bpe", f"{folder}/{name}/encoder.json")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s"
    coder = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    encode, decode = coder.encode_ordinary, coder.decode
def timed(function, argument):
    start = time.perf_counter()
    result = function(argument)
    return time.perf_counter() - start, result
cold, ids = timed(encode, text)
warm = min(timed(encode, text)[0] for _ in range(3))
many = (ids * (1_000_000 // len(ids) + 1))[:1_000_000]
decode(many[:1000])
seconds = min(timed(decode, many)[0] for _ in range(3))
mb = len(text.encode()) / 1e6
print(mb / cold, mb / warm, 1 / seconds)
"""


def measure_encoder(figures, vocabulary, folder, rounds, quick):
    """Prose: 0.2 MB of the text that is given; code: this Python's own library."""
    texts = {
        "code": "".join(
            p.read_text(encoding="utf-8", errors="ignore") for p in sorted(Path(os.__file__).parent.glob("*.py"))
        )
    }
    prose = Path(SHARED or ".") / "text" / "tinyshakespeare.txt"
    if prose.is_file():
        texts["prose"] = prose.read_text(encoding="utf-8")[:200_000]
    peers = ["npGPT"] + ["tiktoken"] * installed("tiktoken")
    for kind, text in texts.items():
        path = folder / f"{kind}.txt"
        path.write_text(text[:20_000] if quick else text, encoding="utf-8")
        results = {who: [] for who in peers}
        for _ in range(rounds):
            for who in peers:
                command = [sys.executable, "-c", ENCODE, who, str(vocabulary.parent), vocabulary.name, str(path)]
                results[who].append([float(x) for x in subprocess.check_output(command, cwd=ROOT, text=True).split()])
        for i, (what, unit) in enumerate((("cold", "MB/s"), ("warm", "MB/s"))):
            for who, values in results.items():
                figures.add(f"encode {kind}, {what}", who, unit, [value[i] for value in values])
        if kind == "code":
            for who, values in results.items():
                figures.add("decode", who, "million ids/s", [value[2] for value in values])


# The report


def machine(threads):
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = f"{names[0]}, {len(names)} cores" if names else model
    packages = ["numpy", "torch", "transformers", "llama-cpp-python", "tiktoken"]
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"processor": model, "system": platform.platform(), "threads": threads, "versions": versions}


def plot(figures, path):
    """Bars: npGPT's ratio to each peer, in time and memory, by row; below 1 it is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels, ratios = [], []
    for row in figures.rows:
        ours = [other["median"] for other in figures.rows if (other["what"], other["who"]) == (row["what"], "npGPT")]
        if ours and row["who"] != "npGPT":
            ratio = ours[0] / row["median"]
            labels.append(f"{row['what']} : {row['who']}")
            ratios.append(1 / ratio if row["unit"].endswith("/s") else ratio)
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(labels) + 1), layout="constrained")
    axes.barh(labels, ratios, color=["#3a7d44" if ratio <= 1.05 else "#c8963e" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.bar_label(axes.containers[0], [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("npGPT's time or memory / the other's (shorter is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_dir", type=Path, help="the folder of a 124M checkpoint (default: a random one is made)"
    )
    parser.add_argument("--sizes", default="", help="further sizes, random, against the floor: 355M,774M,1558M")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default 2)")
    parser.add_argument("--quick", action="store_true", help="a small model and one turn: does it work?")
    parser.add_argument("--json", type=Path, help="store the figures here, with versions and the machine")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (needs matplotlib)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    if args.worker:
        sys.path.insert(0, str(ROOT))
        if args.worker[0] == "npGPT" and not os.environ.get("NPGPT_THREADS_SET"):  # NumPy was imported before they were
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"NPGPT_THREADS_SET": "1"})
        return work(*args.worker, args.threads)

    sys.path.insert(0, str(ROOT))
    for peer in PEERS:
        if not installed(peer):
            print(f"{peer} is missing here: pip install {INSTALL[peer]}", file=sys.stderr)
    engines = ["npGPT"] + [peer for peer in ("llama.cpp", "transformers") if installed(peer)]
    rounds, first, hparams = (1, "quick", QUICK) if args.quick else (args.rounds, "124M", SIZES["124M"])
    if args.model_dir:
        first, hparams = args.model_dir.resolve().name, json.loads((args.model_dir / "hparams.json").read_text())
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model_dir = apart(prepare, folder, first, hparams, args.model_dir, engines[1:])
        measure_model(figures, model_dir, first, hparams, engines, rounds, args.threads)
        measure_commands(figures, model_dir, first, engines, rounds, args.threads)
        measure_loading(figures, model_dir, first, rounds)
        measure_encoder(figures, real_vocabulary(args.model_dir) or model_dir, folder, rounds, args.quick)
        for size in filter(None, args.sizes.split(",")):
            model_dir = apart(prepare, folder, size, SIZES[size], None, [])
            measure_model(figures, model_dir, size, SIZES[size], ["npGPT"], min(rounds, 3), args.threads)
            measure_commands(figures, model_dir, size, ["npGPT"], 1, args.threads)
            for path in model_dir.iterdir():
                path.unlink()
    about = machine(args.threads)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['processor']}, {args.threads} threads; {versions}\n\n{figures.table()}")
    if args.json:
        args.json.write_text(json.dumps(about | {"figures": figures.rows}, indent=1) + "\n")
    if args.plot:
        plot(figures, args.plot)


if __name__ == "__main__":
    main()
