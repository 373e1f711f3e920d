"""Against spaced_timesteps."""

from compare import same

from minidiff.schedule import spaced_timesteps


def check(answer) -> None:
    """Steps that divide T, and some that do not."""
    for n, T in ((10, 1000), (30, 1000), (1, 1000), (7, 100), (50, 50)):
        for name in ("leading", "trailing"):
            wanted = spaced_timesteps(name, n, T, 0)
            same(getattr(answer, name)(n, T), wanted, f"{name}({n}, {T})", 0.0, {
                "from high to low": wanted[::-1],
                "the timesteps end at T - 1, not at T": [t + 1 for t in wanted],
                "leading strides by T // n, a whole number": [int(i * T / n) for i in range(n)][::-1],
                "that spacing visits both ends": spaced_timesteps("linspace", n, T, 0)})
