import math

import torch

from janus_kernels.router_topk import router_topk


def test_worked_by_hand() -> None:
    logits_TE = torch.tensor([[0.0, math.log(3.0)]])
    ids_TK, weights_TK = router_topk(logits_TE, 1, normalize=False)
    assert ids_TK.tolist() == [[1]]
    torch.testing.assert_close(weights_TK, torch.tensor([[0.75]]))
    _, weights_TK = router_topk(logits_TE, 1, normalize=True)
    torch.testing.assert_close(weights_TK, torch.tensor([[1.0]]))


def test_weights_keep_the_dtype_of_the_logits() -> None:
    ids_TK, weights_TK = router_topk(torch.randn(5, 8).bfloat16(), 3, normalize=True)
    assert weights_TK.dtype == torch.bfloat16
    assert ids_TK.shape == (5, 3)
    assert all(len(set(row)) == 3 for row in ids_TK.tolist())
