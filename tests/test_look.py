"""examples/look.py: its numbers against transformers, what it writes, and its page in a browser."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
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
    assert_close,
    float64_softmax,
    held_out_text,
    map_arrays,
    random_params,
    read_terminal,
    write_model,
)

from encoder import Encoder
from examples import look
from gpt2 import gpt2, log_probs
from utils import load_encoder_hparams_and_params

PLAIN = "the rain and the king\nin the ring"
HOSTILE = (
    "</script><img src=x onerror=\"document.title='executed'\"> <!-- "
    "<script>document.title='executed'</script>\n"
    "\"quotes\" 'and' &amp; {{data}} {{script}} `${document.title='executed'}` \\n\n"
    "שלום مرحبا 😀 👨‍👩‍👧 e\u0301\ttab \x00 \x1b[31m \u202e \u2028 \r\n<|endoftext|>"
)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with a random model whose context is long enough for every text of these tests."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "small", SMALL_HPARAMS | {"n_ctx": 400})
    return folder


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


def load(name, models_dir):
    encoder, hparams, params = load_encoder_hparams_and_params(name, str(models_dir))
    return Model(encoder, params, hparams["n_head"])


@pytest.fixture(scope="module")
def model(models_dir):
    return load("small", models_dir)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", ROOT / "models")


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


@pytest.fixture(params=REFERENCE_MODELS)
def inside(request):
    """(ids, params, n_head, attention weights, logit lens), the last two by transformers"""
    hparams = REFERENCE_MODELS[request.param]
    with np.load(DATA_DIR / "look.npz") as arrays:
        keys = [f"{request.param}/{key}" for key in ("ids", "attention", "lens")]
        ids, attention, lens = (arrays[key] for key in keys)
    return ids.tolist(), random_params(hparams), hparams["n_head"], attention, lens


def test_inside_is_as_in_transformers(inside):
    ids, params, n_head, attention, lens = inside
    weights = look.attention_weights(ids, params, n_head)
    assert_close(weights, attention)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    layers = look.logit_lens(ids, params, n_head)
    assert_close(layers, lens)
    for k, logits in enumerate(layers):
        shorter = params | {"blocks": params["blocks"][:k]}
        assert_close(logits, gpt2(ids, **shorter, n_head=n_head))


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


@pytest.mark.parametrize(
    "ids",
    [[], [-1], [3, 269], [3, -270], range(33), [1.5]],
    ids=str,
)
def test_unusable_ids(ids):
    with pytest.raises((ValueError, TypeError), match="token"):
        look.attention_weights(ids, random_params(SMALL_HPARAMS), 3)


def test_predictions_are_those_of_gpt2(model):
    reading = look.read(PLAIN, *model)
    ids, probs = expected_predictions(PLAIN, model)
    assert reading["ids"] == ids
    assert len(reading["predictions"]) == len(ids)
    for row, each in zip(probs, reading["predictions"], strict=True):
        assert each["likeliest"] == likeliest(row, 10)
        np.testing.assert_allclose(each["probs"], row[each["likeliest"]], rtol=1e-4)
    targets = zip(probs, ids[1:], reading["predictions"], strict=False)
    for row, target, each in targets:
        assert each["rank"] == rank(row, target)
        assert each["prob"] == pytest.approx(row[target], rel=1e-4)
        assert each["bits"] == pytest.approx(-np.log2(row[target]), rel=1e-4)
    log_p = log_probs(ids, model.params, model.n_head)
    n_tokens, perplexity, bits_per_byte = look.figures(reading, model.encoder)
    assert n_tokens == len(ids) - 1
    assert np.log(perplexity) == pytest.approx(-log_p.mean(), rel=1e-4)
    n_bits = -log_p.sum() / np.log(2)
    assert bits_per_byte * len(PLAIN) == pytest.approx(n_bits, rel=1e-4)


def test_equal_logits_are_in_the_order_of_their_ids():
    logits = np.float32([1, 3, 2, 3, 2, 2, 0])
    described = look.prediction(logits, target=4, n_likeliest=4)
    assert described["likeliest"] == [1, 3, 2, 4]
    assert described["rank"] == 3


def test_packed_attention_holds_the_weights(model):
    ids = model.encoder.encode(PLAIN)
    weights = look.attention_weights(ids, model.params, model.n_head)
    packed = look.packed_attention(ids, model.params, model.n_head)
    content = zlib.decompress(base64.b64decode(packed))
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :5]
    places = np.frombuffer(content, "<u2", order.size)
    assert (places == order.ravel()).all()
    strongest = np.frombuffer(content, "<u2", order.size, offset=2 * order.size)
    expected = np.take_along_axis(weights, order, axis=-1).ravel()
    np.testing.assert_allclose(strongest / 65535, expected, atol=0.6 / 65535)
    levels = np.frombuffer(content, np.uint8, offset=4 * order.size)
    expected = np.sqrt(weights[..., np.tri(len(ids), dtype=bool)])
    np.testing.assert_allclose(levels / 15, expected.ravel(), atol=0.51 / 15)


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e25, 1e38])
def test_parameters_that_overflow_are_an_error(model, factor):
    with np.errstate(over="ignore", invalid="ignore"):
        damaged = map_arrays(lambda array: array * np.float32(factor), model.params)
    with pytest.raises(ValueError, match="not finite: the parameters are damaged"):
        model.with_params(**damaged).page(PLAIN)


def test_a_vocabulary_without_start(model):
    vocabulary = dict(model.encoder.encoder)
    del vocabulary["<|endoftext|>"]
    with pytest.raises(ValueError, match="the vocabulary has no token that starts a text"):
        look.read("x", Encoder(vocabulary, []), model.params, model.n_head)


def test_an_encoder_that_starts_a_text_itself(model):
    encoder = Encoder(model.encoder.encoder, [], first_ids=[7])
    assert look.read("ab", encoder, model.params, model.n_head)["ids"] == encoder.encode("ab")


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


def test_characters_of_several_tokens_stay_whole(tiny):
    ids = tiny.encoder.encode("a 😀é e\u0301👨‍👩‍👧\n")
    grouped = look.groups(ids, tiny.encoder)
    texts = [group.text.strip(" ") for group in grouped if group.text != " "]
    assert texts == ["a", "😀", "é", "e\u0301", "👨‍👩‍👧", "\n"]
    assert sum(group.n_tokens for group in grouped) == len(ids)
    cut = look.groups(ids[:-3], tiny.encoder)[-1]
    assert cut == ("�", 2)  # the text ends inside a character


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", "ab  "),
        ("abcd", "abcd"),
        ("abcde", "abc…"),
        ("漢字", "漢字"),
        ("漢字x", "漢… "),
    ],
)
def test_padded(text, expected):
    assert look.padded(text, 4) == expected


# The command line


@pytest.fixture
def run(models_dir, monkeypatch, capsys):
    """A function that runs the command line in this process -> (status, output, errors)."""

    def run(*arguments, stdin=b"", model_size="small"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        options = ["--model_size", model_size, "--models_dir", str(models_dir)]
        status = look.main([*map(str, arguments), *options])
        return status, *capsys.readouterr()

    return run


def process(models_dir, *arguments, program=("-m", "examples.look"), cwd=ROOT, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, *program, *arguments, "--model_size", "small"]
    command += ["--models_dir", str(models_dir)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=cwd, **options)


@pytest.mark.parametrize("text", [PLAIN, HOSTILE], ids=["plain", "hostile"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
def test_table_in_a_pipe(run, model, text, mark):
    status, output, errors = run("-", stdin=f"{mark}{text}\n".encode())
    assert (status, errors) == (0, "")
    ids, probs = expected_predictions(text, model)
    lines = output.removesuffix("\n").split("\n")
    for i, (line, row) in enumerate(zip(lines, probs[:-1], strict=True), 1):
        position, token, prob, its_rank, *expected = line.split("\t")
        assert int(position) == i
        assert float(prob) == pytest.approx(row[ids[i]], rel=1e-4)
        assert int(its_rank) == rank(row, ids[i])
        texts = [look.token_text(each, model.encoder) for each in (ids[i], *likeliest(row, 3))]
        assert [token, *expected] == texts


def run_on_terminal(models_dir, **environment):
    """The output of the command on a terminal."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    terminal = {"TERM": "xterm", "NO_COLOR": ""}
    master, slave = pty.openpty()
    environment = os.environ | terminal | environment
    with ThreadPoolExecutor() as executor:
        output = executor.submit(read_terminal, master)
        process(models_dir, PLAIN, stdout=slave, env=environment)
        os.close(slave)
    return output.result().decode().replace("\r\n", "\n")


def test_view_on_a_terminal(models_dir):
    output = run_on_terminal(models_dir)
    assert "\033[38;5;16;48;5;195m rank 1 to 10 \033[0m" in output
    plain = re.sub(r"\033\[[0-9;]*m", "", output)
    assert PLAIN.replace("\n", "↵\n") in plain
    assert "Most surprising" in plain
    assert "█" in plain
    figures = r"\d+ tokens, perplexity [\d.]+, [\d.]+ bits per byte"
    assert re.fullmatch(figures, plain.strip().split("\n")[-1])


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_terminals_without_colours(models_dir, name, value):
    output = run_on_terminal(models_dir, **{name: value})
    assert "\033" not in output
    assert PLAIN in output


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
    ],
    ids=str,
)
def test_errors_are_one_line(run, arguments, status, message):
    result = run(*map(os.fsdecode, arguments), stdin=b"a\xff")
    assert result[:2] == (status, "")
    check_error(result[2], message)


def check_error(errors, message):
    assert message in errors
    assert errors.startswith("look.py: ")
    assert errors.count("\n") == 1


def test_a_model_that_does_not_exist(run):
    status, output, errors = run("x", model_size="absent")
    assert (status, output) == (1, "")
    check_error(errors, "absent")


def test_text_longer_than_the_context(run):
    _, output, errors = run("-", stdin=b"x" * 500)
    assert output.count("\n") == 399
    assert errors == "look.py: only the first 399 tokens fit into the context; 101 are left out\n"


def test_a_context_of_one_token(model, monkeypatch, tmp_path, capsys):
    smallest = model.with_params(wpe=model.params["wpe"][:1])
    hparams = {"n_head": model.n_head}
    loaded = (model.encoder, hparams, smallest.params)
    monkeypatch.setattr(look, "load_encoder_hparams_and_params", lambda *_: loaded)
    assert look.main(["xyz"]) == 0
    output, errors = capsys.readouterr()
    assert output == ""
    assert "only the first 0 tokens fit into the context; 3 are left out" in errors
    assert look.main(["xyz", "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.endswith("page.html: 0 tokens\n")
    reading = look.read("xyz", *smallest)
    assert "Likeliest next" in look.terminal_view(reading, model.encoder, colours=True)


def test_the_file_itself_runs_from_any_folder(models_dir, tmp_path):
    program = str(ROOT / "examples" / "look.py")
    result = process(models_dir, "ab", program=[program], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == process(models_dir, "ab").stdout
    assert b"--html FILE" in process(models_dir, "-h", program=["-OO", program]).stdout


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
    with open(tmp_path / "copy", "wb") as copy, subprocess.Popen(["cat", pipe], stdout=copy) as cat:
        try:
            assert run("ab", "--html", pipe)[0] == 0
            cat.wait(timeout=20)
        finally:
            cat.kill()
    assert is_page((tmp_path / "copy").read_text())
    assert pipe.is_fifo()


def test_standard_output_can_be_the_page(models_dir, tmp_path):
    assert is_page(process(models_dir, "ab", "--html", "/dev/stdout").stdout.decode())
    file = tmp_path / "log"
    file.write_text("before\n")
    with open(file, "a") as log:
        process(models_dir, "ab", "--html", "/dev/stdout", stdout=log)
    before, page = file.read_text().split("\n", 1)
    assert before == "before"
    assert is_page(page)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "it is a folder"),
        ("no/such/folder.html", "No such file or directory"),
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


def test_pointer_and_keyboard_show_the_numbers(opened, model):
    from selenium.webdriver import ActionChains, Keys

    browser = opened(PLAIN)
    ids, probs = expected_predictions(PLAIN, model)
    tokens = browser.find_elements("css selector", ".token")
    assert len(tokens) == len(ids) + 1
    for place in (1, 5, len(ids) - 1):
        ActionChains(browser).move_to_element(tokens[place]).perform()
        check_place(browser, place, ids, probs, model)
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    browser.execute_script("select(3)")
    for key, place in (
        (Keys.ARROW_RIGHT, 4),  # without a click, and without the focus in the text
        (Keys.ARROW_RIGHT, 5),
        (Keys.ARROW_LEFT, 4),
        (Keys.END, len(ids)),
    ):
        assert press(browser, key) == tokens[place]
        if place < len(ids):
            check_place(browser, place, ids, probs, model)
    ten = likeliest(probs[-1], 10)
    assert shown(browser, "#likeliest .piece") == model.labels(ten)
    above = press(browser, Keys.ARROW_UP)
    assert above.rect["y"] < tokens[-1].rect["y"] - 10
    assert press(browser, Keys.HOME) == tokens[0]


def test_the_address_names_the_token(opened, model):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    ids, probs = expected_predictions(PLAIN, model)
    browser = opened(PLAIN, fragment="#4")
    check_place(browser, 4, ids, probs, model)
    too_far = f"#{len(ids) + 1}"
    for fragment, place in (("#7", 7), ("#0", 7), (too_far, 7), ("#x", 7), ("#2", 2)):
        browser.execute_script("location.hash = arguments[0]", fragment)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        check_place(browser, place, ids, probs, model)
    press(browser, Keys.ARROW_RIGHT)
    WebDriverWait(browser, 20).until(lambda _: browser.current_url.endswith("#3"))


def test_the_lens_shows_the_numbers(opened, model):
    browser = opened(PLAIN, fragment="#6")
    ids, _ = expected_predictions(PLAIN, model)
    lens = look.logit_lens(ids, model.params, model.n_head)[:, 5]
    assert shown(browser, "#lens td:nth-child(2)") == model.labels(lens.argmax(-1))
    ranks = [str(rank(row, ids[6])) for row in lens]
    assert shown(browser, "#lens td.number") == ranks


PIXELS = """
const canvas = document.querySelector("#zoom canvas"), size = canvas.width;
return [...canvas.getContext("2d").getImageData(0, 0, size, size).data]
"""


def test_attention_shows_the_numbers(opened, model):
    browser = opened(PLAIN, fragment="#6")
    ids, _ = expected_predictions(PLAIN, model)
    n_seq = len(ids)
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
    expected = np.sqrt([*looks[6], 0])
    np.testing.assert_allclose(colours, expected, atol=0.51 / 15)
    pixels = np.reshape(browser.execute_script(PIXELS), (n_seq, n_seq, 4))
    np.testing.assert_allclose(pixels[..., 3] / 255, np.sqrt(looks), atol=0.51 / 15)


def test_heads_can_be_chosen_with_the_keyboard(opened):
    from selenium.webdriver import Keys

    browser = opened(PLAIN)
    browser.execute_script("document.querySelector('#grid button').focus()")
    button = press(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert button.get_attribute("aria-label") == "Layer 2, head 2"
    press(browser, Keys.ENTER)
    assert shown(browser, "#head h3") == ["Layer 2, head 2"]
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
    for place in range(1, len(ids), 17):
        browser.execute_script("tokens[arguments[0]].focus()", place)
        check_place(browser, place, ids, probs, model)


def test_tokens_of_one_character_are_apart_in_the_numbers(opened, model):
    from selenium.webdriver import ActionChains

    browser = opened("a 😀 b")
    ids, probs = expected_predictions("a 😀 b", model)
    assert shown(browser, ".glyphs") == ["😀"]
    parts = browser.find_elements("css selector", ".group .token")
    assert len(parts) == 4
    for i, part in enumerate(parts, 3):
        ActionChains(browser).move_to_element(part).perform()
        check_place(browser, i, ids, probs, model)
    assert shown(browser, "#chosen .piece") == [r"\x80"]


def test_long_texts_leave_attention_out(opened):
    from selenium.webdriver import Keys

    browser = opened("x" * 256)
    assert browser.find_elements("css selector", "#grid button")
    browser = opened("x" * 257)
    assert not browser.find_elements("css selector", "#grid button")
    assert "more than 256 tokens" in shown(browser, "#heads")[0]
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)


def test_the_page_of_the_smallest_model(opened, model):
    browser = opened("xyz", model=model.with_params(wpe=model.params["wpe"][:1]))
    assert shown(browser, "#perplexity") == ["–"]
    assert len(shown(browser, "#likeliest .piece")) == 10


SCREENS = [
    {"width": width, "height": height, "scheme": scheme}
    for width, height in ((1200, 1000), (390, 844))
    for scheme in ("light", "dark")
]
# Whether page and text can be scrolled sideways, and what reaches into the right margin.
OUTSIDE = """
const { clientWidth } = document.documentElement, pane = document.getElementById("pane");
const isOutside = (element) => element.getBoundingClientRect().right > clientWidth - 10;
return [document.documentElement.scrollWidth > clientWidth, pane.scrollWidth > pane.clientWidth,
  [...document.querySelectorAll("body *")].filter(isOutside).map((element) => element.outerHTML)]
"""


@pytest.mark.parametrize("screen", SCREENS[::2], ids=["wide", "phone"])
@pytest.mark.parametrize("text", [PLAIN, HOSTILE, "the king " * 120, "x" * 250])
def test_everything_fits_into_the_width(opened, text, screen):
    browser = opened(text, **screen)
    for _ in ("the surprise", "the attention"):
        assert browser.execute_script(OUTSIDE) == [False, False, []]
        browser.execute_script("document.querySelector('#grid button')?.click()")
    pane = browser.find_element("id", "pane").rect
    assert pane["height"] <= (1000 if screen["width"] == 1200 else 0.3 * 844)


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


@pytest.mark.parametrize("screen", SCREENS[:2], ids=["light", "dark"])
def test_contrasts_are_those_of_wcag_aa(opened, model, screen):
    sharper = model.with_params(ln_f=map_arrays(lambda array: 8 * array, model.params["ln_f"]))
    browser = opened(HOSTILE[:160] + "😀", model=sharper, **screen)
    for _ in ("the surprise", "the attention"):
        texts, bars = browser.execute_script(CONTRASTS)
        assert len(texts) > 100
        assert bars
        assert [each for each in texts if each[0] < 4.5] == []
        assert [each for each in bars if each[0] < 3] == []
        browser.execute_script("document.querySelector('#grid button').click()")
        browser.execute_script("select(0)")  # which looks only at itself: the strongest colour


# The size of the page, and where it opens


def test_the_page_of_a_large_model_is_below_3_mb(tiny):
    hparams = {"n_vocab": 1024, "n_ctx": 257, "n_embd": 48, "n_head": 12, "n_layer": 12}
    model = Model(tiny.encoder, random_params(hparams), 12)
    text = held_out_text()[:500]
    assert 200 < len(model.encoder.encode(text)) <= 256
    assert 1_000_000 < len(model.page(text)) < 3_000_000


@pytest.mark.parametrize(
    "text",
    [
        "ROMEO:\nI come to thee, my love.\n\nJULIET:\nO gentle night!",
        "To be, or not to be, that is the question",
        held_out_text()[:300],
        "JULIET:",
        "a",
        "漢字 😀",
    ],
)
def test_the_page_opens_on_the_word_that_the_layers_raised_most(text, tiny):
    encoder, params, n_head = tiny
    reading = look.read(text, *tiny)
    ids = reading["ids"]
    lens = look.logit_lens(ids, params, n_head).astype(np.float64)
    rises = {}
    for place in range(1, len(ids)):
        early, *_, late = lens[1:, place - 1]
        target = ids[place]
        fall = np.log(rank(early, target) / rank(late, target))
        rises[place] = float64_softmax(late)[target] * fall
    words = [i for i in rises if re.match(" [A-Za-z][A-Za-z]", encoder.decode([ids[i]]))]
    words = words or [*rises][1:] or [1]
    columns = look.lens_columns(ids, params, n_head)
    assert look.opening_place(reading, columns, encoder) == max(words, key=rises.get)
