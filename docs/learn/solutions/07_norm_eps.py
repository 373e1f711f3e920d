def eps_of(name: str) -> float:
    return 1e-6 if name.endswith(".norm") else 1e-5         # Transformer2DModel's GroupNorm


def ratio(variance: float) -> float:
    return ((variance + 1e-6) / (variance + 1e-5)) ** 0.5
