"""Train a small GPT-2 and its vocabulary on any UTF-8 text and save them in OpenAI's layout.

    python examples/train.py my.txt models/mine
    python gpt2.py "Once" --model_size mine

models/tiny was made this way, from tiny Shakespeare. `--help` lists the options.

The end of the text is held out: the model is not trained on it, and the weights that predict it
best are saved. To compute their loss from the saved files, cut the ids of the held-out text into
windows of n_ctx + 1 ids, each of which begins with the last id of the one before (the last window
may be shorter). Predict every id of a window but its first, and average -log p over all
predictions.
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's folder

import numpy as np

from encoder import BYTE_CHARS, WORD
from utils import (
    HPARAMS,
    MAX_SIZE,
    UsageError,
    complain,
    progress_bar,
    read_text,
    run_command,
)

# TensorFlow is imported inside the functions that use it: the import takes seconds and prints
# lines, so --help and errors in the arguments come before it.

PROGRAM = "train.py"
LARGEST_SEED = 2**32 - 1  # TensorFlow takes no larger one
END = "<|endoftext|>"

Symbols = list[str]  # a word in pieces, each byte written as one character
Pair = tuple[str, str]
Hparams = dict[str, int]  # {name in HPARAMS: number}
Weights = dict[str, Any]  # {name in the checkpoint: array or variable}


# The vocabulary


def byte_symbols(word: str) -> Symbols:
    """Write each byte of a word as one character, as encoder.py does."""
    return [BYTE_CHARS[byte] for byte in word.encode("utf-8")]


def merge(symbols: Symbols, pair: Pair) -> Symbols:
    """Join the pair wherever it occurs.

    >>> merge(["h", "e", "h", "e", "h", "h"], ("h", "e"))
    ['he', 'he', 'h', 'h']
    """
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


class PairCounts:
    """How often each pair of adjacent symbols occurs in a text, and in which words."""

    def __init__(self, text: str):
        self.words = Counter(WORD.findall(text))
        self.splits = {word: byte_symbols(word) for word in self.words}
        self.counts = Counter()
        self.words_with = defaultdict(set)
        for word, count in self.words.items():
            self.add(word, count)

    def add(self, word: str, count: int) -> None:
        for pair in itertools.pairwise(self.splits[word]):
            self.counts[pair] += count
            self.words_with[pair].add(word)

    def most_frequent(self) -> Pair | None:
        """Return the most frequent pair that occurs at least twice, or None.

        Among equal counts it is the smallest, so that a text always gives the same vocabulary.
        """
        highest = max(self.counts.values(), default=0)
        if highest < 2:
            return None
        counts = self.counts
        return min(pair for pair in counts if counts[pair] == highest)

    def merge(self, pair: Pair) -> None:
        for word in self.words_with.pop(pair):
            count = self.words[word]
            self.add(word, -count)
            self.splits[word] = merge(self.splits[word], pair)
            self.add(word, count)


def train_bpe(text: str, n_merges: int) -> list[Pair]:
    """Find the merges: each is the most frequent pair after those before it.

    This is byte-pair encoding (Sennrich et al., 2016). Raises ValueError if no pair is left that
    occurs twice.
    """
    pairs = PairCounts(text)
    merges = []
    while len(merges) < n_merges:
        pair = pairs.most_frequent()
        if pair is None:
            limit = len(merges) + 257
            raise ValueError(
                f"the text is too small for this vocabulary: --n_vocab can be at most {limit}"
            )
        merges.append(pair)
        pairs.merge(pair)
    return merges


class Tokenizer:
    """Byte-level BPE with BPE-dropout, which encoder.py does not have."""

    def __init__(self, merges: list[Pair]):
        merged = ["".join(pair) for pair in merges]
        self.tokens = [*sorted(BYTE_CHARS), *merged, END]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}

    def split(self, word: str, skip: float) -> list[int]:
        """Return the ids of one word.

        skip: the probability of leaving out a merge (BPE-dropout, Provilkov et al., 2020).
        """
        symbols = byte_symbols(word)
        while pairs := self.mergeable(symbols, skip):
            first = min(pairs, key=self.ranks.__getitem__)
            symbols = merge(symbols, first)
        return [self.ids[symbol] for symbol in symbols]

    def mergeable(self, symbols: Symbols, skip: float) -> list[Pair]:
        pairs = []
        for pair in itertools.pairwise(symbols):
            if pair in self.ranks and random.random() >= skip:
                pairs.append(pair)
        return pairs

    def encode(self, text: str, skip: float = 0.0) -> np.ndarray:
        """Return the ids of a text, int32 [n]. With skip, each occurrence of a word is split anew.

        So the model sees several splits of a frequent word in each pass over the text.
        """
        ids = []
        known = {}
        for word in WORD.findall(text):
            if skip or word not in known:
                known[word] = self.split(word, skip)
            ids += known[word]
        return np.array(ids, np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        symbols = "".join(self.tokens[i] for i in ids)
        return bytes(BYTE_CHARS.index(symbol) for symbol in symbols)


# The model in TensorFlow. Shapes: B windows in a batch, T tokens in each, C = n_embd, H = n_head,
# D = C / H, V = n_vocab.


def initial_weights(hparams: Hparams, rng: np.random.Generator) -> Weights:
    """Draw the weights as the GPT-2 paper says -> {name: float32 array}.

    The more layers, the smaller are the projections that add to the residual stream.
    """
    n_embd = hparams["n_embd"]
    n_layer = hparams["n_layer"]
    residual_std = 0.02 / math.sqrt(2 * n_layer)
    weights = {}

    def draw(name, shape, std):
        values = rng.normal(0, std, shape)
        weights[name] = values.astype(np.float32)

    def add_projection(name, n_in, n_out, std):
        draw(f"{name}/w", [1, n_in, n_out], std)
        weights[f"{name}/b"] = np.zeros(n_out, np.float32)

    def add_norm(name):
        weights[f"{name}/g"] = np.ones(n_embd, np.float32)
        weights[f"{name}/b"] = np.zeros(n_embd, np.float32)

    draw("model/wte", [hparams["n_vocab"], n_embd], 0.02)
    draw("model/wpe", [hparams["n_ctx"], n_embd], 0.01)
    for layer in range(n_layer):
        block = f"model/h{layer}"
        add_norm(f"{block}/ln_1")
        add_projection(f"{block}/attn/c_attn", n_embd, 3 * n_embd, 0.02)
        add_projection(f"{block}/attn/c_proj", n_embd, n_embd, residual_std)
        add_norm(f"{block}/ln_2")
        add_projection(f"{block}/mlp/c_fc", n_embd, 4 * n_embd, 0.02)
        add_projection(f"{block}/mlp/c_proj", 4 * n_embd, n_embd, residual_std)
    add_norm("model/ln_f")
    return weights


def gelu(x):
    import tensorflow as tf

    inner = x + 0.044715 * x * x * x
    scale = math.sqrt(2 / math.pi)
    return 0.5 * x * (1 + tf.tanh(scale * inner))


def dropout(x, rate: float):
    import tensorflow as tf

    if rate == 0:
        return x
    return tf.nn.dropout(x, rate)


def layer_norm(x, weights: Weights, name: str):
    import tensorflow as tf

    g = weights[f"{name}/g"]
    b = weights[f"{name}/b"]
    x = x - tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(x * x, -1, keepdims=True)
    return x * tf.math.rsqrt(variance + 1e-5) * g + b


def linear(x, weights: Weights, name: str):
    import tensorflow as tf

    w = weights[f"{name}/w"][0]
    b = weights[f"{name}/b"]
    return tf.tensordot(x, w, 1) + b


def attention(x, weights: Weights, name: str, n_head: int):
    """Causal multi-head self-attention: [B, T, C] -> [B, T, C]."""
    import tensorflow as tf

    B, T, C = x.shape
    D = C // n_head
    qkv = linear(x, weights, f"{name}/c_attn")  # [B, T, 3 * C]
    qkv = tf.reshape(qkv, [B, T, 3, n_head, D])
    qkv = tf.transpose(qkv, [2, 0, 3, 1, 4])
    q, k, v = tf.unstack(qkv)  # [B, H, T, D] each
    mask = np.full([T, T], -1e10, np.float32)
    mask = np.triu(mask, 1)
    scores = tf.matmul(q, k, transpose_b=True) / math.sqrt(D)
    x = tf.nn.softmax(scores + mask) @ v  # [B, H, T, D]
    x = tf.transpose(x, [0, 2, 1, 3])  # [B, T, H, D]
    x = tf.reshape(x, [B, T, C])
    return linear(x, weights, f"{name}/c_proj")


def mlp(x, weights: Weights, name: str):
    hidden = linear(x, weights, f"{name}/c_fc")
    return linear(gelu(hidden), weights, f"{name}/c_proj")


def gpt2(ids, weights: Weights, hparams: Hparams, drop: float = 0.0):
    """Predict the next id at each position: ids [B, T] -> logits [B, T, V].

    drop: the rate of dropout.
    """
    import tensorflow as tf

    wte = weights["model/wte"]
    wpe = weights["model/wpe"]
    n_head = hparams["n_head"]
    T = ids.shape[1]
    x = tf.gather(wte, ids) + wpe[:T]  # [B, T, C]
    x = dropout(x, drop)
    for layer in range(hparams["n_layer"]):
        block = f"model/h{layer}"
        y = layer_norm(x, weights, f"{block}/ln_1")
        y = attention(y, weights, f"{block}/attn", n_head)
        x = x + dropout(y, drop)
        y = layer_norm(x, weights, f"{block}/ln_2")
        y = mlp(y, weights, f"{block}/mlp")
        x = x + dropout(y, drop)
    x = layer_norm(x, weights, "model/ln_f")
    return tf.tensordot(x, tf.transpose(wte), 1)


def summed_loss(windows, weights: Weights, hparams: Hparams, drop: float = 0.0):
    """Sum -log p, in nats, of all ids in windows [B, T + 1] but the first of each window."""
    import tensorflow as tf

    inputs = windows[:, :-1]
    targets = windows[:, 1:]
    logits = gpt2(inputs, weights, hparams, drop)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_sum(losses)


# Training


def random_windows(
    text: str,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Yield windows of ids [n_ctx + 1] without end.

    Each pass over the text splits the words and places the windows anew.
    """
    n_ctx = options.n_ctx
    while True:
        ids = tokenizer.encode(text, options.bpe_dropout)
        last = len(ids) - n_ctx
        first = rng.integers(min(n_ctx, last))
        starts = np.arange(first, last, n_ctx)
        for start in rng.permutation(starts):
            yield ids[start : start + n_ctx + 1]


def as_variables(weights: Weights) -> Weights:
    import tensorflow as tf

    return {name: tf.Variable(weights[name]) for name in weights}


class Trainer:
    """The weights of a model, their average over time, and the state of the optimizer.

    The optimizer is AdamW (Loshchilov & Hutter, 2019). The average over about the last 100 steps
    predicts better than the weights of any single step.
    """

    def __init__(self, options: argparse.Namespace, rng: np.random.Generator):
        import tensorflow as tf

        self.options = options
        self.hparams = hparams_of(options)
        start = initial_weights(self.hparams, rng)
        zeros = {name: 0 * start[name] for name in start}
        self.weights = as_variables(start)
        self.average = as_variables(start)
        self.mean = as_variables(zeros)
        self.square = as_variables(zeros)
        # A compiled step takes a quarter less time, but compiling takes as long as many steps.
        is_long = options.steps >= 100
        self.compiled_step = tf.function(self.step, jit_compile=is_long)
        self.compiled_loss = tf.function(self.loss_of_average)

    def train_on(self, windows: list[np.ndarray], number: int) -> float:
        """Do one step -> the loss of its windows [n_ctx + 1], in nats per id."""
        import tensorflow as tf

        batch = tf.constant(np.stack(windows))
        step = tf.constant(number, tf.float32)
        return float(self.compiled_step(batch, step))

    def step(self, windows, number):
        """Train on windows [B, T + 1] -> their mean loss. number: 1 for the first step."""
        import tensorflow as tf

        options = self.options
        n_predictions = options.batch * options.n_ctx
        with tf.GradientTape() as tape:
            loss = summed_loss(windows, self.weights, self.hparams, options.dropout)
            loss = loss / n_predictions
        weights = list(self.weights.values())
        gradients = tape.gradient(loss, weights)
        gradients, _ = tf.clip_by_global_norm(gradients, 1.0)
        rate = self.learning_rate(number)
        for name, gradient in zip(self.weights, gradients, strict=True):
            self.update(name, gradient, rate, number)
        return loss

    def learning_rate(self, number):
        """The rate rises during the first twentieth of the steps, then falls like a cosine."""
        import tensorflow as tf

        steps = self.options.steps
        rise = number / (steps / 20)
        fall = 0.5 + 0.5 * tf.cos(math.pi * number / steps)
        return self.options.learning_rate * tf.minimum(rise, fall)

    def update(self, name: str, gradient, rate, number) -> None:
        import tensorflow as tf

        weight = self.weights[name]
        mean = self.mean[name]
        square = self.square[name]
        average = self.average[name]
        mean.assign(0.9 * mean + 0.1 * gradient)
        square.assign(0.99 * square + 0.01 * gradient * gradient)
        scale = tf.sqrt(square / (1 - 0.99**number))
        update = mean / (1 - 0.9**number) / (scale + 1e-8)
        if weight.shape.rank > 1:  # only matrices decay
            update = update + self.options.weight_decay * weight
        weight.assign_sub(rate * update)
        share = tf.maximum(0.01, 1 / number)
        average.assign_add((weight - average) * share)

    def loss_of_average(self, window):
        return summed_loss(window, self.average, self.hparams)

    def held_out_loss(self, ids: np.ndarray) -> float:
        """Return the loss of the average weights in nats per id, as the top of this file says."""
        import tensorflow as tf

        n_ctx = self.options.n_ctx
        total = 0.0
        for start in range(0, len(ids) - 1, n_ctx):
            window = ids[start : start + n_ctx + 1]
            loss = self.compiled_loss(tf.constant([window]))
            total += float(loss)
        return total / (len(ids) - 1)


class Best:
    """The weights with the lowest held-out loss so far, and the folder that they are saved in."""

    def __init__(self, model_dir: Path, tokenizer: Tokenizer, hparams: Hparams):
        self.model_dir = model_dir
        self.tokenizer = tokenizer
        self.hparams = hparams
        self.weights: Weights = {}
        self.loss = math.inf
        self.step = 0
        self.saved_step = 0  # 0: nothing is saved
        self.saved_loss = math.inf

    def keep(self, average: Weights, loss: float, step: int) -> None:
        """Keep a copy of the weights if they are better than all before."""
        if loss < self.loss:
            self.weights = {name: average[name].numpy() for name in average}
            self.loss = loss
            self.step = step

    def save(self) -> None:
        """Save the weights, unless they are saved. Raises OSError.

        model_dir is complete at any time, or absent: a new folder takes the place of the old one.
        """
        if self.saved_step == self.step:
            return
        parent = self.model_dir.parent
        with tempfile.TemporaryDirectory(dir=parent, prefix=".saving-") as folder:
            new = Path(folder, "new")
            old = Path(folder, "old")
            self.write(new)
            try:
                if self.saved_step and self.model_dir.exists():
                    self.model_dir.rename(old)
                new.rename(self.model_dir)
                self.saved_step = self.step
                self.saved_loss = self.loss
            finally:  # after an error or Ctrl-C between the two, the old folder comes back
                if old.exists() and not self.model_dir.exists():
                    old.rename(self.model_dir)

    def save_anywhere(self) -> None:
        """Save the weights, in a temporary folder if model_dir fails.

        Raises OSError, which says where they are, if they are not in model_dir.
        """
        try:
            self.save()
        except OSError as error:
            problem = f"cannot save the model in {self.model_dir}: {error}"
            try:
                rescue = Path(tempfile.mkdtemp(), self.model_dir.name)
                self.write(rescue)
            except OSError:
                raise OSError(f"{problem}; {self.saved()}") from None
            raise OSError(f"{problem}; it is in {rescue}, {quality(self.loss)}") from None

    def saved(self) -> str:
        """Say what model_dir holds."""
        if self.saved_step == 0:
            return "nothing is saved"
        held = f"{self.model_dir} holds the model of step {self.saved_step}"
        return f"{held}, {quality(self.saved_loss)}"

    def write(self, folder: Path) -> None:
        """Create the folder with the seven files of OpenAI's layout. Raises OSError."""
        folder.mkdir()
        write_checkpoint(folder / "model.ckpt", self.weights)
        lines = ["#version: 0.2\n"]
        for left, right in self.tokenizer.ranks:
            lines.append(f"{left} {right}\n")
        merges = "".join(lines).encode("utf-8")
        vocabulary = json.dumps(self.tokenizer.ids)
        hparams = json.dumps(self.hparams, indent=2)
        (folder / "vocab.bpe").write_bytes(merges)
        (folder / "encoder.json").write_text(vocabulary)
        (folder / "hparams.json").write_text(hparams + "\n")


def write_checkpoint(prefix: Path, weights: Weights) -> None:
    """Write the weights as a checkpoint of TensorFlow 1. Raises OSError."""
    import tensorflow as tf

    v1 = tf.compat.v1
    assignments = []
    values = {}
    with tf.Graph().as_default(), v1.Session() as session:
        for name, value in weights.items():
            # Feed the values: constants of the graph would be stored in model.ckpt.meta, too.
            variable = v1.get_variable(name, value.shape)
            fed = v1.placeholder(tf.float32)
            assignments.append(variable.assign(fed))
            values[fed] = value
        session.run(assignments, values)
        saver = v1.train.Saver(save_relative_paths=True)
        try:
            saver.save(session, str(prefix))
        except (tf.errors.OpError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise OSError(reason) from None


def quality(loss: float) -> str:
    return f"held-out loss {loss:.4f} nats per token"


def train(
    trainer: Trainer,
    windows: Iterator[np.ndarray],
    held_out_ids: np.ndarray,
    best: Best,
) -> bool:
    """Train, and save the best weights at intervals -> False if Ctrl-C ended the training."""
    options = trainer.options
    interval = min(math.ceil(options.steps / 15), 1000)
    recent = deque(maxlen=100)
    done = 0
    try:
        with progress_bar(total=options.steps, desc="training", unit="step") as bar:
            while done < options.steps:
                batch = list(itertools.islice(windows, options.batch))
                loss = trainer.train_on(batch, done + 1)
                done += 1
                check_loss(loss, best)
                recent.append(loss)
                bar.set_postfix(loss=f"{np.mean(recent):.3f}", refresh=False)
                bar.update()
                if done % interval == 0 or done == options.steps:
                    bar.write(evaluate(trainer, held_out_ids, best, done))
                    sys.stdout.flush()
    except KeyboardInterrupt:
        if done > best.step:
            best.keep(trainer.average, trainer.held_out_loss(held_out_ids), done)
    best.save_anywhere()
    return done == options.steps


def check_loss(loss: float, best: Best) -> None:
    """Raise ValueError if the loss is infinite or not a number: the weights stay so."""
    if not math.isfinite(loss):
        problem = "the loss is not a number; try a lower --learning_rate"
        raise ValueError(f"{problem} ({best.saved()})")


def evaluate(
    trainer: Trainer,
    held_out_ids: np.ndarray,
    best: Best,
    step: int,
) -> str:
    """Save the weights if they are the best so far -> a line about the step."""
    loss = trainer.held_out_loss(held_out_ids)
    check_loss(loss, best)
    best.keep(trainer.average, loss, step)
    line = f"step {step}: {loss:.4f} nats per token"
    if best.step != step:
        return f"{line}, not saved: step {best.step} was better"
    try:
        best.save()
    except OSError as error:
        return f"{line}, not saved: {error}"
    return f"{line}, saved in {best.model_dir}"


# Measurements


class Level(NamedTuple):
    """The n-grams of one length in an interpolated Kneser-Ney model."""

    n: int
    counts: Counter[bytes]  # of n-grams; for shorter ones, of the different bytes before them
    totals: Counter[bytes]  # the sum of the counts with these first n - 1 bytes
    kinds: Counter[bytes]  # how many n-grams have these first n - 1 bytes
    discount: float


def ngram_level(n: int, counts: Counter[bytes]) -> Level:
    totals = Counter()
    kinds = Counter()
    for gram, count in counts.items():
        start = gram[:-1]
        totals[start] += count
        kinds[start] += 1
    times = Counter(counts.values())
    once = times[1]
    twice = times[2]
    discount = once / max(1, once + 2 * twice)
    return Level(n, counts, totals, kinds, discount)


def ngram_levels(text: bytes, order: int) -> list[Level]:
    """Count the n-grams of a text -> the levels for n = 1 to order."""
    starts = range(len(text) - order + 1)
    counts = Counter(text[i : i + order] for i in starts)
    levels = []
    for n in range(order, 0, -1):
        levels.append(ngram_level(n, counts))
        counts = Counter(gram[1:] for gram in counts)
    levels.reverse()
    return levels


def ngram_probability(levels: list[Level], text: bytes) -> float:
    """The probability of the last byte of text, given those before it."""
    p = 1 / 256
    for level in levels:
        gram = text[-level.n :]
        start = gram[:-1]
        total = level.totals[start]
        if len(gram) == level.n and total:
            own = max(level.counts[gram] - level.discount, 0)
            reserved = level.discount * level.kinds[start]
            p = (own + reserved * p) / total
    return p


def ngram_bits(text: bytes, held_out: bytes, n_given: int) -> float:
    """The bits that a model of the 5-grams of bytes in text needs for held_out[n_given:].

    The model is the interpolated Kneser-Ney model (Chen & Goodman, 1999).
    """
    order = 5
    levels = ngram_levels(text, order)
    bits = 0.0
    for end in range(n_given + 1, len(held_out) + 1):
        seen = held_out[max(0, end - order) : end]
        bits -= math.log2(ngram_probability(levels, seen))
    return bits


def continue_greedily(ids: np.ndarray, n_tokens: int, best: Best) -> np.ndarray:
    n_ctx = best.hparams["n_ctx"]
    for _ in range(n_tokens):
        window = ids[None, -n_ctx:]
        logits = gpt2(window, best.weights, best.hparams)
        likeliest = np.argmax(logits[0, -1])
        ids = np.append(ids, likeliest)
    return ids


def report(best: Best, text: str, held_out: str, minutes: float) -> None:
    """Print how good the model is, beside an n-gram model."""
    tokenizer = best.tokenizer
    ids = tokenizer.encode(held_out)
    held_out_bytes = held_out.encode("utf-8")
    n_given = len(tokenizer.decode(ids[:1]))
    n_bytes = len(held_out_bytes) - n_given
    nats = best.loss * (len(ids) - 1)
    bits = nats / math.log(2) / n_bytes
    ngram = ngram_bits(text.encode("utf-8"), held_out_bytes, n_given) / n_bytes
    sizes = [value.size for value in best.weights.values()]
    words = WORD.findall(text)
    prompt = tokenizer.encode("".join(words[:3]))
    ids = continue_greedily(prompt, 60, best)
    continued = tokenizer.decode(ids)
    print(f"held-out loss            {best.loss:.4f} nats per token")
    print(f"held-out bits per byte   {bits:.4f}, of a Kneser-Ney 5-gram model {ngram:.4f}")
    print(f"parameters               {sum(sizes)}")
    print(f"training time            {minutes:.1f} minutes")
    print("greedy continuation of the first words:")
    print(continued.decode("utf-8", errors="replace"))


# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (--help lists the options)")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options. Raises UsageError."""
    parser = Parser(
        prog=PROGRAM,
        description="Train a small GPT-2 and its vocabulary on a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text", help="a UTF-8 text file, or - for standard input")
    parser.add_argument("model_dir", type=Path, help="the folder to create")

    def add(name, default, meaning):
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)

    add("n_vocab", 1024, "tokens: 256 bytes, the merges and <|endoftext|>")
    add("n_ctx", 256, "context length in tokens")
    add("n_embd", 128, "width of the embeddings")
    add("n_head", 4, "attention heads")
    add("n_layer", 4, "layers")
    add("steps", 10000, "training steps")
    add("batch", 8, "windows of n_ctx tokens per step")
    add("dropout", 0.1, "dropout of the embeddings and of what each layer adds")
    add("bpe_dropout", 0.05, "probability of leaving out a merge in training")
    add("learning_rate", 2e-3, "highest learning rate")
    add("weight_decay", 0.1, "weight decay of matrices, times the learning rate")
    add("held_out", 0.1, "fraction at the end of the text that is held out")
    add("seed", 0, "random seed")
    options = parser.parse_args(arguments)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError, naming the option, if a value is out of range."""

    def require(is_valid, name, words):
        if not is_valid:
            raise UsageError(f"--{name} must be {words}, got {getattr(options, name)}")

    for name in (*HPARAMS, "steps", "batch"):
        value = getattr(options, name)
        require(value >= 1, name, "at least 1")
        require(name == "steps" or value <= MAX_SIZE, name, f"at most {MAX_SIZE}")
    require(options.n_vocab >= 257, "n_vocab", "at least 257, for 256 bytes and <|endoftext|>")
    is_multiple = options.n_embd % options.n_head == 0
    require(is_multiple, "n_embd", f"a multiple of --n_head {options.n_head}")
    require(0 <= options.dropout < 1, "dropout", "at least 0 and below 1")
    require(0 <= options.bpe_dropout < 1, "bpe_dropout", "at least 0 and below 1")
    require(0 < options.learning_rate < math.inf, "learning_rate", "a number above 0")
    require(0 <= options.weight_decay < math.inf, "weight_decay", "a number, 0 or more")
    require(0 < options.held_out < 1, "held_out", "above 0 and below 1")
    require(0 <= options.seed <= LARGEST_SEED, "seed", f"from 0 to {LARGEST_SEED}")


def hparams_of(options: argparse.Namespace) -> Hparams:
    """Return the hparams of the model."""
    return {name: getattr(options, name) for name in HPARAMS}


def import_tensorflow() -> Any:
    """Return the module. Raises ImportError with the command that installs it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            f"training needs TensorFlow, which cannot be imported ({error}); "
            "install it with: pip install -r requirements.txt"
        ) from None
    return tensorflow


def check_target(model_dir: Path) -> None:
    """Raise OSError if the folder exists or cannot be created. Creates the folders above it."""
    if os.path.lexists(model_dir):
        raise OSError(f"{model_dir} already exists; name another folder, or remove it first")
    parent = model_dir.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".saving-"):
            pass  # where this can be created, the model can be saved later
    except OSError as error:
        raise OSError(f"cannot create a folder in {parent}: {error.strerror}") from None


def cut_text(text: str, fraction: float) -> int:
    """Return where the held-out end of the text begins, at the start of a line if possible."""
    cut = int(len(text) * (1 - fraction))
    return text.rfind("\n", 0, cut) + 1 or cut


def new_tokenizer(text: str, held_out: str, options: argparse.Namespace) -> Tokenizer:
    """Train the vocabulary. Raises ValueError if the text is too small for the options."""
    merges = train_bpe(text, options.n_vocab - 257)
    tokenizer = Tokenizer(merges)
    n_ids = len(tokenizer.encode(text))
    n_held_out = len(tokenizer.encode(held_out))
    counts = f"{n_ids} tokens to train on, {n_held_out} held out"
    if n_ids <= options.n_ctx or n_held_out < 2:
        raise ValueError(f"the text is too small for --n_ctx {options.n_ctx}: {counts}")
    print(counts, flush=True)
    return tokenizer


def command(arguments: list[str]) -> int:
    """Run the command line -> exit status. Whatever can be checked is checked before the work."""
    options = parse_arguments(arguments)
    text = read_text(options.text)
    check_target(options.model_dir)
    tf = import_tensorflow()
    cut = cut_text(text, options.held_out)
    held_out = text[cut:]
    text = text[:cut]
    tokenizer = new_tokenizer(text, held_out, options)
    random.seed(options.seed)
    tf.random.set_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    trainer = Trainer(options, rng)
    windows = random_windows(text, tokenizer, options, rng)
    held_out_ids = tokenizer.encode(held_out)
    best = Best(options.model_dir, tokenizer, trainer.hparams)
    started = time.perf_counter()
    if not train(trainer, windows, held_out_ids, best):
        complain(PROGRAM, f"stopped; {best.saved()}")
        return 130
    minutes = (time.perf_counter() - started) / 60
    report(best, text, held_out, minutes)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(PROGRAM, command, sys.argv[1:]))
