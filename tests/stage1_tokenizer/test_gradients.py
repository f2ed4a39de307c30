"""How gradients pass a quantizer, against their definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers.gradients import pass_gradient, rotated, straight_through


def example(dim: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors, chosen, upstream = (
        torch.randn(20, dim, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return vectors.requires_grad_(), chosen, upstream


def test_straight_through_gives_the_code_and_passes_the_gradient_as_it_is():
    vectors, chosen, upstream = example()
    result = straight_through(vectors, chosen)
    torch.testing.assert_close(result, chosen)
    result.backward(upstream)
    assert torch.equal(vectors.grad, upstream)


def test_the_rotation_trick_is_the_rotation_and_scale_of_its_definition():
    """R = I - 2 r r^T + 2 q e^T turns e onto q; the gradient is scale R^T upstream."""
    vectors, chosen, upstream = example()
    result = rotated(vectors, chosen)
    assert torch.allclose(result, chosen, rtol=0, atol=1e-15)
    result.backward(upstream)
    for v, c, g, own in zip(vectors.detach(), chosen, upstream, vectors.grad, strict=True):
        e, q = F.normalize(v, dim=0), F.normalize(c, dim=0)
        r = F.normalize(e + q, dim=0)
        turn = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
        torch.testing.assert_close(turn @ e, q)
        torch.testing.assert_close(turn @ turn.T, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(own, c.norm() / v.norm() * turn.T @ g)


def test_rotation_keeps_the_angle_between_gradient_and_vector():
    """What the trick is for: the gradient lies to the vector as it lay to the code."""
    vectors, chosen, upstream = example()
    rotated(vectors, chosen).backward(upstream)
    before = F.cosine_similarity(upstream, chosen, dim=1)
    torch.testing.assert_close(F.cosine_similarity(vectors.grad, vectors.detach(), dim=1), before)


def test_rotation_of_an_exact_code_is_the_identity_and_zeros_stay_finite():
    vectors, _, upstream = example()
    rotated(vectors, vectors.detach()).backward(upstream)
    torch.testing.assert_close(vectors.grad, upstream)
    zero = torch.zeros(2, 5, requires_grad=True)
    rotated(zero, torch.ones(2, 5)).sum().backward()
    assert zero.grad.isfinite().all()


def test_pass_gradient_selects_the_estimator_by_name():
    vectors, chosen, upstream = example()
    for how, function in {"straight_through": straight_through, "rotation": rotated}.items():
        (own,) = torch.autograd.grad(pass_gradient(vectors, chosen, how), vectors, upstream)  # type: ignore[arg-type]
        (expected,) = torch.autograd.grad(function(vectors, chosen), vectors, upstream)
        assert torch.equal(own, expected)
