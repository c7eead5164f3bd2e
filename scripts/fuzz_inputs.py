#!/usr/bin/env python3
"""Damaged files, settings and command lines: each ends in one error of Harmony's, or well.

    scripts/fuzz_inputs.py [--count 10000] [--seed 0] [--only plan safetensors] [--json]

Every case takes a good input of a kind, damages it (bytes flipped, cut off, repeated; JSON with
nulls, infinities, negative or endless numbers, nesting, control characters), and uses it as a user
would. A case has failed if something else than a HarmonyError came out, if its message would send
control characters to a terminal, or after 30 seconds. Exit code 1 if one has; the number of a case
repeats it (`--seed` and `--only` being the same).
"""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from damage import HOSTILE, damaged_bytes, damaged_json, damaged_words
from torch import nn

import harmony
from harmony.checkpoint.checksums import Checksums
from harmony.checkpoint.store import MANIFEST
from harmony.checkpoint.training import VALUES
from harmony.cli.arguments import parse
from harmony.cli.plan_arguments import PlanRequest, parse_plan
from harmony.cli.plan_command import run as run_plan
from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, Value
from harmony.core.machine import Device, Host, Machine
from harmony.core.units import parse_bytes, parse_rate
from harmony.errors import HarmonyError, printable
from harmony.planner.ir.plan_file import compare_plans, load_plan, save_plan
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.search.search import choose
from harmony.profiling.analytic import LayerWork, Work, WorkTable
from harmony.profiling.cache import MeasureCache
from harmony.profiling.layer_times import KnownTimes
from harmony.profiling.model_profile import ModelProfile, load_profile, save_profile
from harmony.profiling.update_times import UpdateCost

MIB = 2**20
MOST_S = 30


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        damage: makes a case in a folder and returns it.
        use: does with it what a user would.
    """

    damage: Callable[[random.Random], Any]
    use: Callable[[Any], object]


@dataclass(frozen=True)
class Failure:
    """A case that ended otherwise than it should."""

    kind: str
    number: int
    what: str
    where: str


# what is good


def small_model() -> tuple[LayerGraph, CostTable, Machine]:
    """A chain of six layers, with what it costs, on two GPUs."""
    last = 6
    values = tuple(
        Value(v, f"x{v}", v - 1 if v else MODEL_INPUT, (v,) if v < last else (),
              4 if v == last else 4096, requires_grad=v > 0, is_output=v == last)
        for v in range(last + 1)
    )  # fmt: skip
    layers = tuple(
        Layer(i, f"layer{i}", "block", (), MIB, MIB, 2 * MIB, inputs=(i,), outputs=(i + 1,))
        for i in range(last)
    )
    cost = {n: LayerCost(1e-3 * n, 2e-3 * n, 1e-4, 512 * n, 2048 * n, 1024 * n) for n in (1, 4)}
    device = Device("RTX 3090", 12 * MIB, 1e10, 1e10, 1e10, 1e-5, 1e10)
    machine = Machine((device,) * 2, Host(2**30))
    return LayerGraph(layers, values, (), last), CostTable((cost,) * last), machine


class _Sum(nn.Module):
    """Makes a loss of whatever comes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().mean()


class Inputs:
    """Good inputs of every kind, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        graph, costs, machine = small_model()
        once = Work({"fp32": 1e6}, 4096.0, 4096.0, 4.0)
        work = WorkTable(({1: LayerWork(once, once)},) * graph.num_layers)
        self.profile = folder / "good-profile.json"
        name = "RTX 3090"
        made = ModelProfile("chain", graph, costs, name, work, machine, 4, num_params=10)
        save_profile(made, self.profile)
        self.plan = folder / "good-plan.json"
        save_plan(choose(graph, costs, machine, 4), self.plan)
        self.good_plan = load_plan(self.plan)
        self.model: tuple[harmony.Harmony, Any] | None = None

    def kinds(self) -> dict[str, Kind]:
        """All kinds, by name."""
        return {
            "plan": Kind(self._json_of(self.plan), self._use_plan),
            "profile": Kind(self._profile, self._use_profile),
            "paper": Kind(self._json(self._paper(), "paper.json"), load_profile),
            "cache": Kind(self._cache, self._use_cache),
            "safetensors": Kind(self._safetensors, self._load),
            "index": Kind(self._index, self._load),
            "torch file": Kind(self._torch_file, self._load),
            "checkpoint": Kind(self._checkpoint, self._use_checkpoint),
            "checkpoint values": Kind(self._checkpoint_values, self._use_checkpoint),
            "bytes": Kind(self._any_bytes, self._use_bytes),
            "virtual GPUs": Kind(self._vgpu, self._use_vgpu),
            "sizes": Kind(_size, _use_size),
            "command": Kind(self._command, self._use_command),
            "plan command": Kind(self._plan_command, self._use_plan_command),
            "model options": Kind(_options, self._use_options),
        }

    # files

    def _json(self, data: Any, name: str) -> Callable[[random.Random], Path]:
        def damage(draw: random.Random) -> Path:
            return self._file(name, damaged_json(data, draw).encode("utf-8", "surrogatepass"))

        return damage

    def _json_of(self, path: Path) -> Callable[[random.Random], Path]:
        return self._json(json.loads(path.read_text()), path.name.replace("good", "bad"))

    def _profile(self, draw: random.Random) -> Path:
        data = json.loads(self.profile.read_text())
        if draw.random() < 0.7:  # what the fingerprint does not tell
            part = draw.choice(("costs", "work", "machine"))
            text = json.dumps({**data, part: None}).replace(
                f'"{part}": null', f'"{part}": {damaged_json(data[part], draw)}'
            )
            return self._file("bad-profile.json", text.encode())
        return self._json(data, "bad-profile.json")(draw)

    def _file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def _use_plan(self, path: Path) -> None:
        plan = load_plan(path)
        compare_plans(plan, self.good_plan, ("A", "B"))
        request = PlanRequest(model_profile=self.profile, plan=path, gpu=None, explain=True)
        run_plan(request, StringIO())

    def _use_profile(self, path: Path) -> None:
        profile = load_profile(path)
        if profile.graph.num_layers <= 8 and (profile.minibatch or 0) <= 16:
            run_plan(PlanRequest(model_profile=path, explain=True), StringIO())

    def _paper(self) -> dict[str, Any]:
        column = {"1": [1e-3] * 3, "4": [4e-3] * 3}
        names = ("time_s_FWD", "time_s_BWD", "mem_bytes_FWD", "mem_bytes_BWD")
        layers = {"W": [4096] * 3, "B": [0] * 3, "K": [8192] * 3, "X_per_sample": [64] * 3}
        columns = dict.fromkeys(names, column)
        return {"R": 3, "model": "gpt2", **layers, "upd_cpu_s": [1e-4] * 3, **columns}

    def _cache(self, draw: random.Random) -> MeasureCache:
        cache = MeasureCache(self.folder / "cache", "machine", lambda text: None)
        known = KnownTimes({("block", 1): (1e-3, 2e-3), ("block", 4): (4e-3, 8e-3)}, 0.5)
        cache.keep_times(self.net, known)
        cache._write("machine", "None ", small_model()[2].to_json())
        cost = UpdateCost(1e-9, {"torch.float32/2": 8.0}, 1e9, 4.0, True)
        cache._write("update", "adam", dict(cost.__dict__))
        for path in (self.folder / "cache").iterdir():
            if draw.random() < 0.5:
                path.write_bytes(damaged_bytes(path.read_bytes(), draw))
            else:
                text = damaged_json(json.loads(path.read_text()), draw)
                path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return cache

    def _use_cache(self, cache: MeasureCache) -> None:
        from harmony.profiling.cache import _read_update

        times = cache.times(self.net)
        assert all(0 <= s < float("inf") for pair in times.seconds.values() for s in pair)
        cache._read("machine", "None ", Machine.from_json)
        cache._read("update", "adam", _read_update)

    def _safetensors(self, draw: random.Random) -> Path:
        header, at = {}, 0
        for name, tensor in self.net.state_dict().items():
            offsets = [at, at + tensor.nbytes]
            header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": offsets}
            at += tensor.nbytes
        text = damaged_json(header, draw).encode("utf-8", "surrogatepass")
        length = draw.choice((len(text),) * 6 + (0, 2**40, len(text) + 9))
        data = struct.pack("<Q", length) + text + bytes(at)
        data = damaged_bytes(data, draw) if draw.random() < 0.2 else data
        return self._file("bad.safetensors", data)

    def _index(self, draw: random.Random) -> Path:
        torch.save(self.net.state_dict(), self.folder / "shard.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(self.net.state_dict(), "shard.bin")}
        text = damaged_json(index, draw).encode("utf-8", "surrogatepass")
        return self._file("model.safetensors.index.json", text)

    def _torch_file(self, draw: random.Random) -> Path:
        path = self.folder / "bad.bin"
        state: Any = dict(self.net.state_dict())
        if draw.random() < 0.3:
            state[draw.choice(list(state))] = draw.choice(HOSTILE)
        torch.save(state, path)
        return self._file(path.name, damaged_bytes(path.read_bytes(), draw))

    def _load(self, path: Path) -> None:
        harmony.load_pretrained(copy.deepcopy(self.net), path)

    def _any_bytes(self, draw: random.Random) -> Path:
        good = draw.choice((self.plan, self.profile)).read_bytes()
        return self._file("bad.json", damaged_bytes(good, draw))

    def _use_bytes(self, path: Path) -> None:
        for load in (load_plan, load_profile):
            try:
                load(path)
            except HarmonyError:
                continue

    def _checkpoint(self, draw: random.Random) -> Path:
        """One of its files is damaged: no checksum tells that it is meant."""
        root = self._good_checkpoint()
        path = draw.choice(sorted((root / "step-00000001").iterdir()))
        path.write_bytes(damaged_bytes(path.read_bytes(), draw))
        return root

    def _checkpoint_values(self, draw: random.Random) -> Path:
        """Its values are others, and the checksums are right: somebody has made them."""
        root = self._good_checkpoint()
        folder = root / "step-00000001"
        path = folder / VALUES
        text = damaged_json(json.loads(path.read_text()), draw)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest.pop("sha256")
        sums = Checksums()
        sums.add(path.read_bytes())
        manifest["files"][VALUES] = {"nbytes": sums.nbytes, "crc32": sums.finish()}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest}))
        return root

    def _good_checkpoint(self) -> Path:
        """A checkpoint of a model that has trained a step."""
        root = self.folder / "checkpoints"
        if not root.exists():
            model, scheduler = self._trained()
            model.train_step(torch.ones(2, 4))
            model.save_checkpoint(root, scheduler=scheduler)
            shutil.copytree(root / "step-00000001", self.folder / "good-checkpoint")
        shutil.rmtree(root / "step-00000001")
        shutil.copytree(self.folder / "good-checkpoint", root / "step-00000001")
        return root

    def _trained(self) -> tuple[harmony.Harmony, Any]:
        if self.model is None:
            harmony.virtual_gpus(count=1, memory="1MiB")
            options: Any = {"optimizer": torch.optim.Adam, "optimizer_kwargs": {"lr": 0.1}}
            net = nn.Sequential(copy.deepcopy(self.net), _Sum())
            model = harmony.Harmony(net, devices=1, seed=0, **options)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(model.optimizer, [2])
            self.model = model, scheduler
        return self.model

    def _use_checkpoint(self, root: Path) -> None:
        model, scheduler = self._trained()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random_state = random.getstate()
        try:
            model.load_checkpoint(root, scheduler=scheduler)
        except HarmonyError as error:
            now = model.state_dict()
            same = all(torch.equal(now[name], value) for name, value in before.items())
            assert same or "load" in str(error), "half of it was loaded, and nothing says so"
            raise
        finally:
            random.setstate(random_state)
            model.load_state_dict(before)

    # settings

    def _vgpu(self, draw: random.Random) -> str:
        good = ["count=2", "memory=64MiB", "link=8GB/s", "delay_us=5", "slowdown=2", "jitter_us=1"]
        words = damaged_words(good, draw)
        if draw.random() < 0.5:
            name = draw.choice(("count", "memory", "slowdown", "jitter_us", "jitter_seed", "p2p"))
            words.append(f"{name}={draw.choice(HOSTILE)}")
        return ",".join(words).replace("\0", "")

    def _use_vgpu(self, text: str) -> None:
        before = os.environ.get("HARMONY_VGPU")
        os.environb[b"HARMONY_VGPU"] = text.encode("utf-8", "surrogatepass")
        try:
            harmony.virtual_gpus()
        finally:
            os.environ.pop("HARMONY_VGPU")
            if before is not None:
                os.environ["HARMONY_VGPU"] = before

    def _command(self, draw: random.Random) -> list[str]:
        script = str(self._file("train.py", b""))
        good = [script, "--gpus", "2", "--gpu-memory", "64MiB", "--mode", "auto", "--virtual",
                "--link", "8GB/s", "--host-memory", "1GiB", "--plan", str(self.plan),
                "--report", str(self.folder / "r.json"), "--", "--lr", "1"]  # fmt: skip
        return damaged_words(good, draw)

    def _use_command(self, words: list[str]) -> None:
        with quiet():
            parse(words)

    def _plan_command(self, draw: random.Random) -> list[str]:
        good = ["--model-profile", str(self.profile), "--gpu", "RTX 4090", "--gpus", "2",
                "--host-memory", "64GiB", "--minibatch", "4", "--mode", "pp", "--explain",
                "--link", "20GB/s", "--host", "server-ddr4", "--topology", "x16",
                "--microbatch", "2", "--gpu-memory", "20MiB"]  # fmt: skip
        return damaged_words(good, draw)

    def _use_plan_command(self, words: list[str]) -> None:
        with quiet():
            request = parse_plan(words)
            large = (request.minibatch or 0) > 64 or (request.gpus or 0) > 8
            if not large and request.save_plan is None:
                run_plan(request, StringIO())

    def _use_options(self, options: dict[str, Any]) -> None:
        harmony.virtual_gpus(count=2, memory="1MiB")
        harmony.Harmony(copy.deepcopy(self.net), **options)


def _size(draw: random.Random) -> Any:
    if draw.random() < 0.3:
        return draw.choice((*HOSTILE, b"8", (1,), 1.5e9))
    good = draw.choice(("64MiB", "8GB/s", "1.5GB", "500MiB/s"))
    return damaged_bytes(good.encode(), draw).decode("latin-1")


def _use_size(text: Any) -> None:
    for read in (parse_bytes, parse_rate):
        try:
            value = read(text)
        except HarmonyError:
            continue
        assert 0 < value < 2**63, value


def _options(draw: random.Random) -> dict[str, Any]:
    good: dict[str, Any] = {
        "optimizer": torch.optim.SGD,
        "optimizer_kwargs": {"lr": 0.1},
        "max_grad_norm": 1.0,
        "mode": "auto",
        "microbatch_size": 2,
        "devices": 2,
        "device_memory": "1MiB",
        "batch_dims": {"targets": 0},
        "activations": "auto",
        "updates": "auto",
        "replan": True,
        "seed": 3,
        "plan": None,
    }
    for name in draw.sample(sorted(good), draw.choice((1, 1, 2))):
        good[name] = draw.choice((*HOSTILE, [1], {"a": "b"}, ["vgpu:7"], ["meta"], ["nonsense"]))
    return good


# running


@contextmanager
def quiet() -> Iterator[None]:
    """Help that a command line asks for is not shown."""
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = StringIO()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Timeout(BaseException):
    """A case took too long."""


def _too_long(*_: object) -> None:
    raise _Timeout


def attempt(kind: Kind, seed: str) -> tuple[str, Failure | None]:
    """Run one case; return how it ended, and what went wrong if that is not as it should be."""
    name = seed.partition("/")[0]
    number = int(seed.rpartition("/")[2])
    case = kind.damage(random.Random(seed))
    signal.alarm(MOST_S)
    try:
        kind.use(case)
        return "accepted", None
    except HarmonyError as error:
        text = str(error)
        if printable(text) != text or not text:
            return "raw", Failure(name, number, f"cannot be shown: {text!r}", "")
        return "refused", None
    except SystemExit:
        return "accepted", None
    except (Exception, _Timeout) as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        return "raw", Failure(name, number, f"{type(error).__name__}: {str(error)[:120]}", where)
    finally:
        signal.alarm(0)


def fuzz(
    count: int, seed: int, only: list[str] | None = None
) -> tuple[dict[str, collections.Counter[str]], list[Failure]]:
    """Run so many cases, of all kinds in turn.

    Returns:
        How the cases of each kind ended, and those that failed.
    """
    failures: list[Failure] = []
    ended: dict[str, collections.Counter[str]] = {}
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kinds = Inputs(Path(folder)).kinds()
            chosen = [name for name in kinds if only is None or name in only]
            for number in range(count):
                name = chosen[number % len(chosen)]
                outcome, failure = attempt(kinds[name], f"{name}/{seed}/{number}")
                ended.setdefault(name, collections.Counter())[outcome] += 1
                failures += [failure] if failure is not None else []
    finally:
        signal.signal(signal.SIGALRM, before)
    return ended, failures


def main() -> int:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="kinds of input")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    ended, failures = fuzz(args.count, args.seed, args.only)
    if args.json:
        print(json.dumps({"ended": ended, "failures": [f.__dict__ for f in failures]}, indent=1))
        return 1 if failures else 0
    for name, counts in ended.items():
        print(f"{name:<14} {counts['accepted']:6} accepted {counts['refused']:6} refused"
              f" {counts['raw']:6} raw")  # fmt: skip
    for failure in failures[:40]:
        print(f"{failure.kind} {failure.number}: {failure.what!r}  {failure.where}")
    print(f"{sum(sum(c.values()) for c in ended.values())} cases, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
