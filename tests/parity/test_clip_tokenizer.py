"""miniclip's tokenizer against transformers' (Rust) and OpenAI's rules: the same ids on random text of many
scripts.

The real vocabulary comes with open_clip's package; nothing is downloaded.
MINICLIP_STRINGS sets how many strings.
"""

import html
import os
import random
import unicodedata

import pytest

from miniclip import CLIPTokenizer
from miniclip.tokenizer import byte_symbols

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
regex = pytest.importorskip("regex")

BPE_FILE = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
STRINGS = int(os.environ.get("MINICLIP_STRINGS", 100_000))

# First and last code point of what a string may be made of; unassigned ones are dropped below.
SCRIPTS = {
    "ascii": (0x20, 0x7E), "latin": (0xA0, 0x24F), "ipa and accents": (0x250, 0x36F), "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF), "armenian": (0x531, 0x58A), "hebrew": (0x591, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F), "bengali": (0x980, 0x9FE), "tamil": (0xB82, 0xBFA), "thai": (0xE01, 0xE5B),
    "tibetan": (0xF00, 0xFBC), "georgian": (0x10A0, 0x10FF), "jamo": (0x1100, 0x11FF),
    "khmer": (0x1780, 0x17F9),
    "punctuation": (0x2000, 0x206F), "currency": (0x20A0, 0x20BF), "letterlike": (0x2100, 0x214F),
    "numbers": (0x2150, 0x218B), "arrows": (0x2190, 0x23FF), "circled": (0x2460, 0x24FF),
    "signs": (0x2500, 0x27BF),
    "cjk signs": (0x3000, 0x303F), "kana": (0x3041, 0x30FF), "bopomofo": (0x3105, 0x312F),
    "han": (0x4E00, 0x9FEF),
    "hangul": (0xAC00, 0xD7A3), "compatibility": (0xF900, 0xFAD9), "presentation": (0xFB00, 0xFDFF),
    "full width": (0xFF01, 0xFFEE), "gothic": (0x10330, 0x1034A), "mathematical": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1F6FA), "han extension": (0x20000, 0x2A6D6),
}  # fmt: skip
MORSELS = [
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'RE", "'\u017f", "<|startoftext|>", "<|endoftext|>",
    "<|STARTOFTEXT|>", "<|EndOfText|>", "</w>", "<|", "|>", "&amp;", "&lt;b&gt;", "&amp;#39;", "ΣΑΣ", "İ",
    "ß",
    "  ", "\n",
    "\t", "\u3000", "\u00a0", "\u2009", "e\u0301", "n\u0303", "가",
    "a photo of a", "the cat", "Zürich", "枸杞", "韓國人蔘", "1234", "٣٤", "½", "Ⅷ",
]  # fmt: skip


def alphabet():
    """U+09FE is left out: a combining mark younger than the Unicode tables inside transformers' Rust
    library."""

    def assigned(c):
        return unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs", "Cc") and c != 0x9FE

    return {name: [chr(c) for c in range(a, b + 1) if assigned(c)] for name, (a, b) in SCRIPTS.items()}


ALPHABET = alphabet()


def random_text(r):
    """A few runs, each in one script, with blanks and morsels that once fooled a tokenizer between them."""
    parts = []
    for _ in range(r.randint(1, 6)):
        script = ALPHABET[r.choice(list(ALPHABET))]
        parts.append(r.choice(MORSELS) if r.random() < 0.3 else "".join(r.choices(script, k=r.randint(1, 7))))
        parts.append(r.choice(["", " ", "", "  "]))
    return "".join(parts)


@pytest.fixture(scope="module")
def ours():
    return CLIPTokenizer.from_bpe_file(BPE_FILE)


def upstream(ours, **options):
    return transformers.CLIPTokenizer(vocab=ours.vocab, merges=list(ours.merges), **options)


def test_random_text_as_transformers(ours):
    theirs = upstream(ours)
    r = random.Random(0)
    for start in range(0, STRINGS, 1000):
        texts = [random_text(r) for _ in range(min(1000, STRINGS - start))]
        for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
            assert ours.encode(text) == ids, ascii(text)


def openai_reference(ours):
    """OpenAI's rules spelled with the regex module, as in clip/simple_tokenizer.py, but for ftfy."""
    pattern = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE
    )
    slow = open_clip.tokenizer.SimpleTokenizer(BPE_FILE)
    symbols = byte_symbols()

    def encode(text):
        text = html.unescape(html.unescape(text)).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        ids = []
        for word in pattern.findall(text):
            if word.lower() in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(ours.vocab[word.lower()])
            else:
                spelled = "".join(symbols[b] for b in word.encode("utf-8"))
                ids += [slow.encoder[s] for s in slow.bpe(spelled).split(" ")]
        return ids

    return encode


def test_random_text_as_openai():
    ours = CLIPTokenizer.from_bpe_file(BPE_FILE, rules="openai")
    encode = openai_reference(ours)
    r = random.Random(1)
    for _ in range(STRINGS):
        text = random_text(r)
        assert ours.encode(text, add_special_tokens=False) == encode(text), ascii(text)


def test_open_clip_with_ftfy():
    """open_clip's own tokenizer, its repairs of broken text included;
    only its special tokens are spelled otherwise."""
    ftfy = pytest.importorskip("ftfy")
    ours = CLIPTokenizer.from_bpe_file(BPE_FILE, rules="openai", fix_text=ftfy.fix_text)
    theirs = open_clip.tokenizer.SimpleTokenizer(BPE_FILE)
    r = random.Random(2)
    texts = [random_text(r) for _ in range(STRINGS // 50)]
    texts = [t for t in texts if "<|" not in t and "|>" not in t]
    assert len(texts) > STRINGS // 100
    for text in texts:
        assert ours.clip_tokenize(text, truncate=True).long().equal(theirs(text)), ascii(text)


def test_the_four_herbs(ours):
    theirs = upstream(ours)
    known = {
        "人蔘": [36839, 164, 242, 502],
        "韓國人蔘": [165, 253, 241, 37746, 233, 36839, 164, 242, 502],
        "枸杞": [162, 252, 116, 27667, 508],
        "銀川枸杞": [165, 232, 222, 161, 115, 251, 162, 252, 116, 27667, 508],
    }
    for text, ids in known.items():
        assert ours.encode(text, add_special_tokens=False) == ids
        assert theirs(text, add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize("options", [{}, {"pad_token": "!"}])
def test_batches_and_decoding(ours, options, tmp_path):
    theirs = upstream(ours, **options)
    ours = CLIPTokenizer(ours.vocab, ours.merges, **options)
    r = random.Random(3)
    texts = ["a cat!", "", "a " * 100, *[random_text(r) for _ in range(300)]]
    for call in (
        dict(padding=True),
        dict(padding="max_length", truncation=True, max_length=77),
        dict(padding="longest", truncation=True, max_length=9),
        dict(add_special_tokens=False),
    ):
        a, b = ours(texts, **call), theirs(texts, **call)
        assert a["input_ids"] == b["input_ids"] and a["attention_mask"] == b["attention_mask"], call
    for row in theirs(texts)["input_ids"]:
        assert ours.decode(row) == theirs.decode(row)
        assert ours.decode(row, skip_special_tokens=True) == theirs.decode(row, skip_special_tokens=True)
    assert ours("a cat", return_tensors="pt").input_ids.equal(theirs("a cat", return_tensors="pt").input_ids)
    assert ours("a cat").input_ids == theirs("a cat").input_ids
    ids = [r.randrange(49408) for _ in range(2000)]
    for i in range(0, 2000, 5):  # any ids, broken UTF-8 among them
        assert ours.decode(ids[i : i + 5]) == theirs.decode(ids[i : i + 5])


def test_folders_both_ways(ours, tmp_path):
    theirs = upstream(ours, pad_token="!", model_max_length=77)
    theirs.save_pretrained(tmp_path / "theirs")
    read = CLIPTokenizer.from_pretrained(tmp_path / "theirs")
    assert (read.vocab, read.merges) == (ours.vocab, ours.merges)
    assert (read.pad_token, read.pad_token_id, read.model_max_length) == ("!", 0, 77)
    trained = CLIPTokenizer.train(["枸杞 銀川枸杞", "a red bowl, a red cup", "a red bowl's rim"] * 3,
                                  vocab_size=700)
    r = random.Random(4)
    texts = [random_text(r) for _ in range(500)] + ["銀川枸杞", "a red bowl"]
    for number, tokenizer in enumerate((ours, trained)):
        tokenizer.save_pretrained(tmp_path / str(number))
        whole = transformers.CLIPTokenizer.from_pretrained(tmp_path / str(number))
        assert [whole(t).input_ids for t in texts] == [tokenizer(t).input_ids for t in texts]
        assert whole.pad_token_id == tokenizer.pad_token_id and whole.model_max_length == 77
        (tmp_path / str(number) / "tokenizer.json").unlink()  # what transformers 4's folders hold
        old = transformers.CLIPTokenizer.from_pretrained(tmp_path / str(number))
        assert [old(t).input_ids for t in texts] == [tokenizer(t).input_ids for t in texts]
        assert CLIPTokenizer.from_pretrained(tmp_path / str(number)).vocab == tokenizer.vocab


def test_calls_in_all_forms(ours, tmp_path):
    """Pairs, both sides, masks, windows: every value that a call returns."""
    ours.save_pretrained(tmp_path)
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    r = random.Random(5)
    for _ in range(300):
        a, b = (" ".join(r.choices("abcdefgh", k=r.randint(1, 9))) for _ in range(2))
        ours.truncation_side = theirs.truncation_side = r.choice(["left", "right"])
        call = dict(truncation=r.choice([True, False]), padding=r.choice([False, True, "max_length"]),
                    max_length=8, add_special_tokens=r.choice([True, False]),
                    return_special_tokens_mask=r.choice([True, False]), return_length=r.choice([True, False]),
                    return_token_type_ids=r.choice([True, False]), pad_to_multiple_of=r.choice([None, 4]),
                    padding_side=r.choice(["left", "right"]))
        for texts in ((a,), ([a, b],), (a, b), ([a, b], [b, a]), ([(a, b), (b, a)],)):
            assert dict(ours(*texts, **call)) == dict(theirs(*texts, **call)), (texts, call)
        call |= dict(return_overflowing_tokens=True, stride=1, truncation="only_first", max_length=16)
        for texts in (([a * 3, b],), (a + " a" * 20, b[:3])):
            assert dict(ours(*texts, **call)) == dict(theirs(*texts, **call)), (texts, call)


def test_added_tokens(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for t in (ours, theirs):
        assert t.add_tokens(["qzbim", "x y"]) == 2
        assert t.add_special_tokens({"pad_token": "[P]", "extra_special_tokens": ["<G>"]}) == 2
    for t in (ours, theirs):
        t.save_pretrained(tmp_path / type(t).__module__)
    again = CLIPTokenizer.from_pretrained(tmp_path / type(theirs).__module__)
    back = transformers.CLIPTokenizer.from_pretrained(tmp_path / type(ours).__module__)
    for text in ("a QZBIM qzbimx  X  Y cqzbim", "a[P]<g><G>b", "É<|endoftext|>qzbim <|ENDOFTEXT|>"):
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == again(text)["input_ids"] == back(text)["input_ids"] == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("vocab_size", "all_special_tokens", "special_tokens_map", "extra_special_tokens",
                 "pad_token_id", "added_tokens_encoder", "max_len_single_sentence", "max_len_sentences_pair"):
        assert getattr(ours, name) == getattr(theirs, name) == getattr(again, name), name
