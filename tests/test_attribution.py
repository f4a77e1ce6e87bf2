"""The answer: a named matrix, its ranking, its table, its file."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import hydragrad as hg

VALUES = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-3.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
IDS, QUERIES = [10, 7, 3, 0], [5, 2]


def diagnostics() -> hg.Diagnostics:
    return hg.Diagnostics("exact", 3.0, 1.0, 0.5, 1e-9, 2.5, "all at once", "doubtful", ("one reason", "another"))


def attribution(values: torch.Tensor = VALUES) -> hg.Attribution:
    return hg.Attribution(values, torch.tensor(IDS), torch.tensor(QUERIES), "exact", diagnostics())


def test_top_names_the_helpful_first():
    ranked = attribution().top(query=2, k=2)
    assert [(r.id, r.score) for r in ranked] == [(0, 4.0), (7, 0.0)]


def test_top_names_the_harmful_on_request():
    ranked = attribution().top(query=5, k=2, largest=False)
    assert [(r.id, r.score) for r in ranked] == [(3, -3.0), (10, 0.5)]


def test_top_keeps_the_order_of_equals_and_stops_at_the_end():
    assert [r.id for r in attribution().top(query=5, k=99)] == [7, 0, 10, 3]
    assert attribution().top(query=5, k=0) == []


def test_top_refuses_an_unknown_query_and_names_the_known():
    with pytest.raises(hg.MismatchError, match=r"5, 2") as refused:
        attribution().top(query=0)
    assert "0" in str(refused.value)


def test_top_adds_the_epochs():
    split = torch.stack([VALUES * 3, VALUES * -2])
    assert attribution(split).top(query=2, k=4) == attribution().top(query=2, k=4)
    assert torch.equal(attribution(split).total, VALUES)


def test_to_pandas_is_labelled_by_the_axes():
    pytest.importorskip("pandas")
    table = attribution().to_pandas()
    assert table.index.tolist() == IDS
    assert table.columns.tolist() == QUERIES
    assert table.loc[3, 5] == -3.0
    assert table.loc[0, 2] == 4.0


def test_to_pandas_with_epochs():
    pytest.importorskip("pandas")
    table = attribution(torch.stack([VALUES, 10 * VALUES])).to_pandas()
    assert table.shape == (8, 2)
    assert table.loc[(0, 3), 5] == -3.0
    assert table.loc[(1, 3), 5] == -30.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epochs", [False, True])
def test_a_file_holds_everything(epochs, dtype, tmp_path):
    values = (torch.stack([VALUES, 2 * VALUES]) if epochs else VALUES).to(dtype)
    written = attribution(values)
    path = written.save(tmp_path / "folder" / "scores.safetensors")
    read = hg.Attribution.load(path)
    assert read.values.dtype == dtype
    assert torch.equal(read.values, values)
    assert read.train_ids.tolist() == IDS
    assert read.query_ids.tolist() == QUERIES
    assert read.method == "exact"
    assert read.diagnostics == written.diagnostics
    assert [p.name for p in path.parent.iterdir()] == ["scores.safetensors"]


def test_a_transposed_matrix_is_saved_as_it_reads(tmp_path):
    values = VALUES.T.contiguous().T
    assert torch.equal(hg.Attribution.load(attribution(values).save(tmp_path / "s")).values, VALUES)


@pytest.mark.parametrize("content", [b"", b"not an attribution at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_load_refuses_other_files(content: bytes, tmp_path: Path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(hg.StoreError, match="other"):
        hg.Attribution.load(tmp_path / "other")


def test_load_refuses_a_damaged_file_and_a_missing_one(tmp_path):
    path = attribution().save(tmp_path / "scores")
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(hg.StoreError, match="scores"):
        hg.Attribution.load(path)
    with pytest.raises(hg.StoreError, match="missing"):
        hg.Attribution.load(tmp_path / "missing")


def test_every_flipped_byte_of_a_file_of_scores_is_found(tmp_path: Path) -> None:
    path = attribution().save(tmp_path / "scores")
    data = path.read_bytes()
    read = hg.Attribution.load(path)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        with pytest.raises(hg.StoreError, match=r"scores"):
            hg.Attribution.load(path)
    path.write_bytes(data)
    assert hg.Attribution.load(path).diagnostics == read.diagnostics


def test_values_must_fit_the_axes():
    with pytest.raises((hg.MismatchError, TypeCheckError), match="train_ids"):
        attribution(VALUES[:3])


def test_it_cannot_be_mistaken_for_a_sequence():
    with pytest.raises(TypeError, match="values"):
        list(attribution())


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        attribution().method = "other"  # type: ignore[misc]


def test_repr_says_what_it_is_and_whether_to_believe_it():
    assert all(word in repr(attribution()) for word in ("4", "2", "exact", "doubtful"))
