"""See what GPT-2 sees in a text: in the terminal, as a table for other programs, or as a page for the browser.

    python -m examples.look "To be, or not to be" --model_size tiny
    python -m examples.look - --model_size 124M --html page.html < text.txt

`logit_lens` and `attention_weights` stand alone: copy them into a notebook together with `hidden_states` and `unembed`.
The dimensions have the names that gpt2.py explains at its top.
"""

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import regex

from gpt2 import causal_mask, gpt2, layer_norm, linear, matmul, softmax, transformer_block

START = "<|endoftext|>"  # stands before the text, so that the first token is predicted, too
N_LIKELIEST = 10
N_LENS = 3  # how many tokens the page shows for each layer
MAX_ATTENTION_TOKENS = 256
TEMPLATE = Path(__file__).with_name("look.html")

# Inside the model


def hidden_states(ids, params, n_head):
    """Return the input of each layer and the output of the last one: ids [n_seq] -> [n_layer + 1, n_seq, n_embd]."""
    states = [params["wte"][ids] + params["wpe"][: len(ids)]]
    for block in params["blocks"]:
        states.append(transformer_block(states[-1], **block, n_head=n_head))
    return np.stack(states)


def unembed(x, params):
    """Predict the next token from hidden states, as the last lines of `gpt2` do: [..., n_embd] -> [..., n_vocab]."""
    return matmul(layer_norm(x, **params["ln_f"]), params["wte"].T)


def logit_lens(ids, params, n_head):
    """Predict the next tokens after each layer: ids [n_seq] -> logits [n_layer + 1, n_seq, n_vocab].

    logit_lens(...)[k] is what `gpt2` returns for a model that consists of the first k layers. The last one is what the
    model itself returns. The array is large: 261 MB for 100 tokens and 124M. To see one layer at a time, call
    `unembed` on each of the `hidden_states`. The method is nostalgebraist's ("interpreting GPT: the logit lens", 2020).
    """
    return np.stack([unembed(x, params) for x in hidden_states(ids, params, n_head)])


def attention_weights(ids, params, n_head):
    """Return how strongly each token looks at each other: ids [n_seq] -> [n_layer, n_head, n_seq, n_seq].

    weights[layer, head, i, j] is the weight of token j's value for token i. It is 0 for j > i, which is in the future.
    The sum over j is 1.
    """
    weights, n_seq = [], len(ids)
    for x, block in zip(hidden_states(ids, params, n_head), params["blocks"], strict=False):
        qkv = linear(
            layer_norm(x, **block["ln_1"]), **block["attn"]["c_attn"]
        )  # [n_seq, 3 * n_embd]
        q, k, _ = qkv.reshape(n_seq, 3, n_head, -1).transpose(
            1, 2, 0, 3
        )  # [n_head, n_seq, d_head] each
        scores = q / math.sqrt(q.shape[-1]) @ k.swapaxes(-1, -2)  # [n_head, n_seq, n_seq]
        weights.append(softmax(scores + causal_mask(n_seq, n_seq)))
    return np.stack(weights)


# Reading a text


def read(text, encoder, params, n_head):
    """Run the model over a text -> {"ids", "n_left_out", "predictions"}.

    ids: START, then the tokens of the text, as many as fit into the context. n_left_out: how many do not fit.
    predictions: for each token of the text what `prediction` returns, then one for the token that would follow.
    """
    if START not in encoder.encoder:
        raise ValueError(f"the vocabulary has no {START}, which must stand before the first token")
    if not text:
        raise ValueError("the text is empty")
    text_ids, n_max = encoder.encode(text), len(params["wpe"]) - 1
    ids = [encoder.encoder[START], *text_ids[:n_max]]
    logits = gpt2(ids, **params, n_head=n_head)
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite: the parameters are damaged")
    predictions = [
        prediction(row, target) for row, target in zip(logits, [*ids[1:], None], strict=True)
    ]
    return {"ids": ids, "n_left_out": len(text_ids) - len(ids) + 1, "predictions": predictions}


def prediction(logits, target=None, n_likeliest=N_LIKELIEST):
    """Describe what logits [n_vocab] predict -> {"likeliest": ids, "probs": their probabilities, descending}.

    For a target id also {"prob", "rank", "bits"}. Rank 1 is the likeliest token. bits is -log2(prob).
    """
    log_p = logits - logits.max()
    log_p -= np.log(np.exp(log_p).sum())
    likeliest = np.argpartition(-logits, min(n_likeliest, len(logits)) - 1)[:n_likeliest]
    likeliest = likeliest[np.lexsort((likeliest, -logits[likeliest]))]
    described = {"likeliest": likeliest.tolist(), "probs": np.exp(log_p[likeliest]).tolist()}
    if target is not None:
        rank = 1 + int((logits > logits[target]).sum())
        described |= {
            "prob": float(np.exp(log_p[target])),
            "rank": rank,
            "bits": float(-log_p[target] / math.log(2)),
        }
    return described


def figures(reading, encoder):
    """Return (number of tokens, perplexity, bits per byte) of a reading, START not counted."""
    bits = [each["bits"] for each in reading["predictions"][:-1]]
    n_bytes = len(encoder.decode_bytes(reading["ids"][1:]))
    return len(bits), float(np.exp2(np.mean(bits))), sum(bits) / n_bytes


# Tokens as text


def visible(text, keep=""):
    r"""Write backslashes, and what would act instead of being seen, as escapes: a line break as \n, a byte as \xf0.

    keep: characters to leave as they are. Bytes are lone surrogates, as the error handler "surrogateescape" makes them.
    """
    characters = []
    for character in regex.findall(
        r"\X", text
    ):  # as people see them; an emoji may be several code points
        category = unicodedata.category(character[0])
        if category == "Cs":
            character = f"\\x{ord(character) - 0xDC00:02x}"
        elif character not in keep and (category in ("Cc", "Cf", "Zl", "Zp") or character == "\\"):
            character = character.encode("unicode_escape").decode()
        characters.append(
            "◌" * category.startswith("M") + character
        )  # an accent alone needs something to stand on
    return "".join(characters)


def token_text(token_id, encoder):
    """Return a token as visible text. An id that only pads the vocabulary becomes its number in brackets."""
    if token_id not in encoder.decoder:
        return f"[{token_id}]"
    return visible(encoder.decode_bytes([token_id]).decode("utf-8", "surrogateescape"))


def label(token_id, encoder):
    """Return a token as visible text, with its spaces marked."""
    return token_text(token_id, encoder).replace(" ", "␣")


def groups(ids, encoder):
    """Group tokens that share a character -> list of (text, number of tokens). Most groups have one token.

    A character is what people see as one: an emoji, a letter with its accents.
    """
    pieces = [encoder.decode_bytes([token_id]) for token_id in ids]
    characters = regex.findall(r"\X", b"".join(pieces).decode("utf-8", "ignore"))
    ends = set(itertools.accumulate(len(character.encode()) for character in characters))
    grouped, group, n_bytes = [], [], 0
    for i, piece in enumerate(pieces, 1):
        group.append(piece)
        n_bytes += len(piece)
        if n_bytes in ends or i == len(pieces):
            grouped.append(
                (visible(b"".join(group).decode("utf-8", "replace"), keep="\n\t\\"), len(group))
            )
            group = []
    return grouped


# In the terminal

RANKS = {
    10: 195,
    100: 222,
    1000: 209,
    math.inf: 176,
}  # up to this rank: this one of the 256 colours, pale to strong


def painted(text, rank, colours):
    """Return text on the colour of a rank, line by line, so that no colour runs to the edge of the terminal."""
    if not colours:
        return text
    colour = next(colour for limit, colour in RANKS.items() if rank <= limit)
    return re.sub(r"[^\n]+", rf"\033[38;5;16;48;5;{colour}m\g<0>\033[0m", text.replace("\n", "↵\n"))


def percent(p):
    """Format a probability as the page does: 43.1%, 2.04%, 0.0031%, 1.7e-8%."""
    digits = f"{100 * p:.1f}" if p >= 0.1 else f"{100 * p:.2f}" if p >= 0.001 else f"{100 * p:#.2g}"
    return digits.replace("e-0", "e-") + "%"


def padded(text, width):
    """Cut or pad text to so many columns of a terminal, where a Chinese character or an emoji takes two."""
    columns = 0
    for i, character in enumerate(text):
        columns += (
            0
            if unicodedata.combining(character)
            else 1 + (unicodedata.east_asian_width(character) in "WF")
        )
        if columns > width - (i + 1 < len(text)):
            return padded(text[:i] + "…", width)
    return text + " " * (width - columns)


def terminal_view(reading, encoder, colours):
    """Return the text in the colours of its ranks, the most surprising tokens, the next tokens, and the figures."""
    *predictions, following = reading["predictions"]
    lines = [""]
    if colours:
        names = "rank 1 to 10", "to 100", "to 1,000", "beyond"
        legend = [
            painted(f" {name} ", limit, colours) for name, limit in zip(names, RANKS, strict=True)
        ]
        lines = [" ".join(legend), ""]
    ranks = iter([each["rank"] for each in predictions])
    for text, n_tokens in groups(reading["ids"][1:], encoder):
        lines[-1] += painted(text, max(itertools.islice(ranks, n_tokens)), colours)
    lines += ["", f"{'Most surprising':<24}{'probability':>12}{'rank':>8}   expected instead"]
    surprising = sorted(
        zip(predictions, reading["ids"][1:], strict=True), key=lambda pair: -pair[0]["bits"]
    )
    for each, token_id in surprising[:N_LIKELIEST]:
        expected = (
            f"{label(each['likeliest'][0], encoder)}  {percent(each['probs'][0])}"
            if each["rank"] > 1
            else ""
        )
        numbers = f"{percent(each['prob']):>12}{each['rank']:>8,}"
        lines.append(f"  {padded(label(token_id, encoder), 22)}{numbers}   {expected}".rstrip())
    lines += ["", "Likeliest next"]
    for token_id, p in zip(following["likeliest"], following["probs"], strict=True):
        eighths = max(1, round(30 * 8 * p / following["probs"][0]))
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"  {padded(label(token_id, encoder), 22)}{percent(p):>12}   {bar}")
    return "\n".join([*lines, "", summary(reading, encoder)])


def summary(reading, encoder):
    """Return one line with the figures of a reading."""
    n_tokens, perplexity, bits_per_byte = figures(reading, encoder)
    return f"{n_tokens} token{'s' * (n_tokens != 1)}, perplexity {perplexity:.2f}, {bits_per_byte:.4f} bits per byte"


def table(reading, encoder):
    """Return one line per token, tab-separated: position, token, probability, rank, the three likeliest tokens."""
    lines = []
    for i, (token_id, each) in enumerate(
        zip(reading["ids"][1:], reading["predictions"], strict=False), 1
    ):
        token, *likeliest = (
            token_text(some_id, encoder) for some_id in (token_id, *each["likeliest"][:3])
        )
        lines.append(
            "\t".join([str(i), token, f"{each['prob']:.6g}", str(each["rank"]), *likeliest])
        )
    return "\n".join(lines)


# As a page


def page(reading, model_size, encoder, params, n_head):
    """Return the page as one HTML text. It holds everything that it shows, and loads nothing."""
    ids = reading["ids"]
    n_tokens, perplexity, bits_per_byte = figures(reading, encoder)
    lens = lens_columns(ids, params, n_head)
    shown = {
        *ids,
        *(
            i
            for each in [*reading["predictions"], *itertools.chain(*lens)]
            for i in each["likeliest"]
        ),
    }
    n_ctx, n_embd = params["wpe"].shape
    data = {
        "model": {
            "name": model_size,
            "n_layer": len(params["blocks"]),
            "n_head": n_head,
            "n_embd": n_embd,
        }
        | {"n_ctx": n_ctx, "n_vocab": len(params["wte"]), "n_params": count_parameters(params)},
        "figures": {"n_tokens": n_tokens, "perplexity": perplexity, "bits_per_byte": bits_per_byte},
        "n_left_out": reading["n_left_out"],
        "ids": ids,
        "labels": {token_id: label(token_id, encoder) for token_id in sorted(shown)},
        "groups": groups(ids[1:], encoder),
        "predictions": reading["predictions"],
        "lens": lens,
        "attention": packed_attention(ids, params, n_head)
        if n_tokens <= MAX_ATTENTION_TOKENS
        else None,
        "max_attention_tokens": MAX_ATTENTION_TOKENS,
    }
    return filled_template(TEMPLATE.read_text(encoding="utf-8"), data)


def lens_columns(ids, params, n_head):
    """Return what each layer predicts after each token -> for each layer a list of `prediction`s."""
    targets = [*ids[1:], None]
    return [
        [
            prediction(row, target, N_LENS)
            for row, target in zip(unembed(x, params), targets, strict=True)
        ]
        for x in hidden_states(ids, params, n_head)
    ]


def packed_attention(ids, params, n_head):
    """Return the attention weights as text, in 16 bits each: base64 of zlib of all high bytes, then all low bytes.

    Each half is [n_layer, n_head, n_seq * (n_seq + 1) / 2]: of the weights only the past, row by row.
    """
    rows, columns = np.tril_indices(len(ids))
    weights = attention_weights(ids, params, n_head)[:, :, rows, columns]
    sixteen_bits = np.rint(weights * 65535).astype(np.uint16)
    halves = np.stack([sixteen_bits >> 8, sixteen_bits & 255]).astype(np.uint8)
    return base64.b64encode(zlib.compress(halves.tobytes())).decode()


def count_parameters(params):
    """Return the number of parameters in a nested dict or list of arrays."""
    if isinstance(params, np.ndarray):
        return params.size
    return sum(map(count_parameters, params.values() if isinstance(params, dict) else params))


def filled_template(template, data):
    """Put data into the template, and let the browser run the template's own script and style only.

    The data are JSON in ASCII, without a character that could end the script element or begin another one.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    for tag in "script", "style":
        content = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace("{{" + tag + "}}", f"'sha256-{digest}'")
    return template.replace("{{data}}", text)


def write_whole(path, text):
    """Write a file whole or not at all."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


# The command line


def parse_arguments(arguments):
    """Parse the words of the command line. Exits with status 2 and one line if they are unusable."""
    parser = argparse.ArgumentParser(
        "python -m examples.look",
        description="See what GPT-2 sees in a text.",
        epilog="In a pipe, each token is one line, tab-separated: position, token, probability, rank, and the three "
        "likeliest tokens. Colours are used on a terminal only, and not if NO_COLOR is set.",
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

    def fail(message):
        sys.exit(complain(f"{message} (is the text in quotes? --help lists the options)", 2))

    parser.error = fail
    return parser.parse_args(arguments)


@np.errstate(
    over="ignore", invalid="ignore"
)  # damaged parameters give one error, not many warnings
def run(options):
    """Do what the command line asks."""
    from utils import load_encoder_hparams_and_params

    if options.text == "-":
        text = re.sub("\r?\n\\Z", "", sys.stdin.buffer.read().decode("utf-8"))
    else:
        text = os.fsencode(options.text).decode("utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params(
        options.model_size, options.models_dir
    )
    reading = read(text, encoder, params, hparams["n_head"])
    if reading["n_left_out"]:
        n_tokens, n_left_out = len(reading["ids"]) - 1, reading["n_left_out"]
        complain(
            f"only the first {n_tokens:,} tokens fit into the context; {n_left_out:,} are left out"
        )
    if options.html is not None:
        write_whole(
            options.html, page(reading, options.model_size, encoder, params, hparams["n_head"])
        )
        print(f"{options.html}: {summary(reading, encoder)}")
    elif sys.stdout.isatty():
        print(terminal_view(reading, encoder, colours=not os.environ.get("NO_COLOR")))
    else:
        print(table(reading, encoder))
    sys.stdout.flush()


def complain(message, status=0):
    """Print one line on standard error -> status."""
    with contextlib.suppress(OSError):
        print("look.py:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    return status


def main(arguments):
    """Run the command line -> exit status: 0, 1 after an error, 2 for unusable arguments, 130 after Ctrl-C."""
    from utils import robust_streams

    with robust_streams():
        try:
            run(parse_arguments(arguments))
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # nobody reads on
            return 0
        except UnicodeDecodeError as error:
            return complain(f"the text is not UTF-8: {error}", 1)
        except (ValueError, OSError, ImportError, MemoryError, OverflowError) as error:
            return complain(str(error) or "out of memory", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
