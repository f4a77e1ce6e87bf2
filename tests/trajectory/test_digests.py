"""Digests of batches and fingerprints of gradients, against the same in Python's integers and in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydragrad.trajectory.digests import batch_digests
from hydragrad.trajectory.fingerprints import GradientFingerprint

WORD, TOP = 2**64, 2**63


def signed(number: int) -> int:
    return (number + TOP) % WORD - TOP


def mixed(counter: int) -> int:
    """Splitmix64's output function of a counter."""
    x = counter * 0x9E3779B97F4A7C15 % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


CASES = {
    "short": torch.arange(24, dtype=torch.float32).reshape(4, 6) - 11.5,
    "long": torch.linspace(-3, 3, 3 * 400).reshape(3, 2, 200),
    "long-double": torch.linspace(-3, 3, 3 * 200, dtype=torch.float64).reshape(3, 200),
    "labels": torch.tensor([3, -1, 2**62, 0]),
    "odd": torch.arange(15, dtype=torch.uint8).reshape(5, 3),
    "half": torch.linspace(-3, 3, 30).half().reshape(5, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_a_digest_is_a_weighted_sum_of_the_bytes_read_as_words(case: str) -> None:
    rows = CASES[case]
    flat = rows.reshape(len(rows), -1)
    size = flat.shape[1] * rows.element_size()
    width = 8 if size % 8 == 0 else 4 if size % 4 == 0 else 1
    probe = torch.zeros((1, *rows.shape[1:]), dtype=rows.dtype)
    weights, found = [], batch_digests(rows, len(rows)).tolist()
    for place in range(size // width):  # each word's weight, read off a row whose only other bit is that word's lowest
        raw = torch.zeros(size, dtype=torch.uint8)
        raw[place * width] = 1
        probe = raw.view(rows.dtype).reshape(1, *rows.shape[1:])
        weights.append(int(batch_digests(probe, 1)))
    assert all(weight % 2 for weight in weights)
    assert len(set(weights)) == len(weights)
    lone = width == 8 and size == 8
    for row, digest in zip(flat, found, strict=True):
        data, total = row.contiguous().view(torch.uint8).numpy().tobytes(), 0
        for place, weight in enumerate(weights):
            word = int.from_bytes(data[place * width : (place + 1) * width], "little", signed=width > 1)
            if width == 8 and not lone and (rows.dtype.itemsize == 8 or size < 8 * 128):
                word += word >> 32
            total += word * weight
        assert digest == signed(total)


@pytest.mark.parametrize("case", CASES)
def test_any_flipped_bit_of_any_row_is_seen_in_that_row_alone(case: str) -> None:
    rows = CASES[case]
    before, size = batch_digests(rows, len(rows)), rows[0].numel() * rows.element_size()
    for row in range(len(rows)):
        for bit in range(0, 8 * size, max(1, size // 16)):
            raw = rows.clone().view(torch.uint8).reshape(len(rows), -1) if rows.dtype != torch.uint8 else rows.clone()
            raw = raw.reshape(len(rows), size)
            raw[row, bit // 8] ^= 1 << (bit % 8)
            after = batch_digests(raw.view(rows.dtype).reshape(rows.shape), len(rows))
            assert (after != before).nonzero().flatten().tolist() == [row]


def test_flipped_signs_do_not_cancel() -> None:
    for case in ("short", "long-double"):
        rows = CASES[case].clone().reshape(len(CASES[case]), -1)
        before = batch_digests(rows, len(rows))
        rows[:, [1, 3]] *= -1
        assert bool((batch_digests(rows, len(rows)) != before).all())
    rows = CASES["long"].reshape(3, -1)
    assert bool((batch_digests(-rows, 3) != batch_digests(rows, 3)).all())


def test_neither_memory_layout_nor_company_matters_but_dtype_and_shape_do() -> None:
    rows = CASES["short"]
    wide = torch.zeros(4, 13)
    wide[:, 1::2] = rows
    same: list[Any] = [wide[:, 1::2], rows.t().contiguous().t(), torch.cat([rows[:1], rows])[1:], rows.requires_grad_()]
    expected = batch_digests(rows, 4)
    for one in same:
        assert torch.equal(batch_digests(one, 4), expected)
    assert torch.equal(batch_digests(rows[2:3], 1), expected[2:3])
    plain = rows.detach()
    for other in (plain.double(), plain.view(torch.int32), plain.reshape(4, 2, 3)):
        assert bool((batch_digests(other, 4) != expected).all())
    images, labels = CASES["short"].detach(), CASES["labels"]
    assert bool((batch_digests(labels.view(torch.float64), 4)[:2] != batch_digests(labels, 4)[:2]).all())
    pair = batch_digests([images, labels], 4)
    assert bool((pair != batch_digests([labels, images], 4)).all())
    assert torch.equal(pair, batch_digests((images, labels), 4))
    assert torch.equal(pair, batch_digests({"a": images, "b": labels}, 4)) is False  # names are content


@pytest.mark.parametrize("labels", ["labels", "double", "short", "complex"])
@pytest.mark.parametrize("rows", ["long", "turned", "shifted", "trained", "short"])
def test_a_pair_counts_as_its_parts_do(rows: str, labels: str) -> None:
    plain = torch.linspace(-3, 3, 4 * 400).reshape(4, 400)
    images = {
        "long": plain.reshape(4, 2, 200),
        "turned": plain.t().contiguous().t(),
        "shifted": torch.cat([torch.zeros(1), plain.flatten()])[1:].view(4, 400),
        "trained": plain.clone().requires_grad_(),
        "short": plain[:, :6],
    }[rows]
    numbers = {
        "labels": CASES["labels"],
        "double": torch.tensor([0.5, -0.0, 1e300, 0.0], dtype=torch.float64),
        "short": torch.tensor([1, 2, 3, -4], dtype=torch.int32),
        "complex": torch.tensor([1 + 2j, 3, 4j, 0]),
    }[labels]
    first, second = batch_digests(images, 4).tolist(), batch_digests(numbers, 4).tolist()
    expected = [signed(b + 0x9E3779B97F4A7C15 * a) for a, b in zip(first, second, strict=True)]
    assert batch_digests([images, numbers], 4).tolist() == batch_digests((images, numbers), 4).tolist() == expected
    turned = [signed(a + 0x9E3779B97F4A7C15 * b) for a, b in zip(first, second, strict=True)]
    assert batch_digests([numbers, images], 4).tolist() == turned


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((7, 30), (200, 2), (3, 5, 5), (), (7,), (2,), (9, 2))]


def fingerprint(grads: list[Any]) -> Tensor:
    return GradientFingerprint([g.numel() for g in gradients()])(grads)


def test_the_norm_and_the_projections_of_a_gradient() -> None:
    grads = gradients()
    whole = torch.cat([g.flatten().double() for g in grads])
    torch.testing.assert_close(fingerprint(grads)[0], whole.norm(), rtol=1e-6, atol=0)
    some = gradients()
    for grads, member in ((some, 2), (some[:3][::-1], 2), ([g.flatten()[:40] for g in some], 2)):
        numbers = []  # of the last tensor of 64 numbers, or else the last of the longest
        for scale in (1.0, -1.0):
            changed = [g * scale if k == member else g for k, g in enumerate(grads)]
            numbers.append(GradientFingerprint([g.numel() for g in grads])(changed)[1:])
        flat = grads[member].flatten().double()
        stride = max(1, len(flat) // 64)
        sample, n = flat[::stride][: min(64, len(flat))], min(64, len(flat))
        signs = [1.0 if signed(mixed((member << 32) + 2 + k + 1)) >= 0 else -1.0 for k in range(2 * n)]
        expected = torch.tensor(signs, dtype=torch.float64).view(2, n) @ sample
        torch.testing.assert_close((numbers[0] - numbers[1]) / 2, expected, rtol=1e-6, atol=1e-6)


def test_fingerprints_finished_together_are_those_finished_alone() -> None:
    some = [gradients(), [2 * g for g in gradients()], [None, *gradients()[1:]], [g.sin() for g in gradients()]]
    maker = GradientFingerprint([g.numel() for g in gradients()])
    together = maker.finish([maker.read(grads) for grads in some])
    for grads, found in zip(some, together, strict=True):
        assert torch.equal(found, fingerprint(grads))
    assert torch.equal(fingerprint([None] * 7), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("member", range(7))
def test_a_change_of_any_tensor_changes_the_fingerprint(member: int) -> None:
    grads = gradients()
    before = fingerprint(grads)
    grads[member] = grads[member] * 1.5
    assert not torch.equal(fingerprint(grads), before)


def test_layouts_of_gradients_do_not_matter() -> None:
    grads = gradients()
    turned = [g.t().contiguous().t() if g.dim() == 2 else g for g in grads]
    assert torch.equal(fingerprint(turned), fingerprint(grads))
    sparse = [g.to_sparse() if g.dim() == 2 else g for g in grads]
    assert torch.equal(fingerprint(sparse), fingerprint(grads))


def test_another_sign_of_the_loss_is_another_fingerprint() -> None:
    model = nn.Linear(4, 3)
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    found = []
    for sign in (1, -1):
        model.zero_grad()
        (sign * model(x).square().sum()).backward()
        found.append(GradientFingerprint([12, 3])([p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert not torch.equal(found[0][1:], found[1][1:])
