"""examples/look.py: its numbers against transformers, what it writes, and its page in a browser."""

import base64
import copy
import io
import itertools
import os
import re
import zlib
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
    bash,
    float64_softmax,
    map_arrays,
    python,
    random_params,
    write_vocabulary,
)

import terminal
from encoder import Encoder, get_encoder
from examples import look
from gpt2 import gpt2, log_probs

PLAIN = "the rain and the king\nin the ring"
HOSTILE = (
    "</script><img src=x onerror=\"document.title='executed'\"> <!-- "
    "<script>document.title='executed'</script>\n"
    "\"quotes\" 'and' &amp; {{data}} {{nonce}} `${document.title='executed'}` \\n\n"
    "שלום مرحبا 😀 👨‍👩‍👧 e\u0301\ttab \x00 \x1b[31m \u202e \u2028 \r\n<|endoftext|>"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose context is long enough for every text of these tests."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder / "small")
    hparams = SMALL_HPARAMS | {"n_ctx": 400}
    return get_encoder("small", str(folder)), hparams, random_params(hparams)


def make_page(text, model):
    return look.page(look.read(text, model), "the model's name", model)


class Expected(NamedTuple):
    name: str  # of the token that comes
    prob: float
    rank: int
    names: list[str]  # of the ten likeliest tokens
    probs: list[float]


def expected_from(logits, ids, encoder):
    """What each row of logits predicts, and how well it predicts each id."""
    found = []
    for row, token_id in zip(float64_softmax(np.float64(logits)), ids, strict=True):
        likeliest = np.argsort(-row, kind="stable")[:10].tolist()
        name, *names = labels([token_id, *likeliest], encoder)
        rank = 1 + (row > row[token_id]).sum()
        found.append(Expected(name, row[token_id], rank, names, row[likeliest]))
    return found


def labels(ids, encoder):
    return [look.label(int(token_id), encoder) for token_id in ids]


def expected(text, model):
    """Expected for each token of the text, then for the likeliest one after it."""
    encoder, hparams, params = model
    template_ids = encoder.encode("")
    start_ids = template_ids or [encoder.start_id]
    ids = encoder.encode(text)[len(template_ids) :]
    logits = gpt2([*start_ids, *ids], **params, n_head=hparams["n_head"])[-len(ids) - 1 :]
    return expected_from(logits, [*ids, logits[-1].argmax()], encoder)


def percent(p):
    return f"{100 * p:.3g}%"


# The numbers


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_inside_is_as_in_transformers(name):
    hparams = REFERENCE_MODELS[name]
    with np.load(DATA_DIR / "look.npz") as arrays:
        ids, attention, lens = (arrays[f"{name}/{key}"] for key in ("ids", "attention", "lens"))
    inputs = (ids.tolist(), random_params(hparams), hparams["n_head"])
    assert_close(look.attention_weights(*inputs), attention)
    assert_close(look.logit_lens(*inputs), lens)


def test_too_many_ids():
    with pytest.raises(ValueError, match="33 token ids do not fit into the context of 32"):
        look.hidden_states(range(33), random_params(SMALL_HPARAMS), 3)


@pytest.mark.parametrize("ids", [[[1, 2]], [[1], [2]], 1])
def test_ids_of_another_shape(ids):
    for function in (look.hidden_states, look.logit_lens, look.attention_weights):
        with pytest.raises(TypeError, match="expected a sequence of integers"):
            function(ids, random_params(SMALL_HPARAMS), 3)


@pytest.fixture(scope="module")
def two_starts(model):
    """The model with a template that puts two tokens before each text."""
    encoder, hparams, params = model
    template = copy.copy(encoder)
    template.encode = lambda text: [7, 8, *encoder.encode(text)]
    return template, hparams, params


def test_start_tokens_do_not_count(two_starts):
    encoder, _, params = two_starts
    ids = encoder.encode(PLAIN)
    reading = look.read(PLAIN, two_starts)
    assert reading.ids == ids[2:]
    n_bits = -log_probs(ids, params, 3)[1:].sum() / np.log(2)
    assert np.log2(reading.perplexity) == pytest.approx(n_bits / len(ids[2:]), rel=1e-4)
    assert reading.bits_per_byte == pytest.approx(n_bits / len(PLAIN), rel=1e-4)
    assert look.table(reading, encoder).count("\n") == len(ids[2:])
    weights = look.attention_weights(ids, params, 3)
    levels = zlib.decompress(base64.b64decode(look.packed(weights, 1)))
    weights[..., 1] += weights[..., 0]  # the page shows both starts as one
    found = np.frombuffer(levels, np.uint8) / 255
    np.testing.assert_allclose(found, np.sqrt(weights[:, :, 1:, 1:].ravel()), atol=0.51 / 255)


def test_equal_logits_are_in_the_order_of_their_ids():
    logits = np.zeros((1, 300), np.float32)
    logits[0, ::30] = 1
    (found,) = look.predict(logits, [], 10)
    assert found.likeliest == [*range(0, 300, 30)]


def test_a_vocabulary_of_few_tokens():
    (found,) = look.predict(np.log([[0.125, 0.5, 0.125, 0.25]]), [], 10)
    assert found == ([1, 3, 0, 2], [1, 2, 3, 3], 1, 1, 1)


def test_damaged_parameters_are_one_error(model):
    damaged = map_arrays(lambda array: array * np.float32(1e25), model[2])
    with pytest.raises(ValueError, match="not finite: the parameters are damaged"):
        look.read(PLAIN, (*model[:2], damaged))


def test_a_vocabulary_without_a_start():
    with pytest.raises(ValueError, match="the vocabulary has no token that starts a text"):
        look.read("a", (Encoder({"a": 0}, []), {}, {}))


# Tokens as text


def test_visible():
    assert look.visible("a\n\t\x1b\x7f", keep="\n") == "a\n\\t\\x1b\\x7f"
    assert look.visible("\u202e\u2028\u00a0é") == "\\u202e\\u2028\u00a0é"
    assert look.visible("👨‍👩‍👧\u0301") == "👨‍👩‍👧\u0301"
    assert look.visible("\u0301") == "◌\u0301"


def test_characters_of_several_tokens_stay_whole(tiny):
    encoder = tiny[0]
    ids = encoder.encode("é😀e\u0301👨‍👩‍👧\\\n")
    grouped = look.groups(ids, encoder)
    assert [group.text for group in grouped] == ["é", "😀", "e\u0301", "👨‍👩‍👧", "\\", "\n"]
    assert sum(group.n_tokens for group in grouped) == len(ids)
    assert look.groups(ids[:3], encoder) == [("é", 2), ("�", 1)]  # it ends inside a character
    assert labels([*ids[1:3], *ids[-2:], 5000], encoder) == [
        *(r"\xa9", r"\xf0", r"\\", r"\n"),
        "[5000]",
    ]


# The command line


@pytest.fixture
def run(models_dir, monkeypatch, capsys, tmp_path):
    """run(words) -> (status, output, errors) of the command line, in this process"""
    monkeypatch.chdir(tmp_path)

    def run(*words, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        options = ["--model_size", "tiny", "--models_dir", models_dir]
        status = terminal.run(look.command, [*options, *words])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("text", [PLAIN, f"\ufeff{HOSTILE}"], ids=["plain", "hostile"])
def test_table_in_a_pipe(run, tiny, text):
    status, output, errors = run("-", stdin=f"{text}\n".encode())
    assert (status, errors) == (0, "")
    oracle = expected(text.removeprefix("\ufeff"), tiny)[:-1]
    lines = output.removesuffix("\n").split("\n")
    for i, (line, each) in enumerate(zip(lines, oracle, strict=True), 1):
        position, token, prob, rank, *others = line.replace(" ", "␣").split("\t")
        assert (int(position), token, int(rank)) == (i, each.name, each.rank)
        assert float(prob) == pytest.approx(each.prob, rel=1e-4)
        assert others == each.names[:3]


PAINTED = r"\033\[38;5;16;48;5;(\d+)m(.*?)\033\[0m"
TINTS = {195: 10, 159: 10, 229: 100, 227: 100, 209: 1000, 203: 1000, 176: 2000, 170: 2000}


def test_view_on_a_terminal(run, tiny, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal())
    run(PLAIN)
    legend, text, surprising, likely, _ = look.sys.stdout.getvalue().split("\n\n")
    assert re.findall(PAINTED, legend)[0] == ("195", " rank 1 to 10 ")
    assert re.sub(PAINTED, r"\2", text).replace("↵", "") == PLAIN
    *oracle, following = expected(PLAIN, tiny)
    limits = [TINTS[int(colour)] for colour, _ in re.findall(PAINTED, text)]
    assert limits == [min(n for n in TINTS.values() if each.rank <= n) for each in oracle]
    lines = [line.split() for line in surprising.split("\n")[1:]]
    worst = sorted(oracle, key=lambda each: each.prob)[:10]
    assert [line[0] for line in lines] == [each.name for each in worst]
    first = worst[0]
    assert lines[0][1:4] == [percent(first.prob), str(first.rank), first.names[0]]
    assert likely.split("\n")[1].split()[1:] == [percent(following.prob), "█" * 30]


def test_text_on_a_terminal_has_borders_and_no_control(model, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reading = look.read(HOSTILE, model)
    view = look.terminal_view(reading, model[0])
    colours = re.findall(r"48;5;(\d+)m", view)
    assert all(before != after for before, after in itertools.pairwise(colours))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\u2028]", re.sub(PAINTED, r"\2", view))
    assert "👨‍👩‍👧" in view
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in look.terminal_view(reading, model[0])


def test_a_file_can_be_named(run):
    Path("a.txt").write_bytes(b"the king\r\n")
    Path("b").mkdir()
    note = "look.py: the text is that of the file a.txt\n"
    assert run("a.txt") == (0, run("the king")[1], note)
    assert run("b")[1].startswith("1\tb\t")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-"], "standard input is not UTF-8: invalid start byte at byte 1"),
        (["", "--html", "page"], "the text is empty, or the context has no place for it"),
        (["x", "--html", ""], "cannot write : Is a directory"),
        (["x", "--html", "/dev/full"], "cannot write /dev/full: No space left on device"),
        *(
            # This is found before the work, which would say that the model is absent.
            (["x", "--model_size", "absent", "--html", name], f"cannot write {name}: {reason}")
            for name, reason in (
                (".", "Is a directory"),
                ("file/page", "Not a directory"),
                ("no/page", "No such file or directory"),
                ("x" * 300, "File name too long"),
            )
        ),
    ],
)
def test_errors_are_one_line_and_leave_no_file(run, words, message):
    Path("file").touch()
    assert run(*words, stdin=b"a\xff") == (1, "", f"look.py: {message}\n")
    assert os.listdir() == ["file"]


def test_text_longer_than_the_context(run, tiny):
    _, output, errors = run("x" * 300)
    assert output.count("\n") == 255
    assert errors == "look.py: only the first 255 tokens fit into the context; 45 are left out\n"
    reading = look.read("x" * 300, tiny)
    assert reading.bits_per_byte == pytest.approx(np.log2(reading.perplexity), rel=1e-4)


def test_the_file_itself_runs_from_any_folder(run):
    program = f"PYTHONSAFEPATH=1 python -OO {ROOT}/examples/look.py"
    assert bash(f"{program} <(echo ab) --model_size tiny").stdout == run("ab")[1]
    shown = bash("python -m examples.look -h", cwd=ROOT).stdout
    assert "--html FILE" in shown
    assert shown.count("\n") < 30


# Where the page is written


def is_page(content):
    return content.startswith("<!doctype html>") and content.endswith("</script>\n")


def test_a_file_is_replaced_and_links_are_followed(run):
    Path("link").symlink_to("page")
    Path("page").write_text("old")
    status, output, errors = run("ab", "--html", "link")
    assert (status, output) == (0, "")
    assert errors.startswith("link: tokens: 1, perplexity ")
    assert is_page(Path("page").read_text())
    assert Path("link").is_symlink()
    assert len(os.listdir()) == 2


def test_pipes_and_standard_output_are_written_into(tmp_path):
    page = f"python examples/look.py {'ab' * 99} --model_size tiny --html"
    log = tmp_path / "log"
    bash(f"(echo before; {page} /dev/stdout; echo after) > {log}", cwd=ROOT)
    assert is_page(log.read_text().removeprefix("before\n").removesuffix("after\n"))
    bash(f"mkfifo {log}.pipe; {page} {log}.pipe & timeout 60 cat {log}.pipe > {log}", cwd=ROOT)
    assert is_page(log.read_text())
    result = bash(f"set -o pipefail; {page} /dev/stdout | head -c 9", cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, "<!doctype")


def test_a_page_is_written_whole_or_not_at_all(run, monkeypatch):
    Path("page").write_text("old")

    def interrupted(*_):
        (part,) = Path.cwd().glob("page.*")
        os.truncate(part, 0)  # it is there: half a page
        raise KeyboardInterrupt

    monkeypatch.setattr(look, "page", interrupted)
    assert run("ab", "--html", "page")[0] == 130
    assert Path("page").read_text() == "old"
    assert os.listdir() == ["page"]


def test_two_programs_write_one_page(tmp_path):
    """The second one begins after the first one and ends before it."""
    path = tmp_path / "page"
    words = ["ab", "--model_size", "tiny", "--html", path]
    with look.whole_file(str(path)) as file:
        file.write("first")
        assert python(ROOT / "examples" / "look.py", *words)[0] == 0
        assert is_page(path.read_text())
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["page"]


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
        path.write_text(make_page(text, model), encoding="utf-8")
        set_screen(browser, **screen)
        open_page(browser, path, fragment)
        return browser

    browser.get("about:blank")
    browser.get_log("browser")
    yield open_text
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []
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


def check_place(browser, place, oracle):
    """The page shows the prediction for the token at this place."""
    each = oracle[place - 1]
    assert shown(browser, "#number, #chosen .piece, #probability, #rank, #about") == [
        f"token {place} of {len(oracle) - 1}",
        each.name,
        percent(each.prob),
        f"{each.rank} of {SMALL_HPARAMS['n_vocab']}",
        f"for “{each.name}”",
    ]
    assert shown(browser, "#likeliest .piece")[:10] == each.names
    percents = [percent(prob) for prob in each.probs]
    assert shown(browser, "#likeliest td:last-child")[:10] == percents


def test_pointer_keyboard_and_address_show_the_numbers(opened, two_starts):
    from selenium.webdriver import ActionChains, Keys

    browser = opened(PLAIN, fragment="#4", model=two_starts)
    oracle = expected(PLAIN, two_starts)
    end = len(oracle)
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == end + 1
    check_place(browser, 4, oracle)
    ActionChains(browser).move_to_element(tokens[1]).perform()
    check_place(browser, 1, oracle)
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    for fragment in ("7", "0", end + 1, "x"):
        browser.execute_script("location.hash = arguments[0]", fragment)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        check_place(browser, 7, oracle)
    # Without a click, and without the focus in the text.
    assert press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT) == tokens[8]
    check_place(browser, 8, oracle)
    assert press(browser, Keys.END) == tokens[end]
    assert shown(browser, "#likeliest .piece") == oracle[-1].names
    assert shown(browser, "#about") == ["for the next token"]
    assert press(browser, Keys.ARROW_UP).rect["y"] < tokens[end].rect["y"] - 10


PIXELS = """
const canvas = document.querySelector("#zoom canvas"), size = canvas.width;
return [...canvas.getContext("2d").getImageData(0, 0, size, size).data]
"""


def test_lens_and_attention_show_the_numbers(opened, model):
    from selenium.webdriver import Keys

    browser = opened(PLAIN, fragment="#6")
    encoder, _, params = model
    ids = [encoder.start_id, *encoder.encode(PLAIN)]
    lens = expected_from(look.logit_lens(ids, params, 3)[:, 5], [ids[6]] * 3, encoder)
    assert shown(browser, "#lens .piece") == [name for each in lens for name in each.names[:3]]
    assert shown(browser, "#lens td.number") == [str(each.rank) for each in lens]
    browser.find_element("css selector", "[aria-label='Layer 2, head 3']").click()
    roots = np.sqrt(look.attention_weights(ids, params, 3)[1, 2])
    pixels = np.reshape(browser.execute_script(PIXELS), (len(ids), len(ids), 4))
    np.testing.assert_allclose(pixels[..., 3] / 255, roots, atol=0.51 / 255)
    rounded = np.rint(255 * roots[6]) / 255
    most = np.argsort(-rounded, kind="stable")[:5]
    percents = [f"{100 * rounded[i] ** 2:.2g}%" for i in most]
    assert shown(browser, "#attended td:last-child") == percents
    assert shown(browser, "#attended .piece") == labels([ids[i] for i in most], encoder)
    browser.execute_script("document.querySelector('#grid button').focus()")
    press(browser, Keys.ARROW_DOWN, Keys.ENTER)
    assert shown(browser, "#head h3") == ["Layer 2, head 1"]
    press(browser, Keys.ESCAPE)
    assert shown(browser, "#head h3, #grid [aria-pressed=true]") == []


def test_nothing_in_a_hostile_text_is_executed(opened, model):
    from selenium.webdriver import ActionChains

    browser = opened(HOSTILE)
    oracle = expected(HOSTILE, model)
    assert browser.title.startswith("“</script><img src=x")
    assert browser.find_elements("css selector", "img") == []
    assert len(browser.find_elements("css selector", "script")) == 2
    page = make_page(HOSTILE, model)
    assert "<" not in re.search(r'id="data">(.*?)</script>', page)[1]
    text = browser.execute_script("return document.getElementById('text').textContent")
    assert "</script><img src=x onerror=\"document.title='executed'\">" in text
    assert r"\x00 \x1b[31m \u202e \u2028 \r" in text
    assert "👨‍👩‍👧" in shown(browser, ".glyphs")
    for part in browser.find_elements("css selector", ".group .token")[18:22]:  # of 😀
        ActionChains(browser).move_to_element(part).perform()
        check_place(browser, int(part.get_attribute("data-place")), oracle)


def test_long_texts_leave_attention_out(opened):
    assert shown(opened("x" * 256), "#grid button")
    browser = opened("x" * 257)
    assert not shown(browser, "#grid button")
    assert "more than 256 tokens" in shown(browser, "#heads")[0]


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
    encoder, hparams, params = model
    sharper = params | {"ln_f": map_arrays(lambda array: 8 * array, params["ln_f"])}
    browser = opened(HOSTILE[:160] + "😀", model=(encoder, hparams, sharper), scheme=scheme)
    for _ in ("the surprise", "the attention"):
        texts, bars = browser.execute_script(CONTRASTS)
        assert min(texts)[0] >= 4.5
        assert min(bars)[0] >= 3
        browser.execute_script("document.querySelector('#grid button').click()")
        browser.execute_script("select(0)")  # which looks only at itself: the strongest colour


def test_the_page_opens_on_the_word_that_the_layers_raised_most(opened, tiny):
    text = "JULIET:\nI come to thee, my love."
    encoder, hparams, params = tiny
    ids = encoder.encode(text)
    lens = look.logit_lens([encoder.start_id, *ids], params, hparams["n_head"])
    early = expected_from(lens[1, :-1], ids, encoder)
    rises = {}
    for place, (before, after) in enumerate(zip(early, expected(text, tiny), strict=False), 1):
        if re.match("␣[a-z]{2}", after.name):
            rises[place] = after.prob * np.log(before.rank / after.rank)
    page = opened(text, model=tiny)
    assert page.execute_script("return view.selected") == max(rises, key=rises.get)
