"""Seconds for 1 MB of text of several kinds, here and in transformers, turn and turn about in one process.

`python -m tests.bench.bench_tokenizer [--rounds 3] [--only english,base64]`.
The vocabulary is CLIP's own, which comes with open_clip's package. Each round reads its text with tokenizers
that have seen no text before: a word that was cut once is remembered, here and there. A round also holds the
ids against each other.
"""

from __future__ import annotations

import argparse
import base64
import os
import pydoc_data.topics
import random
import statistics
import string
import time
import unicodedata

import open_clip
import transformers

from miniclip import CLIPTokenizer

BPE_FILE = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
BYTES = 1_000_000
SIGNS = "".join(c for c in map(chr, range(0x21, 0x2800)) if unicodedata.ucd_3_2_0.category(c)[0] in "SP")


def chinese(r: random.Random) -> str:
    """Clauses of 2 to 20 characters, the frequent ones more often, as in prose."""
    characters = r.sample([chr(c) for c in range(0x4E00, 0x9FA6)], 4000)
    weights = [1 / rank for rank in range(10, 4010)]
    return "".join("".join(r.choices(characters, weights, k=r.randint(2, 20))) + r.choice("，，。")
                   for _ in range(BYTES // 30))


def kinds() -> dict[str, str]:
    """Name -> a text of BYTES bytes, always the same."""
    r = random.Random(0)
    pick = lambda letters: "".join(r.choices(letters, k=BYTES))  # noqa: E731
    texts = {
        "english": " ".join(pydoc_data.topics.topics.values()) * 3,
        "chinese": chinese(r),
        "chinese, no marks": pick([chr(c) for c in range(0x4E00, 0x9FA6)]),
        "one letter": "a" * BYTES,
        "no spaces": pick(string.ascii_lowercase),
        "digits": pick(string.digits),
        "signs": pick(SIGNS),
        "accents": "a" + "\u0300\u0316" * BYTES,
        "base64": base64.b64encode(r.randbytes(BYTES)).decode("ascii"),
    }
    return {name: text.encode("utf-8")[:BYTES].decode("utf-8", "ignore") for name, text in texts.items()}


def seconds(tokenizer, text: str) -> tuple[float, list[int]]:
    """Seconds for a text, and its ids."""
    start = time.perf_counter()
    ids = tokenizer(text, truncation=False)["input_ids"]
    return time.perf_counter() - start, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="kinds, by their first letters, with commas between")
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, seconds for 1 MB, medians of {a.rounds} rounds")
    for name, text in kinds().items():
        if not name.startswith(tuple(a.only.split(","))):
            continue
        pairs = []
        for _ in range(a.rounds):
            ours = CLIPTokenizer.from_bpe_file(BPE_FILE)
            theirs = transformers.CLIPTokenizer(vocab=ours.vocab, merges=list(ours.merges))
            (mine, ids), (other, wanted) = seconds(ours, text), seconds(theirs, text)
            assert ids == wanted, f"{name}: other ids"
            pairs.append((mine, other))
        ratio = statistics.median(mine / other for mine, other in pairs)
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:18} ours/theirs {ratio:5.2f}   {mine:6.3f} s / {other:6.3f} s   {len(ids):8} ids",
              flush=True)


if __name__ == "__main__":
    main()
