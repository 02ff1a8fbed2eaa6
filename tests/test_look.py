"""examples/look.py: its numbers against transformers, its output in the terminal, and its page in a real browser."""

import base64
import json
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, open_browser, open_page
from helpers import (
    DATA_DIR,
    REFERENCE_MODELS,
    ROOT,
    SMALL_HPARAMS,
    assert_close,
    random_params,
    read_terminal,
    write_model,
)

from encoder import Encoder, get_encoder
from examples import look
from gpt2 import gpt2, log_probs
from utils import load_encoder_hparams_and_params

PLAIN = "the rain and the king\nin the ring"
HOSTILE = (
    "</script><img src=x onerror=\"document.title='executed'\"> <!-- <script>document.title='executed'</script>\n"
    "\"quotes\" 'and' &amp; {{data}} {{script}} `${document.title='executed'}` \\n\n"
    "שלום مرحبا 😀 👨‍👩‍👧 e\u0301\ttab \x00 \x1b[31m \u202e \u2028 \r\n<|endoftext|>"
)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with a random model whose context is long enough for every text of these tests."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "small", SMALL_HPARAMS | {"n_ctx": 400})
    return folder


@pytest.fixture(scope="module")
def model(models_dir):
    """(encoder, params, n_head)"""
    encoder, hparams, params = load_encoder_hparams_and_params("small", str(models_dir))
    return encoder, params, hparams["n_head"]


def expected_predictions(text, model):
    """(ids, float64 probabilities [n_seq, n_vocab]) straight from gpt2."""
    encoder, params, n_head = model
    ids = [encoder.encoder["<|endoftext|>"], *encoder.encode(text)]
    logits = gpt2(ids, **params, n_head=n_head).astype(np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return ids, exp / exp.sum(-1, keepdims=True)


# The numbers


@pytest.fixture(params=REFERENCE_MODELS)
def inside(request):
    """(ids, params, n_head, attention weights, logit lens), the last two by transformers"""
    hparams = REFERENCE_MODELS[request.param]
    with np.load(DATA_DIR / "look.npz") as arrays:
        ids, attention, lens = (
            arrays[f"{request.param}/{key}"] for key in ("ids", "attention", "lens")
        )
    return ids.tolist(), random_params(hparams), hparams["n_head"], attention, lens


def test_attention_weights_match_transformers(inside):
    ids, params, n_head, attention, _ = inside
    weights = look.attention_weights(ids, params, n_head)
    assert_close(weights, attention)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_logit_lens_matches_transformers(inside):
    ids, params, n_head, _, lens = inside
    assert_close(look.logit_lens(ids, params, n_head), lens)


def test_logit_lens_is_gpt2_with_fewer_layers(inside):
    ids, params, n_head, _, _ = inside
    for k, logits in enumerate(look.logit_lens(ids, params, n_head)):
        assert_close(logits, gpt2(ids, **params | {"blocks": params["blocks"][:k]}, n_head=n_head))


def test_predictions_are_those_of_gpt2(model):
    encoder, params, n_head = model
    reading = look.read(PLAIN, *model)
    ids, probs = expected_predictions(PLAIN, model)
    assert reading["ids"] == ids
    for row, target, each in zip(probs, [*ids[1:], None], reading["predictions"], strict=True):
        order = np.argsort(-row, kind="stable")
        assert each["likeliest"] == order[:10].tolist()
        np.testing.assert_allclose(each["probs"], row[order[:10]], rtol=1e-4)
        if target is not None:
            assert order[each["rank"] - 1] == target
            np.testing.assert_allclose([each["prob"], 2 ** -each["bits"]], row[target], rtol=1e-4)
    n_tokens, perplexity, bits_per_byte = look.figures(reading, encoder)
    log_p = log_probs(ids, params, n_head)
    assert n_tokens == len(ids) - 1
    assert perplexity == pytest.approx(np.exp(-log_p.mean()), rel=1e-4)
    assert bits_per_byte == pytest.approx(-log_p.sum() / np.log(2) / len(PLAIN), rel=1e-4)


def test_packed_attention_holds_the_weights(model):
    encoder, params, n_head = model
    ids = encoder.encode(PLAIN)
    halves = np.frombuffer(
        zlib.decompress(base64.b64decode(look.packed_attention(ids, params, n_head))), np.uint8
    )
    high, low = halves.reshape(2, len(params["blocks"]), n_head, -1).astype(int)
    rows, columns = np.tril_indices(len(ids))
    weights = look.attention_weights(ids, params, n_head)[:, :, rows, columns]
    np.testing.assert_allclose((256 * high + low) / 65535, weights, atol=0.6 / 65535)


# Tokens as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a\\b\n\t\x1b\x7f", r"a\\b\n\t\x1b\x7f"),
        ("\u202e\u2028\udcf0\u00a0é", "\\u202e\\u2028\\xf0\u00a0é"),
        ("👨‍👩‍👧", "👨‍👩‍👧"),
        ("\u0301", "◌\u0301"),
        ("\r\n", r"\r\n"),
    ],
)
def test_visible(text, expected):
    assert look.visible(text) == expected


def test_characters_of_several_tokens_stay_whole():
    encoder = get_encoder("tiny", str(ROOT / "models"))
    ids = encoder.encode("a 😀é e\u0301👨‍👩‍👧\n")
    grouped = look.groups(ids, encoder)
    assert [text.strip(" ") for text, _ in grouped if text != " "] == [
        "a",
        "😀",
        "é",
        "e\u0301",
        "👨‍👩‍👧",
        "\n",
    ]
    assert sum(n for _, n in grouped) == len(ids)
    assert look.groups(ids[:-3], encoder)[-1] == ("�", 2)  # the text ends inside a character


# The command line


def run(*arguments, models_dir, stdin="", **environment):
    command = [sys.executable, "-m", "examples.look", *arguments, "--models_dir", str(models_dir)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | environment
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, encoding="utf-8", env=environment
    )


def run_on_terminal(*arguments, models_dir, **environment):
    """The output of the command on a terminal."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    command = [sys.executable, "-m", "examples.look", *arguments, "--models_dir", str(models_dir)]
    environment = {
        key: value for key, value in os.environ.items() if key != "NO_COLOR"
    } | environment
    master, slave = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdout=slave, env=environment):
        os.close(slave)
        output = read_terminal(master)
    return output.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("text", [PLAIN, HOSTILE], ids=["plain", "hostile"])
def test_table_in_a_pipe(model, models_dir, text):
    result = run("-", "--model_size", "small", models_dir=models_dir, stdin=text + "\n")
    assert (result.returncode, result.stderr) == (0, "")
    ids, probs = expected_predictions(text, model)
    lines = result.stdout.removesuffix("\n").split("\n")
    assert len(lines) == len(ids) - 1
    for i, (line, row) in enumerate(zip(lines, probs, strict=False), 1):
        position, token, prob, rank, *likeliest = line.split("\t")
        assert int(position) == i
        assert token == look.token_text(ids[i], model[0])
        assert float(prob) == pytest.approx(row[ids[i]], rel=1e-4)
        assert int(rank) == 1 + (row > row[ids[i]]).sum()
        assert likeliest == [
            look.token_text(token_id, model[0]) for token_id in np.argsort(-row, kind="stable")[:3]
        ]


def test_view_on_a_terminal(models_dir):
    output = run_on_terminal(PLAIN, "--model_size", "small", models_dir=models_dir)
    assert "\033[38;5;16;48;5;195m rank 1 to 10 \033[0m" in output
    plain = re.sub(r"\033\[[0-9;]*m", "", output)
    assert PLAIN.replace("\n", "↵\n") in plain
    assert "Most surprising" in plain
    assert "█" in plain
    assert re.fullmatch(
        r"\d+ tokens, perplexity [\d.]+, [\d.]+ bits per byte", plain.strip().split("\n")[-1]
    )
    without = run_on_terminal(PLAIN, "--model_size", "small", models_dir=models_dir, NO_COLOR="1")
    assert "\033" not in without
    assert PLAIN in without


def test_text_cannot_control_the_terminal(model):
    view = look.terminal_view(look.read(HOSTILE, *model), model[0], colours=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\u2028]", view)
    assert "😀" in view
    assert "👨‍👩‍👧" in view


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "TEXT"),
        (["two", "words"], 2, "words"),
        (["x", "--htm", "page"], 2, "--htm"),
        (["", "--model_size", "small"], 1, "the text is empty"),
        (["x", "--model_size", "absent"], 1, "absent"),
        (
            ["x", "--model_size", "small", "--html", "no/such/folder.html"],
            1,
            "cannot write no/such/folder.html",
        ),
    ],
)
def test_errors_are_one_line(models_dir, arguments, status, message):
    result = run(*arguments, models_dir=models_dir)
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_standard_input_must_be_utf8(models_dir):
    command = [
        sys.executable,
        "-m",
        "examples.look",
        "-",
        "--model_size",
        "small",
        "--models_dir",
        str(models_dir),
    ]
    result = subprocess.run(command, cwd=ROOT, input=b"a\xff", capture_output=True)
    assert result.returncode == 1
    assert result.stderr.startswith(b"look.py: the text is not UTF-8")


def test_vocabulary_without_start(model):
    vocabulary = {token: i for token, i in model[0].encoder.items() if token != "<|endoftext|>"}
    with pytest.raises(ValueError, match=r"the vocabulary has no <\|endoftext\|>"):
        look.read("x", Encoder(vocabulary, []), *model[1:])


def test_text_longer_than_the_context(models_dir, model):
    result = run("-", "--model_size", "small", models_dir=models_dir, stdin="x" * 500)
    assert result.stdout.count("\n") == 399
    assert (
        result.stderr
        == "look.py: only the first 399 tokens fit into the context; 101 are left out\n"
    )


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    look.write_whole(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cannot write .*page.html: No space left on device"):
        look.write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


# The page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def opened(browser, model, tmp_path):
    """A function that opens the page of a text. Afterwards, the page must have caused no error and no request."""
    path = tmp_path / "page.html"

    def open_text(text):
        path.write_text(look.page(look.read(text, *model), "small", *model), encoding="utf-8")
        open_page(browser, path)
        return browser

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    yield open_text
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        each["params"]["request"]["url"]
        for each in messages
        if each["method"] == "Network.requestWillBeSent"
    }
    assert urls == {path.as_uri()}
    assert browser.title == "What GPT-2 sees"


def shown(browser, selector):
    """The texts of the elements that a CSS selector finds."""
    return [element.text for element in browser.find_elements("css selector", selector)]


def check_place(browser, place, ids, probs, encoder):
    """The page shows the prediction for the token at this place."""
    row, target = probs[place - 1], ids[place]
    order = np.argsort(-row, kind="stable")
    assert shown(browser, "#chosen .piece") == [look.label(target, encoder)]
    assert shown(browser, "#probability") == [look.percent(row[target])]
    rank = 1 + (row > row[target]).sum()
    assert shown(browser, "#rank") == [f"{rank} of {len(row)}"]
    ten = [look.label(token_id, encoder) for token_id in order[:10]]
    assert shown(browser, "#likeliest .piece")[:10] == ten
    assert shown(browser, "#likeliest td:last-child")[:10] == [
        look.percent(p) for p in row[order[:10]]
    ]


def test_pointer_and_keyboard_show_the_numbers(opened, model):
    from selenium.webdriver import ActionChains, Keys

    browser = opened(PLAIN)
    ids, probs = expected_predictions(PLAIN, model)
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == len(ids) + 1
    for place in (1, 5, len(ids) - 1):
        ActionChains(browser).move_to_element(tokens[place]).perform()
        check_place(browser, place, ids, probs, model[0])
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    tokens[3].click()
    for key, place in (
        (Keys.ARROW_RIGHT, 4),
        (Keys.ARROW_RIGHT, 5),
        (Keys.ARROW_LEFT, 4),
        (Keys.HOME, 0),
    ):
        browser.switch_to.active_element.send_keys(key)
        assert browser.switch_to.active_element == tokens[place]
        if place:
            check_place(browser, place, ids, probs, model[0])
    browser.switch_to.active_element.send_keys(Keys.END)
    ten = [
        look.label(token_id, model[0]) for token_id in np.argsort(-probs[-1], kind="stable")[:10]
    ]
    assert shown(browser, "#likeliest .piece") == ten
    browser.switch_to.active_element.send_keys(Keys.ARROW_UP)
    assert browser.switch_to.active_element.rect["y"] < tokens[-1].rect["y"] - 10


def test_lens_and_attention_show_the_numbers(opened, model):
    encoder, params, n_head = model
    browser = opened(PLAIN)
    ids, _ = expected_predictions(PLAIN, model)
    lens, weights = (
        look.logit_lens(ids, params, n_head),
        look.attention_weights(ids, params, n_head),
    )
    place = 6
    browser.find_elements("css selector", ".token")[place].click()
    first = [look.label(int(row.argmax()), encoder) for row in lens[:, place - 1]]
    assert shown(browser, "#lens td:nth-child(2)") == first
    ranks = [f"{1 + (row > row[ids[place]]).sum()}" for row in lens[:, place - 1]]
    assert shown(browser, "#lens td.number") == ranks
    assert (
        len(browser.find_elements("css selector", "#grid button"))
        == weights.shape[0] * weights.shape[1]
    )
    browser.find_element("css selector", "[aria-label='Layer 2, head 3']").click()
    looks = weights[1, 2, place]
    order = np.argsort(-looks[: place + 1], kind="stable")[:5]
    assert shown(browser, "#attended td:last-child") == [
        look.percent(round(65535 * w) / 65535) for w in looks[order]
    ]
    assert shown(browser, "#attended .piece") == [look.label(ids[i], encoder) for i in order]
    drawn = "return tokens.map((token) => Number(token.style.getPropertyValue('--weight')) ** 2)"
    np.testing.assert_allclose(browser.execute_script(drawn), [*looks, 0], atol=1e-5)


def test_heads_can_be_chosen_with_the_keyboard(opened):
    from selenium.webdriver import Keys

    browser = opened(PLAIN)
    browser.execute_script("document.querySelector('#grid button').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    button = browser.switch_to.active_element
    assert button.get_attribute("aria-label") == "Layer 2, head 2"
    button.send_keys(Keys.ENTER)
    assert shown(browser, "#head h3") == ["Layer 2, head 2"]
    assert button.get_attribute("aria-pressed") == "true"
    button.send_keys(Keys.ESCAPE)
    assert shown(browser, "#head h3") == []
    assert button.get_attribute("aria-pressed") == "false"


def test_pictures_of_heads_are_drawn(opened):
    browser = opened(PLAIN)
    strongest = """return [...document.querySelectorAll("#grid canvas")].map((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return Math.max(...data.filter((_, i) => i % 4 === 3));
    })"""
    assert all(alpha > 50 for alpha in browser.execute_script(strongest))
    assert len(set(pixels(browser.get_screenshot_as_png()))) > 100


def pixels(png):
    """The bytes of a PNG's rows."""
    data, start = b"", 8
    while start < len(png):
        length, kind = struct.unpack(">I4s", png[start : start + 8])
        data += png[start + 8 : start + 8 + length] if kind == b"IDAT" else b""
        start += length + 12
    return zlib.decompress(data)


def test_nothing_in_a_hostile_text_is_executed(opened, model):
    browser = opened(HOSTILE)
    ids, probs = expected_predictions(HOSTILE, model)
    assert browser.find_elements("css selector", "img") == []
    assert len(browser.find_elements("css selector", "script")) == 2
    text = browser.execute_script("return document.getElementById('text').textContent")
    assert "</script><img src=x onerror=\"document.title='executed'\">" in text
    assert r"\x00 \x1b[31m \u202e \u2028 \r" in text
    assert len(browser.find_elements("css selector", ".token")) == len(ids) + 1
    for place in range(1, len(ids), 17):
        browser.execute_script("tokens[arguments[0]].focus()", place)
        check_place(browser, place, ids, probs, model[0])


def test_tokens_of_one_character_are_apart_in_the_numbers(opened, model):
    from selenium.webdriver import ActionChains

    browser = opened("a 😀 b")
    ids, probs = expected_predictions("a 😀 b", model)
    assert shown(browser, ".glyphs") == ["😀"]
    parts = browser.find_elements("css selector", ".group .token")
    assert len(parts) == 4
    for i, part in enumerate(parts, 3):
        ActionChains(browser).move_to_element(part).perform()
        check_place(browser, i, ids, probs, model[0])
    assert shown(browser, "#chosen .piece") == [r"\x80"]


def test_long_texts_leave_attention_out(opened):
    from selenium.webdriver import Keys

    browser = opened("x" * 256)
    assert browser.find_elements("css selector", "#grid button")
    browser = opened("x" * 257)
    assert not browser.find_elements("css selector", "#grid button")
    assert "more than 256 tokens" in shown(browser, "#heads")[0]
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)
