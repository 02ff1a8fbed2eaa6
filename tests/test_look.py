"""examples/look.py: its numbers against transformers, what it writes, and its page in a browser."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, open_browser, open_page, set_screen
from helpers import (
    DATA_DIR,
    REFERENCE_MODELS,
    ROOT,
    SMALL_HPARAMS,
    Terminal,
    assert_close,
    float64_softmax,
    held_out_text,
    map_arrays,
    random_params,
    write_vocabulary,
)

from encoder import Encoder, get_encoder
from examples import look
from gpt2 import gpt2, log_probs

PLAIN = "the rain and the king\nin the ring"
HOSTILE = (
    "</script><img src=x onerror=\"document.title='executed'\"> <!-- "
    "<script>document.title='executed'</script>\n"
    "\"quotes\" 'and' &amp; {{data}} {{script}} `${document.title='executed'}` \\n\n"
    "שלום مرحبا 😀 👨‍👩‍👧 e\u0301\ttab \x00 \x1b[31m \u202e \u2028 \r\n<|endoftext|>"
)


class Model(NamedTuple):
    encoder: Encoder
    params: dict
    n_head: int

    def labels(self, ids):
        return [look.label(int(token_id), self.encoder) for token_id in ids]

    def with_params(self, **parts):
        return self._replace(params=self.params | parts)

    def page(self, text):
        return look.page(look.read(text, *self), "the model's name", *self)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose context is long enough for every text of these tests."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder / "small")
    params = random_params(SMALL_HPARAMS | {"n_ctx": 400})
    return Model(get_encoder("small", str(folder)), params, SMALL_HPARAMS["n_head"])


@pytest.fixture(scope="module")
def tiny_model(tiny):
    encoder, hparams, params = tiny
    return Model(encoder, params, hparams["n_head"])


def expected_predictions(text, model):
    """(ids, float64 probabilities [n_seq, n_vocab]) straight from gpt2."""
    ids = [model.encoder.encoder["<|endoftext|>"], *model.encoder.encode(text)]
    logits = gpt2(ids, **model.params, n_head=model.n_head)
    return ids, float64_softmax(logits.astype(np.float64))


def rank(row, target):
    return 1 + (row > row[target]).sum()


def likeliest(row, n):
    """The n likeliest ids. Of equal ones, the first."""
    return np.argsort(-row, kind="stable")[:n].tolist()


# The numbers


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_inside_is_as_in_transformers(name):
    hparams = REFERENCE_MODELS[name]
    with np.load(DATA_DIR / "look.npz") as arrays:
        ids, attention, lens = (arrays[f"{name}/{key}"] for key in ("ids", "attention", "lens"))
    inputs = (ids.tolist(), random_params(hparams), hparams["n_head"])
    assert_close(look.attention_weights(*inputs), attention)
    assert_close(look.logit_lens(*inputs), lens)


def test_the_scale_of_a_layer_is_that_of_its_queries():
    ids = [5, 1, 4, 4, 9]
    params = random_params(SMALL_HPARAMS)
    scaled = random_params(SMALL_HPARAMS)
    for block in params["blocks"]:
        block["attn"]["scale"] = 0.7
    for block in scaled["blocks"]:
        for array in block["attn"]["c_attn"].values():
            array[..., :12] *= 0.7 * np.sqrt(12 / 3)  # q is the first third; d_head is 12 / 3
    weights = look.attention_weights(ids, params, 3)[0]
    assert_close(weights, look.attention_weights(ids, scaled, 3)[0])


@pytest.mark.parametrize("ids", [[], [-1], [3, 269], range(33), [1.5]], ids=str)
def test_unusable_ids(ids):
    with pytest.raises((ValueError, TypeError), match="token"):
        look.attention_weights(ids, random_params(SMALL_HPARAMS), 3)


def test_figures_are_those_of_log_probs(model):
    reading = look.read(PLAIN, *model)
    log_p = log_probs(reading["ids"], model.params, model.n_head)
    n_tokens, perplexity, bits_per_byte = look.figures(reading, model.encoder)
    assert n_tokens == len(reading["ids"]) - 1 == len(log_p)
    assert np.log(perplexity) == pytest.approx(-log_p.mean(), rel=1e-4)
    assert bits_per_byte * len(PLAIN) == pytest.approx(-log_p.sum() / np.log(2), rel=1e-4)


def test_equal_logits_are_in_the_order_of_their_ids():
    logits = np.float32([1, 3, 2, 3, 2, 2, 0])
    described = look.prediction(logits, target=4, n_likeliest=4)
    assert described["likeliest"] == [1, 3, 2, 4]
    assert described["rank"] == 3


@pytest.mark.parametrize("factor", [np.nan, 1e25, 1e38])
def test_parameters_that_overflow_are_an_error(model, factor):
    with np.errstate(over="ignore", invalid="ignore"):
        damaged = map_arrays(lambda array: array * np.float32(factor), model.params)
    with pytest.raises(ValueError, match="not finite: the parameters are damaged"):
        model.with_params(**damaged).page(PLAIN)


def test_what_starts_a_text(model):
    vocabulary = dict(model.encoder.encoder)
    encoder = Encoder(vocabulary, [], first_ids=[7])
    reading = look.read("ab", encoder, model.params, model.n_head)
    assert reading["ids"] == encoder.encode("ab")
    del vocabulary["<|endoftext|>"]
    with pytest.raises(ValueError, match="the vocabulary has no token that starts a text"):
        look.read("x", Encoder(vocabulary, []), model.params, model.n_head)


# Tokens as text


def test_visible():
    assert look.visible("a\\b\n\t\x1b\x7f") == r"a\\b\n\t\x1b\x7f"
    assert look.visible("\u202e\u2028\udcf0\u00a0é") == "\\u202e\\u2028\\xf0\u00a0é"
    assert look.visible("👨‍👩‍👧\u0301") == "👨‍👩‍👧\u0301"
    assert look.visible("\u0301") == "◌\u0301"
    assert look.visible("\udca4\ufe0f") == "\\xa4◌\ufe0f"


def test_percent():
    shown = [look.percent(p) for p in (0.431, 0.0204, 3.1e-5, 1.7e-10)]
    assert shown == ["43.1%", "2.04%", "0.0031%", "1.7e-8%"]


def test_padded():
    for text in ("ab  ", "abcd", "漢字"):
        assert look.padded(text.rstrip(), 4) == text
    assert look.padded("abcde", 4) == "abc…"
    assert look.padded("漢字x", 4) == "漢… "


def test_characters_of_several_tokens_stay_whole(tiny_model):
    encoder = tiny_model.encoder
    ids = encoder.encode("a 😀é e\u0301👨‍👩‍👧\n")
    grouped = look.groups(ids, encoder)
    texts = [group.text.strip(" ") for group in grouped if group.text != " "]
    assert texts == ["a", "😀", "é", "e\u0301", "👨‍👩‍👧", "\n"]
    assert sum(group.n_tokens for group in grouped) == len(ids)
    assert look.groups(ids[:-3], encoder)[-1] == ("�", 2)  # the text ends inside a character


# The command line


@pytest.fixture
def run(models_dir, monkeypatch, capsys):
    """run(arguments) -> (status, output, errors) of the command line, in this process"""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        options = ["--model_size", "tiny", "--models_dir", models_dir]
        status = look.main([*options, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def process(*arguments, program=("-m", "examples.look"), cwd=ROOT, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, *program, *arguments, "--model_size", "tiny"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=cwd, timeout=300, **options)


@pytest.mark.parametrize("text", [PLAIN, f"\ufeff{HOSTILE}"], ids=["plain", "hostile"])
def test_table_in_a_pipe(run, tiny_model, text):
    status, output, errors = run("-", stdin=f"{text}\n".encode())
    assert (status, errors) == (0, "")
    ids, probs = expected_predictions(text.removeprefix("\ufeff"), tiny_model)
    lines = output.removesuffix("\n").split("\n")
    for i, (line, row) in enumerate(zip(lines, probs[:-1], strict=True), 1):
        position, token, prob, its_rank, *expected = line.split("\t")
        assert int(position) == i
        assert float(prob) == pytest.approx(row[ids[i]], rel=1e-4)
        assert int(its_rank) == rank(row, ids[i])
        shown = [look.token_text(each, tiny_model.encoder) for each in (ids[i], *likeliest(row, 3))]
        assert [token, *expected] == shown


@pytest.mark.parametrize(("term", "no_color"), [("xterm", ""), ("xterm", "1"), ("dumb", "")])
def test_view_on_a_terminal(run, tiny_model, monkeypatch, term, no_color):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout", Terminal())
    assert run(PLAIN)[0] == 0
    view = sys.stdout.getvalue()
    if (term, no_color) == ("xterm", ""):
        assert "\033[38;5;16;48;5;195m rank 1 to 10 \033[0m" in view
        view = re.sub(r"\033\[[0-9;]*m", "", view).replace("↵\n", "\n")
    assert "\033" not in view
    assert PLAIN in view
    ids, probs = expected_predictions(PLAIN, tiny_model)
    found = probs[range(len(ids) - 1), ids[1:]]
    worst = found.argmin()
    row = probs[worst]
    surprising, likely = re.findall("(?:instead|next)\n(.+)", view)
    token, instead = tiny_model.labels([ids[worst + 1], row.argmax()])
    shown = [token, look.percent(found[worst]), f"{rank(row, ids[worst + 1]):,}"]
    assert surprising.split() == [*shown, instead, look.percent(row.max())]
    assert likely.split()[1:] == [look.percent(probs[-1].max()), "█" * 30]
    figures = r"\d+ tokens, perplexity [\d.]+, [\d.]+ bits per byte"
    assert re.fullmatch(figures, view.strip().split("\n")[-1])


def test_text_cannot_control_the_terminal(model):
    reading = look.read(HOSTILE, *model)
    view = look.terminal_view(reading, model.encoder, colours=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\u2028]", view)
    assert "😀" in view
    assert "👨‍👩‍👧" in view


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "TEXT"),
        (["two", "words"], 2, "words"),
        (["x", "--htm", "page"], 2, "--htm"),
        (["x", "--html", ""], 2, "--html needs the name of a file, got ''"),
        ([b"a\xff"], 2, "an argument is not UTF-8"),
        ([""], 1, "the text is empty"),
        (["-"], 1, "standard input is not UTF-8"),
        (["x", "--model_size", "absent"], 1, "absent"),
    ],
)
def test_errors_are_one_line(run, arguments, status, message):
    result = run(*map(os.fsdecode, arguments), stdin=b"a\xff")
    assert result[:2] == (status, "")
    assert message in result[2]
    assert result[2].startswith("look.py: ")
    assert result[2].count("\n") == 1


def test_text_longer_than_the_context(run):
    _, output, errors = run("-", stdin=b"x" * 300)
    assert output.count("\n") == 255
    assert errors == "look.py: only the first 255 tokens fit into the context; 45 are left out\n"


def test_a_context_of_one_token(model, monkeypatch, tmp_path, capsys):
    smallest = model.with_params(wpe=model.params["wpe"][:1])
    loaded = (model.encoder, {"n_head": model.n_head}, smallest.params)
    monkeypatch.setattr(look, "load_encoder_hparams_and_params", lambda *_: loaded)
    assert look.main(["xyz"]) == 0
    output, errors = capsys.readouterr()
    assert output == ""
    assert "only the first 0 tokens fit into the context; 3 are left out" in errors
    assert look.main(["xyz", "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.endswith("page.html: 0 tokens\n")
    reading = look.read("xyz", *smallest)
    assert "Likeliest next" in look.terminal_view(reading, model.encoder, colours=True)


def test_the_file_itself_runs_from_any_folder(tmp_path, run):
    program = str(ROOT / "examples" / "look.py")
    result = process("ab", program=[program], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == run("ab")[1]
    assert b"--html FILE" in process("-h", program=["-OO", program]).stdout


# Where the page is written


def is_page(content):
    return content.startswith("<!doctype html>") and content.endswith("</script>\n")


def test_a_file_is_replaced_and_links_are_followed(run, tmp_path):
    (tmp_path / "pages").mkdir()
    file = tmp_path / "pages" / "page.html"
    link = tmp_path / "link.html"
    link.symlink_to("pages/page.html")
    for mode in (None, 0o640):  # a file that does not exist, and one with its own permissions
        if mode:
            file.write_text("old")
            file.chmod(mode)
        assert run("ab", "--html", link)[0] == 0
        assert is_page(file.read_text())
        assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "pages") == ["page.html"]


def test_a_pipe_is_written_into(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    copy = tmp_path / "copy"
    with copy.open("wb") as file, subprocess.Popen(["cat", pipe], stdout=file) as cat:
        try:
            assert run("ab", "--html", pipe)[0] == 0
            assert cat.wait(timeout=300) == 0
        finally:
            cat.kill()
    assert is_page(copy.read_text(encoding="utf-8"))
    assert pipe.is_fifo()


def test_standard_output_can_be_the_page(tmp_path):
    file = tmp_path / "log"
    file.write_text("before\n")
    with open(file, "a") as log:
        process("ab", "--html", "/dev/stdout", stdout=log)
    before, page = file.read_text().split("\n", 1)
    assert before == "before"
    assert is_page(page)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "it is a folder"),
        ("file/page.html", "Not a directory"),
        ("loop", "symbolic links"),
        ("x" * 300, "File name too long"),
        ("/proc/page.html", "No such file or directory"),
    ],
)
def test_a_bad_place_is_found_before_the_work(run, tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    monkeypatch.setattr(look, "load_encoder_hparams_and_params", None)  # a call would raise
    status, output, errors = run("ab", "--html", name)
    assert (status, output) == (1, "")
    assert errors.startswith(f"look.py: cannot write {name}: ")
    assert reason in errors
    assert sorted(os.listdir()) == ["file", "loop"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    look.write_whole(str(path), "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cannot write .*page.html: No space left on device"):
        look.write_whole(str(path), "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def opened(browser, model, tmp_path):
    """A function that opens the page of a text. It must have caused no error and no request."""
    path = tmp_path / "page.html"

    def open_text(text, fragment="", model=model, **screen):
        path.write_text(model.page(text), encoding="utf-8")
        set_screen(browser, **screen)
        open_page(browser, path, fragment)
        return browser

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    yield open_text
    assert browser.get_log("browser") == []
    entries = [json.loads(each["message"]) for each in browser.get_log("performance")]
    messages = [entry["message"] for entry in entries]
    requests = [each for each in messages if each["method"] == "Network.requestWillBeSent"]
    urls = {each["params"]["request"]["url"] for each in requests}
    assert urls <= {path.as_uri(), "about:blank"}
    assert browser.title.endswith("– what GPT-2 sees")


def shown(browser, selector):
    """The texts of the elements that a CSS selector finds."""
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
    return browser.execute_script(script, selector)


def press(browser, *keys):
    """Press keys where the focus is -> the element that has the focus then."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)
    return browser.switch_to.active_element


def check_place(browser, place, ids, probs, model):
    """The page shows the prediction for the token at this place."""
    row = probs[place - 1]
    target = ids[place]
    ten = likeliest(row, 10)
    assert shown(browser, "#number") == [f"token {place} of {len(ids) - 1}"]
    assert shown(browser, "#chosen .piece") == model.labels([target])
    assert shown(browser, "#probability") == [look.percent(row[target])]
    assert shown(browser, "#rank") == [f"{rank(row, target)} of {len(row)}"]
    assert shown(browser, "#likeliest .piece")[:10] == model.labels(ten)
    percents = [look.percent(row[i]) for i in ten]
    assert shown(browser, "#likeliest td:last-child")[:10] == percents


def test_pointer_keyboard_and_address_show_the_numbers(opened, model):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser = opened(PLAIN, fragment="#4")
    ids, probs = expected_predictions(PLAIN, model)
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == len(ids) + 1
    check_place(browser, 4, ids, probs, model)
    for place in (1, len(ids) - 1):
        ActionChains(browser).move_to_element(tokens[place]).perform()
        check_place(browser, place, ids, probs, model)
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    for fragment, place in (("#7", 7), ("#0", 7), (f"#{len(ids) + 1}", 7), ("#x", 7), ("#3", 3)):
        browser.execute_script("location.hash = arguments[0]", fragment)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        check_place(browser, place, ids, probs, model)
    for key, place in (
        (Keys.ARROW_RIGHT, 4),  # without a click, and without the focus in the text
        (Keys.ARROW_RIGHT, 5),
        (Keys.ARROW_LEFT, 4),
        (Keys.END, len(ids)),
    ):
        assert press(browser, key) == tokens[place]
        if place < len(ids):
            check_place(browser, place, ids, probs, model)
    assert shown(browser, "#likeliest .piece") == model.labels(likeliest(probs[-1], 10))
    end = f"#{len(ids)}"
    WebDriverWait(browser, 60).until(lambda _: browser.current_url.endswith(end))
    above = press(browser, Keys.ARROW_UP)
    assert above.rect["y"] < tokens[-1].rect["y"] - 10
    assert press(browser, Keys.HOME) == tokens[0]


PIXELS = """
const canvas = document.querySelector("#zoom canvas"), size = canvas.width;
return [...canvas.getContext("2d").getImageData(0, 0, size, size).data]
"""


def test_lens_and_attention_show_the_numbers(opened, model):
    from selenium.webdriver import Keys

    browser = opened(PLAIN, fragment="#6")
    ids, _ = expected_predictions(PLAIN, model)
    n_seq = len(ids)
    lens = look.logit_lens(ids, model.params, model.n_head)[:, 5]
    assert shown(browser, "#lens td:nth-child(2)") == model.labels(lens.argmax(-1))
    assert shown(browser, "#lens td.number") == [str(rank(row, ids[6])) for row in lens]
    weights = look.attention_weights(ids, model.params, model.n_head)
    n_heads = weights.shape[0] * weights.shape[1]
    assert len(browser.find_elements("css selector", "#grid button")) == n_heads
    browser.find_element("css selector", "[aria-label='Layer 2, head 3']").click()
    looks = weights[1, 2]
    most = likeliest(looks[6, :7], 5)
    rounded = np.rint(65535 * looks[6, most]) / 65535
    assert shown(browser, "#attended td:last-child") == [look.percent(w) for w in rounded]
    assert shown(browser, "#attended .piece") == model.labels(ids[i] for i in most)
    colours = browser.execute_script(
        "return tokens.map((token) => Number(token.style.getPropertyValue('--weight')))"
    )
    np.testing.assert_allclose(colours, np.sqrt([*looks[6], 0]), atol=0.51 / 15)
    pixels = np.reshape(browser.execute_script(PIXELS), (n_seq, n_seq, 4))
    np.testing.assert_allclose(pixels[..., 3] / 255, np.sqrt(looks), atol=0.51 / 15)
    browser.execute_script("document.querySelector('#grid button').focus()")
    button = press(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    press(browser, Keys.ENTER)
    assert shown(browser, "#head h3") == ["Layer 2, head 2"]
    assert button.get_attribute("aria-label") == "Layer 2, head 2"
    assert button.get_attribute("aria-pressed") == "true"
    press(browser, Keys.ESCAPE)
    assert shown(browser, "#head h3") == []
    assert button.get_attribute("aria-pressed") == "false"


def test_nothing_in_a_hostile_text_is_executed(opened, model):
    browser = opened(HOSTILE)
    ids, probs = expected_predictions(HOSTILE, model)
    assert browser.title.startswith("“</script><img src=x")
    assert browser.find_elements("css selector", "img") == []
    assert len(browser.find_elements("css selector", "script")) == 2
    text = browser.execute_script("return document.getElementById('text').textContent")
    assert "</script><img src=x onerror=\"document.title='executed'\">" in text
    assert r"\x00 \x1b[31m \u202e \u2028 \r" in text
    assert len(browser.find_elements("css selector", ".token")) == len(ids) + 1
    for place in range(1, len(ids), 60):
        browser.execute_script("tokens[arguments[0]].focus()", place)
        check_place(browser, place, ids, probs, model)


def test_tokens_of_one_character_are_apart_in_the_numbers(opened, model):
    from selenium.webdriver import ActionChains

    browser = opened("a 😀 b")
    ids, probs = expected_predictions("a 😀 b", model)
    assert shown(browser, ".glyphs") == ["😀"]
    parts = browser.find_elements("css selector", ".group .token")
    assert len(parts) == 4
    for i in (0, 3):
        ActionChains(browser).move_to_element(parts[i]).perform()
        check_place(browser, 3 + i, ids, probs, model)
    assert shown(browser, "#chosen .piece") == [r"\x80"]


def test_long_texts_leave_attention_out_and_the_smallest_model_has_no_figures(opened, model):
    from selenium.webdriver import Keys

    browser = opened("x" * 256)
    assert browser.find_elements("css selector", "#grid button")
    browser = opened("x" * 257)
    assert not browser.find_elements("css selector", "#grid button")
    assert "more than 256 tokens" in shown(browser, "#heads")[0]
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    browser = opened("xyz", model=model.with_params(wpe=model.params["wpe"][:1]))
    assert shown(browser, "#perplexity") == ["–"]
    assert len(shown(browser, "#likeliest .piece")) == 10


# Whether page and text can be scrolled sideways, and what reaches into the right margin.
OUTSIDE = """
const { clientWidth } = document.documentElement, pane = document.getElementById("pane");
const isOutside = (element) => element.getBoundingClientRect().right > clientWidth - 10;
return [document.documentElement.scrollWidth > clientWidth, pane.scrollWidth > pane.clientWidth,
  [...document.querySelectorAll("body *")].filter(isOutside).map((element) => element.outerHTML)]
"""


@pytest.mark.parametrize(("width", "height", "most"), [(1200, 1000, 1), (390, 844, 0.3)])
@pytest.mark.parametrize("text", [HOSTILE, "the king " * 120])
def test_everything_fits_into_the_width(opened, text, width, height, most):
    browser = opened(text, width=width, height=height)
    for _ in ("the surprise", "the attention"):
        assert browser.execute_script(OUTSIDE) == [False, False, []]
        browser.execute_script("document.querySelector('#grid button')?.click()")
    assert browser.find_element("id", "pane").rect["height"] <= most * height


# The contrast of each text with what is behind it, as WCAG 2 defines it. A canvas converts colours.
CONTRASTS = """
const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
function paint(colours) {
  for (const colour of colours) {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
  }
  const [red, green, blue] = [...context.getImageData(0, 0, 1, 1).data].map((byte) =>
    byte / 255 <= 0.04045 ? byte / 255 / 12.92 : ((byte / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
function contrast(element, colour) {
  const behind = [];
  for (let each = element; each; each = each.parentElement) {
    behind.unshift(getComputedStyle(each).backgroundColor);
  }
  const [dark, light] = [paint(behind), paint([colour])].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}
const hasText = (element) => [...element.childNodes].some((node) =>
  node.nodeType === Node.TEXT_NODE && node.data.trim());
const texts = [...document.querySelectorAll("body *:not(script, noscript)")].filter(hasText);
const bars = [...document.querySelectorAll(".bar")];
return [
  texts.map((element) => [contrast(element, getComputedStyle(element).color), element.outerHTML]),
  bars.map((bar) => [contrast(bar.parentElement, getComputedStyle(bar).backgroundColor), "bar"]),
];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts_are_those_of_wcag_aa(opened, model, scheme):
    sharper = model.with_params(ln_f=map_arrays(lambda array: 8 * array, model.params["ln_f"]))
    browser = opened(HOSTILE[:160] + "😀", model=sharper, scheme=scheme)
    for _ in ("the surprise", "the attention"):
        texts, bars = browser.execute_script(CONTRASTS)
        assert len(texts) > 100
        assert bars
        assert [each for each in texts if each[0] < 4.5] == []
        assert [each for each in bars if each[0] < 3] == []
        browser.execute_script("document.querySelector('#grid button').click()")
        browser.execute_script("select(0)")  # which looks only at itself: the strongest colour


# The size of the page, and where it opens


def test_the_page_of_a_large_model_is_below_3_mb(tiny_model):
    hparams = {"n_vocab": 1024, "n_ctx": 257, "n_embd": 48, "n_head": 12, "n_layer": 12}
    model = Model(tiny_model.encoder, random_params(hparams), 12)
    text = held_out_text()[:500]
    assert 200 < len(model.encoder.encode(text)) <= 256
    assert 1_000_000 < len(model.page(text)) < 3_000_000


OPENINGS = [
    "ROMEO:\nI come to thee, my love.\n\nJULIET:\nO gentle night!",
    "To be, or not to be, that is the question",
    *("JULIET:", "a", "漢字 😀"),
]


@pytest.mark.parametrize("text", OPENINGS)
def test_the_page_opens_on_the_word_that_the_layers_raised_most(text, tiny_model):
    encoder, params, n_head = tiny_model
    reading = look.read(text, *tiny_model)
    ids = reading["ids"]
    lens = look.logit_lens(ids, params, n_head).astype(np.float64)
    rises = {}
    for place in range(1, len(ids)):
        early, *_, late = lens[1:, place - 1]
        fall = np.log(rank(early, ids[place]) / rank(late, ids[place]))
        rises[place] = float64_softmax(late)[ids[place]] * fall
    words = [i for i in rises if re.match(" [A-Za-z][A-Za-z]", encoder.decode([ids[i]]))]
    words = words or [*rises][1:] or [1]
    columns = look.lens_columns(ids, params, n_head)
    assert look.opening_place(reading, columns, encoder) == max(words, key=rises.get)
