import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featinv_diffusion.training.group_norm import ChannelsLastGroupNorm, speed_up_group_norms


def random_map(b: int, c: int, h: int, w: int) -> torch.Tensor:
    x = torch.randn(b, c, h, w, dtype=torch.float64) * 3 + 5
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (3, 6, 17, 19), (1, 96, 16, 16)])
def test_values_and_gradients_are_those_of_pytorch(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    x, upstream = random_map(*shape).float(), random_map(*shape).float()
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = function(leaves[0], leaves[1], leaves[2])
        out.backward(upstream)
        return out.detach(), *(leaf.grad for leaf in leaves)

    mine = run(lambda x, w, b: ChannelsLastGroupNorm.apply(x, w, b, 2, 1e-5))
    wanted = run(lambda x, w, b: F.group_norm(x, 2, w, b, 1e-5))
    for ours, theirs in zip(mine, wanted, strict=True):
        scale = float(theirs.abs().max())
        assert float((ours - theirs).abs().max()) <= 2e-5 * scale
    assert mine[0].is_contiguous(memory_format=torch.channels_last)
    assert mine[1].is_contiguous(memory_format=torch.channels_last)


def test_a_module_keeps_its_weights_and_gives_the_same_gradient() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.weight)
    x = random_map(2, 16, 16, 16).float()
    (norm(x) ** 3).sum().backward()
    assert norm.weight.grad is not None
    wanted, before = norm.weight.grad.clone(), dict(norm.state_dict())
    norm.zero_grad()
    speed_up_group_norms(nn.Sequential(norm))
    (norm(x) ** 3).sum().backward()
    assert norm.state_dict().keys() == before.keys()
    assert type(norm.forward(x).grad_fn).__name__.startswith("ChannelsLastGroupNorm")
    torch.testing.assert_close(norm.weight.grad, wanted, rtol=1e-3, atol=1e-2)


def test_half_precision_stays_near_the_exact_result_where_the_mean_is_large() -> None:
    torch.manual_seed(0)
    exact = (torch.randn(2, 16, 16, 16, dtype=torch.float64) + 30).bfloat16().double()
    x = exact.bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(16), torch.zeros(16)
    wanted = F.group_norm(exact, 4, eps=1e-5)
    ours = ChannelsLastGroupNorm.apply(x, weight, bias, 4, 1e-5).double()
    assert float((ours - wanted).abs().max()) < 0.02


def test_a_norm_that_also_activates_is_left_alone() -> None:
    class NormAct(nn.GroupNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    norm = NormAct(2, 8)
    speed_up_group_norms(nn.Sequential(norm))
    assert float(norm(random_map(1, 8, 16, 16).float()).min()) >= 0
