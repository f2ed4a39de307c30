"""The discriminator: its losses by hand, the adaptive weight, which network learns from which
loss, its start step."""

from __future__ import annotations

import pytest
import torch

from stage1_tokenizer import (
    DiscriminatorOptions,
    ObjectiveConfig,
    PerceptualOptions,
    TokenizerObjective,
)
from stage1_tokenizer.discriminator import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    lecam,
    loss_at_image,
    requires_grad_off,
)
from tests.helpers.tokenizers import tiny_tokenizer


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def objective(start: int = 10, **options) -> TokenizerObjective:
    torch.manual_seed(0)
    discriminator = DiscriminatorOptions(weight=1.0, start=start, width=16, layers=1, **options)
    return TokenizerObjective(
        tiny_tokenizer().train(), ObjectiveConfig(discriminator=discriminator)
    )


def test_losses_match_hand_computation():
    true, drawn = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0])
    assert float(hinge_loss(true, drawn)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1) / 2) / 2)
    assert float(generator_loss(drawn)) == pytest.approx(1.0)
    anchors = torch.tensor([1.0, -0.5])  # of true and of drawn images
    expected = (2.5**2 + 1.0**2 + 0) / 3 + (3.0**2 + 1.0**2) / 2
    assert float(lecam(true, drawn, anchors)) == pytest.approx(expected)


def test_logits_per_patch_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    judge = Discriminator(3, 16, 2)
    x = pixels(3, 3, 64, 48)
    logits = judge(x)
    assert logits.shape[:2] == (3, 1) and min(logits.shape[2:]) > 4
    torch.testing.assert_close(torch.cat([judge(one[None]) for one in x]), logits)
    first = x.clone()
    first[:, :, 40:] = 0
    assert torch.equal(judge.layers[0](first)[:, :, :8], judge.layers[0](x)[:, :, :8])
    assert {p.ndim for p in judge.hidden_matrices()} == {4}


def test_adaptive_weight_equalises_gradient_norms():
    output = pixels(2, 3, 4, 4).requires_grad_()
    reconstruction, adversarial = (output - 0.3).square().sum(), 1e-3 * output.sin().sum()
    weight = adaptive_weight(reconstruction, adversarial, output)
    a, b = (
        torch.autograd.grad(loss, output, retain_graph=True)[0].norm()
        for loss in (reconstruction, weight * adversarial)
    )
    torch.testing.assert_close(a, b)
    assert not weight.requires_grad
    nothing = adaptive_weight(reconstruction, 0.0 * output.sum(), output)
    assert float(nothing) == 1e4


def test_frozen_discriminator_passes_gradients_to_inputs_only():
    judge, x = Discriminator(3, 16, 1), pixels(2, 3, 16, 16).requires_grad_()
    with requires_grad_off(judge):
        loss = generator_loss(judge(x))
    loss.backward()
    assert x.grad.any() and all(p.grad is None and p.requires_grad for p in judge.parameters())


def test_discriminator_loss_begins_at_its_start_step(images):
    both = objective(start=10)
    assert set(both.networks) == {"tokenizer", "discriminator"}
    assert [loss.group for loss in both.losses(images, 9)] == ["tokenizer"]
    losses = list(both.losses(images, 10))
    assert [loss.group for loss in losses] == ["tokenizer", "discriminator"]
    assert "adversarial" in losses[0].metrics and {"logits_real", "logits_fake"} == set(
        losses[1].metrics
    )
    assert set(TokenizerObjective(tiny_tokenizer(), ObjectiveConfig()).networks) == {"tokenizer"}


def test_the_decoders_loss_adds_the_weighted_loss_against_the_discriminator(images):
    both = objective(start=0, adaptive=False)
    both.config.discriminator.weight = 0.7
    loss = next(both.losses(images, 0))
    found = loss.metrics
    reconstruction = found["nll"] / images[0].numel()
    expected = reconstruction + 0.25 * found["commitment"] + 0.7 * found["adversarial"]
    torch.testing.assert_close(loss.value.detach(), expected)


def test_each_loss_updates_only_its_own_network(images):
    both = objective(start=0)
    first, second = both.losses(images, 0)
    first.value.backward()
    assert all(p.grad is None for p in both.discriminator.parameters())
    assert all(p.grad is not None for p in both.tokenizer.decoder.parameters())
    both.tokenizer.zero_grad(set_to_none=True)
    second.value.backward()
    assert all(p.grad.any() for p in both.discriminator.hidden_matrices())
    assert all(p.grad is None for p in both.tokenizer.parameters())


def test_under_autocast_the_losses_are_in_float32(images):
    """Logits of bf16 near 1 lie 1/128 apart, which neither a hinge at 1 nor a running mean
    bears."""
    both = objective(start=0, lecam=0.1)
    logits = []
    both.discriminator.register_forward_hook(
        lambda module, inputs, output: logits.append(output.detach())
    )
    with torch.autocast("cpu", torch.bfloat16):
        first, second = both.losses(images, 0)
    assert logits[0].dtype == torch.bfloat16 and second.value.dtype == torch.float32
    torch.testing.assert_close(
        first.metrics["adversarial"], -logits[0].float().mean(), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(
        second.metrics["logits_real"], logits[1][: len(images)].float().mean(), rtol=1e-6, atol=1e-7
    )


def test_discriminator_learns_real_from_fake(images):
    both = objective(start=0)
    optimizer = torch.optim.Adam(both.discriminator.parameters(), lr=3e-3)
    for _ in range(60):
        _, loss = both.losses(images, 0)
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.metrics["logits_real"]) > 0.5 and float(loss.metrics["logits_fake"]) < -0.5


def test_lecam_anchors_move_and_are_saved(images):
    both = objective(start=0, lecam=0.1)
    assert not both.discriminator.anchors.any()
    _, loss = both.losses(images, 0)
    first = torch.stack([loss.metrics["logits_real"], loss.metrics["logits_fake"]])
    torch.testing.assert_close(both.discriminator.anchors, first)
    both.discriminator.update_ema_anchors(torch.ones(3), -torch.ones(3))
    expected = 0.99 * first + 0.01 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(both.discriminator.anchors, expected)
    assert "anchors" in both.discriminator.state_dict()


def test_perceptual_loss_is_weighted_and_reported(images):
    tokenizer = tiny_tokenizer().train()
    values = []
    for weight in (0.0, 2.0):
        (loss,) = TokenizerObjective(
            tokenizer, ObjectiveConfig(perceptual=PerceptualOptions(weight=weight))
        ).losses(images, 0)
        values.append(loss)
    assert "perceptual" not in values[0].metrics and 0 < float(values[1].metrics["perceptual"]) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"discriminator": DiscriminatorOptions(weight=-1.0)},
            r"discriminator\.weight is -1\.0; it must be 0 or more$",
        ),
        (
            {"discriminator": DiscriminatorOptions(width=20)},
            "width is 20; it must be a multiple of 16",
        ),
        (
            {"discriminator": DiscriminatorOptions(weight=1.0, layers=-1)},
            "layers is -1; it must be at least 1$",
        ),
        (
            {"perceptual": PerceptualOptions(weight=-1.0)},
            r"perceptual\.weight is -1\.0; it must be 0 or more",
        ),
        (
            {"perceptual": PerceptualOptions(layers=(1,))},
            r"perceptual\.layers are \[1\]; they are hidden states.*\(now ms_ssim\)",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**options)


def test_loss_at_the_image_keeps_value_and_gradient():
    x = pixels(2, 3, 4, 4).requires_grad_()
    image = 2 * x
    loss = image.sin().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = loss_at_image(loss, image)
    torch.testing.assert_close(kept, loss)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(kept, x, retain_graph=True)[0], expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize("adaptive", [True, False])
def test_compiled_networks_train_with_a_discriminator(images, adaptive):
    """The gradient goes through the compiled graphs once, whatever the weight needs to know of
    it."""
    both = objective(start=0, adaptive=adaptive)
    for network in both.networks.values():
        network.compile_networks()
    for loss in both.losses(images, 0):
        loss.value.backward()
        assert all(p.grad is not None for p in both.networks[loss.group].parameters())
        both.networks[loss.group].zero_grad(set_to_none=True)


def test_a_discriminator_that_leaves_no_patch_is_refused_before_it_starts():
    options = DiscriminatorOptions(weight=1.0, layers=3, width=16)
    with pytest.raises(
        ValueError,
        match=r"discriminator\.layers is 3, which leaves no patch of images of 16 pixels; set it "
        r"lower",
    ):
        TokenizerObjective(tiny_tokenizer(), ObjectiveConfig(discriminator=options))
