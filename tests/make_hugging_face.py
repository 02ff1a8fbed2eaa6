"""Make tests/data/hugging_face: small models as transformers saves them, and what it computes.

    pip install torch transformers && python tests/make_hugging_face.py

Each folder is a model with random weights. expected.npz holds transformers' logits and greedy ids,
expected.json the ids of some difficult texts. hugging_face_kinds.py lists edits of the folders and
makes random tokenizers; what transformers makes of them is stored as well.
"""

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hugging_face_kinds import (
    CONFIGS,
    END_PROMPT,
    ENDS,
    KIND_TEXTS,
    N_RANDOM,
    TOKENIZERS,
    edit,
    random_tokenizer,
)

DATA_DIR = Path(__file__).parent / "data"
FOLDER = DATA_DIR / "hugging_face"
N_CTX, N_GREEDY = 64, 60
LOGITS_STEP = 19  # only every 19th logit is stored: the greedy ids depend on all of them
END = "<|endoftext|>"
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = [
    *("", " ", "  ", "a", "the", " the", "  the", "the ", "the  ", "\n", "\n\n", " \n", "\n "),
    *("\r\n\r\n", "\t\tif x:\n\t\t\tpass\n", " \t \n \v \f ", "Hello, world!"),
    *("ROMEO:\nWhat light through yonder window breaks?", "thou art the theme of the other"),
    *("I'm, you're, he'd, we'll, they've, it's, can't", "I'M YOU'RE HE'D", "don''t 's 't'll"),
    *("’tis the ’s", "12345 3.14159 1,000,000 ²½Ⅷ ٣٤ x2y", "naïve rôle Ångström ﬁne"),
    *("Привет, мир", "你好,世界", "שלום עולם", "e\u0301 z\u0327\u0308 \u0301"),
    *("🙂🙃 \U0001f469\u200d\U0001f467 🇩🇪", "ſ ß İ ı ǅ"),
    *("\u00a0nbsp\u2003em\u3000wide\u2028line\u0085next", "\ufeffbom\u200bzero"),
    *("\x00\x01\x1b\x7f", "a\x1cb \x1f c", "...!!!---", "a_b-c/d\\e", "<tag attr='x'>"),
    *("$x^2$ {}", "a" * 130, "th" * 90, " " * 70, "?!" * 60, "\U0010ffff\ue000"),
    *("\u0e17\u0e35\u0e48 \u0915\u094d\u0937",),
]


# Vocabularies


def training_text():
    return (DATA_DIR / "shakespeare_held_out.txt").read_text(encoding="utf-8")[:20_000]


def train(special_tokens, n_vocab):
    """A byte-level BPE of the tokenizers package. It puts the special tokens first."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [training_text()], vocab_size=n_vocab, special_tokens=special_tokens, show_progress=False
    )
    return tokenizer


def save_special_tokens_last(folder, n_merges):
    """GPT-2's own order: bytes, merges, <|endoftext|>."""
    tokenizer = train([], 256 + n_merges)
    tokenizer.save_model(str(folder))
    vocabulary = tokenizer.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), END]
    vocabulary = json.dumps(
        {token: i for i, token in enumerate(tokens)}, ensure_ascii=False, separators=(",", ":")
    )
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")


def save_special_tokens_first(folder):
    train(ROBERTA_TOKENS, 290).save_model(str(folder))


def save_added_tokens(folder):
    """As transformers 4 did it: the tokens from 287 on are only in added_tokens.json."""
    save_special_tokens_last(folder, 30)
    (folder / "added_tokens.json").write_text(json.dumps({"<sep>": 287, "<|user name|>": 288}))


def save_tokenizer_json(folder):
    """As transformers 5 does it: everything is in tokenizer.json, with an added token."""
    from transformers import GPT2Tokenizer

    save_special_tokens_last(folder, 30)
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_tokens(["<|user name|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def transformers_ids(folder):
    """The ids of TEXTS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


# Models


def random_model(n_vocab, seed=0, **sizes):
    """A GPT2LMHeadModel whose parameters are all random, so that each of them matters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2} | sizes
    config = GPT2Config(
        vocab_size=n_vocab, n_positions=N_CTX, bos_token_id=None, eos_token_id=None, **sizes
    )
    model, generator = GPT2LMHeadModel(config).eval(), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        parameter.data = mean + 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


def without_some_tokens(model, start):
    """The model, changed so that it never finds the tokens from `start` on likely."""
    model.transformer.wte.weight.data[start:] = 0
    return model


def results(model, n_tokens, seed):
    """{name: array}: random ids, their logits, and the greedy ids after the first four."""
    import torch

    model = model.float()
    ids = np.random.RandomState(seed).randint(0, n_tokens, N_CTX)
    logits = model(torch.from_numpy(ids)[None]).logits[0, :, :n_tokens].numpy()
    text = ids[:4].tolist()
    for _ in range(N_GREEDY):
        likeliest = model(torch.tensor([text])).logits[0, -1, :n_tokens].topk(2)
        gap = likeliest.values[0] - likeliest.values[1]
        assert gap > 1e-4, "rounding could change the greedy ids"
        text.append(int(likeliest.indices[0]))
    return {
        "ids": ids.astype(np.int32),
        "logits": np.ascontiguousarray(logits[:, ::LOGITS_STEP]),
        "greedy": np.array(text[4:], np.int32),
    }


# Edited folders


@contextlib.contextmanager
def edited(base, edits):
    """Yield a copy of a folder, with edits."""
    with tempfile.TemporaryDirectory() as folder:
        folder = shutil.copytree(FOLDER / base, Path(folder) / "model")
        edit(folder, edits)
        yield folder


def config_results():
    """{name: array}: what a model computes that has the weights of `whole` and another config."""
    from transformers import GPT2LMHeadModel

    arrays = {}
    for name, settings in CONFIGS.items():
        with edited("whole", {"config.json": settings}) as folder:
            model = GPT2LMHeadModel.from_pretrained(folder).eval()
        found = results(model, 280, seed=0)
        arrays |= {f"{name}/{key}": found[key] for key in ("logits", "greedy")}
    return arrays


def end_results():
    """{name: what generate adds to some ids}, for different ids that end a text."""
    import torch
    from transformers import GPT2LMHeadModel

    prompt = torch.tensor([END_PROMPT])
    n_prompt = len(END_PROMPT)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    with edited("whole", {}) as folder:
        plain = GPT2LMHeadModel.from_pretrained(folder).generate(prompt, **options)[0].tolist()
    firsts = [i for i in dict.fromkeys(plain[n_prompt:]) if i not in plain[:n_prompt]]
    ids = {"EARLY": firsts[1], "LATE": firsts[2]}
    found = {}
    for name, files in ENDS.items():
        files = json.loads(re.sub('"(EARLY|LATE)"', lambda m: str(ids[m[1]]), json.dumps(files)))
        edits = {"config.json": files[0]}
        if files[1]:
            edits["generation_config.json"] = files[1]
        with edited("whole", edits) as folder:
            new = GPT2LMHeadModel.from_pretrained(folder).generate(prompt, **options)[0].tolist()
        found[name] = {"edits": edits, "all": plain[n_prompt:], "new": new[n_prompt:]}
    return found


def tokenizer_results():
    """{name: [ids of KIND_TEXTS, ids of the special tokens]} of each kind."""
    from transformers import AutoTokenizer

    found = {}
    for name, edits in TOKENIZERS.items():
        base = "tokenizer_json" if "tokenizer.json" in edits else "added_tokens"
        with edited(base, edits) as folder:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        added = tokenizer.added_tokens_decoder.items()
        special = sorted(token_id for token_id, token in added if token.special)
        found[name] = [[tokenizer.encode(text) for text in KIND_TEXTS], special]
    return found


def random_results():
    """For each random tokenizer: for each text, the ids, with and without special tokens, and the
    text of the former. null where transformers fails."""
    from transformers import AutoTokenizer

    found = []
    for seed in range(N_RANDOM):
        edits, texts = random_tokenizer(seed)
        answers = []
        with edited("tokenizer_json", edits) as folder:
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            except BaseException as error:  # a panic of tokenizers is one
                print(seed, "-> transformers:", str(error)[:150])
                found.append(None)
                continue
        for text in texts:
            answer = None
            with contextlib.suppress(BaseException):  # a panic of tokenizers is one
                ids = tokenizer.encode(text)
                without = tokenizer.encode(text, split_special_tokens=True)
                answer = [ids, without, tokenizer.decode(ids)]
            answers.append(answer)
        found.append(answers)
    return found


def main():
    import torch
    from transformers import GPT2Config

    shutil.rmtree(FOLDER, ignore_errors=True)
    expected_arrays, expected_ids = {}, {}

    def add(name, n_tokens, save_vocabulary, model, change=lambda model: model, **options):
        folder = FOLDER / name
        folder.mkdir(parents=True)
        save_vocabulary(folder)
        change(model).save_pretrained(folder, **options)
        (folder / "generation_config.json").unlink(missing_ok=True)
        for path in folder.glob("*"):
            path.chmod(0o644)
        arrays = results(model, n_tokens, seed=len(expected_arrays))
        expected_arrays.update({f"{name}/{key}": array for key, array in arrays.items()})
        expected_ids[name] = transformers_ids(folder)
        if save_vocabulary is gpt2_order and name != "whole":  # its ids are stored once
            assert expected_ids.pop(name) == expected_ids["whole"]

    def gpt2_order(folder):
        save_special_tokens_last(folder, 23)

    with torch.no_grad():
        add("whole", 280, gpt2_order, random_model(280))
        add("sharded", 280, gpt2_order, random_model(280, seed=1), max_shard_size="8KB")
        add("float16", 280, gpt2_order, random_model(280, seed=2).half())
        add("bfloat16", 280, gpt2_order, random_model(280, seed=3).bfloat16())
        model = random_model(280, seed=4)
        add("no_prefix", 280, gpt2_order, model, lambda model: model.transformer)
        add("six_layers", 280, gpt2_order, random_model(280, seed=5, n_layer=6, n_inner=12))
        add("padded", 280, gpt2_order, random_model(320, seed=6))
        model = random_model(290, seed=7, n_head=1)
        add("special_tokens_first", 290, save_special_tokens_first, model)
        model = without_some_tokens(random_model(289, seed=8, n_head=4), 287)
        add("added_tokens", 287, save_added_tokens, model)
        model = random_model(288, seed=9, n_embd=10, n_head=5)
        add("tokenizer_json", 288, save_tokenizer_json, model)
        expected_arrays |= config_results()
        expected_ends = end_results()
    np.savez_compressed(FOLDER / "expected.npz", **expected_arrays)
    content = {"texts": TEXTS, "ids": expected_ids, "ends": expected_ends}
    content["defaults"] = GPT2Config().to_dict()
    content["tokenizers"] = tokenizer_results()
    content["random"] = random_results()
    content = json.dumps(content, separators=(",", ":"))
    (FOLDER / "expected.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
