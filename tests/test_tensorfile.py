import numpy as np
import pytest
import safetensors.torch
import torch

from saefty.errors import IntegrityError
from saefty.tensorfile import Bf16, TensorFile, pack

ARRAYS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "role": np.array([1, 2, 3], dtype=np.int8),
    "pos": np.array([7], dtype=np.int64),
    "half": np.array([1.5, -2.0], dtype=np.float16),
    "b": Bf16(torch.tensor([1.5, -3.0], dtype=torch.bfloat16).view(torch.uint16).numpy()),
}


def test_the_reference_library_reads_what_we_write():
    tensors = safetensors.torch.load(pack(ARRAYS, {"kind": "test", "n": 3}))
    assert tensors["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["role"].tolist() == [1, 2, 3]
    assert tensors["half"].tolist() == [1.5, -2.0]
    assert tensors["b"].dtype == torch.bfloat16
    assert tensors["b"].tolist() == [1.5, -3.0]


def test_we_read_what_the_reference_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.tensor([[1.0, 2.0]])}, path, {"a": "b"})
    file = TensorFile(path)
    assert file.header == {"a": "b"}
    assert file.array("w").tolist() == [[1.0, 2.0]]


def test_the_same_content_has_the_same_bytes_in_any_order():
    header = {"kind": "test", "n": 3, "a": 1}
    turned = dict(reversed(ARRAYS.items())), dict(reversed(header.items()))
    assert pack(ARRAYS, header) == pack(*turned)


def test_every_array_starts_at_a_multiple_of_its_item_size(tmp_path):
    (tmp_path / "a").write_bytes(pack(ARRAYS, {}))
    file = TensorFile(tmp_path / "a")
    for name in file.names:
        array = file.array(name)
        assert array.ctypes.data % array.itemsize == 0


@pytest.mark.parametrize("cut", [0, 4, 12, 200])
def test_a_truncated_file_is_an_integrity_error(tmp_path, cut):
    (tmp_path / "a").write_bytes(pack(ARRAYS, {})[:cut])
    with pytest.raises(IntegrityError):
        TensorFile(tmp_path / "a").array("x")
