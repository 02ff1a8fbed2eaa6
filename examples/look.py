"""See what GPT-2 sees in a text: in the terminal, as a table for other programs, or as a page.

    python examples/look.py "To be, or not to be" --model_size tiny
    python examples/look.py - --model_size 124M --html page.html < text.txt

The functions of the first section are for programs and notebooks, too:

    from examples.look import attention_weights, hidden_states, logit_lens

The dimensions have the names that gpt2.py explains at its top.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import regex

# If this file is run by its path, Python looks for modules in examples/, not in the folder above.
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from encoder import Encoder
from fast import matmul, own_threads
from gpt2 import (
    causal_mask,
    check_ids,
    gpt2,
    layer_norm,
    linear,
    softmax,
    transformer_block,
)
from terminal import given_text, note, read_text, run
from utils import load_encoder_hparams_and_params

N_LIKELIEST = 10
N_LENS = 3  # how many tokens the page shows for each layer
MAX_ATTENTION_TOKENS = 256

Array = np.ndarray
Ids = Sequence[int]

# Inside the model


def hidden_states(ids: Ids, params: dict, n_head: int) -> Array:
    """Return the input of each layer and the output of the last one.

    ids [n_seq] -> float32 [n_layer + 1, n_seq, n_embd]. Raises TypeError or ValueError for ids
    that are not in the vocabulary or do not fit into the context.
    """
    token_ids = check_ids(ids, len(params["wte"]), max_ndim=1)
    n_seq = len(token_ids)
    n_ctx = len(params["wpe"])
    if n_seq > n_ctx:
        raise ValueError(f"{n_seq} token ids do not fit into the context of {n_ctx}")
    with own_threads(n_seq):
        x = params["wte"][token_ids] + params["wpe"][:n_seq]
        states = [x]
        for block in params["blocks"]:
            x = transformer_block(x, **block, n_head=n_head)
            states.append(x)
    return np.stack(states)


def unembed(x: Array, params: dict) -> Array:
    """Predict the next token from hidden states, as the last lines of `gpt2` do.

    x [..., n_embd] -> logits [..., n_vocab].
    """
    return matmul(layer_norm(x, **params["ln_f"]), params["wte"].T)


def logit_lens(ids: Ids, params: dict, n_head: int) -> Array:
    """Predict the next tokens after each layer.

    ids [n_seq] -> logits [n_layer + 1, n_seq, n_vocab]. logit_lens(...)[k] is what `gpt2` returns
    for a model that consists of the first k layers. The last one is what the model itself returns.
    The array is large: 261 MB for 100 tokens and 124M. To see one layer at a time, call `unembed`
    on each of the `hidden_states`. The method is nostalgebraist's ("interpreting GPT: the logit
    lens", 2020).
    """
    return np.stack([unembed(x, params) for x in hidden_states(ids, params, n_head)])


def attention_weights(ids: Ids, params: dict, n_head: int) -> Array:
    """Return how strongly each token looks at each other one.

    ids [n_seq] -> weights [n_layer, n_head, n_seq, n_seq]. weights[layer, head, i, j] is the weight
    of token j's value for token i. It is 0 for j > i, which is in the future. The sum over j is 1.
    """
    states = hidden_states(ids, params, n_head)
    n_seq = len(states[0])
    weights = []
    for layer, block in enumerate(params["blocks"]):
        x = layer_norm(states[layer], **block["ln_1"])
        qkv = linear(x, **block["attn"]["c_attn"])  # [n_seq, 3 * n_embd]
        qkv = qkv.reshape(n_seq, 3, n_head, -1)
        q, k, _ = qkv.transpose(1, 2, 0, 3)  # [n_head, n_seq, d_head] each
        q = q / math.sqrt(q.shape[-1])
        scores = q @ k.swapaxes(-1, -2)  # [n_head, n_seq, n_seq]
        weights.append(softmax(scores + causal_mask(n_seq, n_seq)))
    return np.stack(weights)


# Reading a text


class Prediction(NamedTuple):
    """What the model expected at a place. Bits are -log2 of a probability."""

    likeliest: list[int]  # ids, the likeliest first
    likeliest_bits: list[float]
    token_id: int  # the token that came
    rank: int  # its rank: 1 is the likeliest token
    bits: float


class Reading(NamedTuple):
    """A text as the model sees it. What stands before the text counts in no figure."""

    start_ids: list[int]  # stand before the text, so that its first token is predicted, too
    ids: list[int]  # the tokens of the text, as many as fit into the context
    n_left_out: int  # how many do not fit
    predictions: list[Prediction]  # for each of ids, then for the token that would follow
    perplexity: float
    bits_per_byte: float


# Damaged parameters give one error, not many warnings.
no_warnings = np.errstate(all="ignore")


@no_warnings
def read(text: str, model: tuple) -> Reading:
    """Run a model, (encoder, hparams, params), over a text.

    Raises ValueError for an empty text, for a vocabulary without an id that starts a text, and for
    damaged parameters.
    """
    encoder, hparams, params = model
    template_ids = encoder.encode("")  # what `encode` puts before every text
    start_ids = template_ids or [encoder.start_id]
    if None in start_ids:
        raise ValueError("the vocabulary has no token that starts a text")
    all_ids = encoder.encode(text)[len(template_ids) :]
    ids = all_ids[: len(params["wpe"]) - len(start_ids)]
    if not ids:
        raise ValueError("the text is empty, or the context has no place for it")
    logits = gpt2([*start_ids, *ids], **params, n_head=hparams["n_head"], n_out=1 + len(ids))
    predictions = predict(logits, ids, N_LIKELIEST)
    bits = [each.bits for each in predictions[:-1]]
    return Reading(
        start_ids,
        ids,
        len(all_ids) - len(ids),
        predictions,
        perplexity=float(np.exp2(np.mean(bits))),
        bits_per_byte=sum(bits) / len(encoder.decode_bytes(ids)),
    )


def predict(logits: Array, ids: Ids, n_likeliest: int) -> list[Prediction]:
    """Turn logits [len(ids) + 1, n_vocab] into predictions for ids and for the token after them.

    The likeliest token is taken for the one that comes after them. Raises ValueError if a logit is
    not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite: the parameters are damaged")
    next_id = int(logits[-1].argmax())
    n_likeliest = min(n_likeliest, logits.shape[-1])
    predictions = []
    for row, token_id in zip(logits, [*ids, next_id], strict=True):
        likeliest = np.argpartition(-row, n_likeliest - 1)[:n_likeliest]
        likeliest = sorted(likeliest.tolist(), key=lambda i: (-row[i], i))  # the lower id first
        shifted = row - row.max()
        total = np.exp(shifted).sum()
        bits = (np.log(total) - shifted) / math.log(2)
        bits = bits.astype(np.float64).round(5)  # float32 has no more digits
        rank = 1 + int((row > row[token_id]).sum())
        predictions.append(
            Prediction(
                likeliest,
                bits[likeliest].tolist(),
                token_id,
                rank,
                float(bits[token_id]),
            )
        )
    return predictions


# Tokens as text


def visible(text: str, keep: str = "") -> str:
    r"""Write invisible characters as escapes: a line break as \n. keep: those to leave."""
    characters = []
    for character in regex.findall(r"\X", text):  # as people see it: with accents, a whole emoji
        if regex.match(r"\p{M}", character):
            character = "◌" + character  # an accent alone needs something to stand on
        elif regex.match(r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]", character) and character not in keep:
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def token_text(token_id: int, encoder: Encoder) -> str:
    r"""Return a token as visible text: a part of a character as \xf0, a backslash doubled.

    A token that only pads the vocabulary is its number in brackets.
    """
    if token_id not in encoder.decoder:
        return f"[{token_id}]"
    content = encoder.decode_bytes([token_id]).replace(b"\\", rb"\\")
    return visible(content.decode("utf-8", "backslashreplace"))


def label(token_id: int, encoder: Encoder) -> str:
    """Return a token as visible text, with its spaces marked."""
    return token_text(token_id, encoder).replace(" ", "␣")


class Group(NamedTuple):
    """Neighbouring tokens that share a character. Most groups have one token."""

    text: str
    n_tokens: int


def groups(ids: Ids, encoder: Encoder) -> list[Group]:
    """Group tokens that share a character, as people see it: an emoji, a letter with accents."""
    text = encoder.decode_bytes(ids).decode("utf-8", "ignore")
    characters = regex.findall(r"\X", text)
    sizes = [len(character.encode()) for character in characters]
    ends = set(itertools.accumulate(sizes))
    grouped = []
    group = []
    n_bytes = 0
    for token_id in ids:
        group.append(token_id)
        n_bytes += len(encoder.decode_bytes([token_id]))
        if n_bytes in ends:
            grouped.append(group)
            group = []
    if group:  # the text ends inside a character
        grouped.append(group)
    return [Group(visible(encoder.decode(each), "\n\t"), len(each)) for each in grouped]


# In the terminal


class Shade(NamedTuple):
    """A colour for ranks up to a limit, in two tints: numbers of the terminal's 256 colours."""

    max_rank: float
    name: str
    tint: int
    other_tint: int  # for a token after one of the first tint, so that their border can be seen


SHADES = (  # pale to strong
    Shade(10, "rank 1 to 10", 195, 159),
    Shade(100, "to 100", 229, 227),
    Shade(1000, "to 1,000", 209, 203),
    Shade(math.inf, "beyond", 176, 170),
)


def painted(text: str, colour: int) -> str:
    """Return text on a colour, which does not run to the edge of the terminal after a line."""
    escaped = rf"\033[38;5;16;48;5;{colour}m\g<0>\033[0m"
    return regex.sub(r"[^\n]+", escaped, text.replace("\n", "↵\n"))


def percent(bits: float) -> str:
    """Format the probability that has these bits."""
    return f"{100 * 2**-bits:.3g}%"


def terminal_view(reading: Reading, encoder: Encoder) -> str:
    """Return the text in the colours of its ranks, surprising tokens, likely next ones, figures.

    Without colours, there is nothing to see in the text, and it is left out.
    """
    lines = []
    if not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        legend = [painted(f" {shade.name} ", shade.tint) for shade in SHADES]
        lines += [" ".join(legend), ""]
        lines += [coloured_text(reading, encoder), ""]
    lines.append("Most surprising   probability    rank   expected instead")
    lines += surprising_lines(reading, encoder)
    lines += ["", "Likeliest next"]
    lines += likeliest_lines(reading.predictions[-1], encoder)
    lines += ["", summary(reading), ""]
    return "\n".join(lines)


def coloured_text(reading: Reading, encoder: Encoder) -> str:
    predictions = iter(reading.predictions)
    pieces = []
    colour = None
    for group in groups(reading.ids, encoder):
        rank = max(next(predictions).rank for _ in range(group.n_tokens))
        shade = next(shade for shade in SHADES if rank <= shade.max_rank)
        colour = shade.other_tint if colour == shade.tint else shade.tint
        pieces.append(painted(group.text, colour))
    return "".join(pieces)


def surprising_lines(reading: Reading, encoder: Encoder) -> list[str]:
    lines = []
    predictions = sorted(reading.predictions[:-1], key=lambda each: -each.bits)
    for each in predictions[:N_LIKELIEST]:
        line = f"  {label(each.token_id, encoder):<16}{percent(each.bits):>11}{each.rank:>8,}"
        if each.rank > 1:
            expected = label(each.likeliest[0], encoder)
            line += f"   {expected}  {percent(each.likeliest_bits[0])}"
        lines.append(line)
    return lines


def likeliest_lines(following: Prediction, encoder: Encoder) -> list[str]:
    lines = []
    all_bits = following.likeliest_bits
    for token_id, bits in zip(following.likeliest, all_bits, strict=True):
        bar = "█" * round(30 * 2 ** (all_bits[0] - bits))
        lines.append(f"  {label(token_id, encoder):<16}{percent(bits):>11}   {bar}")
    return lines


def summary(reading: Reading) -> str:
    """Return one line with the figures of a reading."""
    return (
        f"tokens: {len(reading.ids):,}, perplexity {reading.perplexity:.2f}, "
        f"{reading.bits_per_byte:.4f} bits per byte"
    )


def table(reading: Reading, encoder: Encoder) -> str:
    """Return one line per token: position, token, probability, rank, the three likeliest tokens.

    Tabs separate the columns.
    """
    lines = []
    for i, each in enumerate(reading.predictions[:-1], 1):
        cells = [str(i), token_text(each.token_id, encoder), f"{2**-each.bits:.6g}", str(each.rank)]
        cells += [token_text(likely, encoder) for likely in each.likeliest[:3]]
        lines.append("\t".join(cells) + "\n")
    return "".join(lines)


# As a page


@no_warnings
def page(reading: Reading, name: str, model: tuple) -> str:
    """Return the page as one HTML text. It holds everything that it shows, and loads nothing.

    name: of the model, (encoder, hparams, params).
    """
    encoder, hparams, params = model
    n_head = hparams["n_head"]
    ids = [*reading.start_ids, *reading.ids]
    n_extra = len(reading.start_ids) - 1  # the page shows several start tokens as one
    lens = []
    for x in hidden_states(ids, params, n_head)[:, n_extra:]:
        logits = unembed(x, params)
        lens.append(predict(logits, reading.ids, N_LENS))
    attention = None
    if len(reading.ids) <= MAX_ATTENTION_TOKENS:
        attention = packed(attention_weights(ids, params, n_head), n_extra)
    predictions = itertools.chain(reading.predictions, *lens)
    shown = set(ids).union(*[each.likeliest for each in predictions])
    data = reading._asdict() | {
        "model": hparams | {"name": name},
        "ids": ids[n_extra:],
        "labels": {token_id: label(token_id, encoder) for token_id in shown},
        "groups": groups(reading.ids, encoder),
        "lens": lens,
        "attention": attention,
    }
    # JSON is ASCII. Without a <, it cannot end the script element or begin another one.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # The browser runs only scripts that know the nonce. A text cannot contain its own digest.
    nonce = hashlib.sha256(text.encode()).hexdigest()
    template = (FOLDER / "look.html").read_text(encoding="utf-8")
    return template.replace("{{nonce}}", nonce).replace("{{data}}", text)


def packed(weights: Array, n_extra: int) -> str:
    """Return attention weights as text: base64 of zlib of bytes [n_layer, n_head, n_seq, n_seq].

    A byte is the square root of a weight in 1/255. The first n_extra tokens count as one with the
    token after them.
    """
    columns = [0, *range(n_extra + 1, weights.shape[-1])]
    weights = np.add.reduceat(weights[:, :, n_extra:], columns, axis=-1)
    levels = np.rint(255 * np.sqrt(weights)).astype(np.uint8)
    return base64.b64encode(zlib.compress(levels.tobytes())).decode()


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[TextIO]:
    """Open a file to write. An old one is replaced when all is written. Raises OSError.

    What is not a regular file is written into, and so is standard output.
    """
    is_stream = os.path.exists(path) and not os.path.isfile(path)
    target = os.path.realpath(path)
    part = path if is_stream else f"{target}.{os.getpid()}.part"
    if path == "/dev/stdout":  # which may be a file that others have written into
        is_stream = True
        part = os.dup(1)
    try:
        if os.path.isfile(path):
            open(path, "a").close()  # an old file may be write-protected
        with open(part, "w", encoding="utf-8") as file:
            yield file
        if not is_stream:
            os.replace(part, target)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno and error.filename in (path, part, None):
            raise OSError(f"cannot write {path}: {error.strerror}") from None
        raise
    finally:
        if not is_stream:
            with contextlib.suppress(OSError):
                os.remove(part)


# The command line


def command(
    text: str,
    *,
    model_size: str = "124M",
    models_dir: str = "models",
    html: str | None = None,
) -> list[str]:
    """python examples/look.py TEXT [OPTIONS]

    See what GPT-2 sees in a text. An example that needs no download:

        python examples/look.py "To be, or not to be" --model_size tiny

    On a terminal, the text is coloured by the rank of each token: the stronger the colour, the
    less the model expected it. In a pipe, each token is one line, tab-separated: position, token,
    probability, rank, and the three likeliest tokens.

    TEXT                   the text, in quotes, or the name of a file. - reads standard input,
                           without its final newline
    --model_size 124M      124M, 355M, 774M or 1558M (downloaded on first use), the name of a
                           folder in models_dir, a path of a folder, or the name of a GPT-2 on the
                           Hugging Face Hub (openai-community/gpt2)
    --models_dir models    the folder that holds the models
    --html FILE            write a page for the browser instead, which shows predictions, layers
                           and attention, too
    --help                 show this help

    There are no colours if NO_COLOR is set or TERM is dumb.
    """
    if html is None:
        reading, model = load_and_read(text, model_size, models_dir)
        view = terminal_view if sys.stdout.isatty() else table
        return [view(reading, model[0])]
    with whole_file(html) as file:
        reading, model = load_and_read(text, model_size, models_dir)
        file.write(page(reading, model_size, model))
    note(f"{html}: {summary(reading)}")
    return []


def load_and_read(word: str, model_size: str, models_dir: str) -> tuple[Reading, tuple]:
    """Read the text that a word of the command line means -> (reading, model)."""
    if os.path.exists(word) and not os.path.isdir(word):
        note(f"look.py: the text is that of the file {word}")
        text = regex.sub(r"\r?\n\Z", "", read_text(word))
    else:
        text = given_text(word)
    model = load_encoder_hparams_and_params(model_size, models_dir)
    reading = read(text, model)
    if reading.n_left_out:
        note(
            f"look.py: only the first {len(reading.ids):,} tokens fit into the context; "
            f"{reading.n_left_out:,} are left out"
        )
    return reading, model


if __name__ == "__main__":
    sys.exit(run(command, sys.argv[1:]))
