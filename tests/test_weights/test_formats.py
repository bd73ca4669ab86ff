"""Renaming keys by the tables: every bit and key survives a round trip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_builders import golden_state_dict, small_canonical

from ddetr_mm.weights.formats import HF, MMDET_2, TABLES, TAO, from_canonical, same_values, to_canonical


@settings(max_examples=40, deadline=None)
@given(
    table=st.sampled_from(sorted(TABLES)),
    enc_layers=st.integers(1, 3),
    dec_layers=st.integers(1, 12),
    stage_levels=st.integers(1, 4),
    extra_levels=st.integers(0, 2),
    with_box_refine=st.booleans(),
    two_stage=st.booleans(),
)
def test_round_trip_keeps_every_key_and_bit(table, with_box_refine, two_stage, **structure):
    canonical = small_canonical(
        with_box_refine=with_box_refine or two_stage,
        two_stage=two_stage,
        counters=table == "mmdet",
        **structure,
    )
    foreign, there = from_canonical(
        canonical, TABLES[table], with_box_refine=with_box_refine or two_stage, two_stage=two_stage
    )
    back, trace = to_canonical(foreign, TABLES[table])
    assert there.unexpected == [] and trace.unexpected == []
    assert set(back) == set(canonical)
    assert all(torch.equal(back[key], canonical[key]) for key in canonical)
    sources = set(trace.mapped) | set(trace.aliases)
    assert sources == set(foreign)


@pytest.mark.parametrize("name", ["resnet50_4lvl", "gc_vit_xxtiny_4lvl", "official_4lvl"])
def test_golden_keys_are_all_known_and_come_back_with_their_aliases(name):
    state_dict = golden_state_dict(name)
    table = TABLES["official" if name.startswith("official") else "tao"]
    canonical, trace = to_canonical(state_dict, table)
    assert trace.unexpected == [] and trace.differing_aliases == []
    back, _ = from_canonical(canonical, table, with_box_refine="refine" in trace.used_alias, two_stage=False)
    assert set(back) == set(state_dict)
    assert all(same_values(back[key], state_dict[key]) for key in state_dict)


def test_aliases_share_one_tensor():
    foreign, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    alias = foreign["model.model.transformer.decoder.bbox_embed.1.layers.0.weight"]
    assert alias is foreign["model.model.bbox_embed.1.layers.0.weight"]


def test_decoder_norms_change_places():
    canonical = small_canonical()
    foreign, _ = from_canonical(canonical, TABLES["official"], with_box_refine=True, two_stage=False)
    # The original applies norm2 after self attention and norm1 after cross attention.
    layer = "transformer.decoder.layers.0"
    assert foreign[f"{layer}.norm2.weight"] is canonical["decoder.layers.0.norms.0.weight"]
    assert foreign[f"{layer}.norm1.weight"] is canonical["decoder.layers.0.norms.1.weight"]


def test_query_key_value_are_split_and_joined_in_order():
    canonical = small_canonical()
    foreign, _ = from_canonical(canonical, HF, with_box_refine=True, two_stage=False)
    joined = canonical["decoder.layers.0.self_attn.attn.in_proj_weight"]
    parts = [foreign[f"model.decoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), joined) and parts[0].shape == (8, 8)


def test_a_missing_part_leaves_the_others_unexpected():
    foreign, _ = from_canonical(small_canonical(), HF, with_box_refine=True, two_stage=False)
    del foreign["model.decoder.layers.0.self_attn.k_proj.weight"]
    canonical, trace = to_canonical(foreign, HF)
    assert "decoder.layers.0.self_attn.attn.in_proj_weight" not in canonical
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in trace.unexpected


def test_differing_alias_is_reported():
    foreign, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    key = "model.model.transformer.decoder.bbox_embed.0.layers.0.bias"
    foreign[key] = foreign[key] + 1
    _, trace = to_canonical(foreign, TAO)
    assert trace.differing_aliases == [key]


def test_spellings_of_newer_transformers_are_understood():
    foreign, _ = from_canonical(small_canonical(), HF, with_box_refine=True, two_stage=False)
    renamed = {
        key.replace("conv_encoder.model", "model")
        .replace("self_attn.out_proj", "self_attn.o_proj")
        .replace(".fc1.", ".mlp.fc1.")
        .replace(".fc2.", ".mlp.fc2."): value
        for key, value in foreign.items()
    }
    assert set(renamed) != set(foreign)
    canonical, trace = to_canonical(renamed, HF)
    assert trace.unexpected == [] and set(canonical) == set(small_canonical(counters=False))


def test_names_of_mmdet_2_are_understood():
    canonical = small_canonical(two_stage=True)
    old, _ = from_canonical(canonical, MMDET_2, with_box_refine=True, two_stage=True)
    assert "bbox_head.transformer.decoder.layers.0.attentions.1.value_proj.weight" in old
    back, trace = to_canonical(old, MMDET_2)
    assert trace.unexpected == [] and set(back) == set(canonical)


def test_unknown_key_is_unexpected_and_not_lost():
    foreign, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    foreign["model.criterion.empty_weight"] = torch.ones(2)
    _, trace = to_canonical(foreign, TAO)
    assert trace.unexpected == ["model.criterion.empty_weight"]
