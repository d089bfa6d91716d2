"""The four forms of the W-step: where its gradient is taken, and on what scale.

Published order: block k's weights move by the gradient of J_k at h*_k, *after* the h-step. To first order that
gradient is backprop's times Π_{j≥k} 2λ_jγ_j, and for blocks inside the chain it is biased as well. The other
forms mend the one, the other, or both; docs/choosing.md says which to use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from blockprop.hsolvers import Backtracking, GaussNewton, GradientDescent, HSolver
from blockprop.penalties import Penalty, Squared

__all__ = ["Form", "FormName", "form_named"]

FormName = Literal["exact", "published", "rescaled", "proximal"]


@dataclass(frozen=True)
class Form:
    """How the W-step's gradient is taken.

    Attributes:
        name: one of "exact", "published", "rescaled", "proximal".
        at_forward: W-gradient at the forward pass's h_k instead of at h*_k, hence from the very graph that
            gives the h-gradient.
        rescaled: gradients divided by the product of the links' scales, before the optimizer sees them.
        default_scale: 2λγ_h where the user names no step size.
    """

    name: FormName
    at_forward: bool
    rescaled: bool
    default_scale: float

    def solver(self, penalty: Penalty) -> HSolver:
        """The h-solver used for a link where the user names none: one gradient step."""
        curvature = penalty.curvature
        lr = None if curvature is None else self.default_scale / curvature
        return GradientDescent(steps=1, lr=lr).on(penalty)

    def check(self, solvers: Sequence[HSolver], penalties: Sequence[Penalty]) -> None:
        """Refuse what the form is not defined for.

        Raises:
            ValueError: naming the form to use instead.
        """
        for solver, penalty in zip(solvers, penalties, strict=True):
            if self.name == "exact":
                _check_exact(solver, penalty)
            if self.name == "rescaled" and not (isinstance(solver, GradientDescent) and isinstance(penalty, Squared)):
                raise ValueError(
                    "form 'rescaled' knows its scale for the squared penalty and gradient descent only, not for "
                    f"{_name(penalty)} with {_name(solver)}; use form='proximal'"
                )

        if self.name == "rescaled" and not all(scale > 0 for scale in self.scales(solvers, penalties)):
            raise ValueError(
                "form 'rescaled' divides by 1 - (1 - 2λγ_h)^N_h, which is not positive here; expected 2λγ_h below 2"
            )

    def scales(self, solvers: Sequence[HSolver], penalties: Sequence[Penalty]) -> list[float]:
        """By what each block's gradients are divided: Π_{j≥k} of the links' scales for block k, bottom first.

        With one gradient step of equal size on every link that is (2λγ_h)^(K-k). Length K.
        """
        scales = [1.0]
        for solver, penalty in zip(reversed(solvers), reversed(penalties), strict=True):
            link = solver.scale(penalty) if self.rescaled and isinstance(solver, GradientDescent) else 1.0
            scales.append(scales[-1] * link)
        return scales[::-1]


def _name(thing: object) -> str:
    return {Backtracking: "backtracking", GaussNewton: "Gauss-Newton"}.get(type(thing), type(thing).__name__)


def _check_exact(solver: HSolver, penalty: Penalty) -> None:
    if not isinstance(penalty, Squared):
        raise ValueError(
            f"form 'exact' needs the squared penalty, not {_name(penalty)}; use form='proximal' for any other"
        )
    if not isinstance(solver, GradientDescent):
        raise ValueError(f"form 'exact' needs gradient descent, not {_name(solver)}; use form='proximal' for any other")
    if solver.steps != 1:
        raise ValueError(f"form 'exact' takes one h-step, not {solver.steps}; use form='proximal' for several")
    assert solver.lr is not None
    if abs(penalty.curvature * solver.lr - 1) > 1e-9:
        raise ValueError(
            f"form 'exact' needs 2λγ_h = 1, but λ = {penalty.weight:g} and γ_h = {solver.lr:g} give "
            f"{penalty.curvature * solver.lr:g}; leave γ_h out, or use form='rescaled' or 'proximal'"
        )


_FORMS: dict[FormName, Form] = {
    "exact": Form("exact", at_forward=True, rescaled=False, default_scale=1.0),
    # the paper's λ = 1 (its MNIST) with its γ_h = 0.01 (its ResNet)
    "published": Form("published", at_forward=False, rescaled=False, default_scale=0.02),
    # small against the bias, which grows with it; large enough for float32 at K = 8, where it enters as its 7th power
    "rescaled": Form("rescaled", at_forward=False, rescaled=True, default_scale=0.1),
    "proximal": Form("proximal", at_forward=True, rescaled=False, default_scale=1.0),
}


def form_named(name: str) -> Form:
    """The form of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _FORMS:
        raise ValueError(f"unknown form {name!r}; expected one of {', '.join(get_args(FormName))}")
    return _FORMS[name]
