"""The encoder against tiktoken with the same files, for GPT-2's vocabulary and a small one."""

import copy
import json
import os
import pickle
import random
import sys
import time
import unicodedata

import pytest
from helpers import SMALL_MERGES, tiktoken_encoding, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder import Encoder, TextDecoder, get_encoder

RANDOM_STRINGS = int(os.environ.get("NPGPT_RANDOM_STRINGS", 100_000))  # for a long run: a million

# Code points that all Unicode tables in use know: those assigned in Python's, which are the oldest.
ASSIGNED = [
    chr(i)
    for i in range(sys.maxunicode + 1)
    if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")
]
TRICKY = [
    *" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000'",
    "'s",
    "'ll",
    "'LL",
    "  ",
    "a",
    "é",
    "e\u0301",
    "1",
    "½",
    "中",
    "😀",
]
SURROGATES = ["\ud800", "\udfff", "\ud83d", "\ude00"]


@pytest.fixture(scope="module")
def real(real_vocabulary):
    return get_encoder(real_vocabulary[1], real_vocabulary[0]), tiktoken_encoding(*real_vocabulary)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    write_vocabulary(folder / "small")
    return get_encoder("small", str(folder)), tiktoken_encoding(folder, "small")


@pytest.fixture(params=["small", "real"])
def pair(request):
    """(our encoder, tiktoken's)"""
    return request.getfixturevalue(request.param)


CASES = [
    "",
    " ",
    "   ",
    "\n\n \n",
    "Hello world",
    " the thethe then and  sand\n\n  ring ",
    "I'm, you're, they'll; DON'T 'sup ''' 'tis",
    "3.14159 x10^6 １２３ ½ ²",
    "naïve rôle Straße e\u0301 ﬁ",
    "😀👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈",
    "中文字符，日本語のテキスト 한국어",
    "مرحبا \u202e שלום",
    "\x00\x01\x7f\x80\x9f\xad\xff\ufeff\ufffe\uffff\U0010ffff",
    "a\u2028b\u2029c\x85d\x1ce\x1ff",
    "\ud800 lone, \ud83d\ude00 paired, \ude00\ud83d crossed",
    "<|endoftext|>",
    "before<|endoftext|>after",
    "tab\tand \t mixed  \r\n line ends\r",
]


@pytest.mark.parametrize("text", CASES, ids=ascii)
def test_fixed_texts_encode_as_in_tiktoken(pair, text):
    ours, tiktokens = pair
    assert ours.encode(text) == tiktokens.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(ASSIGNED + TRICKY * 2000 + SURROGATES * 500), max_size=40).map("".join)
)
def test_any_text_encodes_and_decodes_as_in_tiktoken(pair_of_both, text):
    for ours, tiktokens in pair_of_both:
        ids = ours.encode(text)
        assert ids == tiktokens.encode_ordinary(text)
        assert ours.decode(ids) == tiktokens.decode(ids)
        if not any("\ud800" <= char <= "\udfff" for char in text):
            assert ours.decode(ids) == text


@pytest.fixture(scope="module")
def pair_of_both(request, small):
    return [small, request.getfixturevalue("real")]


def test_random_strings_encode_as_in_tiktoken(real):
    ours, tiktokens = real
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    words = [
        "the",
        " of",
        "Ġ",
        "qu",
        "ing",
        " 12",
        "  ",
        "\n\n",
        "won't",
        "übermäßig",
        "données",
        "слово",
        "λόγος",
    ]
    pools = [ASSIGNED, TRICKY, words, "abcdefghij ABC 0123 .,!?", SURROGATES + TRICKY]
    for _ in range(RANDOM_STRINGS):
        text = "".join(rng.choices(rng.choice(pools), k=rng.randrange(30)))
        assert ours.encode(text) == tiktokens.encode_ordinary(text), f"seed {seed}: {text!a}"


def test_long_texts_encode_as_in_tiktoken(real):
    """The encoder cuts long texts into pieces, which must not change a word."""
    ours, tiktokens = real
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    spaces = [
        " ",
        "  ",
        "\n",
        " \n",
        "\r\n",
        "\t",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u2003",
        "\u3000",
    ]
    signs = [
        "a",
        "B",
        "é",
        "中",
        "ﬁ",
        "1",
        "½",
        "'",
        "'s",
        "'ll",
        ".",
        "\x00",
        "\u200d",
        "\U0001f600",
    ]
    for _ in range(300):
        share = rng.random()
        pool = spaces * round(10 * share) + ["a", "'s", "1", "."] * 30 + signs
        text = "".join(rng.choices(pool, k=rng.randrange(200, 3000)))
        assert ours.encode(text) == tiktokens.encode_ordinary(text), f"seed {seed}: {text!a}"
        assert ours.decode(ours.encode(text)) == text


def test_ids_of_a_known_prompt(real):
    ids = [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert real[0].encode("Alan Turing theorized that computers would one day become") == ids


def test_every_token_decodes_as_in_tiktoken_and_encodes_again(real):
    ours, tiktokens = real
    for i in range(50256):
        text = tiktokens.decode_single_token_bytes(i).decode("utf-8", "replace")
        assert ours.decode([i]) == text
        if "\ufffd" not in text:
            assert ours.encode(text) == tiktokens.encode_ordinary(text)
    assert ours.decode([50256]) == "<|endoftext|>"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**20), max_size=50))
def test_random_ids_decode_as_in_tiktoken(pair_of_both, ids):
    for ours, tiktokens in pair_of_both:
        some = [i % len(ours.decoder) for i in ids]
        assert ours.decode(some) == tiktokens.decode(some)


def test_decode_takes_an_iterator(small):
    ids = small[0].encode("the hand")
    assert Encoder(small[0].encoder, list(small[0].bpe_ranks)).decode(iter(ids)) == "the hand"


@pytest.mark.parametrize("token_id", [-1, 269, 10**12, "a", None])
def test_decoding_an_unknown_id_raises(small, token_id):
    with pytest.raises(ValueError, match=f"^{token_id!r} is not a token id: .* 269 tokens$"):
        small[0].decode([72, token_id])


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))]
)
def test_copies_of_an_encoder_work(small, duplicate):
    for text in ("", "the hand"):  # before and after the encoder has filled its caches
        small[0].decode(small[0].encode(text))
        other, text = duplicate(small[0]), "the thing, the naïve ring 😀"
        assert other.encode(text) == small[1].encode_ordinary(text)
        assert other.decode(other.encode(text)) == text
        assert other.errors == small[0].errors


def test_long_unbroken_words_take_near_linear_time(real):
    ours, tiktokens = real
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=100_000))

    def seconds(n):
        start = time.perf_counter()
        ids = ours.encode(text[:n])
        return time.perf_counter() - start, ids

    (short, _), (long, ids) = seconds(10_000), seconds(100_000)
    assert ids == tiktokens.encode_ordinary(text)
    assert ours.encode("a" * 100_000) == tiktokens.encode_ordinary("a" * 100_000)
    assert long < 40 * short  # quadratic time would be 100 times as long


def test_the_cache_is_bounded(small, monkeypatch):
    monkeypatch.setattr("encoder.MAX_CACHED_WORDS", 50)
    ours = Encoder(small[0].encoder, list(small[0].bpe_ranks))
    for i in range(1000):
        assert ours.encode(f" the{i} word") == small[1].encode_ordinary(f" the{i} word")
        assert len(ours.cache) <= 50
    ours.encode("a" * 10_000)
    assert max(map(len, ours.cache)) < 1000


ERRORS = ["replace", "ignore", "backslashreplace", "strict"]


@pytest.mark.parametrize("errors", ERRORS)
def test_decode_treats_invalid_bytes_as_bytes_decode_does(small, errors):
    ours = Encoder(small[0].encoder, list(small[0].bpe_ranks), errors)
    data = b"\xc3"  # the first byte of a character of two
    ids = [ours.encoder["Ã"]]
    if errors == "strict":
        with pytest.raises(UnicodeDecodeError):
            ours.decode(ids)
    else:
        assert ours.decode(ids) == data.decode("utf-8", errors)


# Decoding piece by piece


def streamed(encoder, ids, sizes, stop=None):
    """Decode ids with a TextDecoder, `sizes` ids at a time -> (the pieces, the decoder)."""
    decoder, pieces, start = TextDecoder(encoder, stop), [], 0
    for size in sizes:
        pieces.append(decoder.decode(ids[start : start + size]))
        start += size
    return [*pieces, decoder.decode(ids[start:], final=True)], decoder


SIZES_OF_PIECES = st.lists(st.integers(0, 4), max_size=20)
# Ids of the small vocabulary: characters of one to four bytes, some incomplete, and longer tokens.
SOME_IDS = st.lists(
    st.one_of(
        st.sampled_from(["é", "中", "😀", "a", " the", "ing"]).map(lambda text: ("text", text)),
        st.integers(0, 268).map(lambda i: ("id", i)),
    ),
    max_size=15,
)


def ids_of(encoder, items):
    return [
        i for kind, value in items for i in (encoder.encode(value) if kind == "text" else [value])
    ]


@pytest.mark.parametrize("errors", ERRORS)
@settings(max_examples=100, deadline=None)
@given(items=SOME_IDS, sizes=SIZES_OF_PIECES)
def test_text_decoded_in_pieces_is_the_text_of_all_ids(small, errors, items, sizes):
    encoder = Encoder(small[0].encoder, list(small[0].bpe_ranks), errors)
    ids = ids_of(encoder, items)
    try:
        text = encoder.decode(ids)
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            streamed(encoder, ids, sizes)
    else:
        pieces, decoder = streamed(encoder, ids, sizes)
        assert "".join(pieces) == text
        assert not decoder.stopped


@settings(max_examples=300, deadline=None)
@given(items=SOME_IDS, sizes=SIZES_OF_PIECES, data=st.data())
def test_text_ends_before_the_first_stop(small, items, sizes, data):
    encoder = small[0]
    ids = ids_of(encoder, items)
    text = encoder.decode(ids)
    start = data.draw(st.integers(0, len(text)))
    part = text[
        start : start + data.draw(st.integers(1, 5))
    ]  # usually occurs; with a letter more, only begins to
    stop = (part + data.draw(st.sampled_from(["", "", "a", "\ufffd"]))) or "the"
    pieces, decoder = streamed(encoder, ids, sizes, stop)
    found = text.find(stop)
    assert "".join(pieces) == (text if found < 0 else text[:found])
    assert decoder.stopped == (found >= 0)


def test_pieces_come_as_soon_as_they_are_certain(small):
    """A piece waits for the rest of its last character, and while it may begin stop."""
    ids = small[0].encode("😀 abac aba")
    assert [small[0].decode_bytes([i]) for i in ids[3:8]] == [b"\x80", b" a", b"b", b"a", b"c"]
    pieces, decoder = streamed(small[0], ids, [1] * len(ids), "abad")
    assert pieces == ["", "", "", "😀", " ", "", "", "abac", " ", "", "", "aba"]
    assert not decoder.stopped


def test_nothing_comes_after_stop(small):
    decoder = TextDecoder(small[0], "b")
    assert [decoder.decode(small[0].encode(text)) for text in ("a", "cb", "a")] == ["a", "c", ""]
    assert decoder.stopped
    assert decoder.decode(small[0].encode("xyz"), final=True) == ""


def vocabulary_json(change):
    def write(folder):
        path = folder / "encoder.json"
        vocabulary = json.loads(path.read_text())
        path.write_text(json.dumps(change(vocabulary) or vocabulary))

    return write


def merges_text(change):
    def write(folder):
        path = folder / "vocab.bpe"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8", newline="")

    return write


def swapped(vocabulary, a, b):
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


LAST = SMALL_MERGES[-1]
DAMAGES = {
    "a token is missing": (vocabulary_json(lambda v: v.pop("he") and None), "encoder.json"),
    "a hole in the ids": (
        vocabulary_json(lambda v: v.update({"<|endoftext|>": 999})),
        "encoder.json",
    ),
    "an id twice": (vocabulary_json(lambda v: v.update({"he": 3})), "encoder.json"),
    "an id that is a string": (vocabulary_json(lambda v: v.update({"he": "257"})), "encoder.json"),
    "an id that is a float": (
        vocabulary_json(lambda v: v.update({"he": float(v["he"])})),
        "encoder.json",
    ),
    "not an object": (vocabulary_json(lambda v: list(v)), "encoder.json"),
    "truncated json": (
        lambda folder: (folder / "encoder.json").write_text('{"a": 1, "b'),
        "encoder.json",
    ),
    "not UTF-8": (
        lambda folder: (folder / "encoder.json").write_bytes(b'{"\xff": 0}'),
        "encoder.json",
    ),
    "three parts in a line": (
        merges_text(lambda text: text.replace(LAST, LAST + " x")),
        "vocab.bpe",
    ),
    "a merge of unknown tokens": (merges_text(lambda text: text + "zz top\n"), "vocab.bpe"),
    "a merge twice": (merges_text(lambda text: text + LAST + "\n"), "vocab.bpe"),
    "the last merge is missing": (
        merges_text(lambda text: text.removesuffix(LAST + "\n")),
        "vocab.bpe",
    ),
    "no merges": (merges_text(lambda text: text.split("\n")[0]), "vocab.bpe"),
    "a byte is missing": (vocabulary_json(lambda v: v.update({"!!": v.pop("!")})), "vocab.bpe"),
    "a merge of nothing": (merges_text(lambda text: text.replace("Ġ t\n", " Ġt\n")), "vocab.bpe"),
    "an empty line": (merges_text(lambda text: text.replace("h e\n", "h e\n\n")), "vocab.bpe"),
    "empty": (lambda folder: (folder / "vocab.bpe").write_text(""), "vocab.bpe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_vocabulary_raises_with_its_file_name(tmp_path, damage):
    write_vocabulary(tmp_path / "broken")
    damage_files, name = DAMAGES[damage]
    damage_files(tmp_path / "broken")
    with pytest.raises(ValueError, match=name) as error:
        get_encoder("broken", str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_truncated_vocabulary_never_gives_other_ids(tmp_path, small):
    write_vocabulary(tmp_path / "cut")
    whole = {name: (tmp_path / "cut" / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    for name, content in whole.items():
        n_refused = 0
        for n in range(0, len(content), max(1, len(content) // 100)):
            (tmp_path / "cut" / name).write_bytes(content[:n])
            try:
                ours = get_encoder("cut", str(tmp_path))
            except ValueError:
                n_refused += 1
            else:
                assert (ours.encoder, ours.bpe_ranks) == (small[0].encoder, small[0].bpe_ranks)
        assert n_refused > 50
        (tmp_path / "cut" / name).write_bytes(content)


def test_special_tokens_before_the_bytes(tmp_path, small):
    write_vocabulary(tmp_path / "first")
    vocabulary_json(lambda v: {"<pad>": 0} | {token: i + 1 for token, i in v.items()})(
        tmp_path / "first"
    )
    ours = get_encoder("first", str(tmp_path))
    assert ours.encode("the") == [i + 1 for i in small[0].encode("the")]
    assert ours.decode(ours.encode("the")) == "the"


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("\n", "\r\n"), lambda t: t.removesuffix("\n")]
)
def test_line_ends_of_the_merges_do_not_matter(tmp_path, small, change):
    write_vocabulary(tmp_path / "other")
    merges_text(change)(tmp_path / "other")
    assert get_encoder("other", str(tmp_path)).bpe_ranks == small[0].bpe_ranks
