"""Which pair does a tokenizer join first? docs/learn/20_bpe/page.md"""


def best_pair(words: dict[tuple[str, ...], int]) -> tuple[str, str]:
    """The most frequent neighbours; of equals the pair that sorts first. words: symbols -> occurrences."""
    raise NotImplementedError


def join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of the pair, from the left, made one."""
    raise NotImplementedError
