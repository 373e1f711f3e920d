from collections import Counter


def best_pair(words: dict[tuple[str, ...], int]) -> tuple[str, str]:
    counts: Counter[tuple[str, str]] = Counter()
    for symbols, n in words.items():
        for pair in zip(symbols, symbols[1:]):
            counts[pair] += n
    return min(counts, key=lambda pair: (-counts[pair], pair))


def join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        width = 2 if tuple(symbols[i:i + 2]) == pair else 1
        joined.append("".join(symbols[i:i + width]))
        i += width
    return joined
