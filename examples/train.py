"""Train a small GPT-2 and its vocabulary on any UTF-8 text and save them in OpenAI's layout.

    python examples/train.py my.txt models/mine
    python gpt2.py "Once" --model_size mine

models/tiny was made this way, from tiny Shakespeare. `--help` lists the options.

The text is cut into documents, and <|endoftext|> goes before and after each. The end of the text is
held out: the model is not trained on it, and the weights that predict it best are saved. To compute
their loss from the saved files, cut the ids of the held-out documents into windows of n_ctx + 1
ids, each of which begins with the last id of the one before (a shorter rest is left out). Predict
every id of a window but its first, and average -log p over all predictions.
"""

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's folder

import numpy as np

from encoder import WORD
from gpt2 import continuation
from terminal import note, progress_bar, read_text, run
from utils import HPARAMS, check_hparams, load_encoder_hparams_and_params, variable_shapes

# TensorFlow, Keras and tokenizers are imported inside the functions that use them: TensorFlow takes
# seconds and prints lines, so --help and errors in the arguments come before it.

END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The sizes of a model and how to train it; see `command`.

    Raises ValueError if a value is out of range.
    """

    n_vocab: int = 1024
    n_ctx: int = 256
    n_embd: int = 128
    n_head: int = 4
    n_layer: int = 4
    steps: int = 10_000
    batch: int = 8
    learning_rate: float = 2e-3
    dropout: float = 0.1
    bpe_dropout: float = 0.05
    held_out: float = 0.1
    paragraphs: int = 10

    def __post_init__(self) -> None:
        check_hparams(vars(self), "the options")
        for name, value in vars(self).items():
            if isinstance(value, int) and not 1 <= value <= 1_000_000_000:
                raise ValueError(f"--{name} must be from 1 to 1000000000, got {value}")
            if isinstance(value, float) and not 0 <= value < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, got {value}")


# The text and its vocabulary


def documents(text: str, paragraphs: int) -> list[str]:
    """Split a text at <|endoftext|> or, if there is none, after every so many paragraphs.

    A paragraph ends with a blank line. Line ends at the borders of the documents are dropped, and
    so are empty documents.
    """
    if END in text:
        parts = text.split(END)
    else:
        several = rf"(?s)(?:.+?(?:\n\s*\n|\Z)){{1,{paragraphs}}}"
        parts = re.findall(several, text)
    return [part.strip("\r\n") for part in parts if part.strip()]


def train_vocabulary(texts: list[str], n_vocab: int) -> Any:
    """Return a tokenizer with OpenAI's order of ids: bytes, merges, <|endoftext|>.

    Raises ValueError if n_vocab is below 257, or if too few pairs of tokens occur twice.
    """
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers

    tokenizer = ByteLevelBPETokenizer()
    # encoder.py's pattern splits the words, so that both give the same ids.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # A word of a million letters would take the trainer hours.
    parts = re.findall("(?s).{1,1000}", "\n".join(texts))
    words = map(WORD.findall, parts)
    tokenizer.train_from_iterator(words, vocab_size=n_vocab - 1, show_progress=False)
    tokenizer.add_special_tokens([END])
    possible = tokenizer.get_vocab_size()
    if possible != n_vocab:
        raise ValueError(f"--n_vocab cannot be {n_vocab} for this text, but it can be {possible}")
    return tokenizer


def encode(
    tokenizer: Any,
    texts: list[str],
    bpe_dropout: float = 0.0,
) -> np.ndarray:
    """Return the ids of documents, int32 [n], with <|endoftext|> before and after each.

    bpe_dropout: the probability of leaving out a merge (Provilkov et al., 2020). Each occurrence of
    a word is split anew, so the model sees several splits of a frequent word.
    """
    tokenizer.model.dropout = bpe_dropout
    end_id = tokenizer.token_to_id(END)
    ids = []
    words = list(map(WORD.findall, texts))
    for encoding in tokenizer.encode_batch(words, is_pretokenized=True):
        ids += [end_id, *encoding.ids]
    return np.array([*ids, end_id], np.int32)


def windows(ids: np.ndarray, n_ctx: int) -> np.ndarray:
    """Return all windows of ids: [n, n_ctx + 1]. Raises ValueError if there are none."""
    if len(ids) <= n_ctx:
        raise ValueError(f"a text of {len(ids)} tokens is too short for --n_ctx {n_ctx}")
    return np.lib.stride_tricks.sliding_window_view(ids, n_ctx + 1)


# The model in TensorFlow. Shapes: B windows in a batch, T tokens in each, C = n_embd, H = n_head,
# D = C / H, V = n_vocab.


def initial_weights(hparams: dict) -> dict:
    """Draw the weights as the GPT-2 paper says -> {name in the checkpoint: keras.Variable}.

    The more layers, the smaller are the projections that add to the residual stream.
    """
    import keras

    weights = {}
    for name, shape in variable_shapes(hparams):
        std = 0.02
        if name.endswith("c_proj/w"):
            std /= math.sqrt(2 * hparams["n_layer"])
        normal = keras.initializers.RandomNormal(0, std)
        initializer = {"g": "ones", "b": "zeros"}.get(name[-1], normal)
        weights[name] = keras.Variable(initializer, shape)
    return weights


def gpt2(ids, weights, hparams, dropout):
    """Predict the next id at each position: ids [B, T] -> logits [B, T, V]."""
    import keras
    import tensorflow as tf

    def drop(x):
        return tf.nn.dropout(x, dropout)

    def norm(x, name):
        return keras.ops.layer_normalization(
            x, weights[f"{name}/g"], weights[f"{name}/b"], epsilon=1e-5
        )

    def linear(x, name):
        return tf.tensordot(x, weights[f"{name}/w"][0], 1) + weights[f"{name}/b"]

    B, T = ids.shape
    wte = weights["model/wte"]
    x = drop(tf.gather(wte, ids) + weights["model/wpe"][:T])  # [B, T, C]
    for layer in range(hparams["n_layer"]):
        block = f"model/h{layer}"
        y = norm(x, f"{block}/ln_1")
        y = linear(y, f"{block}/attn/c_attn")  # [B, T, 3 * C]
        y = tf.reshape(y, [B, T, 3, hparams["n_head"], -1])
        q, k, v = tf.unstack(y, axis=2)  # [B, T, H, D] each
        y = keras.ops.dot_product_attention(q, k, v, is_causal=True)
        y = tf.reshape(y, x.shape)
        x = x + drop(linear(y, f"{block}/attn/c_proj"))
        y = norm(x, f"{block}/ln_2")
        y = linear(y, f"{block}/mlp/c_fc")  # [B, T, 4 * C]
        y = tf.nn.gelu(y, approximate=True)
        x = x + drop(linear(y, f"{block}/mlp/c_proj"))
    x = norm(x, "model/ln_f")
    return tf.einsum("btc,vc->btv", x, wte)


# Training


def new_optimizer(options: Options, weights: dict) -> Any:
    """Return AdamW (Loshchilov & Hutter, 2019), which also averages the weights over time.

    The rate rises during the first twentieth of the steps, then falls like a cosine. The average
    over about the last 100 steps predicts better than the weights of any single step.
    """
    import keras

    rise = max(1, options.steps // 20)
    rate = keras.optimizers.schedules.CosineDecay(
        options.learning_rate / rise,
        options.steps,
        warmup_target=options.learning_rate,
        warmup_steps=rise,
    )
    optimizer = keras.optimizers.AdamW(
        rate,
        weight_decay=0.1,
        beta_2=0.99,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=1 - 1 / min(rise, 100),
    )
    optimizer.exclude_from_weight_decay([each for each in weights.values() if each.ndim == 1])
    optimizer.build(list(weights.values()))
    return optimizer


@dataclass
class Trainer:
    """The training of a model, which saves the best weights in model_dir.

    texts: the documents to train on.
    held_out: windows [n, n_ctx + 1] of the ids that the weights must predict best.
    tokenizer: see train_vocabulary.
    """

    texts: list[str]
    held_out: np.ndarray
    tokenizer: Any
    model_dir: Path
    options: Options
    n_steps: int = 0
    best_loss: float = math.inf

    def __post_init__(self) -> None:
        import tensorflow as tf

        self.hparams = {name: getattr(self.options, name) for name in HPARAMS}
        self.weights = initial_weights(self.hparams)
        self.optimizer = new_optimizer(self.options, self.weights)
        self.compiled_step = tf.function(self.step)
        self.compiled_loss = tf.function(self.loss)

    def batches(self) -> Iterator[np.ndarray]:
        """Yield batches of random windows, int32 [B, T + 1], without end.

        Each pass over the text shuffles the documents and splits the words anew.
        """
        options = self.options
        rng = np.random.default_rng()
        while True:
            rng.shuffle(self.texts)
            ids = encode(self.tokenizer, self.texts, options.bpe_dropout)
            possible = windows(ids, options.n_ctx)
            for _ in range(0, len(ids), options.batch * options.n_ctx):
                yield possible[rng.integers(len(possible), size=options.batch)]

    def step(self, batch):
        """Train on windows [B, T + 1] -> their loss."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.loss(batch, self.options.dropout)
        values = [variable.value for variable in self.weights.values()]
        self.optimizer.apply(tape.gradient(loss, values))
        return loss

    def loss(self, batch, dropout=0.0):
        """The mean -log p, in nats, of all ids of windows [B, T + 1] but the first of each."""
        import tensorflow as tf

        logits = gpt2(batch[:, :-1], self.weights, self.hparams, dropout)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch[:, 1:], logits)
        return tf.reduce_mean(losses)

    def train(self) -> None:
        """Train, and save the best weights at intervals and on Ctrl-C.

        Raises ValueError if the loss becomes infinite, OSError if the model cannot be saved, and
        TensorFlow's OpError.
        """
        steps = self.options.steps
        interval = steps // 15 + 1
        batches = self.batches()
        try:
            with progress_bar(range(steps), desc="training", unit="step") as bar:
                for _ in bar:
                    loss = float(self.compiled_step(next(batches)))
                    self.n_steps += 1
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    if self.n_steps % interval == 0 or self.n_steps == steps:
                        bar.write(self.evaluate())
                        sys.stdout.flush()
        except KeyboardInterrupt:
            if self.n_steps:
                note(f"train.py: stopped; {self.evaluate()}")
            raise

    def evaluate(self) -> str:
        """Save the average weights if they are the best so far -> a line about the step.

        The training goes on from the average.
        """
        self.optimizer.finalize_variable_values(list(self.weights.values()))
        loss = float(np.mean([self.compiled_loss(window[None]) for window in self.held_out]))
        line = f"step {self.n_steps}: held-out loss {loss:.4f} nats per token"
        if not math.isfinite(loss):
            raise ValueError(f"{line}; try a lower --learning_rate")
        if loss > self.best_loss:
            return f"{line}, not saved: an earlier step was better"
        self.save()
        self.best_loss = loss
        return f"{line}, saved in {self.model_dir}"

    def save(self) -> None:
        """Write the seven files of OpenAI's layout. Raises OSError.

        model_dir is complete at any time, or absent: a new folder takes the place of the old one.
        """
        vocabulary = self.tokenizer.get_vocab()
        ordered = {token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.get)}
        with tempfile.TemporaryDirectory(dir=self.model_dir.parent, prefix=".saving-") as folder:
            new = Path(folder, "new")
            old = Path(folder, "old")
            new.mkdir()
            write_checkpoint(
                new / "model.ckpt", {name: each.numpy() for name, each in self.weights.items()}
            )
            (new / "hparams.json").write_text(json.dumps(self.hparams, indent=2) + "\n")
            (new / "encoder.json").write_text(json.dumps(ordered))
            _, merges = self.tokenizer.model.save(folder)
            Path(merges).rename(new / "vocab.bpe")
            try:
                # A folder that is there before the first save is another program's.
                if self.best_loss < math.inf and self.model_dir.exists():
                    self.model_dir.rename(old)
                new.rename(self.model_dir)
            finally:  # after an error or Ctrl-C between the two, the old folder comes back
                if old.exists() and not self.model_dir.exists():
                    old.rename(self.model_dir)


def write_checkpoint(prefix: Path, values: dict) -> None:
    """Write {name: array} as a checkpoint of TensorFlow 1."""
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        for name, value in values.items():
            variable = tf.get_variable(name, value.shape)
            # Values that are fed are not stored in the graph, and so not in model.ckpt.meta.
            session.run(variable.initializer, {variable.initial_value: value})
        tf.train.Saver(save_relative_paths=True).save(session, str(prefix))


# The command line


def command(text: str, model_dir: str, **options: Any) -> Iterator[str]:
    """python examples/train.py TEXT MODEL_DIR [OPTIONS]

    Train a small GPT-2 and its vocabulary on a text. An example of a minute:

        python examples/train.py tests/data/shakespeare_held_out.txt models/mine --steps 300
        python gpt2.py "ROMEO:" --model_size mine

    TEXT                    a UTF-8 text file, or - for standard input. <|endoftext|> stands
                            between its documents
    MODEL_DIR               the folder to create. The weights that predict the end of the text
                            best are saved there at intervals, and on Ctrl-C
    --paragraphs 10         if the text has no <|endoftext|>, cut it into documents of this many
                            paragraphs, which end with blank lines
    --n_vocab 1024          tokens of the vocabulary: 256 bytes, the merges and <|endoftext|>
    --n_ctx 256             the context length in tokens
    --n_embd 128            the width of the embeddings
    --n_head 4              attention heads
    --n_layer 4             layers
    --steps 10000           training steps
    --batch 8               windows of n_ctx tokens in a step
    --learning_rate 0.002   the highest learning rate
    --dropout 0.1           dropout of the embeddings and of what each layer adds
    --bpe_dropout 0.05      the probability of leaving out a merge in training
    --held_out 0.1          the fraction at the end of the text that is not trained on
    --help                  show this help
    """
    settings = Options(**options)
    content = read_text(text)
    folder = Path(model_dir)
    if os.path.lexists(folder):
        raise OSError(f"{folder} already exists; name another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-"):
        pass  # where this can be created, the model can be saved later
    os.environ |= {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    import tensorflow as tf  # now, because it may be missing

    limit = int(len(content) * (1 - settings.held_out))
    cut = content.rfind("\n", 0, limit) + 1 or limit  # at the start of a line, if possible
    texts = documents(content[:cut], settings.paragraphs)
    tokenizer = train_vocabulary(texts, settings.n_vocab)
    ids = encode(tokenizer, documents(content[cut:], settings.paragraphs))
    held_out = windows(ids, settings.n_ctx)[:: settings.n_ctx]
    try:
        Trainer(texts, held_out, tokenizer, folder, settings).train()
    except tf.errors.OpError as error:  # a full disk, or too little memory
        raise OSError(error.message) from None
    model = load_encoder_hparams_and_params(folder.name, str(folder.parent))
    yield "A text of the model:\n\n"
    yield from continuation("", model, temperature=0.7)
    yield "\n"


if __name__ == "__main__":
    sys.exit(run(command, sys.argv[1:], Options))
