#!/usr/bin/env python3
"""PyTorch's cuDNN attention on attention_bench's prefill work, and reports of both.

attention_bench.py measure --json PATH [--quick]    needs PyTorch with cuDNN attention
attention_bench.py report RUN.json... --markdown PATH --svg PATH
"""
import argparse
import html
import json
import statistics
import sys

HEADS, KV_HEADS = 32, 8
COLD_BYTES = 240 << 20  # rotating buffers: four times L2


def prefill_work(quick):
    """(name, head_dim, query tokens, keys), named as attention_bench names them."""
    for head_dim in (64, 128, 256):
        for name, tokens, keys in (("4k", 4096, 4096), ("8k", 8192, 8192), ("16k", 16384, 16384),
                                   ("2k of 64k", 2048, 65536), ("64k", 65536, 65536)):
            if not (quick and name == "64k"):
                yield f"head_dim {head_dim} {name}", head_dim, tokens, keys


def measure(args):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    rows = []
    for name, head_dim, tokens, keys in prefill_work(args.quick):
        size = 2 * head_dim * (2 * tokens * HEADS + 2 * keys * KV_HEADS)
        sets = [tuple(torch.randn(1, heads, n, head_dim, device="cuda", dtype=torch.bfloat16)
                      for heads, n in ((HEADS, tokens), (KV_HEADS, keys), (KV_HEADS, keys)))
                for _ in range(min(16, COLD_BYTES // size + 1))]
        mask = ({"is_causal": True} if tokens == keys else
                {"attn_mask": causal_lower_right(tokens, keys)})

        def call(q, k, v):
            gqa = k.shape[1] != q.shape[1]
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **mask)

        times = []
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            try:
                call(*sets[0])
            except RuntimeError:  # without grouped queries: heads expanded outside the timing
                sets = [(q, *(x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)))
                        for q, k, v in sets]
            try:
                for i in range(24):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    call(*sets[i % len(sets)])
                    end.record()
                    end.synchronize()
                    if i >= 4:
                        times.append(begin.elapsed_time(end) * 1e3)
                    if sum(times) > 1e6:
                        break
            except RuntimeError as error:
                print(f"cuDNN refuses {name}: {str(error).splitlines()[0]}")
                continue
        scores = sum(range(keys - tokens + 1, keys + 1))
        row = {"group": "prefill", "name": name, "format": "cuDNN bf16",
               "us": statistics.median(times), "bytes": size,
               "flops": 4 * scores * HEADS * head_dim}
        rows.append(row)
        print(f"{row['name']:32} cuDNN bf16 {row['us']:10.1f} us "
              f"{row['flops'] / row['us'] * 1e-6:6.0f} TFLOP/s")
    with open(args.json, "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                   "cudnn": torch.backends.cudnn.version(), "rows": rows}, file, indent=1)


def rate(row, bandwidth):
    """(number, unit) that the row is judged by."""
    if row["flops"] > 0:
        return row["flops"] / row["us"] * 1e-6, "TFLOP/s"
    return row["bytes"] / row["us"] * 1e8 / bandwidth, "% of read bandwidth"


def report(args):
    runs = [json.load(open(path)) for path in args.runs]
    bandwidth = next(run["read_bandwidth"] for run in runs if "read_bandwidth" in run)
    rows = [row for run in runs for row in run["rows"]]
    groups = list(dict.fromkeys(["prefill", "decode"] + [row["group"] for row in rows]))
    names = list(dict.fromkeys(row["name"] for row in rows))
    rows.sort(key=lambda row: (groups.index(row["group"]), names.index(row["name"])))
    lines = [f"{runs[0]['device']}, reads {bandwidth * 1e-9:.0f} GB/s in this run.", "",
             "| work | kernel | us | TFLOP/s | GB/s | % of read bandwidth |", "|---|---|---|---|---|---|"]
    for row in rows:
        flops = f"{row['flops'] / row['us'] * 1e-6:.0f}" if row["flops"] else ""
        speed = row["bytes"] / row["us"] * 1e-3
        name = row["name"].replace("|", "\\|")
        lines.append(f"| {row['group']} {name} | {row['format']} | {row['us']:.1f} | {flops} | "
                     f"{speed:.0f} | {speed * 1e11 / bandwidth:.1f} |")
    with open(args.markdown, "w") as file:
        file.write("\n".join(lines) + "\n")
    with open(args.svg, "w") as file:
        file.write(plot(rows, bandwidth))


def plot(rows, bandwidth):
    """One bar per row, grouped by work; each group of work on its own scale."""
    colours = ["#4878a8", "#d08030", "#58a058", "#b05050", "#8060a8", "#808080"]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    largest = {}
    for row in rows:
        value, unit = rate(row, bandwidth)
        largest[unit] = max(largest.get(unit, 100), value)
    out, y, last = [], 20, None
    for row in rows:
        label = f"{row['group']} {row['name']}"
        if label != last:
            y += 10
            out.append(f'<text x="250" y="{y + 10}" text-anchor="end">{html.escape(label)}</text>')
            last = label
        value, unit = rate(row, bandwidth)
        width = 400 * value / largest[unit]
        colour = colours[formats.index(row["format"]) % len(colours)]
        out.append(f'<rect x="260" y="{y}" width="{width:.1f}" height="11" fill="{colour}"/>'
                   f'<text x="{265 + width:.1f}" y="{y + 10}">{value:.0f} {unit}, '
                   f'{html.escape(row["format"])}</text>')
        y += 13
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{y + 20}" '
            f'font-family="sans-serif" font-size="11">\n' + "\n".join(out) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("--json", required=True)
    command.add_argument("--quick", action="store_true")
    command.set_defaults(run=measure)
    command = commands.add_parser("report")
    command.add_argument("runs", nargs="+")
    command.add_argument("--markdown", required=True)
    command.add_argument("--svg", required=True)
    command.set_defaults(run=report)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
