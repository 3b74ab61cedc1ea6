"""Write on from a prompt, with the model that train_characters.py saved.

python examples/generate_characters.py my-model --prompt "The statement "
"""

import argparse

import torch

from chela_bench.errors import ChelaBenchError
from chela_bench.kernels.chela_models import ChelaForCausalLM


def main() -> None:
    arguments = parse()
    device = arguments.device
    model = ChelaForCausalLM.from_pretrained(arguments.folder, device=device)
    prompt = torch.tensor([list(arguments.prompt)], dtype=torch.int64, device=device)  # [1, T]
    written = model.generate(
        prompt,
        arguments.characters,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        generator=torch.Generator(device).manual_seed(arguments.seed),
    )
    print(bytes(written[0].tolist()).decode("ascii"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="where the model is")
    parser.add_argument("--prompt", type=ascii_bytes, default="The ", help="in ASCII")
    parser.add_argument("--characters", type=int, default=200, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest ones")
    parser.add_argument("--top-k", type=int, help="draw from this many, instead of from all")
    parser.add_argument("--seed", type=int, default=0)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    return parser.parse_args()


def ascii_bytes(text: str) -> bytes:
    if not text.isascii():
        raise argparse.ArgumentTypeError(f"wanted ASCII, got {text!r}")
    return text.encode("ascii")


if __name__ == "__main__":
    try:
        main()
    except ChelaBenchError as error:
        raise SystemExit(f"error: {error}") from error
