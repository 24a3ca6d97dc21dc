"""Publication and proof of weights, without an engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from pretended_gpu import pretended_gpu
from safetensors.torch import load_file, save_file

from rl.weight_sync import (
    EMBEDDING,
    OUTPUT_HEAD,
    WeightFiles,
    WeightsRefused,
    check_names,
    check_tied_head,
    publish_weights,
    weights_digest,
)


def some_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4, generator=generator),
        "a.weight": torch.randn(5, generator=generator).bfloat16(),
        "a.scale": torch.tensor(2.5),
    }


def test_digest_is_the_documented_bytes() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    expected = blake3(b"w\0torch.float32\0(1, 2)\0" + bytes.fromhex("0000803f00000040")).hexdigest()
    assert weights_digest([("w", tensor)]) == expected


def test_digest_ignores_order_and_memory_layout_but_nothing_else() -> None:
    weights = some_weights()
    digest = weights_digest(weights.items())
    assert weights_digest(list(weights.items())[::-1]) == digest
    turned = weights | {"b.weight": weights["b.weight"].t().contiguous().t()}
    assert weights_digest(turned.items()) == digest
    changes = {
        "a name": {("c.weight" if name == "b.weight" else name): tensor for name, tensor in weights.items()},
        "a shape": weights | {"b.weight": weights["b.weight"].reshape(4, 3)},
        "a dtype of the same bytes": weights | {"a.weight": weights["a.weight"].view(torch.float16)},
        "one bit": weights | {"b.weight": weights["b.weight"] * (1 + 2**-23)},
        "one tensor less": {name: tensor for name, tensor in weights.items() if name != "a.scale"},
    }
    for what, changed in changes.items():
        assert weights_digest(changed.items()) != digest, what


def test_unsorted_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="'a.weight' comes after 'b.weight'"):
        weights_digest(iter(some_weights().items()))


def test_published_weights_read_back_with_the_digest_that_was_returned(tmp_path: Path) -> None:
    digest = publish_weights(some_weights().items(), tmp_path / "new" / "v1.safetensors")
    with WeightFiles(tmp_path / "new" / "v1.safetensors") as files:
        assert weights_digest(iter(files)) == weights_digest(iter(files)) == digest
        assert files.shapes() == {"a.scale": (), "a.weight": (5,), "b.weight": (3, 4)}
    assert os.listdir(tmp_path / "new") == ["v1.safetensors"]


def test_reader_keeps_its_weights_while_the_next_are_published_over_them(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    first = publish_weights(some_weights().items(), path)
    with WeightFiles(path) as files:
        second = publish_weights([(name, tensor + 1) for name, tensor in some_weights().items()], path)
        assert weights_digest(iter(files)) == first != second


def test_full_disk_leaves_the_old_weights_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    digest = publish_weights(some_weights().items(), path)

    def fails(tensors: object, partial: Path) -> None:
        Path(partial).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rl.weight_sync.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        publish_weights(some_weights().items(), path)
    with WeightFiles(path) as files:
        assert weights_digest(iter(files)) == digest
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_tied_tensors_are_written_once_under_the_first_name(tmp_path: Path) -> None:
    embedding = torch.randn(4, 2)
    publish_weights([(EMBEDDING, embedding), (OUTPUT_HEAD, embedding)], tmp_path / "w.safetensors")
    with WeightFiles(tmp_path / "w.safetensors") as files:
        assert list(files.shapes()) == [EMBEDDING]


def test_sharded_directory_reads_as_one_model(tmp_path: Path) -> None:
    weights = some_weights()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:1]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[1:]}, tmp_path / "model-00002-of-00002.safetensors")
    with WeightFiles(tmp_path) as files:
        assert weights_digest(iter(files)) == weights_digest(weights.items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_unreadable_file_is_refused_with_its_path(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsRefused, match="w.safetensors"):
        WeightFiles(path)


def test_names_must_be_the_whole_model_and_nothing_but_the_model() -> None:
    expected = {"a": (2,), "b": (3,)}
    check_names(expected, dict(expected), tied=False)
    for received, message in (
        ({"a": (2,)}, r"of 2 tensors expected: 1 missing \(b\)"),
        (expected | {"c": (1,)}, r"1 unknown \(c\)"),
        ({"a": (2,), "b": (4,)}, r"1 of another shape \(b is \(4,\), expected \(3,\)\)"),
    ):
        with pytest.raises(WeightsRefused, match=message):
            check_names(expected, received, tied=False)


def test_tied_head_may_be_left_out_on_either_side_but_never_an_untied_one() -> None:
    bare, full = {EMBEDDING: (4, 2)}, {EMBEDDING: (4, 2), OUTPUT_HEAD: (4, 2)}
    check_names(bare, full, tied=True)
    check_names(full, bare, tied=True)
    with pytest.raises(WeightsRefused, match=r"1 missing \(lm_head.weight\)"):
        check_names(full, bare, tied=False)
    with pytest.raises(WeightsRefused, match=r"1 unknown \(lm_head.weight\)"):
        check_names(bare, full, tied=False)


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    embedding = torch.randn(4, 2)
    for head, accepted in ((embedding.clone(), True), (embedding + 1, False)):
        publish_weights([(EMBEDDING, embedding), (OUTPUT_HEAD, head)], tmp_path / "w.safetensors")
        with WeightFiles(tmp_path / "w.safetensors") as files:
            if accepted:
                check_tied_head(files)
            else:
                with pytest.raises(WeightsRefused, match="ties them"):
                    check_tied_head(files)


def test_memory_on_a_gpu_is_not_used_again_while_its_place_is_remembered(tmp_path: Path) -> None:
    """A tensor in the place of one that was let go would be taken for the same, and left out."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(3):
            tensor = torch.full((4,), float(i), device="cuda")
            seen.append(weakref.ref(tensor))
            yield f"w{i}", tensor
            del tensor
        assert all(one() is not None for one in seen)

    with pretended_gpu():
        publish_weights(stream(), tmp_path / "w")
    assert [float(tensor[0]) for tensor in load_file(tmp_path / "w").values()] == [0.0, 1.0, 2.0]
