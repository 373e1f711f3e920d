"""miniclip/tokenizer.py without transformers: cutting, merging, training, files, errors."""

import gzip
import json
import os
import random
import re
import time
import unicodedata
from collections import Counter

import pytest
import torch

from miniclip import BertTokenizer, CLIPTokenizer, TokenizerError
from miniclip.encoding import Search, shorten, windows
from miniclip.tokenizer import (
    SIGNS,
    build_vocab,
    byte_symbols,
    clean,
    clean_openai,
    join_pair,
    learn_merges,
    merge,
    normal,
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


def test_pairs():
    t = small()
    assert t("the", "cat").input_ids == [518, 513, 519, 519, 515, 519]
    assert t([("the", "cat")]).input_ids == t(["the"], ["cat"]).input_ids == [t.encode("the", "cat")]
    assert t("the", "cat", add_special_tokens=False).input_ids == [513, 515]
    out = t("the", "cat", padding="max_length", max_length=8, return_token_type_ids=True,
            return_special_tokens_mask=True, return_length=True)
    assert out.token_type_ids == [0] * 8 and out.special_tokens_mask == [1, 0, 1, 1, 0, 1, 1, 1]
    assert out.attention_mask == [1] * 6 + [0] * 2 and out.length == [8]
    assert t(["the", "cat"], is_split_into_words=True).input_ids == t("the cat").input_ids
    assert (t.num_special_tokens_to_add(), t.num_special_tokens_to_add(pair=True)) == (2, 4)
    with pytest.raises(TokenizerError, match="not a list of 2"):
        t(["the", "cat"], ["one"])


def test_windows_and_shortening():
    ids = list(range(7))
    assert windows(ids, 3) == [[0, 1, 2]] and windows(ids, 3, "left") == [[4, 5, 6]]
    assert windows(ids, 3, stride=1) == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert windows(ids, 3, "left", 1) == [[4, 5, 6], [2, 3, 4], [0, 1, 2]]
    assert windows(ids, 5, stride=1) == [[0, 1, 2, 3, 4], [4, 5, 6]] and windows(ids, 0) == [[]]
    cut = lambda a, b, room: [len(x) for x in shorten([0] * a, [0] * b, room, True, "right", None)[0]]  # noqa
    assert cut(9, 9, 5) == [2, 3] and cut(9, 8, 5) == [3, 2] and cut(1, 9, 5) == [1, 4]
    assert shorten(ids, [9], 4, "only_first", "right", 1)[:2] == [([0, 1, 2], [9]), ([2, 3, 4], [9])]
    with pytest.raises(TokenizerError, match="the other text takes 7 tokens of 4"):
        shorten(ids, [9], 4, "only_second", "right", None)
    with pytest.raises(TokenizerError, match="stride = 3"):
        windows(ids, 3, stride=3)


def test_overflowing_tokens_are_rows():
    t = small()
    out = t(["the cat one", "one"], truncation=True, max_length=4, stride=1, return_overflowing_tokens=True,
            padding=True)
    assert out.input_ids == [[518, 513, 515, 519], [518, 515, 517, 519], [518, 517, 519, 519]]
    assert out.overflow_to_sample_mapping == [0, 0, 1]
    with pytest.raises(TokenizerError, match="'only_first' or 'only_second'"):
        t("the cat", "one", truncation=True, max_length=5, return_overflowing_tokens=True)


def test_both_sides():
    t = small(padding_side="left", truncation_side="left")
    out = t(["the cat", "one"], padding=True, pad_to_multiple_of=3)
    assert out.input_ids[1] == [519] * 3 + [518, 517, 519] and out.attention_mask[1] == [0] * 3 + [1] * 3
    assert t("the cat", truncation=True, max_length=3).input_ids == [518, 515, 519]
    out = t("the", max_length=4, padding="max_length", padding_side="right")
    assert out.input_ids == [518, 513, 519, 519]
    assert t("the cat", max_length=3).input_ids == [518, 515, 519]      # as upstream, where nothing is padded
    with pytest.raises(TokenizerError, match="padding_side = 'up'"):
        small(padding_side="up")
    with pytest.raises(TokenizerError, match="max_length = 5 is not a multiple"):
        t("the", padding=True, truncation=True, max_length=5, pad_to_multiple_of=4)


def test_added_and_special_tokens(tmp_path):
    t = small()
    assert t.add_tokens(["Bim", "<g>"]) == 2 and t.add_tokens("Bim") == 0
    assert t.tokenize("the BIM cats<g>") == ["the</w>", "Bim", "ca", "t", "s</w>", "<g>"]
    assert t.add_special_tokens({"pad_token": "[P]", "extra_special_tokens": ["<X>"]}) == 2
    assert (t.pad_token_id, len(t), t.vocab_size) == (522, 524, 520)
    assert t.all_special_tokens == ["<|startoftext|>", "<|endoftext|>", "[P]", "<X>"]
    assert t.tokenize("<X><x>")[0] == "<X>" and len(t.tokenize("<X><x>")) == 4
    assert t.decode(t("the <X> cat").input_ids, skip_special_tokens=True) == "the cat"
    files = t.save_pretrained(tmp_path)
    assert sorted(map(os.path.basename, files)) == sorted(p.name for p in tmp_path.iterdir())
    for gone in ("tokenizer.json", "vocab.json"):
        back = CLIPTokenizer.from_pretrained(tmp_path)
        assert back.get_added_vocab() == t.get_added_vocab()
        assert back.special_tokens_map == t.special_tokens_map
        assert back("the BIM<X>").input_ids == t("the BIM<X>").input_ids and back.vocab_size == 520
        t.save_pretrained(tmp_path)
        (tmp_path / gone).unlink()
    with pytest.raises(TokenizerError, match="'pad' is not extra_special_tokens"):
        t.add_special_tokens({"pad": "!"})


def test_special_tokens_can_be_set(tmp_path):
    t = small()
    t.pad_token = "!"
    assert t.pad_token_id == 0 and t(["the cat", "one"], padding=True).input_ids[1][-1] == 0
    t.pad_token_id = 513
    assert t.pad_token == "the</w>" and t.sep_token_id is None
    t.pad_token = "[PAD]"
    with pytest.raises(TokenizerError, match="add_special_tokens.*adds it"):
        t(["the cat", "one"], padding=True)
    t.pad_token = None
    with pytest.raises(TokenizerError, match="no pad_token to fill up with"):
        t(["the cat", "one"], padding=True)
    small().save_pretrained(tmp_path)
    back = CLIPTokenizer.from_pretrained(tmp_path, pad_token="[PAD]", local_files_only=True)
    assert back.pad_token_id == 520 and len(back) == 521 and back.name_or_path == str(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pad_tokn'"):
        CLIPTokenizer.from_pretrained(tmp_path, pad_tokn="!")
    with pytest.raises(ValueError, match="padding is not supported; give it in the call"):
        CLIPTokenizer.from_pretrained(tmp_path, padding="longest")


def test_ready_rows():
    t = small()
    rows = [{"input_ids": [1, 2], "id": 7}, {"input_ids": torch.tensor([3]), "id": 8}]
    assert t.pad(rows) == {"input_ids": [[1, 2], [3, 519]], "attention_mask": [[1, 1], [1, 0]], "id": [7, 8]}
    assert t.pad({"input_ids": [1]}, "max_length", 3).attention_mask == [1, 0, 0]
    assert t.pad(rows, return_tensors="pt").input_ids.shape == (2, 2)
    assert t.get_special_tokens_mask([518, 3, 519], already_has_special_tokens=True) == [1, 0, 1]
    assert t.get_special_tokens_mask([3], [4]) == [1, 0, 1, 1, 0, 1]
    with pytest.raises(TokenizerError, match="input_ids are missing; there is ids"):
        t.pad({"ids": [1]})


def test_decoding_in_other_forms():
    t = small()
    ids = t.encode("the cat !", add_special_tokens=False)
    assert t.decode(ids[0]) == "the" and t.decode([ids, ids]) == ["the cat !"] * 2
    assert t.decode(torch.tensor(ids)) == t.decode(list(torch.tensor(ids))) == "the cat !"
    assert t.decode(ids, clean_up_tokenization_spaces=True) == "the cat!"
    assert t.batch_decode(torch.tensor([ids])) == ["the cat !"] and t.batch_decode([]) == []
    assert t.convert_ids_to_tokens(513) == "the</w>"
    assert t.convert_tokens_to_string(["the</w>", "cat</w>"]) == "the cat"
    assert t.convert_ids_to_tokens([518, 513], skip_special_tokens=True) == ["the</w>"]


def test_encodings():
    t = small()
    out = t(["the cat", "one"], padding=True)
    assert out[0:1]["input_ids"] == [[518, 513, 515, 519]] and out.data == dict(out)
    with pytest.raises(KeyError, match=r"out.input_ids\[0\]"):
        out[0]
    assert out.convert_to_tensors("pt") is out and out.input_ids.dtype == torch.int64
    out["pixels"] = torch.zeros(2)
    assert out.to("cpu", torch.float16) is out
    assert (out.pixels.dtype, out.input_ids.dtype) == (torch.float16, torch.int64)
    with pytest.raises(AttributeError, match="word_ids is left out: call tokenizer.convert_ids_to_tokens"):
        out.word_ids()


def test_left_out_names_say_why():
    t = small()
    with pytest.raises(AttributeError, match="encode_plus is left out: call it"):
        t.encode_plus("the")
    assert not hasattr(t, "apply_chat_template") and not hasattr(t, "nonsense")
    with pytest.raises(ValueError, match="return_offsets_mapping is not supported"):
        t("the", return_offsets_mapping=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'paddin'"):
        t("the", paddin=True)


def test_bert_shares_it(tmp_path):
    vocab = {s: i for i, s in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a b ##c".split())}
    t = BertTokenizer(vocab)
    out = t("a", "bc", return_token_type_ids=True)
    assert out.input_ids == [2, 5, 3, 6, 7, 3] and out.token_type_ids == [0, 0, 0, 1, 1, 1]
    assert t.special_tokens_map["cls_token"] == "[CLS]" and t.bos_token_id == t.cls_token_id == 2
    assert t.add_tokens("Dad") == 1 and t.tokenize("a DAD") == ["a", "Dad"]
    t.save_pretrained(tmp_path)
    back = BertTokenizer.from_pretrained(tmp_path, padding_side="left")
    assert back.tokenize("a DAD") == ["a", "Dad"] and (back.vocab_size, len(back)) == (8, 9)
    assert back(["a", "a b"], padding=True).input_ids[0] == [0, 2, 5, 3]


# ---------------------------------------------------------------------------------- long words, hostile files


NEVER = 10**9


def merge_slowly(symbols, ranks):
    """The textbook's loop, quadratic in a word: join the best pair everywhere, look at all pairs again."""
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: ranks.get(pair, NEVER))
        if best not in ranks:
            break
        symbols = join_pair(symbols, best)
    return symbols


def random_merges(r, in_order):
    """Pairs of symbols that earlier pairs made; shuffled, in an order that no training would have learned."""
    symbols, merges = ["a", "b", "c", "a</w>", "b</w>", "c</w>"], []
    for _ in range(r.randint(0, 30)):
        pair = r.choice([s for s in symbols if not s.endswith("</w>")]), r.choice(symbols)
        merges.append(pair)
        symbols.append("".join(pair))
    return merges if in_order else r.sample(merges, len(merges))


@pytest.mark.parametrize("in_order", [True, False])
def test_merging_is_the_textbook_loop(in_order):
    r = random.Random(0)
    for _ in range(1500):
        merges = random_merges(r, in_order)
        ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        words = ["".join(r.choices("abc"[: r.randint(1, 3)], k=r.randint(1, 40))) for _ in range(5)]
        joined = merge([s for word in words for s in [*spell(word), None]], merges, ranks)
        assert joined == [s for word in words for s in [*merge_slowly(spell(word), ranks), None]], merges


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.parametrize("letters", ["abcdefghijklmnopqrstuvwxyz", "枸杞銀川人蔘韓國"])
def test_long_words_take_no_quadratic_time(letters):
    """The textbook's loop takes minutes; here it is some tenths of a second."""
    r = random.Random(0)
    t = CLIPTokenizer.train(["".join(r.choices(letters, k=8)) for _ in range(3000)], vocab_size=2000)
    text = "".join(r.choices(letters, k=60_000))
    assert seconds(lambda: t.encode(text)) < 4
    assert t.decode(t.encode(text), skip_special_tokens=True) == text


def test_long_words_are_cut_only_where_nothing_joins(monkeypatch):
    r = random.Random(0)
    t = CLIPTokenizer.train(["".join(r.choices("abcde<w/> ", k=300)) for _ in range(20)], vocab_size=700)
    for _ in range(100):
        text = "".join(r.choices("abcdefgh<w/> ", k=300))
        wanted = [s for word in words(clean(text)) for s in merge_slowly(spell(word), t._ranks)]
        for letters in (1, 7, 10_000):
            monkeypatch.setattr("miniclip.tokenizer.LETTERS_AT_ONCE", letters)
            t.find_added_tokens()                   # what is remembered is forgotten
            assert t.tokenize(text) == wanted


def test_words_are_remembered_but_not_without_end(monkeypatch):
    monkeypatch.setattr("miniclip.tokenizer.MOST_WORDS", 10)
    monkeypatch.setattr("miniclip.tokenizer.LETTERS_AT_ONCE", 20)
    t, fresh = small(), small()
    text = " ".join(f"the {'b' * i} cat" for i in range(1, 60))
    for _ in range(3):
        assert t.encode(text) == [518, *[i for word in text.split() for i in fresh.encode(word)[1:-1]], 519]
        assert len(t._known) <= 20 + len(t.added_tokens)


def test_marks_in_any_order_are_normalised_alike():
    """Against the library's own normalisation, which is right but slow."""
    r = random.Random(0)
    signs = "a\u00e9\u1e69ㅏ\u0300\u0301\u0316\u0327\u0338\u0345\u0344\u0f71\u0f72\u0f73\u0f75\u0f81"
    signs += "\u1e9b\u3099か—"
    for _ in range(2000):
        text = "".join(r.choices(signs, [1] * 4 + [9] * (len(signs) - 4), k=r.randint(0, 300)))
        for form in ("NFC", "NFD"):
            assert normal(form, text) == unicodedata.normalize(form, text), ascii(text)
    marks = "".join(c for c in map(chr, range(0x110000)) if unicodedata.combining(c))
    assert re.fullmatch(SIGNS.pattern, marks)           # no mark is missed
    assert seconds(lambda: normal("NFC", "a" + "\u0300\u0316" * 100_000)) < 2


def test_the_search_for_added_tokens_is_that_of_an_expression():
    r = random.Random(0)
    for _ in range(3000):
        tokens = {"".join(r.choices("ab<", k=r.randint(1, 6))) for _ in range(r.randint(1, 8))}
        text = "".join(r.choices("ab<c", k=r.randint(0, 40)))
        expression = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        assert Search(tokens).split(text) == re.split(f"({expression})", text), (tokens, text)
    assert Search([]).split("ab") == ["ab"] and Search(["]", "^"]).split("a^b") == ["a", "^", "b"]


def test_added_tokens_that_are_alike_take_one_pass():
    t = small()
    assert seconds(lambda: t.add_tokens(["a" * i + "b" for i in range(1, 1500)], special_tokens=True)) < 5
    assert seconds(lambda: t.encode("a" * 100_000)) < 5
    with pytest.raises(TokenizerError, match="added tokens of more than 1000000 letters"):
        t.add_tokens("ab" * 600_000)


def test_a_word_of_bert_takes_no_quadratic_time():
    t = BertTokenizer({s: i for i, s in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a ##a ##aa".split())})
    assert seconds(lambda: t.encode(("a" * 100 + " ") * 2000)) < 2
    assert t.tokenize("aaaa") == ["a", "##aa", "##a"] and t.tokenize("a" * 101) == ["[UNK]"]


def bpe(**changes):
    """The text of a tokenizer.json, with some fields of its model changed."""
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": build_vocab(MERGES),
             "merges": [list(pair) for pair in MERGES]}
    return json.dumps({"model": {**model, **changes}})


def config(**values):
    return {"tokenizer.json": bpe(), "tokenizer_config.json": json.dumps(values)}


HOSTILE = {
    "merges is a number": ({"tokenizer.json": bpe(merges=7)}, "tokenizer.json: model.merges = 7"),
    "merges holds a number": ({"tokenizer.json": bpe(merges=["a b", 7])}, "model.merges holds 7"),
    "merges holds lists": ({"tokenizer.json": bpe(merges=[["a", ["b"]]])}, "model.merges holds"),
    "merges of three": ({"tokenizer.json": bpe(merges=[["a", "b", "c"]])}, "merge 1 is 'a b c'"),
    "a long merge": ({"tokenizer.json": bpe(merges=["a" * 9000])}, "merge 1 is 'aaa"),
    "an id is text": ({"tokenizer.json": bpe(vocab={"a" * 9000: "b" * 9000})}, "the id of 'aaa"),
    "a huge id": ({"tokenizer.json": bpe(vocab={"a": 2**31})}, "the id of 'a' is 2147483648"),
    "no vocab": ({"tokenizer.json": bpe(vocab=[])}, "holds no vocab"),
    "suffix": ({"tokenizer.json": bpe(end_of_word_suffix=["x" * 9000])}, "end_of_word_suffix = "),
    "no end token": (config(eos_token="x" * 9000), "special token 'xxx"),
    "length is text": (config(model_max_length="77"), "tokenizer_config.json: model_max_length = '77'"),
    "length is negative": (config(model_max_length=-(2**70)), "model_max_length = -11805"),
    "length is a list": (config(model_max_length=[]), "model_max_length = []"),
    "side": (config(padding_side="x" * 9000), "padding_side = 'xxx"),
    "rules": (config(rules="x" * 9000), "rules = 'xxx"),
    "added id": (config(added_tokens_decoder={"1": {"content": "x"}, "9": {"content": 7}},
                        bos_token="x" * 999), "special token 'xxx"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_one_line(case, tmp_path):
    files, message = HOSTILE[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError) as caught:
        CLIPTokenizer.from_pretrained(tmp_path)
    said = str(caught.value)
    assert message in said and str(tmp_path) in said and "\n" not in said
    assert len(said.replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("value", [None, 10**30, 2**63])
def test_no_limit_is_the_default_length(value, tmp_path):
    for name, text in config(model_max_length=value).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert CLIPTokenizer.from_pretrained(tmp_path).model_max_length == 77
    with pytest.raises(TokenizerError, match="model_max_length = None"):
        small(model_max_length=None)
    with pytest.raises(TokenizerError, match="give max_length"):
        small(model_max_length=10**30)("the", padding="max_length")


def test_broken_packed_files_are_one_line(tmp_path):
    raw = bytearray(gzip.compress(b"#version\na b\n" * 50))
    r, path = random.Random(0), tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    for number in range(300):
        broken = raw[: r.randrange(2, len(raw))] if number % 2 else bytearray(raw)
        broken[r.randrange(2, len(broken)) if len(broken) > 2 else 0] ^= 1 << r.randrange(8)
        path.write_bytes(broken)
        try:
            CLIPTokenizer.from_pretrained(tmp_path)
        except TokenizerError as error:
            assert str(path) in str(error) and len(str(error)) < 300 and "\n" not in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_endless_lists_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    os.mkfifo(tmp_path / "merges.txt")
    with pytest.raises(TokenizerError, match="merges.txt: no such file, or not a regular one"):
        CLIPTokenizer.from_pretrained(tmp_path)
    os.unlink(tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_bytes(b"\n" * 1_000_001)
    with pytest.raises(TokenizerError, match="merges.txt: more than 1000000 lines"):
        CLIPTokenizer.from_pretrained(tmp_path)
