"""What only a GPU can show. Skipped without one."""

from functools import partial

import pytest
import torch
from runs import RUN, entries, flags
from runs import SHAPE as SMALL

import train
from config.device import as_graph, grouped_mm_is_a_kernel
from model import MoEConfig, MoEGPT, compiled_step, run_experts
from router import ROUTERS, ExpertCache, topk
from tests.cases import make_scores, select
from tests.reference import ref_run_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = {"vocab_size": 64, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_hidden": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_experts_equals_its_reference(dtype):
    """Values, and the gradients of used and unused experts, agree with the loop over tokens and experts."""
    torch.manual_seed(0)
    S, C, H, E = 128, 64, 32, 8
    inputs = [torch.randn(S, C), torch.rand(S, E), torch.randn(E, C, 2 * H) / 8, torch.randn(E, H, C) / 6]
    inputs = [t.to(dtype).float() for t in inputs]
    scores = torch.rand(1, S, E)
    scores[..., 3] = -1  # an expert without tokens
    mask = topk(scores, 2)[0]
    slow = [t.clone().requires_grad_() for t in inputs]
    ref_run_experts(slow[0], mask, slow[1], slow[2], slow[3]).square().sum().backward()
    fast = [t.cuda() for t in inputs]
    fast = [(t if i == 1 else t.to(dtype)).requires_grad_() for i, t in enumerate(fast)]
    run_experts(fast[0], mask.cuda(), fast[1], fast[2], fast[3], 2 * S).square().sum().backward()
    close = 1e-3 if dtype == torch.float32 else 4e-2
    for a, b in zip(slow, fast, strict=True):
        assert (a.grad - b.grad.float().cpu()).norm() <= close * a.grad.norm()
    assert not fast[2].grad[3].any() and not fast[3].grad[3].any()


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_agree_with_the_cpu(name):
    """A mask does not depend on the device, ties included."""
    scores = make_scores("four_levels", 3, 100, 16)
    assert torch.equal(select(name, scores.cuda(), 3).cpu(), select(name, scores, 3))


@pytest.mark.parametrize("grad", [True, False])
def test_spare_rows_add_nothing(grad):
    """With more rows than pairs, on memory full of NaN, as often as it is asked for."""
    torch.manual_seed(0)
    S, C, H, E = 128, 64, 32, 8
    x, w_in, w_out = (
        torch.randn(*size, device="cuda").bfloat16() for size in ((S, C), (E, C, 2 * H), (E, H, C))
    )
    mask, weight = topk(torch.rand(1, S, E), 2)[0].cuda(), torch.rand(S, E, device="cuda")
    found = []
    for max_pairs in (2 * S, S * E, S * E):
        dirty = [torch.full((2**15,), torch.nan, device="cuda") for _ in range(64)]  # of sizes as used here
        del dirty
        inputs = [t.clone().requires_grad_(grad) for t in (x, weight, w_in, w_out)]
        with torch.set_grad_enabled(grad):
            y = run_experts(inputs[0], mask, *inputs[1:], max_pairs)
        if grad:
            y.square().sum().backward()
        found.append([y.detach(), *(t.grad for t in inputs if grad)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("router", ["topk", "online_seqtopk"])
def test_decoding_under_autocast(router):
    """Float32 weights, a past in bfloat16: logits near those of the forward."""
    torch.manual_seed(0)
    model, idx = MoEGPT(MoEConfig(**SHAPE, router=router)).cuda(), torch.randint(64, (2, 40)).cuda()
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        cache = model.new_cache(2)
        steps = torch.cat([model(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
        assert torch.allclose(steps, model(idx)[0], atol=5e-2)


@pytest.mark.parametrize("router", ["topk", "online_seqtopk", "online_seqtopk_root"])
def test_a_compiled_step_is_the_eager_one(router):
    """In bfloat16, token by token, beyond a bucket and a merge of the Expert Caches; as a CUDA graph, where
    grouped_mm does not wait for the device."""
    torch.manual_seed(0)
    shape = SHAPE | {"block_size": 256, "router": router}
    model = MoEGPT(MoEConfig(**shape)).cuda().cast(torch.bfloat16).eval()
    caches, step = [model.new_cache(1, 200) for _ in range(2)], compiled_step(torch.device("cuda"))
    caches[1].fix_addresses()
    counters = torch._dynamo.utils.counters["inductor"]
    skipped = counters["cudagraph_skips"]
    with torch.no_grad():
        for token in torch.randint(64, (ExpertCache.RECENT + 80, 1, 1)).cuda():
            for cache in caches:
                cache.make_room(1, False)
            eager, compiled = model._step(token, caches[0], None), step(model, token, caches[1], None)
            assert torch.allclose(compiled[0], eager[0], atol=5e-2)
    assert counters["cudagraph_skips"] == skipped or not grouped_mm_is_a_kernel(torch.device("cuda"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compile", [True, False])
def test_training_learns_and_resumes(dataset, tmp_path, dtype, compile):
    """With Muon and AdamW, and a scaler in float16: the loss falls, and a run goes on from its checkpoint."""
    if compile and dtype == "float16":
        pytest.skip("grouped_mm compiles in bfloat16 only")
    more = {"device": "cuda", "dtype": dtype, "compile": compile, "dataset": dataset, "out_dir": tmp_path}
    train.main(flags(**SMALL | RUN | more | {"sample_tokens": 5}))
    train.main(flags(init_from="resume", out_dir=tmp_path, max_iters=20))
    first, *_, last = (line["loss"] for line in entries(tmp_path, "train"))
    assert last < first - 0.1


def test_decoding_with_caches_equals_the_forward_without():
    """One token at a time gives the logits of the whole sequence."""
    torch.manual_seed(0)
    model = MoEGPT(MoEConfig(**SHAPE)).cuda()
    idx = torch.randint(64, (2, 40)).cuda()
    cache = model.new_cache(2)
    with torch.no_grad():
        steps = torch.cat([model(idx[:, t : t + 1], cache=cache)[0] for t in range(40)], dim=1)
        assert torch.allclose(steps, model(idx, router="online_seqtopk")[0], atol=1e-3)


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.exact])
def test_an_exact_router_never_waits_for_the_device(name):
    """A forward and a backward under bfloat16 autocast read nothing back to the host."""
    if not grouped_mm_is_a_kernel(torch.device("cuda")):
        pytest.skip("elsewhere torch's grouped_mm itself waits")
    model = MoEGPT(MoEConfig(**SHAPE, router=name)).cuda()
    idx = torch.randint(64, (4, 64)).cuda()
    for mode in ("default", "error"):  # the first round sets up kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                _, loss, stats = model(idx, idx)
            (loss + stats.balance_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", ["seqtopk", "online_seqtopk"])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(router, monkeypatch):
    """In bfloat16, each part one graph, also where blocks are computed again going backward."""
    monkeypatch.setattr("model.as_graph", partial(as_graph, fullgraph=True))
    torch.manual_seed(0)
    idx = torch.randint(64, (4, 64)).cuda()
    found = []
    for compiled, again in ((False, False), (True, False), (True, True)):
        config = train.TrainConfig(**SHAPE, router=router, checkpoint_activations=again)
        torch.manual_seed(1)
        model = train.make_model(config, None).cuda()
        train.prepare_blocks(model, config, compiled)
        with torch.autocast("cuda", torch.bfloat16):
            _, loss, stats = model(idx, idx)
        (loss + stats.balance_loss).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b, c in zip(*found, strict=True):
        assert (a - b).norm() <= 0.1 * a.norm() and (b - c).norm() <= 0.01 * b.norm()
