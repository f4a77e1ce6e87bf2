"""Scores token by token against a dense oracle that weighs every token of every step by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import hydragrad as hg
from hydragrad.hypergradient.scaled import PerExampleGradients
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.planning import plan_sweep
from tests.hypergradient.recorded import EPOCHS, STEPS, recipe_of, recorded, values
from tests.oracles import recursion, unroll
from tests.tolerances import ORACLE, SAME, assert_close
from tests.zoo import N_TRAIN, case

L = 5
PROBLEM = case("token_loss")
METHODS = ["exact", "gauss-newton", "hessian-free"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("tokens") / "run")


@pytest.mark.parametrize("option", [("SGD", {"lr": 0.1, "momentum": 0.9}), ("AdamW", {"lr": 0.02})], ids=str)
def test_tokens_agree_with_the_oracle(option, tmp_path):
    recipe = recipe_of(PROBLEM, *option)
    found = values(recorded(recipe, tmp_path / "run"), PROBLEM.queries, tokens=True)
    expected = unroll(recipe, tokens=L).scores(PROBLEM.queries)
    assert found.shape == (N_TRAIN, L, len(PROBLEM.queries))
    assert_close(found, expected, ORACLE)
    assert len(expected.flatten().unique()) > expected[:, 0].numel()  # the tokens do differ


def test_a_mean_over_the_tokens_of_all_micro_batches_of_a_step(tmp_path):
    """As the page on recording writes it: batches carry the step's count, and are kept."""
    steps = [[[0, 1, 2], [3, 4, 5, 6]], [[7, 8], [9]], [[1, 10, 11], [0, 2, 4, 6]]]
    counts = {3: 7 * L, 4: 7 * L, 2: 3 * L, 1: 3 * L}  # of a step, by the size of a micro-batch in it
    recipe = recipe_of(PROBLEM, steps=steps, reduction=lambda batch, shape: 1 / torch.tensor(counts[shape[0]]).double())
    model = PROBLEM.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def counted() -> Iterator[Any]:
        for step in steps:
            tokens = sum(PROBLEM.samples[i][1].numel() for ids in step for i in ids)
            for ids in step:
                yield (*default_collate([PROBLEM.samples[i] for i in ids]), torch.tensor(tokens))

    def loss(model: Any, batch: Any) -> Tensor:
        return PROBLEM.loss(model, batch[:2])

    with hg.record(tmp_path / "run", model, optimizer, keep_batches=True) as recording:
        for k, batch in enumerate(recording.batches(counted(), indices=[ids for step in steps for ids in step])):
            (loss(model, batch).sum() / batch[2]).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
    given = {"model": PROBLEM.build(), "loss": loss, "data": PROBLEM.samples}
    run = hg.load(tmp_path / "run", **given, reduction=lambda batch, shape: 1 / batch[2].double())
    assert hg.verify(run)  # a quotient of the sum rounds otherwise than a sum of quotients
    assert_close(values(run, PROBLEM.queries), unroll(recipe).scores(PROBLEM.queries), ORACLE)
    with pytest.raises(hg.MismatchError, match="the replayed gradient at step 0"):
        hg.load(tmp_path / "run", **given)  # a mean over each micro-batch is another loss


def test_epoch_by_epoch(run):
    found = values(run, PROBLEM.queries, tokens=True, by_epoch=True)
    steps = unroll(recipe_of(PROBLEM), tokens=L).scores_by_step(PROBLEM.queries)
    ends = torch.tensor([len(epoch) for epoch in EPOCHS]).cumsum(0).tolist()
    expected = torch.stack([steps[a:b].sum(0) for a, b in zip([0, *ends[:-1]], ends, strict=True)])
    assert ends[-1] == len(STEPS)
    assert_close(found, expected, ORACLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("many", [1, 8])
def test_sums_over_tokens_are_the_default_scores(method, many, run):
    """Also for many queries, where hessian-free has an engine that cannot tell tokens apart."""
    queries = PROBLEM.queries * many
    split = values(run, queries, method, tokens=True)
    assert_close(split.sum(1), values(run, queries, method), SAME)
    if many == 1:
        assert_close(split.sum(1), recursion(recipe_of(PROBLEM), method).scores(queries), ORACLE)


def test_an_engine_that_sums_the_tokens_is_not_even_tried(run, monkeypatch):
    made, init = [], PerExampleGradients.__init__

    def counted(self: PerExampleGradients, objective: Any) -> None:
        made.append(1)
        init(self, objective)

    monkeypatch.setattr(PerExampleGradients, "__init__", counted)
    for tokens in (True, False):
        assert not made
        run.memo.clear()
        values(run, PROBLEM.queries, "hessian-free", tokens=tokens)
    assert made


def test_chosen_rows_blocks_and_pieces(run, tmp_path):
    rows = [7, 0, 3]
    whole = values(run, PROBLEM.queries, tokens=True)
    assert_close(values(run, PROBLEM.queries, tokens=True, train=rows), whole[rows], SAME)
    again = [values(run, PROBLEM.queries, tokens=True, block=1, resume=tmp_path / "pieces") for _ in range(2)]
    assert torch.equal(*again)
    assert_close(again[0], whole, SAME)
    with pytest.raises(hg.MismatchError, match="tokens differs"):
        values(run, PROBLEM.queries, block=1, resume=tmp_path / "pieces")


def test_the_plan_counts_the_tokens(run):
    rows = [plan_sweep_bytes(run, rows) for rows in (N_TRAIN, N_TRAIN * L)]
    found = hg.attribute(run, PROBLEM.queries, tokens=True, check=False).diagnostics.plan
    assert rows[1] > rows[0]
    assert f"about {rows[1] / 2**20:.0f} MiB" in found


def plan_sweep_bytes(run: hg.Run, rows: int) -> int:
    options: Any = {"memory": None, "block": None, "compile": None}
    return plan_sweep(Sweep.of(run), len(PROBLEM.queries), "exact", rows=rows, **options).peak_bytes


# ---------------------------------------------------------------------------------------------------------------
# Batches of different lengths


def ragged() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 3, 1, 4, 2, 2, 5, 1]
    return [(torch.randint(7, (n,), generator=generator), torch.randint(3, (n,), generator=generator)) for n in lengths]


def padded(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """To the longest of the batch."""
    tokens, labels = zip(*samples, strict=True)
    pad: Any = nn.utils.rnn.pad_sequence
    return pad(list(tokens), batch_first=True), pad(list(labels), batch_first=True, padding_value=-100)


def per_token(model: Any, batch: Any) -> Tensor:
    tokens, labels = batch
    losses = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return losses.view(labels.shape)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_batches_of_different_lengths(tmp_path):
    """Zero beyond an example's own end, and where its batch was cut; the oracle is a loop written by hand."""
    data: Any = ragged()
    model, lr = network(), 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(data, batch_size=2, collate_fn=padded)):
            optimizer.zero_grad()
            per_token(model, batch).mean().backward()
            optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=per_token, data=data, collate_fn=padded)
    found = values(run, data[:3], tokens=True)

    plain = network()
    eps = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True)
    w = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
    for first in range(0, 8, 2):
        losses = per_token(lambda x, w=w: torch.func.functional_call(plain, w, (x,)), padded(data[first : first + 2]))
        scalar = ((1 + eps[first : first + 2, : losses.shape[1]]) * losses).mean()
        gradients = torch.autograd.grad(scalar, list(w.values()), create_graph=True)
        w = {name: p - lr * g for (name, p), g in zip(w.items(), gradients, strict=True)}
    measured = per_token(lambda x: torch.func.functional_call(plain, w, (x,)), padded(data[:3])).sum(1)
    expected = -torch.stack([torch.autograd.grad(m, eps, retain_graph=True)[0] for m in measured], dim=-1)
    assert found.shape == (8, 5, 3)
    assert_close(found, expected, ORACLE)
    for i, (tokens, _) in enumerate(data):
        assert (found[i, len(tokens) :] == 0).all()
        assert (found[i, : len(tokens)] != 0).all()


# ---------------------------------------------------------------------------------------------------------------
# The answer, and what is refused


def test_the_answer_carries_tokens(run, tmp_path):
    scores = hg.attribute(run, PROBLEM.queries, tokens=True, progress=False)
    assert scores.tokens
    assert_close(scores.total, values(run, PROBLEM.queries), SAME)
    assert scores.top(query=1, k=3)[0].id == int(scores.total[:, 1].argmax())
    ranked = scores.top_tokens(query=1, k=4, largest=False)
    flat = scores.values[..., 1].flatten().sort(stable=True)
    assert [(r.id * L + r.token, r.score) for r in ranked] == list(
        zip(flat.indices[:4].tolist(), flat.values[:4].tolist(), strict=True)
    )
    read = hg.Attribution.load(scores.save(tmp_path / "scores.safetensors"))
    assert read.tokens
    assert torch.equal(read.values, scores.values)
    summed = hg.attribute(run, PROBLEM.queries, progress=False).diagnostics
    assert scores.diagnostics.finite_difference_error == pytest.approx(summed.finite_difference_error, rel=1e-9)


@pytest.mark.parametrize("by_epoch", [False, True])
def test_as_a_table(by_epoch, run):
    pytest.importorskip("pandas")
    scores = hg.attribute(run, PROBLEM.queries, tokens=True, by_epoch=by_epoch, train=[4, 9], check=False)
    table = scores.to_pandas()
    assert table.index.names == (["epoch", "train", "token"] if by_epoch else ["train", "token"])
    assert table.columns.name == "query"
    if by_epoch:
        assert table.loc[(1, 9, 2), 3] == scores.values[1, 1, 2, 3]
    else:
        assert table.loc[(9, 2), 3] == scores.values[1, 2, 3]
    epochs = scores.values.shape[0] if by_epoch else 1
    assert table.shape == (2 * L * epochs, 4)


def test_what_is_refused(run, tmp_path):
    with pytest.raises(hg.MismatchError, match="groups and tokens together"):
        hg.attribute(run, PROBLEM.queries, tokens=True, groups=[0] * N_TRAIN)
    plain = case("mlp_tanh")
    with pytest.raises(hg.MismatchError, match=r"no tokens to tell apart(.|\n)*\[4, L\](.|\n)*shape \[4\] at step 0"):
        hg.attribute(recorded(recipe_of(plain), tmp_path / "run"), plain.queries, tokens=True)
    with pytest.raises(hg.MismatchError, match="the tokens were summed"):
        hg.attribute(run, PROBLEM.queries, check=False).top_tokens(0)


def test_random_states_are_left_alone(tmp_path: Path):
    """Forms of batches are looked at by running them, dropout and all."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Dropout(0.3), nn.Linear(4, 3)).double()
    recipe = recipe_of(PROBLEM)
    groups = [([name for name, _ in model.named_parameters()], {"lr": 0.1})]
    run = recorded(type(recipe)(model, PROBLEM.loss, PROBLEM.samples, recipe.steps, "SGD", groups), tmp_path / "run")
    before = torch.get_rng_state()
    found = values(run, PROBLEM.queries, tokens=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(found.sum(1), values(run, PROBLEM.queries), SAME)
