"""Measure npGPT beside the programs that people would use instead, on one checkpoint, in one run.

    python tests/benchmark.py                            with a random 124M, made for the purpose
    python tests/benchmark.py --model_dir models/124M    with this model
    python tests/benchmark.py --sizes 355M,774M,1558M    with random models of these sizes, too
                                                         (up to 15 GB of disk)
    python tests/benchmark.py --quick                    with a tiny model and one round, as a test

Other programs take part if they are installed: pip install torch transformers; pip install
llama-cpp-python gguf; pip install tiktoken. picoGPT takes part if --picogpt names a checkout of it,
which you get with

    git clone https://github.com/jaymody/picoGPT

Each program runs in a process of its own. They take turns, with pauses in which the threads of the
last one go to sleep. All use float32 weights and --threads threads. Each figure is the median of
the rounds, with the minimum and the maximum.
"""

import argparse
import concurrent.futures
import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
PACKAGES = {  # what to install, and the modules that come with it
    "llama.cpp": ("llama-cpp-python gguf", ["llama_cpp", "gguf"]),
    "transformers": ("torch transformers", ["torch", "transformers"]),
    "tiktoken": ("tiktoken", ["tiktoken"]),
}
COLORS = {
    "npGPT": "#2a7f4f",
    "llama.cpp": "#8a9bb0",
    "transformers": "#e0a33e",
    "picoGPT": "#b5523b",
}
N_TOKENS = 40  # of a whole command
PAUSE = 0.2  # seconds. OpenBLAS's threads spin for about 0.03 s after each product
N_NEIGHBOURS = (0, 2, 6)
N_PARAGRAPHS = 150  # of Shakespeare, as a corpus
SHORT_TEXTS = "scoring texts of 20 to 300 tokens"
COMMAND = "npGPT's command"  # what gpt2.py sets for itself when it is run:
COMMAND_VARIABLES = {"OPENBLAS_THREAD_TIMEOUT": "8"}


def is_installed(program):
    _, modules = PACKAGES[program]
    return all(importlib.util.find_spec(module) for module in modules)


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


# The programs


class Engine:
    """One program. prompt(ids) processes a prompt and chooses a token, step() does one more token.

    score(ids) computes how likely a text is. All times are in seconds.
    """

    def time_prompt(self, ids):
        return timed(self.prompt, ids)

    def time_step(self, ids, n):
        """The median of n steps after these ids."""
        self.prompt(ids)
        return statistics.median(timed(self.step) for _ in range(n))

    def time_scores(self, texts):
        return sum(timed(self.score, ids) for ids in texts)

    def memory(self):
        """The most memory that this process has used, in MB, with the mapped files that it read."""
        import resource

        return megabytes(resource.getrusage(resource.RUSAGE_SELF))


class NpGPT(Engine):
    def __init__(self, model_dir, threads, picogpt):
        import gpt2
        from utils import load_encoder_hparams_and_params

        self.gpt2 = gpt2
        model = load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))
        self.encoder, self.hparams, self.params = model
        self.n_head = self.hparams["n_head"]

    def prompt(self, ids):
        n = self.hparams["n_ctx"] - len(ids) + 1
        self.ids = self.gpt2.stream(ids, self.params, self.n_head, n)
        next(self.ids)

    def step(self):
        next(self.ids)

    def score(self, ids):
        self.gpt2.log_probs(ids, self.params, self.n_head)

    def time_samples(self, n_samples, n):
        """The time of a token while n_samples samples are generated at once."""
        ids = list(range(10))
        rows = self.gpt2.stream(ids, self.params, self.n_head, n + 1, n_samples=n_samples)
        next(rows)
        return statistics.median(timed(next, rows) for _ in range(n)) / n_samples

    def time_products(self, n):
        """The time of the matrix-vector products of one token, which read every weight once."""
        matrices = [self.params["wte"].T]
        for block in self.params["blocks"]:
            for part in (block["attn"], block["mlp"]):
                matrices += [projection["w"] for projection in part.values()]
        vectors = [np.ones((1, len(matrix)), np.float32) for matrix in matrices]

        def multiply():
            for vector, matrix in zip(vectors, matrices, strict=True):
                vector @ matrix

        return statistics.median(timed(multiply) for _ in range(n))

    def encode(self, texts):
        return [self.encoder.encode(text) for text in texts]


class PicoGPT(Engine):
    """picoGPT's gpt2.py. npGPT loads the parameters, which have the same layout."""

    def __init__(self, model_dir, threads, picogpt):
        from utils import load_encoder_hparams_and_params

        model = load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))
        _, hparams, self.params = model
        self.n_head = hparams["n_head"]
        path = Path(picogpt) / "gpt2.py"
        specification = importlib.util.spec_from_file_location("picogpt", path)
        self.picogpt = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(self.picogpt)

    def prompt(self, ids):
        self.ids = list(ids)
        self.step()

    def step(self):
        logits = self.picogpt.gpt2(self.ids, **self.params, n_head=self.n_head)
        self.ids.append(int(np.argmax(logits[-1])))


class Transformers(Engine):
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
        self.past = output.past_key_values
        self.next_id = output.logits[:, -1].argmax(-1, keepdim=True)

    def step(self):
        self.advance(self.next_id)

    def score(self, ids):
        ids = self.torch.tensor([ids])
        self.model(ids, labels=ids, use_cache=False).loss.item()

    def time_corpus(self, texts, n_at_once):
        """The time of scoring the texts in batches of texts of similar length."""
        texts = sorted(texts, key=len)
        starts = range(0, len(texts), n_at_once)
        return sum(timed(self.score_batch, texts[i : i + n_at_once]) for i in starts)

    def score_batch(self, texts):
        n_ids = max(map(len, texts))
        ids = self.torch.tensor([text + [0] * (n_ids - len(text)) for text in texts])
        logits = self.model(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        targets = ids[:, 1:].flatten()
        self.torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()


class LlamaCpp(Engine):
    def __init__(self, model_dir, threads, picogpt):
        from llama_cpp import Llama

        n_ctx = json.loads((model_dir / "hparams.json").read_text())["n_ctx"]
        path = str(model_dir / "model.gguf")
        n_threads = {"n_threads": threads, "n_threads_batch": threads}
        self.model = Llama(path, n_ctx=n_ctx, verbose=False, **n_threads)

    def prompt(self, ids):
        self.model.reset()
        self.ids = self.model.generate(ids, temp=0.0)
        next(self.ids)

    def step(self):
        next(self.ids)


ENGINES = {"npGPT": NpGPT, "llama.cpp": LlamaCpp, "transformers": Transformers, "picoGPT": PicoGPT}
SCORERS = ("npGPT", "transformers")


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
        result = getattr(engine, method)(*arguments)
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """The process of one program, which answers one request at a time."""

    def __init__(self, program, run):
        command = [sys.executable, __file__, "--threads", str(run.args.threads)]
        if run.args.picogpt:
            command += ["--picogpt", str(run.args.picogpt)]
        environment = os.environ.copy()
        if program == COMMAND:
            environment |= COMMAND_VARIABLES
            program = "npGPT"
        command += ["--worker", program, str(run.model_dir)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{program} did not start")

    def ask(self, *request):
        time.sleep(PAUSE)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def workers(programs, run):
    """{program: its worker}. All have loaded the model when the first one is asked."""
    started = {}
    try:
        for program in programs:
            started[program] = Worker(program, run)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def in_turns(some_workers, rounds, *request, is_warm=False):
    """Ask the programs in turns, after a first time if they are not warm -> {program: answers}."""
    answers = {program: [] for program in some_workers}
    for n_round in range(rounds if is_warm else rounds + 1):
        for program, worker in some_workers.items():
            answer = worker.ask(*request)
            if is_warm or n_round > 0:
                answers[program].append(answer)
    return answers


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
    """Make a random checkpoint, or link the one in model_dir, and convert it -> its folder."""
    target = folder / size
    if model_dir:
        target.mkdir()
        for path in model_dir.iterdir():
            (target / path.name).symlink_to(path.resolve())
        variables = checkpoint_variables(target)
    else:
        merges = gpt2_merges() if hparams["n_vocab"] == 50257 else SMALL_MERGES
        write_model(target, hparams, merges=merges)
        variables = random_variables(hparams)
    if "transformers" in programs:
        convert_for_transformers(target, hparams, variables)
    if "llama.cpp" in programs:
        convert_for_llama_cpp(target, hparams, variables)
    if "picoGPT" in programs:  # it loads only models with a published name
        (target / "picoGPT").mkdir()
        (target / "picoGPT" / "124M").symlink_to(target)
    first_load = [sys.executable, str(ROOT / "gpt2.py"), "a", "1", target.name, str(folder)]
    run_command(first_load, 2)
    return target


def in_new_process(function, *arguments):
    """Call the function in a new process. On Linux, peak memory starts with that of the parent."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# Whole commands, from the start of the process to its exit

PROMPT = "Alan Turing theorized that computers would one day become"
LLAMA_SCRIPT = """
import sys
from llama_cpp import Llama
path, prompt, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
n_ctx = min(1024, len(prompt) + n)
model = Llama(path + "/model.gguf", n_ctx=n_ctx, n_threads=threads, verbose=False)
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
    mask = torch.ones_like(ids)
    lengths = {"max_new_tokens": n, "min_new_tokens": n}
    out = model.generate(ids, attention_mask=mask, do_sample=False, **lengths)
print(tokenizer.decode(out[0, ids.shape[1]:]))
"""


def command_of(program, run):
    model_dir = run.model_dir
    prompt = [PROMPT, str(N_TOKENS)]
    if program == "npGPT":
        script = str(ROOT / "gpt2.py")
        return [sys.executable, script, *prompt, model_dir.name, str(model_dir.parent)]
    if program == "picoGPT":
        script = str(run.args.picogpt.resolve() / "gpt2.py")
        return [sys.executable, script, *prompt, "124M", str(model_dir / "picoGPT")]
    script = {"llama.cpp": LLAMA_SCRIPT, "transformers": TRANSFORMERS_SCRIPT}[program]
    return [sys.executable, "-c", script, str(model_dir), *prompt, str(run.args.threads)]


def thread_variables(threads):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


class Usage(NamedTuple):
    seconds: float
    megabytes: float


def run_command(command, threads):
    """Run the command -> its time and peak memory."""
    environment = os.environ | thread_variables(threads) | {"HF_HUB_OFFLINE": "1"}
    time.sleep(PAUSE)
    start = time.perf_counter()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed: {errors.decode()[-2000:]}")
    return Usage(seconds, megabytes(usage))


# Measurements


def rounded(value, n_digits=3):
    return f"{float(f'{value:.{n_digits}g}'):,.10g}"


class Figures:
    """The results. A row says what was measured, for which program, in which unit, and values."""

    def __init__(self):
        self.rows = []

    def add(self, what, who, unit, values):
        row = {"what": what, "who": who, "unit": unit, "median": statistics.median(values)}
        row |= {"min": min(values), "max": max(values), "n": len(values)}
        self.rows.append(row)
        print(f"{what}, {who}: {with_limits(row)}", file=sys.stderr)

    def find(self, what, who):
        for row in self.rows:
            if row["what"] == what and row["who"] == who:
                return row
        return None

    def full_table(self, processor):
        """Markdown: medians, minimum and maximum, and the ratio of npGPT's median to the others."""
        lines = [f"| {processor} | npGPT | others | ratio |", "|---|---|---|---|"]
        for what in dict.fromkeys(row["what"] for row in self.rows):
            ours = self.find(what, "npGPT")
            others = [row for row in self.rows if row["what"] == what and row is not ours]
            cells = "<br>".join(f"{row['who']} {with_limits(row)}" for row in others)
            ratios = "<br>".join(f"{ours['median'] / row['median']:.2f}" for row in others)
            lines.append(f"| {what} | {with_limits(ours)} | {cells} | {ratios} |")
        return "\n".join(lines)

    def short_table(self, tasks, programs, processor):
        """Markdown: the medians of these tasks, {label: what}, with one column per program."""
        lines = [f"| {processor} | {' | '.join(programs)} |", "|---" * (len(programs) + 1) + "|"]
        for label, what in tasks.items():
            rows = [self.find(what, program) for program in programs]
            cells = [f"{rounded(row['median'])} {row['unit']}" if row else "" for row in rows]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return "\n".join(lines)


def with_limits(row):
    median, least, most = (rounded(row[key], 4) for key in ("median", "min", "max"))
    return f"{median} {row['unit']} ({least} to {most})"


@dataclass
class Run:
    """What the measurements of one model share."""

    figures: Figures
    args: argparse.Namespace
    rounds: int
    programs: list
    size: str
    hparams: dict
    model_dir: Path

    def ids(self, n, seed=0):
        """Random ids, without <|endoftext|>."""
        rng = np.random.default_rng(seed)
        return rng.integers(0, self.hparams["n_vocab"] - 1, n).tolist()

    def n_long(self):
        """The length of a long prompt: 1000 of 1024."""
        return self.hparams["n_ctx"] - 24

    def add(self, what, unit, values_of):
        """Add the values of each program, {program: values}."""
        factor = 1000 if unit == "ms" else 1
        for program, values in values_of.items():
            values = [factor * value for value in values]
            self.figures.add(f"{self.size}: {what}", program, unit, values)


def tasks_of(run):
    """{label: what}, the rows of the README."""
    labels = [
        "one more token",
        f"a prompt of {run.n_long()} tokens",
        f"the whole command, {N_TOKENS} tokens",
        "memory of the command",
        SHORT_TEXTS,
    ]
    return {label: f"{run.size}: {label}" for label in labels}


def measure_tokens(run, some):
    """Single tokens, early and late, beside the products alone."""
    prompt = run.ids(run.n_long())
    token = in_turns(some, run.rounds, "time_step", prompt[:10], 20)
    floor = in_turns({"floor": some["npGPT"]}, run.rounds, "time_products", 20)["floor"]
    late = in_turns(some, run.rounds, "time_step", prompt, 20)
    run.add("one more token", "ms", token | {"floor": floor})
    shapes = run.hparams | {"n_vocab": 1, "n_ctx": 1}
    n_params = sum(array.size for array in random_variables(shapes).values())
    n_params += (run.hparams["n_vocab"] + run.hparams["n_ctx"] - 2) * run.hparams["n_embd"]
    n_cached = 2 * run.hparams["n_layer"] * run.hparams["n_embd"] * (run.n_long() + 10)
    late["floor, and the cache at its speed"] = [
        seconds * (1 + n_cached / n_params) for seconds in floor
    ]
    run.add(f"one more token after {run.n_long()} tokens", "ms", late)


def measure_prompts(run, some):
    """Prompts, and 16 samples at once."""
    prompt = run.ids(run.n_long())
    seconds = in_turns(some, run.rounds, "time_prompt", prompt)
    run.add(f"a prompt of {len(prompt)} tokens", "ms", seconds)
    samples = in_turns({"npGPT": some["npGPT"]}, run.rounds, "time_samples", 16, 10)
    run.add("a token, for 16 samples at once", "ms", samples)


def measure_picogpt(run):
    """picoGPT is slow, and without a cache a late token takes as long as a prompt."""
    prompt = run.ids(run.n_long())
    with workers(["picoGPT"], run) as some:
        run.add("one more token", "ms", in_turns(some, 2, "time_step", prompt[:10], 3))
        seconds = [some["picoGPT"].ask("time_prompt", prompt) for _ in range(2)]
        run.add(f"a prompt of {len(prompt)} tokens", "ms", {"picoGPT": seconds})


# A process that only computes, as long as its parent lives
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def neighbours(n):
    """n processes that only compute."""
    processes = []
    try:
        for _ in range(n):
            processes.append(subprocess.Popen([sys.executable, "-c", SPIN]))
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure_beside_neighbours(run, some):
    """A short and a long prompt and a token, beside processes that keep the cores busy."""
    prompt = run.ids(run.n_long())
    with workers([COMMAND], run) as one:
        all_programs = some | one
        in_turns(all_programs, 0, "time_prompt", prompt)  # warms them up
        for n in (0, 1) if run.args.quick else N_NEIGHBOURS:
            with neighbours(n):
                what = f"beside {n} busy processes"
                for n_ids in (min(100, len(prompt) - 1), len(prompt)):
                    request = ["time_prompt", prompt[:n_ids]]
                    seconds = in_turns(all_programs, run.rounds, *request, is_warm=True)
                    run.add(f"{what}, a prompt of {n_ids} tokens", "ms", seconds)
                request = ["time_step", prompt[:10], 10]
                seconds = in_turns(all_programs, run.rounds, *request, is_warm=True)
                run.add(f"{what}, one more token", "ms", seconds)


def measure_commands(run):
    usages = {program: [] for program in run.programs}
    for n_round in range(run.rounds + 1):
        for program in run.programs:
            if program == "picoGPT" and n_round > 1:
                continue  # it is slow
            usage = run_command(command_of(program, run), run.args.threads)
            if n_round > 0:
                usages[program].append(usage)
    seconds = {program: [usage.seconds for usage in usages[program]] for program in usages}
    memory = {program: [usage.megabytes for usage in usages[program]] for program in usages}
    run.add(f"the whole command, {N_TOKENS} tokens", "s", seconds)
    run.add("memory of the command", "MB", memory | checkpoint_size(run))


def checkpoint_size(run):
    data = run.model_dir / "model.ckpt.data-00000-of-00001"
    return {"size of the checkpoint": [data.stat().st_size / 1e6]}


def measure_scoring(run, folder):
    """Tokens per second that are scored, and the peak memory of doing so."""
    n_ctx = run.hparams["n_ctx"]
    lengths = np.random.default_rng(0).integers(20, min(300, n_ctx) + 1, 16)
    short_texts = [run.ids(int(n), seed=i) for i, n in enumerate(lengths)]
    programs = [program for program in SCORERS if program in run.programs]
    with workers(programs, run) as some:
        measure_texts(run, some, SHORT_TEXTS, short_texts)
    with workers(programs, run) as some:
        measure_texts(run, some, f"scoring a text of {n_ctx} tokens", [run.ids(n_ctx)])
        measure_corpus(run, some, folder)


def measure_texts(run, some, what, texts):
    """One text after the other."""
    n_tokens = sum(map(len, texts))
    seconds = in_turns(some, run.rounds, "time_scores", texts)
    memory = {program: [worker.ask("memory")] for program, worker in some.items()}
    speeds = {program: [n_tokens / value for value in seconds[program]] for program in seconds}
    run.add(what, "tokens/s", speeds)
    run.add(f"memory of {what}", "MB", memory | checkpoint_size(run))


def measure_corpus(run, some, folder):
    """The command examples/score.py, beside transformers with its best size of batches."""
    paragraphs = held_out_text().split("\n\n")[: 5 if run.args.quick else N_PARAGRAPHS]
    texts = some["npGPT"].ask("encode", paragraphs)
    n_tokens = sum(map(len, texts))
    texts = [[run.hparams["n_vocab"] - 1, *ids] for ids in texts]  # <|endoftext|> goes first
    seconds = [score_with_npgpt(run, folder, paragraphs) for _ in range(run.rounds)]
    speeds = {"npGPT": [n_tokens / value for value in seconds]}
    if "transformers" in some:
        ask = some["transformers"].ask
        first = {n: ask("time_corpus", texts, n) for n in (4, 8, 16)}
        best = min(first, key=first.get)
        seconds = [ask("time_corpus", texts, best) for _ in range(run.rounds)]
        speeds[f"transformers, {best} at once"] = [n_tokens / value for value in seconds]
    run.add(f"scoring {len(texts)} paragraphs", "tokens/s", speeds)


def score_with_npgpt(run, folder, paragraphs):
    """The time of the command examples/score.py."""
    source = folder / "corpus.jsonl"
    lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs]
    source.write_text("".join(lines), encoding="utf-8")
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "examples.score", str(source)]
        command += ["--output", f"{target}/scores.jsonl", "--model_size", run.model_dir.name]
        command += ["--models_dir", str(run.model_dir.parent)]
        return run_command(command, run.args.threads).seconds


# What prepares a load, and what is timed: {what: {program: its statements}}
LOADS = {
    "encoder.json and vocab.bpe": {
        "npGPT": ["import encoder", "encoder.get_encoder(name, folder)"],
    },
    "parameters that were loaded before": {
        "npGPT": [
            "import json, utils; hparams = json.load(open(f'{folder}/{name}/hparams.json'))",
            "utils.load_gpt2_params_from_tf_ckpt(f'{folder}/{name}/model.ckpt', hparams)",
        ],
    },
    "a Hugging Face folder": {
        "npGPT": [
            "import utils; folder = f'{folder}/{name}'",
            "utils.load_encoder_hparams_and_params('transformers', folder)",
        ],
        "transformers": [
            "import transformers as t; folder = f'{folder}/{name}/transformers'",
            "t.GPT2Tokenizer.from_pretrained(folder), t.GPT2LMHeadModel.from_pretrained(folder)",
        ],
    },
}
TIMED = """
import sys, time
folder, name = sys.argv[1:]
{}
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""


def measure_loading(run):
    for what, programs in LOADS.items():
        if what == "a Hugging Face folder" and "transformers" not in run.programs:
            continue  # transformers writes it
        for program, statements in programs.items():
            command = [sys.executable, "-c", TIMED.format(*statements)]
            command += [str(run.model_dir.parent), run.model_dir.name]
            outputs = [subprocess.check_output(command, cwd=ROOT) for _ in range(run.rounds)]
            run.add(f"loading {what}", "ms", {program: list(map(float, outputs))})


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
    path = f"{folder}/{name}"
    ranks = data_gym_to_mergeable_bpe_ranks(f"{path}/vocab.bpe", f"{path}/encoder.json")
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


def measure_encoder(run, folder):
    """Encode prose (Shakespeare) and code (the modules of this Python), and decode."""
    write_vocabulary(folder / "gpt2", gpt2_merges())
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    code = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in modules)
    for kind, text in {"prose": held_out_text(), "code": code}.items():
        path = folder / f"{kind}.txt"
        path.write_text(text[:20_000] if run.args.quick else text, encoding="utf-8")
        tasks = {f"encoding {kind}, first time": "MB/s", f"encoding {kind} again": "MB/s"}
        if kind == "code":
            tasks["decoding"] = "million ids/s"
        results = encoder_speeds(run, folder, path)
        for i, (what, unit) in enumerate(tasks.items()):
            for program, rows in results.items():
                run.figures.add(what, program, unit, [row[i] for row in rows])


def encoder_speeds(run, folder, path):
    """{program: for each round [first time, again, decoding]}."""
    results = {"npGPT": []}
    if is_installed("tiktoken"):
        results["tiktoken"] = []
    for _ in range(run.rounds):
        for program, rows in results.items():
            arguments = [program, str(folder), "gpt2", str(path), GPT2_PATTERN]
            command = [sys.executable, "-c", ENCODE, *arguments]
            words = subprocess.check_output(command, cwd=ROOT).split()
            rows.append(list(map(float, words)))
    return results


# The report


def machine(threads):
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        if names:
            model = f"{names[0]}, {len(names)} cores"
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
    """Bars grouped by task, one color per program. Shorter is better: speeds are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for label, what in list(tasks.items()):
        if figures.find(what, "npGPT")["unit"].endswith("/s"):
            del tasks[label]
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
    add = parser.add_argument
    add("--model_dir", type=Path, help="a 124M checkpoint (default: a random one is made)")
    add("--sizes", default="", help="also measure npGPT with random models of these sizes")
    add("--picogpt", type=Path, help="a checkout of picoGPT, to measure it, too (takes minutes)")
    add("--rounds", type=int, default=5, help="how often each program is measured (default 5)")
    add("--threads", type=int, default=2, help="threads of each program (default 2)")
    add("--quick", action="store_true", help="a tiny model and one round")
    add("--json", type=Path, help="store the figures, the versions and the machine here")
    add("--plot", type=Path, help="draw the chart here (needs matplotlib)")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sizes = list(filter(None, args.sizes.split(",")))
    if args.picogpt and not (args.picogpt / "gpt2.py").is_file():
        address = "https://github.com/jaymody/picoGPT"
        parser.error(f"{args.picogpt} is not a checkout of picoGPT: git clone {address}")
    return args


def installed_programs(args):
    for program, (packages, _) in PACKAGES.items():
        if not is_installed(program):
            print(f"{program} is not installed (pip install {packages})", file=sys.stderr)
    programs = ["npGPT", "llama.cpp", "transformers"]
    programs = [name for name in programs if name == "npGPT" or is_installed(name)]
    if args.picogpt:
        programs.append("picoGPT")
    return programs


def first_run(args, folder):
    """The model that all programs are measured with, in their formats."""
    programs = installed_programs(args)
    size = "quick" if args.quick else "124M"
    hparams = QUICK if args.quick else SIZES[size]
    if args.model_dir:
        size = args.model_dir.resolve().name
        hparams = json.loads((args.model_dir / "hparams.json").read_text())
    model_dir = in_new_process(prepare, folder, size, hparams, args.model_dir, programs)
    rounds = 1 if args.quick else args.rounds
    return Run(Figures(), args, rounds, programs, size, hparams, model_dir)


def measure(run, folder):
    with workers([program for program in run.programs if program != "picoGPT"], run) as some:
        measure_tokens(run, some)
        measure_prompts(run, some)
        measure_beside_neighbours(run, some)
    if "picoGPT" in run.programs:
        measure_picogpt(run)
    measure_commands(run)
    measure_scoring(run, folder)
    measure_loading(run)
    measure_encoder(run, folder)


def measure_size(first, size, folder):
    """Measure npGPT alone with a random model of this size."""
    model_dir = in_new_process(prepare, folder, size, SIZES[size], None, ["npGPT"])
    rounds = min(first.rounds, 3)
    run = Run(first.figures, first.args, rounds, ["npGPT"], size, SIZES[size], model_dir)
    with workers(["npGPT"], run) as some:
        measure_tokens(run, some)
    run.rounds = 1
    measure_commands(run)
    for path in model_dir.iterdir():
        path.unlink()


def report(run):
    args = run.args
    about = machine(args.threads)
    versions = [f"{name} {version}" for name, version in about["versions"].items() if version]
    processor = about["processor"]
    tasks = tasks_of(run)
    print(f"{processor}, {args.threads} threads; {', '.join(versions)}\n")
    print(run.figures.short_table(tasks, run.programs, processor))
    print()
    print(run.figures.full_table(processor))
    if args.json:
        args.json.write_text(json.dumps(about | {"figures": run.figures.rows}, indent=1) + "\n")
    if args.plot:
        plot(run.figures, tasks, run.programs, args.plot)


def main():
    args = parse_arguments()
    sys.path.insert(0, str(ROOT))
    if args.worker:
        return work(*args.worker, args.threads, args.picogpt)
    os.environ |= thread_variables(args.threads)  # before the workers import NumPy
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = first_run(args, folder)
        measure(run, folder)
        for size in args.sizes:
            measure_size(run, size, folder)
    report(run)


if __name__ == "__main__":
    main()
