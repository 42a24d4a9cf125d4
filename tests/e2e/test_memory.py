"""A model that fits on no single machine: every process, the client's included, may hold less than the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.processes import environment, processes

LAYERS, HIDDEN, INNER, VOCABULARY = 32, 1024, 4096, 8192
LIMIT = 1_500_000_000  # bytes of private memory (RLIMIT_DATA) for each process

WRITE = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaConfig
import json
folder = Path(sys.argv[1]); folder.mkdir()
config = LlamaConfig(hidden_size={HIDDEN}, intermediate_size={INNER}, num_hidden_layers={LAYERS},
                     num_attention_heads=8, num_key_value_heads=8, vocab_size={VOCABULARY},
                     architectures=["LlamaForCausalLM"], dtype="float32")
config.save_pretrained(folder)
index, total = {{}}, 0
def put(file, tensors):
    global total
    save_file(tensors, folder / file, metadata={{"format": "pt"}})
    index.update(dict.fromkeys(tensors, file)); total += sum(one.nbytes for one in tensors.values())
generator = torch.Generator().manual_seed(0)
def matrix(*shape):
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
put("ends.safetensors", {{"model.embed_tokens.weight": matrix({VOCABULARY}, {HIDDEN}),
    "model.norm.weight": torch.ones({HIDDEN}), "lm_head.weight": matrix({VOCABULARY}, {HIDDEN})}})
for layer in range({LAYERS}):
    name = f"model.layers.{{layer}}."
    put(f"layer-{{layer}}.safetensors", {{
        **{{name + f"self_attn.{{kind}}_proj.weight": matrix({HIDDEN}, {HIDDEN}) for kind in "qkvo"}},
        name + "mlp.gate_proj.weight": matrix({INNER}, {HIDDEN}),
        name + "mlp.up_proj.weight": matrix({INNER}, {HIDDEN}),
        name + "mlp.down_proj.weight": matrix({HIDDEN}, {INNER}),
        name + "input_layernorm.weight": torch.ones({HIDDEN}),
        name + "post_attention_layernorm.weight": torch.ones({HIDDEN}),
    }})
(folder / "model.safetensors.index.json").write_text(json.dumps({{"metadata": {{}}, "weight_map": index}}))
print(total)
"""

CLIENT = """
import json, sys, torch
from corolla import AutoDistributedModelForCausalLM
with AutoDistributedModelForCausalLM.from_pretrained(
    sys.argv[1], initial_peers=[sys.argv[2]], tuning_mode="ptune", pre_seq_len=4
) as model:
    ids = torch.randint(3, 8000, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tokens = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
print(json.dumps({"losses": losses, "tokens": tokens[0].tolist()}))
"""

WHOLE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head.weight.sum()
import torch
[one.data.copy_(one.data.clone()) for one in AutoModelForCausalLM.from_pretrained(sys.argv[1]).parameters()]
"""


def limited(code: str, *arguments: str) -> list[str]:
    """A Python command that runs `code` under the limit; its daemon, which is Go and not ours, inherits it."""
    bound = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))\n"
    return [sys.executable, "-c", bound + code, *arguments]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_model_larger_than_any_process_trains_and_generates(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    written = subprocess.run(
        [sys.executable, "-c", WRITE, str(folder)], check=True, capture_output=True, text=True
    )
    assert int(written.stdout) > 1.4 * LIMIT
    with processes(tmp_path, limited("from corolla.cli.main import main; main()")) as started:
        address, _ = started.swarm(folder, ["0:11", "11:22", "22:32"], "--cache-tokens", "512")
        ended = subprocess.run(
            limited(CLIENT, str(folder), address),
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["losses"][2] < result["losses"][0]
    assert len(result["tokens"]) == 18
    whole = subprocess.run(limited(WHOLE, str(folder)), capture_output=True, text=True, check=False)
    assert whole.returncode != 0  # the limit is one that the whole model does not fit under
