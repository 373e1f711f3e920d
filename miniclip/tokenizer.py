"""CLIP's tokenizer: text -> ids and back by byte-level byte-pair encoding (BPE), and training a small one.

Read after encoding.py; next image.py. Standard library only, torch for the tensors it returns.
Paper: Sennrich et al. 2016 (BPE); Radford et al. 2021, section 2.4 (the text side of CLIP).
Mirrors: transformers' CLIPTokenizer and, as `rules="openai"`, clip/simple_tokenizer.py of OpenAI's
repository.
Shapes: N texts, S tokens of the longest.
"""

from __future__ import annotations

import functools
import gzip
import heapq
import html
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from miniclip.encoding import TokenizerError
from miniclip.files import atomic_write, is_texts, need_folder, read_json, shown, write_json
from miniclip.text_habits import (
    TextHabits,
    added_entries,
    check_ids,
    max_length_of,
    settle_writing,
    sort_options,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"  # closes the last symbol of a word, so that "a" alone and "a" inside a word differ
OPENAI_MERGES = 49152 - 256 - 2  # OpenAI's file lists 262,144 merges; CLIP takes the first 48,894
MAX_FILE_BYTES = 64 * 2**20
MAX_LINES = 1_000_000
LETTERS_AT_ONCE = 10_000  # bytes that are merged together
MOST_WORDS = 50_000  # that are remembered before all are forgotten


# ---------------------------------------------------------------------------------------------- text to words

# Unicode's White_Space
SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>"
FIRST = re.compile(SPECIAL + r"|'s|'t|'re|'ve|'m|'ll|'d")
FIRST_OPENAI = re.compile(FIRST.pattern, re.IGNORECASE)
RUN = re.compile("L+|N|O+")
SIGNS = re.compile(r"[^\w\0-\u02ff]{64,}")  # many in a row of what may be combining marks, and of other signs


class _Kinds(dict):
    """Code point -> L letter, N number, O other, _ space: regular expressions of the library know no
    \\p{L}."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))[0]
        self[code] = "_" if SPACE.match(chr(code)) else kind if kind in "LN" else "O"
        return self[code]


KINDS = _Kinds()


def words(text: str, first: re.Pattern = FIRST) -> Iterator[str]:
    """Cuts text into contractions, runs of letters, single digits, and runs of other signs; drops spaces.

    The same as findall of `first|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+`.
    A run of Chinese characters is one word.
    """
    kinds = text.translate(KINDS)
    place = 0
    while place < len(text):
        match = first.match(text, place) or RUN.match(kinds, place)
        if match:
            yield text[place : match.end()]
        place = match.end() if match else place + 1


def normal(form: str, text: str) -> str:
    """unicodedata.normalize, which alone is quadratic in the length of a run of marks out of order."""
    return unicodedata.normalize(form, SIGNS.sub(_in_order, text))


def _in_order(run: re.Match) -> str:
    """Canonical order, as Unicode defines it: signs decomposed, the marks after each base sorted by class."""
    signs = "".join([unicodedata.normalize("NFD", sign) for sign in run[0]])
    bases = [i for i, sign in enumerate(signs) if not unicodedata.combining(sign)]
    if len(bases) == len(signs):
        return signs
    return "".join(["".join(sorted(signs[start:end], key=unicodedata.combining))
                    for start, end in zip([0, *bases], [*bases, len(signs)], strict=True)])


def clean(text: str) -> str:
    """transformers' rule: NFC, spaces to one blank, lower case letter by letter (so no final sigma)."""
    return SPACE.sub(" ", normal("NFC", text)).replace("Σ", "σ").lower()


def clean_openai(text: str) -> str:
    """OpenAI's rule without its first step, ftfy.fix_text, which is no part of the standard library.

    Its pattern ignores case, and so U+0345, a mark whose capital is a letter,
    is neither letter nor other: it is lost.
    """
    text = SPACE.sub(" ", html.unescape(html.unescape(text)).strip()).strip().lower()
    return text.replace("\u0345", " ")


# ------------------------------------------------------------------------------------------- words to symbols


@functools.cache
def byte_symbols() -> dict[int, str]:
    """Byte -> a printable character. Printable ones stand for themselves,
    the rest get U+0100 onwards (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def spell(word: str) -> list[str]:
    """A word as its UTF-8 bytes, one symbol a byte, the last one closed by </w>."""
    try:
        symbols = list(word.encode("utf-8").decode("latin-1").translate(byte_symbols()))
    except UnicodeEncodeError as error:
        half = word[error.start]
        raise TokenizerError(f"text: {half!r} is half a surrogate pair, not a character") from None
    symbols[-1] += END
    return symbols


def join_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Every occurrence of the pair, from the left, becomes one symbol."""
    joined, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            joined.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


def merge(symbols: list[str | None], merges: list[tuple[str, str]],
          ranks: dict[tuple[str, str], int]) -> list[str | None]:
    """BPE: joins the pair of neighbours that was learned first wherever it stands, from the left, again and
    again until no neighbours are a pair.

    symbols: of many words at once, None after each; changed in place. ranks: pair -> its place in merges.
    A symbol stays at the place of its first letter; before and after hold its neighbours' places, a linked
    list. places tells where a pair of each rank stands, or stood once, and the heap gives the lowest rank:
    n letters take n log n.
    """
    before, after = list(range(-1, len(symbols))), list(range(1, len(symbols) + 1))
    places: dict[int, list[int]] = defaultdict(list)
    for i, rank in enumerate(map(ranks.get, zip(symbols, symbols[1:], strict=False))):
        if rank is not None:
            places[rank].append(i)
    heap = list(places)
    heapq.heapify(heap)

    def note(i: int, pair: tuple[str | None, str | None]) -> None:
        if (rank := ranks.get(pair)) is not None:
            if rank not in places:
                heapq.heappush(heap, rank)
            places[rank].append(i)

    while heap:
        rank = heapq.heappop(heap)
        (first, second), joined = merges[rank], []
        both = first + second
        for i in sorted(places.pop(rank)):
            j = after[i]
            if symbols[i] == first and symbols[j] == second:  # neither is part of another symbol by now
                symbols[i], symbols[j] = both, ""
                k = after[i] = after[j]
                before[k] = i
                joined.append(i)
        for i in joined:
            note(before[i], (symbols[before[i]], both))
            if symbols[after[i]] != both:  # which notes that pair itself
                note(i, (both, symbols[after[i]]))
    return [symbol for symbol in symbols if symbol != ""]


def build_vocab(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """CLIP's numbering: 256 bytes, 256 bytes that close a word, one symbol a merge, start, end."""
    symbols = list(byte_symbols().values())
    symbols += [s + END for s in symbols]
    symbols += [a + b for a, b in merges]
    return {s: i for i, s in enumerate(dict.fromkeys([*symbols, BOS, EOS]))}


def learn_merges(counts: Counter[str], number: int) -> list[tuple[str, str]]:
    """BPE's training: join the most frequent neighbours, again and again,
    until `number` or no pair occurs twice.

    counts: word -> occurrences. Ties go to the pair that sorts first,
    so the result depends on the counts alone.
    """
    spelled, times = [spell(word) for word in counts], list(counts.values())
    pairs: Counter[tuple[str, str]] = Counter()  # pair -> occurrences now
    homes = defaultdict(set)  # pair -> indices of words that hold it, or held it once

    def tally(i: int, sign: int) -> set[tuple[str, str]]:
        held = list(zip(spelled[i], spelled[i][1:], strict=False))
        for pair in held:
            pairs[pair] += sign * times[i]
            homes[pair].add(i)
        return set(held)

    for i in range(len(spelled)):
        tally(i, 1)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(merges) < number:
        n, best = heapq.heappop(heap)
        if -n != pairs[best] or -n < 2:  # a count of the past, or a pair not worth a symbol
            continue
        merges.append(best)
        changed = set()
        for i in homes.pop(best):
            changed |= tally(i, -1)
            spelled[i] = join_pair(spelled[i], best)
            changed |= tally(i, 1)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


# -------------------------------------------------------------------------------------------------- tokenizer


class CLIPTokenizer(TextHabits):
    """CLIP's byte-level BPE. No text is out of its vocabulary, in any language;
    rare signs take 3 or 4 ids each.

    vocab: symbol -> id. merges: pairs of symbols, the most important first.
    model_max_length: in tokens, start and end included. pad_token: "!" in Stable Diffusion 2 and in SDXL's
    second tokenizer, as their folders say.
    rules: "transformers" or "openai"; they differ in cleaning (HTML entities,
    Unicode forms) and in where a special token inside a text counts. fix_text: OpenAI's code runs
    ftfy.fix_text first; hand it in for identical ids.
    Special tokens written out in a text become the special ids,
    as upstream: do not pass on strangers' text blindly.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        bos_token: str = BOS,
        eos_token: str = EOS,
        unk_token: str = EOS,
        pad_token: str = EOS,
        model_max_length: int = 77,
        added_tokens: Iterable[str] | dict[str, int] = (),
        rules: str = "transformers",
        fix_text: Callable[[str], str] | None = None,
        **options: Any,
    ):
        if rules not in ("transformers", "openai"):
            raise TokenizerError(f"rules = {shown(rules)} is neither 'transformers' nor 'openai'")
        self.bos_token, self.eos_token = bos_token, eos_token
        self.unk_token, self.pad_token = unk_token, pad_token
        self.merges, self.rules, self.fix_text = [tuple(m) for m in merges], rules, fix_text
        super().__init__(vocab, added_tokens, model_max_length=model_max_length, **options)
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}
        self._byte_of = {s: b for b, s in byte_symbols().items()}

    # -- text to ids

    def clean(self, text: str) -> str:
        """NFC, blanks, lower case; see clean()."""
        return clean(text)

    def _pieces(self, text: str) -> Iterator[str]:
        """Words and special tokens of a text, by the rules of one upstream or the other."""
        if self.rules == "openai":
            added = set(self.added_tokens)
            for piece in words(clean_openai(self.fix_text(text) if self.fix_text else text), FIRST_OPENAI):
                yield piece.lower() if len(piece) > 3 and piece.lower() in added else piece
            return
        for part, added in self.parts(text):
            for piece in (part,) if added else words(part):
                # "<|STARTOFTEXT|>" is not special, and falls into three words
                yield from re.findall(r"\w+|\W+", piece) if piece in (BOS, EOS) and not added else (piece,)

    def find_added_tokens(self) -> None:
        """As in Tokenizer; and each added token is a word that is known."""
        super().find_added_tokens()
        self._forget()

    def _forget(self) -> None:
        self._known = {token: [self.vocab[token]] for token in self.added_tokens}  # word -> ids

    @functools.cached_property
    def _links(self) -> set[str]:
        """Two letters between which some pair is joined; between all others even a long word may be cut."""
        return {first[-1] + second[0] for first, second in self.merges if first and second}

    def _merged(self, symbols: list[str | None]) -> list[str | None]:
        """merge(), some thousand letters at a time, which the processor's cache holds."""
        def apart(left: str | None, right: str | None) -> bool:
            return left is None or right is None or left[-1] + right[0] not in self._links

        merged, start = [], 0
        while start < len(symbols):
            ends = range(start + LETTERS_AT_ONCE, min(start + 2 * LETTERS_AT_ONCE, len(symbols)))
            end = next((i for i in ends if apart(symbols[i - 1], symbols[i])), len(symbols))
            merged += merge([*symbols[start:end], None], self.merges, self._ranks)[:-1]
            start = end
        return merged

    def _new_ids(self, words: list[str]) -> Iterator[list[int]]:
        """Ids of each word. They are merged together: many short ones share what a merge() takes."""
        merged = self._merged([s for word in words for s in (*spell(word), None)])
        start, id_of, unknown = 0, self.vocab.get, self.unk_token_id
        while start < len(merged):
            end = merged.index(None, start)
            yield [id_of(symbol, unknown) for symbol in merged[start:end]]
            start = end + 1

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without start and end. Short words are remembered, so each is merged once."""
        pieces = list(self._pieces(text))
        new = list(set(pieces).difference(self._known))
        if not new:
            return [i for word in pieces for i in self._known[word]]
        ids = dict(zip(new, self._new_ids(new), strict=True))
        found = [i for word in pieces for i in self._known.get(word) or ids[word]]
        if len(self._known) > MOST_WORDS:
            self._forget()
        self._known.update((word, ids[word]) for word in new[:MOST_WORDS] if len(word) <= 32)
        return found

    def clip_tokenize(self, texts: str | list[str], context_length: int = 77,
                      truncate: bool = False) -> torch.Tensor:
        """OpenAI's `clip.tokenize`: int32 [N, context_length], padded with 0.
        open_clip's has truncate=True, int64.

        Raises TokenizerError for a text that is too long, unless truncate.
        """
        texts = [texts] if isinstance(texts, str) else texts
        result = torch.zeros(len(texts), context_length, dtype=torch.int32)
        for row, text in zip(result, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > context_length and not truncate:
                raise TokenizerError(f"text {text[:60]!r} takes {len(ids)} tokens, more than "
                                     f"{context_length}")
            ids = ids[:context_length]
            ids[-1] = self.eos_token_id
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return result

    def text_of(self, ids: list[int]) -> str:
        """Text of ids, words separated by blanks; case and original spacing are lost.
        Broken bytes become U+FFFD."""
        joined = "".join(map(self._symbol, ids))
        raw = b"".join(bytes([self._byte_of[c]]) if c in self._byte_of else c.encode("utf-8") for c in joined)
        return raw.decode("utf-8", errors="replace").replace(END, " ").strip()

    # -- training, files

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 4096, model_max_length: int = 77, **options: Any
    ) -> CLIPTokenizer:
        """Learns a small vocabulary from your own captions, in any language; nothing is downloaded.

        vocab_size counts everything: 512 bytes, 2 special tokens, the rest for merges.
        A small set of captions may not hold that many pairs that occur twice: len(tokenizer) tells what came
        out. The order of the texts does not matter. options: those of the constructor.
        """
        if vocab_size < 514:
            raise TokenizerError(f"vocab_size = {vocab_size} is below 514, the bytes and the two special "
                                 "tokens")
        bare = cls(build_vocab([]), [], **options)
        counts = Counter(p for text in texts for p in bare._pieces(text) if p not in bare.added_tokens)
        merges = learn_merges(counts, vocab_size - 514)
        return cls(build_vocab(merges), merges, model_max_length=model_max_length, **options)

    @classmethod
    def of_captions(cls, captions: Iterable[str], vocab_size: int, spare: int = 0) -> CLIPTokenizer:
        """Trained on captions and on their words alone. It reads as many tokens as the longest caption takes,
        and `spare` more; 77 at most, which is what CLIP reads."""
        captions = list(captions)
        words = [word for caption in captions for word in caption.split()]
        tokenizer = cls.train(captions + words, vocab_size)
        tokenizer.model_max_length = min(77, spare + max(len(tokenizer.encode(text)) for text in captions))
        return tokenizer

    @classmethod
    def from_bpe_file(cls, path: str | os.PathLike, **options: Any) -> CLIPTokenizer:
        """Reads OpenAI's bpe_simple_vocab_16e6.txt.gz, or the same unpacked.
        options: those of the constructor."""
        merges = _openai_merges(path)
        return cls(build_vocab(merges), merges, **options)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, subfolder: str | None = None, **options: Any
    ) -> CLIPTokenizer:
        """Reads a folder: vocab.json and merges.txt, else tokenizer.json, else bpe_simple_vocab_16e6.txt.gz.

        Special tokens and model_max_length come from tokenizer_config.json and special_tokens_map.json if
        they are there; options override them, and a special token that the vocabulary lacks is added.
        Upstream's other options: see miniclip.text_habits. Raises TokenizerError or WeightsError.
        """
        folder = os.path.join(folder, subfolder) if subfolder else os.fspath(folder)
        need_folder(folder)
        found, added = _options(folder)
        at = lambda name: os.path.join(folder, name)  # noqa: E731
        if os.path.exists(at("vocab.json")) and os.path.exists(at("merges.txt")):
            vocab = read_json(at("vocab.json"))
            merges = _pairs(read_lines(at("merges.txt")), at("merges.txt"))
            more = read_json(at("added_tokens.json")) if os.path.exists(at("added_tokens.json")) else {}
            added = {**{token: {"id": i} for token, i in more.items()}, **added}
        elif os.path.exists(at("tokenizer.json")):
            vocab, merges, added = _read_tokenizer_json(at("tokenizer.json"))
        elif os.path.exists(at("bpe_simple_vocab_16e6.txt.gz")):
            merges = _openai_merges(at("bpe_simple_vocab_16e6.txt.gz"))
            vocab, added = build_vocab(merges), {}
        else:
            raise TokenizerError(
                f"{folder}: no tokenizer found (looked for vocab.json with merges.txt, tokenizer.json, "
                "bpe_simple_vocab_16e6.txt.gz)"
            )
        ids = {token: entry["id"] for token, entry in added.items()}
        check_ids({**ids, **vocab}, folder)
        extra = found.get("extra_special_tokens", [])
        found["extra_special_tokens"] = [token for token in extra if token in vocab or token in ids]
        found["cleaned_tokens"] = [token for token, entry in added.items() if entry.get("normalized") is True]
        own, special = sort_options(cls, options, {**ids, **vocab})
        try:
            tokenizer = cls(vocab, merges, **{**found, "added_tokens": ids, **own})
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None
        tokenizer.add_special_tokens(special)
        tokenizer.name_or_path = folder
        return tokenizer

    def save_vocabulary(self, folder: str | os.PathLike) -> tuple[str, str]:
        """Writes vocab.json and merges.txt; their paths."""
        paths = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
        beside = set(self.beside)
        write_json(paths[0], {s: i for s, i in self.vocab.items() if s not in beside})
        with atomic_write(paths[1]) as file:
            file.write("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in self.merges),
                                  ""]).encode("utf-8"))
        return paths

    def save_pretrained(self, folder: str | os.PathLike, **habits: Any) -> tuple[str, ...]:
        """Writes what transformers 4 reads (vocab.json, merges.txt) and what 5 reads (tokenizer.json); the
        paths of all files. habits: upstream's options, see miniclip.text_habits."""
        settle_writing("CLIPTokenizer.save_pretrained", habits)
        os.makedirs(folder, exist_ok=True)
        special: dict[str, Any] = dict(self.special_tokens_map)
        if self.extra_special_tokens:
            special["additional_special_tokens"] = self.extra_special_tokens   # 4 and 5 read this name
        config = {"tokenizer_class": "CLIPTokenizer", **special, "model_max_length": self.model_max_length}
        config |= {} if self.rules == "transformers" else {"rules": self.rules}  # a field of ours
        config |= {k: getattr(self, k) for k in ("padding_side", "truncation_side")
                   if getattr(self, k) != "right"}
        config |= self.added_config()
        values = {"special_tokens_map.json": special,
                  "tokenizer_config.json": {**config, "add_prefix_space": False, "do_lower_case": True},
                  "tokenizer.json": self._tokenizer_json()}
        if self.beside:
            values["added_tokens.json"] = {t: self.vocab[t] for t in self.beside}
        paths = [os.path.join(folder, name) for name in values]
        for path, value in zip(paths, values.values(), strict=True):
            write_json(path, value)
        return *self.save_vocabulary(folder), *paths

    def _tokenizer_json(self) -> dict[str, Any]:
        """The same tokenizer as transformers 5 describes it: every step of words() and clean() as a rule."""
        pattern = f"{FIRST.pattern}|[\\p{{L}}]+|[\\p{{N}}]|[^\\s\\p{{L}}\\p{{N}}]+"
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
        space = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}
        beside = set(self.beside)
        ends = {"sep": [self.eos_token, self.eos_token_id], "cls": [self.bos_token, self.bos_token_id]}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.added_list(),
            "normalizer": {"type": "Sequence",
                           "normalizers": [{"type": "NFC"}, space, {"type": "Lowercase"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": {"type": "RobertaProcessing", **ends, "trim_offsets": False,
                               "add_prefix_space": False},
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.unk_token,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": END,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {s: i for s, i in self.vocab.items() if s not in beside},
                "merges": [f"{a} {b}" for a, b in self.merges],
            },
        }


# ------------------------------------------------------------------------------------------------------ files


def read_text(path: str | os.PathLike) -> str:
    """A text file, packed by gzip or not, of at most 64 MiB when unpacked."""
    path = os.fspath(path)
    if not os.path.isfile(path):  # a pipe would block
        raise TokenizerError(f"{path}: no such file, or not a regular one")
    try:
        with open(path, "rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: more than {MAX_FILE_BYTES} bytes of text are refused")
        return raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file as read_text() reads it, a million at most."""
    text = read_text(path)
    if text.count("\n") > MAX_LINES:
        raise TokenizerError(f"{os.fspath(path)}: more than {MAX_LINES} lines are refused")
    return text.split("\n")


def _pairs(lines: Iterable[str], source: str) -> list[tuple[str, str]]:
    """Lines "a b" -> pairs. A header "#version: ..." and empty lines are skipped."""
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.strip("\r\n")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(f"{source}: merge {number} is {shown(line)}, not two symbols and a blank")
        pairs.append((parts[0], parts[1]))
    return pairs


def _openai_merges(path: str | os.PathLike) -> list[tuple[str, str]]:
    return _pairs(read_lines(path)[1 : 1 + OPENAI_MERGES], os.fspath(path))


def _options(folder: str) -> tuple[dict[str, Any], dict[str, dict]]:
    """Options of the constructor, and added tokens, from the two small files beside a vocabulary."""
    found: dict[str, Any] = {}
    added: dict[str, dict] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        values = read_json(path)
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if isinstance(token := _content(values.get(key)), str):
                found[key] = token
        for key in ("rules", "padding_side", "truncation_side"):
            if isinstance(values.get(key), str):
                found[key] = values[key]
        for key in ("extra_special_tokens", "additional_special_tokens"):
            if isinstance(values.get(key), list) and is_texts(tokens := list(map(_content, values[key]))):
                found["extra_special_tokens"] = tokens
        found |= max_length_of(values, path)
        added = added or added_entries(values.get("added_tokens_decoder"))
    return found, added


def _content(token: Any) -> Any:
    """The text of a special token, which files hold as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_tokenizer_json(path: str) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, dict]]:
    """vocab, merges, added tokens of a tokenizer.json; refuses one that is not CLIP's kind of BPE."""
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise TokenizerError(f"{path}: model holds no vocab and merges; only BPE is read")
    if model.get("end_of_word_suffix") != END:
        raise TokenizerError(f"{path}: end_of_word_suffix = {shown(model.get('end_of_word_suffix'))}, "
                             f"CLIP's is {END!r}")
    merges = model["merges"]
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: model.merges = {shown(merges)} is not a list")
    lines = [" ".join(pair) if is_texts(pair) else pair for pair in merges]
    if not is_texts(lines):
        wrong = next(line for line in lines if not isinstance(line, str))
        raise TokenizerError(f"{path}: model.merges holds {shown(wrong)}, not two symbols")
    return model["vocab"], _pairs(lines, path), added_entries(values.get("added_tokens"))
