"""Text in, text out: `continuation` and `main` on the tiny model and on scripted ids."""

import random
import re

import pytest
from helpers import REAL_MODELS_DIR, copy_model, random_variables, save_variables, write_model

import gpt2
from utils import load_encoder_hparams_and_params

HEADING = re.compile(r"^=+ SAMPLE (\d+) =+\n", re.MULTILINE)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A copy of the tiny model, so that the tests leave no record in the repository."""
    return str(
        copy_model(REAL_MODELS_DIR / "tiny", tmp_path_factory.mktemp("models") / "tiny").parent
    )


@pytest.fixture(scope="module")
def tiny(models_dir):
    return load_encoder_hparams_and_params("tiny", models_dir)


def samples_of(text):
    """The samples under their headings; the newline before the next heading is not part of a sample."""
    start, *parts = HEADING.split(text)
    assert start == ""
    numbers, samples = parts[::2], parts[1::2]
    assert numbers == [str(i + 1) for i in range(len(samples))]
    assert all(sample.endswith("\n") for sample in samples[:-1])
    return [*(sample[:-1] for sample in samples[:-1]), samples[-1]]


def scripted(monkeypatch, rows):
    """Make gpt2.stream yield these rows -> a list of the rows that were asked for."""
    asked = []
    monkeypatch.setattr(
        gpt2, "stream", lambda *args, **kwargs: (asked.append(row) or row for row in rows)
    )
    return asked


def test_main_returns_the_text_of_the_ids(tiny, models_dir):
    encoder, hparams, params = tiny
    ids = gpt2.generate(
        encoder.encode("ROMEO:"), params, hparams["n_head"], 40, temperature=0.9, seed=3
    )
    assert gpt2.main("ROMEO:", 40, "tiny", models_dir, temperature=0.9, seed=3) == encoder.decode(
        ids
    )
    assert gpt2.main(
        "ROMEO:", 40, "tiny", models_dir, temperature=0.9, seed=3, n_samples=None
    ) == encoder.decode(ids)


def test_several_samples_have_headings(tiny, models_dir):
    encoder, hparams, params = tiny
    options = {"temperature": 0.9, "seed": 3, "n_samples": 3}
    rows = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 40, **options)
    text = gpt2.main("ROMEO:", 40, "tiny", models_dir, **options)
    assert samples_of(text) == [encoder.decode(row) for row in rows]
    assert not text.endswith("\n")  # whoever prints it ends the line


BAD_OPTIONS = {
    "n_tokens_to_generate": (-1, "a whole number, 0 or more"),
    "temperature": (-0.5, "a number, 0 or more"),
    "top_k": (-1, "a whole number, 0 or more"),
    "top_p": (2.0, "above 0 and at most 1"),
    "seed": (-1, "a whole number, 0 or more"),
    "n_samples": (0, "a whole number from 1 to 100000"),
    "stop": ("", "a non-empty text"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_main_checks_its_options_before_it_loads_anything(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "utils.load_encoder_hparams_and_params", lambda *_: pytest.fail("a model was loaded")
    )
    value, words = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=f"^{name} must be {words}, got {value!r}$"):
        gpt2.main("hi", **{"models_dir": str(tmp_path), name: value})


def test_continuation_streams_each_token(tiny, monkeypatch):
    """The first piece comes after the first token, and together they are the text."""
    encoder, hparams, params = tiny
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 12)
    steps = scripted(
        monkeypatch,
        gpt2.stream(encoder.encode("ROMEO:"), params, hparams["n_head"], 12, n_samples=1),
    )
    for n, piece in enumerate(gpt2.continuation("ROMEO:", tiny, 12), 1):
        assert piece == (encoder.decode(ids[n - 1 : n]) if n <= 12 else "")
        assert len(steps) == min(n, 12)


# Stop texts


@pytest.mark.parametrize("n_samples", [None, 1, 3])
def test_text_ends_before_the_first_stop(tiny, models_dir, n_samples):
    """Random parts of the full text, which begin and end anywhere in a token, and texts that do not occur."""
    options = {"temperature": 0.9, "seed": 5, "n_samples": n_samples}
    full = gpt2.main("ROMEO:", 50, "tiny", models_dir, **options)
    samples = samples_of(full) if n_samples == 3 else [full]
    rng = random.Random(n_samples)
    for _ in range(25):
        sample = rng.choice(samples)
        start = rng.randrange(len(sample))
        stop = sample[start : start + rng.randint(1, 8)] + rng.choice(["", "", "~"])
        text = gpt2.main("ROMEO:", 50, "tiny", models_dir, **options, stop=stop)
        expected = [sample[: sample.find(stop)] if stop in sample else sample for sample in samples]
        assert (samples_of(text) if n_samples == 3 else [text]) == expected, stop


def test_stop_inside_characters_and_across_tokens(tiny, monkeypatch):
    """The tiny vocabulary has no tokens for these characters, so each is several ids."""
    encoder, text = tiny[0], "naïve 😀😁 中文 naïve 😁"
    ids = encoder.encode(text)
    assert len(ids) > len(text)
    for stop in ("ï", "😁", "😀😁", "😁 中", "e 😁", "文 naïve 😁", "中中", "😁😁", "😂"):
        scripted(monkeypatch, [[i] for i in ids])
        pieces = list(gpt2.continuation("hi", tiny, len(ids), stop=stop))
        assert "".join(pieces) == (text[: text.find(stop)] if stop in text else text)


def test_no_work_after_all_samples_have_stopped(tiny, monkeypatch):
    ids = tiny[0].encoder  # each letter is a token
    asked = scripted(
        monkeypatch, [[ids[a], ids[b]] for a, b in zip("abXcdefgh", "abcdXefgh", strict=True)]
    )
    text = "".join(gpt2.continuation("hi", tiny, 9, n_samples=2, stop="X"))
    assert samples_of(text) == ["ab", "abcd"]
    assert len(asked) == 5


def test_one_sample_stops_and_the_other_ends(tiny, monkeypatch):
    x, a = tiny[0].encoder["X"], tiny[0].encoder["a"]
    scripted(monkeypatch, [[x, a], [a, a], [a, None]])
    assert samples_of("".join(gpt2.continuation("hi", tiny, 9, n_samples=2, stop="X"))) == [
        "",
        "aa",
    ]


# Where a text begins and ends


def test_endoftext_ends_the_text_and_an_empty_prompt_starts_from_it(tiny, monkeypatch):
    encoder, calls = tiny[0], []
    end = encoder.encoder["<|endoftext|>"]
    monkeypatch.setattr(
        gpt2,
        "stream",
        lambda ids, *args, stop_id, **kwargs: calls.append((ids, stop_id)) or iter(()),
    )
    assert "".join(gpt2.continuation("", tiny)) == "".join(gpt2.continuation("hi", tiny)) == ""
    assert calls == [([end], end), (encoder.encode("hi"), end)]


def test_a_vocabulary_without_endoftext(tmp_path):
    hparams = {"n_vocab": 268, "n_ctx": 8, "n_embd": 4, "n_head": 1, "n_layer": 1}
    path = write_model(tmp_path / "small", hparams) / "encoder.json"
    path.write_text(path.read_text().replace(', "<|endoftext|>": 268', ""))
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>"):
        gpt2.main("", 1, "small", str(tmp_path))
    assert gpt2.main("the", 1, "small", str(tmp_path))


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ("replace", "😀é\ufffd"),
        ("ignore", "😀é"),
        ("backslashreplace", r"😀é\xf0\x9f\x98"),
        ("strict", None),
    ],
)
def test_incomplete_characters_wait_for_their_rest(tmp_path, errors, text):
    """A model that always answers with the next byte: characters come whole, and what is left comes at the end."""
    hparams = {"n_vocab": 269, "n_ctx": 16, "n_embd": 256, "n_head": 1, "n_layer": 1}
    model_dir, variables = write_model(tmp_path / "small", hparams), random_variables(hparams)
    encoder, _, _ = load_encoder_hparams_and_params("small", str(tmp_path))
    ids = encoder.encode("😀é")  # six bytes, six tokens
    for name, array in variables.items():
        array[:] = 0 if not name.endswith("/g") else 1
    for position, i in enumerate([*ids, ids[0], ids[1], ids[2]], 1):
        variables["model/wpe"][position, i] = 100.0
        variables["model/wte"][i, i] = 1.0
    save_variables(model_dir / "model.ckpt", variables)
    encoder, hparams, params = load_encoder_hparams_and_params("small", str(tmp_path))
    encoder.errors = errors
    pieces = gpt2.continuation("aa", (encoder, hparams, params), 9)
    if text is None:
        assert [next(pieces) for _ in range(9)] == ["", "", "", "😀", "", "é", "", "", ""]
        with pytest.raises(UnicodeDecodeError):
            list(pieces)
    else:
        assert [piece for piece in pieces if piece] == ["😀", "é", *[text[2:]] * (len(text) > 2)]


def test_text_beyond_the_context(tiny):
    """Three times the context: the command's text goes on as `generate` does."""
    encoder, hparams, params = tiny
    n = 3 * hparams["n_ctx"]
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], n)
    assert len(ids) == n
    assert "".join(gpt2.continuation("ROMEO:", tiny, n)) == encoder.decode(ids)
