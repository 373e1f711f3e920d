def leading(n: int, T: int) -> list[int]:
    return [i * (T // n) for i in range(n)][::-1]


def trailing(n: int, T: int) -> list[int]:
    return [round(T - i * T / n) - 1 for i in range(n)]
