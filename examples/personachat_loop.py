"""A personal chatbot in six steps: prompt-tune a model that lives in a swarm, then talk with it.

    corolla bootstrap                                             # prints the address to join through
    corolla serve smollm2 --peers ADDRESS                         # on as many machines as you like
    python examples/personachat_loop.py --peers ADDRESS --data chitchat --steps 20

`--data` also takes a file in PersonaChat's schema (history, candidates). This is the bare loop, to be read
and changed; `corolla tune --style delimiter` does the same with checkpoints, evaluation and a bundle at the end.
"""

import argparse
import sys

# Step 1: the environment is `pip install 'corolla[tune]'`.
import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import corolla

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--model-class", default="AutoDistributedModelForCausalLM", help="or DistributedBloom…")
parser.add_argument("--peers", nargs="+", required=True)
parser.add_argument("--data", default="chitchat")
parser.add_argument("--tuning-mode", default="ptune", choices=["ptune", "deep_ptune"])
parser.add_argument("--prefix-tokens", type=int, default=16)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--max-length", type=int, default=256)
parser.add_argument("--lr", type=float, default=1e-2)
parser.add_argument("--reply-tokens", type=int, default=40)
parser.add_argument("--out", help="folder for the trained prompt")
args = parser.parse_args()
torch.manual_seed(0)

# Step 2: the model. Embeddings, head and prompt are here; the blocks are in the swarm.
model = getattr(corolla, args.model_class).from_pretrained(
    args.model, initial_peers=args.peers, tuning_mode=args.tuning_mode, pre_seq_len=args.prefix_tokens
)
tokenizer = corolla.load_tokenizer(args.model)
tokenizer.padding_side = "right"
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

# Step 3: the data. History and gold reply are joined by a delimiter; padding is never a label.
DELIMITER = "\n-----\n"
conversations, _ = corolla.load_conversations(args.data)
picked = torch.randperm(len(conversations))[: args.steps * args.batch_size].tolist()
texts = [DELIMITER.join(turn.text for turn in conversations[index].turns) + DELIMITER for index in picked]


def collate(batch: list[str]) -> dict[str, torch.Tensor]:
    """Tokens, mask and labels, each [R, T]."""
    tokens = tokenizer(batch, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": labels}


loader = DataLoader(texts, batch_size=args.batch_size, shuffle=True, collate_fn=collate)

# Step 4: the optimizer holds the prompt alone; its rate falls to zero.
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.0)
schedule = get_linear_schedule_with_warmup(optimizer, 0, num_training_steps=len(loader))

# Step 5: the loop. Gradients come back through the swarm; a server that fails is replaced on the way.
for step, batch in enumerate(loader, start=1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"step {step}/{len(loader)}: loss {loss.item():.3f}", flush=True)
if args.out:
    model.save_pretrained(args.out)

# Step 6: the chat, one token a call. The session keeps the attention caches on the servers, so that a turn
# costs its own tokens only. A reply begins with neither the delimiter nor a piece of it, so none is empty.
model.eval()
beginnings = corolla.Beginnings(tokenizer, stop_ids=[], end_ids={tokenizer.eos_token_id}, stop_text=DELIMITER)
with model.inference_session(max_length=2048) as session:
    unfinished = ""
    for line in sys.stdin:
        inputs = tokenizer(unfinished + line.strip() + DELIMITER, return_tensors="pt").input_ids
        first = beginnings.processor(session.position + inputs.shape[1], args.reply_tokens)
        choice = {"do_sample": True, "temperature": 0.6, "top_k": 100, "logits_processor": [first]}
        ids: list[int] = []
        while len(ids) < args.reply_tokens and not tokenizer.decode(ids).endswith(DELIMITER):
            output = model.generate(inputs, max_new_tokens=1, session=session, **choice)
            ids.append(int(output[0, -1]))
            inputs = None
        reply = tokenizer.decode(ids)
        unfinished = "" if reply.endswith(DELIMITER) else DELIMITER
        print(f"you: {line.strip()}\nbot: {reply.removesuffix(DELIMITER)}", flush=True)
model.close()
