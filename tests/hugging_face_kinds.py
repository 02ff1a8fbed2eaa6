"""What a Hugging Face folder may say: edits of the folders in tests/data/hugging_face.

make_hugging_face.py stores what transformers does with each edited folder, test_hugging_face.py
compares. "refused" is the setting that the error must name, if this library does not support it.
"""

import json
from dataclasses import dataclass, field

REMOVE = "(remove this key)"
KIND_TEXTS = [
    *(
        "",
        " ",
        "the",
        " the",
        "\nthe",
        "The don't THE 12 z",
        "a<|endoftext|> the",
        "Juliet Juliets",
    ),
    *("<|endoftext|>", "<|user name|> the<|user name|>x", "<s>the</s>", "a <mask> the"),
]


@dataclass
class Kind:
    base: str
    edits: dict = field(default_factory=dict)  # {file: text, or {key.key: value}}
    refused: str | None = None


def edit(folder, edits):
    """Change files of a folder: a text replaces a file, a dict sets values in its JSON."""
    for name, changes in edits.items():
        path = folder / name
        if isinstance(changes, str):
            path.write_bytes(changes.encode("utf-8"))
            continue
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for setting, value in changes.items():
            *keys, last = setting.split(".")
            place = content
            for key in keys:
                place = place[int(key) if key.isdecimal() else key]
            if value == REMOVE:
                place.pop(last, None)
            else:
                place[last] = value
        path.write_text(json.dumps(content), encoding="utf-8")


def token(content, token_id, special=False, **flags):
    """An added token as tokenizer.json writes it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | flags
    return {"id": token_id, "content": content, "special": special} | flags


def decoder(*tokens):
    """added_tokens_decoder of tokenizer_config.json, as transformers 4 wrote it."""
    return {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in tokens}


END = token("<|endoftext|>", 286, True)
USER = token("<|user name|>", 287, True)
JULIET = token("Juliet", 288)
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def template(*pieces):
    """A post-processor that puts tokens before and after the text, A."""
    single = []
    for piece in pieces:
        kind = "Sequence" if piece == "A" else "SpecialToken"
        single.append({kind: {"id": piece, "type_id": 0}})
    ids = {"<|endoftext|>": 286, "<|user name|>": 287}
    special = {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in pieces if name != "A"
    }
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def in_tokenizer(refused=None, config=None, **settings):
    """A kind of the folder tokenizer_json. In the settings, __ stands for a dot."""
    edits = {"tokenizer.json": {key.replace("__", "."): value for key, value in settings.items()}}
    if config:
        edits["tokenizer_config.json"] = config
    return Kind("tokenizer_json", edits, refused)


def in_config(refused=None, **settings):
    """A kind of the folder tokenizer_json with other settings in tokenizer_config.json."""
    return Kind("tokenizer_json", {"tokenizer_config.json": settings}, refused)


def slow(refused=None, map_=None, added=None, **settings):
    """A kind of the folder added_tokens, which has vocab.json and merges.txt, as transformers 4."""
    edits = {"added_tokens.json": json.dumps(added or {})}
    if settings:
        edits["tokenizer_config.json"] = settings
    if map_:
        edits["special_tokens_map.json"] = map_
    return Kind("added_tokens", edits, refused)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TOKENIZERS = {
    "as saved by transformers 5": in_tokenizer(),
    "prefix space": in_tokenizer(
        pre_tokenizer__add_prefix_space=True, config={"add_prefix_space": True}
    ),
    "prefix space in tokenizer.json only": in_tokenizer(
        "add_prefix_space", pre_tokenizer__add_prefix_space=True
    ),
    "prefix space in tokenizer_config.json only": in_config(
        "add_prefix_space", add_prefix_space=True
    ),
    "prefix space is null": in_config(add_prefix_space=None),
    "offsets": in_tokenizer(pre_tokenizer__trim_offsets=False),
    "without use_regex": in_tokenizer(pre_tokenizer__use_regex=REMOVE),
    "words are not split": in_tokenizer("use_regex", pre_tokenizer__use_regex=False),
    "lower case": in_tokenizer("normalizer", normalizer={"type": "Lowercase"}),
    "NFC": in_tokenizer("normalizer", normalizer={"type": "NFC"}),
    "prepended": in_tokenizer("normalizer", normalizer={"type": "Prepend", "prepend": "x"}),
    "white space": in_tokenizer("pre_tokenizer.type", pre_tokenizer={"type": "Whitespace"}),
    "metaspace": in_tokenizer(
        "pre_tokenizer.type",
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    ),
    "single digits": in_tokenizer(
        "pre_tokenizer.type",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
        },
    ),
    "no splitter": in_tokenizer("pre_tokenizer.type", pre_tokenizer=None),
    "no post-processor": in_tokenizer(post_processor=None),
    "post-processor for offsets": in_tokenizer(post_processor=BYTE_LEVEL),
    "bos": in_tokenizer(post_processor=template("<|endoftext|>", "A")),
    "two tokens first": in_tokenizer(
        post_processor=template("<|endoftext|>", "<|user name|>", "A")
    ),
    "eos": in_tokenizer("post_processor.single", post_processor=template("A", "<|endoftext|>")),
    "RoBERTa's post-processor": in_tokenizer(
        "post_processor.type",
        post_processor={
            "type": "RobertaProcessing",
            "sep": ["<|endoftext|>", 286],
            "cls": ["<|user name|>", 287],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
    ),
    "dropout of zero": in_tokenizer(model__dropout=0.0),
    "dropout": in_tokenizer("model.dropout", model__dropout=0.9),
    "prefix of subwords": in_tokenizer(
        "model.continuing_subword_prefix", model__continuing_subword_prefix="##"
    ),
    "suffix of words": in_tokenizer("model.end_of_word_suffix", model__end_of_word_suffix="</w>"),
    "unknown token": in_tokenizer(model__unk_token="<|endoftext|>"),
    "fused unknown tokens": in_tokenizer(model__fuse_unk=True),
    "bytes as tokens": in_tokenizer(model__byte_fallback=True),
    "merges of one text": in_tokenizer(config=FAST),
    "ignored merges": in_tokenizer(model__ignore_merges=True),
    "without a type of model": in_tokenizer(model__type=REMOVE),
    "Unigram": in_tokenizer(
        "model.type", model={"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]]}
    ),
    "WordPiece": in_tokenizer(
        "model.type",
        model={
            "type": "WordPiece",
            "unk_token": "a",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"a": 0},
        },
    ),
    "truncation": in_tokenizer(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    ),
    "an added token": in_tokenizer(added_tokens=[END, USER, JULIET]),
    "an added token that normalizes": in_tokenizer(
        added_tokens=[END, USER, token("Juliet", 288, normalized=True)]
    ),
    "a longer name": in_tokenizer(added_tokens=[END, USER, JULIET, token("Juliets", 289)]),
    "an added token that is in the vocabulary": in_tokenizer(
        added_tokens=[token("Ġthe", 273), END, USER]
    ),
    "an added token with lstrip": in_tokenizer(
        "lstrip", added_tokens=[END, USER, token("Juliet", 288, lstrip=True)]
    ),
    "an added token with rstrip": in_tokenizer(
        "rstrip", added_tokens=[END, USER, token("Juliet", 288, rstrip=True)]
    ),
    "an added token that is a word": in_tokenizer(
        "single_word", added_tokens=[END, USER, token("Juliet", 288, single_word=True)]
    ),
    "a special token that is not named": in_tokenizer(
        added_tokens=[END, USER, token("<s>", 288, True)]
    ),
    "a named token that is not special": in_tokenizer(
        added_tokens=[END, USER, token("<s>", 288)], config={"bos_token": "<s>"}
    ),
    "only in added_tokens_decoder": in_config(added_tokens_decoder=decoder(END, USER, JULIET)),
    "in both files": in_tokenizer(
        added_tokens=[END, USER, JULIET],
        config={"added_tokens_decoder": decoder(END, USER, JULIET)},
    ),
    "add_bos_token with a tokenizer.json": in_config(add_bos_token=True),
    "add_eos_token with a tokenizer.json": in_config(add_eos_token=True),
    "errors": in_config(errors="strict"),
    "split_special_tokens": in_config(split_special_tokens=False),
    "clean_up_tokenization_spaces": in_config(clean_up_tokenization_spaces=True),
    "model_max_length": in_config(model_max_length=2, padding_side="left", truncation_side="left"),
    "pad_token": in_config(pad_token="<|user name|>"),
    "additional_special_tokens": in_config(additional_special_tokens=["<|user name|>"]),
    "extra_special_tokens": in_config(extra_special_tokens={"user_token": "<|user name|>"}),
    "PreTrainedTokenizerFast": in_config(**FAST),
    "GPT2TokenizerFast": in_config(tokenizer_class="GPT2TokenizerFast"),
    "no tokenizer_config.json": Kind("tokenizer_json", {"tokenizer_config.json": "{}"}),
    "vocab.json": slow(),
    "vocab.json, prefix space": slow(add_prefix_space=True),
    "vocab.json, bos": slow(add_bos_token=True),
    "vocab.json, other bos": slow(
        add_bos_token=True, bos_token="<s>", added={"<s>": 287}, eos_token="<|endoftext|>"
    ),
    "vocab.json, bos as a dict": slow(add_bos_token=True, bos_token=END | {"__type": "AddedToken"}),
    "vocab.json, eos": slow("add_eos_token", add_eos_token=True),
    "vocab.json, added tokens": slow(added={"Juliet": 287, "<|user name|>": 288}),
    "vocab.json, special tokens": slow(
        map_={"additional_special_tokens": ["<|user name|>"], "pad_token": "<s>"},
        added={"<|user name|>": 287, "<s>": 288},
    ),
    "vocab.json, added_tokens_decoder": slow(
        added={"Juliet": 288, "<|user name|>": 287},
        added_tokens_decoder=decoder(END, USER, JULIET),
        tokenizer_class="GPT2Tokenizer",
    ),
    "vocab.json, a token with lstrip": slow(
        "lstrip", added_tokens_decoder=decoder(END, token("Juliet", 287, lstrip=True))
    ),
    "vocab.json of RoBERTa": slow("tokenizer_class", tokenizer_class="RobertaTokenizer"),
}

CONFIGS = {  # of the folder `whole`, whose weights they share
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "large epsilon": {"layer_norm_epsilon": 0.125},
    "no scale": {"scale_attn_weights": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "only by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "all at once": {
        "activation_function": "relu",
        "layer_norm_epsilon": 0.01,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "aliases": {
        "num_attention_heads": 4,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "n_head": REMOVE,
        "n_embd": REMOVE,
        "n_layer": REMOVE,
        "n_positions": REMOVE,
    },
    "an alias and the native name": {"num_attention_heads": 4, "n_head": 1},
}

END_PROMPT = [152, 249, 131, 256, 277, 147]  # the model goes on with several other ids
ENDS = {  # of the folder `whole`: config.json, and generation_config.json if there is one
    "one id": ({"eos_token_id": "LATE"}, None),
    "a list": ({"eos_token_id": ["LATE", "EARLY"]}, None),
    "generation_config.json": ({"eos_token_id": "LATE"}, {"eos_token_id": "EARLY"}),
    "a list in generation_config.json": (
        {"eos_token_id": None},
        {"eos_token_id": ["EARLY", "LATE"]},
    ),
    "none": ({"eos_token_id": None}, None),
}
