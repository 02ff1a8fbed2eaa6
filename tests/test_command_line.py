"""The command line as a subprocess, from a server's files to the text; expected texts come from the model's ids."""

import contextlib
import functools
import http.server
import inspect
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, SMALL_HPARAMS, random_variables, save_variables, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2
from utils import load_encoder_hparams_and_params

N = 6  # tokens a test asks for


@pytest.fixture(scope="module")
def models_dir(small_model):
    load_encoder_hparams_and_params("small", str(small_model.parent))
    return small_model.parent


def run(*arguments, models_dir=None, **kwargs):
    command = [sys.executable, "-W", "error", str(ROOT / "gpt2.py"), *arguments]
    if models_dir:
        command += ["--models_dir", str(models_dir), "--model_size", "small", "--n_tokens_to_generate", str(N)]
    environment = dict(kwargs.pop("env", os.environ))
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide what is never flushed
    return subprocess.run(command, capture_output=True, timeout=120, env=environment, **kwargs)


def expected(models_dir, prompt, **options):
    """The text by way of the library, all tokens at once."""
    encoder, hparams, params = load_encoder_hparams_and_params("small", str(models_dir))
    ids = encoder.encode(prompt) or [268]
    return encoder.decode(gpt2.generate(ids, params, hparams["n_head"], N, stop_id=268, **options)).encode() + b"\n"


def assert_one_line(result, status, *words):
    """It failed in one line on stderr with these words in it, and with nothing on stdout."""
    assert result.returncode == status, result.stderr
    assert result.stdout == b""
    assert re.fullmatch(rb"gpt2\.py: [^\n]+\n", result.stderr), result.stderr
    for word in words:
        assert word in result.stderr.decode()


PROMPTS = [
    "the",
    "1984",
    "1, 2, 3",
    "None",
    "a #b",
    "{x}",
    "[1]",
    "'q'",
    '"',
    "",
    " ",
    "x=1",
    "é\n",
    "-1",
    "True",
    "\\n",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_literally_and_answered_alone(models_dir, prompt):
    result = run(prompt, models_dir=models_dir)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == expected(models_dir, prompt)


@pytest.mark.parametrize("prompt", ["--the", "-a", "--help me", "--"])
def test_a_prompt_that_begins_with_a_dash(models_dir, prompt):
    assert run(f"--prompt={prompt}", models_dir=models_dir).stdout == expected(models_dir, prompt)


def test_a_prompt_that_is_not_unicode(models_dir):
    result = run(b"\xff", models_dir=models_dir)
    assert result.stdout == expected(models_dir, "\ufffd")


@pytest.mark.parametrize(("text", "prompt"), [("thé\n", "thé"), ("the", "the"), ("a\n\n", "a\n"), ("", "")])
def test_a_prompt_from_standard_input(models_dir, text, prompt):
    assert run("-", models_dir=models_dir, input=text.encode()).stdout == expected(models_dir, prompt)


def test_standard_input_that_is_not_utf8(models_dir):
    assert_one_line(run("-", models_dir=models_dir, input=b"\xff"), 1, "utf-8")


def test_sampling_options(models_dir):
    options = {"temperature": 2.0, "top_k": 50, "top_p": 0.95, "seed": 7}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = run("the", *arguments, models_dir=models_dir)
    assert result.stdout == expected(models_dir, "the", **options)
    several = run("the", *arguments, "--n_samples", "3", models_dir=models_dir).stdout.decode()
    headings = re.findall(r"^=+ SAMPLE (\d) =+$", several, re.MULTILINE)
    assert headings == ["1", "2", "3"]
    parts = re.split(r"^=+ SAMPLE \d =+\n", several, flags=re.MULTILINE)
    assert len(set(parts[1:])) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["one prompt is needed"]),
        (["a", "b"], ["one prompt is needed", "2"]),
        (["a", "upper"], ["one prompt is needed"]),
        (["a", "--prompt", "b"], ["one prompt is needed"]),
        (["a", "--nope", "1"], ["no option --nope"]),
        (["a", "--nope=1"], ["no option --nope"]),
        (["a", "--n_tokens_to_generate", "x"], ["--n_tokens_to_generate", "whole number", "'x'"]),
        (["a", "--n_tokens_to_generate", "2.5"], ["whole number", "'2.5'"]),
        (["a", "--n_tokens_to_generate"], ["--n_tokens_to_generate needs a value"]),
        (["a", "--model-size", "--seed", "1"], ["--model-size needs a value"]),
        (["--prompt", "--like this"], ["--prompt needs a value", "="]),
        (["--prompt", "-like this"], ["--prompt needs a value", "="]),
        (["-prompt", "a"], ["no option -prompt"]),
        (["-like this"], ["no option -like this", "--prompt=-x"]),
        (["a", "--no_color"], ["no option --no_color"]),
        (["--noprompt"], ["no option --noprompt"]),
        (["a", "--seed", "-x"], ["--seed needs a value"]),
        (["a", "--n_tokens_to_generate", "-1"], ["n_tokens_to_generate is -1", "0 or more"]),
        (["a", "--temperature", "-0.5"], ["temperature is -0.5", "0 or more"]),
        (["a", "--temperature", "nan"], ["temperature is nan"]),
        (["a", "--top_p", "0"], ["top_p is 0.0", "above 0 and at most 1"]),
        (["a", "--top_k", "-3"], ["top_k is -3"]),
        (["a", "--seed", "-3"], ["seed is -3"]),
        (["a", "--n_samples", "0"], ["n_samples is 0", "1 or more"]),
        (["a", "--", "--trace"], ["--"]),
        (["a", "--interactive"], ["one prompt is needed"]),
        (["--interactive", "a"], ["--interactive"]),
        (["-", "--", "--interactive"], ["--"]),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(arguments, words):
    environment = {**os.environ, "GPT2_BASE_URL": "http://127.0.0.1:9"}  # where nothing answers
    assert_one_line(run(*arguments, env=environment), 2, *words)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_error_that_cannot_be_told_has_its_status():
    with open("/dev/full", "wb") as full:
        result = subprocess.run([sys.executable, str(ROOT / "gpt2.py"), "a", "--nope"], stderr=full)
    assert result.returncode == 2


def test_errors_of_the_model_and_the_prompt(models_dir, tmp_path):
    assert_one_line(run("a", "--n_samples", "9" * 30, models_dir=models_dir), 1)
    assert_one_line(run("a", "--model_size", "nope"), 1, "no model 'nope'", "124M, 355M, 774M, 1558M")
    assert_one_line(run("a", "--model_size", "../x"), 1, "'../x'")
    assert_one_line(run("a" * 40, models_dir=models_dir), 1, "40 tokens and 6 new ones", "33 in all")
    environment = {**os.environ, "GPT2_BASE_URL": "nonsense"}
    assert_one_line(run("a", "--models_dir", str(tmp_path), env=environment), 1, "GPT2_BASE_URL", "'nonsense'")
    (tmp_path / "124M").write_text("a file where a folder should be")
    assert_one_line(run("a", "--models_dir", str(tmp_path)), 1, "124M")


@pytest.fixture
def server(tmp_path):
    """A server with a small model under the name 124M; yields its address and the list of what was asked of it."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    write_model(tmp_path / "served" / "124M")
    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_from_a_server_to_the_text(models_dir, server, tmp_path):
    address, asked = server
    environment = {**os.environ, "GPT2_BASE_URL": address, "GPT2_ALLOW_UNVERIFIED": "1"}
    arguments = ["the", "--models_dir", str(tmp_path / "models"), "--n_tokens_to_generate", str(N)]
    first, second = run(*arguments, env=environment), run(*arguments, env=environment)
    assert first.stdout == second.stdout == expected(models_dir, "the")
    assert (first.returncode, second.returncode) == (0, 0)
    assert re.fullmatch(rb"warning: GPT2_ALLOW_UNVERIFIED [^\n]+\n", first.stderr)
    assert second.stderr == b""
    assert len(asked) == 7
    del environment["GPT2_ALLOW_UNVERIFIED"]
    assert_one_line(run("the", "--models_dir", str(tmp_path / "other"), env=environment), 1, "/124M/", "sha256")


def test_a_warm_run_loads_neither_tensorflow_nor_requests(models_dir):
    code = (
        "import sys, gpt2; status = gpt2.command_line(sys.argv[1:]);"
        "print(status, {'tensorflow', 'requests'} & set(sys.modules))"
    )
    arguments = ["the", "--models_dir", str(models_dir), "--model_size", "small", "--n_tokens_to_generate", str(N)]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=True)
    assert result.stdout.endswith(b"\n0 set()\n")


def test_output_into_a_pipe_that_closes(models_dir):
    command = [sys.executable, str(ROOT / "gpt2.py"), "the", "--models_dir", str(models_dir), "--model_size", "small"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*command, "--n_tokens_to_generate", "9"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written(models_dir):
    command = [sys.executable, str(ROOT / "gpt2.py"), "the", "--models_dir", str(models_dir), "--model_size", "small"]
    for arguments in (["--n_tokens_to_generate", "9"], ["--n_tokens_to_generate", "0"], ["--help"]):
        with open("/dev/full", "wb") as full:
            result = subprocess.run([*command, *arguments], stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 1
        assert re.fullmatch(rb"gpt2\.py: [^\n]+\n", result.stderr)


def test_a_terminal_that_cannot_show_a_character(models_dir):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = run("the", "--seed=1", "--temperature=9", models_dir=models_dir, env=environment)
    assert result.returncode == 0
    text = expected(models_dir, "the", seed=1, temperature=9.0).decode()
    assert result.stdout == text.encode("ascii", "replace")
    assert not text.isascii()


def test_help_agrees_with_the_signature():
    page = run("--help")
    assert (page.returncode, page.stderr) == (0, b"")
    shown = dict(re.findall(r"^--(\w+) +(\S+)?(?=  |\n)", page.stdout.decode(), re.MULTILINE))
    defaults = {
        name: "" if parameter.default is None else str(parameter.default)
        for name, parameter in inspect.signature(gpt2.main).parameters.items()
        if name != "prompt"
    }
    assert {name: shown[name] for name in defaults} == defaults
    assert shown.keys() - defaults.keys() == {"interactive", "help"}
    assert "python gpt2.py " in page.stdout.decode()
    assert max(map(len, page.stdout.decode().splitlines())) <= 120


def test_main_returns_the_text(models_dir):
    for prompt in ("the", ""):
        text = gpt2.main(prompt, N, "small", str(models_dir))
        assert text.encode() + b"\n" == expected(models_dir, prompt)


# What a person does at a terminal


def at_terminal(arguments, talk):
    """Run the command line on a pseudo-terminal; talk(send, wait_for) leads. -> (all that was shown, exit status)"""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "gpt2.py"), *arguments], stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    shown, position = b"", 0

    def wait_for(text):
        """Read until text comes, after what was waited for before."""
        nonlocal shown, position
        while text not in shown[position:]:
            ready, _, _ = select.select([terminal], [], [], 60)
            assert ready, f"{text} did not come: {shown}"
            shown += os.read(terminal, 1000)
        position = shown.index(text, position) + len(text)

    talk(lambda data: os.write(terminal, data), wait_for, process)
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while data := os.read(terminal, 1000):
            shown += data
    os.close(terminal)
    return shown.decode(), process.wait(timeout=60)


def test_interactive(models_dir):
    def talk(send, wait_for, process):
        wait_for(b"> ")
        send(b"the\n")
        wait_for(b"> ")
        send(b"x" * 40 + b"\n")
        wait_for(b"33 in all")
        wait_for(b"> ")
        time.sleep(0.5)  # readline shows its prompt shortly before it heeds signals
        process.send_signal(signal.SIGINT)
        wait_for(b"> ")
        send(b"\x04")

    arguments = ["--models_dir", str(models_dir), "--model_size", "small", "--n_tokens_to_generate", str(N)]
    shown, status = at_terminal(["--interactive", *arguments], talk)
    assert status == 0
    assert "Traceback" not in shown


def test_interactive_from_a_pipe_prints_the_answers_alone(models_dir):
    result = run("--interactive", models_dir=models_dir, input=b"the\nand\n")
    assert result.stdout == expected(models_dir, "the") + expected(models_dir, "and")
    assert (result.returncode, result.stderr) == (0, b"")


def without_endoftext(model_dir):
    path = model_dir / "encoder.json"
    path.write_text(path.read_text().replace(', "<|endoftext|>": 268', ""))
    return model_dir


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """A model with a context so long that its answer can be interrupted, and no token that ends it."""
    hparams = {"n_vocab": 268, "n_ctx": 100_000, "n_embd": 4, "n_head": 1, "n_layer": 1}
    model_dir = without_endoftext(write_model(tmp_path_factory.mktemp("models") / "endless", hparams))
    load_encoder_hparams_and_params("endless", str(model_dir.parent))
    return ["--models_dir", str(model_dir.parent), "--model_size", "endless", "--n_tokens_to_generate", "99990"]


def test_ctrl_c_stops_the_answer_and_only_it(endless_model):
    def talk(send, wait_for, process):
        wait_for(b"> ")
        send(b"the\n")
        wait_for(b"\n")
        wait_for(b"e")
        process.send_signal(signal.SIGINT)
        wait_for(b"> ")
        send(b"\x04")

    shown, status = at_terminal(["--interactive", "--seed=1", "--temperature=3", *endless_model], talk)
    assert status == 0
    assert "Traceback" not in shown


def test_ctrl_c_leaves_quietly(endless_model):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "gpt2.py"), "the", "--seed=1", "--temperature=3", *endless_model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


# Whatever the arguments


@settings(
    max_examples=int(os.environ.get("NPGPT_COMMAND_LINES", 40)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # capfdbinary, read after each example
)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
            st.sampled_from(["-", "--", "-h", "--prompt", "--interactive", "--seed", "--top_k=1", "--n_samples", "2"]),
            st.sampled_from(["--separator", "--trace", "--verbose", "--completion", "-i", "-v", "--no", "--=", "---"]),
        ),
        max_size=5,
    )
)
def test_any_arguments(models_dir, capfdbinary, arguments):
    """In this process, for the sake of speed; an exception here would be a traceback there."""
    fixed = ["--models_dir", str(models_dir), "--model_size", "small", "--n_tokens_to_generate", "1"]
    with open(os.devnull) as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        status = gpt2.command_line([*arguments, *fixed])
    out, errors = capfdbinary.readouterr()
    assert status in (0, 1, 2)
    assert (errors == b"") == (status == 0)
    assert errors.count(b"\n") == (status != 0)
    assert out == b"" or status == 0


@pytest.mark.parametrize("redirection", ["<&-", "2>&-", ">&-"])
def test_a_closed_stream(tmp_path, redirection):
    """The first load, which has to do with standard error, and one more; a closed input is an empty one."""
    write_model(tmp_path / "small")
    arguments = f"--models_dir {tmp_path} --model_size small --n_tokens_to_generate {N}"
    for _ in range(2):
        command = f"{sys.executable} {ROOT / 'gpt2.py'} - {arguments} {redirection}"
        result = subprocess.run(command, shell=True, capture_output=True, input=b"the")
        assert (result.returncode, result.stderr) == (0, b"")
        shown = expected(tmp_path, "" if redirection == "<&-" else "the")
        assert result.stdout == (b"" if redirection == ">&-" else shown)
    interactive = f"{sys.executable} {ROOT / 'gpt2.py'} --interactive {arguments} <&-"
    assert subprocess.run(interactive, shell=True, capture_output=True).stderr == b""


@pytest.mark.parametrize("name", ["model/wte", "model/h0/mlp/c_fc/w", "model/h1/ln_1/b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_parameters_are_one_line(tmp_path, name, value):
    model_dir, variables = write_model(tmp_path / "small"), random_variables(SMALL_HPARAMS)
    variables[name][..., 1] = value
    save_variables(model_dir / "model.ckpt", variables)
    load_encoder_hparams_and_params("small", str(tmp_path))
    result = run("the", models_dir=tmp_path)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"gpt2.py: the logits are not finite: the parameters are damaged\n"


def test_a_vocabulary_without_endoftext(tmp_path):
    hparams = {"n_vocab": 268, "n_ctx": 8, "n_embd": 4, "n_head": 1, "n_layer": 1}
    without_endoftext(write_model(tmp_path / "small", hparams))
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>"):
        gpt2.main("", 1, "small", str(tmp_path))
    assert gpt2.main("the", 1, "small", str(tmp_path))


def test_a_text_of_halves_of_characters(tmp_path):
    """A model that always answers with the next byte of a character of four: printed whole, and the rest at the end."""
    model_dir = write_model(tmp_path / "small", {"n_vocab": 269, "n_ctx": 16, "n_embd": 256, "n_head": 1, "n_layer": 1})
    variables = random_variables({"n_vocab": 269, "n_ctx": 16, "n_embd": 256, "n_head": 1, "n_layer": 1})
    encoder, _, _ = load_encoder_hparams_and_params("small", str(tmp_path))
    ids = encoder.encode("😀é")  # six bytes, six tokens
    for name, array in variables.items():
        array[:] = 0 if not name.endswith("/g") else 1
    positions = variables["model/wpe"]
    for position, id in enumerate([*ids, ids[0], ids[1], ids[2]], 1):
        positions[position, id] = 100.0
        variables["model/wte"][id, id] = 1.0
    save_variables(model_dir / "model.ckpt", variables)
    model = load_encoder_hparams_and_params("small", str(tmp_path))
    pieces = list(gpt2.continuation("aa", model, 9, 1))
    assert "".join(pieces) == "😀é\ufffd"
    assert [piece for piece in pieces if piece] == ["😀", "é", "\ufffd"]
