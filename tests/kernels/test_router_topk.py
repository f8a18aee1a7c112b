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


def test_each_token_is_normalised_by_itself() -> None:
    # Probabilities 1/10, 2/10, 3/10, 4/10, and the same in another order.
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 2.0, 3.0]]).log()
    ids_TK, weights_TK = router_topk(logits_TE, 2, normalize=False)
    assert ids_TK.tolist() == [[3, 2], [0, 3]]
    torch.testing.assert_close(weights_TK, torch.tensor([[0.4, 0.3]] * 2))
    _, weights_TK = router_topk(logits_TE, 2, normalize=True)
    torch.testing.assert_close(weights_TK, torch.tensor([[4 / 7, 3 / 7]] * 2))


def test_weights_keep_the_dtype_of_the_logits() -> None:
    ids_TK, weights_TK = router_topk(torch.randn(5, 8).bfloat16(), 3, normalize=True)
    assert weights_TK.dtype == torch.bfloat16
    assert ids_TK.shape == (5, 3)
    assert all(len(set(row)) == 3 for row in ids_TK.tolist())
