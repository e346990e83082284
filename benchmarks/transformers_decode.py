"""Decode throughput of Hugging Face transformers on a model folder; prints one JSON line.

Run by against_transformers.py in an interpreter that has torch and transformers; imports nothing of this project.
"""

import argparse
import json
import time

import torch
import transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(32, 127, (arguments.batch, arguments.context))
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        times = []
        for _ in range(arguments.steps + 2):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - start)
    times = sorted(times[2:])
    step = times[len(times) // 2]
    print(
        json.dumps(
            {
                "what": f"transformers {transformers.__version__} eager, torch {torch.__version__}, float32",
                "threads": torch.get_num_threads(),
                "step_ms": 1e3 * step,
                "tokens_per_second": arguments.batch / step,
            }
        )
    )


if __name__ == "__main__":
    main()
