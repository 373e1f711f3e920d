"""BERT's tokenizer, WordPiece: for Chinese-CLIP and for the tutorial's DistilBERT.

Read after tokenizer.py. Standard library only.
Paper: Devlin et al. 2019, section 3.
Mirrors: transformers' BertTokenizer, the Rust one.
Shapes: none here.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from miniclip.encoding import TokenizerError
from miniclip.text_habits import (
    TextHabits,
    added_entries,
    check_ids,
    max_length_of,
    settle_writing,
    sort_options,
)
from miniclip.tokenizer import SPACE, normal, read_lines
from miniclip.weights import atomic_write, need_folder, read_json, write_json

HAN = (     # what BERT takes for Chinese, each character a word of its own; kana and hangul are not
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)
MOST_CHARACTERS = 100  # a longer word is unknown as a whole


def clean_bert(text: str, lower: bool, strip_accents: bool) -> str:
    """Drops control characters, sets Chinese apart, and, if asked, accents and case."""
    kept = (c for c in text if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c)[0] != "C"))
    text = re.sub(HAN, r" \1 ", SPACE.sub(" ", "".join(kept)))
    if strip_accents:
        text = "".join(c for c in normal("NFD", text) if unicodedata.category(c) != "Mn")
    return text.replace("Σ", "σ").lower() if lower else text


def is_punctuation(c: str) -> bool:
    """ASCII signs that are neither letter nor digit count, such as $ and ^,
    though Unicode calls them symbols."""
    return c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(c)[0] == "P"


def bert_words(text: str) -> Iterator[str]:
    """Words between spaces; every punctuation mark is a word."""
    for run in SPACE.split(text):
        word = ""
        for c in run:
            if is_punctuation(c):
                yield from ([word] if word else [])
                yield c
                word = ""
            else:
                word += c
        yield from ([word] if word else [])


class BertTokenizer(TextHabits):
    """[CLS] text [SEP] as ids. vocab: symbol -> id, in which "##x" continues a word.
    Unlike CLIP's it has [UNK]."""

    special_names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    ends_between = second_type = 1                                  # [CLS] a [SEP] b [SEP]
    bos_token = property(lambda self: self.cls_token, doc="What a row starts with.")
    eos_token = property(lambda self: self.sep_token, doc="What a text ends with.")

    def __init__(
        self,
        vocab: dict[str, int],
        *,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        model_max_length: int = 512,
        cls_token: str = "[CLS]",
        sep_token: str = "[SEP]",
        unk_token: str = "[UNK]",
        pad_token: str = "[PAD]",
        mask_token: str = "[MASK]",
        added_tokens: Iterable[str] | dict[str, int] = (),
        **options: Any,
    ):
        self.do_lower_case = do_lower_case
        self.strip_accents = do_lower_case if strip_accents is None else strip_accents
        self.cls_token, self.sep_token, self.unk_token = cls_token, sep_token, unk_token
        self.pad_token, self.mask_token = pad_token, mask_token
        super().__init__(vocab, added_tokens, model_max_length=model_max_length, **options)

    def clean(self, text: str) -> str:
        """A text as it is before it is cut into words; see clean_bert()."""
        return clean_bert(text, self.do_lower_case, self.strip_accents)

    def find_added_tokens(self) -> None:
        """As in Tokenizer; and no piece of a word is longer than the vocabulary's longest."""
        super().find_added_tokens()
        self._longest = max(map(len, self.vocab))

    def _pieces_of(self, word: str) -> list[str]:
        """Greedy: the longest known beginning, then the longest known continuation, and so on, or [UNK]."""
        if len(word) > MOST_CHARACTERS:
            return [self.unk_token]
        pieces, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocab:
                    break
            else:
                return [self.unk_token]
            pieces.append(piece)
            start = end
        return pieces

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without [CLS] and [SEP]."""
        ids = []
        for part, added in self.parts(text):
            pieces = [part] if added else [p for word in bert_words(part) for p in self._pieces_of(word)]
            ids += [self.vocab[piece] for piece in pieces]
        return ids

    def text_of(self, ids: list[int]) -> str:
        """Pieces joined to words, words by blanks."""
        return " ".join(map(self._symbol, ids)).replace(" ##", "")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, subfolder: str | None = None,
                        **options: Any) -> BertTokenizer:
        """Reads vocab.txt, one symbol a line, or tokenizer.json, and tokenizer_config.json beside it.

        options override what the files say. Upstream's other options: see miniclip.text_habits.
        """
        folder = os.path.join(folder, subfolder) if subfolder else os.fspath(folder)
        need_folder(folder)
        vocab, path = _read_vocab(folder), os.path.join(folder, "tokenizer_config.json")
        settings = read_json(path) if os.path.exists(path) else {}
        found = {key: settings[key] for key in ("do_lower_case", "strip_accents")
                 if isinstance(settings.get(key), bool)}
        found |= max_length_of(settings, path)
        decoder = settings.get("added_tokens_decoder")
        added = added_entries(decoder) if isinstance(decoder, dict) else {}
        found["added_tokens"] = {token: entry["id"] for token, entry in added.items()}
        check_ids({**found["added_tokens"], **vocab}, folder)
        found["cleaned_tokens"] = [token for token, entry in added.items() if entry.get("normalized") is True]
        own, special = sort_options(cls, options, {**found["added_tokens"], **vocab})
        try:
            tokenizer = cls(vocab, **{**found, **own})
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None
        tokenizer.add_special_tokens(special)
        tokenizer.name_or_path = folder
        return tokenizer

    def save_vocabulary(self, folder: str | os.PathLike) -> tuple[str]:
        """Writes vocab.txt; its path."""
        path = os.path.join(folder, "vocab.txt")
        symbols = sorted(self.vocab.keys() - set(self.beside), key=self.vocab.get)
        with atomic_write(path) as file:
            file.write("".join(f"{symbol}\n" for symbol in symbols).encode("utf-8"))
        return (path,)

    def save_pretrained(self, folder: str | os.PathLike, **habits: Any) -> tuple[str, ...]:
        """Writes vocab.txt and tokenizer_config.json, which every transformers reads; their paths.
        habits: upstream's options, see miniclip.text_habits."""
        settle_writing("BertTokenizer.save_pretrained", habits)
        os.makedirs(folder, exist_ok=True)
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.do_lower_case}
        settings |= {"strip_accents": self.strip_accents, "model_max_length": self.model_max_length}
        settings |= self.added_config()
        path = os.path.join(folder, "tokenizer_config.json")
        write_json(path, settings)
        return *self.save_vocabulary(folder), path


def _read_vocab(folder: str) -> dict[str, int]:
    path = os.path.join(folder, "vocab.txt")
    if os.path.exists(path):
        lines = read_lines(path)
        while lines[-1] == "" and len(lines) > 1:
            lines.pop()
        return {line.rstrip("\r"): i for i, line in enumerate(lines)}
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        raise TokenizerError(f"{folder}: no tokenizer found (looked for vocab.txt, tokenizer.json)")
    model = read_json(path).get("model")
    is_model = isinstance(model, dict) and isinstance(model.get("vocab"), dict)
    if not is_model or model.get("type", "WordPiece") != "WordPiece":
        raise TokenizerError(f"{path}: model is not WordPiece with a vocab")
    return model["vocab"]
