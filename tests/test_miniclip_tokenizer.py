"""miniclip/tokenizer.py without transformers: cutting, merging, training, files, errors."""

import gzip
import json
import random
from collections import Counter

import pytest
import torch

from miniclip import CLIPTokenizer, TokenizerError
from miniclip.tokenizer import (
    build_vocab,
    byte_symbols,
    clean,
    clean_openai,
    join_pair,
    learn_merges,
    spell,
    words,
)

MERGES = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n"), ("on", "e</w>")]
HERBS = ["人蔘", "韓國人蔘", "枸杞", "銀川枸杞"]


def small(**options):
    return CLIPTokenizer(build_vocab(MERGES), MERGES, **options)


def test_words():
    cut = lambda text: list(words(clean(text)))  # noqa: E731
    assert cut("The cat's 42 toys, isn't it?!") == ["the", "cat", "'s", "4", "2", "toys", ",", "isn", "'t",
                                                    "it", "?!"]
    assert cut("銀川枸杞，人蔘3根") == ["銀川枸杞", "，", "人蔘", "3", "根"]
    assert cut("a\u3000b\u00a0c\x85d") == ["a", "b", "c", "d"]
    assert cut("e\u0301té ½ Ⅷ ٣") == ["été", "½", "ⅷ", "٣"]
    assert cut("ΟΔΟΣ") == ["οδοσ"]  # letter by letter: no final sigma
    assert cut("it!'s") == ["it", "!'", "s"]
    assert cut("") == cut("  \n") == []
    assert clean_openai(" &amp;lt;B&amp;gt;  x ") == "<b> x"


def test_vocabulary_is_numbered_as_clips():
    vocab = build_vocab(MERGES)
    assert vocab["!"] == 0 and vocab["!</w>"] == 256 and vocab["th"] == 512
    assert len(set(byte_symbols().values())) == 256
    assert vocab["<|startoftext|>"] == 518 and vocab["<|endoftext|>"] == 519 and len(vocab) == 520


def test_encode_and_decode():
    t = small()
    assert t.tokenize("The cat") == ["the</w>", "cat</w>"]
    assert t.tokenize("cats") == ["ca", "t", "s</w>"]
    rivals = [("b", "c"), ("a", "b"), ("bc", "d</w>")]  # the pair learned first wins, wherever it stands
    tokenizer = CLIPTokenizer(build_vocab(rivals), rivals)
    assert tokenizer.tokenize("abcd abab") == ["a", "bcd</w>", "ab", "a", "b</w>"]
    assert t.encode("the cat") == [518, 513, 515, 519]
    assert t.decode(t.encode("THE  cat!")) == "<|startoftext|>the cat ! <|endoftext|>"
    assert t.decode(t.encode("THE  cat!"), skip_special_tokens=True) == "the cat !"
    for text in HERBS + ["ελληνικά", "🍵 tea", "عربى"]:
        assert t.decode(t.encode(text), skip_special_tokens=True) == text
    assert t.decode([t.vocab[byte_symbols()[0xE6]]]) == "\ufffd"
    assert t.encode("a<|endoftext|>b", add_special_tokens=False) == [t.vocab["a</w>"], 519, t.vocab["b</w>"]]


def test_batches():
    t = small()
    out = t(["the cat", "one"], padding=True, return_tensors="pt")
    assert out.input_ids.tolist() == [[518, 513, 515, 519], [518, 517, 519, 519]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1],
                                              [1, 1, 1, 0]] and out.input_ids.dtype == torch.int64
    out = t("the cat one", padding="max_length", truncation=True, max_length=4)
    assert out.input_ids == [518, 513, 515, 519] and out.attention_mask == [1] * 4
    assert t(["one"], padding="max_length", return_tensors="pt").input_ids.shape == (1, 77)
    assert len(t("cat " * 100).input_ids) == 102
    assert small(pad_token="!")(["the cat", "one"], padding=True).input_ids[1] == [518, 517, 519, 0]
    old = t.clip_tokenize(["the", "cat " * 100], truncate=True)
    assert old.dtype == torch.int32 and old.shape == (2, 77)
    assert old[0, :4].tolist() == [518, 513, 519, 0] and old[1, -1] == 519


def test_training_is_the_textbook_algorithm():
    """Against the slow way: recount all pairs after each merge."""
    r = random.Random(0)
    texts = ["".join(r.choices("ab枸杞 ", k=20)) for _ in range(40)]
    trained = CLIPTokenizer.train(texts, vocab_size=560)
    counts = {}
    for text in texts:
        for word in words(clean(text)):
            counts[word] = counts.get(word, 0) + 1
    spelled, merges = {w: spell(w) for w in counts}, []
    while len(merges) < 560 - 514:
        pairs = {}
        for word, n in counts.items():
            for pair in zip(spelled[word], spelled[word][1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + n
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        spelled = {w: join_pair(s, best) for w, s in spelled.items()}
    assert trained.merges == merges and len(trained) == 514 + len(merges)


def test_training_on_chinese_names():
    t = CLIPTokenizer.train(HERBS * 2, vocab_size=600)
    assert len(t.encode("枸杞", add_special_tokens=False)) == 1
    assert t.decode(t.encode("枸杞茶"), skip_special_tokens=True) == "枸杞茶"  # 茶 was never seen
    assert t.merges == CLIPTokenizer.train(list(reversed(HERBS * 2)), vocab_size=600).merges
    assert len(CLIPTokenizer.train(HERBS, vocab_size=514)) == 514
    with pytest.raises(TokenizerError, match="vocab_size = 100"):
        CLIPTokenizer.train(HERBS, vocab_size=100)


def test_folders(tmp_path):
    t = CLIPTokenizer.train(HERBS * 3, vocab_size=700, pad_token="!", model_max_length=16)
    t.save_pretrained(tmp_path)
    texts = [*HERBS, "a cat!", "枸杞!"]
    for gone in ([], ["vocab.json"], ["special_tokens_map.json"]):
        for name in gone:
            (tmp_path / name).unlink()
        back = CLIPTokenizer.from_pretrained(tmp_path)
        assert (back.vocab, back.merges) == (t.vocab, t.merges)
        assert (back.pad_token, back.model_max_length) == ("!", 16)
        assert back(texts, padding=True).input_ids == t(texts, padding=True).input_ids
    header = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert header["model"]["end_of_word_suffix"] == "</w>"


def test_added_tokens(tmp_path):
    t = CLIPTokenizer({**build_vocab(MERGES), "<glyph>": 520}, MERGES, added_tokens=["<glyph>"])
    assert t.encode("the <glyph> cat", add_special_tokens=False) == [513, 520, 515]
    t.save_pretrained(tmp_path)
    for gone in ("", "vocab.json"):
        if gone:
            (tmp_path / gone).unlink()
        back = CLIPTokenizer.from_pretrained(tmp_path)
        assert back.encode("the <glyph> cat") == t.encode("the <glyph> cat") and back.vocab == t.vocab


def test_openai_file(tmp_path):
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(f"{a} {b}" for a, b in MERGES), ""]
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    t = CLIPTokenizer.from_pretrained(tmp_path, rules="openai")
    assert t.vocab == build_vocab(MERGES)
    # special tokens are found after cleaning, in any case, unless glued to the end of other signs
    assert t.encode("a <|ENDOFTEXT|>", add_special_tokens=False) == [t.vocab["a</w>"], 519]
    assert 519 not in t.encode("!<|endoftext|>", add_special_tokens=False)
    t.save_pretrained(tmp_path / "saved")
    assert CLIPTokenizer.from_pretrained(tmp_path / "saved").rules == "openai"


def test_errors(tmp_path):
    t = small()
    with pytest.raises(TokenizerError, match="max_length = 1 leaves no room"):
        t("a", truncation=True, max_length=1)
    with pytest.raises(TokenizerError, match="padding = 'left'"):
        t("a", padding="left")
    with pytest.raises(TokenizerError, match="takes 102 tokens, more than 77"):
        t.clip_tokenize("cat " * 100)
    with pytest.raises(TokenizerError, match="different lengths"):
        t(["a", "a b"], return_tensors="pt")
    with pytest.raises(TokenizerError, match="None is a NoneType"):
        t(["a", None])
    with pytest.raises(TokenizerError, match="half a surrogate"):
        t.encode("\ud800")
    with pytest.raises(TokenizerError, match="id 999"):
        t.decode([999])
    with pytest.raises(TokenizerError, match="no tokenizer found"):
        CLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="'<|endoftext|>' is missing"):
        CLIPTokenizer({"<|startoftext|>": 0}, [])
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b\na b c\n")
    with pytest.raises(TokenizerError, match="merge 2 is 'a b c'"):
        CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(TokenizerError, match="bad.gz: cannot be read"):
        CLIPTokenizer.from_bpe_file(tmp_path / "bad.gz")


def test_learn_merges_stops():
    assert learn_merges(Counter(), 10) == []
    assert learn_merges(Counter(ab=1), 10) == []  # once is not worth a symbol
    assert learn_merges(Counter(ab=2), 10) == [("a", "b</w>")]
    assert learn_merges(Counter(aaaa=5), 10) == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]
