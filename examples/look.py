"""See what GPT-2 sees in a text: in the terminal, as a table for other programs, or as a page.

    python -m examples.look "To be, or not to be" --model_size tiny
    python -m examples.look - --model_size 124M --html page.html < text.txt

`logit_lens` and `attention_weights` stand alone: copy them into a notebook, together with
`hidden_states` and `unembed`. The dimensions have the names that gpt2.py explains at its top.
"""

import argparse
import base64
import contextlib
import errno
import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import regex
from numpy.typing import NDArray

# If this file is run by its path, Python looks for modules in examples/, not in the folder above.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from encoder import Encoder
from gpt2 import (
    causal_mask,
    check_ids,
    decoded,
    gpt2,
    layer_norm,
    linear,
    log_softmax,
    matmul,
    softmax,
    transformer_block,
    with_own_threads,
)
from utils import (
    UsageError,
    complain,
    load_encoder_hparams_and_params,
    read_text,
    run_command,
)

PROGRAM = "look.py"
N_LIKELIEST = 10
N_LENS = 3  # how many tokens the page shows for each layer
N_ATTENDED = 5  # how many attended tokens the page lists
MAX_ATTENTION_TOKENS = 256
TEMPLATE = Path(__file__).with_name("look.html")

Array = NDArray[np.float32]
Ids = Sequence[int]
Params = dict[str, Any]
Prediction = dict[str, Any]
Reading = dict[str, Any]
Lens = list[list[Prediction]]

# Inside the model


@with_own_threads
def hidden_states(ids: Ids, params: Params, n_head: int) -> Array:
    """Return the input of each layer and the output of the last one.

    ids [n_seq] -> float32 [n_layer + 1, n_seq, n_embd]. Raises TypeError or ValueError for ids
    that are not in the vocabulary or do not fit into the context.
    """
    token_ids = check_ids(ids, len(params["wte"]), max_ndim=1)
    n_seq = len(token_ids)
    n_ctx = len(params["wpe"])
    if n_seq > n_ctx:
        raise ValueError(f"{n_seq} token ids do not fit into the context of {n_ctx}")
    x = params["wte"][token_ids] + params["wpe"][:n_seq]
    states = [x]
    for block in params["blocks"]:
        x = transformer_block(x, **block, n_head=n_head)
        states.append(x)
    return np.stack(states)


def unembed(x: Array, params: Params) -> Array:
    """Predict the next token from hidden states, as the last lines of `gpt2` do.

    x [..., n_embd] -> logits [..., n_vocab].
    """
    return matmul(layer_norm(x, **params["ln_f"]), params["wte"].T)


def logit_lens(ids: Ids, params: Params, n_head: int) -> Array:
    """Predict the next tokens after each layer.

    ids [n_seq] -> logits [n_layer + 1, n_seq, n_vocab]. logit_lens(...)[k] is what `gpt2` returns
    for a model that consists of the first k layers. The last one is what the model itself returns.
    The array is large: 261 MB for 100 tokens and 124M. To see one layer at a time, call `unembed`
    on each of the `hidden_states`. The method is nostalgebraist's ("interpreting GPT: the logit
    lens", 2020).
    """
    return np.stack([unembed(x, params) for x in hidden_states(ids, params, n_head)])


@with_own_threads
def attention_weights(ids: Ids, params: Params, n_head: int) -> Array:
    """Return how strongly each token looks at each other one.

    ids [n_seq] -> weights [n_layer, n_head, n_seq, n_seq]. weights[layer, head, i, j] is the weight
    of token j's value for token i. It is 0 for j > i, which is in the future. The sum over j is 1.
    """
    weights = []
    states = hidden_states(ids, params, n_head)
    n_seq = states.shape[1]
    for x, block in zip(states[:-1], params["blocks"], strict=True):
        attn = block["attn"]
        qkv = linear(layer_norm(x, **block["ln_1"]), **attn["c_attn"])  # [n_seq, 3 * n_embd]
        qkv = qkv.reshape(n_seq, 3, n_head, -1)
        q, k, _ = qkv.transpose(1, 2, 0, 3)  # [n_head, n_seq, d_head] each
        d_head = q.shape[-1]
        scale = attn.get("scale", 1 / math.sqrt(d_head))
        scores = q * np.float32(scale) @ k.swapaxes(-1, -2)  # [n_head, n_seq, n_seq]
        weights.append(softmax(scores + causal_mask(n_seq, n_seq)))
    return np.stack(weights)


# Reading a text

# Damaged parameters give one error, not many warnings.
no_warnings = np.errstate(over="ignore", invalid="ignore", divide="ignore")


@no_warnings
def read(text: str, encoder: Encoder, params: Params, n_head: int) -> Reading:
    """Run the model over a text -> {"ids", "n_left_out", "predictions"}.

    ids: the id that starts a text, so that the first token is predicted, too; then the tokens of
    the text, as many as fit into the context. n_left_out: how many do not fit. predictions: for
    each token of the text what `prediction` returns, then one for the token that would follow.

    Raises ValueError for an empty text, for a vocabulary without an id that starts a text, and for
    damaged parameters.
    """
    if encoder.start_id is None:
        raise ValueError("the vocabulary has no token that starts a text")
    if not text:
        raise ValueError("the text is empty")
    all_ids = encoder.encode(text)
    if not encoder.first_ids:  # else encode has begun the text
        all_ids = [encoder.start_id, *all_ids]
    ids = all_ids[: len(params["wpe"])]
    logits = gpt2(ids, **params, n_head=n_head)
    targets = [*ids[1:], None]
    return {
        "ids": ids,
        "n_left_out": len(all_ids) - len(ids),
        "predictions": [prediction(*pair) for pair in zip(logits, targets, strict=True)],
    }


def prediction(
    logits: Array, target: int | None = None, n_likeliest: int = N_LIKELIEST
) -> Prediction:
    """Describe what logits [n_vocab] predict -> {"likeliest": ids, "probs": their probabilities}.

    The likeliest token comes first. For a target id also {"prob", "rank", "bits"}: rank 1 is the
    likeliest token, and bits is -log2(prob). Raises ValueError if a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite: the parameters are damaged")
    log_p = log_softmax(logits)
    n_likeliest = min(n_likeliest, len(logits))
    least = np.partition(logits, -n_likeliest)[-n_likeliest]
    candidates = np.flatnonzero(logits >= least)  # more, if some tie with the last one
    order = np.argsort(-logits[candidates], kind="stable")
    likeliest = candidates[order[:n_likeliest]]
    described = {
        "likeliest": likeliest.tolist(),
        "probs": np.exp(log_p[likeliest]).tolist(),
    }
    if target is not None:
        described["prob"] = float(np.exp(log_p[target]))
        described["rank"] = 1 + int((logits > logits[target]).sum())
        described["bits"] = float(-log_p[target] / math.log(2))
    return described


class Figures(NamedTuple):
    """Figures of a text. Without tokens, there are no averages."""

    n_tokens: int
    perplexity: float | None
    bits_per_byte: float | None


def figures(reading: Reading, encoder: Encoder) -> Figures:
    """Return the figures of a reading. The start does not count."""
    bits = [each["bits"] for each in reading["predictions"][:-1]]
    if not bits:
        return Figures(0, None, None)
    n_bytes = len(encoder.decode_bytes(reading["ids"][1:]))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp2(np.mean(bits)))
    return Figures(len(bits), perplexity, sum(bits) / n_bytes)


# Tokens as text


def visible(text: str, keep: str = "") -> str:
    r"""Write invisible characters and bytes as escapes: a line break as \n, a byte as \xf0.

    A backslash is doubled. keep: characters to leave as they are. Bytes are lone surrogates, as
    the error handler "surrogateescape" makes them.
    """
    # \X is a character as people see it: an emoji may consist of several code points. A lone byte
    # stays apart from an accent after it.
    characters = regex.findall(r"\p{Cs}|\X", text)
    return "".join(visible_character(each, keep) for each in characters)


def visible_character(character: str, keep: str) -> str:
    category = unicodedata.category(character[0])
    if category == "Cs":
        return f"\\x{ord(character) - 0xDC00:02x}"
    is_hidden = character == "\\" or category in ("Cc", "Cf", "Zl", "Zp")
    if is_hidden and character not in keep:
        return character.encode("unicode_escape").decode()
    if category.startswith("M"):
        return "◌" + character  # an accent alone needs something to stand on
    return character


def token_text(token_id: int, encoder: Encoder) -> str:
    """Return a token as visible text, or its number in brackets if it only pads the vocabulary."""
    if token_id not in encoder.decoder:
        return f"[{token_id}]"
    text = encoder.decode_bytes([token_id]).decode("utf-8", "surrogateescape")
    return visible(text)


def label(token_id: int, encoder: Encoder) -> str:
    """Return a token as visible text, with its spaces marked."""
    return token_text(token_id, encoder).replace(" ", "␣")


class Group(NamedTuple):
    """Neighbouring tokens that share a character. Most groups have one token."""

    text: str
    n_tokens: int


def groups(ids: Ids, encoder: Encoder) -> list[Group]:
    """Group tokens that share a character.

    A character is what people see as one: an emoji, a letter with its accents.
    """
    pieces = [encoder.decode_bytes([token_id]) for token_id in ids]
    text = b"".join(pieces).decode("utf-8", "ignore")
    sizes = [len(character.encode()) for character in regex.findall(r"\X", text)]
    ends = set(itertools.accumulate(sizes))
    grouped = []
    group = []
    n_bytes = 0
    for piece in pieces:
        group.append(piece)
        n_bytes += len(piece)
        if n_bytes in ends:
            grouped.append(group)
            group = []
    if group:  # the text ends inside a character
        grouped.append(group)
    return [Group(group_text(group), len(group)) for group in grouped]


def group_text(pieces: list[bytes]) -> str:
    text = b"".join(pieces).decode("utf-8", "replace")
    return visible(text, keep="\n\t\\")


# In the terminal


class Shade(NamedTuple):
    """A colour for ranks up to a limit: one of the terminal's 256."""

    max_rank: float
    name: str
    colour: int


SHADES = (  # pale to strong
    Shade(10, "rank 1 to 10", 195),
    Shade(100, "to 100", 222),
    Shade(1000, "to 1,000", 209),
    Shade(math.inf, "beyond", 176),
)


def painted(text: str, rank: float, colours: bool) -> str:
    """Return text on the colour of a rank.

    It is coloured line by line, so that no colour runs to the edge of the terminal.
    """
    if not colours:
        return text
    colour = next(shade.colour for shade in SHADES if rank <= shade.max_rank)
    marked = text.replace("\n", "↵\n")
    return re.sub(r"[^\n]+", rf"\033[38;5;16;48;5;{colour}m\g<0>\033[0m", marked)


def percent(p: float) -> str:
    """Format a probability as the page does: 43.1%, 2.04%, 0.0031%, 1.7e-8%."""
    if p >= 0.1:
        return f"{100 * p:.1f}%"
    if p >= 0.001:
        return f"{100 * p:.2f}%"
    return f"{100 * p:#.2g}%".replace("e-0", "e-")


def n_columns(text: str) -> int:
    """Return how many columns of a terminal a text takes. A Chinese character takes two."""
    columns = 0
    for character in text:
        if unicodedata.east_asian_width(character) in "WF":
            columns += 2
        elif not unicodedata.combining(character):
            columns += 1
    return columns


def padded(text: str, width: int) -> str:
    """Cut or pad text to width columns of a terminal."""
    if n_columns(text) > width:
        while n_columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - n_columns(text))


def terminal_view(reading: Reading, encoder: Encoder, colours: bool) -> str:
    """Return the text in the colours of its ranks, surprising tokens, likely next ones, figures."""
    lines = [coloured_text(reading, encoder, colours), ""]
    if colours:
        legend = [painted(f" {each.name} ", each.max_rank, colours) for each in SHADES]
        lines = [" ".join(legend), "", *lines]
    lines.append(f"{'Most surprising':<24}{'probability':>12}{'rank':>8}   expected instead")
    lines += surprising_lines(reading, encoder)
    lines += ["", "Likeliest next"]
    lines += likeliest_lines(reading["predictions"][-1], encoder)
    lines += ["", summary(reading, encoder)]
    return "\n".join(lines)


def coloured_text(reading: Reading, encoder: Encoder, colours: bool) -> str:
    ranks = iter([each["rank"] for each in reading["predictions"][:-1]])
    pieces = []
    for group in groups(reading["ids"][1:], encoder):
        rank = max(itertools.islice(ranks, group.n_tokens))
        pieces.append(painted(group.text, rank, colours))
    return "".join(pieces)


def surprising_lines(reading: Reading, encoder: Encoder) -> list[str]:
    predictions = reading["predictions"]
    bits = [each["bits"] for each in predictions[:-1]]
    lines = []
    for i in np.argsort(np.negative(bits), kind="stable")[:N_LIKELIEST]:
        each = predictions[i]
        token = label(reading["ids"][i + 1], encoder)
        line = f"  {padded(token, 22)}"
        line += f"{percent(each['prob']):>12}{each['rank']:>8,}"
        if each["rank"] > 1:
            expected = label(each["likeliest"][0], encoder)
            line += f"   {expected}  {percent(each['probs'][0])}"
        lines.append(line)
    return lines


def likeliest_lines(following: Prediction, encoder: Encoder) -> list[str]:
    lines = []
    probs = following["probs"]
    for token_id, p in zip(following["likeliest"], probs, strict=True):
        token = padded(label(token_id, encoder), 22)
        lines.append(f"  {token}{percent(p):>12}   {bar(p / probs[0])}")
    return lines


def bar(share: float, width: int = 30) -> str:
    """Return a bar of at most width columns, in steps of an eighth."""
    eighths = max(1, round(8 * width * share))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def summary(reading: Reading, encoder: Encoder) -> str:
    """Return one line with the figures of a reading."""
    n_tokens, perplexity, bits_per_byte = figures(reading, encoder)
    if n_tokens == 0:
        return "0 tokens"
    noun = "token" if n_tokens == 1 else "tokens"
    return f"{n_tokens} {noun}, perplexity {perplexity:.2f}, {bits_per_byte:.4f} bits per byte"


def table(reading: Reading, encoder: Encoder) -> str:
    """Return one line per token: position, token, probability, rank, the three likeliest tokens.

    Tabs separate the columns.
    """
    lines = []
    for i, each in enumerate(reading["predictions"][:-1], 1):
        cells = [str(i), token_text(reading["ids"][i], encoder)]
        cells += [f"{each['prob']:.6g}", str(each["rank"])]
        cells += [token_text(token_id, encoder) for token_id in each["likeliest"][:3]]
        lines.append("\t".join(cells) + "\n")
    return "".join(lines)


# As a page


@no_warnings
def page(reading: Reading, model_size: str, encoder: Encoder, params: Params, n_head: int) -> str:
    """Return the page as one HTML text. It holds everything that it shows, and loads nothing."""
    ids = reading["ids"]
    lens = lens_columns(ids, params, n_head)
    n_ctx, n_embd = params["wpe"].shape
    attention = None
    if len(ids) - 1 <= MAX_ATTENTION_TOKENS:
        attention = packed_attention(ids, params, n_head)
    data = {
        "model": {
            "name": model_size,
            "n_layer": len(params["blocks"]),
            "n_head": n_head,
            "n_embd": n_embd,
            "n_ctx": n_ctx,
            "n_vocab": len(params["wte"]),
            "n_params": count_parameters(params),
        },
        "figures": figures(reading, encoder)._asdict(),
        "opening": opening_place(reading, lens, encoder),
        "n_left_out": reading["n_left_out"],
        "ids": ids,
        "labels": labels(reading, lens, encoder),
        "groups": groups(ids[1:], encoder),
        "predictions": [shortened(each) for each in reading["predictions"]],
        "lens": [[shortened(each) for each in layer] for layer in lens],
        "attention": attention,
        "n_attended": N_ATTENDED,
        "max_attention_tokens": MAX_ATTENTION_TOKENS,
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return filled_template(template, page_title(ids, encoder), data)


def page_title(ids: Ids, encoder: Encoder, n_max: int = 48) -> str:
    """Return the beginning of the text on one line, cut after a word."""
    text = visible(" ".join(encoder.decode(ids[1:]).split()))
    if len(text) <= n_max:
        return text
    words = text[:n_max].rsplit(" ", 1)[0]
    return words.rstrip(" ,.;:-") + "…"


def opening_place(reading: Reading, lens: Lens, encoder: Encoder) -> int:
    """Choose the token on which the page opens -> its place in ids.

    It is the word that the layers after the first one raised most: the one with the largest
    probability * log(rank after the first layer / final rank). A word is a token that begins with
    a space and two letters. If there is none, any token but the first is taken for a word.
    """
    ids = reading["ids"]
    if len(ids) == 1:
        return 1  # there is only the next token
    places = [i for i in range(1, len(ids)) if re.match(r" [^\W\d_]{2}", encoder.decode([ids[i]]))]
    if not places:
        places = list(range(2, len(ids))) or [1]
    early = lens[min(1, len(lens) - 2)]  # after the first layer; before it if it is the last one

    def rise(place: int) -> float:
        before = early[place - 1]
        after = lens[-1][place - 1]
        return after["prob"] * math.log(before["rank"] / after["rank"])

    return max(places, key=rise)


def shortened(described: Prediction) -> Prediction:
    """Return a prediction with as many digits as the page can show."""
    result = described | {"probs": [round_off(p) for p in described["probs"]]}
    if "prob" in described:
        result["prob"] = round_off(described["prob"])
        result["bits"] = round_off(described["bits"])
    return result


def round_off(value: float) -> float:
    return float(f"{value:.6g}")


def labels(reading: Reading, lens: Lens, encoder: Encoder) -> dict[int, str]:
    """Return the label of each token that the page shows."""
    shown = set(reading["ids"])
    for each in itertools.chain(reading["predictions"], *lens):
        shown.update(each["likeliest"])
    return {token_id: label(token_id, encoder) for token_id in sorted(shown)}


@with_own_threads
def lens_columns(ids: Ids, params: Params, n_head: int) -> Lens:
    """Return what each layer predicts after each token: for each layer a list of `prediction`s."""
    targets = [*ids[1:], None]
    layers = []
    for x in hidden_states(ids, params, n_head):
        logits = unembed(x, params)
        rows = zip(logits, targets, strict=True)
        layers.append([prediction(row, target, N_LENS) for row, target in rows])
    return layers


def packed_attention(ids: Ids, params: Params, n_head: int) -> str:
    """Return the attention weights as text: base64 of zlib of three arrays, one after the other.

    For the tokens that each token looks at most, strongest first, their places and the weights in
    1/65535: little-endian uint16 [n_layer, n_head, n_seq, N_ATTENDED] each. Then, for the pictures,
    the square roots of all weights in fifteenths: uint8 [n_layer, n_head, n_seq * (n_seq + 1) / 2],
    of each row only the past.
    """
    weights = attention_weights(ids, params, n_head)
    if not np.isfinite(weights).all():
        raise ValueError("the attention is not finite: the parameters are damaged")
    places = np.argsort(-weights, axis=-1, kind="stable")[..., :N_ATTENDED]
    strongest = np.take_along_axis(weights, places, axis=-1)
    rows, columns = np.tril_indices(len(ids))
    levels = np.sqrt(weights[:, :, rows, columns]) * 15
    content = places.astype("<u2").tobytes()
    content += np.rint(strongest * 65535).astype("<u2").tobytes()
    content += np.rint(levels).astype(np.uint8).tobytes()
    return base64.b64encode(zlib.compress(content)).decode()


def count_parameters(params: Any) -> int:
    """Return the number of parameters in a nested dict or list of arrays."""
    if isinstance(params, np.ndarray):
        return params.size
    if isinstance(params, dict):
        params = params.values()
    elif not isinstance(params, list):  # an option of a layer, not a parameter
        return 0
    return sum(count_parameters(each) for each in params)


def filled_template(template: str, title: str, data: dict[str, Any]) -> str:
    """Put title and data into the template, and let the browser run only its own script and style.

    The data are JSON in ASCII, without a character that could end the script element or begin
    another one.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    values = {"title": html.escape(title), "data": text}
    for tag in ("script", "style"):
        content = template.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = hashlib.sha256(content.encode()).digest()
        values[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    # In one pass, so that a text that looks like a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


# Writing the page


def check_place(path: str) -> None:
    """Raise OSError if write_whole could not write to this path. Called before the work."""
    if not os.path.basename(path):
        raise UsageError(f"--html needs the name of a file, got {path!r}")
    with named_errors(path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not is_special(path):
            part = part_of(path)
            part.touch()
            part.unlink()


def write_whole(path: str, text: str) -> None:
    """Write a file whole or not at all. Links are followed. Devices and pipes are written into."""
    with named_errors(path):
        if is_standard_output(path):  # opened again, a file would be written from its start
            output = sys.stdout.fileno()
            with open(output, "w", encoding="utf-8", closefd=False) as file:
                file.write(text)
        elif is_special(path):
            Path(path).write_text(text, encoding="utf-8")
        else:
            replace_file(path, text)


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Turn an OSError into one that names the file which cannot be written."""
    try:
        yield
    except BrokenPipeError:  # the reader needs no more
        raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def is_special(path: str) -> bool:
    """Tell whether this is a device or a pipe, which must not be replaced by a file."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def is_standard_output(path: str) -> bool:
    """Tell whether this is where standard output goes, as /dev/stdout is."""
    try:
        output = os.fstat(sys.stdout.fileno())
        return os.path.samestat(os.stat(path), output)
    except OSError:  # there is no such file, or standard output is not a file
        return False


def part_of(path: str) -> Path:
    """Return the path of the unfinished file, in the folder of the file that it will replace."""
    return Path(os.path.realpath(path)).with_name(f".look-{os.getpid()}.part")


def replace_file(path: str, text: str) -> None:
    target = os.path.realpath(path)
    part = part_of(path)
    try:
        part.write_text(text, encoding="utf-8")
        if os.path.exists(target):
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (is the text in quotes? --help lists the options)")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the words of the command line. Raises UsageError."""
    parser = Parser(
        "look.py",
        description="See what GPT-2 sees in a text.",
        epilog="In a pipe, each token is one line, tab-separated: position, token, probability, "
        "rank, and the three likeliest tokens. Colours are used only on a terminal, and not if "
        "NO_COLOR is set or TERM is dumb.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "text", metavar="TEXT", help="the text, in quotes; - reads it from standard input"
    )
    parser.add_argument(
        "--model_size", default="124M", help="a published size or a folder in models_dir (124M)"
    )
    parser.add_argument(
        "--models_dir", default="models", help="the folder that holds the models (models)"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page for the browser instead")
    return parser.parse_args(arguments)


def given_text(argument: str) -> str:
    """Return the text of the command line, or of standard input without its last line break."""
    if argument == "-":
        return re.sub("\r?\n\\Z", "", read_text("-"))
    return decoded(argument)


def has_colours() -> bool:
    environment = os.environ
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def run(arguments: list[str]) -> None:
    """Do what the command line asks."""
    options = parse_arguments(arguments)
    if options.html is not None:
        check_place(options.html)
    text = given_text(options.text)
    encoder, hparams, params = load_encoder_hparams_and_params(
        options.model_size, options.models_dir
    )
    n_head = hparams["n_head"]
    reading = read(text, encoder, params, n_head)
    if reading["n_left_out"]:
        n_tokens = len(reading["ids"]) - 1
        message = f"only the first {n_tokens:,} tokens fit into the context"
        complain(PROGRAM, f"{message}; {reading['n_left_out']:,} are left out")
    if options.html is not None:
        content = page(reading, options.model_size, encoder, params, n_head)
        write_whole(options.html, content)
        if not is_standard_output(options.html):
            print(f"{options.html}: {summary(reading, encoder)}")
    elif sys.stdout.isatty():
        print(terminal_view(reading, encoder, has_colours()))
    else:
        print(table(reading, encoder), end="")


def main(arguments: list[str]) -> int:
    """Run the command line -> exit status: 0, 1 after an error, 2 for unusable arguments."""
    return run_command(PROGRAM, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
