"""MARS: a scaled gradient correction in front of AdamW, or of any other optimizer."""

from __future__ import annotations

from typing import Any

import optax

from agent_optax._validation import check_fraction, check_number
from agent_optax.correction._clip_tensors import clip_tensors
from agent_optax.correction._correct import correct_gradients
from agent_optax.correction.coefficients._constant import constant
from agent_optax.correction.memories._difference import difference


def mars_correction(
    b1: float = 0.95, gamma: float = 0.025, exact: bool = False, max_norm: float | None = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient correction of MARS, for any optimizer with a momentum :math:`\beta_1`.

    .. math::
        c_t = g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{old}), \qquad
        \tilde c_t = c_t \min\left(1, \frac{1}{\lVert c_t \rVert_2}\right) \ \text{for each tensor}

    It is ``correct_gradients(difference(exact), constant(b1 / (1 - b1)), scaling=gamma)`` and a clipping. Chain it
    with an optimizer: ``optax.chain(mars_correction(), optax.lion(1e-4, b1=0.95))``.

    Args:
        b1: :math:`\beta_1`, the momentum of the optimizer that follows, in [0, 1). Default 0.95 (the authors').
        gamma: :math:`\gamma`, how much of the correction of STORM is made. Default 0.025 (the authors').
        exact: whether :math:`g_{old}` is the gradient of the current batch at the previous parameters, which costs a
            second gradient; see `difference`. Default False: the gradient of the previous step, as the authors' code.
        max_norm: the norm to which each tensor is clipped; None for no clipping. Default 1 (the authors').

    Returns:
        A `optax.GradientTransformationExtraArgs`; with ``exact=True`` its update needs `params` and ``old_grads=``, as
        `agent_optax.value_and_grads` gives it.

    Raises:
        ValueError: if `b1` is outside [0, 1), or `gamma` or `max_norm` is not a number, or `max_norm` is not positive.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = optax.chain(agent_optax.mars_correction(b1=0.9, gamma=0.5), optax.ema(0.9))
        >>> state = tx.init(jnp.zeros(1))

    References:
        Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models, ICML 2025
        (https://arxiv.org/abs/2411.10438).
    """
    check_fraction("b1", b1, "it is the momentum of the optimizer; the authors take 0.95", below_one=True)
    check_number("gamma", gamma, "the authors take 0.025; 0 corrects nothing")
    correction = correct_gradients(difference(exact), constant(b1 / (1 - b1)), scaling=gamma)
    if max_norm is None:
        return correction
    check_number("max_norm", max_norm, "the authors take 1.0; None does not clip")
    if isinstance(max_norm, (int, float)) and max_norm <= 0:
        raise ValueError(f"max_norm must be positive, got {max_norm!r}: None does not clip.")
    return optax.chain(correction, clip_tensors(max_norm))


def mars(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gamma: float = 0.025,
    exact: bool = False,
    max_norm: float | None = 1.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MARS-AdamW: AdamW on gradients that step ahead by a part of STORM's correction.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, \tilde c_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, \tilde c_t^2, \qquad
        \theta \leftarrow \theta - \eta \left(\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} + \lambda \theta\right)

    with :math:`\tilde c_t` of `mars_correction`. It is ``optax.chain(mars_correction(...), optax.scale_by_adam(...),
    optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))``.

    Published versions disagree; this is what we do, and what else is published:

    - First step: not corrected, as in the paper, which starts from two equal points. The authors' code compares the
      first gradient with zero, so its first :math:`c` is :math:`(1 + \gamma \beta_1 / (1-\beta_1))\, g`; PyTorch Image
      Models takes g there, and does not clip it.
    - Clipping: :math:`c_t`, tensor by tensor, as the authors' code; the paper writes one vector. The feature request
      for Optax clips the correction term alone.
    - Second moment: of :math:`\tilde c_t`, as the authors' code; their README writes it of the raw gradient.
    - Which parameters: all. The authors' code gives tensors that are not matrices (PyTorch Image Models: vectors and
      scalars) to an AdamW with a learning rate, momenta and weight decay of its own: use `optax.partition` for that.
    - Momentum: 0.95 and 0.99, as the authors; PyTorch Image Models has 0.9 and 0.99.
    - Approximate by default, as the authors' code. In their GPT-2 runs ``exact=True`` gained 0.001 to 0.002 in loss.

    Args:
        learning_rate: :math:`\eta`, a number or an Optax schedule.
        b1: :math:`\beta_1`. Default 0.95 (the authors').
        b2: :math:`\beta_2`. Default 0.99 (the authors').
        eps: :math:`\epsilon`. Default 1e-8 (the authors').
        weight_decay: :math:`\lambda`, decoupled. Default 0 (the authors' code; their GPT-2 runs take 0.01).
        gamma: :math:`\gamma`. Default 0.025 (the authors').
        exact: as in `mars_correction`. Default False.
        max_norm: as in `mars_correction`. Default 1 (the authors').
        mask: which parameters decay, as in `optax.adamw`. Default: all.

    Returns:
        A `optax.GradientTransformationExtraArgs`; see `mars_correction` for what its update needs.

    Raises:
        ValueError: as `mars_correction`.

    Example:
        >>> import agent_optax, jax.numpy as jnp, optax
        >>> tx = agent_optax.mars(learning_rate=3e-3, weight_decay=0.01)
        >>> params = {"w": jnp.ones((2, 2))}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)

    References:
        Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models, ICML 2025
        (https://arxiv.org/abs/2411.10438).
    """
    return optax.chain(
        mars_correction(b1, gamma, exact, max_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
