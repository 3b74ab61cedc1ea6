"""Train a small CHELA language model on the text of Python's own manual, character by character.

    python examples/train_characters.py my-model           # a minute on two cores, 10 s on an H100
    python examples/generate_characters.py my-model

The text is in every CPython: 0.4 MB in 3.11. Its last tenth is held out. Before the model's loss
stands what counts reach: of characters alone, and of those after the last one and the last two.
"""

import argparse
import math
import time
from collections import Counter
from pydoc_data.topics import topics

import torch

from chela_bench.errors import ChelaBenchError
from chela_bench.kernels.chela_models import ChelaConfig, ChelaForCausalLM

CHARACTERS = 128  # ASCII: a character's code is its id


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    text = manual()
    cut = len(text) * 9 // 10
    train, held_out = encode(text[:cut]), encode(text[cut:])
    if not 2 <= arguments.length <= len(held_out):
        raise SystemExit(f"error: wanted --length 2 to {len(held_out)}, got {arguments.length}")

    print(f"{len(train)} characters to train on, {len(held_out)} held out")
    for order in range(3):
        bits = counted_bits(text[:cut], text[cut:], order)
        print(f"{bits:.3f} bits per held-out character by counts after {order} characters")

    config = ChelaConfig(
        vocab_size=CHARACTERS,
        d_model=arguments.d_model,
        num_layers=arguments.layers,
        max_length=arguments.length,
    )
    model = ChelaForCausalLM(config).to(arguments.device)
    fit(model, train, held_out, arguments)
    print(f"saved in {arguments.folder}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="where the model goes, every 50 steps")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--batch", type=positive, default=8, help="sequences a step")
    parser.add_argument("--length", type=positive, default=256, help="characters a sequence")
    parser.add_argument("--d-model", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    return parser.parse_args()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return int(text)


def manual() -> str:
    """Every paragraph of the manual's topics once, in ASCII."""
    pages = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = dict.fromkeys(pages.split("\n\n"))
    return "\n\n".join(paragraphs).encode("ascii", "ignore").decode()


def encode(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("ascii")))


def counted_bits(train: str, held_out: str, order: int) -> float:
    """Bits per held-out character, where counts after `order` characters lean on those after one
    less (Witten and Bell): a context seen n times, with u followers, gets n / (n + u) of a say."""
    lengths = range(1, order + 2)
    counts = [Counter(train[i : i + n] for i in range(len(train) - n + 1)) for n in lengths]
    seen, followers = Counter(), Counter()  # of contexts
    for table in counts:
        for gram, count in table.items():
            seen[gram[:-1]] += count
            followers[gram[:-1]] += 1

    bits = 0.0
    for i in range(order, len(held_out)):
        chance = 1 / CHARACTERS
        for n in range(order + 1):
            context = held_out[i - n : i]
            if seen[context]:
                count, u = counts[n][held_out[i - n : i + 1]], followers[context]
                chance = (count + u * chance) / (seen[context] + u)
        bits -= math.log2(chance)
    return bits / (len(held_out) - order)


def fit(model, train, held_out, arguments) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=arguments.steps, pct_start=0.1
    )
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        first = torch.randint(len(train) - arguments.length, (arguments.batch, 1))
        ids = train[first + torch.arange(arguments.length)].to(arguments.device)
        with autocast(arguments.device):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == arguments.steps:
            bits = held_out_bits(model, held_out, arguments)
            seconds = time.perf_counter() - start
            print(f"{bits:.3f} bits per held-out character, step {step}, {seconds:.0f} s")
            model.save_pretrained(arguments.folder)


@torch.no_grad()
def held_out_bits(model, held_out, arguments) -> float:
    """Sequences one after the other, all characters but each one's first."""
    model.eval()
    whole = held_out[: len(held_out) // arguments.length * arguments.length]
    losses = []
    for ids in whole.view(-1, arguments.length).to(arguments.device).split(64):
        with autocast(arguments.device):
            losses += [model(ids, labels=ids).loss] * len(ids)
    model.train()
    return float(torch.stack(losses).mean()) / math.log(2)


def autocast(device: str) -> torch.autocast:
    """bfloat16 for products on a GPU; the weights stay in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


if __name__ == "__main__":
    try:
        main()
    except ChelaBenchError as error:
        raise SystemExit(f"error: {error}") from error
