"""Draw a pipeline schedule: stages by time, one colour an operation, the microbatch in each box.

    python scripts/draw_pipeline.py docs/pipeline.png --stages 4 --microbatches 8
"""

import argparse

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from minllm.parallel import schedule

COLOURS = {"F": "#7aa6d8", "B": "#8fc98f", "W": "#e6b566"}


def draw(axes, kind: str, stages: int, microbatches: int, chunks: int) -> None:
    slots = schedule.table(kind, stages, microbatches, chunks)
    costs = {"F": 1.0, "B": 1.0, "W": 1.0} if kind == "zero_bubble" else {"F": 1.0, "B": 2.0}
    start = 0.0
    for slot in slots:
        width = max(costs[op.kind] for op in slot if op)
        for s, op in enumerate(slot):
            if op:
                axes.barh(
                    s, costs[op.kind], left=start, color=COLOURS[op.kind], alpha=1 - 0.4 * op.chunk / chunks, edgecolor="white", height=0.9
                )
                axes.text(start + costs[op.kind] / 2, s, op.microbatch, ha="center", va="center", fontsize=7)
        start += width
    axes.set_title(
        f"{kind}, {chunks} chunk{'s' * (chunks > 1)} a stage: bubble {schedule.bubble(slots, costs):.1%}", fontsize=9, loc="left"
    )
    axes.set_yticks(range(stages), [f"stage {s}" for s in range(stages)], fontsize=7)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="an image file")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    args = parser.parse_args()
    kinds = [("gpipe", 1), ("1f1b", 1), ("1f1b", 2), ("zero_bubble", 1)]
    figure, axes = plt.subplots(len(kinds), figsize=(12, 0.45 * (args.stages + 1) * len(kinds)), sharex=False, layout="constrained")
    for each, (kind, chunks) in zip(axes, kinds):
        draw(each, kind, args.stages, args.microbatches, chunks)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    figure.legend(handles, ["F forward", "B backward", "W weights' gradient"], ncols=3, fontsize=8, loc="outside lower center")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
