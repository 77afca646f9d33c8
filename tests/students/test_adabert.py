"""AdaBERT students: cells, what they cost, how a space derives one, and a student's way through the library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import build
from transformers import AutoModelForSequenceClassification

import qbert
from qbert import students
from qbert.students.adabert import AdaBertSpace
from qbert.students.cells import OPERATIONS, Cell, CellLayer, random_cell

CELL = [[[0, "conv3"], [1, "max3"]], [[1, "wide5"], [2, "skip"]], [[0, "mean3"], [3, "conv5"]]]


def student(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = students.adabert(build("bert").eval(), CELL, width=8, dense=12, **settings)
    with torch.no_grad():
        model.mixture.copy_(torch.tensor([0.5, -0.5]))
        for layer in model.encoder[1:-1]:
            layer.mixture.normal_(generator=torch.Generator().manual_seed(1))
    return model


def space(**settings: Any) -> AdaBertSpace:
    return students.adabert_space(build("bert").eval(), **{"width": 8, "dense": 12, "depth": 2, **settings})


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 5 and 3 tokens, their second sentence from the third token on."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [3]])).long()
    ids = torch.randint(5, 50, (3, 9), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(9) > 1).long() * mask}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def by_hand(operation: Any, name: str, x: np.ndarray) -> np.ndarray:
    """One operation on the words [T, W] of one sentence, window by window."""
    span = {"mean3": 3, "max3": 3}.get(name, 0)
    around = [x[max(t - 1, 0) : t + 2] for t in range(len(x))]
    if name == "skip":
        return x
    if span:
        return np.stack([part.mean(0) if name == "mean3" else part.max(0) for part in around])
    weight, bias = (p.detach().double().numpy() for p in operation.convolution.parameters())
    gain, shift = (p.detach().double().numpy() for p in operation.norm.parameters())
    kernel, step = int(name[-1]), 2 if name.startswith("wide") else 1
    result = np.zeros((len(x), len(bias)))
    for t in range(len(x)):
        result[t] = bias
        for k in range(kernel):
            at = t + step * (k - kernel // 2)
            if 0 <= at < len(x):
                result[t] += weight[:, :, k] @ x[at]
    result = np.maximum(result, 0)
    return normalized(result) * gain + shift


def normalized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def softmax(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().softmax(-1).numpy()


def test_a_student_computes_the_graph_of_its_cell() -> None:
    model, inputs = student(), batch()
    table, found = model.words.weight.detach().double().numpy(), logits(model, inputs)
    entry = [p.detach().double().numpy() for p in model.encoder[0].parameters()]
    for row, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], found, strict=True):
        words = table[row[mask.bool()].numpy()] @ entry[0].T + entry[1]
        first = second = normalized(words)
        means = []
        for layer in model.encoder[1:-1]:
            states, edges = [first, second], iter(layer.edges)
            for node in layer.cell.nodes:
                states.append(sum(by_hand(next(edges), name, states[source]) for source, name in node) / len(node))
            first, second = second, normalized(np.einsum("n,ntw->tw", softmax(layer.mixture), np.stack(states[2:])))
            means.append(second.mean(0))
        vector = softmax(model.mixture) @ np.stack(means)
        dense, classifier = model.encoder[-1], model.classifier
        hidden = np.maximum(dense.weight.detach().numpy() @ vector + dense.bias.detach().numpy(), 0)
        ours = classifier.weight.detach().numpy() @ hidden + classifier.bias.detach().numpy()
        np.testing.assert_allclose(expected.numpy(), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_padding_on_either_side_changes_nothing(pairs: bool) -> None:
    model, inputs = student(pairs=pairs), batch()
    expected = logits(model, inputs)
    padded = {k: torch.nn.functional.pad(v, (3, 4)) for k, v in inputs.items()}
    torch.testing.assert_close(logits(model, padded), expected)
    torch.testing.assert_close(logits(model, {k: v[1:2, :5] for k, v in inputs.items()}), expected[1:2])


def test_the_first_layer_reads_the_two_sentences_of_a_pair() -> None:
    model, inputs = student(pairs=True), batch()
    seen: list[Any] = []
    model.encoder[1].register_forward_hook(lambda _, given, output: seen.append((*given, output)))
    model.encoder[2].register_forward_hook(lambda _, given, output: seen.append((*given, output)))
    logits(model, inputs)
    (first, second, inside, output), (before, after, _, _) = seen
    alone = logits_of_words(model, inputs["input_ids"][:, :2])
    torch.testing.assert_close(first[:, :2], alone)
    assert inside[:, :, 0].sum(1).tolist() == [7, 3, 2]  # the longer of both
    assert before is second and after is output


def logits_of_words(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.norm(model.encoder[0](model.words(ids)))


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_student_goes_all_the_way(bits: int, pairs: bool, tmp_path: Path) -> None:
    model, inputs = student(pairs=pairs), batch()
    packed = qbert.pack(qbert.quantize_model(model, bits))
    expected = logits(packed, inputs)
    packed.save_pretrained(tmp_path)
    loaded = qbert.load(tmp_path)
    assert type(loaded) is type(model) and Cell.parse(loaded.config.cell) == Cell.parse(CELL)
    for other in (loaded, AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=1e-6)
    # An activation at the border of a code may take the next one in another engine, and norms carry that on.
    torch.testing.assert_close(logits(qbert.optimize_for_inference(loaded), inputs), expected, rtol=0, atol=2e-3)
    size = qbert.model_size(packed)
    assert size.total == qbert.model_size(model, bits).total
    assert [t.name for t in size.left_in_float] == ["classifier.weight"]


def test_a_float_student_and_one_in_training_come_back(tmp_path: Path) -> None:
    for name, model in (("float", student()), ("trainable", qbert.quantize_model(student(), 4))):
        expected = logits(model.eval(), batch())
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(loaded, batch()), expected, rtol=0, atol=1e-6)
        assert type(loaded) is type(model)


def test_every_layer_says_what_the_head_makes_of_it() -> None:
    model, inputs = student().eval(), batch()
    with torch.no_grad():
        said = model(**inputs, output_probes=True).probes
        model.mixture.copy_(torch.tensor([0.0, 80.0]))
        torch.testing.assert_close(said[1], model(**inputs).logits)
        model.mixture.copy_(torch.tensor([80.0, 0.0]))
        torch.testing.assert_close(said[0], model(**inputs).logits)


def test_a_cell_has_the_parameters_and_products_that_its_layer_has() -> None:
    for cell in (Cell.parse(CELL), *(random_cell(seed=seed) for seed in range(4))):
        layer = CellLayer(cell, 8)
        assert cell.parameters(8) == sum(p.numel() for p in layer.edges.parameters())
        counted = 0

        def count(module: Any, given: Any, output: torch.Tensor) -> None:
            nonlocal counted
            counted += module.weight[0].numel() * output.numel()

        for module in layer.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.register_forward_hook(count)
        layer(*torch.zeros(2, 1, 5, 8), torch.ones(1, 5, 1, dtype=torch.bool))
        pools = sum(3 * 8 for node in cell.nodes for _, name in node if name in ("mean3", "max3"))
        assert cell.products(8) == counted / 5 + pools


def test_the_price_is_what_chosen_operations_have() -> None:
    model = space(depth=3)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(OPERATIONS), (9,), generator=generator)
    with torch.no_grad():
        model.architecture["edges"].copy_(60.0 * torch.nn.functional.one_hot(chosen, len(OPERATIONS)))
        model.architecture["depth"].copy_(torch.tensor([0.0, 60.0, 0.0]))
        parameters, products = model.expected()
    layer = model.encoder[1]
    every = [list(operations.values())[int(i)] for operations, i in zip(layer.edges, chosen, strict=True)]
    assert float(parameters) == 2 * sum(p.numel() for each in every for p in each.parameters())
    assert float(products) == 2 * sum(list(OPERATIONS.values())[int(i)].products(8) for i in chosen)
    most = (7 * 64 + 24) * 9 * 3, 7 * 64 * 9 * 3
    expected = (float(parameters) / most[0] + float(products) / most[1]) / 2
    assert float(model.cost().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_price_is_expected_over_all_choices() -> None:
    model = space(depth=2)
    with torch.no_grad():
        for choice in model.architecture.values():
            choice.normal_(generator=torch.Generator().manual_seed(2))
    shares, depth = softmax(model.architecture["edges"]), softmax(model.architecture["depth"])
    counts = np.array([operation.parameters(8) for operation in OPERATIONS.values()])
    assert float(model.expected().detach()[0]) == pytest.approx((depth @ [1, 2]) * (shares @ counts).sum(), rel=1e-5)


def test_a_space_computes_the_student_that_its_choices_are() -> None:
    model = space(nodes=1, depth=1).eval()
    with torch.no_grad():
        for edge, operation in enumerate((2, 7)):
            model.architecture["edges"][edge, operation] = 3.0
    cell, depth = model.derive()
    assert cell.to_list() == [[[0, "conv7"], [1, "max3"]]] and depth == 1
    twin = students.adabert(build("bert").eval(), cell, depth, width=8, dense=12)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            theirs = name.replace("edges.0", "edges.0.conv7")
            parameter.copy_(named[theirs])
    torch.testing.assert_close(logits(twin, batch()), logits(model, batch()))


def test_choices_have_the_gradient_of_every_operation() -> None:
    model = space(nodes=1, depth=1, dropout=0.0).train()
    model.choosing = True
    model(**batch()).logits.sum().backward()
    assert bool((model.architecture["edges"].grad != 0).any(1).all())
    model.zero_grad()
    model.choosing = False
    model(**batch()).logits.sum().backward()
    assert model.architecture["edges"].grad is None
    trained = {n.split(".")[4] for n, p in model.named_parameters() if ".edges." in n and p.grad is not None}
    assert len(trained) <= 2  # what was not drawn did not run


def test_the_clearest_edges_of_a_node_are_kept() -> None:
    model = space(nodes=2)
    edges = model.architecture["edges"].data.zero_()
    edges[2, 3], edges[3, 6], edges[4, 8] = 1.0, 5.0, 2.0
    cell, _ = model.derive()
    assert cell.to_list() == [[[0, "conv3"], [1, "conv3"]], [[1, "mean3"], [2, "skip"]]]


def test_random_cells_are_as_large_and_drawn_by_their_seed() -> None:
    like = Cell.parse(CELL)
    drawn = [random_cell(seed=seed, like=like) for seed in range(5)]
    assert {cell.parameters(96) for cell in drawn} == {like.parameters(96)}
    assert len(set(drawn)) == 5 and drawn[3] == random_cell(seed=3, like=like)
    assert all(len(node) == 2 and node[0][0] < node[1][0] for cell in drawn for node in cell.nodes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": []}, "has no nodes"),
        ({"cell": [[[0, "conv4"]]]}, "operation 'conv4' is not known; use one of conv3"),
        ({"cell": [[[0, "skip"]], [[3, "skip"]]]}, "node 1 reads sequence 3; those before it are 0 to 2"),
        ({"cell": "conv3"}, "is no list of nodes"),
        ({"width": 0}, "width=0 and depth=2 are not possible"),
        ({"depth": 0}, "depth=0"),
        ({"dimensions": 4000}, "dimensions=4000 does not fit"),
    ],
)
def test_impossible_students_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        students.adabert(build("bert"), **settings)


def test_impossible_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="nodes=0"):
        space(nodes=0)
    with pytest.raises(ValueError, match="nodes=0"):
        random_cell(0, seed=1)
