"""VQ-VAE's quantizer against its definitions: nearest code, losses and gradients, EMA, restarts,
resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer import VectorOptions
from stage1_tokenizer.quantizers import VectorQuantizer
from stage1_tokenizer.quantizers.vector import entropy_penalty, kmeans, nearest, spread


def started(book: Tensor, **options) -> VectorQuantizer:
    """One that has started, on the given codebook (K,D)."""
    made = VectorQuantizer(*book.shape, VectorOptions(**options))
    made.codebook.data.copy_(book)
    made.sums.copy_(book)
    made.counts.fill_(1.0)
    made.initialized.fill_(True)
    return made


def fresh(num_codes: int, **options) -> VectorQuantizer:
    """One that has seen nothing, with vectors of four dimensions."""
    return VectorQuantizer(num_codes, 4, VectorOptions(**options))


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(x: Tensor) -> Tensor:
    """(B,D,h,w) -> (N,D)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_code_equals_brute_force(seed):
    vectors, codebook = features(50, 3, seed=seed), 3 * features(17, 3, seed=seed + 100)
    brute = [min(range(17), key=lambda k: float((v - codebook[k]).square().sum())) for v in vectors]
    assert nearest(vectors, codebook).tolist() == brute


def test_nearest_codes_are_found_in_chunks(monkeypatch):
    vectors, codebook = features(1000, 3), features(17, 3, seed=1)
    whole = nearest(vectors, codebook)
    for table in (1, 17 * 7, 17 * 999):
        monkeypatch.setattr("stage1_tokenizer.quantizers.vector._TABLE", table)
        assert torch.equal(nearest(vectors, codebook), whole)


@pytest.mark.parametrize("normalize", [False, True])
def test_codes_keep_the_grid_and_embed_looks_them_up(normalize):
    vq = started(features(8, 4, seed=1), normalize=normalize).eval()
    x = features(2, 4, 3, 5)
    result = vq(x)
    assert result.codes.shape == (2, 3, 5) and result.codes.dtype == torch.int64
    seen = F.normalize(x[1, :, 2, 4], dim=0) if normalize else x[1, :, 2, 4]
    book = F.normalize(vq.codebook, dim=1) if normalize else vq.codebook
    assert int(result.codes[1, 2, 4]) == int((book - seen).square().sum(1).argmin())
    torch.testing.assert_close(result.latents, vq.embed(result.codes, (3, 5)))


def test_normalised_codes_have_root_mean_square_one():
    vq = started(5 * features(8, 4, seed=1), normalize=True).eval()
    torch.testing.assert_close(
        flat(vq(features(2, 4, 3, 3)).latents).square().mean(1), torch.ones(18)
    )


def test_straight_through_gradient_equals_the_decoders():
    vq = started(features(8, 4, seed=1), normalize=False)
    x, upstream = features(2, 4, 3, 3).requires_grad_(), features(2, 4, 3, 3, seed=7)
    (gradient,) = torch.autograd.grad((vq(x).latents * upstream).sum(), x)
    torch.testing.assert_close(gradient, upstream)


def test_with_normalisation_the_gradient_passes_through_the_sphere():
    vq = started(features(8, 4, seed=1), normalize=True)
    x, upstream = features(2, 4, 3, 3).requires_grad_(), features(2, 4, 3, 3, seed=7)
    (gradient,) = torch.autograd.grad((vq(x).latents * upstream).sum(), x)
    # Sqrt(4 dimensions)
    (expected,) = torch.autograd.grad((F.normalize(x, dim=1) * 2.0 * upstream).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_the_commitment_loss_by_hand():
    vq = started(torch.tensor([[0.0, 0.0], [4.0, 4.0]]), normalize=False, commitment=0.5).eval()
    x = torch.tensor([[1.0, 0.0], [3.0, 5.0]]).T.reshape(1, 2, 1, 2).requires_grad_()
    result = vq(x)
    assert result.codes.flatten().tolist() == [0, 1]
    # Squared differences 1, 0, 1, 1: mean 3/4, times 0.5.
    assert float(result.loss.detach()) == pytest.approx(0.375) and float(
        result.metrics["commitment"]
    ) == pytest.approx(0.75)
    (gradient,) = torch.autograd.grad(result.loss, x)
    torch.testing.assert_close(
        gradient.flatten(), 0.5 * 2 / 4 * torch.tensor([1.0, -1.0, 0.0, 1.0])
    )


def test_codebook_loss_pulls_codes_to_their_vectors():
    vq = started(
        torch.tensor([[0.0, 0.0], [4.0, 4.0]]),
        normalize=False,
        codebook="gradient",
        commitment=0.25,
    )
    x = torch.tensor([[1.0, 0.0], [3.0, 5.0]]).T.reshape(1, 2, 1, 2)
    result = vq(x)
    assert float(result.loss.detach()) == pytest.approx(1.25 * 0.75)
    (gradient,) = torch.autograd.grad(result.loss, vq.codebook)
    torch.testing.assert_close(gradient, 2 / 4 * torch.tensor([[-1.0, 0.0], [1.0, -1.0]]))


def test_ema_codebook_has_no_parameters_and_gradient_codebook_no_ema():
    assert not list(fresh(8).parameters())
    vq = started(features(8, 4, seed=1), codebook="gradient", dead_code_threshold=0.0)
    before = vq.codebook.detach().clone()
    vq(features(4, 4, 4, 4))
    assert torch.equal(vq.codebook.detach(), before)


def test_moving_averages_by_hand():
    vq = started(
        torch.tensor([[0.0, 0.0], [4.0, 4.0], [90.0, 90.0]]),
        normalize=False,
        decay=0.9,
        dead_code_threshold=0.0,
    )
    vq.counts.copy_(torch.tensor([2.0, 3.0, 1.0]))
    vq.sums.copy_(torch.tensor([[0.0, 1.0], [12.0, 12.0], [90.0, 90.0]]))
    vq(torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 5.0]]).T.reshape(1, 2, 1, 3))
    counts = torch.tensor([0.9 * 2 + 0.1 * 2, 0.9 * 3 + 0.1 * 1, 0.9 * 1])
    sums = torch.tensor(
        [[0.1 * 2, 0.9 + 0.1 * 1], [0.9 * 12 + 0.1 * 3, 0.9 * 12 + 0.1 * 5], [81.0, 81.0]]
    )
    torch.testing.assert_close(vq.counts, counts)
    torch.testing.assert_close(vq.sums, sums)
    total = counts.sum()
    smoothed = (counts + 1e-5) / (total + 3e-5) * total
    torch.testing.assert_close(vq.codebook, sums / smoothed[:, None])
    assert int(vq.steps) == 1


def test_the_decoder_sees_the_codebook_from_before_the_update():
    vq = started(features(8, 4, seed=1), normalize=False, decay=0.5, dead_code_threshold=0.0)
    before = vq.codebook.clone()
    result = vq(features(2, 4, 4, 4))
    torch.testing.assert_close(flat(result.latents), before[result.codes.flatten()])


def test_fixed_batch_converges_to_cluster_centres():
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    x = (centres.repeat(16, 1) + 0.01 * features(64, 2)).T.reshape(1, 2, 8, 8)
    vq = started(
        centres + features(4, 2, seed=3), normalize=False, decay=0.5, dead_code_threshold=0.0
    )
    for _ in range(40):
        vq(x)
    torch.testing.assert_close(vq.codebook, centres, atol=0.02, rtol=0)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_only_the_first_batch_initialises_the_codebook(codebook):
    vq = fresh(16, codebook=codebook, dead_code_threshold=0.0)
    towards = torch.tensor([1.0, -2.0, 3.0, 1.0]).reshape(1, 4, 1, 1)
    vq(towards + 0.1 * features(8, 4, 4, 4))
    assert bool(vq.initialized)
    book = F.normalize(vq.codebook.detach(), dim=1)
    assert (book - F.normalize(towards.flatten(), dim=0)).norm(
        dim=1
    ).max() < 0.2  # all codes are where the data is
    vq(-towards + 0.1 * features(8, 4, 4, 4, seed=5))
    # The moving averages may carry away the few codes that the second batch is nearest to.
    moved = (F.normalize(vq.codebook.detach(), dim=1) - book).norm(dim=1)
    assert moved.sort().values[12] < 0.05


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_small_first_batch_gives_distinct_codes(codebook):
    vq = fresh(64, codebook=codebook, dead_code_threshold=0.0)
    x = features(1, 4, 2, 2)
    with pytest.warns(
        UserWarning,
        match=r"codes start as copies: the first batch has 4 vectors .* and the codebook 64 codes; "
        r"raise .*16-fold",
    ):
        result = vq(x)
    book = F.normalize(vq.codebook.detach(), dim=1)
    assert book.isfinite().all() and len(book.unique(dim=0)) == 64
    assert torch.cdist(book, F.normalize(flat(x), dim=1)).min(1).values.max() < 0.2
    assert result.codes.unique().numel() == 4


def test_k_means_starts_each_code_at_the_mean_of_its_vectors():
    centres = 5 * features(6, 4, seed=3)
    x = (
        (centres.repeat_interleave(20, 0) + 0.1 * features(120, 4))
        .reshape(1, 12, 10, 4)
        .permute(0, 3, 1, 2)
    )
    plain, clustered = (
        fresh(6, normalize=False, dead_code_threshold=0.0, kmeans_iterations=n) for n in (0, 20)
    )
    for vq in (plain, clustered):
        vq.update_codebook = lambda *_: None  # type: ignore[method-assign]
        vq.count(vq(x).codes)
    codes = clustered(x).codes.flatten()
    for code in codes.unique():
        torch.testing.assert_close(clustered.codebook[code], flat(x)[codes == code].mean(0))
    assert (
        clustered._error(flat(x), codes).mean()
        < 0.75 * plain._error(flat(x), plain(x).codes.flatten()).mean()
    )


def test_k_means_keeps_centres_without_vectors():
    pool = torch.tensor([[0.0], [0.2], [1.0]])
    torch.testing.assert_close(
        kmeans(pool, torch.tensor([[0.0], [0.9], [50.0]]), 3), torch.tensor([[0.1], [1.0], [50.0]])
    )


def test_k_means_over_fewer_vectors_than_codes_is_refused():
    with pytest.raises(
        ValueError,
        match=r"k-means needs .*: the first batch has 4 vectors .* 64 codes; raise .*16-fold.*or "
        r"set",
    ):
        fresh(64, kmeans_iterations=3)(features(1, 4, 2, 2))


def test_a_linear_codebook_is_frozen_under_a_learned_map():
    vq = fresh(16, codebook="linear", dead_code_threshold=0.0).train()
    x = features(8, 4, 4, 4)
    vq(x)
    frozen = vq.codebook.clone()
    assert [name for name, _ in vq.named_parameters()] == ["map"]
    for step in range(5):
        vq(features(8, 4, 4, 4, seed=step)).loss.backward()
    assert torch.equal(vq.codebook, frozen) and vq.map.grad.any()
    with torch.no_grad():
        vq.map.copy_(features(4, 4, seed=9))
    torch.testing.assert_close(vq.vectors(), vq._normalize(frozen @ vq.map))
    result = vq.eval()(x)
    torch.testing.assert_close(result.latents, vq.embed(result.codes, (4, 4)))


def test_linear_codebook_step_moves_unused_codes():
    vq = fresh(16, codebook="linear", normalize=False).train()
    x = features(1, 4, 4, 4).expand(8, -1, -1, -1)
    vq(x)
    before = vq.vectors().detach().clone()
    used = vq(0.5 * x[:, :, :1, :1])
    used.loss.backward()
    with torch.no_grad():
        vq.map -= 0.1 * vq.map.grad
    moved = (vq.vectors().detach() - before).norm(dim=1) > 1e-6
    assert used.codes.unique().numel() == 1 and moved.sum() > 8


def test_the_entropy_term_by_hand():
    """Two vectors on two codes at distance 1 each way: certain vectors and even use give entropies
    near 0 and log 2."""
    book = torch.tensor([[0.0], [10.0]])
    assert float(entropy_penalty(book.clone(), book)) == pytest.approx(-math.log(2), abs=1e-4)
    halfway = torch.tensor([[5.0], [5.0]])
    assert float(entropy_penalty(halfway, book)) == pytest.approx(0.0, abs=1e-5)
    # At 1 and 2 from the codes: squared distances 1 and 4
    p = torch.tensor([[1.0, 2.0]]).neg().square().softmax(1)
    own = float(-(p * p.log()).sum())
    assert float(
        entropy_penalty(torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]))
    ) == pytest.approx(own - own, abs=1e-6)
    vq = started(book, normalize=False, entropy_weight=0.5, dead_code_threshold=0.0).train()
    x = torch.tensor([1.0, 8.0, 3.0, 9.0]).reshape(1, 1, 2, 2)
    result = vq(x)
    expected = 0.25 * result.metrics["commitment"] + 0.5 * entropy_penalty(flat(x), book)
    torch.testing.assert_close(result.loss, expected)
    assert float(vq.eval()(x).loss) == pytest.approx(
        0.25 * float(F.mse_loss(flat(x), vq.codebook[vq(x).codes.flatten()]))
    )


def collapsed(dead_code_threshold: float, **options) -> VectorQuantizer:
    """Half of the codes are far from all data."""
    book = torch.cat([features(8, 4, seed=1), 50 + features(8, 4, seed=2)])
    return started(
        book,
        normalize=False,
        dead_code_threshold=dead_code_threshold,
        dead_code_check_every=2,
        decay=0.5,
        **options,
    )


def test_dead_codes_restart_at_vectors_of_the_batch_and_are_used():
    vq, x = collapsed(0.3), features(16, 4, 4, 4)
    vq(x)
    assert (vq.codebook[8:].norm(dim=1) > 40).all()  # not before dead_code_check_every steps
    for _ in range(7):
        vq(x)
    assert torch.cdist(vq.codebook[8:], flat(x)).min(1).values.max() < 1.0
    assert vq(x).codes.unique().numel() == 16
    assert int(vq.usage_metrics()["dead_codes"]) == 0


def test_dead_codes_of_a_linear_codebook_restart_where_the_map_puts_them_at_vectors():
    vq = collapsed(0.3, codebook="linear")
    with torch.no_grad():
        vq.map.copy_(torch.eye(4) + 0.3 * features(4, 4, seed=4))
    x = features(16, 4, 4, 4)
    vq(x), vq(x)
    assert (torch.cdist(vq.vectors().detach(), flat(x)).min(1).values < 0.1).sum() >= 8


def test_without_restart_dead_codes_stay_dead():
    vq, x = collapsed(0.0), features(16, 4, 4, 4)
    for _ in range(8):
        vq(x)
    assert (vq.codebook[8:].norm(dim=1) > 40).all() and vq(x).codes.max() < 8
    assert int(vq.usage_metrics()["dead_codes"]) == 8


def test_restart_keeps_used_codes():
    """Two runs that differ only in the restart have the same living codes after it."""
    x = features(16, 4, 4, 4)
    vq, other = collapsed(0.3), collapsed(0.0)
    for _ in range(2):
        vq(x), other(x)
    living = (other.counts > 0.3 * other.counts.mean()).nonzero().flatten()
    assert 0 < len(living) <= 8
    assert torch.equal(vq.codebook[living], other.codebook[living])


def test_restart_keeps_the_codebook_parameter_object():
    book = torch.cat([features(8, 4, seed=1), 50 + features(8, 4, seed=2)])
    vq = started(
        book,
        normalize=False,
        codebook="gradient",
        dead_code_threshold=0.3,
        dead_code_check_every=2,
        decay=0.5,
    )
    parameter = vq.codebook
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    for _ in range(8):
        vq(features(16, 4, 4, 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert vq.codebook is parameter and (vq.codebook[8:].norm(dim=1) < 10).all()


def test_restarting_gradient_codebook_is_excluded_from_ema():
    def jumping(**options):
        return VectorQuantizer(4, 2, VectorOptions(**options)).ema_excluded_parameters()

    assert [p.shape for p in jumping(codebook="gradient")] == [(4, 2)]
    assert (
        not jumping()
        and not jumping(codebook="linear")
        and not jumping(codebook="gradient", dead_code_threshold=0.0)
    )


def test_evaluation_changes_no_state():
    vq = started(features(8, 4, seed=1)).eval()
    before = copy.deepcopy(vq.state_dict())
    result = vq(features(2, 4, 4, 4))
    assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())
    assert set(result.metrics) == {"commitment"}
    unstarted = fresh(8).eval()
    unstarted(features(2, 4, 4, 4))
    assert not unstarted.initialized


def test_state_dict_resumes_bit_identically():
    def run(vq: VectorQuantizer, steps: range) -> None:
        for step in steps:
            vq(features(4, 4, 4, 4, seed=step))

    options = {"dead_code_check_every": 3, "dead_code_threshold": 0.5, "decay": 0.8}
    whole = fresh(32, **options)
    run(whole, range(10))
    first = fresh(32, **options)
    run(first, range(5))
    torch.manual_seed(99)  # the state of torch's own generator plays no part
    second = fresh(32, **options)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    run(second, range(5, 10))
    assert all(torch.equal(whole.state_dict()[k], v) for k, v in second.state_dict().items())


def test_codebook_usage_is_reported():
    vq = started(
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),
        normalize=False,
        dead_code_threshold=0.0,
    )
    vq.usage_ema.copy_(torch.tensor([0.0, 50.0, 50.0, 0.001]))
    metrics = vq.usage_metrics()
    assert float(metrics["codebook_usage"]) == 0.5 and int(metrics["dead_codes"]) == 2
    assert float(metrics["codebook_perplexity"]) == pytest.approx(2.0, rel=1e-3)
    metrics = vq(features(2, 2, 4, 4)).metrics
    assert set(metrics) == {"commitment", "codebook_usage", "codebook_perplexity", "dead_codes"}


def test_restarted_code_counts_as_used_after_first_use():
    """All vectors are one and the same, so that one code at a time serves them, however often the
    others restart there."""
    vq = fresh(8, dead_code_check_every=1, dead_code_threshold=0.3)
    x = features(1, 4, 1, 1).expand(4, 4, 4, 4)
    for _ in range(30):
        metrics = vq(x).metrics
    assert (vq.counts > 0.1 * vq.counts.mean()).all()  # they do restart
    assert float(metrics["codebook_usage"]) <= 0.5 and torch.equal(vq.usage()[0], vq.usage_ema)
    assert float(vq.usage_ema.sum()) == pytest.approx(4 * 16, rel=1e-4)


def test_restart_with_few_vectors_keeps_codes_of_average_use():
    """Two vectors per step, for which 32 of 64 codes take turns: twice the average use each,
    however the other 32 restart."""
    book = torch.cat([features(32, 4, seed=1), 50 + features(32, 4, seed=2)])
    vq = started(book, normalize=False, dead_code_check_every=5, dead_code_threshold=0.1, decay=0.9)
    vq.counts.copy_(torch.tensor([2 / 32] * 32 + [0.0] * 32))
    vq.sums.copy_(book * vq.counts[:, None])
    for step in range(80):
        turn = 2 * step % 32
        vq(book[turn : turn + 2].T.reshape(1, 4, 1, 2))
    torch.testing.assert_close(vq.codebook[:32], book[:32], atol=0.01, rtol=0.01)
    assert (vq.codebook[32:].norm(dim=1) < 20).all()  # which they did


def test_nonfinite_features_are_left_to_training():
    vq = started(features(8, 4, seed=1), dead_code_check_every=1)
    vq(torch.full((2, 4, 4, 4), float("nan")))
    assert vq.codebook.isnan().any()


def test_initial_counts_come_from_the_first_batch():
    vq = fresh(8, decay=0.99)
    result = vq(features(4, 4, 4, 4))
    torch.testing.assert_close(
        vq.counts, torch.bincount(result.codes.flatten(), minlength=8).float()
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_first_step_moves_used_codes_to_their_means(normalize):
    vq = fresh(8, normalize=normalize)
    # Four distinct vectors, so some codes stay without any
    x = 3 + features(4, 4, 1, 1).expand(4, 4, 4, 4)
    placed = copy.deepcopy(vq)
    placed.update_codebook = lambda *_: None  # type: ignore[method-assign]
    placed(x)
    codes = vq(x).codes.flatten()
    vectors = vq._normalize(flat(x))
    for code in range(8):
        own = vectors[codes == code]
        expected = (
            vq._normalize(own.mean(0, keepdim=True))[0] if len(own) else placed.codebook[code]
        )
        torch.testing.assert_close(vq.codebook[code], expected, rtol=1e-4, atol=1e-4)
    assert len(codes.unique()) < 8


@pytest.mark.parametrize("normalize", [False, True])
def test_autocast_leaves_distances_and_state_in_float32(normalize):
    x = features(8, 16, 4, 4)
    plain, cast = (
        started(features(256, 16, seed=1), normalize=normalize, dead_code_threshold=0.0)
        for _ in range(2)
    )
    expected = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = cast(x)
        low = cast(x.bfloat16())
    assert torch.equal(result.codes, expected.codes) and torch.equal(
        result.latents, expected.latents
    )
    assert low.latents.dtype == low.loss.dtype == torch.float32
    assert torch.equal(result.loss, expected.loss)
    assert all(v.dtype != torch.bfloat16 for v in cast.state_dict().values())


def test_first_codes_lie_far_from_one_another():
    """Of 1,000 vectors, 960 are one and the same; it gets few of the 32 codes."""
    pool = torch.cat([torch.ones(960, 4), 5 * features(40, 4)])
    errors = (pool - pool.mean(0)).square().sum(1)
    there = spread(pool, errors, 32, torch.Generator().manual_seed(0))
    assert len(there.unique(dim=0)) >= 31


def test_spread_repeats_vectors_where_there_are_too_few():
    pool = features(3, 4)
    there = spread(pool, pool.square().sum(1), 8, torch.Generator().manual_seed(0))
    assert there.shape == (8, 4) and len(there.unique(dim=0)) == 3
    assert not len(spread(pool, pool.square().sum(1), 0, torch.Generator()))


def test_restarts_stay_away_from_codes_that_are_there():
    """Half of the vectors lie where a code is already; no restart goes there."""
    pool = torch.cat([torch.zeros(500, 4), 10 + features(500, 4)])
    errors = torch.cat([torch.zeros(500), torch.full((500,), 400.0)])
    there = spread(pool, errors, 16, torch.Generator().manual_seed(0))
    assert (there > 2).all()


def test_of_codes_in_the_same_place_the_most_used_one_stays():
    """Four codes in one place and four in places of their own; three restart elsewhere."""
    apart = 5 * features(8, 4, seed=1)
    book = torch.cat([apart[:4], apart[:1] + 1e-3 * features(4, 4)])
    vq = started(book, normalize=False, dead_code_check_every=2, decay=0.5)
    x = apart.repeat(16, 1).reshape(1, 16, 8, 4).permute(0, 3, 1, 2)
    for _ in range(12):
        codes = vq(x).codes
    assert len(codes.unique()) == 8
    assert torch.cdist(vq.codebook, apart).min(0).values.max() < 0.5
