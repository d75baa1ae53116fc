"""In bfloat16 every family says nearly what transformers says in fp32, experts being the same."""

import pytest
import torch
from torch.nn.functional import kl_div

from tests.unit_tests.checkpoint.hf_models import MODELS, reference
from torchtitan.checkpoint.hf import load_pretrained
from torchtitan.distributed.parameter_views import use_cast_parameters
from torchtitan.models.moe.router import TokenChoiceTopKRouter


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_moves_predictions_by_rounding_alone(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    tokens = torch.randint(54, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits.log_softmax(-1)
    routers = [module for module in ours.modules() if isinstance(module, TokenChoiceTopKRouter)]
    for router in routers:
        router.record = []
    ours(tokens)
    for router in routers:  # an expert that rounding exchanges for another would hide the rest
        [router.replay] = router.record
    use_cast_parameters(ours, ours.modules(), torch.bfloat16, kept=False)
    logits = ours(tokens)
    assert logits.dtype == torch.bfloat16
    divergence = kl_div(
        logits.float().log_softmax(-1), expected, reduction="none", log_target=True
    ).sum(-1)  # of each token's predictions, in nats
    assert 0 < divergence.mean() < 5e-5
