"""What a Hugging Face folder may say: edits of the folders in tests/data/hugging_face.

make_hugging_face.py stores what transformers does with each edited folder, test_hugging_face.py
compares.
"""

import json
import random

REMOVE = "(remove this key)"
KIND_TEXTS = [
    *("", " ", "the", " the", "\nthe", "The don't THE 12 z", "a<|endoftext|> the"),
    *("Juliet Juliets", "<|endoftext|>", "<|user name|> the<|user name|>x", "<s>the</s>"),
    "a <mask> the",
]


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


def slow(map_=None, added=None, **settings):
    """Edits of the folder added_tokens, which has vocab.json and merges.txt, as transformers 4."""
    edits = {"added_tokens.json": json.dumps(added or {})}
    if settings:
        edits["tokenizer_config.json"] = settings
    if map_:
        edits["special_tokens_map.json"] = map_
    return edits


OFFSETS = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUT = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
MASK = token("<mask>", 0, lstrip=True) | {"__type": "AddedToken"}
TOKENIZERS = {  # edits of the folder added_tokens, or of tokenizer_json if they have this file
    "as saved by transformers 5": {"tokenizer.json": {}},
    "truncation": {"tokenizer.json": {"truncation": CUT}},
    "settings without effect": {
        "tokenizer.json": {"pre_tokenizer.trim_offsets": False, "model.type": REMOVE},
        "tokenizer_config.json": {
            **{"add_bos_token": True, "add_eos_token": True, "errors": "strict"},
            **{"clean_up_tokenization_spaces": True, "model_max_length": 2, "padding_side": "left"},
        },
    },
    "no tokenizer_config.json": {"tokenizer.json": {}, "tokenizer_config.json": "{}"},
    "merges as texts": {"tokenizer.json": {"model.merges": ["Ġ t", "h e", "Ġt he"]}},
    "vocab.json": slow(),
    "vocab.json, prefix space": slow(add_prefix_space=True),
    "vocab.json, added tokens": slow(added={"Juliet": 288, "<|user name|>": 287}),
    "vocab.json, special tokens": slow(
        {"additional_special_tokens": ["<|user name|>"], "pad_token": "<s>"},
        {"<|user name|>": 287, "<s>": 288},
    ),
    "vocab.json, both lists": slow(
        added={"Juliet": 288, "<|user name|>": 287, "The": 289},
        added_tokens_decoder=decoder(END, USER, JULIET),
        tokenizer_class="GPT2Tokenizer",
    ),
    "vocab.json, a token with lstrip": slow(
        added_tokens_decoder=decoder(END, token("Juliet", 287, lstrip=True))
    ),
    "vocab.json, tokens without ids": slow({"pad_token": "<s>", "mask_token": MASK}),
    "vocab.json, endoftext is not special": slow(
        bos_token=None, eos_token="<s>", unk_token="<s>", pad_token="<s>"
    ),
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


# Random tokenizers

N_RANDOM = 300
NAMES = [
    *("Juliet", "Juliets", "the", " the", "Ġthe", "h", "<s>", "</s>", "<|user name|>", "a b", "12"),
    *("é", "e", "\n", "<", "<|endoftext|>", "don't", " ", "\u3000x", "in", "ing"),
]
PIECES = [*NAMES, *(" ", "  ", "\t", "\n\n", "The", "z", "!", "_", "½", "e\u0301", "中", "\x1c")]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "image_token")
CLASSES = [
    *("GPT2Tokenizer", "GPT2Tokenizer", "GPT2TokenizerFast", REMOVE, "PreTrainedTokenizerFast"),
    *("PreTrainedTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
]
BOS_OF_OTHER_IDS = template("<|endoftext|>", "A")
BOS_OF_OTHER_IDS["special_tokens"]["<|endoftext|>"]["ids"] = [7, 9]
PROCESSORS = [
    *(None, template("A"), template("<|endoftext|>", "A"), {"type": "ByteLevel"} | OFFSETS),
    *(template("<|endoftext|>", "<|user name|>", "A"), BOS_OF_OTHER_IDS),
]
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
ODD = [  # what is refused: the file, the setting, its value
    (FILE, "normalizer", {"type": "NFC"}),
    (FILE, "pre_tokenizer.type", "Whitespace"),
    (FILE, "pre_tokenizer.use_regex", False),
    (FILE, "model.type", "Unigram"),
    (FILE, "model.dropout", 0.5),
    (FILE, "model.continuing_subword_prefix", "##"),
    (FILE, "model.end_of_word_suffix", "</w>"),
    (FILE, "post_processor", template("A", "<|endoftext|>")),
    (FILE, "post_processor", {"type": "RobertaProcessing"}),
    (FILE, "decoder.type", "WordPiece"),
]
OTHER_CLASSES = ["RobertaTokenizer", "BartTokenizer", "Qwen2Tokenizer", "WhisperTokenizer"]
OTHER_CLASSES += ["BertTokenizerFast", "CLIPTokenizer"]
ODD += [(CONFIG, "tokenizer_class", name) for name in OTHER_CLASSES]


def random_token(rng, token_id):
    return token(rng.choice(NAMES), token_id, **{flag: rng.random() < 0.3 for flag in FLAGS})


def random_tokenizer(seed):
    """Edits of the folder tokenizer_json, and texts to encode."""
    rng = random.Random(seed)
    entries = [END] if rng.random() < 0.8 else []
    entries += [random_token(rng, 287 + i) for i in range(rng.randrange(6))]
    settings = {"tokenizer_class": rng.choice(CLASSES)}
    for key in NAMED:
        value = rng.choice([None, *NAMES, random_token(rng, 0) | {"__type": "AddedToken"}])
        settings |= rng.choice([{}, {key: REMOVE}, {key: value}])
    extra = rng.sample(NAMES, 2)
    settings |= rng.choice(
        [{}, {}, {"extra_special_tokens": extra}, {"additional_special_tokens": extra}]
    )
    settings["add_prefix_space"] = rng.random() < 0.3
    if rng.random() < 0.2:
        changed = [entry | {rng.choice(FLAGS): True} for entry in entries]
        settings["added_tokens_decoder"] = decoder(*changed, random_token(rng, 295))
    content = {
        "added_tokens": entries,
        "pre_tokenizer.add_prefix_space": rng.random() < 0.3,
        "model.ignore_merges": rng.random() < 0.3,
        "post_processor": rng.choice(PROCESSORS),
    }
    if rng.random() < 0.3:  # then some tokens have no merges
        content["model.merges"] = [["Ġ", "t"], ["Ġt", "h"], ["i", "n"]]
    edits = {"tokenizer.json": content, "tokenizer_config.json": settings}
    if rng.random() < 0.2:
        edits["special_tokens_map.json"] = {"mask_token": rng.choice(NAMES), "pad_token": "<s>"}
    if rng.random() < 0.15:
        file, setting, value = rng.choice(ODD)
        edits[file][setting] = value
    names = [entry["content"] for entry in entries]
    texts = ["".join(rng.choices(PIECES + names * 4, k=rng.randrange(1, 9))) for _ in range(5)]
    return edits, texts
