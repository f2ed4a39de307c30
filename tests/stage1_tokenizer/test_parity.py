"""The same numbers from vector-quantize-pytorch, an independent implementation: forward, gradients
and moving averages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import FsqOptions, ResidualOptions, SignOptions, VectorOptions
from stage1_tokenizer.quantizers import (
    FiniteScalarQuantizer,
    ResidualQuantizer,
    SignQuantizer,
    VectorQuantizer,
)

peer = pytest.importorskip("vector_quantize_pytorch")


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(x: Tensor) -> Tensor:
    """(B,D,h,w) -> (B,N,D), the peer's form."""
    return x.flatten(2).transpose(1, 2)


def tell(theirs, book: Tensor) -> None:
    """Starts the peer's Euclidean codebook on ours, with a use of 1 each."""
    inner = theirs._codebook
    inner.embed.data.copy_(book[None])
    inner.embed_avg.data.copy_(book[None])
    inner.cluster_size.fill_(1.0)


def start(ours: VectorQuantizer, book: Tensor) -> None:
    ours.codebook.data.copy_(book)
    ours.sums.copy_(book)
    ours.counts.fill_(1.0)
    ours.initialized.fill_(True)


@pytest.mark.parametrize("rotation", [False, True])
def test_vq_with_ema_codebook_equals_the_reference(rotation):
    book = features(16, 4, seed=1)
    gradient = "rotation" if rotation else "straight_through"
    ours = VectorQuantizer(
        16,
        4,
        VectorOptions(
            normalize=False, decay=0.8, dead_code_threshold=0.0, commitment=0.25, gradient=gradient
        ),
    ).train()
    theirs = peer.VectorQuantize(
        dim=4, codebook_size=16, decay=0.8, commitment_weight=0.25, rotation_trick=rotation
    ).train()
    start(ours, book)
    tell(theirs, book)
    upstream = features(2, 4, 5, 5, seed=9)
    for step in range(5):
        x = features(2, 4, 5, 5, seed=10 + step).requires_grad_()
        mine = ours(x)
        (own,) = torch.autograd.grad((mine.latents * upstream).sum() + mine.loss, x)
        quantized, codes, loss = theirs(flat(x))
        (expected,) = torch.autograd.grad((quantized * flat(upstream)).sum() + loss.sum(), x)
        assert torch.equal(mine.codes.flatten(1), codes)
        torch.testing.assert_close(flat(mine.latents), quantized)
        torch.testing.assert_close(mine.loss, loss.squeeze())
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.counts, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-5, rtol=1e-4)


def test_vq_with_gradient_codebook_equals_the_reference():
    book = features(16, 4, seed=1)
    ours = VectorQuantizer(
        16,
        4,
        VectorOptions(
            normalize=False, codebook="gradient", dead_code_threshold=0.0, commitment=0.25
        ),
    ).train()
    theirs = peer.VectorQuantize(
        dim=4,
        codebook_size=16,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
        commitment_weight=0.25,
    ).train()
    start(ours, book)
    tell(theirs, book)
    x = features(2, 4, 5, 5)
    mine = ours(x)
    # The peer weighs codebook and commitment losses as one; van den Oord's weights are 1 and beta.
    mine.loss.backward()
    _, codes, _ = theirs(flat(x))
    assert torch.equal(mine.codes.flatten(1), codes)
    chosen = theirs._codebook.embed[0][codes]
    ((chosen - flat(x)).square().mean()).backward()
    torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0])


@pytest.mark.parametrize("levels", [(4, 3), (8, 5, 5, 5), (7, 5)])
def test_fsq_equals_the_reference(levels):
    ours, theirs = FiniteScalarQuantizer(FsqOptions(levels=levels)), peer.FSQ(list(levels))
    x = 2 * features(3, len(levels), 6, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, (quantized, codes) = ours(a), theirs(b)
    assert torch.equal(mine.codes, codes.long())
    torch.testing.assert_close(mine.latents, quantized)
    torch.testing.assert_close(ours.vectors(), theirs.implicit_codebook)
    upstream = features(*x.shape, seed=5)
    torch.testing.assert_close(
        torch.autograd.grad((mine.latents * upstream).sum(), a)[0],
        torch.autograd.grad((quantized * upstream).sum(), b)[0],
    )


@pytest.mark.parametrize("sharpness", [1.0, 100.0])
def test_lfq_equals_the_reference(sharpness):
    options = SignOptions(
        commitment=0.25, entropy_weight=0.1, diversity=0.8, inverse_temperature=sharpness
    )
    ours = SignQuantizer(64, options, spherical=False).train()
    theirs = peer.LFQ(
        codebook_size=64,
        dim=6,
        entropy_loss_weight=0.1,
        commitment_loss_weight=0.25,
        diversity_gamma=0.8,
    ).train()
    x = 0.5 * features(3, 6, 5, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, (quantized, codes, loss) = ours(a), theirs(b, inv_temperature=sharpness)
    assert torch.equal(mine.codes, codes.long())
    torch.testing.assert_close(mine.latents, quantized)
    torch.testing.assert_close(ours.vectors(), theirs.codebook)
    # The peer cuts logarithms of whole codes at 1e-5
    torch.testing.assert_close(mine.loss, loss, atol=2e-4, rtol=1e-4)
    upstream = features(*x.shape, seed=5)
    own = torch.autograd.grad((mine.latents * upstream).sum() + mine.loss, a)[0]
    expected = torch.autograd.grad((quantized * upstream).sum() + loss, b)[0]
    torch.testing.assert_close(own, expected, atol=2e-3, rtol=1e-3)


def test_bsq_equals_the_reference():
    ours = SignQuantizer(64, SignOptions(), spherical=True).eval()
    theirs = peer.LFQ(codebook_size=64, dim=6, spherical=True).eval()
    x = features(3, 6, 5, 5)
    mine, (quantized, codes, _) = ours(x), theirs(x)
    assert torch.equal(mine.codes, codes.long())
    torch.testing.assert_close(mine.latents, quantized)


@pytest.mark.parametrize("shared", [False, True])
def test_residual_vq_equals_the_reference(shared):
    ours = ResidualQuantizer(
        16,
        4,
        ResidualOptions(depth=3, shared=shared),
        VectorOptions(normalize=False, dead_code_threshold=0.0, decay=0.8),
    ).train()
    theirs = peer.ResidualVQ(
        dim=4,
        codebook_size=16,
        num_quantizers=3,
        shared_codebook=shared,
        decay=0.8,
        rotation_trick=False,
        commitment_weight=0.25,
    ).train()
    for i, book in enumerate(ours.books):
        values = features(16, 4, seed=1 + i) / 2**i
        start(book, values)
        tell(theirs.layers[i], values)
    x = features(2, 4, 5, 5, seed=30)
    mine = ours(x)
    quantized, codes, losses = theirs(flat(x))
    assert torch.equal(mine.codes.reshape(2, 3, 25), codes.transpose(1, 2))
    torch.testing.assert_close(flat(mine.latents), quantized)
    torch.testing.assert_close(mine.loss, losses.sum())
    if not shared:
        for book, layer in zip(ours.books, theirs.layers, strict=True):
            torch.testing.assert_close(
                book.codebook, layer._codebook.embed[0], atol=1e-5, rtol=1e-4
            )
