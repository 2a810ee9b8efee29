"""Hugging Face checkpoints: models built by transformers and opened here, and the other way round, are the
same function; what model.py cannot express, and files that are missing or damaged, are one line."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import hugging_face
from model import MoEConfig, MoEGPT, pretrained_config

safetensors = pytest.importorskip("safetensors.torch")
hub = pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

# ---- tiny models of transformers

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "max_position_embeddings": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GROUPED, TIED = {"num_key_value_heads": 2}, {"tie_word_embeddings": True}
NORMALISED = {"norm_topk_prob": True}
OLMOE = {"num_experts": 8}
QWEN2 = {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 40}
QWEN3 = {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8}
MIXTRAL = {"num_local_experts": 8}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
VARIANTS = {
    "olmoe": ("olmoe", OLMOE),
    "olmoe grouped": ("olmoe", OLMOE | GROUPED | {"rms_norm_eps": 1e-3}),
    "olmoe normalised, tied": ("olmoe", OLMOE | NORMALISED | TIED),
    "qwen2": ("qwen2_moe", QWEN2),
    "qwen2 grouped, normalised": ("qwen2_moe", QWEN2 | GROUPED | NORMALISED),
    "qwen2 first layer dense, tied": ("qwen2_moe", QWEN2 | TIED | {"mlp_only_layers": [0]}),
    "qwen2 without biases": ("qwen2_moe", QWEN2 | {"qkv_bias": False}),
    "qwen2 without a shared expert": ("qwen2_moe", QWEN2 | {"shared_expert_intermediate_size": 0}),
    "qwen3": ("qwen3_moe", QWEN3),
    "qwen3 grouped, wide heads, normalised": ("qwen3_moe", QWEN3 | GROUPED | NORMALISED | {"head_dim": 20}),
    "qwen3 first layer dense, tied": ("qwen3_moe", QWEN3 | TIED | NORMALISED | {"mlp_only_layers": [0]}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral grouped, tied": ("mixtral", MIXTRAL | GROUPED | TIED | THETA),
    "mixtral narrow heads": ("mixtral", MIXTRAL | {"head_dim": 4}),
}


def build(variant: str = "olmoe"):
    """A model of transformers, every weight of which is random: gains and biases, too."""
    kind, settings = VARIANTS[variant]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.2 * noise + ("norm" in name) if parameter.dim() == 1 else 0.3 * noise)
    return theirs.eval()


@pytest.fixture
def folder(tmp_path):
    """The checkpoint of a tiny OLMoE."""
    build().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def open_theirs(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


PROMPT = torch.randint(SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def same(ours: MoEGPT, theirs) -> bool:
    """Whether the logits are equal to 1e-4, and far from all the same."""
    want = theirs(PROMPT).logits
    return bool((ours(PROMPT)[0] - want).abs().max() < 1e-4) and bool(want.std() > 0.3)


def change_json(path: Path, **changes) -> None:
    """Set keys of a JSON file, or remove those whose value is ...."""
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


# ---- the same function


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_transformers_is_the_same_function(variant, tmp_path):
    """A model that transformers saved has the same logits here, also after a round trip, and the likeliest
    text, from caches on both sides, is the same."""
    theirs = build(variant)
    theirs.save_pretrained(tmp_path / "hf")
    ours = MoEGPT.from_pretrained(tmp_path / "hf")
    assert same(ours, theirs)
    assert ours.config == pretrained_config(tmp_path / "hf") and ours.config.router == "topk"
    assert (ours.head.weight is ours.embedding.weight) == ours.config.tie_embeddings
    text = torch.cat([chunk.tokens for chunk in ours.generate(PROMPT, 16, temperature=0)], dim=1)
    assert torch.equal(text, theirs.generate(PROMPT, max_new_tokens=16, do_sample=False, use_cache=True))
    ours.save_pretrained(tmp_path / "ours")
    assert same(ours, open_theirs(tmp_path / "ours"))
    back = MoEGPT.from_pretrained(tmp_path / "ours")
    assert replace(back.config, head_width=ours.config.head_width) == ours.config
    assert back.config.head_dim == ours.config.head_dim
    assert torch.equal(back(PROMPT)[0], ours(PROMPT)[0])


TRAINED_HERE = {
    "olmoe": {"qk_norm": "full"},
    "qwen2_moe": {"shared_hidden": 24, "shared_gate": True, "qkv_bias": True, "n_dense_layer": 1},
    "qwen3_moe": {"qk_norm": "head", "n_kv_head": 2, "head_width": 16, "n_dense_layer": 1},
    "mixtral": {"tie_embeddings": True},
}
NORMS = {"best": {}, "best k": {"norm_best": 2}, "chosen": {"norm_topk": True}, "raw": {"norm_best": 0}}


@pytest.mark.parametrize(
    ("kind", "norm"), [(a, b) for a in TRAINED_HERE for b in NORMS if (a, b) != ("mixtral", "raw")]
)
def test_a_model_made_here_opens_in_transformers(kind, norm, tmp_path):
    """What a family can express is saved as that family, and transformers has the logits of topk: its weights
    sum to 1 over the chosen scores where here they do over the k best."""
    torch.manual_seed(0)
    changes = TRAINED_HERE[kind] | NORMS[norm]
    ours = MoEGPT(MoEConfig(vocab_size=96, block_size=64, n_layer=2, router="seqtopk", **changes))
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours.save_pretrained(tmp_path / "hf")
    theirs, back = open_theirs(tmp_path / "hf"), MoEGPT.from_pretrained(tmp_path / "hf")
    assert theirs.config.model_type == kind and same(back, theirs)
    assert back.config.norm_topk == (norm != "raw") and back.config.norm_best == 0
    with torch.no_grad():
        assert torch.equal(back(PROMPT)[0], ours(PROMPT, router="topk")[0])


def test_fields_can_be_changed_in_opening(folder):
    """A checkpoint opens under another router, budget and length, with its own weights."""
    ours = MoEGPT.from_pretrained(folder, router="seqtopk", k=3, block_size=32)
    assert (ours.config.router, ours.config.k, ours.config.block_size) == ("seqtopk", 3, 32)
    assert torch.equal(ours(PROMPT)[0], MoEGPT.from_pretrained(folder, k=3)(PROMPT, router="seqtopk")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_kept_bit_for_bit(dtype, tmp_path):
    """There and back, in many files, weights keep their dtype and every bit; gates are float32 here."""
    theirs = build("qwen2").to(dtype)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    ours = MoEGPT.from_pretrained(tmp_path / "hf")
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == (torch.float32 if ".gate." in name else dtype), name
    ours.save_pretrained(tmp_path / "ours", shard_bytes=20_000)
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 33_000
    for model, back in (
        (theirs, open_theirs(files[0].parent)),
        (ours, MoEGPT.from_pretrained(files[0].parent)),
    ):
        assert back.state_dict().keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            there = back.state_dict()[name]
            assert there.dtype == weight.dtype and torch.equal(there, weight), name


@pytest.mark.parametrize("variant", ["olmoe", "qwen2 grouped, normalised", "qwen3", "mixtral"])
def test_fused_experts_open(variant, tmp_path):
    """transformers 5 can save a layer's experts as one tensor, and then Mixtral has the others' names."""
    theirs = build(variant)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    if not any("gate_up_proj" in name for name in safetensors.load_file(tmp_path / "model.safetensors")):
        pytest.skip("this transformers does not fuse")
    assert same(MoEGPT.from_pretrained(tmp_path), theirs)


def test_tensors_that_say_nothing_new_are_let_be(tmp_path):
    """A head that repeats the tied embedding, and frequencies of rotary embeddings."""
    theirs = build("olmoe normalised, tied")
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same(MoEGPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("how", ["NaN", "a bit flips"])
def test_weights_that_went_bad_are_named(how, folder, tmp_path):
    """NaN in any file, and a bit that flipped in one that was written here."""
    ours = MoEGPT.from_pretrained(folder)
    if how == "NaN":
        ours.norm.weight.data[3] = torch.nan
    ours.save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    if how == "a bit flips":
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    message = refusal(MoEGPT.from_pretrained, tmp_path / "ours")
    assert str(file) in message and ("norm.weight is NaN" if how == "NaN" else "the sum of") in message


OLD = {"rope_parameters": ..., "dtype": ..., "torch_dtype": "float32", "rope_scaling": None}
LEFT_OUT = ("norm_topk_prob", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "hidden_act")


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("olmoe", OLD | {"rope_theta": 1e4}),
        ("qwen2 grouped, normalised", OLD | {"rope_theta": 1e4}),
        ("qwen3", OLD | {"rope_theta": 1e4, "num_local_experts": ..., "num_experts": 8}),
        ("mixtral grouped, tied", OLD | {"rope_theta": 500.0}),
        ("mixtral", {"num_local_experts": ..., "num_experts": 8}),
        ("olmoe", dict.fromkeys(LEFT_OUT, ...)),
        ("olmoe", {"sliding_window": 4096, "use_sliding_window": False}),
    ],
    ids=str,
)
def test_configs_that_say_the_same(variant, changes, tmp_path):
    """rope_theta may stand at the top, and names may be older, as earlier releases wrote them; keys that
    transformers fills in may be missing; a sliding window may be given and switched off."""
    build(variant).save_pretrained(tmp_path)
    want = pretrained_config(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    assert pretrained_config(tmp_path) == want


COLUMNS = "model_type hidden_size num_hidden_layers num_attention_heads num_experts_per_tok vocab_size"
OLMOE_7B = {"intermediate_size": 1024, "num_experts": 64}
QWEN2_14B = {"moe_intermediate_size": 1408, "num_experts": 60, "intermediate_size": 5632}
QWEN2_14B |= {"shared_expert_intermediate_size": 5632}
QWEN3_30B = {"moe_intermediate_size": 768, "num_experts": 128, "intermediate_size": 6144}
QWEN3_30B |= {"num_key_value_heads": 4, "head_dim": 128}
MIXTRAL_47B = {"intermediate_size": 14336, "num_local_experts": 8, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("columns", "said", "billions"),
    [
        (("olmoe", 2048, 16, 16, 8, 50304), OLMOE_7B, (6.9, 1.3)),
        (("qwen2_moe", 2048, 24, 16, 4, 151936), QWEN2_14B, (14.3, 2.7)),
        (("qwen3_moe", 2048, 48, 32, 8, 151936), QWEN3_30B, (30.5, 3.3)),
        (("mixtral", 4096, 32, 32, 2, 32000), MIXTRAL_47B, (46.7, 12.9)),
    ],
)
def test_released_models_have_the_sizes_that_their_authors_state(columns, said, billions, tmp_path):
    """From their config.json comes a model of as many parameters as published, all in all and per token."""
    said = said | dict(zip(COLUMNS.split(), columns)) | {"max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with torch.device("meta"):
        counts = MoEGPT(pretrained_config(tmp_path)).n_params()
    assert [count / 1e9 for count in counts] == pytest.approx(billions, abs=0.06)


def test_a_tokenizer_comes_along(tmp_path):
    """tokenizer.json and the end-of-text id are written from the tokenizer's meta."""
    ours = MoEGPT(MoEConfig(vocab_size=96, qk_norm="full"))
    ours.save_pretrained(tmp_path / "a", {"kind": "hf", "name": "x", "json": '{"é": 1}', "eot": 7})
    assert (tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert json.loads((tmp_path / "a" / "config.json").read_text())["eos_token_id"] == 7
    ours.save_pretrained(tmp_path / "b", {"kind": "bpe", "name": "x"})
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors"}


# ---- memory

MEASURE = """
import re, sys
import safetensors, torch
from model import MoEConfig, MoEGPT

with torch.device("meta"):
    MoEGPT(MoEConfig(vocab_size=96))  # which imports what the meta device needs

def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before = memory("VmRSS")
model = MoEGPT.from_pretrained(sys.argv[1])
weights = sum(parameter.nbytes for parameter in model.parameters())
print(weights, memory("VmHWM") - before)
model.save_pretrained(sys.argv[2], shard_bytes=2**24)
print(weights, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_near_the_weights(tmp_path):
    """Opening and saving take less than 1.2 times the weights, the pages of mapped files included."""
    sizes = {"n_layer": 6, "n_embd": 512, "n_expert": 24, "n_hidden": 512, "qk_norm": "full"}
    MoEGPT(MoEConfig(vocab_size=96, **sizes)).cast(torch.bfloat16).save_pretrained(tmp_path / "hf")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "hf"), str(tmp_path / "again")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        weights, peak = map(int, line.split())
        assert weights > 200e6 and 0.9 * weights < peak < 1.2 * weights


# ---- what is refused


def refusal(call, *args, **changes) -> str:
    """The ValueError of a call, which is one line."""
    with pytest.raises(ValueError) as refused:
        call(*args, **changes)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type .* llama, .* olmoe, qwen2_moe, qwen3_moe, mixtral"),
        ({"model_type": ...}, "model_type .* None, .* olmoe"),
        ({"hidden_act": "gelu"}, "hidden_act .* gelu, .* silu"),
        ({"clip_qkv": 8.0}, "clip_qkv .* 8.0"),
        ({"attention_bias": True}, "attention_bias .* True, .* False"),
        ({"sliding_window": 32}, "sliding_window .* 32"),
        ({"sliding_window": 32, "use_sliding_window": True}, "sliding_window .* 32"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type .* yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type .* linear"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers .* \[1\], .* first layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step .* 2, .* 1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method .* fp8"),
        ({"num_experts": 1}, "num_experts .* 1, .* at least 2"),
        ({"hidden_size": ...}, "hidden_size .* missing"),
        ({"num_experts_per_tok": 9}, "k is 9"),
        ({"intermediate_size": 20}, "n_hidden is 20, .* multiple of 8"),
        ({"intermediate_size": 32}, r"experts.0.gate_proj.weight .* \(24, 32\), .* \(32, 32\)"),
        ({"num_hidden_layers": 3}, "model.layers.2.* missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.* absent"),
        ({"tie_word_embeddings": True}, "lm_head.weight .* another than the embedding"),
        ({"num_hidden_layers": 10**30}, r"config.json: n_layer is 10+, .* 64 bits"),
        ({"num_hidden_layers": 10**18}, r"needs at least [\d,]+ GB of memory, but cpu has"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused(folder, changes, words):
    """A config.json that asks for what model.py does not have, or for other tensors, is refused by name."""
    change_json(folder / "config.json", **changes)
    assert re.search(words, refusal(MoEGPT.from_pretrained, folder))


def point(index: Path, file: str) -> None:
    """Have an index name this file for every tensor."""
    change_json(index, weight_map=dict.fromkeys(json.loads(index.read_text())["weight_map"], file))


INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder, one, two: two.unlink(), "model-00002-of-"),
        (lambda folder, one, two: one.write_bytes(one.read_bytes()[:-9]), "damaged"),
        (lambda folder, one, two: one.write_text(POINTER), "damaged"),
        (lambda folder, one, two: (folder / INDEX).write_text("{"), "damaged"),
        (lambda folder, one, two: (folder / INDEX).write_text("{}"), "weight_map is missing"),
        (lambda folder, one, two: (folder / INDEX).unlink(), "model.safetensors is missing"),
        (lambda folder, one, two: (folder / "config.json").write_bytes(b"\xff"), "damaged"),
        (lambda folder, one, two: (folder / "config.json").write_text("[1]"), "damaged"),
        (lambda folder, one, two: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder, one, two: point(folder / INDEX, f"../{folder.name}/{one.name}"), "the same folder"),
        (lambda folder, one, two: point(folder / INDEX, str(one)), "the same folder"),
        (lambda folder, one, two: one.write_bytes(two.read_bytes()), "is missing, but must be ("),
    ],
)
def test_missing_and_damaged_files(tmp_path, damage, words):
    """A file that is missing, cut short or something else is named."""
    build().save_pretrained(tmp_path, max_shard_size="60KB")
    damage(tmp_path, *sorted(tmp_path.glob("*.safetensors"))[:2])
    message = refusal(MoEGPT.from_pretrained, tmp_path)
    assert words in message and str(tmp_path) in message


def test_quantised_tensors_are_refused(folder):
    """A tensor of another number format than the three that weights have is refused by name."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    safetensors.save_file(tensors, folder / "model.safetensors")
    message = refusal(MoEGPT.from_pretrained, folder)
    assert "the dtype of model.norm.weight is I8" in message and "F32, F16, BF16" in message


def test_a_name_is_fetched_from_the_hub(folder, monkeypatch):
    """What is no folder is a name on the Hub, of which only the needed files are fetched, and the weights
    only when config.json is one of ours; one line if it cannot be had, and the pip command if the package is
    missing."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise ConnectionError("many\nlines")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert pretrained_config("somebody/olmoe") == pretrained_config(folder)
    MoEGPT.from_pretrained("somebody/olmoe")
    assert {name for name, _ in asked} == {"somebody/olmoe"}
    assert [files for _, files in asked] == ["config.json", "config.json", "model*.safetensors*"]
    change_json(folder / "config.json", model_type="llama")
    assert "llama" in refusal(MoEGPT.from_pretrained, "somebody/llama")
    assert asked[3:] == [("somebody/llama", "config.json")]
    message = refusal(MoEGPT.from_pretrained, "nobody/nothing")
    assert all(words in message for words in ("nobody/nothing is no folder", "ConnectionError", "network"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -r requirements-hf.txt" in refusal(pretrained_config, "nobody/nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_best": 0}, "qk_norm is none"),
        ({"qk_norm": "full", "norm_best": 3}, "norm_best is 3, .* olmoe"),
        ({"qk_norm": "full", "score_fn": "sigmoid"}, "score_fn is sigmoid, .* softmax .* olmoe"),
        ({"qk_norm": "full", "n_dense_layer": 1}, "n_dense_layer is 1, .* olmoe"),
        ({"qk_norm": "head", "shared_hidden": 24}, "shared_hidden is 24"),
        ({"qk_norm": "full", "n_expert": 1, "k": 1}, "n_expert is 1"),
    ],
    ids=str,
)
def test_what_no_family_has_is_not_saved(tmp_path, changes, words):
    """The refusal names the field, and nothing is written."""
    ours = MoEGPT(MoEConfig(vocab_size=96, **changes))
    assert re.search(words, refusal(ours.save_pretrained, tmp_path / "hf"))
    assert not list(tmp_path.iterdir())


def test_saved_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """A save that fails leaves nothing behind, and no save overwrites anything. A model that uses the bias of
    loss-free balance is refused, because no other code knows it."""
    ours = MoEGPT.from_pretrained(folder)
    assert "new folder" in refusal(ours.save_pretrained, folder)
    monkeypatch.setattr(hugging_face, "write_tensors", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.save_pretrained(tmp_path / "ours")
    ours.blocks[0].mlp.bias[1] = 0.1
    assert "bias_rate" in refusal(ours.save_pretrained, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
