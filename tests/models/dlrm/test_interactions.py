"""The model against torchrec's own architectures on the same weights, and against the definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from dlrm.embeddings.tables import make_table_configs
from dlrm.models.dlrm.interactions import InteractionArch, InteractionConfig, PairDots, find_interaction
from dlrm.models.dlrm.model import DLRMTrain, build_dlrm, compile_dense
from dlrm.models.dlrm.options import INTERACTIONS
from dlrm.runtime.errors import UserError

NAMES = ["cat_a", "cat_b", "cat_c", "cat_d"]
CPU = torch.device("cpu")
DENSE, OVER = [12, 8], [10, 6, 1]
REFERENCES = {
    "original": lambda bags: torchrec_dlrm.DLRM(bags, 5, DENSE, OVER),
    "dcn": lambda bags: torchrec_dlrm.DLRM_DCN(bags, 5, DENSE, OVER, dcn_num_layers=2, dcn_low_rank_dim=3),
    "projection": lambda bags: torchrec_dlrm.DLRM_Projection(bags, 5, DENSE, OVER, [16, 24], [16, 32]),
}


def make(interaction: str, **changes: Any) -> DLRMTrain:
    arguments: dict[str, Any] = {
        "tables": make_table_configs([7, 9, 20, 3], 8, NAMES), "dense_in": 5, "dense_layers": DENSE,
        "over_layers": OVER, "dcn_layers": 2, "dcn_rank": 3, "branch1": [16, 24], "branch2": [16, 32],
        "table_device": CPU, "seed": 1,
    }  # fmt: skip
    return build_dlrm(interaction, **(arguments | changes))


def batch_of(rows: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    lengths = torch.from_numpy(random.integers(0, 4, len(NAMES) * rows))
    ids = torch.from_numpy(random.integers(0, 3, int(lengths.sum())))
    dense = torch.from_numpy(random.standard_normal((rows, 5), dtype=np.float32))
    labels = torch.from_numpy(random.integers(0, 2, rows))
    return Batch(dense, KeyedJaggedTensor.from_lengths_sync(NAMES, ids, lengths), labels)


@pytest.mark.parametrize("interaction", REFERENCES)
def test_equals_torchrec(interaction: str) -> None:
    ours = make(interaction)
    bags = EmbeddingBagCollection(tables=make_table_configs([7, 9, 20, 3], 8, NAMES), device=CPU)
    theirs = torchrec_dlrm.DLRMTrain(REFERENCES[interaction](bags))
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    batch = batch_of(33)
    loss, (detached, logits, labels) = ours(batch)
    expected, (_, expected_logits, _) = theirs(batch)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    assert not detached.requires_grad and not logits.requires_grad and labels is not None
    loss.backward()
    expected.backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_sizes_are_known_before_a_model_is_made(interaction: str) -> None:
    """What refuses too large a model counts as many weights and columns as the model then has."""
    shape = InteractionConfig(NAMES, [8] * 4, 8, 2, 3, [16, 24], [16, 32])
    kind = find_interaction(interaction)
    module = kind(shape)
    assert sum(each.numel() for each in module.parameters()) == kind.count_weights(shape)
    columns = KeyedTensor.from_tensor_list(NAMES, [torch.randn(6, 8)] * 4)
    assert module(torch.randn(6, 8), columns).shape == (6, kind.count_outputs(shape))
    assert module.out_features == kind.count_outputs(shape)


@pytest.mark.parametrize("self_interaction", [False, True])
def test_dots_by_definition_in_any_column_order(self_interaction: bool) -> None:
    module = InteractionArch(InteractionConfig(NAMES, [8] * 4, 8, self_interaction=self_interaction))
    dense = torch.randn(6, 8)
    pooled = {name: torch.randn(6, 8) for name in NAMES}
    entries = [dense, *(pooled[name] for name in NAMES)]
    pairs = [(i, j) for i in range(5) for j in range(i + (not self_interaction), 5)]
    expected = torch.cat([dense, *((entries[i] * entries[j]).sum(1, keepdim=True) for i, j in pairs)], dim=1)
    for order in (NAMES, NAMES[::-1], [NAMES[i] for i in (2, 0, 3, 1)]):
        columns = KeyedTensor.from_tensor_list(order, [pooled[name] for name in order])
        out = module(dense, columns)
        assert expected.shape[1] == module.out_features
        torch.testing.assert_close(out[:, : module.out_features], expected)
        assert (out[:, module.out_features :] == 0).all()  # a rank of one thread has some more columns


@pytest.mark.parametrize("self_interaction", [False, True])
def test_gradient_of_the_dots(self_interaction: bool) -> None:
    module = InteractionArch(InteractionConfig(NAMES, [4] * 4, 4, self_interaction=self_interaction))
    order = module._make_order(tuple(NAMES[::-1]), CPU)
    dense = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    sparse = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, s: PairDots.apply(d, s, order), (dense, sparse))


def test_flat_interactions_follow_the_tables_order() -> None:
    module = make("cat").model.inter_arch
    pooled = {name: torch.full((2, 8), float(number)) for number, name in enumerate(NAMES)}
    for order in (NAMES, NAMES[::-1]):
        columns = KeyedTensor.from_tensor_list(order, [pooled[name] for name in order])
        out = module(torch.full((2, 8), -1.0), columns)
        assert out[0, ::8].tolist() == [-1, 0, 1, 2, 3]


def test_tables_of_different_widths() -> None:
    tables = make_table_configs([7, 9, 20, 3], [4, 8, 16, 8], NAMES)
    for interaction in ("dcn", "cat", "projection"):
        loss, _ = make(interaction, tables=tables)(batch_of(9))
        loss.backward()
        assert loss.isfinite()
    with pytest.raises(UserError, match="cat_a 4, cat_c 16"):
        make("dot", tables=tables)


def test_bf16_autocast_stays_close() -> None:
    model, batch = make("dot"), batch_of(64)
    exact, _ = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(batch)
    loss.backward()
    weight = model.get_parameter("model.sparse_arch.embedding_bag_collection.embedding_bags.t_cat_a.weight")
    assert loss.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.02)


def test_same_seed_same_model_and_the_papers_weights() -> None:
    first, again, other = make("dcn"), make("dcn"), make("dcn", seed=2)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    name = "model.over_arch.model.1.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    paper = make("cat", init="paper", dense_layers=[400, 8])
    layer = "model.dense_arch.model._mlp.0._linear"
    assert paper.get_parameter(f"{layer}.weight").std().item() == pytest.approx((2 / 405) ** 0.5, rel=0.1)
    assert paper.get_parameter(f"{layer}.bias").std().item() == pytest.approx((1 / 400) ** 0.5, rel=0.15)


def test_mistakes_are_reported() -> None:
    with pytest.raises(UserError, match="--interaction_type mlp is unknown"):
        make("mlp")
    with pytest.raises(UserError, match="branch2_layer_sizes: the last of"):
        make("projection", branch2=[16, 9])
    with pytest.raises(UserError, match="the last must be 1"):
        make("dot", over_layers=[4, 2])
    with pytest.raises(UserError, match="not cat_a 8"):
        make("dot", dense_layers=[16])


def test_compiling_with_torch_under_a_path_with_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", "/my folder/torch/__init__.py")
    with pytest.raises(UserError, match="--compile: .* has a space, /my folder/torch"):
        compile_dense(make("dot").model)
