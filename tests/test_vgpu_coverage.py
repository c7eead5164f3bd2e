"""The operator sweep: on a few samples of operators of all families, and how it meets trouble."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from harmony.vgpu import api as vgpu

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import operator_check
import vgpu_coverage
from operator_check import GOOD, Verdict

SUBSET = """
add mul matmul addmm bmm einsum cat where expand as_strided view_as_complex arange empty_like
nn.functional.linear nn.functional.conv1d nn.functional.conv2d nn.functional.conv3d
nn.functional.conv_transpose2d nn.functional.max_pool2d nn.functional.avg_pool2d
nn.functional.adaptive_avg_pool2d nn.functional.max_unpool2d nn.functional.batch_norm
nn.functional.layer_norm nn.functional.group_norm nn.functional.rms_norm nn.functional.mse_loss
nn.functional.smooth_l1_loss nn.functional.cross_entropy nn.functional.multilabel_margin_loss
nn.functional.ctc_loss nn.functional.embedding nn.functional.embedding_bag
nn.functional.scaled_dot_product_attention nn.functional.dropout nn.functional.gelu
nn.functional.interpolate.bilinear nn.functional.grid_sample nn.functional.pad.reflect
softmax.with_dtype gather scatter scatter_add index_put index_add masked_select nonzero
nonzero_static unique histc sort topk cumsum std norm fft.rfft2 fft.hfft2 fft.irfftn linalg.svd
linalg.eig linalg.lstsq linalg.qr linalg.solve to_sparse sparse.mm.reduce sparse.sampled_addmm
tensor_split multinomial bernoulli cdist mode native_batch_norm torch._scaled_mm
abs complex logical_and log_softmax nn.functional.l1_loss
"""
NAMES = SUBSET.split()


@pytest.fixture(scope="module")
def operators():
    return operator_check.database()


@pytest.fixture(autouse=True)
def one_thread():
    vgpu.virtual_gpus(count=2, memory="1GiB")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_an_operator_of_the_database_agrees_with_the_cpu(name, operators):
    if name not in operators:
        pytest.skip("not in this PyTorch's database")
    verdict = operator_check.check(operators[name], num_samples=4)
    assert verdict.outcome in GOOD and verdict.num_samples > 0, verdict


def test_a_wrong_result_is_found(operators):
    op = operators["mul"]
    samples = op.sample_inputs("cpu", torch.float32, requires_grad=True)
    sample = next(s for s in samples if s.input.dim() == 2)

    def again(offset):
        return operator_check.run_sample(op, op, sample, "cpu", offset)

    expected, actual = again(0), again(0)
    assert operator_check.compare(op, expected, actual, again) == ("identical", "")
    bits = actual.outputs[0].view(torch.int32)
    bits.view(-1)[0] ^= 1
    assert operator_check.compare(op, expected, actual, again)[0] == "close"
    actual.outputs[0].mul_(1.01)
    assert operator_check.compare(op, expected, actual, again)[0] == "wrong"
    turned = operator_check.Run([actual.outputs[0].t().contiguous().t()], actual.grads)
    assert "instead of" in operator_check.compare(op, expected, turned, again)[1]


class DyingWorker(vgpu_coverage.Worker):
    """Ends at the name "dies", never answers to "hangs"."""

    program = """
import json, os, sys, time
for line in sys.stdin:
    if line == "dies\\n": os.abort()
    if line == "hangs\\n": time.sleep(1000)
    print(json.dumps({"name": line.strip(), "outcome": "identical"}), flush=True)
"""

    def command(self):
        return [sys.executable, "-c", self.program]


def test_an_operator_that_crashes_or_hangs_does_not_end_the_sweep(monkeypatch):
    monkeypatch.setattr(vgpu_coverage, "Worker", DyingWorker)
    monkeypatch.setattr(vgpu_coverage, "STARTUP_S", 0.0)
    names = ["a", "dies", "b", "hangs", "c"]
    found = vgpu_coverage.sweep(names, num_jobs=2, limit_s=1.0, tell=lambda verdict: None)
    assert {v.name: v.outcome for v in found} == {
        "a": "identical", "b": "identical", "c": "identical", "dies": "crash", "hangs": "crash",
    }  # fmt: skip
    assert f"code -{signal.SIGABRT.value}" in next(v.reason for v in found if v.name == "dies")


def test_the_bar_counts_what_is_skipped_and_fails_on_anything_wrong(tmp_path, monkeypatch):
    good = [Verdict(f"op{i}", "identical") for i in range(98)]
    skipped = [Verdict("s1", "skipped", "no | sample"), Verdict("s2", "raises")]
    assert vgpu_coverage.passes(good + skipped)
    assert not vgpu_coverage.passes(good[1:] + skipped)
    assert not vgpu_coverage.passes([*good, Verdict("bad", "wrong")])
    assert vgpu_coverage.summary(good + skipped).startswith("98 of 100 operators agree (98.0%)")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{vgpu_coverage.BEGIN}\nold\n{vgpu_coverage.END}\nafter\n")
    monkeypatch.setattr(vgpu_coverage, "DOCS", page)
    vgpu_coverage.write_docs(good + skipped)
    text = page.read_text()
    assert "| `s1` | skipped | no \\| sample |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
