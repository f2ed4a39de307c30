"""Residual quantization: depth by depth by hand, shared and separate codebooks, the stream's
order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer import Level, ResidualOptions, VectorOptions
from stage1_tokenizer.quantizers import ResidualQuantizer, VectorQuantizer
from stage1_tokenizer.quantizers.vector import nearest


def quantizer(depth: int = 3, shared: bool = False, **options) -> ResidualQuantizer:
    """Started on codebooks of eight codes that shrink with depth."""
    made = ResidualQuantizer(
        8, 4, ResidualOptions(depth=depth, shared=shared), VectorOptions(normalize=False, **options)
    )
    for i, book in enumerate(made.books):
        book.codebook.data.copy_(
            torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) / 2**i
        )
        book.sums.copy_(book.codebook.detach())
        book.counts.fill_(1.0)
        book.initialized.fill_(True)
    return made


def features(*shape: int, seed: int = 10) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("shared", [False, True])
def test_each_depth_quantizes_the_residual(shared):
    residual, x = quantizer(shared=shared).eval(), features(2, 4, 3, 5)
    result = residual(x)
    left, total, codes = flat(x), torch.zeros(30, 4), []
    for depth in range(3):
        book = residual.books[0 if shared else depth].codebook
        own = nearest(left, book)
        total, left = total + book[own], left - book[own]
        codes.append(own.reshape(2, 15))
    assert torch.equal(result.codes, torch.cat(codes, dim=1)) and result.codes.shape == (2, 45)
    torch.testing.assert_close(flat(result.latents), total)
    torch.testing.assert_close(residual.embed(result.codes, (3, 5)), result.latents)
    assert residual.layout((3, 5)) == (Level(grid=(3, 5), num_codes=8),) * 3
    assert residual.vectors().shape == (24, 4) and len(residual.books) == (1 if shared else 3)


def test_one_depth_is_plain_vector_quantization():
    residual, x = quantizer(depth=1).eval(), features(2, 4, 3, 5)
    plain = VectorQuantizer(8, 4, VectorOptions(normalize=False)).eval()
    plain.load_state_dict(residual.books[0].state_dict())
    one, other = residual(x), plain(x)
    assert torch.equal(one.codes, other.codes) and one.codes.shape == (2, 3, 5)
    torch.testing.assert_close(one.latents, other.latents)
    torch.testing.assert_close(one.loss, other.loss)


def test_more_depths_reduce_the_error():
    """K-means of ever smaller remainders: each depth lowers the error of the batch it was started
    on."""
    x, errors = features(8, 4, 8, 8), []
    for depth in (1, 2, 4):
        residual = ResidualQuantizer(
            32,
            4,
            ResidualOptions(depth=depth),
            VectorOptions(normalize=False, kmeans_iterations=10),
        ).train()
        errors.append(float((residual(x).latents - x).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_decoder_gradient_is_straight_through_the_sum():
    residual, x, upstream = (
        quantizer(),
        features(2, 4, 3, 3).requires_grad_(),
        features(2, 4, 3, 3, seed=3),
    )
    (gradient,) = torch.autograd.grad((residual(x).latents * upstream).sum(), x)
    torch.testing.assert_close(gradient, upstream)


def test_commitment_is_summed_over_depths():
    residual, x = quantizer(commitment=0.5).eval(), features(2, 4, 3, 3)
    result = residual(x)
    levels = [result.metrics[f"commitment_level_{i}"] for i in (1, 2, 3)]
    torch.testing.assert_close(result.loss, 0.5 * sum(levels))
    left = flat(x)
    for depth, level in enumerate(levels):
        book = residual.books[depth].codebook
        left = left - book[nearest(left, book)]
        torch.testing.assert_close(level, left.square().mean())


def test_with_normalize_the_vectors_alone_are_on_the_sphere():
    residual = ResidualQuantizer(8, 4, ResidualOptions(), VectorOptions(normalize=True)).train()
    x = features(8, 4, 4, 4)
    residual(x)
    assert not any(book.options.normalize for book in residual.books)
    torch.testing.assert_close(residual.eval()(3 * x).codes, residual(x).codes)
    assert float(residual.books[1].codebook.norm(dim=1).mean()) < 0.9 * float(
        residual.books[0].codebook.norm(dim=1).mean()
    )


def test_shared_codebook_learns_from_all_depths_and_own_ones_from_one():
    x = features(4, 4, 4, 4)
    own, shared = (
        quantizer(decay=0.5, dead_code_threshold=0.0).train(),
        quantizer(shared=True, decay=0.5, dead_code_threshold=0.0).train(),
    )
    own(x)
    for book in own.books:
        assert (
            float(book.counts.sum()) == pytest.approx(0.5 * 8 + 0.5 * 64) and int(book.steps) == 1
        )
    shared(x)
    assert (
        float(shared.books[0].counts.sum()) == pytest.approx(0.5 * 8 + 0.5 * 3 * 64)
        and int(shared.books[0].steps) == 1
    )


def test_the_gradient_codebook_learns_by_gradient_at_every_depth():
    residual = quantizer(codebook="gradient").train()
    residual(features(8, 4, 4, 4)).loss.backward()
    assert all(
        book.codebook.grad is not None and book.codebook.grad.any() for book in residual.books
    )


def test_rotation_turns_the_whole_vector_onto_its_sum():
    residual, x, upstream = (
        quantizer(gradient="rotation").eval(),
        features(2, 4, 3, 3).requires_grad_(),
        features(2, 4, 3, 3, seed=3),
    )
    result = residual(x)
    (gradient,) = torch.autograd.grad((result.latents * upstream).sum(), x)
    angle = F.cosine_similarity(flat(gradient), flat(x.detach()), dim=1)
    torch.testing.assert_close(
        angle, F.cosine_similarity(flat(upstream), flat(result.latents.detach()), dim=1)
    )
