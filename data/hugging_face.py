"""Models of the Hugging Face Hub: their tokenizers and their checkpoints.

The way in to checkpoints is MoEGPT.from_pretrained and save_pretrained. Nothing of model.py is imported: a
config is a dictionary here, weights are named tensors, and tables translate their names.
"""

import functools
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import require
from config.check import check, door
from config.files import whole
from data.source import pieces

# -------------------- what is on the Hub ------------------------------------------------------------------

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a model: OWNER/MODEL


def is_hugging_face(name_or_path: str) -> bool:
    """Whether this is a Hugging Face folder, or is no path and may be the name of a model on the Hub."""
    path = Path(name_or_path)
    is_name = HUB_NAME.fullmatch(name_or_path) and not path.exists() and not path.parent.exists()
    return bool(is_name) or (path / "config.json").is_file()


def optional(package: str) -> ModuleType:
    """A package that only pretrained models need. ValueError, with the pip command, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = "pip install -r requirements-hf.txt"
        raise ValueError(f"a Hugging Face model needs {package}: {remedy}") from None


def hf_folder(name_or_path: str | Path, files: str | list[str]) -> Path:
    """The folder of that name, or else a copy of these files of the model of that name on the Hub."""
    if Path(name_or_path).suffix == ".pt" or (Path(name_or_path) / "last.pt").exists():
        raise ValueError(f"{name_or_path} is of a run of train.py: give the run's folder as --out_dir")
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    hub = optional("huggingface_hub")
    optional("huggingface_hub.utils").logging.set_verbosity_error()  # one line is enough, below
    try:
        return Path(hub.snapshot_download(str(name_or_path), allow_patterns=files))
    except Exception as error:  # the library's errors are many, and long
        why = f"and could not be fetched from the Hugging Face Hub ({type(error).__name__})"
        remedy = "check the name and the network, or give the folder of a copy"
        raise ValueError(f"{name_or_path} is no folder here, {why}: {remedy}") from error


def read_json(path: Path, wanted: dict) -> dict:
    """The content of a file, which must be as `wanted` describes (config.check)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a Hugging Face model that has it")
    with door(path, "fetch it again"):
        said = json.loads(path.read_text(encoding="utf-8"))
        check(said, wanted)
    return said


# -------------------- tokenizers --------------------------------------------------------------------------

ID = range(2**24)  # limited, because memory is taken for as many
TOKENIZER_META = {"name": str, "json": str, "eot": ID, "stops?": [ID]}
TOKENIZER = {"model": {"vocab": {str: ID}}, "added_tokens?": [{"id": ID, "content": str}]}
SAY_END = ["tokenizer_config.json", "config.json", "generation_config.json"]


class HFTokenizer:
    """The tokenizer of a pretrained model, run by the `tokenizers` library; used like Tokenizer.

    `meta`: kind "hf", name, json (the text of tokenizer.json), eot (the id of end-of-text). Byte-level BPE
    (GPT-2, OLMoE, Qwen), or BPE of characters that falls back to bytes (Mixtral), where a text comes back
    with the space that the tokenizer puts before it, and before each of a long text's `pieces`. Special
    tokens in a text are ordinary text, as in Tokenizer. ValueError if `meta` is not such a dictionary, or the
    tokenizer is of another kind.
    """

    def __init__(self, meta: dict):
        tokenizers = optional("tokenizers")
        check(meta, TOKENIZER_META, "tokenizer")
        self.meta, self.name, self.eot = meta, meta["name"], meta["eot"]
        said = json.loads(meta["json"])
        check(said, TOKENIZER)
        prefix = said["model"].get("continuing_subword_prefix")  # which makes the library panic
        require(not prefix, "continuing_subword_prefix", prefix, "none")
        decoder = json.dumps(said.get("decoder"))
        self._encoding = tokenizers.Tokenizer.from_str(meta["json"])
        to_bytes = next((read for kind, read in TOKEN_BYTES.items() if f'"{kind}"' in decoder), None)
        if to_bytes is None:
            known = " or ".join(TOKEN_BYTES)
            raise ValueError(f"the tokenizer of {self.name} has no decoder of the kind {known}")
        self._encoding.no_truncation()
        self._encoding.no_padding()
        self._encoding.encode_special_tokens = True  # as ordinary text
        added = self._encoding.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        tokens = {i: to_bytes(token) for token, i in self._encoding.get_vocab(False).items()}
        self._tokens = tokens | {i: token.content.encode() for i, token in added.items()}
        self.vocab_size = max(self._tokens) + 1
        require(self.eot in self._tokens, "end-of-text", self.eot, "the id of a token")
        self.stops = tuple(meta.get("stops", [self.eot]))  # ids of which each ends a text
        around = self._encoding.encode("a")
        self.start = tuple(around.ids[: around.special_tokens_mask.index(0)])  # by its own post-processor

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, after those that the tokenizer puts before every text (Mixtral's <s>, none else)."""
        return [*self.start, *self.encode_array(text).tolist()]

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` alone, as an array (n,) uint32. Other threads can run meanwhile."""
        encode = functools.partial(self._encoding.encode, add_special_tokens=False)
        return np.array([i for piece in pieces(text) for i in encode(piece).ids], np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, special tokens written out, U+FFFD for ids that only pad a model's embedding."""
        return b"".join(self._tokens.get(int(i), b"\xef\xbf\xbd") for i in ids)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text each token stands for, 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for i, token in self._tokens.items():
            lengths[i] = 0 if i in self._special or i == self.eot else len(token)
        return lengths

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of tokenizer.json and the end-of-text id: wherever they were found."""
        return hashlib.sha256(f"{self.eot} {self.meta['json']}".encode()).hexdigest()


def read_byte_level(token: str) -> bytes:
    known = BYTE_OF_CHAR.keys() >= set(token)  # tokens for special uses may be plain text
    return bytes(BYTE_OF_CHAR[char] for char in token) if known else token.encode()


def read_byte_fallback(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


# GPT-2 writes bytes as characters: visible ones of Latin-1 as themselves, the others as those from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF_CHAR = {chr(b): b for b in VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}
# by the decoder in tokenizer.json
TOKEN_BYTES = {"ByteLevel": read_byte_level, "ByteFallback": read_byte_fallback}


def hf_tokenizer(name_or_path: str) -> HFTokenizer:
    """The tokenizer of a Hugging Face folder, or of a model on the Hub. ValueError if it cannot be had."""
    folder = hf_folder(name_or_path, ["tokenizer.json", *SAY_END])
    path = folder / "tokenizer.json"
    added = {token["content"]: token["id"] for token in read_json(path, TOKENIZER).get("added_tokens", [])}
    stops = end_of_text(folder, added)
    if not stops:
        raise ValueError(f"{name_or_path} names no end-of-text: its tokenizer_config.json needs an eos_token")
    meta = {"kind": "hf", "name": str(name_or_path), "json": path.read_text(encoding="utf-8")}
    with door(path, "fetch it again"):
        return HFTokenizer(meta | {"eot": stops[0], "stops": stops})


def end_of_text(folder: Path, added: dict[str, int]) -> list[int]:
    """Ids that end a text: first that of tokenizer_config.json's eos_token, or else of config.json's first
    eos_token_id, which ends documents here; then all others."""
    stops = []
    for path in filter(Path.is_file, (folder / name for name in SAY_END)):
        with door(path, "fetch it again"):
            said = read_json(path, {})
            token, ids = said.get("eos_token"), said.get("eos_token_id")
            token = token.get("content") if isinstance(token, dict) else token
            ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
            check(ids, [ID], "eos_token_id")
            stops += ([added[token]] if token in added else []) + ids
    return list(dict.fromkeys(stops))


# -------------------- checkpoints -------------------------------------------------------------------------

# Keys of config.json and the fields of MoEConfig that they set, as far as families agree.
KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "num_experts_per_tok": "k",
    "tie_word_embeddings": "tie_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
MOE_KEYS = KEYS | {"num_experts": "n_expert", "norm_topk_prob": "norm_topk"}
QWEN_KEYS = MOE_KEYS | {
    "moe_intermediate_size": "n_hidden",
    "intermediate_size": "dense_hidden",
    "n_dense_layer": "n_dense_layer",
}
IMPLIED = {"n_kv_head": None, "tie_embeddings": False, "rope_theta": 1e4, "norm_topk": False, "norm_best": 0}
# MoEConfig has no field for these: a config.json must say this of them, or nothing.
USUAL = {
    "hidden_act": "silu",
    "rope_type": "default",
    "attention_bias": False,
    "clip_qkv": None,
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "quant_method": None,
}
# Each parameter here holds these tensors of a file, one below the other.
NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv.weight": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
    "attention.qkv.bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate.weight",
    "mlp.w_in": "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight",
    "mlp.w_out": "mlp.experts.{}.down_proj.weight",
    "mlp.shared.w_in.weight": "mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight",
    "mlp.shared.w_out.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_gate.weight": "mlp.shared_expert_gate.weight",
    "mlp.w_in.weight": "mlp.gate_proj.weight mlp.up_proj.weight",
    "mlp.w_out.weight": "mlp.down_proj.weight",
}
MIXTRAL_NAMES = NAMES | {
    "mlp.gate.weight": "block_sparse_moe.gate.weight",
    "mlp.w_in": "block_sparse_moe.experts.{}.w1.weight block_sparse_moe.experts.{}.w3.weight",
    "mlp.w_out": "block_sparse_moe.experts.{}.w2.weight",
}


class Family(NamedTuple):
    """How one architecture of transformers says what MoEConfig and MoEGPT say."""

    keys: dict[str, str]
    implied: dict[str, object]  # fields that config.json may leave out or has no key for
    names: dict[str, str] = NAMES


FAMILIES = {
    "olmoe": Family(
        MOE_KEYS | {"intermediate_size": "n_hidden"}, IMPLIED | {"qk_norm": "full", "norm_eps": 1e-5}
    ),
    "qwen2_moe": Family(
        QWEN_KEYS | {"shared_expert_intermediate_size": "shared_hidden", "qkv_bias": "qkv_bias"},
        IMPLIED | {"shared_gate": True, "qkv_bias": True, "norm_eps": 1e-6},
    ),
    "qwen3_moe": Family(
        QWEN_KEYS | {"head_dim": "head_width"},
        IMPLIED | {"qk_norm": "head", "head_width": None, "norm_eps": 1e-6},
    ),
    "mixtral": Family(
        KEYS | {"num_local_experts": "n_expert", "intermediate_size": "n_hidden", "head_dim": "head_width"},
        IMPLIED | {"norm_topk": True, "head_width": None, "rope_theta": 1e6, "norm_eps": 1e-5},
        MIXTRAL_NAMES,
    ),
}
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that a file may have


def read_settings(name_or_path: str | Path) -> tuple[dict, str]:
    """What a checkpoint's config.json says: settings of MoEConfig, and the model_type.

    Raises ValueError for what model.py cannot express.
    """
    path = hf_folder(name_or_path, "config.json") / "config.json"
    with door(path):
        said = plain_config(read_json(path, {}))
        model_type = said.get("model_type")
        require(model_type in FAMILIES, "model_type", model_type, "one of " + ", ".join(FAMILIES))
        for key, usual in USUAL.items():
            require(said.get(key, usual) == usual, key, said.get(key), f"{usual}")
        family = FAMILIES[model_type]
        settings = family.implied | {field: said[key] for key, field in family.keys.items() if key in said}
        for key, field in family.keys.items():
            require(field in settings, key, "missing", "given")
        require(settings["n_expert"] >= 2, "num_experts", settings["n_expert"], "at least 2")
    return settings | {"router": "topk"}, model_type


def plain_config(said: dict) -> dict:
    """A config.json, without its nulls, in the words of KEYS and USUAL, whichever release wrote it."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    dense = said.get("mlp_only_layers") or []
    first = sorted(dense) == list(range(len(dense)))
    require(first, "mlp_only_layers", dense, "the first layers")
    plain = said | (said.get("quantization_config") or {}) | rope
    plain["rope_type"] = rope.get("rope_type", rope.get("type"))
    plain["num_experts"] = plain["num_local_experts"] = said.get("num_experts", said.get("num_local_experts"))
    plain["n_dense_layer"] = len(dense)
    if not said.get("use_sliding_window", True):
        plain["sliding_window"] = None
    return {key: value for key, value in plain.items() if value is not None}


FUSED = {"mlp.w_in": "mlp.experts.gate_up_proj", "mlp.w_out": "mlp.experts.down_proj"}  # of all experts


def file_views(weights: dict[str, Tensor], model_type: str, found: Iterable[str] = ()) -> dict[str, Tensor]:
    """For the name of every tensor in a checkpoint's files, the part of a weight here that holds it.

    found: names in the files, which say whether experts are fused there, as transformers 5 can save them.
    """
    fused = any(name.endswith(FUSED["mlp.w_in"]) for name in found)
    views, names = {}, NAMES | FUSED if fused else FAMILIES[model_type].names
    q_rows = weights["blocks.0.attention.out.weight"].shape[1]
    for name, weight in weights.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        prefix = f"model.layers.{block[1]}." if block else ""
        theirs = names[name.removeprefix(block[0]) if block else name].split()
        weight = weight.detach()
        if fused and weight.dim() == 3:
            views[prefix + theirs[0]] = weight.mT
            continue
        for expert, matrix in enumerate(weight.mT if weight.dim() == 3 else [weight]):
            kv_rows = (len(matrix) - q_rows) // 2
            rows = [q_rows, kv_rows, kv_rows] if len(theirs) == 3 else len(matrix) // len(theirs)
            for their, part in zip(theirs, matrix.split(rows)):
                views[prefix + their.format(expert)] = part
    return views


def file_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """For the name of every tensor that has elements, the file that holds it, and its shape (a meta tensor).

    Raises ValueError for a file that is missing or damaged, and for a dtype that is not one of FILE_DTYPES.
    """
    safetensors, paths, outlines = optional("safetensors"), {}, {}
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        shards = sorted(set(read_json(index, {"weight_map": {str: str}})["weight_map"].values()))
    for shard in shards:
        path = folder / shard
        require(shard == path.name, f"a file of weight_map in {index}", shard, "in the same folder")
        if not path.is_file():
            remedy = "fetch it, or, if the folder has .bin files, save it anew with transformers"
            raise ValueError(f"{path.name} is missing in {folder}: {remedy}")
        with door(path, "fetch it again"), safetensors.safe_open(path, "pt") as file:
            found = {name: outline(file, name) for name in file.offset_keys()}
        # older files keep the rotary embedding's frequencies, too
        kept = {n: x for n, x in found.items() if x.numel() and not n.endswith("rotary_emb.inv_freq")}
        outlines, paths = outlines | kept, paths | dict.fromkeys(kept, path)
    return paths, outlines


def outline(file, name: str) -> Tensor:
    """A tensor of an open safetensors file on the meta device."""
    stored = file.get_slice(name)
    dtype = stored.get_dtype()
    require(dtype in FILE_DTYPES, f"the dtype of {name}", dtype, "one of " + ", ".join(FILE_DTYPES))
    return torch.empty(stored.get_shape(), dtype=FILE_DTYPES[dtype], device="meta")


def copy_tensors(paths: dict[str, Path], views: dict[str, Tensor]) -> None:
    """Read the tensors of file_tensors into the views of file_views. Raises ValueError for NaN, and where a
    file of ours has not the sum that write_tensors gave it.

    A file is opened anew for every 16 tensors: until it is closed, the pages that were read count as memory.
    """
    opened, sums = None, {}
    bar = tqdm(paths.items(), desc="weights", unit="tensor", delay=2, leave=False, disable=None)
    for number, (name, path) in enumerate(bar):
        with door(path, "fetch it again"):
            if number % 16 == 0 or path != opened:
                file, opened = optional("safetensors").safe_open(path, "pt"), path
            tensor = file.get_tensor(name)
            require(not tensor.isnan().any(), name, "NaN", "numbers")
            if total := (file.metadata() or {}).get("sum"):
                sums[path] = sums.get(path, int(total)) - checksum(name, tensor)
            views[name].copy_(tensor)
    for path, left in sums.items():
        require(left == 0, f"the sum of {path}", "wrong", "as it was written: fetch it again")


def checksum(name: str, tensor: Tensor) -> int:
    """Of a contiguous tensor on the CPU, at 2 GB/s. A file's "sum" is that over its tensors."""
    return zlib.crc32(tensor.view(torch.uint8).numpy(), zlib.crc32(name.encode()))


def family_of(config: dict, defaults: dict, free: Iterable[str]) -> str:
    """The model_type of the first family that can express a config, whatever it says of the settings `free`.

    defaults: MoEConfig's. Raises ValueError naming a field that no family can express.
    """
    n_expert = config["n_expert"]
    require(n_expert >= 2, "n_expert", n_expert, "at least 2 to be saved for transformers")
    unlike = {}
    for model_type, family in FAMILIES.items():
        said, always = {*family.keys.values(), *free}, defaults | family.implied
        unlike[model_type] = {f: value for f, value in always.items() if f not in said and config[f] != value}
    nearest = min(unlike, key=lambda model_type: len(unlike[model_type]))
    for field, value in unlike[nearest].items():
        allowed = f"{value} to be saved as {nearest}, the nearest family"
        require(config[field] == value, field, config[field], allowed)
    return nearest


def write_checkpoint(
    path: Path, model_type: str, settings: dict, weights: dict[str, Tensor], tokenizer: dict, shard_bytes: int
) -> None:
    """Write a new folder that transformers opens, whole or not at all.

    settings: of MoEConfig, with a number for each width; tokenizer: its meta, or {}.
    """
    require(not path.exists(), "path", path, "the name of a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as new:
        new.mkdir()
        said = config_json(settings, model_type, weights["embedding.weight"].dtype, tokenizer.get("eot"))
        (new / "config.json").write_text(json.dumps(said, indent=2))
        if tokenizer.get("kind") == "hf":
            (new / "tokenizer.json").write_text(tokenizer["json"], encoding="utf-8")
        write_tensors(new, file_views(weights, model_type), shard_bytes)


def config_json(settings: dict, model_type: str, dtype: torch.dtype, eot: int | None) -> dict:
    """The content of config.json, in words that old and new releases of transformers read."""
    said = {key: settings[field] for key, field in FAMILIES[model_type].keys.items()}
    dense = range(said.pop("n_dense_layer", 0))
    return said | {
        "model_type": model_type,
        "architectures": ["".join(word.capitalize() for word in model_type.split("_")) + "ForCausalLM"],
        "mlp_only_layers": list(dense),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": eot,
        "pad_token_id": None,
    }


def write_tensors(folder: Path, views: dict[str, Tensor], shard_bytes: int) -> None:
    """Write tensors into files of about shard_bytes each, and an index if they are several."""
    save_file, contiguous = optional("safetensors.torch").save_file, torch.contiguous_format
    shards, total = {}, 0
    for name, tensor in views.items():
        shards.setdefault(total // shard_bytes, []).append(name)
        total += tensor.nbytes
    places = {}
    for number, names in enumerate(shards.values(), start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        copies = {name: views[name].cpu().clone(memory_format=contiguous) for name in names}
        total_sum = sum(checksum(name, copy) for name, copy in copies.items())
        save_file(copies, folder / file, metadata={"format": "pt", "sum": str(total_sum)})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
