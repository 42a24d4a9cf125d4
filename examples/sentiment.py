"""A classifier of sentences in five steps: a prompt and a small head are trained here, the model lives in a swarm.

    corolla bootstrap                                             # prints the address to join through
    corolla serve smollm2 --peers ADDRESS                         # on as many machines as you like
    python examples/sentiment.py --peers ADDRESS --steps 60

Like SST-2, sentences of films are praise or not; they are made here, so that nothing has to be downloaded. To use
your own, replace `SENTENCES` by pairs of a text and a label.
"""

import argparse
import itertools
import random

import torch

import corolla

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--peers", nargs="+", required=True)
parser.add_argument("--tuning-mode", default="ptune", choices=["ptune", "deep_ptune", "prefix"])
parser.add_argument("--prompt-tokens", type=int, default=8)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=1e-2)
parser.add_argument("--out", help="folder for the trained prompt and head")
args = parser.parse_args()
random.seed(0)
torch.manual_seed(0)

# Step 1: the data. The words of held-out sentences have been seen, the sentences have not.
SUBJECTS = ["the film", "this comedy", "her new picture", "the story", "every scene", "the whole cast"]
PRAISE = ["is a delight", "moves you to tears", "sparkles with wit", "is wonderful", "never lets you down"]
BLAME = ["is a bore", "drags on for hours", "is painfully dull", "wastes your evening", "is a mess"]
ENDINGS = ["", " from start to end", " and so is the music", ", as my friends will tell you"]
SENTENCES = [
    (f"{subject} {verb}{ending} .", label)
    for label, verbs in ((0, BLAME), (1, PRAISE))
    for subject, verb, ending in itertools.product(SUBJECTS, verbs, ENDINGS)
]
random.shuffle(SENTENCES)
held_out, train = SENTENCES[:48], SENTENCES[48:]

# Step 2: the model. Embeddings, prompt and head are here; the blocks are in the swarm.
tokenizer = corolla.load_tokenizer(args.model)
tokenizer.padding_side = "left"  # peft takes the last position, whatever it holds; so both read the same
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
LABELS = {0: "negative", 1: "positive"}
loading = {"initial_peers": args.peers, "id2label": LABELS, "pad_token_id": tokenizer.pad_token_id}
model = corolla.AutoDistributedModelForSequenceClassification.from_pretrained(
    args.model, tuning_mode=args.tuning_mode, pre_seq_len=args.prompt_tokens, **loading
)


def batch(pairs: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """Tokens, mask [R, T] and labels [R]."""
    tokens = tokenizer([text for text, _ in pairs], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in pairs])
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": labels}


def accuracy(classifier: torch.nn.Module) -> float:
    """The share of held-out sentences that it gets right."""
    given = batch(held_out)
    with torch.no_grad():
        guesses = classifier(**given).logits.argmax(-1)
    return (guesses == given["labels"]).float().mean().item()


# Step 3: the optimizer holds the prompt and the head.
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)

# Step 4: the loop. Gradients come back through the swarm; a server that fails is replaced on the way.
print(f"before: {accuracy(model):.0%} of {len(held_out)} held-out sentences are right", flush=True)
for step in range(1, args.steps + 1):
    loss = model(**batch(random.sample(train, args.batch_size))).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"step {step}/{args.steps}: loss {loss.item():.3f}", flush=True)
print(f"after: {accuracy(model):.0%} of {len(held_out)} held-out sentences are right", flush=True)

# Step 5: what was trained is kept, and read back.
if args.out:
    model.save_pretrained(args.out)
    again = corolla.AutoDistributedModelForSequenceClassification.from_pretrained(
        args.model, initial_peers=args.peers, prompts=args.out
    )
    print(f"read back: {accuracy(again):.0%}, {sorted(again.config.label2id)}", flush=True)
    again.close()
model.close()
