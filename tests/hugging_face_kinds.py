"""What a Hugging Face folder may say: edits of the folders in tests/data/hugging_face.

make_hugging_face.py stores what transformers does with each edited folder, test_hugging_face.py
compares. "refused" is the setting that the error must name, if this library does not support it.
"""

import json
from dataclasses import dataclass, field

REMOVE = "(remove this key)"
KIND_TEXTS = [
    *("", " ", "the", " the", "\nthe", "The don't THE 12 z", "a<|endoftext|> the"),
    *("Juliet Juliets", "<|endoftext|>", "<|user name|> the<|user name|>x", "<s>the</s>"),
    "a <mask> the",
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


def template(*pieces):
    """A post-processor that puts tokens before and after the text, A."""
    single = []
    for piece in pieces:
        kind = "Sequence" if piece == "A" else "SpecialToken"
        single.append({kind: {"id": piece, "type_id": 0}})
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {}
    for entry in (END, USER):
        name = entry["content"]
        special[name] = {"id": name, "ids": [entry["id"]], "tokens": [name]}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def fast(refused=None, config=None, **settings):
    """A kind of the folder tokenizer_json. In the settings, __ stands for a dot."""
    edits = {"tokenizer.json": {key.replace("__", "."): value for key, value in settings.items()}}
    if config:
        edits["tokenizer_config.json"] = config
    return Kind("tokenizer_json", edits, refused)


def added(entry, refused=None):
    """A kind of the folder tokenizer_json with one more added token."""
    return fast(refused, added_tokens=[END, USER, entry])


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


OFFSETS = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUT = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
PREFIX = {"add_prefix_space": True}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TOKENIZERS = {
    "as saved by transformers 5": fast(),
    "prefix space": fast(pre_tokenizer__add_prefix_space=True, config=PREFIX),
    "prefix space in tokenizer.json only": fast(
        "add_prefix_space", pre_tokenizer__add_prefix_space=True
    ),
    "prefix space in tokenizer_config.json only": in_config("add_prefix_space", **PREFIX),
    "prefix space is null": in_config(add_prefix_space=None),
    "offsets": fast(pre_tokenizer__trim_offsets=False),
    "without use_regex": fast(pre_tokenizer__use_regex=REMOVE),
    "words are not split": fast("use_regex", pre_tokenizer__use_regex=False),
    "lower case": fast("normalizer", normalizer={"type": "Lowercase"}),
    "NFC": fast("normalizer", normalizer={"type": "NFC"}),
    "single digits": fast("pre_tokenizer.type", pre_tokenizer={"type": "Sequence"}),
    "no splitter": fast("pre_tokenizer.type", pre_tokenizer=None),
    "no post-processor": fast(post_processor=None),
    "post-processor for offsets": fast(post_processor={"type": "ByteLevel"} | OFFSETS),
    "bos": fast(post_processor=template("<|endoftext|>", "A")),
    "two tokens first": fast(post_processor=template("<|endoftext|>", "<|user name|>", "A")),
    "eos": fast("post_processor.single", post_processor=template("A", "<|endoftext|>")),
    "RoBERTa's post-processor": fast(
        "post_processor.type", post_processor={"type": "RobertaProcessing"}
    ),
    "dropout of zero": fast(model__dropout=0.0),
    "dropout": fast("model.dropout", model__dropout=0.9),
    "prefix of subwords": fast(
        "model.continuing_subword_prefix", model__continuing_subword_prefix="##"
    ),
    "suffix of words": fast("model.end_of_word_suffix", model__end_of_word_suffix="</w>"),
    "unknown token": fast(model__unk_token="<|endoftext|>"),
    "fused unknown tokens": fast(model__fuse_unk=True),
    "bytes as tokens": fast(model__byte_fallback=True),
    "ignored merges": fast(model__ignore_merges=True),
    "without a type of model": fast(model__type=REMOVE),
    "Unigram": fast("model.type", model__type="Unigram"),
    "truncation": fast(truncation=CUT),
    "an added token": added(JULIET),
    "an added token that normalizes": added(token("Juliet", 288, normalized=True)),
    "a longer name": fast(added_tokens=[END, USER, JULIET, token("Juliets", 289)]),
    "an added token that is in the vocabulary": fast(added_tokens=[token("Ġthe", 273), END, USER]),
    "an added token with lstrip": added(token("Juliet", 288, lstrip=True), "lstrip"),
    "an added token with rstrip": added(token("Juliet", 288, rstrip=True), "rstrip"),
    "an added token that is a word": added(token("Juliet", 288, single_word=True), "single_word"),
    "a special token that is not named": added(token("<s>", 288, True)),
    "a named token that is not special": fast(
        added_tokens=[END, USER, token("<s>", 288)], config={"bos_token": "<s>"}
    ),
    "only in added_tokens_decoder": in_config(added_tokens_decoder=decoder(END, USER, JULIET)),
    "in both files": fast(
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
    "vocab.json, prefix space": slow(**PREFIX),
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

ALIASES = {
    **{"num_attention_heads": 4, "n_head": REMOVE, "hidden_size": 8, "n_embd": REMOVE},
    **{"num_hidden_layers": 2, "n_layer": REMOVE},
    **{"max_position_embeddings": 64, "n_positions": REMOVE},
}
BY_LAYER = {"scale_attn_by_inverse_layer_idx": True}
CONFIGS = {  # of the folder `whole`, whose weights they share
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "large epsilon": {"layer_norm_epsilon": 0.125},
    "no scale": {"scale_attn_weights": False},
    "scale by layer": BY_LAYER,
    "only by layer": {"scale_attn_weights": False} | BY_LAYER,
    "upcast": {"reorder_and_upcast_attn": True} | BY_LAYER,
    "all at once": {"activation_function": "relu", "layer_norm_epsilon": 0.01} | BY_LAYER,
    "aliases": ALIASES,
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
