"""UniPC (Zhao et al. 2023): a multistep predictor, corrected when the next output is known."""

import math

import jax.numpy as jnp
import numpy as np

from ldm_jax.solvers.levels import Levels
from ldm_jax.solvers.loop import Solver
from ldm_jax.solvers.multistep import empty, histories, remember


def unipc(order: int = 2) -> Solver:
    """UniPC-p for data prediction with B(h) = exp(-h) - 1 ("bh2"); order p: 1 to 3.

    A level's x is corrected with the output that the model gives there anyway, so there is one call
    per level; the result of the last step is predicted, not corrected.
    """

    def init(x):
        return empty(x, order), (jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros((), x.dtype))

    def step(denoise, carry, x, level, keys):
        del keys
        history, (base, before, weight) = carry
        denoised = denoise(x, level)
        now = denoised.x0
        # weight 0: the first level, or a repeated one, where there is nothing to correct
        x = jnp.where(weight == 0, x, base + weight * (now - before))
        x = level.sigma_next / level.sigma * x - level.alpha_next * jnp.expm1(-level.h) * now
        _, known = remember(history, level.weights[1, :, :-1], now)
        weight = level.weights[1, history[0], -1]
        history, change = remember(history, level.weights[0, :, :-1], now)
        return (history, (x + known, now, weight)), x + change, denoised

    return Solver(init, step, lambda levels: _weights(levels, order))


def _weights(levels: Levels, order: int) -> np.ndarray:
    """[S, 2, order, order]: predictor and corrector, by number of earlier outputs.

    Each row has the weights of m_j - m_0, for the earlier outputs and, last, the next one. For data
    prediction (the paper's UniP and UniC with x0 in place of eps), B(h) = exp(-h) - 1:

        x_next = sigma_next / sigma x - alpha_next (exp(-h) - 1) m_0
                 - alpha_next B(h) sum_j rho_j / r_j (m_j - m_0)

    where r_j = (lambda_j - lambda_0) / h, negative for earlier outputs and 1 for the next one, and
    lambda = log(alpha / sigma).
    """
    out = np.zeros((len(levels.t), 2, order, order))
    for i, n, level, behind in histories(levels, order, math.inf):
        h = np.float64(level.h)
        if h == 0:  # a repeated level
            continue
        scale = -level.alpha_next * np.expm1(-h)
        r = -behind / h
        for_past, _ = _solve(h, r, [])
        out[i, 0, n, : len(r)] = scale * for_past
        for_past, for_next = _solve(h, r, [1.0])
        out[i, 1, n, : len(r)] = scale * for_past
        out[i, 1, n, -1] = scale * for_next[0]
    return out


def _solve(h: float, r: np.ndarray, following: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """rho_j / r_j of the earlier and of the following outputs at r.

    rho solves sum_j r_j^(k-1) rho_j = k! (-h) phi_(k+1)(-h) / B(h) for k = 1 ... p, with phi_1(z) =
    (exp(z) - 1) / z and phi_(k+1)(z) = (phi_k(z) - 1/k!) / z (the paper's R_p and phi_p, for data
    prediction). A single rho is 1/2, as in the authors' code.
    """
    r = np.append(r, following)
    if len(r) < 2:
        rho = np.full(len(r), 0.5)
    else:
        phi, b = np.expm1(-h) / -h - 1, []  # phi is -h phi_(k+1)(-h)
        for k in range(1, len(r) + 1):
            b.append(phi * math.factorial(k) / np.expm1(-h))
            phi = phi / -h - 1 / math.factorial(k + 1)
        rho = np.linalg.solve(r ** np.arange(len(r))[:, None], b)
    rho = rho / r
    cut = len(r) - len(following)
    return rho[:cut], rho[cut:]
