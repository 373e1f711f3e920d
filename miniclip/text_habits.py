"""What users of transformers' tokenizers type besides a call: added tokens, padding of ready rows, masks; and
the names that are left out, each with what to do instead.

Not needed to understand a tokenizer. docs/compatibility.md is made of these tables.
Mirrors: transformers' PreTrainedTokenizerBase.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from miniclip.encoding import SPECIAL_NAMES, Encoding, Tokenizer, TokenizerError, as_kind, clean_up
from miniclip.files import shown
from miniclip.habits import (
    LOADING_IDLE,
    LOADING_REFUSED,
    SAVING_IDLE,
    SAVING_REFUSED,
    LeftOut,
    Table,
    settle,
    table,
)

READING_IDLE: Table = {**LOADING_IDLE, **table({
    "use_fast backend from_slow tokenizer_class processor_class tokenizer_type": "there is one of them",
    "name_or_path special_tokens_map_file legacy verbose errors": "it changes no id",
    "do_lower_case add_prefix_space": "CLIP's text is always in lower case and has no prefix; BertTokenizer "
                                      "has do_lower_case",
})}
READING_REFUSED: Table = {**LOADING_REFUSED, **table({
    "vocab_file merges_file tokenizer_file": "give the folder that holds them",
    "padding truncation max_length return_tensors add_special_tokens": "give it in the call",
    "chat_template": "CLIP's text tower does not chat",
    "split_special_tokens": "take special tokens out of strangers' text before",
})}
WRITING_IDLE: Table = {**SAVING_IDLE, **table({
    "legacy_format save_format": "files for transformers 4 and 5 are both written",
    "save_jinja_files": "there is no chat template",
})}
WRITING_REFUSED: Table = {**SAVING_REFUSED, "filename_prefix": "give each tokenizer a folder of its own"}


def sort_options(kind: type, options: Mapping[str, Any], vocab: Mapping[str, int]) -> tuple[dict, dict]:
    """Options of from_pretrained as those of the constructor and as special tokens yet to be added.

    What is neither is an option that does nothing here, or raises: see settle().
    """
    where, own, special = f"{kind.__name__}.from_pretrained", {}, {}
    for name, value in options.items():
        if name in (*SPECIAL_NAMES, "extra_special_tokens", "additional_special_tokens"):
            if value is not None:
                special[name] = value
        elif name in options_of(kind):
            own[name] = value
        elif not name.startswith("_"):              # those are AutoTokenizer's own
            settle(where, {name: value}, READING_IDLE, READING_REFUSED)
    for name in set(special) & set(options_of(kind)):
        if symbol_of(special[name]) in vocab:
            own[name] = symbol_of(special.pop(name))
    return own, special


def options_of(kind: type) -> list[str]:
    """The options of a tokenizer's constructor."""
    return [p.name for each in (kind, Tokenizer) for p in inspect.signature(each.__init__).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name != "extra_special_tokens"]


def settle_writing(where: str, given: Mapping[str, Any]) -> None:
    """settle() with the options of a tokenizer's save_pretrained."""
    settle(where, given, WRITING_IDLE, WRITING_REFUSED)


def added_entries(described: Any) -> dict[str, dict[str, Any]]:
    """Descriptions of added tokens by their text, from a list or from {id: description}; broken ones are
    passed over."""
    if isinstance(described, dict):
        described = [{**entry, "id": int(i)} for i, entry in described.items()
                     if isinstance(entry, dict) and i.isdecimal() and len(i) < 10]
    return {entry["content"]: entry for entry in (described if isinstance(described, list) else ())
            if isinstance(entry, dict) and isinstance(entry.get("content"), str) and "id" in entry}


def check_ids(vocab: Mapping[str, Any], source: str) -> None:
    """Raises TokenizerError unless every id is a number that int32 holds, as clip_tokenize returns them."""
    for symbol, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31:
            raise TokenizerError(f"{source}: vocabulary: the id of {shown(symbol, 80)} is {shown(i, 80)}, "
                                 "not a number from 0 to 2147483647")


def max_length_of(values: Mapping[str, Any], source: str) -> dict[str, int]:
    """model_max_length of a tokenizer_config.json as an option, if it is there and a limit."""
    length = values.get("model_max_length")
    if length is None:
        return {}
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 1:
        raise TokenizerError(f"{source}: model_max_length = {shown(length)} is not a number of tokens")
    return {"model_max_length": int(length)} if length < 1e9 else {}     # transformers writes 1e30


def symbol_of(token: Any) -> str:
    """The text of a token that is given as a string or as transformers' AddedToken.

    Raises TokenizerError for one that swallows blanks or stands for whole words only.
    """
    if isinstance(token, str):
        return token
    for flag in ("lstrip", "rstrip", "single_word"):
        if getattr(token, flag, False):
            raise TokenizerError(f"token {shown(str(token))}: {flag} = True is not supported")
    if not isinstance(getattr(token, "content", None), str):
        raise TokenizerError(f"token = {shown(token)} is not a string")
    return token.content


class TextHabits(LeftOut, Tokenizer):
    """Mixin of both tokenizers."""

    backend = "python"
    name_or_path = ""
    init_inputs = ()
    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = list(SPECIAL_NAMES)
    arguments_left_out: ClassVar[dict[str, Table]] = {
        "__call__": {"tokenizer_kwargs": "give each option by its own name"},
        "save_vocabulary": {"filename_prefix": WRITING_REFUSED["filename_prefix"]},
        "__init__": {"tokenize_chinese_chars": "Chinese characters are words of their own, as in every BERT "
                                               "that reads Chinese"},
    }
    left_out: ClassVar[Table] = table({
        "encode_plus batch_encode_plus prepare_for_model": "call it: tokenizer(text, padding=True)",
        "truncate_sequences set_truncation_and_padding": "call it with truncation=True and padding=True",
        "prepare_seq2seq_batch as_target_tokenizer": "call the tokenizer a second time",
        "apply_chat_template get_chat_template save_chat_templates": "CLIP's text tower does not chat",
        "encode_message_with_chat_template parse_response get_response_parser": "CLIP's text tower does not "
                                                                                "chat",
        "train_new_from_iterator": "CLIPTokenizer.train(texts, vocab_size)",
        "add_bos_token add_eos_token update_post_processor": "call it with add_special_tokens=False",
        "backend_tokenizer decoder slow_tokenizer_class can_save_slow_tokenizer": "no Rust is underneath",
        "convert_to_native_format convert_added_tokens": "no Rust is underneath",
        "model vocab_files_names pretrained_vocab_files_map": "see tokenizer.vocab and save_vocabulary",
        "sanitize_special_tokens": "add_special_tokens adds what is missing",
        "push_to_hub": "upload the folder with huggingface_hub",
        "register_for_auto_class": "code from a folder is never run",
        "model": "vocab and merges are what it is made of",
        "pretrained_vocab_files_map": "nothing is downloaded",
        "vocab_files_names": "see save_pretrained",
    })

    # -- tokens that are added

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds symbols at the vocabulary's end, each found whole in every text; the number of new ones.

        new_tokens: a string, transformers' AddedToken, or a list of them. A special one is found as it is
        written; another one in the normalised text, so in any case of its letters.
        Remember to resize the model's embedding to len(tokenizer).
        """
        many = isinstance(new_tokens, (list, tuple))
        before, added = len(self.vocab), set(self.added_tokens)
        ids = itertools.count(max(self.vocab.values(), default=-1) + 1)
        for token in new_tokens if many else [new_tokens]:
            symbol = symbol_of(token)
            if not symbol or symbol in added:
                continue
            added.add(symbol)
            self.added_tokens.append(symbol)
            if not special_tokens and getattr(token, "normalized", True):
                self.cleaned_tokens[symbol] = None
            if symbol not in self.vocab:
                self.vocab[symbol] = next(ids)
                self.beside.append(symbol)
        self.find_added_tokens()
        return len(self.vocab) - before

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any],
                           replace_extra_special_tokens: bool = True) -> int:
        """Sets special tokens by name, {"pad_token": "[PAD]", "extra_special_tokens": [...]}, and adds those
        that the vocabulary lacks; the number of new ones."""
        tokens = []
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                if not isinstance(value, (list, tuple)):
                    raise TokenizerError(f"{name} = {shown(value)} is not a list of tokens")
                extra = list(map(symbol_of, value))
                old = [] if replace_extra_special_tokens else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*old, *extra]))
                tokens += extra
            elif name in SPECIAL_NAMES:
                tokens.append(symbol_of(value))
                setattr(self, name, tokens[-1])
            else:
                raise TokenizerError(f"{shown(name)} is not extra_special_tokens or one of "
                                     f"{', '.join(SPECIAL_NAMES)}")
        return self.add_tokens(tokens, special_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Added symbol -> id, the special ones among them, in the order of ids."""
        return {t: self.vocab[t] for t in sorted(self.added_tokens, key=self.vocab.get)}

    def added_list(self) -> list[dict[str, Any]]:
        """The added tokens in the order of ids, as tokenizer.json describes them."""
        special = set(self.all_special_tokens)
        plain = {"single_word": False, "lstrip": False, "rstrip": False}
        return [{"id": i, "content": t, **plain, "normalized": t in self.cleaned_tokens,
                 "special": t in special} for t, i in self.get_added_vocab().items()]

    def added_config(self) -> dict[str, Any]:
        """What tokenizer_config.json says of the tokens beside the vocabulary; nothing if there are none."""
        entries = {str(entry.pop("id")): entry for entry in self.added_list()} if self.beside else {}
        return {"added_tokens_decoder": entries} if entries else {}

    added_tokens_encoder = property(get_added_vocab)
    added_tokens_decoder = property(lambda self: {i: t for t, i in self.get_added_vocab().items()},
                                    doc="Id -> added symbol.")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, by it."""
        named = {name: getattr(self, name) for name in self.special_names}
        return {name: token for name, token in named.items() if token is not None}

    def _set_extra_ids(self, ids: Iterable[int]) -> None:
        self.extra_special_tokens = self.convert_ids_to_tokens(ids)

    extra_special_tokens_ids = property(lambda self: self.convert_tokens_to_ids(self.extra_special_tokens),
                                        _set_extra_ids, doc="Setting them sets extra_special_tokens.")

    @property
    def additional_special_tokens(self) -> list[str]:
        """transformers 4's name of extra_special_tokens."""
        return self.extra_special_tokens

    # -- rows of ids that are made already

    def pad(self, encoded_inputs: Any, padding: bool | str = True, max_length: int | None = None,
            pad_to_multiple_of: int | None = None, padding_side: str | None = None,
            return_attention_mask: bool | None = None, return_tensors: str | None = None,
            verbose: bool = True) -> Encoding:
        """Fills up rows of ids, {"input_ids": [...]}, one or many, or a list of such: a collate_fn.

        Other values than ids, masks and type ids stay as they are. Lists come back where lists went in.
        """
        if isinstance(encoded_inputs, (list, tuple)):
            names = encoded_inputs[0] if encoded_inputs else ()
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in names}
        if "input_ids" not in encoded_inputs:
            raise TokenizerError(f"input_ids are missing; there is {', '.join(encoded_inputs) or 'nothing'}")
        columns = {name: _lists(value) for name, value in encoded_inputs.items()}
        single = bool(columns["input_ids"]) and isinstance(columns["input_ids"][0], int)
        if single:
            columns = {name: [value] for name, value in columns.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        width = self._width([len(row["input_ids"]) for row in rows], padding, False, max_length,
                            pad_to_multiple_of)
        filled = self.fill(rows, width, padding_side)
        if return_attention_mask is False:
            filled.pop("attention_mask", None)
        if single and return_tensors is None:
            filled = {name: value[0] for name, value in filled.items()}
        return Encoding({name: as_kind(value, return_tensors) for name, value in filled.items()})

    def get_special_tokens_mask(self, token_ids_0: list[int], token_ids_1: list[int] | None = None,
                                already_has_special_tokens: bool = False) -> list[int]:
        """1 for special tokens, 0 for others: of a finished row, or of the row that the ids would make."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        return self.row(list(token_ids_0), token_ids_1)["special_tokens_mask"]

    def create_token_type_ids_from_sequences(self, token_ids_0: list[int],
                                             token_ids_1: list[int] | None = None) -> list[int]:
        """0 for the first text; the second's are 0 in CLIP and 1 in BERT."""
        return self.row(list(token_ids_0), token_ids_1)["token_type_ids"]

    # -- small things

    max_len_single_sentence = property(lambda self: self.model_max_length - self.num_special_tokens_to_add())
    max_len_sentences_pair = property(
        lambda self: self.model_max_length - self.num_special_tokens_to_add(pair=True))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of symbols."""
        return self.text_of(self.convert_tokens_to_ids(tokens))

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """English without the blanks that decoding leaves before punctuation."""
        return clean_up(text)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The options that the tokenizer was made with, as they are now."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
                f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
                f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map})")


def _lists(value: Any) -> Any:
    """Tensors and arrays, also in a list, as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
