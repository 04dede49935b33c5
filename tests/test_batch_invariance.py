"""On a CPU a text's numbers are the same bits, whatever other texts ride with it."""

import pytest
import torch

from bertgpt import gpt
from bertgpt.packing import pack
from bertgpt.paged_forward import make_cache, read_prompts, read_tokens
from bertgpt.portable import products

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize(("inner", "outer"), [(256, 256), (384, 1536), (1536, 384), (100, 700)])
def test_a_rows_product_does_not_depend_on_the_rows_beside_it(inner, outer):
    x = torch.randn(70, inner)
    w, b = torch.randn(outer, inner), torch.randn(outer)
    whole = products.linear(x, w, b)
    for rows in (1, 2, 3, 16, 64, 65):
        assert torch.equal(products.linear(x[:rows], w, b), whole[:rows]), rows
    alone = products.linear(x[5], w, b)
    assert alone.shape == (outer,)
    assert torch.equal(alone, whole[5])
    assert torch.equal(products.linear(x[5].view(1, 1, inner), w, b).view(-1), whole[5])


@needs_onednn
@torch.inference_mode()
def test_a_texts_scores_do_not_depend_on_the_texts_beside_it():
    torch.manual_seed(1)
    model = gpt.GPT2LMHeadModel(
        gpt.GPT2Config(
            vocab_size=300, n_positions=128, n_embd=256, n_layer=2, n_head=4, n_inner=1536
        )
    ).eval()
    prompts = [torch.randint(300, (n,)).tolist() for n in (3, 40, 16, 1, 90, 17)]

    def scores(prompts):
        cache = make_cache(model, 64, 16)
        sequences = [cache.allocate(0) for _ in prompts]
        steps = [read_prompts(model, cache, sequences, pack(prompts))]
        for step in range(18):
            tokens = torch.tensor([(prompt[0] + 7 * step) % 300 for prompt in prompts])
            steps.append(read_tokens(model, cache, sequences, tokens))
        return torch.stack(steps, dim=1)

    together = scores(prompts)
    for prompt, those in zip(prompts, together, strict=True):
        assert torch.equal(scores([prompt])[0], those), len(prompt)
