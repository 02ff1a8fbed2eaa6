"""python tests/benchmark.py [OPTIONS]

Measure npGPT beside the programs that people would use instead, on one random model of 124M's
shape. BENCHMARK.md says what the rows mean and what to install. Programs that are not installed are
left out.

--only NAME      only one part: idle, busy, starts, commands or steps. It may be repeated
--rounds 5       how often each program is measured
--threads 2      threads of each program
--models FOLDER  keep the model here, and use it again in the next run
--output FOLDER  write benchmark.json and benchmark.png (with matplotlib) here, and the tables into
                 BENCHMARK.md
--quick          with a tiny model and only one busy process, to see that everything works
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers import (
    ROOT,
    SMALL_MERGES,
    gpt2_merges,
    held_out_text,
    load,
    random_variables,
    tiktoken_encoding,
    write_model,
)

GPT2 = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
QUICK = {"n_vocab": 269, "n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 2}
PROMPT = "Alan Turing theorized that computers would one day become"
N_TOKENS = 40  # of a whole command
N_LIKELIEST = 20  # ids that all programs must agree on
N_TIMED = 40  # tokens, or as many as come in
LONGEST = 5.0  # seconds
PAUSE = 0.3  # seconds. The threads of BLAS and OpenMP spin for a while after their work
HUGE = 10**12
BEGIN = "<!-- written by benchmark.py -->"
END = "<!-- end -->"


# The programs. load() reads model and vocabulary. stream(ids, n) yields the n likeliest next ids.
# score(ids) computes how likely a text is. encode and decode are those of the vocabulary.


class NpGPT:
    def load(self, model_dir, threads, n_ctx):
        import fast
        import gpt2
        import utils

        self.log_probs = gpt2.log_probs
        self.ids_after = gpt2.stream
        if "blocks" in self.off:
            fast.BLOCK = HUGE
            gpt2.ROWS = HUGE
        if "threads" in self.off:
            fast.PROMPT_ROWS = HUGE
        encoder, hparams, self.params = load(model_dir)
        if "mapping" in self.off:
            variables = utils.read_with_tensorflow(str(model_dir / "model.ckpt"), hparams, {})
            self.params = utils.nest(variables, hparams)
        self.encode = encoder.encode
        self.n_head = hparams["n_head"]

    def stream(self, ids, n):
        return self.ids_after(ids, self.params, self.n_head, n)

    def score(self, ids):
        self.log_probs(ids, self.params, self.n_head)


class WithoutCache(NpGPT):
    def stream(self, ids, n):
        import gpt2
        import gpt2_pico

        model = gpt2_pico.gpt2 if "float32" in self.off else gpt2.gpt2
        ids = list(ids)
        for _ in range(n):
            logits = model(ids, **self.params, n_head=self.n_head)
            ids.append(int(np.argmax(logits[-1])))
            yield ids[-1]


class CTranslate2:
    def load(self, model_dir, threads, n_ctx):
        import ctranslate2
        import tokenizers

        files = (str(model_dir / name) for name in ("encoder.json", "vocab.bpe"))
        self.tokenizer = tokenizers.ByteLevelBPETokenizer(*files)
        folder = str(model_dir / "ctranslate2")
        self.model = ctranslate2.Generator(folder, intra_threads=threads)

    def tokens(self, ids):
        return [self.tokenizer.id_to_token(i) for i in ids]

    def stream(self, ids, n):
        lengths = {"min_length": n, "max_length": n}
        for result in self.model.generate_tokens(self.tokens(ids), **lengths):
            yield result.token_id

    def score(self, ids):
        self.model.score_batch([self.tokens(ids)])

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class LlamaCpp:
    def load(self, model_dir, threads, n_ctx):
        import llama_cpp

        options = {"n_ctx": n_ctx, "n_threads": threads, "n_threads_batch": threads}
        path = str(model_dir / "model.gguf")
        self.model = llama_cpp.Llama(path, verbose=False, **options)

    def stream(self, ids, n):
        self.model.reset()
        return itertools.islice(self.model.generate(ids, temp=0.0), n)

    def encode(self, text):
        return self.model.tokenize(text.encode(), add_bos=False)

    def decode(self, ids):
        return self.model.detokenize(ids).decode("utf-8", "replace")


class Transformers:
    def load(self, model_dir, threads, n_ctx):
        import torch
        from transformers import GPT2LMHeadModel, GPT2Tokenizer

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.tensor = torch.tensor
        tokenizer = GPT2Tokenizer.from_pretrained(model_dir / "transformers")
        self.encode = tokenizer.encode
        self.decode = tokenizer.decode
        self.model = GPT2LMHeadModel.from_pretrained(model_dir / "transformers")

    def stream(self, ids, n):
        ids = self.tensor([ids])
        past = None
        for _ in range(n):
            output = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            yield ids.item()

    def score(self, ids):
        ids = self.tensor([ids])
        self.model(ids, labels=ids, use_cache=False).loss.item()


class Tiktoken:
    def load(self, model_dir, threads, n_ctx):
        self.encode = tiktoken_encoding(model_dir.parent, model_dir.name).encode_ordinary


class Program(NamedTuple):
    engine: type
    packages: tuple = ()  # without which it is left out
    off: tuple = ()
    script: str = ""  # of this project, for the whole command


OURS = "npGPT"
PICO = "gpt2_pico.py"
STEPS = {  # from gpt2_pico.py to npGPT: what is added, and the functions that it consists of
    "float32": "",
    "cache": "gpt2.KVCache gpt2.check_cache",
    "mapping": "utils.map_data_file utils.data_files utils.last_change utils.is_known",
    "blocks": "fast.in_blocks fast.for_blocks gpt2.causal_attention",
    "threads": "fast.matmul fast.own_threads fast.waiting_clock fast.ThisThread fast.ask_helpers "
    "fast.serve fast.blas_threads fast.blas fast.forget_threads",
}
PROGRAMS = {
    OURS: Program(NpGPT, script="gpt2.py"),
    "CTranslate2": Program(CTranslate2, ("ctranslate2", "tokenizers", "torch", "transformers")),
    "llama.cpp": Program(LlamaCpp, ("llama-cpp-python", "gguf")),
    "transformers": Program(Transformers, ("torch", "transformers")),
    "tiktoken": Program(Tiktoken, ("tiktoken",)),
    PICO: Program(WithoutCache, off=tuple(STEPS), script=PICO),
}
for n_on, step in enumerate(STEPS, 1):
    PROGRAMS[step] = Program(NpGPT if n_on > 1 else WithoutCache, off=tuple(STEPS)[n_on:])


# What is measured, in the process of a program. All but likeliest return seconds, MB, or MB/s.


def some_ids(n):
    return np.random.default_rng(0).integers(0, 256, n).tolist()


def likeliest(engine, n_ids):
    return list(engine.stream(some_ids(n_ids), N_LIKELIEST))


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def prompt(engine, n_ids):
    return seconds(next, engine.stream(some_ids(n_ids), 1))


def token(engine, n_ids):
    """The mean time of a token after n_ids others."""
    times = []
    for _ in engine.stream(some_ids(n_ids), N_TIMED + 1):
        times.append(time.perf_counter())
        if len(times) > 1 and times[-1] - times[0] > LONGEST:
            break
    return (times[-1] - times[0]) / (len(times) - 1)


def scoring(engine, n_ids):
    return seconds(engine.score, some_ids(n_ids))


def memory_of_scoring(engine, n_ids):
    import resource

    engine.score(some_ids(n_ids))
    return megabytes(resource.getrusage(resource.RUSAGE_SELF))


def megabytes(usage):
    """The peak memory, with the parts of mapped files that were read."""
    return usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e6


def first_loading(engine, _):
    """The time of the imports, too."""
    return engine.loading


def second_loading(engine, _):
    return seconds(engine.load, *engine.options)


def first_encoding(engine, text_of):
    text = text_of()
    return len(text.encode()) / 1e6 / seconds(engine.encode, text)


def second_encoding(engine, text_of):
    engine.encode(text_of())
    return first_encoding(engine, text_of)


def python_modules():
    """A megabyte of code."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return "".join(texts)[:1_000_000]


class Usage(NamedTuple):
    seconds: float
    megabytes: float


class Row(NamedTuple):
    """One line of a table. The programs that take part compute function(engine, argument)."""

    what: str
    unit: str
    programs: tuple
    function: Callable | None = None
    argument: Any = None


PEERS = ("CTranslate2", "llama.cpp", "transformers")
MODELS = (OURS, *PEERS, PICO)
SCORERS = (OURS, "CTranslate2", "transformers")
ENCODERS = (OURS, "tiktoken")
LADDER = (PICO, *STEPS)
LIKELIEST = Row(f"likeliest ids like npGPT's, of {N_LIKELIEST}", "ids", MODELS, likeliest, 10)
TIMES = (
    Row("a prompt of 100 tokens", "ms", MODELS + LADDER, prompt, 100),
    Row("a prompt of 1000 tokens", "ms", MODELS + LADDER, prompt, 1000),
    Row("a token after 10 tokens", "ms", MODELS + LADDER, token, 10),
    Row("a token after 960 tokens", "ms", MODELS + LADDER, token, 960),
    Row("scoring 1000 tokens", "ms", SCORERS, scoring, 1000),
)
STARTS = (
    Row("importing and loading", "ms", (OURS, *PEERS, *LADDER), first_loading),
    Row("loading again", "ms", (OURS, *PEERS), second_loading),
    Row("peak memory of scoring 1000 tokens", "MB", SCORERS, memory_of_scoring, 1000),
    Row("encoding prose, first time", "MB/s", ENCODERS, first_encoding, held_out_text),
    Row("encoding prose again", "MB/s", ENCODERS, second_encoding, held_out_text),
    Row("encoding code, first time", "MB/s", ENCODERS, first_encoding, python_modules),
    Row("encoding code again", "MB/s", ENCODERS, second_encoding, python_modules),
)
WHOLE = (
    Row(f"the whole command, {N_TOKENS} tokens", "s", MODELS, argument="seconds"),
    Row("its peak memory", "MB", MODELS, argument="megabytes"),
)
LINES = Row("source code of the step", "lines", LADDER)
IDLE = "The library, idle"
BUSY = "The library, beside 2 busy processes that started before it"


# Processes


def start(name, *options):
    """Load the model with a program -> its engine."""
    started = PROGRAMS[name].engine()
    started.off = PROGRAMS[name].off
    started.options = options
    started.loading = seconds(started.load, *options)
    return started


def serve(*arguments):
    """Begin the process of a program."""
    global engine
    engine = start(*arguments)


def answer(row):
    return row.function(engine, row.argument)


def complete(name, model_dir, threads):
    """A whole command of another program: load the model, continue the prompt, print the text."""
    peer = start(name, Path(model_dir), threads, len(PROMPT) + N_TOKENS)
    ids = list(peer.stream(peer.encode(PROMPT), N_TOKENS))
    print(peer.decode(ids))


SPAWN = multiprocessing.get_context("spawn")

# A process that only computes, as long as its parent lives
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(1_000_000))
"""


@contextlib.contextmanager
def busy_processes(n):
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def is_installed(name):
    return all(map(version, PROGRAMS[name].packages))


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The same model for all programs


def prepare(model_dir, hparams):
    """Make a random model in OpenAI's layout, and convert it for the programs that are there."""
    merges = SMALL_MERGES if hparams == QUICK else gpt2_merges()
    variables = random_variables(hparams)
    for name in variables:
        if name.endswith("/w"):
            variables[name] *= np.float32(0.2)  # larger ones amplify rounding in 12 layers
    write_model(model_dir, hparams, merges=merges, extra=variables)
    load(model_dir)  # the first load verifies it
    if is_installed("transformers"):
        convert_for_transformers(model_dir, hparams, variables)
    if is_installed("CTranslate2"):
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(str(model_dir / "transformers"))
        converter.convert(str(model_dir / "ctranslate2"))
    if is_installed("llama.cpp"):
        convert_for_llama_cpp(model_dir, hparams, variables)


def convert_for_transformers(model_dir, hparams, variables):
    from make_reference import torch_model

    folder = model_dir / "transformers"
    torch_model(hparams, variables).save_pretrained(folder)
    for name, new_name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / new_name).write_bytes((model_dir / name).read_bytes())


def convert_for_llama_cpp(model_dir, hparams, variables):
    import gguf
    from make_reference import their_name

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
    normal = [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    writer.add_token_types([*normal, gguf.TokenType.CONTROL])  # <|endoftext|> is the last one
    writer.add_token_merges((model_dir / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1])
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, hparams["n_layer"])
    for name, array in variables.items():
        array = np.ascontiguousarray(array[0].T) if array.ndim == 3 else array
        writer.add_tensor(names.get_name(their_name(name), (".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The measurements of one run


class Bench:
    def __init__(self, model_dir, rounds, threads, busy):
        self.model_dir = model_dir
        self.rounds = rounds
        self.threads = threads
        self.n_busy = busy
        self.tables = defaultdict(lambda: defaultdict(dict))  # {title: {what: {program: values}}}

    @contextlib.contextmanager
    def processes(self, names):
        """Start the processes of these programs -> a function ask(name, row)."""
        with contextlib.ExitStack() as stack:
            found = {}
            for name in filter(is_installed, names):
                arguments = (name, self.model_dir, self.threads, GPT2["n_ctx"])
                executor = ProcessPoolExecutor(1, SPAWN, serve, arguments)
                found[name] = stack.enter_context(executor)
                executor.submit(time.sleep, 0).result()  # loads the model
            yield lambda name, row: found[name].submit(answer, row).result()

    def ask_new(self, name, row):
        """Ask a new process of the program."""
        with self.processes([name]) as ask:
            return ask(name, row)

    def in_turns(self, title, rows, names, ask):
        """Measure each row, with the programs in turns. ask(name, row) returns a value."""
        for row in rows:
            values = {name: [] for name in names if name in row.programs and is_installed(name)}
            for _ in range(self.rounds + 1):
                for name in values:
                    time.sleep(PAUSE)
                    values[name].append(ask(name, row))
            for name in values:
                self.add(title, row, name, values[name][1:])  # without the first time

    def add(self, title, row, name, values):
        factor = 1000 if row.unit == "ms" else 1
        values = [factor * value for value in values]
        self.tables[title][f"{row.what}, {row.unit}"][name] = values
        print(f"{title}: {row.what}, {name}: {cell(values)} {row.unit}", file=sys.stderr)

    # The parts

    def idle(self):
        with self.processes(MODELS) as ask:
            expected = ask(OURS, LIKELIEST)

            def n_equal(name, row):
                return sum(map(int.__eq__, ask(name, row), expected))

            self.in_turns(IDLE, [LIKELIEST], MODELS, n_equal)
            self.in_turns(IDLE, TIMES, MODELS, ask)

    def busy(self):
        """Beside processes that keep the cores busy, and that start before or after the others."""
        names = (OURS, *PEERS)
        for n, order in itertools.product(self.n_busy, ("before", "after")):
            title = f"The library, beside {n} busy processes that started {order} it"
            with contextlib.ExitStack() as stack:
                if order == "before":
                    stack.enter_context(busy_processes(n))
                ask = stack.enter_context(self.processes(names))
                for name in filter(is_installed, names):
                    ask(name, LIKELIEST)  # starts the threads
                if order == "after":
                    stack.enter_context(busy_processes(n))
                self.in_turns(title, TIMES, names, ask)

    def starts(self):
        names = (OURS, *PEERS, "tiktoken")
        self.in_turns("The library, in a new process", STARTS, names, self.ask_new)

    def commands(self):
        def ask(name, row):
            return getattr(self.run_command(name), row.argument)

        title = "The command, and scripts that do the same"
        self.in_turns(title, WHOLE, MODELS, ask)

    def run_command(self, name):
        """Run a whole command, from the start of its process to its end."""
        folder = self.model_dir
        words = [PROMPT, str(N_TOKENS), folder.name, str(folder.parent)]
        command = [sys.executable, str(ROOT / PROGRAMS[name].script), *words]
        if not PROGRAMS[name].script:
            call = f"benchmark.complete({name!r}, {str(folder)!r}, {self.threads})"
            command = [sys.executable, "-c", f"import benchmark; {call}"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            duration = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise ValueError(f"the command of {name} failed: {command}")
        return Usage(duration, megabytes(usage))

    def steps(self):
        title = "From 70 lines to fast"
        for name in LADDER:
            self.add(title, LINES, name, [n_lines(name)])
        self.in_turns(title, STARTS[:1], LADDER, self.ask_new)
        with self.processes(LADDER) as ask:
            self.in_turns(title, TIMES, LADDER, ask)


def n_lines(step):
    """Lines of the functions that a step consists of, with their docstrings."""
    if step == PICO:
        return len((ROOT / PICO).read_text().splitlines())
    total = 0
    for name in STEPS[step].split():
        module, function = name.split(".")
        part = getattr(importlib.import_module(module), function)
        total += len(inspect.getsourcelines(part)[0])
    return total


# The report


def cell(values):
    """The median with minimum and maximum."""
    median, least, most = (
        f"{float(f'{value:.3g}'):,.10g}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return median if least == most else f"{median} ({least} to {most})"


def markdown(title, table):
    programs = [name for name in PROGRAMS if any(name in row for row in table.values())]
    lines = [f"| {title} | {' | '.join(programs)} |", "|---" * (len(programs) + 1) + "|"]
    for what, row in table.items():
        cells = [cell(row[name]) if name in row else "" for name in programs]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine(threads):
    """Where and with which versions the programs were measured."""
    info = Path("/proc/cpuinfo").read_text()
    packages = {"numpy"}.union(*(program.packages for program in PROGRAMS.values()))
    return {
        "processor": re.findall("model name.*: (.*)", info),
        "threads": threads,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in sorted(packages)},
    }


def plot(tables, path):
    """Draw the times, idle and beside busy processes: one bar for each program."""
    from matplotlib import pyplot

    titles = [title for title in (IDLE, BUSY) if title in tables]
    panels = list(itertools.product(TIMES, titles))
    picture = pyplot.figure(figsize=(14, 9), layout="constrained")
    picture.suptitle("Milliseconds (shorter is better). Left: idle. Right: beside 2 busy processes")
    for i, (row, title) in enumerate(panels, 1):
        values = tables[title][f"{row.what}, {row.unit}"]
        names = [name for name in values if name != PICO]
        axes = picture.add_subplot(len(TIMES), len(titles), i)
        bars = axes.barh(names, [statistics.median(values[name]) for name in names])
        axes.bar_label(bars, fmt="{:,.0f}", padding=2)
        axes.set_title(row.what, fontsize=10)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xticks([])
    picture.savefig(path)


def write(folder, bench, text):
    """Store the figures, the picture and the tables."""
    content = machine(bench.threads) | {"tables": bench.tables}
    (folder / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
    page = folder / "BENCHMARK.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    if version("matplotlib"):
        plot(bench.tables, folder / "benchmark.png")


def main(
    *,
    only: tuple[str, ...] = ("idle", "busy", "starts", "commands", "steps"),
    rounds: int = 5,
    threads: int = 2,
    models: str = "",
    output: str = "",
    quick: bool = False,
) -> Iterator[str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    os.environ |= dict.fromkeys(names, str(threads))  # before the processes import NumPy
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(models or folder).resolve() / ("quick" if quick else "124M")
        if not model_dir.exists():
            with ProcessPoolExecutor(1, SPAWN) as executor:
                executor.submit(prepare, model_dir, QUICK if quick else GPT2).result()
        bench = Bench(model_dir, rounds, threads, (1,) if quick else (2, 4, 6))
        for part in only:
            getattr(bench, part)()
    text = "\n".join(markdown(*item) for item in bench.tables.items())
    if output:
        write(Path(output), bench, text)
    yield text


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from terminal import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the other processes, too
    main.__doc__ = __doc__
    sys.exit(run(main, sys.argv[1:]))
