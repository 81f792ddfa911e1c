"""What training costs next to the frozen backbone's forward alone, in the same run.

    python -m benchmarks.training --shape llama-3.1-8b --prompt 10240 --answer 512 --out r.json

A step is one sample: forward, labels, head losses, gradients and the optimizer's update. The floor
is the same tokens through the stock decoder without gradients.

With `--replay TOKENS` the answers are the prompt again, in branches of so many tokens, each led in
by the tokens before it, as trainings do it. The floor is the prompt alone, twice.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.shapes import SHAPES, random_model
from datamodules.encoder import LEAD_TOKENS
from locret.heads.heads import HeadsConfig, RetainingHeads
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment


def main() -> None:
    """Run one setting and write its JSON."""
    given = _parser().parse_args()
    device = torch.device(given.device)
    model = random_model(given.shape, device)
    segment = _segment(given)
    ids = torch.randint(0, model.config.vocab_size, (1, segment.end), device=device)

    @torch.no_grad()
    def forward() -> None:
        for row in [ids[:, : given.prompt]] * 2 if given.replay else [ids]:
            model.model(input_ids=row, use_cache=False)

    step, distill = _training_step(model, given, ids, segment)
    figures = {"forward_peak_gib": record.peak_gib(forward, device)}
    figures["step_peak_gib"] = record.peak_gib(step, device)
    figures["forward_seconds"] = record.seconds(forward, given.repeats, device)
    figures["step_seconds"] = record.seconds(step, given.repeats, device)
    figures["samples_per_second"] = 1 / figures["step_seconds"]
    figures["share_of_forward"] = figures["forward_seconds"] / figures["step_seconds"]
    figures["why_not_fused"] = distill.why_not_fused
    for name, value in figures.items():
        print(f"{name:<20} {round(value, 4) if isinstance(value, float) else value}")
    record.write(given.out, vars(given), figures)


def _segment(given: argparse.Namespace) -> Segment:
    """The sample of a step."""
    if not given.replay:
        return Segment.single(given.prompt, given.prompt + given.answer)
    branches, answers, at = [], [], given.prompt
    for start in range(0, given.prompt, given.replay):
        led_in = min(LEAD_TOKENS, start)
        end = at + led_in + min(given.replay, given.prompt - start)
        branches.append((at, end))
        answers.append((at + led_in, end))
        at = end
    return Segment(0, at, tuple(answers), tuple(branches))


def _training_step(model, given, ids, segment):  # type: ignore[no-untyped-def]
    backbone = Backbone(model)
    config = HeadsConfig.for_geometry(
        backbone.geometry, given.width, tap=given.tap, label=given.label
    )
    heads = RetainingHeads(config).to(ids.device).train()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-4, fused=ids.device.type == "cuda")
    distill = Distillation(backbone, heads, keep_scores=True, chunk_size=given.chunk_size)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = distill(ids, [segment]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, distill


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--prompt", type=int, default=10240, help="tokens")
    parser.add_argument("--answer", type=int, default=512, help="tokens")
    parser.add_argument("--replay", type=int, help="tokens of a piece of the prompt said again")
    parser.add_argument("--width", type=int, default=1024, help="hidden width of a head")
    parser.add_argument(
        "--chunk-size", type=int, help="tokens a layer reads at a time; default all"
    )
    parser.add_argument("--label", default="max_logit")
    parser.add_argument("--tap", default="qkv")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
