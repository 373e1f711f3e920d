"""miniclip's BertTokenizer against transformers': same ids on random text of many scripts."""

import random
import unicodedata

import pytest

from miniclip.wordpiece import BertTokenizer

from .test_clip_tokenizer import STRINGS
from .test_clip_tokenizer import random_text as any_text

transformers = pytest.importorskip("transformers")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def random_text(r):
    """Without signs younger than Unicode 3.2: transformers' Rust library has old tables of punctuation."""
    return "".join(c for c in any_text(r) if unicodedata.ucd_3_2_0.category(c) != "Cn")


def vocabulary():
    """Every second sign of the texts, alone and as continuation, and many short pieces of words."""
    r = random.Random(0)
    pieces = dict.fromkeys(SPECIAL)
    for _ in range(3000):
        for word in random_text(r).lower().split():
            start = r.randrange(len(word))
            piece = word[start : start + r.randint(1, 3)]
            pieces[piece if r.random() < 0.5 else "##" + piece] = None
    pieces |= dict.fromkeys("abcdefghijklmnopqrstuvwxyz0123456789!?.,'人枸杞銀川")
    return {piece: i for i, piece in enumerate(pieces)}


@pytest.mark.parametrize("lower", [True, False])
def test_random_text(lower, tmp_path):
    vocab = vocabulary()
    ours = BertTokenizer(vocab, do_lower_case=lower)
    theirs = transformers.BertTokenizer(vocab=vocab, do_lower_case=lower)
    r = random.Random(1)
    texts = [random_text(r) for _ in range(STRINGS // 10)] + ["a" * 101, "枸杞 [SEP] [MASK]x", "",
                                                              "naïve Ångström"]
    expected = theirs(texts)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, ascii(text)
    call = dict(padding=True, truncation=True, max_length=12)
    a, b = ours(texts[:50], **call), theirs(texts[:50], **call)
    assert a["input_ids"] == b["input_ids"] and a["attention_mask"] == b["attention_mask"]
    ours.save_pretrained(tmp_path)
    back = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert [back(t).input_ids for t in texts[:300]] == expected[:300]
    theirs.save_pretrained(tmp_path / "theirs")
    again = BertTokenizer.from_pretrained(tmp_path / "theirs")
    assert [again.encode(t) for t in texts[:300]] == expected[:300]


def test_pairs_and_added_tokens():
    vocab = vocabulary()
    ours, theirs = BertTokenizer(vocab), transformers.BertTokenizer(vocab=vocab)
    for t in (ours, theirs):
        t.add_tokens(["Dad"])
    call = dict(return_token_type_ids=True, return_special_tokens_mask=True, padding="max_length",
                max_length=20)
    assert dict(ours("ab DAD", "cd a", **call)) == dict(theirs("ab DAD", "cd a", **call))
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.special_tokens_map == theirs.special_tokens_map
