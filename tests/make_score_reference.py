"""Make tests/data/score.json: texts after contexts, scored by transformers, for test_score.py.

    pip install torch transformers tiktoken && python tests/make_score_reference.py

The model is the random one of helpers.random_variables with helpers.SMALL_HPARAMS.
"""

import functools
import json
import random
import tempfile
from pathlib import Path

from helpers import (
    DATA_DIR,
    SMALL_HPARAMS,
    random_variables,
    tiktoken_encoding,
    write_vocabulary,
)

N_CTX = SMALL_HPARAMS["n_ctx"]
END = SMALL_HPARAMS["n_vocab"] - 1
PARTS = [
    "the",
    "re",
    " and",
    " an",
    "other",
    " in",
    "ing",
    " ",
    "\n",
    "\t ",
    "é",
    "漢字",
    "🙂",
    "\u3000",
    ".",
]


def random_pairs(n, seed):
    """Contexts and texts, each of up to 50 tokens; some are empty or only white space."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        context = "".join(rng.choices(PARTS, k=rng.choice([0, 1, 2, 5, 12, 25])))
        text = "".join(rng.choices(PARTS, k=rng.choice([0, 1, 2, 5, 12, 25])))
        pairs.append((context + rng.choice(["", "", " ", "  ", "\n"]), text))
    return pairs


def apply_rule(context, text, encode):
    """The rule of lm-evaluation-harness for a text after a context -> (ids, number of the text's).

    White space at the end of the context belongs to the text. Both are encoded together, and the
    first len(encode(context)) ids are the context's. An empty context is end-of-text. Of more than
    n_ctx + 1 ids, the context loses its first ones. A text that alone leaves no place for a
    context is scored as without one.
    """
    whole = encode(context + text)
    context = context.rstrip()
    before = encode(context) if context else [END]
    after = whole[len(before) :] if context else whole
    if len(after) > N_CTX:
        before = [END]
    return [*before, *after][-max(N_CTX, len(after)) - 1 :], len(after)


def windows(n_ids, n_ctx):
    """(begin, end, first target) of each window of transformers' guide, with a stride of n_ctx / 2.

    A text that fits is one window.
    """
    if n_ids <= n_ctx + 1:
        return [(0, n_ids, 1)]
    found = []
    n_scored = 1
    for begin in range(0, n_ids, n_ctx // 2):
        end = min(begin + n_ctx, n_ids)
        found.append((begin, end, n_scored))
        n_scored = end
        if end == n_ids:
            return found


def score(ids, predict, n_ctx=N_CTX):
    """[(nats, is the likeliest)] of each id but the first. predict(ids) -> log-probabilities."""
    scores = []
    for begin, end, first in windows(len(ids), n_ctx):
        log_probs = predict(ids[begin : end - 1])
        for i in range(first, end):
            row = log_probs[i - 1 - begin]
            scores.append((-float(row[ids[i]]), int(row.argmax()) == ids[i]))
    return scores


def expected(context, text, encode, predict):
    """What score.py must find, with predict(ids) -> log-probabilities [n_seq, n_vocab]."""
    ids, n_text = apply_rule(context, text, encode)
    scores = score(ids, predict)[len(ids) - 1 - n_text :] if n_text else []
    if n_text <= N_CTX:
        ids = ids[-N_CTX:]
    return {
        "token_nats": [nats for nats, _ in scores],
        "greedy": all(is_likeliest for _, is_likeliest in scores),
        "end_nats": score([*ids, END], predict)[-1][0],
    }


def likely_pairs(pairs, encoding, predict):
    """The contexts with the likeliest token as the text, where that is a text."""
    for context, _ in pairs:
        ids, _ = apply_rule(context, "", encoding.encode_ordinary)
        token = encoding.decode_single_token_bytes(int(predict(ids[-N_CTX:])[-1].argmax()))
        text = token.decode("utf-8", "ignore")
        if context and context == context.rstrip() and text.encode() == token:
            yield context, text


def main():
    import torch
    from make_reference import predict, torch_model

    model = torch_model(SMALL_HPARAMS, random_variables(SMALL_HPARAMS))
    predict = functools.partial(predict, model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_vocabulary(Path(folder) / "small")
        encoding = tiktoken_encoding(folder, "small")
        pairs = random_pairs(200, seed=1)
        rows = []
        for context, text in [*pairs, *likely_pairs(pairs, encoding, predict)]:
            row = {"context": context, "text": text}
            row |= expected(context, text, encoding.encode_ordinary, predict)
            rows.append(row | {"token_nats": [round(nats, 5) for nats in row["token_nats"]]})
    (DATA_DIR / "score.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


if __name__ == "__main__":
    main()
