"""The methods, each under the name that tables give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

import agent_optax
from convergence.coefficients import BiasAware, ByPosition
from convergence.setting import Setting

LOSS_PASS = 1 / 3  # a forward pass, in gradient evaluations
OUTPUT_LAYER = "2/kernel"  # of the network of R9
RATES = (0.02, 0.05, 0.1, 0.2)  # tried for each of the networks whose seconds are compared
BEST_RATES = {  # of those, as the suite time-to-accuracy-rates finds them at 95%; 0.1 for the others
    "dense": 0.05,
    "sparse layers, static, table": 0.2,
    "sparse layers, SET, table": 0.2,
    "sparse layers, RigL": 0.2,
    "sparse layers, RigL, gradient regression": 0.2,
    "sparse layers, RigL by candidates": 0.2,  # RigL's
}


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, when its snapshot moves, and what it costs."""

    inner: Callable[[Setting], optax.GradientTransformation]  # sparsified by the setting
    step_gradients: int = 1  # evaluated at each step: 2 with an old gradient on the same batch
    refresh_at: tuple[int, ...] = ()  # halves of the epoch that begin with a refresh: 0, 1 (after the topology update)
    refresh_every: int = 1  # epochs
    refresh_share: float = 1.0  # of the training images, a random part each time
    refresh_above: float = 0.0  # refresh only where the variance ratio, as last measured, is above this
    pairs_losses: bool = False  # the refresh pass evaluates losses at the old snapshot, batch by batch
    keeps_batches: bool = False  # the refresh pass keeps the gradient of each batch
    attacks_refresh: bool = False  # the refresh pass sees attacked images
    fixes_batches: bool = False  # the same batches in each epoch, in another order
    keeps_order: bool = False  # and in the same order
    batch_multiple: int = 1
    epoch_multiple: int = 1  # trains so many times as long, and its accuracy is read off as often as that of the others
    storage: Literal["dense", "compact"] = "compact"
    pattern: Any = None  # which masks are allowed, as sparsify takes it
    group: int | None = None  # sparse layers whose outputs share their inputs in groups of so many; None: dense kernels
    candidates: float | None = None  # of topology updates of sparse layers, over the number of weights; None: all
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the setting

    def own(self, setting: Setting) -> Setting:
        """The setting as this method changes it."""
        changed = dataclasses.replace(setting, **self.changes)
        return dataclasses.replace(changed, averages=changed.averages and self.group is None)

    def optimizer(self, setting: Setting, key: Any, masks: Any = None) -> optax.GradientTransformationExtraArgs:
        """The sparse optimizer, scheduled over the epochs that this method runs."""
        own = dataclasses.replace(setting, epochs=setting.epochs * self.epoch_multiple)
        return own.sparsified(self.inner(own), key, masks, self.storage, self.pattern)

    def evaluations(self, setting: Setting) -> float:
        """Gradient evaluations in an epoch, in units of the training set, when no refresh is left out."""
        refreshes = len(self.refresh_at) / self.refresh_every
        return self.epoch_multiple * (self.step_evaluations(setting) + refreshes * self.refresh_gradients(setting))

    def step_evaluations(self, setting: Setting) -> float:
        """Gradient evaluations of the steps of an epoch, in units of the training set."""
        return (self.step_gradients + setting.attack_steps * bool(setting.attack_epsilon)) * self.batch_multiple

    def refresh_gradients(self, setting: Setting) -> float:
        """Gradient evaluations of one refresh."""
        attack = setting.attack_steps if self.attacks_refresh else 0
        return self.refresh_share * (1 + attack + (LOSS_PASS if self.pairs_losses else 0))


def _corrected(memory, coefficient, scaling: float = 1.0) -> Callable[[Setting], optax.GradientTransformation]:
    """The correction in front of the paper's SGD; memory and coefficient are functions of the setting."""

    def inner(setting: Setting) -> optax.GradientTransformation:
        correction = agent_optax.correct_gradients(memory(setting), coefficient(setting), scaling)
        return optax.chain(correction, setting.momentum_sgd())

    return inner


def _snapshot(setting: Setting):
    return agent_optax.snapshot()


def _cached(setting: Setting):
    return agent_optax.snapshot(cached_batches=setting.steps_an_epoch)


def _table(setting: Setting):
    return agent_optax.table(setting.steps_an_epoch)


def _recursion(setting: Setting):
    return agent_optax.recursion()


def regression(decay: float = 0.98, scope: Literal["all", "leaf"] = "all"):
    """Gradient regression as a function of the setting."""
    return lambda setting: agent_optax.gradient_regression(decay=decay, scope=scope)


def losses(smoothing: float):
    """Loss regression as a function of the setting."""
    return lambda setting: agent_optax.loss_regression(smoothing=smoothing)


def fixed(c: float):
    """A constant as a function of the setting."""
    return lambda setting: agent_optax.constant(c)


def _by_position(setting: Setting) -> ByPosition:
    return ByPosition(setting.steps_an_epoch)


def _bias_aware(setting: Setting) -> BiasAware:
    del setting
    return BiasAware()


def _snapshot_method(coefficient, scaling: float = 1.0, **changes) -> Method:
    settings = {"step_gradients": 2, "refresh_at": (0,)} | changes
    return Method(_corrected(_snapshot, coefficient, scaling), **settings)


def _loss_method(scaling: float, smoothing: float, **changes) -> Method:
    return _snapshot_method(losses(smoothing), scaling, pairs_losses=True, **changes)


def _cached_method(coefficient, **changes) -> Method:
    settings = {"refresh_at": (0,), "keeps_batches": True} | changes
    return Method(_corrected(_cached, coefficient), **settings)


def _alpha_svrg(setting: Setting) -> optax.GradientTransformation:
    correction = agent_optax.alpha_svrg(1.0, setting.epochs)
    return optax.chain(correction, optax.scale(-1.0), setting.momentum_sgd())  # its own step is minus the estimate


def _mars(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(agent_optax.mars_correction(b1=0.9, gamma=0.025), setting.momentum_sgd())


def _adam(setting: Setting) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(setting.weight_decay), optax.adam(setting.rate(0.01)))


def _sgd(setting: Setting) -> optax.GradientTransformation:
    return setting.momentum_sgd()


def _reduced(factor: float) -> Method:
    return Method(lambda setting: setting.momentum_sgd(factor))


def _storm(a: float) -> Method:
    return Method(_corrected(_recursion, fixed(1 - a)), step_gradients=2)


def _timed() -> dict[str, Method]:
    """Dense, masked and sparse networks whose seconds are compared."""
    corrections = {
        "": Method(_sgd),
        ", gradient regression": _snapshot_method(regression()),
        ", table": Method(_corrected(_table, regression()), fixes_batches=True),
    }
    timed = {
        "dense": Method(_sgd, changes={"topology": "dense"}),
        "masks, RigL": Method(_sgd, storage="dense", changes={"topology": "rigl"}),
    }
    for label, topology in (("static", "static"), ("SET", "set"), ("RigL", "rigl")):
        for correction, method in corrections.items():
            timed[f"sparse layers, {label}{correction}"] = dataclasses.replace(
                method, group=32, changes={"topology": topology}
            )
    for correction in ("", ", table"):
        by_dense_gradient = timed[f"sparse layers, RigL{correction}"]
        timed[f"sparse layers, RigL by candidates{correction}"] = dataclasses.replace(by_dense_gradient, candidates=1.0)
    return timed


def _with_rate(method: Method, rate: float) -> Method:
    return dataclasses.replace(method, changes={**method.changes, "learning_rate": rate})


def _ablating(share: float) -> Callable[[str], agent_optax.typing.Pattern]:
    """Constant fan-in with ablation in the hidden layers: an output of the last layer is a class."""
    return lambda name: agent_optax.fan_in(ablation=None if name == OUTPUT_LAYER else share)


METHODS: dict[str, Method] = {
    "SGD": Method(_sgd),
    "AGENT as published": _loss_method(0.1, 0.3),
    "loss regression, γ 1, α 1": _loss_method(1.0, 1.0),
    "SVRG": _snapshot_method(fixed(1.0)),
    "gradient regression": _snapshot_method(regression()),
    "gradient regression, cached": _cached_method(regression()),
    "table, gradient regression": Method(_corrected(_table, regression()), fixes_batches=True),
    "SGD, 2x batch": Method(_sgd, batch_multiple=2),
    "SGD, 3x batch": Method(_sgd, batch_multiple=3),
    "SGD, 2x epochs": Method(_sgd, epoch_multiple=2),
    "SGD, 3x epochs": Method(_sgd, epoch_multiple=3),
    # Other optimizers and other corrections.
    "Adam": Method(_adam),
    "MVR (STORM), a = 0.1": _storm(0.1),
    "MVR (STORM), a = 0.5": _storm(0.5),
    "AGENT + MVR": Method(_corrected(_recursion, losses(0.3), 0.1), step_gradients=2),
    "α-SVRG": Method(_alpha_svrg, step_gradients=2, refresh_at=(0,)),
    "MARS": Method(_mars),
    "SGD, rate x 0.3": _reduced(0.3),
    "SGD, rate x 0.1": _reduced(0.1),
    # Parts of the paper's method, changed one at a time.
    **{f"fixed c = {c:g}": _snapshot_method(fixed(c)) for c in (0.001, 0.01, 0.1, 0.5)},
    "γ 1, α 0.3 (no γ)": _loss_method(1.0, 0.3),
    "γ 0.1, α 1": _loss_method(0.1, 1.0),
    "γ 0.5, α 0.3": _loss_method(0.5, 0.3),
    "γ 1, α 0.1": _loss_method(1.0, 0.1),
    # Gradient regression, changed one thing at a time.
    **{f"gradient regression, decay {d:g}": _snapshot_method(regression(d)) for d in (0.8, 0.9, 0.95, 0.995)},
    "gradient regression, a leaf each": _snapshot_method(regression(scope="leaf")),
    "gradient regression, refresh after the topology update": _snapshot_method(regression(), refresh_at=(1,)),
    "gradient regression, two refreshes an epoch": _snapshot_method(regression(), refresh_at=(0, 1)),
    "gradient regression, γ 0.1": _snapshot_method(regression(), 0.1),
    "cached, decay 0.9": _cached_method(regression(0.9)),
    "cached, fixed batches": _cached_method(regression(), fixes_batches=True),
    "cached, refresh after the topology update": _cached_method(regression(), refresh_at=(1,), fixes_batches=True),
    "cached, two refreshes an epoch": _cached_method(regression(), refresh_at=(0, 1), fixes_batches=True),
    "cached, a refresh every 2 epochs": _cached_method(regression(), refresh_every=2, fixes_batches=True),
    "table, decay 0.9": Method(_corrected(_table, regression(0.9)), fixes_batches=True),
    "table, a leaf each": Method(_corrected(_table, regression(scope="leaf")), fixes_batches=True),
    "table, in the same order": Method(_corrected(_table, regression()), fixes_batches=True, keeps_order=True),
    "table, γ 0.7": Method(_corrected(_table, regression(), 0.7), fixes_batches=True),
    "table, c = 1 (SAGA)": Method(_corrected(_table, fixed(1.0)), fixes_batches=True),
    "SGD, fixed batches": Method(_sgd, fixes_batches=True),
    # Smaller budgets.
    **{f"gradient regression, {s:.0%} sub-sample": _snapshot_method(regression(), refresh_share=s) for s in (0.1, 0.3)},
    **{
        f"gradient regression, a refresh every {n} epochs": _snapshot_method(regression(), refresh_every=n)
        for n in (2, 5)
    },
    "gradient regression, refresh where the ratio is above 0.5": _snapshot_method(
        regression(), refresh_at=(0, 1), refresh_above=0.5
    ),
    # Coefficients that are not in the library.
    "gradient regression by position": _snapshot_method(_by_position),
    "cached, by position": _cached_method(_by_position),
    "bias-aware regression": _snapshot_method(_bias_aware, storage="dense"),
    # Constant fan-in.
    **{
        f"{name}, {label}": dataclasses.replace(method, pattern=pattern, storage=storage)
        for label, pattern, storage in (
            ("fan-in", agent_optax.fan_in(), "compact"),
            ("fan-in of 4 together", agent_optax.fan_in(group=4), "compact"),
            ("fan-in of 10 together", agent_optax.fan_in(group=10), "compact"),
            ("fan-in, ablation 0.3", _ablating(0.3), "dense"),
            ("fan-in, ablation 0.7", _ablating(0.7), "dense"),
            ("fan-in, ablation 1", _ablating(1.0), "dense"),
        )
        for name, method in (("SGD", Method(_sgd)), ("gradient regression", _snapshot_method(regression())))
    },
    **{name: _with_rate(method, BEST_RATES.get(name, 0.1)) for name, method in _timed().items()},
    **{f"{name}, rate {rate:g}": _with_rate(method, rate) for name, method in _timed().items() for rate in RATES},
    # Under attack.
    "gradient regression, attacked mean": _snapshot_method(regression(), attacks_refresh=True),
}

TIMED = tuple(_timed())  # the networks whose seconds are compared
