"""Text -> ids, by what pipeline.json says under "tokenizers": CLIP's byte-level BPE or BERT's WordPiece.

Standard library only. The same rules as the tokenizers of transformers; `runner.py --check` compares.
"""

import html
import json
import re
import unicodedata
from pathlib import Path

SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
FIRST = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
RUN = re.compile("L+|N|O+")
HAN = re.compile("([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
                 "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])")


def kind(sign):
    """L letter, N number, O other, _ space."""
    category = unicodedata.category(sign)[0]
    return "_" if SPACE.match(sign) else category if category in "LN" else "O"


def split_at(text, tokens):
    """text, token, text, token, ...: the longest token where several begin."""
    longest_first = map(re.escape, sorted(tokens, key=len, reverse=True))
    return re.split(f"({'|'.join(longest_first)})", text) if tokens else [text]


class Tokenizer:
    """`ids, mask = tokenizer(texts)`: two lists of rows."""

    def __init__(self, folder, rules):
        self.rules = rules
        ids_of = self.bpe(Path(folder)) if rules["kind"] == "bpe" else self.wordpiece(Path(folder))
        self.ids_of_words = ids_of

    def __call__(self, texts):
        rows = [self.row(text) for text in texts]
        length = self.rules["length"] if self.rules["fill"] else max(map(len, rows))
        pad = [self.rules["pad"]]
        return ([row + pad * (length - len(row)) for row in rows],
                [[1] * len(row) + [0] * (length - len(row)) for row in rows])

    def row(self, text):
        """Start, the text's ids as far as there is room, end."""
        ids = []
        for part in self.parts(text):
            ids += [part] if isinstance(part, int) else self.ids_of_words(part)
        return [self.rules["start"], *ids[:self.rules["length"] - 2], self.rules["end"]]

    def parts(self, text):
        """The ids of added tokens, and the cleaned text between them."""
        added, cleaned = self.rules["added"], self.rules["cleaned"]
        if self.rules["kind"] == "bpe" and self.rules["rules"] == "openai":
            return [self.clean(text)]
        found = []
        for i, part in enumerate(split_at(text, added)):
            inside = split_at(self.clean(part), cleaned) if i % 2 == 0 else []
            found += [added[part]] if i % 2 else [cleaned[p] if j % 2 else p for j, p in enumerate(inside)]
        return found

    def clean(self, text):
        """The text as it is before it is cut into words."""
        if self.rules["kind"] == "wordpiece":
            category = unicodedata.category
            kept = [c for c in text if c in "\t\n\r" or (c not in "\0\ufffd" and category(c)[0] != "C")]
            text = HAN.sub(r" \1 ", SPACE.sub(" ", "".join(kept)))
            if self.rules["strip_accents"]:
                text = "".join(c for c in unicodedata.normalize("NFD", text) if category(c) != "Mn")
            return text.replace("Σ", "σ").lower() if self.rules["lower"] else text
        if self.rules["rules"] == "openai":
            text = SPACE.sub(" ", html.unescape(html.unescape(text)).strip())
            return text.strip().lower().replace("\u0345", " ")
        return SPACE.sub(" ", unicodedata.normalize("NFC", text)).replace("Σ", "σ").lower()

    # ---- byte-level BPE

    def bpe(self, folder):
        """A function from a text to ids: a word's bytes, neighbours joined in the order of merges.txt."""
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        lines = [line for line in lines if line and not line.startswith("#version")]
        ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]       # bytes that stand for themselves
        others = [b for b in range(256) if b not in plain]
        symbols = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
        openai, special = self.rules["rules"] == "openai", self.rules["special"]
        first = re.compile(FIRST, re.IGNORECASE if openai else 0)

        def ids(text):
            found = []
            for word in self.words(text, first):
                if openai and len(word) > 3 and word.lower() in special:
                    found.append(special[word.lower()])
                    continue
                for piece in re.findall(r"\w+|\W+", word) if word in special else [word]:
                    spelled = [symbols[b] for b in piece.encode("utf-8")]
                    spelled[-1] += "</w>"
                    found += [vocab.get(s, self.rules["unknown"]) for s in self.joined(spelled, ranks)]
            return found

        return ids

    @staticmethod
    def words(text, first):
        """Contractions, runs of letters, single digits, runs of other signs."""
        kinds, place = "".join(map(kind, text)), 0
        while place < len(text):
            match = first.match(text, place) or RUN.match(kinds, place)
            if match:
                yield text[place:match.end()]
            place = match.end() if match else place + 1

    @staticmethod
    def joined(symbols, ranks):
        """Joins the pair that was learned first, wherever it stands, until no neighbours are a pair."""
        while True:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, len(ranks)), default=None)
            if best not in ranks:
                return symbols
            merged, i = [], 0
            while i < len(symbols):
                size = 2 if tuple(symbols[i:i + 2]) == best else 1
                merged.append("".join(symbols[i:i + size]))
                i += size
            symbols = merged

    # ---- WordPiece

    def wordpiece(self, folder):
        """A function from a text to ids: of each word the longest known beginning, again and again."""
        lines = (folder / "vocab.txt").read_text("utf-8").split("\n")
        vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}

        def ids_of(word):
            ids, start = [], 0
            while start < len(word) and len(word) <= 100:
                end = next((e for e in range(len(word), start, -1)
                            if ("##" if start else "") + word[start:e] in vocab), None)
                if end is None:
                    return [self.rules["unknown"]]
                ids.append(vocab[("##" if start else "") + word[start:end]])
                start = end
            return ids or [self.rules["unknown"]]

        def ids(text):
            marks = "".join(f" {c} " if is_mark(c) else c for c in text)
            return [i for word in SPACE.split(marks) if word for i in ids_of(word)]

        return ids


def is_mark(sign):
    """Punctuation, as BERT has it."""
    return sign in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(sign)[0] == "P"
