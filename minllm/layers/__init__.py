"""The layers: each file is one idea, opens with its formula and its paper, and holds frozen dataclasses with `params`, `cache`, `apply`."""
