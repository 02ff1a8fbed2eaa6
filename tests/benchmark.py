"""Measure npGPT beside the programs that people would use instead, on the same checkpoint and in one run.

    python tests/benchmark.py                            with a random 124M, which is made for the purpose
    python tests/benchmark.py --model_dir models/124M    with this model
    python tests/benchmark.py --sizes 355M,774M,1558M    with random models of these sizes, too (up to 15 GB of disk)
    python tests/benchmark.py --quick                    with a tiny model and one round, to see that it works

Other programs take part if they are installed: pip install torch transformers; pip install llama-cpp-python gguf; pip
install tiktoken. picoGPT takes part if --picogpt names a checkout of it, which you get with

    git clone https://github.com/jaymody/picoGPT

Each program runs in a process of its own. They take turns, with pauses in which the threads of the last one go to
sleep. All use float32 weights and --threads threads. Each figure is the median of the rounds, with the minimum and the
maximum.
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
from helpers import (
    GPT2_PATTERN,
    ROOT,
    SMALL_MERGES,
    gpt2_merges,
    held_out_text,
    random_variables,
    write_model,
    write_vocabulary,
)

SIZES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}
QUICK = {"n_vocab": 269, "n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2}
PACKAGES = {
    "llama.cpp": "llama-cpp-python gguf",
    "transformers": "torch transformers",
    "tiktoken": "tiktoken",
}
MODULES = {
    "llama.cpp": ("llama_cpp", "gguf"),
    "transformers": ("torch", "transformers"),
    "tiktoken": ("tiktoken",),
}
COLORS = {
    "npGPT": "#2a7f4f",
    "llama.cpp": "#8a9bb0",
    "transformers": "#e0a33e",
    "picoGPT": "#b5523b",
}
N_TOKENS = 40  # of a whole command
SHORT_TEXTS = "scoring texts of 20 to 300 tokens"


def is_installed(program):
    return all(importlib.util.find_spec(module) for module in MODULES[program])


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# The programs. prompt(ids) processes a prompt and chooses the next token, step() does so for one more token, and
# score(ids) computes how likely a text is.


class NpGPT:
    def __init__(self, model_dir, threads, picogpt):
        import gpt2
        from utils import load_encoder_hparams_and_params

        self.gpt2 = gpt2
        _, self.hparams, self.params = load_encoder_hparams_and_params(
            model_dir.name, str(model_dir.parent)
        )
        self.n_head = self.hparams["n_head"]

    def prompt(self, ids):
        self.ids = self.gpt2.stream(
            ids, self.params, self.n_head, self.hparams["n_ctx"] - len(ids) + 1
        )
        next(self.ids)

    def step(self):
        next(self.ids)

    def score(self, ids):
        self.gpt2.log_probs(ids, self.params, self.n_head)

    def samples(self, n_samples, n):
        """Seconds per token while n_samples samples are generated at once."""
        rows = self.gpt2.stream(
            list(range(10)), self.params, self.n_head, n + 1, n_samples=n_samples
        )
        next(rows)
        return [timed(lambda: next(rows)) / n_samples for _ in range(n)]

    def products(self):
        """A function that computes only the matrix-vector products of one token. It reads every weight once."""
        vectors = {
            n: np.ones((1, n), np.float32)
            for n in (self.hparams["n_embd"], 4 * self.hparams["n_embd"])
        }
        matrices = [self.params["wte"].T]
        for block in self.params["blocks"]:
            matrices += [block[part][name]["w"] for part in ("attn", "mlp") for name in block[part]]

        def multiply():
            for matrix in matrices:
                vectors[len(matrix)] @ matrix

        return multiply


class PicoGPT:
    """The functions of picoGPT's gpt2.py. npGPT loads the parameters, which have the same layout."""

    def __init__(self, model_dir, threads, picogpt):
        from utils import load_encoder_hparams_and_params

        _, hparams, self.params = load_encoder_hparams_and_params(
            model_dir.name, str(model_dir.parent)
        )
        self.n_head = hparams["n_head"]
        specification = importlib.util.spec_from_file_location("picogpt", Path(picogpt) / "gpt2.py")
        self.picogpt = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(self.picogpt)

    def prompt(self, ids):
        self.ids = list(ids)
        self.step()

    def step(self):
        logits = self.picogpt.gpt2(self.ids, **self.params, n_head=self.n_head)
        self.ids.append(int(np.argmax(logits[-1])))


class Transformers:
    def __init__(self, model_dir, threads, picogpt):
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
        self.past, self.next_id = (
            output.past_key_values,
            output.logits[:, -1].argmax(-1, keepdim=True),
        )

    def step(self):
        self.advance(self.next_id)

    def score(self, ids):
        ids = self.torch.tensor([ids])
        self.model(ids, labels=ids, use_cache=False).loss.item()


class LlamaCpp:
    def __init__(self, model_dir, threads, picogpt):
        from llama_cpp import Llama

        n_ctx = json.loads((model_dir / "hparams.json").read_text())["n_ctx"]
        path = str(model_dir / "model.gguf")
        self.model = Llama(
            path, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prompt(self, ids):
        self.model.reset()
        self.ids = self.model.generate(ids, temp=0.0)
        next(self.ids)

    def step(self):
        next(self.ids)


ENGINES = {"npGPT": NpGPT, "llama.cpp": LlamaCpp, "transformers": Transformers, "picoGPT": PicoGPT}


def peak_memory():
    """The most memory that this process has used, in MB. Mapped files count if they were read."""
    import resource

    return megabytes(resource.getrusage(resource.RUSAGE_SELF))


def megabytes(usage):
    return usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e6


def work(program, model_dir, threads, picogpt):
    """Run as the process of one program: read a request per line and print the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print, too
    engine = ENGINES[program](Path(model_dir), threads, picogpt)
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
        elif method == "score":
            result = [timed(lambda: [engine.score(ids) for ids in arguments[0]])]  # noqa: B023
        elif method == "memory":
            result = peak_memory()
        else:
            result = getattr(engine, method)(*arguments)
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """The process of one program, which answers one request at a time."""

    def __init__(self, program, model_dir, args):
        command = [
            sys.executable,
            __file__,
            "--worker",
            program,
            str(model_dir),
            "--threads",
            str(args.threads),
        ]
        command += ["--picogpt", str(args.picogpt)] if args.picogpt else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{program} did not start")

    def ask(self, *request):
        time.sleep(0.3)  # until the threads of the last program sleep
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# The same checkpoint for all programs


def convert_for_transformers(model_dir, hparams, variables):
    from make_reference import torch_model

    torch_model(hparams, variables).save_pretrained(model_dir / "transformers")
    for name, new_name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (model_dir / "transformers" / new_name).write_bytes((model_dir / name).read_bytes())


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
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t == "<|endoftext|>" else gguf.TokenType.NORMAL for t in tokens]
    )
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


def prepare(folder, size, hparams, model_dir, programs):
    """Make a random checkpoint in folder/size, or link the one in model_dir there, and convert it -> folder/size."""
    target = folder / size
    if model_dir:
        target.mkdir()
        for path in model_dir.iterdir():
            (target / path.name).symlink_to(path.resolve())
    else:
        write_model(
            target, hparams, merges=gpt2_merges() if hparams["n_vocab"] == 50257 else SMALL_MERGES
        )
    if {"transformers", "llama.cpp"} & set(programs):
        variables = checkpoint_variables(target) if model_dir else random_variables(hparams)
        if "transformers" in programs:
            convert_for_transformers(target, hparams, variables)
        if "llama.cpp" in programs:
            convert_for_llama_cpp(target, hparams, variables)
    if "picoGPT" in programs:  # it loads only models with a published name
        (target / "picoGPT").mkdir()
        (target / "picoGPT" / "124M").symlink_to(target)
    run_command(
        [sys.executable, str(ROOT / "gpt2.py"), "a", "1", target.name, str(target.parent)], 2
    )  # the first load
    return target


def in_new_process(function, *arguments):
    """Call the function in a process of its own. Linux starts the peak memory of a child with that of its parent."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# Whole commands, from the start of the process to its exit

PROMPT = "Alan Turing theorized that computers would one day become"
LLAMA_SCRIPT = """
import sys
from llama_cpp import Llama
path, prompt, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = Llama(path + "/model.gguf", n_ctx=min(1024, len(prompt) + n), n_threads=threads, verbose=False)
ids = []
for token_id in model.generate(model.tokenize(prompt.encode(), add_bos=False), temp=0.0):
    ids.append(token_id)
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


def command_of(program, model_dir, args):
    if program == "npGPT":
        return [
            sys.executable,
            str(ROOT / "gpt2.py"),
            PROMPT,
            str(N_TOKENS),
            model_dir.name,
            str(model_dir.parent),
        ]
    if program == "picoGPT":
        script = str(args.picogpt.resolve() / "gpt2.py")
        return [sys.executable, script, PROMPT, str(N_TOKENS), "124M", str(model_dir / "picoGPT")]
    script = {"llama.cpp": LLAMA_SCRIPT, "transformers": TRANSFORMERS_SCRIPT}[program]
    return [sys.executable, "-c", script, str(model_dir), PROMPT, str(N_TOKENS), str(args.threads)]


def thread_variables(threads):
    return dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)
    )


def run_command(command, threads):
    """Run the command -> (seconds, peak memory in MB)."""
    environment = os.environ | thread_variables(threads) | {"HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed: {errors.decode()[-2000:]}")
    return seconds, megabytes(usage)


# Measurements


def rounded(value, n_digits=3):
    return f"{float(f'{value:.{n_digits}g}'):,.10g}"


class Figures:
    """The results. Each row says what was measured, for which program, in which unit, and the values."""

    def __init__(self):
        self.rows = []

    def add(self, what, who, unit, values):
        row = {"what": what, "who": who, "unit": unit, "median": statistics.median(values)}
        self.rows.append(row | {"min": min(values), "max": max(values), "n": len(values)})

    def find(self, what, who):
        return next((row for row in self.rows if (row["what"], row["who"]) == (what, who)), None)

    def full_table(self):
        """Markdown: medians with minimum and maximum, and the ratio of npGPT's median to each of the others."""

        def figure(row):
            median, least, most = (rounded(row[key], 4) for key in ("median", "min", "max"))
            return f"{median} {row['unit']} ({least} to {most})"

        lines = ["| what | npGPT | others | ratio |", "|---|---|---|---|"]
        for what in dict.fromkeys(row["what"] for row in self.rows):
            ours, *others = sorted(
                (r for r in self.rows if r["what"] == what), key=lambda row: row["who"] != "npGPT"
            )
            cells = "<br>".join(f"{row['who']} {figure(row)}" for row in others)
            ratios = "<br>".join(f"{ours['median'] / row['median']:.2f}" for row in others)
            lines.append(f"| {what} | {figure(ours)} | {cells} | {ratios} |")
        return "\n".join(lines)

    def short_table(self, tasks, programs):
        """Markdown: the medians of these tasks, {label: what}, with one column per program."""
        lines = [f"| | {' | '.join(programs)} |", "|---" * (len(programs) + 1) + "|"]
        for label, what in tasks.items():
            rows = [self.find(what, program) for program in programs]
            cells = [f"{rounded(row['median'])} {row['unit']}" if row else "" for row in rows]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return "\n".join(lines)


def tasks_of(size, n_ctx):
    """{label: what}, the five rows of the README."""
    return {
        "one more token": f"{size}: one more token",
        f"a prompt of {n_ctx - 24} tokens": f"{size}: a prompt of {n_ctx - 24} tokens",
        f"the whole command, {N_TOKENS} tokens": f"{size}: the whole command, {N_TOKENS} tokens",
        "memory of the command": f"{size}: memory of the command",
        SHORT_TEXTS: f"{size}: {SHORT_TEXTS}",
    }


def measure_model(figures, model_dir, size, hparams, programs, rounds, args):
    """Time single tokens, prompts and samples. The larger sizes, without other programs, skip the last two."""
    n_ctx = hparams["n_ctx"]
    long_prompt = np.random.default_rng(0).integers(0, hparams["n_vocab"] - 1, n_ctx - 24).tolist()
    workers = {program: Worker(program, model_dir, args) for program in programs}
    taken = {}

    def take(what, who, seconds):
        taken.setdefault((what, who), []).append(1000 * statistics.median(seconds))

    token, late = (
        f"{size}: one more token",
        f"{size}: one more token after {len(long_prompt)} tokens",
    )
    prompt, samples = (
        f"{size}: a prompt of {len(long_prompt)} tokens",
        f"{size}: a token, for 16 samples at once",
    )
    for program, worker in workers.items():
        worker.ask(
            "steps", long_prompt if program != "picoGPT" else long_prompt[:10], 2
        )  # a first run to warm up
    for n_round in range(rounds):
        for program, worker in workers.items():
            if (
                program == "picoGPT"
            ):  # slow, and without a cache a late token takes as long as a prompt
                if n_round < 2:
                    take(token, program, worker.ask("steps", long_prompt[:10], 3))
                    take(prompt, program, worker.ask("prompt", long_prompt))
                continue
            if program == "npGPT":
                steps, products = zip(
                    *worker.ask("steps and products", long_prompt[:10], 20), strict=True
                )
                take(token, "floor", products)
            else:
                steps = worker.ask("steps", long_prompt[:10], 20)
            take(token, program, steps)
            take(late, program, worker.ask("steps", long_prompt, 20))
            if size not in args.sizes:
                take(prompt, program, worker.ask("prompt", long_prompt))
        if size not in args.sizes:
            take(samples, "npGPT", workers["npGPT"].ask("samples", 16, 10))
    for worker in workers.values():
        worker.__exit__()
    if (samples, "npGPT") in taken:
        taken[samples, "one sample"] = taken[token, "npGPT"]
    n_params = sum(
        array.size for array in random_variables(hparams | {"n_vocab": 1, "n_ctx": 1}).values()
    )
    n_params += (hparams["n_vocab"] + n_ctx - 2) * hparams["n_embd"]
    cache_share = 2 * hparams["n_layer"] * hparams["n_embd"] * (n_ctx - 14) / n_params
    taken[late, "floor, and the cache at its speed"] = [
        ms * (1 + cache_share) for ms in taken[token, "floor"]
    ]
    for (what, who), values in sorted(
        taken.items(), key=lambda item: (item[0][0] != token, item[0][0])
    ):
        figures.add(what, who, "ms", values)


def measure_commands(figures, model_dir, size, programs, rounds, args):
    runs = {program: [] for program in programs}
    for n_round in range(rounds + 1):
        for program in programs:
            if program != "picoGPT" or n_round < 2:
                runs[program].append(
                    run_command(command_of(program, model_dir, args), args.threads)
                )
                time.sleep(0.3)
    for what, unit, i in (
        (f"the whole command, {N_TOKENS} tokens", "s", 0),
        ("memory of the command", "MB", 1),
    ):
        for program, results in runs.items():
            figures.add(f"{size}: {what}", program, unit, [result[i] for result in results[1:]])
    data = model_dir / "model.ckpt.data-00000-of-00001"
    figures.add(
        f"{size}: memory of the command",
        "size of the checkpoint",
        "MB",
        [data.stat().st_size / 1e6],
    )


def measure_scoring(figures, model_dir, size, hparams, programs, rounds, args):
    """Tokens per second that are scored, one text at a time, and the peak memory of doing so."""
    rng, n_ctx = np.random.default_rng(0), hparams["n_ctx"]
    lengths = rng.integers(20, min(300, n_ctx) + 1, 16)
    texts = {
        SHORT_TEXTS: [rng.integers(0, hparams["n_vocab"] - 1, n).tolist() for n in lengths],
        f"scoring a text of {n_ctx - 24} tokens": [
            rng.integers(0, hparams["n_vocab"] - 1, n_ctx - 24).tolist()
        ],
    }
    for what, some in texts.items():
        workers = {
            program: Worker(program, model_dir, args) for program in programs if program in SCORERS
        }
        speeds = {program: [] for program in workers}
        for _ in range(rounds + 1):  # the first one warms up
            for program, worker in workers.items():
                speeds[program].append(sum(map(len, some)) / worker.ask("score", some)[0])
        for program, values in speeds.items():
            figures.add(f"{size}: {what}", program, "tokens/s", values[1:])
        for program, worker in workers.items():
            figures.add(f"{size}: memory of {what}", program, "MB", [worker.ask("memory")])
            worker.__exit__()


SCORERS = [program for program, engine in ENGINES.items() if hasattr(engine, "score")]

# {what: {program: (preparation, statements to time)}}
LOADS = {
    "encoder.json and vocab.bpe": {
        "npGPT": ("import encoder", "encoder.get_encoder(name, folder)")
    },
    "parameters that were loaded before": {
        "npGPT": (
            "import json, utils; hparams = json.load(open(f'{folder}/{name}/hparams.json'))",
            "utils.load_gpt2_params_from_tf_ckpt(f'{folder}/{name}/model.ckpt', hparams)",
        )
    },
    "a Hugging Face folder": {
        "npGPT": (
            "import utils",
            "utils.load_encoder_hparams_and_params('transformers', f'{folder}/{name}')",
        ),
        "transformers": (
            "from transformers import GPT2LMHeadModel, GPT2Tokenizer; folder = f'{folder}/{name}/transformers'",
            "GPT2Tokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder)",
        ),
    },
}
TIMED = """
import sys, time
folder, name = sys.argv[1:]
{preparation}
start = time.perf_counter()
{statements}
print(time.perf_counter() - start)
"""


def measure_loading(figures, model_dir, size, programs, rounds):
    for what, ways in LOADS.items():
        if what == "a Hugging Face folder" and "transformers" not in programs:
            continue  # transformers writes it
        for program in [program for program in ways if program in programs]:
            preparation, statements = ways[program]
            command = [
                sys.executable,
                "-c",
                TIMED.format(preparation=preparation, statements=statements),
            ]
            command += [str(model_dir.parent), model_dir.name]
            seconds = [float(subprocess.check_output(command, cwd=ROOT)) for _ in range(rounds)]
            figures.add(
                f"{size}: loading {what}", program, "ms", [1000 * value for value in seconds]
            )


ENCODE = """
import json, sys, time
who, folder, name, path, pattern = sys.argv[1:]
text = open(path, encoding="utf-8").read()
if who == "npGPT":
    from encoder import get_encoder
    coder = get_encoder(name, folder)
    encode, decode = coder.encode, coder.decode
else:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    ranks = data_gym_to_mergeable_bpe_ranks(f"{folder}/{name}/vocab.bpe", f"{folder}/{name}/encoder.json")
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


def measure_encoder(figures, folder, rounds, quick):
    """Encode prose (Shakespeare) and code (the modules of this Python) with GPT-2's vocabulary, and decode."""
    write_vocabulary(folder / "gpt2", gpt2_merges())
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    code = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in modules)
    programs = ["npGPT"] + ["tiktoken"] * is_installed("tiktoken")
    for kind, text in ("prose", held_out_text()), ("code", code):
        path = folder / f"{kind}.txt"
        path.write_text(text[:20_000] if quick else text, encoding="utf-8")
        results = {program: [] for program in programs}
        for _ in range(rounds):
            for program in programs:
                command = [
                    sys.executable,
                    "-c",
                    ENCODE,
                    program,
                    str(folder),
                    "gpt2",
                    str(path),
                    GPT2_PATTERN,
                ]
                results[program].append(
                    list(map(float, subprocess.check_output(command, cwd=ROOT).split()))
                )
        rows = [(f"encoding {kind}, first time", "MB/s"), (f"encoding {kind} again", "MB/s")]
        rows += [("decoding", "million ids/s")] * (kind == "code")
        for i, (what, unit) in enumerate(rows):
            for program, values in results.items():
                figures.add(what, program, unit, [value[i] for value in values])


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
    return {
        "processor": model,
        "system": platform.platform(),
        "threads": threads,
        "versions": versions,
    }


def plot(figures, tasks, programs, path):
    """Bars grouped by task, one color per program. Shorter is better, so scoring (tokens per second) is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = {
        label: what
        for label, what in tasks.items()
        if not figures.find(what, "npGPT")["unit"].endswith("/s")
    }
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(11, 3.4), layout="constrained")
    for axes, (label, what) in zip(panels, tasks.items(), strict=True):
        rows = [row for row in (figures.find(what, program) for program in programs) if row]
        for i, row in enumerate(rows):
            bar = axes.bar(i, row["median"], color=COLORS[row["who"]], width=0.8)
            axes.bar_label(bar, [rounded(row["median"])], padding=2, fontsize=10)
        axes.set_title(f"{label}\n({rows[0]['unit']})", fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.margins(y=0.12)
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[program]) for program in programs]
    place = {"loc": "outside lower center", "ncols": len(programs), "frameon": False}
    figure.legend(handles, programs, **place, fontsize=11, title="shorter bars are better")
    figure.savefig(path, dpi=110)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_dir",
        type=Path,
        help="a folder with a 124M checkpoint (default: a random one is made)",
    )
    parser.add_argument(
        "--sizes", default="", help="also measure npGPT with random models of these sizes"
    )
    parser.add_argument(
        "--picogpt", type=Path, help="a checkout of picoGPT, to measure it, too (takes minutes)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each program is measured (default 5)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of each program (default 2)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    parser.add_argument(
        "--json", type=Path, help="store the figures, the versions and the machine here"
    )
    parser.add_argument("--plot", type=Path, help="draw the chart here (needs matplotlib)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sizes = list(filter(None, args.sizes.split(",")))
    if args.picogpt and not (args.picogpt / "gpt2.py").is_file():
        parser.error(
            f"{args.picogpt} is not a checkout of picoGPT: git clone https://github.com/jaymody/picoGPT"
        )
    return args


def main():
    args = parse_arguments()
    sys.path.insert(0, str(ROOT))
    if args.worker:
        return work(*args.worker, args.threads, args.picogpt)
    os.environ |= thread_variables(args.threads)  # before the workers import NumPy
    for program, packages in PACKAGES.items():
        if not is_installed(program):
            print(f"{program} is not installed (pip install {packages})", file=sys.stderr)
    programs = [
        "npGPT",
        *(program for program in ("llama.cpp", "transformers") if is_installed(program)),
    ]
    programs += ["picoGPT"] * bool(args.picogpt)
    rounds, first, hparams = (
        (1, "quick", QUICK) if args.quick else (args.rounds, "124M", SIZES["124M"])
    )
    if args.model_dir:
        first, hparams = (
            args.model_dir.resolve().name,
            json.loads((args.model_dir / "hparams.json").read_text()),
        )
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model_dir = in_new_process(prepare, folder, first, hparams, args.model_dir, programs)
        measure_model(figures, model_dir, first, hparams, programs, rounds, args)
        measure_commands(figures, model_dir, first, programs, rounds, args)
        measure_scoring(figures, model_dir, first, hparams, programs, rounds, args)
        measure_loading(figures, model_dir, first, programs, rounds)
        measure_encoder(figures, folder, rounds, args.quick)
        for size in args.sizes:
            model_dir = in_new_process(prepare, folder, size, SIZES[size], None, ["npGPT"])
            measure_model(figures, model_dir, size, SIZES[size], ["npGPT"], min(rounds, 3), args)
            measure_commands(figures, model_dir, size, ["npGPT"], 1, args)
            for path in model_dir.iterdir():
                path.unlink()
    about, tasks = machine(args.threads), tasks_of(first, hparams["n_ctx"])
    versions = ", ".join(
        f"{name} {version}" for name, version in about["versions"].items() if version
    )
    print(f"{about['processor']}, {args.threads} threads; {versions}")
    print(f"\n{figures.short_table(tasks, programs)}\n\n{figures.full_table()}")
    if args.json:
        args.json.write_text(json.dumps(about | {"figures": figures.rows}, indent=1) + "\n")
    if args.plot:
        plot(figures, tasks, programs, args.plot)


if __name__ == "__main__":
    main()
