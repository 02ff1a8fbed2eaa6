"""Train a small GPT-2 and its vocabulary on any UTF-8 text and save them in OpenAI's layout.

    python -m examples.train my.txt models/mine
    python gpt2.py "Once" --model_size mine

Run it in the repository's folder. models/tiny was made so, on tiny Shakespeare. `--help` lists the options.

The end of the text is held out: the model is not trained on it, and the weights that predict it best are saved. To
compute their loss from the saved files, cut the ids of the held-out text into windows of n_ctx + 1 ids, each of which
begins with the last id of the one before (the last window may be shorter). Predict every id of a window but its first,
and average -log p over all predictions.
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from tqdm import tqdm

from encoder import BYTE_CHARS, WORD

# Shapes: B windows in a batch, T tokens in each, C = n_embd, H = n_head, D = C / H, V = n_vocab


# The vocabulary


def merge(symbols, pair):
    """Join the pair wherever it occurs.

    >>> merge("hehehh", ("h", "e"))
    ['he', 'he', 'h', 'h']
    """
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def train_bpe(text, n_merges):
    """Find the n_merges merges: each is the most frequent pair after the merges before it (Sennrich et al., 2016)."""
    words = Counter(WORD.findall(text))
    splits = {word: [BYTE_CHARS[byte] for byte in word.encode("utf-8")] for word in words}
    counts, words_with = Counter(), defaultdict(set)

    def count_pairs(word, sign):
        for pair in itertools.pairwise(splits[word]):
            counts[pair] += sign * words[word]
            words_with[pair].add(word)

    for word in words:
        count_pairs(word, 1)
    merges = []
    while len(merges) < n_merges:
        # Among equal counts take the smallest pair, so that the same text always gives the same vocabulary.
        pair = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if counts[pair] < 2:
            sys.exit(
                f"the text is too small for this vocabulary: --n_vocab can be at most {len(merges) + 257}"
            )
        merges.append(pair)
        for word in words_with.pop(pair):
            count_pairs(word, -1)
            splits[word] = merge(splits[word], pair)
            count_pairs(word, 1)
    return merges


class Tokenizer:
    """Byte-level BPE with BPE-dropout, which encoder.py does not need."""

    def __init__(self, merges):
        self.tokens = [*sorted(BYTE_CHARS), *("".join(pair) for pair in merges), "<|endoftext|>"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def split(self, word, skip=0.0):
        """The ids of one word. skip: the probability of leaving out a merge (BPE-dropout, Provilkov et al., 2020)."""
        symbols = [BYTE_CHARS[byte] for byte in word.encode("utf-8")]
        while True:
            pairs = [
                pair
                for pair in itertools.pairwise(symbols)
                if pair in self.ranks and random.random() >= skip
            ]
            if not pairs:
                return [self.ids[symbol] for symbol in symbols]
            symbols = merge(symbols, min(pairs, key=self.ranks.get))

    def encode(self, text, skip=0.0):
        # With skip, split every occurrence anew: the model should see several splits of a frequent word in each pass.
        split = functools.partial(self.split, skip=skip) if skip else functools.cache(self.split)
        return np.array([i for word in WORD.findall(text) for i in split(word)], np.int32)

    def decode(self, ids):
        return bytes(BYTE_CHARS.index(symbol) for i in ids for symbol in self.tokens[i])


# The model in TensorFlow. `weights` is {name in the checkpoint: variable}.


def initial_weights(hparams, rng):
    """As in the GPT-2 paper: the more layers, the smaller the projections that add to the residual stream."""
    n_vocab, n_ctx, n_embd, _, n_layer = hparams.values()
    weights, norms = {}, ["model/ln_f"]
    weights["model/wte"] = rng.normal(0, 0.02, [n_vocab, n_embd])
    weights["model/wpe"] = rng.normal(0, 0.01, [n_ctx, n_embd])
    for block in (f"model/h{n}" for n in range(n_layer)):
        norms += [f"{block}/ln_1", f"{block}/ln_2"]
        for name, n_in, n_out, std in (
            ("attn/c_attn", n_embd, 3 * n_embd, 0.02),
            ("attn/c_proj", n_embd, n_embd, 0.02 / math.sqrt(2 * n_layer)),
            ("mlp/c_fc", n_embd, 4 * n_embd, 0.02),
            ("mlp/c_proj", 4 * n_embd, n_embd, 0.02 / math.sqrt(2 * n_layer)),
        ):
            weights[f"{block}/{name}/w"] = rng.normal(0, std, [1, n_in, n_out])
            weights[f"{block}/{name}/b"] = np.zeros(n_out)
    for norm in norms:
        weights |= {f"{norm}/g": np.ones(n_embd), f"{norm}/b": np.zeros(n_embd)}
    return {name: value.astype(np.float32) for name, value in weights.items()}


def gelu(x):
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def layer_norm(x, weights, name):
    x -= tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(x * x, -1, keepdims=True)
    return x * tf.math.rsqrt(variance + 1e-5) * weights[f"{name}/g"] + weights[f"{name}/b"]


def linear(x, weights, name):
    return tf.tensordot(x, weights[f"{name}/w"][0], 1) + weights[f"{name}/b"]


def attention(x, weights, name, n_head):
    B, T, C = x.shape
    qkv = tf.reshape(linear(x, weights, f"{name}/c_attn"), [B, T, 3, n_head, C // n_head])
    q, k, v = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))  # [B, H, T, D] each
    future = np.triu(np.full([T, T], -1e10, np.float32), 1)
    attention_weights = tf.nn.softmax(
        tf.matmul(q, k, transpose_b=True) / math.sqrt(C // n_head) + future
    )  # [B, H, T, T]
    x = tf.reshape(tf.transpose(attention_weights @ v, [0, 2, 1, 3]), [B, T, C])
    return linear(x, weights, f"{name}/c_proj")


def gpt2(ids, weights, hparams, dropout=0.0):
    def drop(x):
        return tf.nn.dropout(x, dropout) if dropout else x

    x = drop(
        tf.gather(weights["model/wte"], ids) + weights["model/wpe"][: ids.shape[1]]
    )  # [B, T, C]
    for block in (f"model/h{n}" for n in range(hparams["n_layer"])):
        x += drop(
            attention(
                layer_norm(x, weights, f"{block}/ln_1"), weights, f"{block}/attn", hparams["n_head"]
            )
        )
        hidden = gelu(linear(layer_norm(x, weights, f"{block}/ln_2"), weights, f"{block}/mlp/c_fc"))
        x += drop(linear(hidden, weights, f"{block}/mlp/c_proj"))
    return tf.tensordot(
        layer_norm(x, weights, "model/ln_f"), tf.transpose(weights["model/wte"]), 1
    )  # [B, T, V]


def summed_loss(windows, weights, hparams, dropout=0.0):
    """The sum of -log p, in nats, of all ids in windows [B, T + 1] but the first of each row."""
    logits = gpt2(windows[:, :-1], weights, hparams, dropout)
    return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(windows[:, 1:], logits))


# Training


def random_windows(text, tokenizer, n_ctx, skip, rng):
    """Yield windows of ids [n_ctx + 1] without end. Each pass splits the words and places the windows anew."""
    while True:
        ids = tokenizer.encode(text, skip)
        first = rng.integers(min(n_ctx, len(ids) - n_ctx))
        for start in rng.permutation(np.arange(first, len(ids) - n_ctx, n_ctx)):
            yield ids[start : start + n_ctx + 1]


def train(text, held_out_ids, tokenizer, hparams, args):
    """Return the weights that predict held_out_ids best, and their loss in nats per token."""
    n_ctx, rng = args.n_ctx, np.random.default_rng(args.seed)
    start = initial_weights(hparams, rng)
    weights, average = (
        {name: tf.Variable(value) for name, value in start.items()} for _ in range(2)
    )
    mean, square = (
        {name: tf.Variable(0 * value) for name, value in start.items()} for _ in range(2)
    )

    # A compiled step takes a quarter less time, but the compilation takes longer than a few steps.
    @tf.function(jit_compile=args.steps >= 100)
    def train_step(windows, step):
        with tf.GradientTape() as tape:
            loss = summed_loss(windows, weights, hparams, args.dropout) / (args.batch * n_ctx)
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, list(weights.values())), 1.0)
        warm_up = args.steps / 20
        rate = args.learning_rate * tf.minimum(
            step / warm_up, 0.5 + 0.5 * tf.cos(math.pi * step / args.steps)
        )
        for name, gradient in zip(
            weights, gradients, strict=True
        ):  # AdamW (Loshchilov & Hutter, 2019)
            mean[name].assign(0.9 * mean[name] + 0.1 * gradient)
            square[name].assign(0.99 * square[name] + 0.01 * gradient * gradient)
            update = (
                mean[name] / (1 - 0.9**step) / (tf.sqrt(square[name] / (1 - 0.99**step)) + 1e-8)
            )
            decay = args.weight_decay if weights[name].shape.rank > 1 else 0.0
            weights[name].assign_sub(rate * (update + decay * weights[name]))
            # The average over about the last 100 steps predicts better than the weights of any single step.
            average[name].assign_add((weights[name] - average[name]) * tf.maximum(0.01, 1 / step))
        return loss

    window_loss = tf.function(lambda window: summed_loss(window, average, hparams))
    starts = range(0, len(held_out_ids) - 1, n_ctx)
    held_out_windows = [tf.constant(held_out_ids[None, i : i + n_ctx + 1]) for i in starts]
    windows = random_windows(text, tokenizer, n_ctx, args.bpe_dropout, rng)
    best, best_loss, recent = None, math.inf, []
    with tqdm(range(1, args.steps + 1), unit="step") as bar:
        for step in bar:
            batch = np.stack(list(itertools.islice(windows, args.batch)))
            recent.append(train_step(tf.constant(batch), tf.constant(step, tf.float32)))
            if step % math.ceil(args.steps / 15) == 0 or step == args.steps:
                loss = sum(float(window_loss(window)) for window in held_out_windows) / (
                    len(held_out_ids) - 1
                )
                bar.set_postfix(train=f"{np.mean(recent):.3f}", held_out=f"{loss:.4f}")
                recent = []
                if loss < best_loss:
                    best, best_loss = {name: value.numpy() for name, value in average.items()}, loss
    if best is None:
        sys.exit("the loss is not a number; try a lower --learning_rate")
    return best, best_loss


def save(model_dir, weights, tokenizer, hparams):
    """Write the seven files in OpenAI's layout. model_dir appears only when it is complete."""
    with tempfile.TemporaryDirectory(
        dir=model_dir.parent, prefix=f".{model_dir.name}-"
    ) as temporary:
        files = Path(temporary) / model_dir.name
        files.mkdir()
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            for name, value in weights.items():
                # Feed the weights: as constants of the graph they would also be stored in model.ckpt.meta.
                variable, fed = (
                    tf.compat.v1.get_variable(name, value.shape),
                    tf.compat.v1.placeholder(tf.float32),
                )
                session.run(variable.assign(fed), {fed: value})
            tf.compat.v1.train.Saver(save_relative_paths=True).save(
                session, str(files / "model.ckpt")
            )
        merges = "".join(f"{left} {right}\n" for left, right in tokenizer.ranks)
        (files / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
        (files / "encoder.json").write_text(json.dumps(tokenizer.ids))
        (files / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
        files.rename(model_dir)


# Measurements


def ngram_bits_per_byte(train, held_out, n_given, order=5):
    """Bits per byte of held_out[n_given:] under an interpolated Kneser-Ney model of bytes (Chen & Goodman, 1999)."""
    counts, levels = Counter(train[i : i + order] for i in range(len(train) - order + 1)), []
    for n in range(order, 0, -1):
        total, kinds = Counter(), Counter()
        for gram, count in counts.items():
            total[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
        levels.insert(0, (n, counts, total, kinds, once / max(1, once + 2 * twice)))
        # For shorter n-grams, count the different bytes that come before.
        counts = Counter(gram[1:] for gram in counts)
    bits = 0.0
    for end in range(n_given + 1, len(held_out) + 1):
        p = 1 / 256
        for n, counts, total, kinds, discount in levels:
            gram = held_out[end - n : end] if n <= end else None
            if gram and total[gram[:-1]]:
                p = (max(counts[gram] - discount, 0) + discount * kinds[gram[:-1]] * p) / total[
                    gram[:-1]
                ]
        bits -= math.log2(p)
    return bits / (len(held_out) - n_given)


def continue_greedily(ids, n_tokens, weights, hparams):
    for _ in range(n_tokens):
        logits = gpt2(np.array([ids[-hparams["n_ctx"] :]]), weights, hparams)
        ids = [*ids, int(tf.argmax(logits[0, -1]))]
    return ids


# The command line


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text", type=Path, help="a UTF-8 text file")
    parser.add_argument("model_dir", type=Path, help="the folder to create")
    for name, default, meaning in (
        ("n_vocab", 1024, "tokens: 256 bytes, the merges and <|endoftext|>"),
        ("n_ctx", 256, "context length in tokens"),
        ("n_embd", 128, "width of the embeddings"),
        ("n_head", 4, "attention heads"),
        ("n_layer", 4, "layers"),
        ("steps", 10000, "training steps"),
        ("batch", 8, "windows of n_ctx tokens per step"),
        ("dropout", 0.1, "dropout of the embeddings and of what each layer adds"),
        ("bpe_dropout", 0.05, "probability of leaving out a merge in training"),
        ("learning_rate", 2e-3, "highest learning rate"),
        ("weight_decay", 0.1, "weight decay of matrices, times the learning rate"),
        ("held_out", 0.1, "fraction at the end of the text that is held out"),
        ("seed", 0, "random seed"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    args = parser.parse_args()
    if args.n_vocab < 257:
        sys.exit("--n_vocab must be at least 257: 256 bytes and <|endoftext|>")
    if min(args.n_ctx, args.n_embd, args.n_head, args.n_layer, args.steps, args.batch) < 1:
        sys.exit("--n_ctx, --n_embd, --n_head, --n_layer, --steps and --batch must be at least 1")
    if args.n_embd % args.n_head:
        sys.exit(f"--n_embd {args.n_embd} is not a multiple of --n_head {args.n_head}")
    if not (0 <= args.dropout < 1 and 0 <= args.bpe_dropout < 1 and 0 < args.held_out < 1):
        sys.exit("--dropout, --bpe_dropout and --held_out must be below 1, and --held_out above 0")
    if os.path.lexists(args.model_dir):
        sys.exit(f"{args.model_dir} already exists; name another folder, or remove it first")
    return args


def main():
    args = parse_arguments()
    try:
        text = args.text.read_bytes().decode("utf-8")
        args.model_dir.parent.mkdir(parents=True, exist_ok=True)
    except UnicodeDecodeError as error:
        sys.exit(f"{args.text} is not UTF-8: {error}")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    if not os.access(args.model_dir.parent, os.W_OK):
        sys.exit(f"{args.model_dir.parent} is not writable")
    cut = int(len(text) * (1 - args.held_out))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    text, held_out = text[:cut], text[cut:]
    tokenizer = Tokenizer(train_bpe(text, args.n_vocab - 257))
    ids, held_out_ids = tokenizer.encode(text), tokenizer.encode(held_out)
    if len(ids) <= args.n_ctx or len(held_out_ids) < 2:
        sys.exit(
            f"{args.text} is too small: {len(ids)} tokens to train on, {len(held_out_ids)} held out"
        )
    print(f"{len(ids)} tokens to train on, {len(held_out_ids)} held out")

    # Import TensorFlow only now: it takes seconds, and its log would hide the messages above.
    global tf
    import tensorflow as tf

    tf.keras.utils.set_random_seed(args.seed)
    hparams = {
        name: getattr(args, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
    }
    started = time.perf_counter()
    weights, loss = train(text, held_out_ids, tokenizer, hparams, args)
    minutes = (time.perf_counter() - started) / 60
    save(args.model_dir, weights, tokenizer, hparams)

    n_given = len(tokenizer.decode(held_out_ids[:1]))
    n_bytes = len(held_out.encode("utf-8")) - n_given
    bits = loss * (len(held_out_ids) - 1) / math.log(2) / n_bytes
    ngram_bits = ngram_bits_per_byte(text.encode("utf-8"), held_out.encode("utf-8"), n_given)
    prompt = tokenizer.encode("".join(WORD.findall(text)[:3])).tolist()
    print(f"held-out loss            {loss:.4f} nats per token")
    print(f"held-out bits per byte   {bits:.4f}, of a Kneser-Ney 5-gram model {ngram_bits:.4f}")
    print(f"parameters               {sum(value.size for value in weights.values())}")
    print(f"training time            {minutes:.1f} minutes")
    print("greedy continuation of the first words:")
    print(
        tokenizer.decode(continue_greedily(prompt, 60, weights, hparams)).decode(
            "utf-8", errors="replace"
        )
    )


if __name__ == "__main__":
    main()
