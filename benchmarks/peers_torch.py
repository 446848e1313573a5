"""Times the AGENT authors' PyTorch optimizer beside torch.optim.SGD; run by peers.py with a Python that has torch.

Its argument is JSON: the folder of the authors' checkout, the sizes of the layers, the density and the rounds. It
prints JSON on its last line: the versions, and the seconds of each call of each step.
"""

import json
import random
import sys
import time
import types
import warnings
from pathlib import Path

import torch


def model(sizes: list[list[int]]) -> torch.nn.Module:
    """Linear layers with gradients of fixed size."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(m, n) for m, n in sizes))
    for parameter in layers.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return layers


def main(request: dict) -> None:
    """Plain SGD, their corrected SGD, and their masked one without and with a topology update."""
    sys.path.insert(0, str(Path(request["folder"]) / "A-ITOP"))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # their masks are made for a GPU; here there may be none
    torch.manual_seed(0)
    import sparselearning.core
    import sparselearning.train_helper

    sparselearning.core.print = lambda *args, **kwargs: None  # they report each update, which is no part of its cost

    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    steps = {}
    plain = model(request["sizes"])
    steps["torch.optim.SGD"] = torch.optim.SGD(plain.parameters(), **settings).step

    def corrected() -> tuple[torch.nn.Module, object, object]:
        current, snapshot = model(request["sizes"]), model(request["sizes"])
        optimizer = sparselearning.train_helper.SGD(current.parameters(), **settings)
        optimizer.set_u(optimizer.get_param_groups())
        return current, optimizer, snapshot

    _, optimizer, snapshot = corrected()
    groups = [{"params": list(snapshot.parameters())}]
    steps["authors, AGENT"] = lambda: optimizer.step(groups, 0.05, 10)

    def masked(every: int) -> object:
        current, optimizer, snapshot = corrected()
        args = types.SimpleNamespace(fix=False, update_frequency=every)
        decay = sparselearning.core.CosineDecay(0.3, 10**6)
        masking = sparselearning.core.Masking(
            optimizer,
            0.3,
            death_mode="magnitude",
            growth_mode="gradient",
            redistribution_mode="none",
            death_rate_decay=decay,
            args=args,
        )
        masking.add_module(current, density=request["density"], sparse_init="ERK")
        groups = [{"params": list(snapshot.parameters())}]
        return lambda: masking.step(groups, 0.05, 10)

    steps["authors, AGENT on RigL"] = masked(10**9)
    steps["authors, AGENT on RigL, topology update"] = masked(1)

    order, seconds = random.Random(0), {name: [] for name in steps}
    warnings.simplefilter("ignore")
    for turn in range(3 + request["rounds"]):
        for name in order.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
