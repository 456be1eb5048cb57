from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featinv_diffusion.backbones.traced import (
    TRACE_BATCH,
    LayerTrace,
    Layout,
    first_tensor,
    record_layer,
    run_to_layer,
    to_meta,
)


class LastAxisBlock(nn.Module):
    """Takes and returns NHWC, in a model that declares NCHW."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Mixed(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 2, stride=2), nn.ReLU(inplace=True))
        self.block = LastAxisBlock(channels)
        self.stage = nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 1)})
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.stage["conv"](x).mean(dim=(2, 3)))


def trace(model: nn.Module, **kwargs) -> dict[str, tuple[Layout, tuple[int, ...]]]:
    ghost = to_meta(model)
    images = torch.zeros(TRACE_BATCH, 3, 16, 16, device="meta")
    return LayerTrace(ghost, [Layout("NCHW")], (16, 16), **kwargs).run(lambda: ghost(images))


def test_the_copy_has_no_weights_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ghost = to_meta(model)
    tensors = [*ghost.parameters(), *ghost.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert len(tensors) == len([*model.parameters(), *model.buffers()])
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_block_that_contradicts_the_declaration_is_left_out():
    found = trace(Mixed(channels=12))
    assert list(found) == ["stem", "stem.0", "stem.1", "block.linear", "stage.conv"]
    assert found["block.linear"] == (Layout("NHWC"), (TRACE_BATCH, 8, 8, 12))
    assert found["stem"] == (Layout("NCHW"), (TRACE_BATCH, 12, 8, 8))


def test_a_block_whose_axes_cannot_be_told_apart_is_left_out():
    """With 8 channels on 8×8 cells, NHWC output of `block` would pass for NCHW."""
    found = trace(Mixed(channels=8))
    assert "block" not in found
    assert found["block.linear"][0] == Layout("NHWC")  # its class says so
    assert found["stem"][0] == Layout("NCHW")  # it returns what its last child returned


def test_a_stage_that_the_model_names_is_believed():
    assert trace(Mixed(channels=8), stages=["block"])["block"][0] == Layout("NCHW")


def test_run_to_layer_stops_there():
    model = Mixed(channels=4)
    model.head.register_forward_hook(lambda *_: pytest.fail("the forward pass went on"))
    images = torch.rand(2, 3, 16, 16)
    output = run_to_layer(model.stem, lambda: model(images))
    assert torch.equal(output, model.stem(images))
    assert not model.stem._forward_hooks


def test_run_to_layer_cleans_up_after_an_error():
    model = Mixed(channels=4)
    with pytest.raises(RuntimeError, match="channels"):
        run_to_layer(model.head, lambda: model(torch.rand(2, 5, 16, 16)))
    assert not model.head._forward_hooks
    with pytest.raises(RuntimeError, match="did not reach"):
        run_to_layer(model.head, lambda: None)


def test_record_layer_keeps_what_the_layer_returned_before_work_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    images = torch.randn(1, 3, 4, 4)
    with record_layer(model[0]) as outputs:
        model(images)
    assert torch.equal(outputs[0], model[0](images))
    assert bool((outputs[0] < 0).any())


def test_first_tensor():
    tensor = torch.zeros(1)
    assert first_tensor((tensor, None)) is tensor
    assert first_tensor({"last_hidden_state": tensor}) is tensor
    assert first_tensor([(tensor,), 2]) is tensor
    assert first_tensor(()) is None
    assert first_tensor("text") is None
    assert first_tensor(None) is None
