"""Causality, the cache, rotary positions, saving and loading of the prior."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import stage2_prior
from stage2_prior import (
    ImagePrior,
    Level,
    PriorConfig,
    PriorModule,
    PriorObjective,
    PriorObjectiveConfig,
    SamplingOptions,
    StreamConfig,
    sample,
)
from stage2_prior.transformer import RotaryEmbedding, attend, fused_attention, rotary_table, rotate
from tests.helpers.compiling import traced
from tests.helpers.priors import tiny_prior

LEVELS = [
    (Level(grid=(3, 3), num_codes=11),),
    (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11)),
]


@pytest.mark.parametrize("levels", LEVELS, ids=["one level", "two levels"])
def test_logits_depend_on_no_later_token(levels, text_ids):
    prior = tiny_prior(levels)
    ids = prior.stream.inputs(text_ids, torch.zeros(3, 8, dtype=torch.long))
    embedded = F.embedding(ids, prior.tables().embeddings).detach().requires_grad_()
    prior.blocks[0].register_forward_pre_hook(lambda _, inputs: (embedded, *inputs[1:]))
    logits = prior(ids, torch.arange(ids.shape[1]))
    for slot in (0, 3, 4, 5, 9, 13):
        part = logits.text[:, slot] if slot < 5 else logits.image[:, slot - 5]
        (gradient,) = torch.autograd.grad(part.square().sum(), embedded, retain_graph=True)
        reach = gradient.abs().sum(dim=(0, 2)) > 0
        assert reach[: slot + 1].all() and not reach[slot + 1 :].any()


def test_blocks_of_a_new_prior_change_nothing():
    """Their projections into the residual stream, and the heads, start at zero."""
    prior = PriorModule(
        PriorConfig(width=32, depth=2, heads=2, text_depth=1),
        StreamConfig(text_vocab_size=20, text_length=6, levels=LEVELS[0]),
    )
    x = torch.randn(2, 5, 32)
    rotary = RotaryEmbedding(*[prior.rotary[:, :5]] * 2)
    for block in (*prior.text_encoder, *prior.blocks):
        assert torch.equal(block(x, rotary, None, 0), x)
        assert block.attention.query_key_value.weight.std() > 0.1
    assert not prior.text_head.weight.any() and not prior.image_head.own.any()


@pytest.mark.parametrize("levels", LEVELS, ids=["one level", "two levels"])
def test_cached_logits_equal_uncached(levels, text_ids):
    prior = tiny_prior(levels)
    codes = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(2))
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    slots = torch.arange(ids.shape[1])
    with torch.no_grad():
        full = prior(ids, slots)
        cache = prior.new_cache(3)
        pieces = [
            prior(ids[:, a:b], slots[a:b], cache)
            for a, b in ((0, 4), (4, 6), *((i, i + 1) for i in range(6, 14)))
        ]
    torch.testing.assert_close(torch.cat([p.text for p in pieces], 1), full.text)
    torch.testing.assert_close(torch.cat([p.image for p in pieces], 1), full.image)


def test_similar_code_vectors_have_similar_embeddings(text_ids, codes):
    """Rows are linear in the told vectors but for the own part; a code that moves in the codebook
    moves its logit."""
    prior = tiny_prior()
    with torch.no_grad():
        for rows in (prior.code_embedding, prior.image_head):
            rows.own.zero_()
        vectors = torch.randn(11, 5, generator=torch.Generator().manual_seed(3))
        vectors[4] = (vectors[2] + vectors[3]) / 2
        prior.set_codebook(vectors)
        for table in (prior.tables().embeddings[20:], prior.tables().head):
            torch.testing.assert_close(table[4], (table[2] + table[3]) / 2)
            assert not torch.allclose(table[2], table[3])
        prior.image_head.own[4] += 1
        table = prior.tables().head
        torch.testing.assert_close(table[4] - (table[2] + table[3]) / 2, torch.full((32,), 0.1))


def test_code_vectors_are_centred_and_checked_for_shape(prior):
    prior.set_codebook(torch.randn(11, 5, generator=torch.Generator().manual_seed(4)) * 7 + 3)
    torch.testing.assert_close(prior.code_vectors.mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    assert float(prior.code_vectors.std()) == pytest.approx(1)
    with pytest.raises(
        ValueError, match=r"code vectors have shape \(11, 4\) and must be \(11, 5\)"
    ):
        prior.set_codebook(torch.randn(11, 4))


def test_without_code_vectors_embeddings_are_free(text_ids, codes):
    prior = tiny_prior(code_dim=0)
    assert prior.image_head.shared is None
    loss = next(
        PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0)).losses(
            {"text_ids": text_ids, "codes": codes}, 0
        )
    )
    loss.value.backward()
    assert all(p.grad is not None for p in prior.parameters())
    assert sample(prior, text_ids, [1, 2, 3], SamplingOptions()).codes.shape == (3, 9)


def test_a_copy_of_a_cache_goes_on_where_it_was_made(prior, text_ids):
    codes = torch.zeros(3, 1, dtype=torch.long)
    ids = prior.stream.inputs(text_ids, codes)
    slots = torch.arange(ids.shape[1])
    with torch.no_grad():
        cache = prior.new_cache(3)
        prior(ids[:, :6], slots[:6], cache)
        copied, part = cache.clone(), cache.rows(slice(0, 2))
        expected = prior(ids[:, 6:], slots[6:], cache).image
        found = prior(ids[:, 6:], slots[6:], copied).image
    torch.testing.assert_close(found, expected)
    assert (cache.filled, copied.filled, part.filled) == (7, 7, 6)


def test_full_cache_refuses_more_positions(prior, text_ids):
    cache = prior.new_cache(3)
    cache.filled = 14
    with pytest.raises(ValueError, match="the cache holds 14 tokens, and 14 and 1 more do not fit"):
        prior(text_ids[:, :1], torch.tensor([14]), cache)


def test_text_logits_only_at_text_slots_and_image_logits_only_at_image_slots(
    prior, text_ids, codes
):
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    logits = prior(ids, torch.arange(14))
    assert logits.text.shape == (3, 5, 20) and logits.image.shape == (3, 9, 11)


def test_attention_equals_the_reference_kernel():
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(
        attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    seen = torch.tensor([[True] * 5 + [False] * 2])
    torch.testing.assert_close(
        attend(q[:, :, 4:5], k, v, seen),
        F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 4:5],
    )


def test_rotary_scores_depend_on_relative_rows_and_columns_only():
    coordinates = torch.tensor([[0.0, 0.0], [2.0, 5.0], [3.0, 1.0], [5.0, 6.0]])
    table = rotary_table(coordinates, 16, 100.0)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    q, k = rotate(q.expand(4, 16), table), rotate(k.expand(4, 16), table)
    torch.testing.assert_close(q[1] @ k[0], q[3] @ k[2])  # both differ by (2, 5)
    assert not torch.allclose(q[1] @ k[0], q[2] @ k[0])


def test_saving_and_loading_keeps_logits_and_fingerprint(prior, tmp_path, text_ids, codes):
    prior.save_pretrained(tmp_path)
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    for again in (PriorModule.from_pretrained(tmp_path), PriorModule.from_pretrained(tmp_path)):
        torch.testing.assert_close(
            again(ids, torch.arange(14)).image, prior(ids, torch.arange(14)).image
        )
        assert again.fingerprint == prior.fingerprint
        assert again.config.trained_with_caption_dropout
        assert sample(again, text_ids, [1, 2, 3], SamplingOptions()).codes.equal(
            sample(prior, text_ids, [1, 2, 3], SamplingOptions()).codes
        )
    with torch.no_grad():
        again.image_head.own[0, 0] += 1
    assert again.fingerprint != prior.fingerprint


def test_fingerprint_covers_tensors_without_dimensions(prior):
    prior.register_buffer("scale", torch.tensor(1.0))
    before = prior.fingerprint
    prior.scale.fill_(2.0)
    assert prior.fingerprint != before


def test_loading_names_what_is_wrong(prior, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        PriorModule.from_pretrained(tmp_path)
    prior.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        PriorModule.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    values = json.loads(config.read_text())
    values["model"]["depth"] = 3
    config.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"do not fit its config\.json \(first keys that differ: \['blocks\.2"
    ):
        PriorModule.from_pretrained(tmp_path)
    values["model"]["dept"] = 2
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"unknown keys \['dept'\]"):
        PriorModule.from_pretrained(tmp_path)
    config.write_text("{}")
    with pytest.raises(ValueError, match="no 'model' section"):
        PriorModule.from_pretrained(tmp_path)


def test_prior_without_sequence_layout_is_refused():
    with pytest.raises(ValueError, match="needs the stream's shape"):
        PriorModule(PriorConfig())


def test_configuration_errors_are_all_named():
    with pytest.raises(
        ValueError,
        match=r"(?s)prior\.model\.width.*prior\.model\.dropout is 1\.5.*"
        r"mlp_ratio is 0; .*rope_base is 1; ",
    ):
        PriorConfig(width=30, heads=4, dropout=1.5, mlp_ratio=0, rope_base=1)
    with pytest.raises(ValueError, match=r"prior\.model\.depth is 0"):
        PriorConfig(depth=0)
    with pytest.raises(
        ValueError, match=r"(?s)text_weight is -1.*caption_dropout is 1.*label_smoothing is 2"
    ):
        PriorObjectiveConfig(text_weight=-1, caption_dropout=1, label_smoothing=2)
    with pytest.raises(ValueError, match=r"code_corruption is 0\.6; it must be in \[0, 0\.5\]"):
        PriorObjectiveConfig(code_corruption=0.6)


def test_compiled_training_gives_the_same_loss(prior, text_ids, codes, monkeypatch):
    objective = PriorObjective(prior.train(), PriorObjectiveConfig(caption_dropout=0))
    batch = {"text_ids": text_ids, "codes": codes}
    eager, held_out = next(objective.losses(batch, 0)).value, objective.evaluate([batch])
    graphs = traced(monkeypatch)
    objective.compile()
    compiled = next(objective.losses(batch, 0)).value
    torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 3  # the network, and the cross-entropies of text and codes
    assert objective.evaluate([batch]) == pytest.approx(held_out)
    # The network without dropout; batches of any size have the plain cross-entropy
    assert len(graphs) == 4
    assert not any("_orig_mod" in key for key in prior.state_dict())


def test_activation_checkpointing_gives_the_same_gradients(text_ids, codes):
    gradients = []
    for again in (False, True):
        prior = tiny_prior(dropout=0.5).train()
        calls = []
        prior.blocks[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        objective = PriorObjective(prior, PriorObjectiveConfig(), activation_checkpointing=again)
        next(objective.losses({"text_ids": text_ids, "codes": codes}, 0)).value.backward()
        assert len(calls) == 1 + again
        gradients.append([p.grad for p in prior.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention_equals_repeated_heads(kv_heads):
    q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, 2, kv_heads, 5, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v), whole)
    seen = torch.tensor([[True] * 3 + [False] * 2, [True, False, True, True, False]])
    repeated = F.scaled_dot_product_attention(q[:, :, :2], k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(attend(q[:, :, :2], k, v, seen), repeated)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_fused_kernel_compiles_for_any_shapes(kv_heads):
    """Captions are read by one program whatever their number: a comparison of shapes must not reach
    the kernel as a symbol."""
    q = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, 3, kv_heads, 5, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    compiled = torch.compile(fused_attention, backend="eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, None), attend(q, k, v))


def test_key_heads_must_divide_query_heads():
    with pytest.raises(
        ValueError, match=r"prior\.model\.kv_heads is 3; it must divide prior\.model\.heads 4"
    ):
        PriorConfig(width=64, heads=4, kv_heads=3)


def test_weights_that_do_not_fit_are_refused_by_from_pretrained(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    cut = {name: value for name, value in weights.items() if "blocks.1" not in name}
    save_file(cut, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"do not fit its config\.json \(first keys that differ: \['blocks\.1"
    ):
        PriorModule.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot be read"):
        PriorModule.from_pretrained(tmp_path)


def test_stream_levels_survive_json():
    stream = StreamConfig(
        text_vocab_size=9, text_length=4, levels=({"grid": [2, 2], "num_codes": 3},)
    )  # type: ignore[arg-type]
    assert stream.levels == (Level(grid=(2, 2), num_codes=3),)


def test_a_prior_is_built_on_the_default_device_as_a_whole():
    prior = tiny_prior()
    with torch.device("meta"):
        built = PriorModule(prior.model_config, prior.stream.config)
    tensors = built.state_dict()
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    assert shapes == {n: (tensor.shape, tensor.dtype) for n, tensor in prior.state_dict().items()}


def test_a_module_and_its_model_of_transformers_take_each_others_configuration():
    prior = tiny_prior()
    prior.config.trained_order = "random"
    model = ImagePrior(prior.config)
    model.load_state_dict(prior.state_dict())
    assert model.fingerprint == prior.fingerprint and model.config.trained_order == "random"
    assert PriorModule(model.config).model_config == prior.model_config
    assert {"ImagePrior", "PriorModule"} <= set(dir(stage2_prior))
