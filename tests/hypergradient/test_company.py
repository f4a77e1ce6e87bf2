"""A query's score is its own: queries whose measurements depend on each other are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import hydragrad as hg
from hydragrad.hypergradient.company import check_company
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import unroll
from tests.tolerances import ORACLE, SAME, assert_close
from tests.zoo import Case, case, seeded_classification

WORDS = r"query 0 depends on the queries.*Expected: .*by itself.*among \d queries.*track_running_stats.*measurement"
QUERIES = case("batchnorm").queries


def untracked() -> Case:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            layers = nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3)
            return nn.Sequential(*layers).double()

    return replace(case("batchnorm"), build=build)


def in_company(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """A measurement of each query by itself, of a model that couples them: every one in the same company."""
    company = torch.stack([x for x, _ in case("batchnorm").samples[:5]])
    outputs = [model(torch.cat([x[None], company]))[0] for x in batch[0]]
    return nn.functional.cross_entropy(torch.stack(outputs), batch[1], reduction="none")


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("method", ["exact", "hessian-free"])
def test_normalization_over_the_queries_is_refused(method: str, count: int, tmp_path: Path) -> None:
    run = recorded(recipe_of(untracked()), tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match=WORDS):
        hg.attribute(run, QUERIES[:count], method=method, progress=False)
    with pytest.raises(hg.UnsupportedError, match=WORDS):
        hg.hypergradients(run, [0], check=False, progress=False).scores(QUERIES[:count])


def test_the_same_model_measured_query_by_query(tmp_path: Path) -> None:
    recipe = recipe_of(untracked())
    run = recorded(recipe, tmp_path / "run")
    found = values(run, QUERIES, measurement=in_company)
    assert_close(found, unroll(recipe).scores(QUERIES, in_company), ORACLE)
    assert_close(values(run, QUERIES[2:3], measurement=in_company), found[:, 2:3], SAME)


def contrasted(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Each output against all others of the batch."""
    out = model(batch[0])
    return torch.nn.functional.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


def test_a_loss_over_the_whole_batch_is_refused(tmp_path: Path) -> None:
    problem = replace(case("mlp_tanh"), loss=contrasted)
    run = recorded(recipe_of(problem), tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match=WORDS):
        hg.attribute(run, problem.queries, progress=False)
    hg.attribute(run, problem.queries[:1], check=False, progress=False)  # it has no company


def test_what_draws_or_rounds_is_let_be(tmp_path: Path) -> None:
    """Noise by a seed of the batch's size differs among others; half precision rounds by the size of the batch."""

    def noisy(model: Callable[..., Tensor], batch: Any) -> Tensor:
        return seeded_classification(lambda x: model(x + 0.3 * torch.randn_like(x)), batch)

    run = recorded(recipe_of(case("mlp_tanh")), tmp_path / "run")
    values(run, case("mlp_tanh").queries, measurement=noisy)
    ids, cpu = torch.arange(5), torch.device("cpu")

    def halved(by: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda ids: (ids + 1.0).to(dtype).float() * (1 + by * (len(ids) > 2))

    check_company(halved(0.01, torch.bfloat16), ids, cpu)
    for dtype, by in ((torch.float32, 0.01), (torch.bfloat16, 0.1)):
        with pytest.raises(hg.UnsupportedError, match="query 4 depends on"):
            check_company(halved(by, dtype), ids[-1:].repeat(3), cpu)


def test_padding_that_is_not_masked_is_refused(tmp_path: Path) -> None:
    """Sequences of several lengths, padded by the collate function: a mean over time takes the padding in."""
    problem = case("rnn")

    def cut(samples: list[Any]) -> list[Any]:
        return [(x[: 2 + i % 3], y) for i, (x, y) in enumerate(samples)]

    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        return pad_sequence([x for x, _ in samples], batch_first=True), torch.stack([y for _, y in samples])

    model = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = cut(problem.samples)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
        for batch in recording.batches(loader):
            optimizer.zero_grad()
            problem.loss(model, batch).mean().backward()
            optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=problem.loss, data=data, collate_fn=collate)
    with pytest.raises(hg.UnsupportedError, match="padding that the model does not mask"):
        hg.attribute(run, cut(problem.queries), progress=False)
    same = [(x[:3], y) for x, y in problem.queries]
    assert hg.attribute(run, same, check=False, progress=False).values.isfinite().all()
