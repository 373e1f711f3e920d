def widths_in(channels: tuple[int, ...], n: int) -> list[int]:
    last, stack = len(channels) - 1, [channels[0]]
    for i, width in enumerate(channels):
        stack += [width] * (n + (i < last))
    widths, h = [], channels[last]
    for width in reversed(channels):
        for _ in range(n + 1):
            widths.append(h + stack.pop())
            h = width
    return widths
