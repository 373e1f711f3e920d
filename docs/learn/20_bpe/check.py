"""Against learn_merges and join_pair."""

from collections import Counter

from miniclip.tokenizer import join_pair, learn_merges, spell


def check(answer) -> str:
    """Counts where each wrong way finds another pair; then a whole little training."""
    for counts in ({"low": 5, "lot": 2}, {"ba": 3, "ab": 3}, {"xyz": 1, "xyw": 1, "abc": 3},
                   {"aaaa": 2, "bc": 5}, {"薑": 4, "薄荷": 2}):
        wanted = learn_merges(Counter(counts), 1)[0]
        found = answer.best_pair({tuple(spell(word)): n for word, n in counts.items()})
        assert tuple(found) == wanted, f"of the words {counts} best_pair takes {found}, not {wanted}"
    for symbols in ("aaa", "aaaa", "abab", "b", "cab"):
        for pair in (("a", "a"), ("a", "b")):
            wanted, found = join_pair(list(symbols), pair), answer.join(list(symbols), pair)
            assert list(found) == wanted, f"join({list(symbols)}, {pair}) is {found}, not {wanted}"
    words = {tuple(spell(word)): n for word, n in {"春天": 3, "春風": 2, "秋天": 2}.items()}
    merges = []
    for _ in range(6):
        merges.append(tuple(answer.best_pair(words)))
        words = {tuple(answer.join(list(symbols), merges[-1])): n for symbols, n in words.items()}
    wanted = learn_merges(Counter({"春天": 3, "春風": 2, "秋天": 2}), 6)
    assert merges == wanted, f"six merges of 春天, 春風, 秋天 are {merges}, not {wanted}"
    return "and over and over again: the tokenizer's own six merges of 春天, 春風, 秋天"
