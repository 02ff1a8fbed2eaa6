"""The encoder against tiktoken, for GPT-2's vocabulary and a small one."""

import concurrent.futures
import contextlib
import itertools
import json
import random
import re
import sys
import unicodedata

import numpy as np
import pytest
from helpers import BYTE_TO_CHAR, tiktoken_encoding, write_vocabulary

from encoder import Encoder, TextDecoder, bytes_to_unicode, get_encoder

# Code points that all Unicode tables in use know: those assigned in Python's, which are the oldest.
ASSIGNED = [
    chr(i)
    for i in range(sys.maxunicode + 1)
    if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")
]
SURROGATES = ["\ud800", "\udfff", "\ud83d", "\ude00"]
SPACES = [*" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000", "  ", " \n", "\r\n"]
PARTS = [
    *("'", "'s", "'ll", "'LL", "won't", "a", "B", "é", "e\u0301", "1", "½", "中", "😀", "\u200d"),
    *("the", " of", "Ġ", "qu", "ing", " 12", ".", "\x00", "übermäßig", "слово", "λόγος"),
]
POOLS = [
    ASSIGNED,
    SPACES + PARTS,
    SPACES * 3 + PARTS + SURROGATES,
    "abcdefghij ABC 0123 .,!?",
    PARTS * 10 + SPACES,
]


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


def new_encoder(ours, **options):
    """An encoder with empty caches and the vocabulary of another one."""
    return Encoder(ours.encoder, list(ours.bpe_ranks), **options)


# The same ids and texts as tiktoken


TEXTS = [
    *("", " ", "\n\n \n", " the thethe then and  sand\n\n  ring ", "before<|endoftext|>after"),
    "I'm, you're, they'll; DON'T 'sup ''' 'tis 3.14159 x10^6 １２３ ½ ²",
    "tab\tand \t mixed  \r\n line ends\r a\u2028b\u2029c\x85d\x1ce\x1ff",
    "naïve rôle Straße e\u0301 ﬁ 😀👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈",
    "中文字符，日本語のテキスト 한국어 مرحبا \u202e שלום",
    "\x00\x01\x7f\x80\x9f\xad\xff\ufeff\ufffe\uffff\U0010ffff",
    "\ud800 lone, \ud83d\ude00 paired, \ude00\ud83d crossed",
]


def test_fixed_texts_encode_as_in_tiktoken(pair):
    ours, tiktokens = pair
    for text in TEXTS:
        assert ours.encode(text) == tiktokens.encode_ordinary(text), ascii(text)


@pytest.mark.parametrize(
    ("seed", "n_texts"), [(0, 1000), pytest.param(1, 20_000, marks=pytest.mark.slow)]
)
def test_random_texts_encode_and_decode_as_in_tiktoken(pair, seed, n_texts):
    ours, tiktokens = pair
    rng = random.Random(seed)
    for _ in range(n_texts):
        length = rng.randrange(rng.choice([10, 30, 30, 30, 300]))
        text = "".join(rng.choices(rng.choice(POOLS), k=length))
        ids = ours.encode(text)
        assert ids == tiktokens.encode_ordinary(text), ascii(text)
        kind = rng.choice([list, iter, np.uint64])
        assert ours.decode(kind(ids)) == tiktokens.decode(ids)


def test_every_token_decodes_as_in_tiktoken_and_encodes_again(real):
    ours, tiktokens = real
    for i in range(50256):
        text = tiktokens.decode_single_token_bytes(i).decode("utf-8", "replace")
        assert ours.decode([i]) == text
        if "\ufffd" not in text:
            assert ours.encode(text) == tiktokens.encode_ordinary(text)
    assert ours.decode([50256]) == "<|endoftext|>"


def test_long_unbroken_words_take_near_linear_time(real):
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))

    def n_steps(n):
        """How many lines of Python run for n letters. Unlike time, this is always the same."""
        steps = itertools.count()

        def count(*_):
            next(steps)
            return count

        before = sys.gettrace()
        sys.settrace(count)
        real[0].encode(word[:n])
        sys.settrace(before)
        return next(steps)

    assert n_steps(10_000) < 15 * n_steps(1000)
    for text in (word, "a" * 10_000):
        assert real[0].encode(text) == real[1].encode_ordinary(text)


def test_the_cache_is_bounded(small, monkeypatch):
    monkeypatch.setattr("encoder.MAX_CACHED_WORDS", 50)
    ours = new_encoder(small[0])
    for i in range(200):
        assert ours.encode(f" the{i} word") == small[1].encode_ordinary(f" the{i} word")
        assert len(ours.cache) <= 50
    ours.encode("a" * 10_000)
    assert max(map(len, ours.cache)) < 1000


def test_eight_threads_with_one_encoder_give_the_right_ids(small, monkeypatch):
    monkeypatch.setattr("encoder.MAX_CACHED_WORDS", 3)  # threads empty the cache that others use
    ours = new_encoder(small[0])
    texts = [f"the hand {i} rings in another land, {'and then ' * i}" for i in range(8)] * 5
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ours.encode, texts)) == [small[1].encode_ordinary(t) for t in texts]


def test_picogpts_names(small):
    ours = small[0]
    assert bytes_to_unicode() == ours.byte_encoder == BYTE_TO_CHAR
    assert ours.byte_decoder == {char: byte for byte, char in BYTE_TO_CHAR.items()}
    assert ours.pat.findall("I'll go  on") == ["I", "'ll", " go", " ", " on"]
    assert ours.bpe_ranks["h", "e"] == 1
    assert ours.decoder[256] == "Ġt"
    assert ours.bpe("Ġthen") == ["Ġthe", "n"]


# Arguments that are not right


@pytest.mark.parametrize("value", [b"the", None, 5, ["the"]])
def test_encode_takes_only_texts(small, value):
    with pytest.raises(TypeError, match=f"text .* not {type(value).__name__}$"):
        small[0].encode(value)


@pytest.mark.parametrize("token_id", [-1, 269, 10**12, "a", None, 1.5])
def test_decoding_an_unknown_id_raises(small, token_id):
    with pytest.raises(ValueError, match=f"^{token_id!r} is not a token id: .* 269 tokens$"):
        small[0].decode([72, token_id])


def test_merges_are_pairs(small):
    """tokenizer.json of other programs has lists, or texts with a space in the middle."""
    ours = small[0]
    lists = map(list, ours.bpe_ranks)
    assert Encoder(ours.encoder, lists).encode("the hand") == ours.encode("the hand")
    with pytest.raises(ValueError, match="expected 2"):
        Encoder(ours.encoder, map(" ".join, ours.bpe_ranks))


# Special tokens


def test_special_tokens_are_made_only_where_they_are_allowed(pair):
    ours, tiktokens = pair
    text = "Hi<|endoftext|>the end<|endoftext|><|endoftext|>\n"
    assert ours.special_tokens == {"<|endoftext|>": tiktokens.eot_token}
    assert ours.encode(text) == tiktokens.encode_ordinary(text)
    for allowed in ({"<|endoftext|>"}, ["<|endoftext|>"], iter(["<|endoftext|>"]), "all"):
        assert ours.encode(text, allowed) == tiktokens.encode(text, allowed_special="all")


@pytest.mark.parametrize(
    "allowed", [["<|end|>"], {"<|endoftext|>", "x"}, {50256}, "<", "<|endoftext|>"]
)
def test_names_that_are_not_special_tokens_raise(small, allowed):
    message = f"must be 'all' or a list of names from ['<|endoftext|>'], got {allowed!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        small[0].encode("the", allowed)


def test_a_vocabulary_without_endoftext_and_without_some_bytes(small):
    tokens = [token for token in small[0].encoder if token not in ("q", "Ã", "<|endoftext|>")]
    ours = Encoder({token: i for i, token in enumerate(tokens)}, list(small[0].bpe_ranks))
    assert (ours.special_tokens, ours.start_id, ours.end_ids) == ({}, None, frozenset())
    assert ours.decode(ours.encode("the ring 中<|endoftext|>")) == "the ring 中<|endoftext|>"
    for text, word in ("a ring q", "' q'"), ("théx", "'théx'"):
        with pytest.raises(ValueError, match=f"no tokens for a character of {word}$"):
            ours.encode(text)


def test_equal_encoders_have_the_same_identity(small):
    ours = new_encoder(small[0])
    identity = ours.identity()
    ours.decode(ours.encode("the ring"))
    assert ours.identity() == identity == new_encoder(ours).identity()
    merges = list(ours.bpe_ranks)
    vocabulary = ours.encoder | {"a": ours.encoder["b"], "b": ours.encoder["a"]}
    for other in (Encoder(vocabulary, merges), Encoder(ours.encoder, merges[::-1])):
        assert other.identity() != identity


# Decoding piece by piece


def streamed(encoder, ids, sizes, stop=()):
    """Decode ids with a TextDecoder, `sizes` ids at a time -> (the pieces, the decoder)."""
    decoder = TextDecoder(encoder, stop)
    pieces = []
    start = 0
    for size in sizes:
        pieces.append(decoder.decode(ids[start : start + size]))
        start += size
    return [*pieces, decoder.decode(ids[start:], final=True)], decoder


# Ids of UTF-8 of one to four bytes, of tokens of several letters, and any single ids
PARTS_OF_TEXT = [[127, 102], [161, 116, 255], [64], [258], [266], [65, 64]]
PARTS_OF_TEXT += [[i] for i in range(269)]


@pytest.mark.parametrize("errors", ["replace", "ignore", "backslashreplace", "strict"])
def test_pieces_are_the_text_before_the_first_stop(small, errors):
    """Stops are pieces of the text; with a letter more, they usually only begin in it."""
    ours = new_encoder(small[0], errors=errors)
    rng = random.Random(0)
    for _ in range(500):
        parts = rng.choices(PARTS_OF_TEXT, [45] * 6 + [1] * 269, k=rng.randrange(16))
        ids = [*itertools.chain(*parts)]
        sizes = rng.choices(range(5), k=rng.randrange(20))
        try:
            text = small[1].decode_bytes(ids).decode("utf-8", errors)
        except UnicodeDecodeError:
            for decode in (ours.decode, lambda ids, sizes=sizes: streamed(ours, ids, sizes)):
                with pytest.raises(UnicodeDecodeError):
                    decode(ids)
            continue
        stops = []
        for _ in range(rng.randrange(4)):
            start = rng.randrange(len(text) + 1)
            part = text[start : start + rng.randrange(1, 6)]
            stops.append(part + rng.choice(["", "", "a", "\ufffd"]) or "the")
        pieces, decoder = streamed(ours, ids, sizes, stops[0] if len(stops) == 1 else stops)
        found = [text.find(stop) for stop in stops if stop in text]
        assert ours.decode(ids) == text
        assert "".join(pieces) == text[: min(found, default=len(text))]
        assert decoder.stopped == bool(found)


def test_a_piece_waits_for_its_last_character_and_for_the_longest_stop(small):
    ids = small[0].encode("😀 abac aba")
    pieces, decoder = streamed(small[0], ids, [1] * len(ids), ["abad", "x"])
    for n in range(len(ids)):
        complete = small[1].decode_bytes(ids[: n + 1]).decode("utf-8", "ignore")
        assert "".join(pieces[: n + 1]) == complete[:-3]
    assert not decoder.stopped


def test_a_stop_waits_while_another_may_have_begun_before_it(small):
    for text, expected in ("zabcz", ["", "", "z", "", ""]), ("zabz", ["", "", "z", "a"]):
        decoder = TextDecoder(small[0], ["b", "abc"])
        assert [decoder.decode(small[0].encode(char)) for char in text] == expected
        assert decoder.stopped
        assert decoder.decode(small[0].encode("xyz"), final=True) == ""


# Reading OpenAI's two files


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
NOT_0_TO_N = "encoder.json .* not 0 to 26"
DAMAGES = [  # the file, what is replaced (None: all of it) by what, and what the message says
    ("encoder.json", b', "he": 257', b"", NOT_0_TO_N),
    *(("encoder.json", b": 257", b": " + new, NOT_0_TO_N) for new in (b"999", b"3", b"257.0")),
    ("encoder.json", b": 257", b": " + b"257" * 2000, "encoder.json"),
    ("encoder.json", b"{", b"[{", "encoder.json .* not valid JSON"),
    ("encoder.json", None, b"[1]", "encoder.json must hold .* list"),
    ("encoder.json", b"{", b"[" * 10**5, "encoder.json .* not valid JSON .*depth"),
    ("encoder.json", b"he", b"\xff", "encoder.json .* not UTF-8"),
    ("encoder.json", b"{", POINTER, "encoder.json is a Git LFS pointer.*git lfs pull"),
    ("vocab.bpe", None, b"", "vocab.bpe does not fit .*: .* do not make a token"),
    ("vocab.bpe", b"in g", b"in g x", "vocab.bpe does not fit .*: .* do not make a token"),
    ("vocab.bpe", b"h e\n", b" he\n", "vocab.bpe does not fit .*: .* do not make a token"),
    ("vocab.bpe", b"in g", b"in g\nzz t", "vocab.bpe does not fit .*'zz', 't'.* make a token"),
    (
        "vocab.bpe",
        b"in g",
        b"in g\na a",
        "vocab.bpe does not fit .*json: .*'a', 'a'",
    ),
    ("vocab.bpe", b"\nin g", b"", "vocab.bpe .* no merge makes .*'ing'"),
    ("vocab.bpe", b"in g", b"h e", "vocab.bpe .* twice"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), DAMAGES)
def test_a_damaged_vocabulary_raises_with_its_file_name(tmp_path, name, old, new, message):
    write_vocabulary(tmp_path / "broken")
    path = tmp_path / "broken" / name
    content = path.read_bytes()
    assert old is None or old in content
    path.write_bytes(new if old is None else content.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        get_encoder("broken", str(tmp_path))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


FORMS = [
    lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: content.removesuffix(b"\n"),
    lambda content: content + b"\n\n",
    lambda content: content.removeprefix(b"#version: 0.2\n"),
    lambda content: b"\xef\xbb\xbf" + content,
]


@pytest.mark.parametrize("change", FORMS)
def test_forms_of_the_files_that_are_all_right(tmp_path, small, change):
    write_vocabulary(tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.write_bytes(change(path.read_bytes()))
    ours = get_encoder("other", str(tmp_path))
    assert (ours.encoder, ours.bpe_ranks) == (small[0].encoder, small[0].bpe_ranks)


def test_tokens_may_have_any_order_and_special_tokens_any_characters(tmp_path, small):
    write_vocabulary(tmp_path / "mixed")
    order = random.Random(0).sample(range(270), 270)
    vocabulary = dict(zip([*small[0].encoder, "<|my énd|>"], order, strict=True))
    (tmp_path / "mixed" / "encoder.json").write_text(json.dumps(vocabulary))
    ours = get_encoder("mixed", str(tmp_path))
    text = "the naïve ring"
    assert ours.encode(text) == [order[i] for i in small[1].encode_ordinary(text)]
    assert ours.decode([*ours.encode(text), order[269]]) == text + "<|my énd|>"
    assert ours.end_ids == {order[268]}


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def with_a_flipped_bit(content, rng):
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
@pytest.mark.parametrize("change", [cut, with_a_flipped_bit])
def test_a_damaged_vocabulary_is_refused_or_gives_the_right_ids(tmp_path, small, change, name):
    write_vocabulary(tmp_path / "damaged")
    path = tmp_path / "damaged" / name
    content = path.read_bytes()
    rng = random.Random(0)
    texts = ("the hand rings in another sand", "I re-ran, 3 times")
    n_right = 0
    for _ in range(150):
        path.write_bytes(change(content, rng))
        with contextlib.suppress(ValueError):
            ours = get_encoder("damaged", str(tmp_path))
            ids = [ours.encode(text) for text in texts]
            assert ids == [small[1].encode_ordinary(text) for text in texts]
            n_right += 1
    # Some changes do no harm: in the version, in bytes that the texts do not have.
    least, most = (0, 0) if change is cut and name == "encoder.json" else (1, 50)
    assert least <= n_right <= most


def test_a_vocabulary_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"encoder\.json"):
        get_encoder("nowhere", str(tmp_path))
