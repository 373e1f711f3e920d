"""Rows of token ids: one text or two, cut to a length, filled up to one, as lists or as a tensor.

Read after model.py; next tokenizer.py, which makes a text's ids. Standard library and torch.
Mirrors: transformers' PreTrainedTokenizerBase.__call__ and BatchEncoding.
Shapes: N texts, S tokens of the longest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from miniclip.files import WeightsError, shown
from miniclip.habits import LeftOut, Table, settle, table

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_ADDED_LETTERS = 1_000_000             # of all added tokens together
MOST_PADDING = 2**20                       # of tokens; upstream writes 1e30 for "no limit"
CALL_IDLE = table({"verbose": "nothing is logged", "return_attention_mask": "None is the default, True"})
CALL_REFUSED = table({
    "return_offsets_mapping": "texts are normalised before they are cut; places in the original are not kept",
    "text_target text_pair_target": "call the tokenizer a second time",
    "split_special_tokens": "take special tokens out of strangers' text before",
})


class TokenizerError(WeightsError):
    """Tokenizer files or text that cannot be honoured; one line that says which and why."""


# ---------------------------------------------------------------------------------------- what a call returns


class Encoding(LeftOut, dict):
    """What a call returns: `out.input_ids` or `out["input_ids"]`, `model(**out)`, `out.to("cuda")`."""

    is_fast = False
    left_out: ClassVar[Table] = table({
        "tokens word_ids sequence_ids": "call tokenizer.convert_ids_to_tokens(out.input_ids)",
        "encodings n_sequences char_to_token char_to_word token_to_chars token_to_sequence token_to_word":
            "places in the text are not kept",
        "word_to_chars word_to_tokens": "places in the text are not kept",
    })  # fmt: skip
    data = property(lambda self: dict(self), doc="A plain dict of the same values.")

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self.left_out:
            return super().__getattr__(name)
        raise AttributeError(f"Encoding has {', '.join(self)}, not {name!r}")

    def __getitem__(self, key: str | slice) -> Any:
        """A value by its name; out[1:3] is those rows of every value."""
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.items()}
        if isinstance(key, int):
            raise KeyError(f"row {key} of what? {', '.join(f'out.{name}[{key}]' for name in self)}")
        return super().__getitem__(key)

    def to(self, device: Any = None, dtype: torch.dtype | None = None,
           non_blocking: bool = False) -> Encoding:
        """Moves its tensors, in place, and returns itself; a dtype is for the floating-point ones only."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                kind = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=kind, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None = None,
                           prepend_batch_axis: bool = False) -> Encoding:
        """Turns its lists, in place, into tensors ("pt") or numpy arrays ("np"), and returns itself."""
        for name, value in self.items() if tensor_type is not None else ():
            self[name] = as_kind([value] if prepend_batch_axis else value, tensor_type)
        return self


def as_kind(rows: Any, kind: str | None) -> Any:
    """Rows of numbers as lists (None), as an int64 tensor ("pt") or as an int64 numpy array ("np")."""
    if kind not in (None, "pt", "np"):
        raise TokenizerError(f"return_tensors = {kind!r} is not None, 'pt' or 'np'")
    if kind is None or not isinstance(rows, (list, tuple)):
        return rows
    if len({len(row) for row in rows if isinstance(row, (list, tuple))}) > 1:
        raise TokenizerError("texts of different lengths make no tensor: set padding=True and "
                             "truncation=True")
    if kind == "np":
        import numpy as np

        return np.array(rows, dtype=np.int64)
    return torch.tensor(rows, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------- truncation


def windows(ids: list[int], room: int, side: str = "right", stride: int | None = None) -> list[list[int]]:
    """What is kept of `ids`: the first `room`, or the last where `side`, which is cut off, is "left".

    With a stride the rest follows in further windows, each of which repeats `stride` ids of the one before.
    """
    if stride is None or len(ids) <= room:
        return [ids[:room] if side == "right" else ids[max(0, len(ids) - room) :]]
    if not 0 <= stride < room:
        raise TokenizerError(f"stride = {stride} is not from 0 to below the {room} tokens that have room")
    starts = range(0, len(ids) - stride, room - stride)
    if side == "right":
        return [ids[start : start + room] for start in starts]
    ends = [len(ids) - start for start in starts]
    return [ids[max(0, end - room) : end] for end in ends]


def shorten(first: list[int], second: list[int] | None, room: int, strategy: str | bool, side: str,
            stride: int | None) -> list[tuple[list[int], list[int] | None]]:
    """Cuts one text or two to `room` ids in all. What does not fit follows if a stride is given.

    "longest_first" leaves both half of the room, or one text more where the other needs less.
    """
    other = len(second or []) if strategy == "only_first" else len(first)
    if len(first) + len(second or []) <= room:
        return [(first, second)]
    if second is None:
        return [(part, None) for part in windows(first, room, side, stride)]
    if strategy in ("only_first", "only_second") and other > room:
        raise TokenizerError(f"truncation = {strategy!r}: the other text takes {other} tokens of {room}")
    if strategy == "only_first":
        return [(part, second) for part in windows(first, room - other, side, stride)]
    if strategy == "only_second":
        return [(first, part) for part in windows(second, room - other, side, stride)]
    if stride is not None:
        raise TokenizerError("return_overflowing_tokens: of two texts one is cut into windows; set "
                             "truncation to 'only_first' or 'only_second'")
    least = min(len(first), len(second), room // 2)
    n = least if len(first) <= len(second) else room - least
    return [(windows(first, n, side)[0], windows(second, room - n, side)[0])]


# ----------------------------------------------------------------------------------------------- added tokens


class Search:
    """Finds the longest of many tokens wherever one begins, in one pass over a text, however alike they are.

    Aho and Corasick 1975, from right to left: a tree of the tokens spelled backwards, in which each node
    knows where to go on if no child has the next letter, and how long the longest token is that ends there.
    """

    def __init__(self, tokens: Iterable[str]):
        tokens = list(filter(None, tokens))
        self.children: list[dict[str, int]] = [{}]
        self.back, self.longest = [0], [0]
        for token in tokens:
            self._add(token)
        self._link()
        heads = zip(*(token[:2] for token in tokens))       # one letter each where a token has no more
        heads = [f"[{re.escape(''.join(sorted(set(head))))}]" for head in heads]
        self._maybe = re.compile("".join(heads) or "(?!)")  # a text without such letters is not walked

    def _add(self, token: str) -> None:
        node = 0
        for letter in reversed(token):
            node = self.children[node].setdefault(letter, len(self.children))
            if node == len(self.children):
                self.children.append({})
                self.back.append(0)
                self.longest.append(0)
        self.longest[node] = len(token)
        if node > MOST_ADDED_LETTERS:
            raise TokenizerError(f"added tokens of more than {MOST_ADDED_LETTERS} letters are refused")

    def _link(self) -> None:
        """Level by level, since a node falls back to one nearer to the root."""
        nodes = [0]
        for node in nodes:
            for letter, child in self.children[node].items():
                if node:
                    self.back[child] = self._next(self.back[node], letter)
                self.longest[child] = self.longest[child] or self.longest[self.back[child]]
                nodes.append(child)

    def _next(self, node: int, letter: str) -> int:
        while node and letter not in self.children[node]:
            node = self.back[node]
        return self.children[node].get(letter, 0)

    def split(self, text: str) -> list[str]:
        """What re.split gives for a group of the tokens, the longest first: text, token, text, token, ..."""
        if not self._maybe.search(text):
            return [text]
        node, lengths = 0, []
        for letter in reversed(text):
            node = self._next(node, letter)
            lengths.append(self.longest[node])
        parts, start, place = [], 0, 0
        while place < len(text):
            if length := lengths[-1 - place]:
                parts += text[start:place], text[place : place + length]
                start = place + length
            place += length or 1
        return [*parts, text[start:]]


# -------------------------------------------------------------------------------------------------- tokenizer


def _id_of(name: str) -> property:
    """A property: the id of a special token, None if there is none. Setting the id sets the token."""
    def get(self: Tokenizer) -> int | None:
        token = getattr(self, name)
        if token is not None and token not in self.vocab:
            raise TokenizerError(f"{name} = {shown(token)} is not in the vocabulary: "
                                 f"add_special_tokens({{{name!r}: {shown(token)}}}) adds it")
        return None if token is None else self.vocab[token]

    def put(self: Tokenizer, i: int | None) -> None:
        setattr(self, name, None if i is None else self.convert_ids_to_tokens(i))

    return property(get, put)


class Tokenizer:
    """What CLIP's tokenizer and BERT's share: batches, pairs, padding, truncation, ids and symbols.

    A subclass sets its special tokens, hands its vocabulary to __init__, and says how a text becomes ids,
    text_ids(), how it is normalised, clean(), and how ids become a text, text_of().

    added_tokens are found in a text before it is cut into words: those of `cleaned_tokens` after it was
    normalised, the others, the special ones among them, in the text as it was given.
    """

    special_names: ClassVar[tuple[str, ...]] = SPECIAL_NAMES
    model_input_names = ("input_ids", "attention_mask")
    ends_between = 2                        # end tokens between two texts
    second_type = 0                         # token_type_ids of the second text
    sep_token = cls_token = mask_token = None
    pad_token_type_id = 0
    is_fast = False

    def __init__(
        self,
        vocab: dict[str, int],
        added_tokens: Iterable[str] | dict[str, int] = (),
        *,
        model_max_length: int,
        cleaned_tokens: Iterable[str] = (),
        extra_special_tokens: Iterable[str] = (),
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
    ):
        beside = added_tokens if isinstance(added_tokens, dict) else {}
        self.vocab = {**vocab, **{t: i for t, i in beside.items() if t not in vocab}}
        if not isinstance(model_max_length, int) or model_max_length < 1:
            raise TokenizerError(f"model_max_length = {shown(model_max_length)} is not a number of tokens")
        self.model_max_length, self.extra_special_tokens = model_max_length, list(extra_special_tokens)
        self.padding_side, self.truncation_side = padding_side, truncation_side
        for name in ("padding_side", "truncation_side"):
            if getattr(self, name) not in ("left", "right"):
                raise TokenizerError(f"{name} = {shown(getattr(self, name))} is not 'left' or 'right'")
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.added_tokens = list(dict.fromkeys([*self.all_special_tokens, *added_tokens]))
        self.cleaned_tokens = dict.fromkeys(cleaned_tokens)
        special = set(self.all_special_tokens)
        self.beside = [t for t in self.added_tokens if t not in (vocab if beside else special)]
        for token in self.added_tokens:
            if token not in self.vocab:
                raise TokenizerError(f"vocabulary of {len(self.vocab)}: the special token {shown(token)} is "
                                     "missing")
        self.find_added_tokens()

    def find_added_tokens(self) -> None:
        """Prepares the search for added tokens. To be called when one was added."""
        self._symbols = {i: s for s, i in self.vocab.items()}
        self._cleaned = {self.clean(t): t for t in self.added_tokens if t in self.cleaned_tokens}
        self._raw_search = Search(t for t in self.added_tokens if t not in self.cleaned_tokens)
        self._cleaned_search = Search(self._cleaned)

    def parts(self, text: str) -> Iterable[tuple[str, bool]]:
        """Cuts a text where added tokens stand, the longest where several do: (token, True), and
        (normalised text, False) in between."""
        for number, part in enumerate(self._raw_search.split(text)):
            if number % 2:
                yield part, True
                continue
            for place, bit in enumerate(self._cleaned_search.split(self.clean(part))):
                yield (self._cleaned[bit], True) if place % 2 else (bit, False)

    def text_ids(self, text: str) -> list[int]:
        """Hook: ids of a text, without start and end."""
        raise NotImplementedError

    def text_of(self, ids: list[int]) -> str:
        """Hook: a text of ids."""
        raise NotImplementedError

    def clean(self, text: str) -> str:
        """Hook: a text as it is before it is cut into words."""
        raise NotImplementedError

    bos_token_id, eos_token_id, unk_token_id = map(_id_of, ("bos_token", "eos_token", "unk_token"))
    sep_token_id, pad_token_id, cls_token_id, mask_token_id = map(
        _id_of, ("sep_token", "pad_token", "cls_token", "mask_token"))
    vocab_size = property(lambda self: len(self.vocab) - len(self.beside), doc="Without what was added.")

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens that have a name, then the extra ones, none twice."""
        named = [getattr(self, name) for name in self.special_names]
        return list(dict.fromkeys([*(t for t in named if t is not None), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all_special_tokens."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def __len__(self) -> int:
        return len(self.vocab)

    def get_vocab(self) -> dict[str, int]:
        """A copy of symbol -> id."""
        return dict(self.vocab)

    # -- one row

    def row(self, first: list[int], second: list[int] | None = None,
            add_special_tokens: bool = True) -> dict[str, list[int]]:
        """A row of ids, with type ids and 1 where a special token was added, each as long as the ids."""
        start, end = ([i] if i is not None else [] for i in (self.bos_token_id, self.eos_token_id))
        parts = [(start, 0, 1), (first, 0, 0), (end, 0, 1)]                 # ids, type, special
        if second is not None:
            kind = self.second_type
            parts += [(end * (self.ends_between - 1), kind, 1), (second, kind, 0), (end, kind, 1)]
        parts = [part for part in parts if add_special_tokens or not part[2]]
        return {"input_ids": [i for ids, _, _ in parts for i in ids],
                "token_type_ids": [kind for ids, kind, _ in parts for _ in ids],
                "special_tokens_mask": [special for ids, _, special in parts for _ in ids]}

    def build_inputs_with_special_tokens(self, token_ids_0: list[int],
                                         token_ids_1: list[int] | None = None) -> list[int]:
        """Start, ids, end; CLIP's pairs are start, ids, end, end, ids, end."""
        return self.row(list(token_ids_0), token_ids_1)["input_ids"]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many ids a row has beyond those of its text or texts."""
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    def _word_ids(self, text: str | list[str], split: bool) -> list[int]:
        """Ids of a text, or of one that is given as a list of words."""
        for word in text if split else [text]:
            if not isinstance(word, str):
                raise TokenizerError(f"text = {shown(word)} is a {type(word).__name__}, not a string")
        return [i for word in text for i in self.text_ids(word)] if split else self.text_ids(text)

    # -- a call

    def __call__(
        self,
        text: str | list[str] | list[tuple[str, str]],
        text_pair: str | list[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_overflowing_tokens: bool = False,
        return_length: bool = False,
        **others: Any,
    ) -> Encoding:
        """Ids of one text or of a list of texts; of pairs, if text_pair is given or the list holds pairs.

        padding: False; True or "longest": to the longest of the call; "max_length". By pad_token, on
        padding_side; with pad_to_multiple_of to a multiple of that.
        truncation: True or "longest_first", "only_first", "only_second": cut to max_length, whose default is
        model_max_length. Not given, it is True where max_length is given and nothing is padded.
        return_overflowing_tokens: what is cut off follows as rows of its own, which repeat `stride` ids;
        overflow_to_sample_mapping tells whose they are.
        is_split_into_words: a text is a list of words.
        return_tensors: "pt" gives int64 [N, S], "np" the same of numpy, None lists.
        attention_mask is 1 on tokens and 0 on padding. Raises TokenizerError.
        """
        settle(type(self).__name__, others, CALL_IDLE, CALL_REFUSED)
        if truncation is None:
            truncation = max_length is not None and padding is False
        single, pairs = _pairs(text, text_pair, is_split_into_words)
        spill = stride if return_overflowing_tokens else None
        rows, owner = [], []
        for number, (first, second) in enumerate(pairs):
            ids = self._word_ids(first, is_split_into_words)
            more = None if second is None else self._word_ids(second, is_split_into_words)
            cut = self._cut(ids, more, truncation, max_length, add_special_tokens, spill)
            rows += [self.row(*texts, add_special_tokens) for texts in cut]
            owner += [number] * len(cut)
        width = self._width([len(row["input_ids"]) for row in rows], padding, truncation, max_length,
                            pad_to_multiple_of)
        columns = self.fill(rows, width, padding_side)
        wanted = {"token_type_ids": return_token_type_ids, "attention_mask": return_attention_mask,
                  "special_tokens_mask": return_special_tokens_mask}
        for name, given in wanted.items():
            if not (name in self.model_input_names if given is None else given):
                del columns[name]
        if return_length:
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
        if return_overflowing_tokens:
            columns["overflow_to_sample_mapping"] = owner
        elif single and return_tensors is None:
            columns = {k: v if k == "length" else v[0] for k, v in columns.items()}
        return Encoding({name: as_kind(value, return_tensors) for name, value in columns.items()})

    def _cut(self, first: list[int], second: list[int] | None, truncation: bool | str, max_length: int | None,
             add_special_tokens: bool, stride: int | None) -> list[tuple[list[int], list[int] | None]]:
        """The text or texts of one row as they fit; with a stride, those of the rows that follow too."""
        if truncation not in (False, True, "longest_first", "only_first", "only_second", "do_not_truncate"):
            raise TokenizerError(f"truncation = {truncation!r} is not True, False, 'longest_first', "
                                 "'only_first' or 'only_second'")
        if not truncation or truncation == "do_not_truncate":
            return [(first, second)]
        ends = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
        room = (self.model_max_length if max_length is None else max_length) - ends
        if room < 0:
            raise TokenizerError(f"max_length = {max_length} leaves no room for the start and end tokens")
        return shorten(first, second, room, truncation, self.truncation_side, stride)

    def _width(self, lengths: list[int], padding: bool | str, truncation: bool | str, max_length: int | None,
               multiple: int | None) -> int:
        """To how many ids rows are filled up; 0 for no padding."""
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise TokenizerError(f"padding = {padding!r} is not False, True, 'longest' or 'max_length'")
        if not padding or padding == "do_not_pad":
            return 0
        if truncation and multiple and max_length and max_length % multiple:
            raise TokenizerError(f"max_length = {max_length} is not a multiple of pad_to_multiple_of = "
                                 f"{multiple}")
        width = max(lengths, default=0)
        if padding == "max_length":
            width = self.model_max_length if max_length is None else max_length
            if width > MOST_PADDING:
                raise TokenizerError(f"padding = 'max_length' to {shown(width)} tokens is refused: give "
                                     "max_length")
        return -(-width // multiple) * multiple if multiple else width

    def fill(self, rows: list[dict[str, list[int]]], width: int,
             padding_side: str | None = None) -> dict[str, list[list[int]]]:
        """Rows as columns, each row filled up to `width` on one side; a missing attention_mask is made."""
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise TokenizerError(f"padding_side = {side!r} is not 'left' or 'right'")
        if width and self.pad_token is None:
            raise TokenizerError("there is no pad_token to fill up with: set tokenizer.pad_token")
        fills = {"input_ids": self.pad_token_id, "token_type_ids": self.pad_token_type_id,
                 "attention_mask": 0, "special_tokens_mask": 1}
        columns: dict[str, list[list[int]]] = {name: [] for name in fills}
        for row in rows:
            rest = width - len(row["input_ids"])
            for name, values in {"attention_mask": [1] * len(row["input_ids"]), **row}.items():
                if name in fills:
                    more = [fills[name]] * rest
                    values = values + more if side == "right" else more + values
                columns.setdefault(name, []).append(values)
        return {name: values for name, values in columns.items() if values or not rows}

    def encode(self, text: str, text_pair: str | None = None, add_special_tokens: bool = True,
               **options: Any) -> list[int]:
        """Ids of one text, or of a pair: start, its words, end. Options are those of a call.

        With truncation at most max_length ids, the end token kept."""
        if not isinstance(text, str) and not options.get("is_split_into_words"):
            raise TokenizerError(f"text = {shown(text)} is a {type(text).__name__}, not a string")
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False,
                 **options: Any) -> list[str]:
        """The symbols of a text, without start and end. Options are those of a call."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens, **options))

    # -- ids and symbols

    def convert_ids_to_tokens(self, ids: int | Iterable[int],
                              skip_special_tokens: bool = False) -> str | list[str]:
        """A symbol for each id, or the one of a single id. Raises TokenizerError for an id outside the
        vocabulary."""
        if isinstance(ids, int):
            return self._symbol(ids)
        skip = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._symbol(int(i)) for i in ids if int(i) not in skip]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Unknown symbols become unk_token_id, which is the end token's in CLIP."""
        if isinstance(tokens, str):
            return self.vocab[tokens] if tokens in self.vocab else self.unk_token_id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def _symbol(self, i: int) -> str:
        if i not in self._symbols:
            raise TokenizerError(f"id {i} is not in the vocabulary of {len(self.vocab)}")
        return self._symbols[i]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False,
               clean_up_tokenization_spaces: bool | None = None) -> str | list[str]:
        """The text of a row of ids, or of one id; of many rows, [N, S] or lists, a list of texts.

        clean_up_tokenization_spaces drops the blanks before punctuation; the default is the attribute of
        that name, which is False, whatever files say: as in transformers 5.
        """
        rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        rows = [rows] if isinstance(rows, int) else list(rows)
        if rows and not isinstance(rows[0], int):
            if getattr(rows[0], "ndim", 1) == 0:                                # numbers of numpy or torch
                rows = [row.item() for row in rows]
            else:
                return self.batch_decode(rows, skip_special_tokens, clean_up_tokenization_spaces)
        skip = set(self.all_special_ids) if skip_special_tokens else ()
        text = self.text_of([i for i in rows if i not in skip])
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return clean_up(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False,
                     clean_up_tokenization_spaces: bool | None = None) -> list[str]:
        """`decode` for each row, a tensor [N, S] or lists."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]


def clean_up(text: str) -> str:
    """English without the blanks that decoding leaves before punctuation and in contractions."""
    text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
    return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text)


def _pairs(text: Any, text_pair: Any, split: bool) -> tuple[bool, list[tuple[Any, Any]]]:
    """(whether it is one text, [(text, its pair or None)]) of what a call was given."""
    single = isinstance(text, str)
    if split and not single:
        single = all(isinstance(word, str) for word in text)
    if single:
        return True, [(text, text_pair)]
    texts = list(text)
    if text_pair is None:
        return False, [tuple(t) if isinstance(t, (list, tuple)) and len(t) == 2 and
                       not (split and isinstance(t[0], str)) else (t, None) for t in texts]
    if isinstance(text_pair, str) or len(text_pair) != len(texts):
        raise TokenizerError(f"text_pair is not a list of {len(texts)}, one for each text")
    return False, list(zip(texts, text_pair, strict=True))
