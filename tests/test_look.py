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

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, open_browser, open_page, set_screen
from helpers import (
    DATA_DIR,
    REFERENCE_MODELS,
    ROOT,
    SMALL_HPARAMS,
    assert_close,
    map_arrays,
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
        assert_close(logits, gpt2(ids, **params | {"blocks": params["blocks"][:k]}, n_head=n_head))


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


@pytest.mark.parametrize("ids", [[], [-1], [3, 269], [3, -270], range(33), [1.5]], ids=str)
def test_ids_that_are_none(ids):
    with pytest.raises((ValueError, TypeError), match="token"):
        look.attention_weights(ids, random_params(SMALL_HPARAMS), 3)


def test_predictions_are_those_of_gpt2(model):
    encoder, params, n_head = model
    reading = look.read(PLAIN, *model)
    ids, probs = expected_predictions(PLAIN, model)
    assert reading["ids"] == ids
    for row, target, each in zip(probs, [*ids[1:], None], reading["predictions"], strict=True):
        assert each["likeliest"] == likeliest(row, 10)
        np.testing.assert_allclose(each["probs"], row[each["likeliest"]], rtol=1e-4)
        if target is not None:
            assert likeliest(row, each["rank"])[-1] == target
            np.testing.assert_allclose([each["prob"], 2 ** -each["bits"]], row[target], rtol=1e-4)
    n_tokens, perplexity, bits_per_byte = look.figures(reading, encoder)
    log_p = log_probs(ids, params, n_head)
    assert n_tokens == len(ids) - 1
    assert perplexity == pytest.approx(np.exp(-log_p.mean()), rel=1e-4)
    assert bits_per_byte == pytest.approx(-log_p.sum() / np.log(2) / len(PLAIN), rel=1e-4)


def test_equal_logits_are_in_the_order_of_their_ids():
    logits = np.float32([1, 3, 2, 3, 2, 2, 0])
    described = look.prediction(logits, target=4, n_likeliest=4)
    assert described["likeliest"] == [1, 3, 2, 4]
    assert described["rank"] == 3


def test_packed_attention_holds_the_weights(model):
    encoder, params, n_head = model
    ids = encoder.encode(PLAIN)
    weights = look.attention_weights(ids, params, n_head)
    content = zlib.decompress(base64.b64decode(look.packed_attention(ids, params, n_head)))
    n_top = weights[..., :5].size
    places, strongest = np.frombuffer(content, "<u2", 2 * n_top).reshape(2, *weights.shape[:-1], 5)
    assert (places == np.argsort(-weights, axis=-1, kind="stable")[..., :5]).all()
    expected = np.sort(weights, axis=-1)[..., :-6:-1]
    np.testing.assert_allclose(strongest / 65535, expected, atol=0.6 / 65535)
    levels = np.frombuffer(content, np.uint8, offset=4 * n_top)
    expected = weights[..., np.tri(len(ids), dtype=bool)]
    np.testing.assert_allclose(levels / 15, np.sqrt(expected).ravel(), atol=0.51 / 15)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e25, 1e38])
def test_parameters_that_overflow_are_an_error(model, scale):
    encoder, params, n_head = model
    with np.errstate(over="ignore", invalid="ignore"):
        damaged = map_arrays(lambda array: array * np.float32(scale), params)
    with pytest.raises(ValueError, match="not finite: the parameters are damaged"):
        look.page(look.read(PLAIN, encoder, damaged, n_head), "damaged", encoder, damaged, n_head)


def test_a_vocabulary_without_start(model):
    vocabulary = {token: i for token, i in model[0].encoder.items() if token != "<|endoftext|>"}
    with pytest.raises(ValueError, match="the vocabulary has no token that starts a text"):
        look.read("x", Encoder(vocabulary, []), *model[1:])


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
    texts = [group.text.strip(" ") for group in grouped if group.text != " "]
    assert texts == ["a", "😀", "é", "e\u0301", "👨‍👩‍👧", "\n"]
    assert sum(group.n_tokens for group in grouped) == len(ids)
    assert look.groups(ids[:-3], encoder)[-1] == ("�", 2)  # the text ends inside a character


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ab", "ab  "), ("abcd", "abcd"), ("abcde", "abc…"), ("漢字", "漢字"), ("漢字x", "漢… ")],
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
        position, token, prob, rank, *expected = line.split("\t")
        assert int(position) == i
        assert token == look.token_text(ids[i], model[0])
        assert float(prob) == pytest.approx(row[ids[i]], rel=1e-4)
        assert int(rank) == 1 + (row > row[ids[i]]).sum()
        assert expected == [look.token_text(each, model[0]) for each in likeliest(row, 3)]


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


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_terminals_without_colours(models_dir, environment):
    output = run_on_terminal(models_dir, **environment)
    assert "\033" not in output
    assert PLAIN in output


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
        (["x", "--html", ""], 2, "--html needs the name of a file, got ''"),
        ([b"a\xff"], 2, "an argument is not UTF-8"),
        ([""], 1, "the text is empty"),
        (["-"], 1, "standard input is not UTF-8"),
        (["x", "--model_size", "absent"], 1, "absent"),
    ],
    ids=str,
)
def test_errors_are_one_line(run, arguments, status, message):
    arguments = [os.fsdecode(each) for each in arguments]
    options = {"model_size": arguments.pop()} if "absent" in arguments else {}
    result = run(*[each for each in arguments if each != "--model_size"], stdin=b"a\xff", **options)
    assert result[:2] == (status, "")
    assert message in result[2]
    assert result[2].startswith("look.py: ")
    assert result[2].count("\n") == 1


def test_text_longer_than_the_context(run):
    _, output, errors = run("-", stdin=b"x" * 500)
    assert output.count("\n") == 399
    assert errors == "look.py: only the first 399 tokens fit into the context; 101 are left out\n"


@pytest.mark.parametrize("html", [False, True])
def test_a_context_of_one_token(model, monkeypatch, tmp_path, capsys, html):
    encoder, params, n_head = model
    shorter = params | {"wpe": params["wpe"][:1]}
    monkeypatch.setattr(
        look,
        "load_encoder_hparams_and_params",
        lambda *_: (encoder, {"n_head": n_head}, shorter),
    )
    path = tmp_path / "page.html"
    assert look.main(["xyz", *(["--html", str(path)] if html else [])]) == 0
    output, errors = capsys.readouterr()
    assert output == (f"{path}: 0 tokens\n" if html else "")
    assert "only the first 0 tokens fit into the context; 3 are left out" in errors
    view = look.terminal_view(look.read("xyz", encoder, shorter, n_head), encoder, colours=True)
    assert "Likeliest next" in view


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
    with ThreadPoolExecutor() as executor:
        content = executor.submit(pipe.read_text)
        assert run("ab", "--html", pipe)[0] == 0
    assert is_page(content.result())
    assert pipe.is_fifo()


def test_standard_output_can_be_the_page(models_dir, tmp_path):
    assert is_page(process(models_dir, "ab", "--html", "/dev/stdout").stdout.decode())
    file = tmp_path / "log"
    file.write_text("before\n")
    with open(file, "a") as log:
        process(models_dir, "ab", "--html", "/dev/stdout", stdout=log)
    assert is_page(file.read_text().removeprefix("before\n"))


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
        path.write_text(look.page(look.read(text, *model), "small", *model), encoding="utf-8")
        set_screen(browser, **screen)
        open_page(browser, path, fragment)
        return browser

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    yield open_text
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
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


def check_place(browser, place, ids, probs, encoder):
    """The page shows the prediction for the token at this place."""
    row = probs[place - 1]
    target = ids[place]
    ten = likeliest(row, 10)
    rank = 1 + (row > row[target]).sum()
    assert shown(browser, "#number") == [f"token {place} of {len(ids) - 1}"]
    assert shown(browser, "#chosen .piece") == [look.label(target, encoder)]
    assert shown(browser, "#probability") == [look.percent(row[target])]
    assert shown(browser, "#rank") == [f"{rank} of {len(row)}"]
    assert shown(browser, "#likeliest .piece")[:10] == [look.label(i, encoder) for i in ten]
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
        check_place(browser, place, ids, probs, model[0])
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
            check_place(browser, place, ids, probs, model[0])
    ten = [look.label(i, model[0]) for i in likeliest(probs[-1], 10)]
    assert shown(browser, "#likeliest .piece") == ten
    assert press(browser, Keys.ARROW_UP).rect["y"] < tokens[-1].rect["y"] - 10
    assert press(browser, Keys.HOME) == tokens[0]


def test_the_address_names_the_token(opened, model):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    ids, probs = expected_predictions(PLAIN, model)
    browser = opened(PLAIN, fragment="#4")
    check_place(browser, 4, ids, probs, model[0])
    for fragment, place in (("#7", 7), ("#0", 7), (f"#{len(ids) + 1}", 7), ("#x", 7), ("#2", 2)):
        browser.execute_script("location.hash = arguments[0]", fragment)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        check_place(browser, place, ids, probs, model[0])
    press(browser, Keys.ARROW_RIGHT)
    WebDriverWait(browser, 20).until(lambda _: browser.current_url.endswith("#3"))


def test_lens_and_attention_show_the_numbers(opened, model):
    encoder, params, n_head = model
    browser = opened(PLAIN)
    ids, _ = expected_predictions(PLAIN, model)
    lens = look.logit_lens(ids, params, n_head)
    weights = look.attention_weights(ids, params, n_head)
    place = 6
    browser.find_elements("css selector", ".token")[place].click()
    first = [look.label(int(row.argmax()), encoder) for row in lens[:, place - 1]]
    assert shown(browser, "#lens td:nth-child(2)") == first
    ranks = [f"{1 + (row > row[ids[place]]).sum()}" for row in lens[:, place - 1]]
    assert shown(browser, "#lens td.number") == ranks
    n_heads = weights.shape[0] * weights.shape[1]
    assert len(browser.find_elements("css selector", "#grid button")) == n_heads
    browser.find_element("css selector", "[aria-label='Layer 2, head 3']").click()
    looks = weights[1, 2]
    most = likeliest(looks[place, : place + 1], 5)
    percents = [look.percent(round(65535 * looks[place, i]) / 65535) for i in most]
    assert shown(browser, "#attended td:last-child") == percents
    assert shown(browser, "#attended .piece") == [look.label(ids[i], encoder) for i in most]
    colours = "return tokens.map((token) => Number(token.style.getPropertyValue('--weight')))"
    np.testing.assert_allclose(
        browser.execute_script(colours), np.sqrt([*looks[place], 0]), atol=0.51 / 15
    )
    pixels = """const canvas = document.querySelector("#zoom canvas"), size = canvas.width;
        return [...canvas.getContext("2d").getImageData(0, 0, size, size).data]"""
    alpha = np.reshape(browser.execute_script(pixels), (len(ids), len(ids), 4))[..., 3]
    np.testing.assert_allclose(alpha / 255, np.sqrt(looks), atol=0.51 / 15)


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


def test_the_page_of_the_smallest_model(opened, model):
    encoder, params, n_head = model
    browser = opened("xyz", model=(encoder, params | {"wpe": params["wpe"][:1]}, n_head))
    assert shown(browser, "#perplexity") == ["–"]
    assert len(shown(browser, "#likeliest .piece")) == 10


SCREENS = [
    {"width": width, "height": height, "scheme": scheme}
    for width, height in ((1200, 1000), (390, 844))
    for scheme in ("light", "dark")
]
OUTSIDE = """
const { clientWidth } = document.documentElement, pane = document.getElementById("pane");
const isOutside = (element) => element.getBoundingClientRect().right > clientWidth + 0.5;
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
    encoder, params, n_head = model
    sharper = params | {"ln_f": {key: 8 * array for key, array in params["ln_f"].items()}}
    browser = opened(HOSTILE[:160] + "😀", model=(encoder, sharper, n_head), **screen)
    for _ in ("the surprise", "the attention"):
        texts, bars = browser.execute_script(CONTRASTS)
        assert len(texts) > 100
        assert len(bars) >= 10
        assert [each for each in texts if each[0] < 4.5] == []
        assert [each for each in bars if each[0] < 3] == []
        browser.execute_script("document.querySelector('#grid button').click()")


# The size of the page, and where it opens


def test_the_page_of_a_large_model_is_below_3_mb():
    hparams = {"n_vocab": 512, "n_ctx": 257, "n_embd": 48, "n_head": 12, "n_layer": 12}
    encoder = get_encoder("tiny", str(ROOT / "models"))
    params = random_params(hparams)
    ids = np.random.RandomState(0).randint(0, 256, 257).tolist()
    logits = gpt2(ids, **params, n_head=12)
    predictions = [look.prediction(*pair) for pair in zip(logits, [*ids[1:], None], strict=True)]
    reading = {"ids": ids, "n_left_out": 0, "predictions": predictions}
    assert 1e6 < len(look.page(reading, "large", encoder, params, 12)) < 3e6


@pytest.mark.parametrize(
    "text",
    ["ROMEO:\nI come to thee, my love.\n\nJULIET:\nO gentle night!", "JULIET:", "a", "漢字 😀"]
    + [
        (DATA_DIR / "shakespeare_held_out.txt").read_text()[start : start + 300] for start in (0, 9)
    ],
)
def test_the_page_opens_on_the_word_that_the_layers_raised_most(text):
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", str(ROOT / "models"))
    n_head = hparams["n_head"]
    reading = look.read(text, encoder, params, n_head)
    ids = reading["ids"]
    lens = look.logit_lens(ids, params, n_head).astype(np.float64)
    rises = {}
    for place in range(1, len(ids)):
        early, *_, late = lens[1:, place - 1]
        target = ids[place]
        ratio = (early >= early[target]).sum() / (late >= late[target]).sum()
        rises[place] = np.exp(late[target]) / np.exp(late).sum() * np.log(ratio)
    texts = {place: encoder.decode([ids[place]]) for place in rises}
    words = [place for place in rises if texts[place][0] == " " and texts[place][1:3].isalpha()]
    words = [place for place in words if len(texts[place]) > 2] or [*rises][1:] or [1]
    columns = look.lens_columns(ids, params, n_head)
    assert look.opening_place(reading, columns, encoder) == max(words, key=rises.get)
