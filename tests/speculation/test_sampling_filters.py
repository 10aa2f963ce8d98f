"""Top-p without a sort of the vocabulary keeps what Hugging Face's keeps."""

import pytest
import torch
from transformers import TopPLogitsWarper

from specdec.speculation.warpers import TopP


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])  # from flat, so that more than SHORTLIST tokens are kept, to peaked
def test_top_p_keeps_what_transformers_keeps(top_p: float, scale: float) -> None:
    scores = scale * torch.randn(3, 4 * TopP.SHORTLIST, generator=torch.Generator().manual_seed(0))
    ours = TopP(top_p)(None, scores)  # type: ignore[arg-type]
    assert torch.equal(ours, TopPLogitsWarper(top_p)(None, scores))  # type: ignore[arg-type]


def test_equal_tokens_stay_or_leave_together() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, -4.0, float("-inf")]])
    kept = TopP(0.9)(None, scores).isfinite()  # type: ignore[arg-type]
    assert kept.tolist() == [[True, True, True, True, False, False]]


def test_a_row_without_possible_tokens_stays_so() -> None:
    nothing = torch.full((1, 8), float("-inf"))
    assert torch.equal(TopP(0.5)(None, nothing), nothing)  # type: ignore[arg-type]
