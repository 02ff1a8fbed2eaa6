"""Text in, text out: `continuation` and `main` on the tiny model and on scripted ids."""

import copy
import random

import numpy as np
import pytest
from helpers import (
    SMALL_HPARAMS,
    flat,
    float64_gpt2,
    float64_softmax,
    random_params,
    tiktoken_encoding,
    write_vocabulary,
)

import gpt2
from encoder import get_encoder


@pytest.fixture
def scripted(monkeypatch):
    """A function that makes gpt2.stream yield these rows -> a list of the rows asked for."""

    def script(rows):
        asked = []
        steps = (asked.append(row) or row for row in rows)
        monkeypatch.setattr(gpt2, "stream", lambda *args, **kwargs: steps)
        return asked

    return script


def test_main_returns_the_text_of_transformers_ids(models_dir, reference):
    encoding = tiktoken_encoding(models_dir, "tiny")
    for n_samples, n in (None, 100), (1, 20), (3, 20):
        text = gpt2.main("ROMEO:\nWhat light", n, "tiny", models_dir, n_samples=n_samples)
        expected = encoding.decode(reference["tiny/greedy"][:n].tolist())
        if n_samples == 3:
            line = "=" * 40
            samples = [f"{line} SAMPLE {i} {line}\n{expected}" for i in (1, 2, 3)]
            expected = "\n".join(samples)
        assert text == expected


def test_main_checks_its_options_before_it_loads_anything(tmp_path):
    for name, value in {"n_tokens_to_generate": -1, "top_p": 2.0, "n_samples": 0}.items():
        with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}$"):
            gpt2.main("hi", model_size="missing", models_dir=str(tmp_path), **{name: value})


def test_continuation_streams_each_token(tiny, scripted):
    """The first piece comes after the first token, and together they are the text."""
    text = "But, soft!\nwhat light"
    ids = tiny[0].encode(text)
    asked = scripted([[i] for i in ids])
    pieces = gpt2.continuation("ROMEO:", tiny, 12)
    shown = ""
    for n in range(1, len(ids) + 1):
        shown += next(pieces)
        assert shown == tiny[0].decode(ids[:n])
        assert len(asked) == n
    assert shown + "".join(pieces) == text


def test_token_log_probs(tiny):
    """The first token counts. Together, the parts have the probability of the whole text."""
    encoder, hparams, params = tiny
    text = "O Romeo, Romeo! wherefore art thou Romeo?"
    ids = [encoder.start_id, *encoder.encode(text)]
    exact = np.log(float64_softmax(float64_gpt2(ids, params, hparams["n_head"])))
    exact = exact[np.arange(len(ids) - 1), ids[1:]]
    tokens, found = zip(*gpt2.token_log_probs(text, tiny), strict=True)
    assert "".join(tokens) == text
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)
    context = "O Romeo, Romeo!"
    after = gpt2.token_log_probs(text[len(context) :], tiny, context)
    without_start = np.log(float64_softmax(float64_gpt2(ids[1:], params, hparams["n_head"])))
    exact = without_start[np.arange(len(ids) - 2), ids[2:]][-len(after) :]
    np.testing.assert_allclose([each for _, each in after], exact, rtol=0, atol=1e-4)
    assert gpt2.token_log_probs("", tiny, "O") == []
    with pytest.raises(ValueError, match="joins the end of the context to the text: 'The kin'"):
        gpt2.token_log_probs("g", tiny, "The kin")
    encoder = copy.copy(encoder)
    encoder.start_id = None
    with pytest.raises(ValueError, match="no token that starts a text; give a context"):
        gpt2.token_log_probs(text, (encoder, hparams, params))


# Stop texts


def test_text_ends_before_the_first_stop(tiny, scripted):
    """Random parts of three texts, from anywhere in a token, and texts that do not occur."""
    encoder, hparams, params = tiny
    options = {"temperature": 0.9, "seed": 5, "n_samples": 3}
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 50, **options)
    samples = [encoder.decode(row) for row in ids]
    rng = random.Random(0)
    for _ in range(50):
        sample = rng.choice(samples)
        start = rng.randrange(len(sample))
        stop = sample[start : start + rng.randint(1, 8)] + rng.choice(["", "", "~"])
        scripted(zip(*ids, strict=True))
        texts = gpt2.continuations("ROMEO:", tiny, 3, 50, stop=iter([stop]))
        assert texts == [sample.partition(stop)[0] for sample in samples], stop


@pytest.mark.parametrize("stop", ["ï", "😁", "😁 中", "文 naïve 😁", "中中", "😂", "\ud83d\ude01"])
def test_stop_inside_characters_and_across_tokens(tiny, scripted, stop):
    """The tiny vocabulary has no tokens for these characters, so each is several ids."""
    text = "naïve 😀😁 中文 naïve 😁"
    ids = tiny[0].encode(text)
    assert len(ids) > len(text)
    scripted([[i] for i in ids])
    pieces = gpt2.continuation("hi", tiny, len(ids), stop=stop)
    stop = stop.replace("\ud83d\ude01", "😁")  # a surrogate pair means this character
    assert "".join(pieces) == text.partition(stop)[0]


@pytest.mark.parametrize("collection", [set, list, iter, np.array, dict.fromkeys])
def test_any_of_several_stops_ends_the_text(tiny, scripted, collection):
    ids = tiny[0].encode("and so we end")
    scripted([[i, i] for i in ids])
    texts = gpt2.continuations("hi", tiny, 2, len(ids), stop=collection(["we", "so", "z"]))
    assert texts == ["and ", "and "]


@pytest.mark.parametrize("stop", [b"x", [b"x"], 5, 0, ["x", None], [["x"]]])
def test_stops_that_are_not_texts(tiny, stop):
    with pytest.raises(TypeError):
        next(gpt2.continuation("hi", tiny, stop=stop))


@pytest.mark.parametrize(
    ("columns", "samples", "n_asked"),
    [
        (["abXcdefgh", "abcdXefgh"], ["ab", "abcd"], 5),  # no work after both have stopped
        (["Xaa", "aa."], ["", "aa"], 3),  # one stops, the other ends
    ],
)
def test_samples_stop_one_by_one(tiny, scripted, columns, samples, n_asked):
    ids = tiny[0].encoder | {".": None}  # each letter is a token
    rows = [[ids[letter] for letter in row] for row in zip(*columns, strict=True)]
    asked = scripted(rows)
    assert gpt2.continuations("hi", tiny, 2, 9, stop="X") == samples
    assert len(asked) == n_asked


# Where a text begins and ends


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A function that returns a new (encoder, hparams, params) with the small vocabulary."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder / "small")

    def new_model(**changes):
        hparams = SMALL_HPARAMS | changes
        return get_encoder("small", str(folder)), hparams, random_params(hparams)

    return new_model


def test_endoftext_ends_the_text_and_an_empty_prompt_starts_from_it(small, monkeypatch):
    model = small()
    encoder = model[0]
    end = SMALL_HPARAMS["n_vocab"] - 1
    asked = []

    def stream(ids, *args, stop_id, **options):
        asked.append((ids, set(stop_id)))
        return iter(())

    monkeypatch.setattr(gpt2, "stream", stream)
    for prompt in "", "hi":
        assert "".join(gpt2.continuation(prompt, model)) == ""
    assert asked == [([end], {end}), (encoder.encode("hi"), {end})]
    encoder.start_id = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(gpt2.continuation("", model))


ENDS = {"replace": "\ufffd", "ignore": "", "backslashreplace": r"\xf0\x9f\x98", "strict": None}


@pytest.mark.parametrize("errors", ENDS)
def test_incomplete_characters_wait_for_their_rest(small, errors):
    """A model that always answers with the next byte of a text that ends inside a character."""
    encoder, hparams, params = small(n_embd=256, n_head=1, n_layer=1)
    encoder.errors = errors
    ids = encoder.encode("😀é")  # six bytes, six tokens
    for name, array in flat(params).items():
        array[:] = 1 if name.endswith("/g") else 0
    for position, i in enumerate([*ids, *ids[:3]], 1):
        params["wpe"][position, i] = 100.0
        params["wte"][i, i] = 1.0
    pieces = gpt2.continuation("aa", (encoder, hparams, params), 9)
    assert [next(pieces) for _ in range(9)] == ["", "", "", "😀", "", "é", "", "", ""]
    if errors == "strict":
        with pytest.raises(UnicodeDecodeError):
            list(pieces)
    else:
        assert "".join(pieces) == ENDS[errors]
