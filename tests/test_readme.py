"""Everything in the code blocks of the README and models/README.md works and prints what it shows.

A command is run if it loads the model tiny. A command that loads another model needs the network,
and train.py needs minutes; test_tiny.py trains a smaller model. Of these, only the options are
checked. .ci/run runs the two blocks that set up an environment.
"""

import importlib
import inspect
import re
import shlex
import shutil

import pytest
from helpers import REAL_MODELS_DIR, ROOT, bash, copy_model
from test_real_weights import ANSWERS

import gpt2
import terminal
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = (ROOT / "models" / "README.md").read_text(encoding="utf-8")


def read_blocks(text):
    """Return the code blocks -> list of (language, code, what it shows).

    A block without a language is what the block before it shows.
    """
    blocks = []
    for language, content in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if language:
            blocks.append((language, content, ""))
        else:
            blocks[-1] = (*blocks[-1][:2], content)
    return blocks


BLOCKS = read_blocks(README)
SHELL = [(code.rstrip("\n"), shown) for language, code, shown in BLOCKS if language == "sh"]
PYTHON = [(code, shown) for language, code, shown in BLOCKS if language == "python"]
PROGRAM = r"(?:(?:echo|printf) .* \| )?python ((?:gpt2|examples/\w+)\.py) (.*)"


def split_programs():
    """Split the lines into commands -> the commands to run, with what they show, and the others."""
    run = []
    others = []
    for block, shown in SHELL:
        for command in re.split(r" && |\n", block):
            if not re.match(PROGRAM, command):
                continue
            if "--model_size tiny" in command:
                run.append((command, shown))
            else:
                others.append(command)
    return run, others


RUN, OTHERS = split_programs()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the files of a fresh clone that the commands use."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    copy_model(REAL_MODELS_DIR / "tiny", folder / "models" / "tiny")
    return folder


def assert_prints(output, shown):
    """Equal texts, and equal numbers but for their last digits, which depend on the CPU."""
    number = r"\d+\.\d{3,}"
    assert re.sub(number, "number", output) == re.sub(number, "number", shown)
    expected = list(map(float, re.findall(number, shown)))
    assert list(map(float, re.findall(number, output))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("command", "shown"), RUN)
def test_commands_print_what_is_shown(clone, command, shown):
    result = bash(command, cwd=clone)
    assert result.returncode == 0
    assert result.stderr == "" or re.fullmatch(r"(page|score)\.\w+: .*\n", result.stderr)
    if shown:
        assert_prints(result.stdout, shown)


@pytest.mark.parametrize("command", [command for command, _ in RUN] + OTHERS)
def test_options_of_commands_exist(command):
    program, arguments = re.match(PROGRAM, command).groups()
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    options = getattr(module, "Options", lambda: None)
    assert terminal.arguments(module.command, shlex.split(arguments), options)


@pytest.mark.parametrize(("snippet", "shown"), PYTHON)
def test_snippets_print_what_is_shown_when_they_are_pasted(clone, snippet, shown):
    result = bash("python -q -i", cwd=clone, input=snippet)  # prompts go to standard error
    assert result.returncode == 0
    assert "Error" not in result.stderr
    assert result.stdout.rstrip("\n") == shown.rstrip("\n")


def test_commands_that_are_not_run():
    """They need the network or minutes. The answer of 124M is the one that is published."""
    programs = {re.search(r"\w+\.py", command)[0] for command, _ in RUN}
    assert programs == {"gpt2.py", "look.py", "score.py"}
    for command in OTHERS:
        assert re.search(r"Alan Turing|openai-community/|microsoft/|train\.py", command)
    (shown,) = [shown for line, shown in SHELL if "Alan Turing" in line]
    model_size, prompt, n_tokens, answer = ANSWERS[0]
    assert (model_size, n_tokens) == ("124M", 40)
    assert f'python gpt2.py "{prompt}"' in OTHERS
    assert shown == answer


def test_set_up_and_requirements():
    """.ci/run runs these two blocks. The lists of requirements are those of pyproject.toml."""
    quick_start, *_, tests = [block for block, _ in SHELL if ".venv" in block or "ADDRESS" in block]
    environment = "python3 -m venv .venv && . .venv/bin/activate\n"
    assert quick_start.startswith("git clone ADDRESS npGPT && cd npGPT\n" + environment)
    assert tests.startswith(environment)
    assert max(map(len, quick_start.splitlines())) < 80
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace("'", '"')
    extras = {
        name: re.findall(r'^ +"(.*)",$', lines, re.MULTILINE)
        for name, lines in re.findall(r"^(\w+) = \[\n(.*?)^\]", project, re.M | re.S)
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(extras["dependencies"] + extras["tensorflow"]) == sorted(lines)
    lines = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert extras["tests"] == [line for line in lines if not line.startswith("-r")]


def test_options_match_the_command():
    """The table of the README and the help name all options, with their defaults."""
    defaults = {"n_samples": "1"}
    for function in gpt2.command, gpt2.Options:
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in ("prompt", "options", *defaults):
                is_shown = (
                    isinstance(parameter.default, str | float | int)
                    and parameter.default is not False
                )
                defaults[name] = str(parameter.default) if is_shown else ""
    assert dict(re.findall(r"^\| `--(\w+)` \| (\S*) ?\|", README, re.MULTILINE)) == defaults
    page = inspect.getdoc(gpt2.command)
    options = dict(re.findall(r"^--(\w+) +(\S+)?(?=  |\n)", page, re.MULTILINE))
    assert options == defaults | {"help": ""}


@pytest.mark.parametrize("path", sorted(ROOT.glob("[!.]*/*.md")) + sorted(ROOT.glob("*.md")))
def test_rows_of_a_table_have_the_same_number_of_cells(path):
    """A | within a cell needs a backslash, also in code."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_files_and_sizes_are_named_and_links_lead_to_files():
    for name in [*utils.FILES, *utils.MODEL_SIZES, *utils.MODEL_SIZES.values()]:
        assert name in MODELS
    for folder, text in ((ROOT, README), (ROOT / "models", MODELS)):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (folder / link).exists(), link
