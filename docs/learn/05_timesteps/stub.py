"""Which of 1000 timesteps do 10 steps visit? docs/learn/05_timesteps/page.md"""


def leading(n: int, T: int) -> list[int]:
    """n timesteps of 0 .. T-1 from high to low, the last one 0."""
    raise NotImplementedError


def trailing(n: int, T: int) -> list[int]:
    """The same, the first one T-1."""
    raise NotImplementedError
