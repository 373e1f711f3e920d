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

from miniclip.tokenizer import SPACE, Tokenizer, TokenizerError, read_text
from miniclip.weights import atomic_write, need_folder, read_json, write_json

HAN = re.compile(  # what BERT takes for Chinese, each character a word of its own; kana and hangul are not
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)
MOST_CHARACTERS = 100  # a longer word is unknown as a whole


def clean_bert(text: str, lower: bool, strip_accents: bool) -> str:
    """Drops control characters, sets Chinese apart, and, if asked, accents and case."""
    kept = (c for c in text if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c)[0] != "C"))
    text = HAN.sub(r" \1 ", SPACE.sub(" ", "".join(kept)))
    if strip_accents:
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
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


class BertTokenizer(Tokenizer):
    """[CLS] text [SEP] as ids. vocab: symbol -> id, in which "##x" continues a word.
    Unlike CLIP's it has [UNK]."""

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
    ):
        self.vocab, self.model_max_length, self.do_lower_case = dict(vocab), model_max_length, do_lower_case
        self.strip_accents = do_lower_case if strip_accents is None else strip_accents
        self.bos_token, self.eos_token = cls_token, sep_token
        self.unk_token, self.pad_token = unk_token, pad_token
        self.mask_token = mask_token
        self.all_special_tokens = [unk_token, sep_token, pad_token, cls_token, mask_token]
        for token in self.all_special_tokens:
            if token not in self.vocab:
                raise TokenizerError(f"vocabulary of {len(self.vocab)}: the special token {token!r} is "
                                     "missing")
        self._symbols = {i: s for s, i in self.vocab.items()}
        self._added = re.compile("(" + "|".join(map(re.escape, self.all_special_tokens)) + ")")

    def _pieces_of(self, word: str) -> list[str]:
        """Greedy: the longest known beginning, then the longest known continuation, and so on, or [UNK]."""
        if len(word) > MOST_CHARACTERS:
            return [self.unk_token]
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
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
        for part in self._added.split(text):
            if part in self.all_special_tokens:
                ids.append(self.vocab[part])
                continue
            for word in bert_words(clean_bert(part, self.do_lower_case, self.strip_accents)):
                ids += [self.vocab[piece] for piece in self._pieces_of(word)]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Pieces joined to words, words by blanks."""
        skip = set(self.all_special_ids) if skip_special_tokens else ()
        return " ".join(self._symbol(int(i)) for i in ids if int(i) not in skip).replace(" ##", "")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> BertTokenizer:
        """Reads vocab.txt, one symbol a line, or tokenizer.json, and tokenizer_config.json beside it."""
        need_folder(folder)
        at = lambda name: os.path.join(folder, name)  # noqa: E731
        settings = (read_json(at("tokenizer_config.json")) if os.path.exists(at("tokenizer_config.json"))
                    else {})
        for key in ("do_lower_case", "strip_accents"):
            if isinstance(settings.get(key), bool):
                options.setdefault(key, settings[key])
        length = settings.get("model_max_length")
        if isinstance(length, int) and 2 <= length < 1e9:
            options.setdefault("model_max_length", length)
        if os.path.exists(at("vocab.txt")):
            lines = read_text(at("vocab.txt")).rstrip("\n").split("\n")
            return cls({line.rstrip("\r"): i for i, line in enumerate(lines)}, **options)
        if not os.path.exists(at("tokenizer.json")):
            raise TokenizerError(f"{os.fspath(folder)}: no tokenizer found (looked for vocab.txt, "
                                 "tokenizer.json)")
        model = read_json(at("tokenizer.json")).get("model")
        is_model = isinstance(model, dict) and "vocab" in model
        if not is_model or model.get("type", "WordPiece") != "WordPiece":
            raise TokenizerError(f"{at('tokenizer.json')}: model is not WordPiece with a vocab")
        return cls(model["vocab"], **options)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes vocab.txt and tokenizer_config.json, which every transformers reads."""
        os.makedirs(folder, exist_ok=True)
        with atomic_write(os.path.join(folder, "vocab.txt")) as file:
            file.write("".join(f"{s}\n" for s in sorted(self.vocab, key=self.vocab.get)).encode("utf-8"))
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.do_lower_case}
        settings |= {"strip_accents": self.strip_accents, "model_max_length": self.model_max_length}
        write_json(os.path.join(folder, "tokenizer_config.json"), settings)
