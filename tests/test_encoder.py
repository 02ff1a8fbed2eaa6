"""The encoder against tiktoken, built from the same two files, on the real vocabulary and on small ones."""

import json
import os
import random
import sys
import time
import unicodedata

import pytest
import tiktoken
from helpers import SMALL_MERGES, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from encoder import Encoder, get_encoder

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
RANDOM_STRINGS = int(os.environ.get("NPGPT_RANDOM_STRINGS", 100_000))  # a long run by hand: a million

# What both sides' Unicode tables know: the assigned code points of Python's, which are the oldest of the three.
ASSIGNED = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
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


def oracle(models_dir, name):
    folder = os.path.join(models_dir, name)
    ranks = data_gym_to_mergeable_bpe_ranks(os.path.join(folder, "vocab.bpe"), os.path.join(folder, "encoder.json"))
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def real(real_vocabulary):
    return get_encoder(real_vocabulary[1], real_vocabulary[0]), oracle(*real_vocabulary)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    write_vocabulary(folder / "small")
    return get_encoder("small", str(folder)), oracle(folder, "small")


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
def test_fixed_cases(pair, text):
    ours, tiktokens = pair
    assert ours.encode(text) == tiktokens.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ASSIGNED + TRICKY * 2000 + SURROGATES * 500), max_size=40).map("".join))
def test_any_text(pair_of_both, text):
    for ours, tiktokens in pair_of_both:
        ids = ours.encode(text)
        assert ids == tiktokens.encode_ordinary(text)
        assert ours.decode(ids) == tiktokens.decode(ids)
        if not any("\ud800" <= char <= "\udfff" for char in text):
            assert ours.decode(ids) == text


@pytest.fixture(scope="module")
def pair_of_both(request, small):
    return [small, request.getfixturevalue("real")]


def test_many_random_strings(real):
    ours, tiktokens = real
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    words = ["the", " of", "Ġ", "qu", "ing", " 12", "  ", "\n\n", "won't", "übermäßig", "données", "слово", "λόγος"]
    pools = [ASSIGNED, TRICKY, words, "abcdefghij ABC 0123 .,!?", SURROGATES + TRICKY]
    for _ in range(RANDOM_STRINGS):
        text = "".join(rng.choices(rng.choice(pools), k=rng.randrange(30)))
        assert ours.encode(text) == tiktokens.encode_ordinary(text), f"seed {seed}: {text!a}"


def test_long_texts_that_are_cut_in_pieces(real):
    ours, tiktokens = real
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    spaces = [" ", "  ", "\n", " \n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2003", "\u3000"]
    signs = ["a", "B", "é", "中", "ﬁ", "1", "½", "'", "'s", "'ll", ".", "\x00", "\u200d", "\U0001f600"]
    for _ in range(300):
        share = rng.random()
        pool = spaces * round(10 * share) + ["a", "'s", "1", "."] * 30 + signs
        text = "".join(rng.choices(pool, k=rng.randrange(200, 3000)))
        assert ours.encode(text) == tiktokens.encode_ordinary(text), f"seed {seed}: {text!a}"
        assert ours.decode(ours.encode(text)) == text


def test_the_ids_of_a_known_prompt(real):
    ids = [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert real[0].encode("Alan Turing theorized that computers would one day become") == ids


def test_every_token_decodes_as_in_tiktoken_and_encodes_to_itself(real):
    ours, tiktokens = real
    for id in range(50256):
        data = tiktokens.decode_single_token_bytes(id)
        text = data.decode("utf-8", "replace")
        assert ours.decode([id]) == text
        if "\ufffd" not in text:
            assert ours.encode(text) == tiktokens.encode_ordinary(text)
    assert ours.decode([50256]) == "<|endoftext|>"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**20), max_size=50))
def test_random_ids_decode_as_in_tiktoken(pair_of_both, ids):
    for ours, tiktokens in pair_of_both:
        some = [id % len(ours.decoder) for id in ids]
        assert ours.decode(some) == tiktokens.decode(some)


def test_ids_from_an_iterator(small):
    ids = small[0].encode("the hand")
    assert Encoder(small[0].encoder, list(small[0].bpe_ranks)).decode(iter(ids)) == "the hand"


@pytest.mark.parametrize("id", [-1, 269, 10**12, "a", None])
def test_an_unknown_id_is_named(small, id):
    with pytest.raises(ValueError, match=f"{id!r} is no token id: .* 269 tokens"):
        small[0].decode([72, id])


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
    assert long < 40 * short  # 10 times the letters: 100 times as long if it were quadratic


def test_the_cache_is_bounded(small, monkeypatch):
    monkeypatch.setattr("encoder._CACHE_WORDS", 50)
    ours = Encoder(small[0].encoder, list(small[0].bpe_ranks))
    for i in range(1000):
        assert ours.encode(f" the{i} word") == small[1].encode_ordinary(f" the{i} word")
        assert len(ours._word_ids) <= 50
    ours.encode("a" * 10_000)
    assert max(map(len, ours._word_ids)) < 1000


def test_errors_argument_of_decode(small):
    vocabulary, merges = small[0].encoder, list(small[0].bpe_ranks)
    byte_id = vocabulary["Ã"]  # 0xC3, the first half of a character
    assert small[0].decode([byte_id]) == "\ufffd"
    assert Encoder(vocabulary, merges, errors="ignore").decode([byte_id]) == ""
    with pytest.raises(UnicodeDecodeError):
        Encoder(vocabulary, merges, errors="strict").decode([byte_id])


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
    "a hole in the ids": (vocabulary_json(lambda v: v.update({"<|endoftext|>": 999})), "encoder.json"),
    "an id twice": (vocabulary_json(lambda v: v.update({"he": 3})), "encoder.json"),
    "an id that is no number": (vocabulary_json(lambda v: v.update({"he": "257"})), "encoder.json"),
    "an id that is no whole number": (vocabulary_json(lambda v: v.update({"he": float(v["he"])})), "encoder.json"),
    "two merges' ids swapped": (vocabulary_json(lambda v: swapped(v, "he", "in")), "vocab.bpe"),
    "two bytes' ids swapped": (vocabulary_json(lambda v: swapped(v, "a", "b")), "vocab.bpe"),
    "not an object": (vocabulary_json(lambda v: list(v)), "encoder.json"),
    "truncated json": (lambda folder: (folder / "encoder.json").write_text('{"a": 1, "b'), "encoder.json"),
    "not UTF-8": (lambda folder: (folder / "encoder.json").write_bytes(b'{"\xff": 0}'), "encoder.json"),
    "no version line": (merges_text(lambda text: text.split("\n", 1)[1]), "vocab.bpe"),
    "three parts in a line": (merges_text(lambda text: text.replace(LAST, LAST + " x")), "vocab.bpe"),
    "a merge of unknown tokens": (merges_text(lambda text: text + "zz top\n"), "vocab.bpe"),
    "a merge twice": (merges_text(lambda text: text + LAST + "\n"), "vocab.bpe"),
    "merges in another order": (merges_text(lambda text: text.replace("Ġ t\nh e", "h e\nĠ t")), "vocab.bpe"),
    "the last merge is missing": (merges_text(lambda text: text.removesuffix(LAST + "\n")), "vocab.bpe"),
    "no merges": (merges_text(lambda text: text.split("\n")[0]), "vocab.bpe"),
    "a byte is missing": (vocabulary_json(lambda v: v.update({"!!": v.pop("!")})), "vocab.bpe"),
    "a merge of nothing": (merges_text(lambda text: text.replace("Ġ t\n", " Ġt\n")), "vocab.bpe"),
    "an empty line at the end": (merges_text(lambda text: text + "\n"), "vocab.bpe"),
    "a special token of no bytes": (vocabulary_json(lambda v: v.update({"<|my end|>": len(v)})), "vocab.bpe"),
    "an empty line": (merges_text(lambda text: text.replace("h e\n", "h e\n\n")), "vocab.bpe"),
    "empty": (lambda folder: (folder / "vocab.bpe").write_text(""), "vocab.bpe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_vocabulary_is_refused_and_its_file_named(tmp_path, damage):
    write_vocabulary(tmp_path / "broken")
    damage_files, name = DAMAGES[damage]
    damage_files(tmp_path / "broken")
    with pytest.raises(ValueError, match=name) as error:
        get_encoder("broken", str(tmp_path))
    assert "\n" not in str(error.value)


def test_no_cut_of_the_vocabulary_gives_other_ids(tmp_path, small):
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


def test_special_tokens_may_stand_before_the_bytes(tmp_path, small):
    write_vocabulary(tmp_path / "first")
    vocabulary_json(lambda v: {"<pad>": 0} | {token: id + 1 for token, id in v.items()})(tmp_path / "first")
    ours = get_encoder("first", str(tmp_path))
    assert ours.encode("the") == [id + 1 for id in small[0].encode("the")]
    assert ours.decode(ours.encode("the")) == "the"


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: t.removesuffix("\n")])
def test_other_line_ends_make_no_difference(tmp_path, small, change):
    write_vocabulary(tmp_path / "other")
    merges_text(change)(tmp_path / "other")
    assert get_encoder("other", str(tmp_path)).bpe_ranks == small[0].bpe_ranks
