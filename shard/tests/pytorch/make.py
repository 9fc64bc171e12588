"""Writes the files in this folder, with PyTorch 2.15. Run in this folder: python make.py"""

import collections

import torch

# Three rows of five: enough to tell rows from columns, and elements from bytes.
table = torch.arange(15, dtype=torch.float32).reshape(3, 5) - 4.5

state = collections.OrderedDict()
state["linear.weight"] = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -0.125]], dtype=torch.bfloat16)
state["linear.bias"] = torch.nn.Parameter(torch.tensor([0.5, -65504.0], dtype=torch.float16))
state["embedding"] = table
state["head"] = table
state["row"] = table[1]
state["transposed"] = table.t()
state["columns"] = table[:, 1:4:2]
state["cube"] = table[:2, :4].reshape(2, 2, 2).permute(2, 0, 1)
state["ids"] = torch.tensor([1, -2, 1 << 40])
state["mask"] = torch.tensor([True, False])
state["scalar"] = torch.tensor(1.5, dtype=torch.float64)
state["empty"] = torch.zeros(0, 4)
state._metadata = collections.OrderedDict({"": {"version": 1}})

torch.save(state, "zip.bin")
torch.save(state, "legacy.bin", _use_new_zipfile_serialization=False)
torch.save(
    {
        "epoch": 3,
        "lr": 1e-4,
        "note": None,
        "state_dict": {"e4m3": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn), "u16": torch.tensor([65535], dtype=torch.uint16)},
    },
    "nested.pt",
)
