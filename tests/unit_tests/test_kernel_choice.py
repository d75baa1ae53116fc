"""Of two kinds of kernels for experts the faster one is used, stored, and found again.

A table of times stands for the GPU's clock.
"""

import json
from dataclasses import replace

import pytest
import torch

from torchtitan import kernel_choice
from torchtitan.kernel_choice import CANDIDATES, Shape, faster
from torchtitan.logging import logger
from torchtitan.ops import experts

CPU = torch.device("cpu")
SHAPE = Shape(32, 64, 4, 6, 2, "swiglu", weighted=True, gathered=True)
FUSED, UNFUSED = {"fused": 1.25, "unfused": 1.5}, {"fused": 2.0, "unfused": 1.75}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / kernel_choice.FILE


def measures(monkeypatch, times):
    """What is measured from now on; the list that is returned fills with the shapes."""
    shapes = []

    def measure(shape, device):
        shapes.append(shape)
        return times

    monkeypatch.setattr(kernel_choice, "measure", measure)
    return shapes


@pytest.mark.parametrize("times, best", [(FUSED, "fused"), (UNFUSED, "unfused")])
def test_the_faster_one_is_chosen_and_said(times, best, path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="torchtitan")
    measures(monkeypatch, times)
    assert faster(SHAPE, CPU, path) == best
    [line] = caplog.messages
    assert line == (
        f"experts' kernels: {best}; forward and backward take fused {times['fused']:.3f} ms, unfused "
        f"{times['unfused']:.3f} ms (4 experts of width 64 x 32, 6 tokens x 2, swiglu, weighted, gathered; "
        f"kept in {path})"
    )


def test_what_was_measured_once_stays(path, monkeypatch):
    measures(monkeypatch, UNFUSED)
    assert faster(SHAPE, CPU, path) == "unfused"
    again = measures(monkeypatch, FUSED)
    assert faster(SHAPE, CPU, path) == "unfused" and not again


def test_another_shape_gpu_or_pytorch_is_measured_too(path, monkeypatch):
    measures(monkeypatch, UNFUSED)
    faster(SHAPE, CPU, path)
    again = measures(monkeypatch, FUSED)
    wider = replace(SHAPE, hidden_dim=128)
    assert faster(wider, CPU, path) == "fused"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert faster(SHAPE, CPU, path) == "fused"
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert faster(SHAPE, CPU, path) == "fused"
    assert again == [wider, SHAPE, SHAPE]
    assert len(json.loads(path.read_text())) == 4


@pytest.mark.parametrize(
    "field, value",
    [
        *((name, 96) for name in ("dim", "hidden_dim", "num_experts", "num_tokens", "top_k")),
        ("activation", "gpt_oss"),
        *((name, False) for name in ("weighted", "gathered")),
    ],
)
def test_shapes_that_differ_have_other_names(field, value):
    assert str(replace(SHAPE, **{field: value})) != str(SHAPE)


DAMAGED = {
    "cut off": lambda text: text[:-5],
    "not text": lambda text: b"\xff\xfe",
    "no table": lambda text: "[]",
    "no choice": lambda text: json.dumps(dict.fromkeys(json.loads(text))),
    "another choice": lambda text: text.replace('"backend": "unfused"', '"backend": "other"'),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_measured_again(damage, path, monkeypatch):
    measures(monkeypatch, UNFUSED)
    faster(SHAPE, CPU, path)
    content = damage(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    again = measures(monkeypatch, FUSED)
    assert faster(SHAPE, CPU, path) == "fused" and again == [SHAPE]
    assert faster(SHAPE, CPU, path) == "fused" and again == [SHAPE]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ValueError("no such kernel")])
def test_what_cannot_be_measured_leaves_the_rule_for_good(error, path, monkeypatch, caplog):
    def fail(shape, device):
        raise error

    monkeypatch.setattr(kernel_choice, "_take_turns", fail)
    for name in ("empty_cache", "reset_peak_memory_stats", "reset_accumulated_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    assert faster(SHAPE, CPU, path) == "auto"
    assert f"could not be measured ({SHAPE}): {error}" in caplog.text
    again = measures(monkeypatch, UNFUSED)
    assert faster(SHAPE, CPU, path) == "auto" and not again


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_file_that_cannot_be_used_ends_no_run(where, path, monkeypatch, caplog):
    if where == "file":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("not a folder")
    measures(monkeypatch, UNFUSED)
    assert faster(SHAPE, CPU, path) == "unfused"
    assert "is not kept" in caplog.text


@pytest.mark.parametrize("weighted, gathered", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("num_tokens", [6, 5])
def test_candidates_take_turns_and_are_not_said(
    weighted, gathered, num_tokens, monkeypatch, caplog
):
    """Each kind of step runs, on experts that get equally many rows, as far as these go round."""
    shape = replace(SHAPE, num_tokens=num_tokens, weighted=weighted, gathered=gathered)
    caplog.set_level("INFO", logger="torchtitan")
    step_of, used = kernel_choice._workload, []

    def workload(*args):
        layer, step = step_of(*args)
        layer.register_forward_pre_hook(lambda layer, args: used.append((layer.backend, *args)))
        return layer, step

    def milliseconds(step):
        d_x, *others = step()
        assert d_x.dtype == torch.bfloat16 and all(d.any() and d.isfinite().all() for d in (d_x, *others))
        assert len(others) == 2 + weighted
        return float(len(used))  # later ones take longer

    monkeypatch.setattr(kernel_choice, "_workload", workload)
    monkeypatch.setattr(kernel_choice, "_milliseconds", milliseconds)
    random = torch.get_rng_state()
    level = logger.level
    with experts.trial():
        times = kernel_choice._take_turns(shape, CPU)
    assert not caplog.messages and logger.level == level
    assert torch.equal(random, torch.get_rng_state())
    warm_ups, repeats = kernel_choice._WARM_UPS, kernel_choice._REPEATS
    turns = [name for name in CANDIDATES for _ in range(warm_ups)] + [*CANDIDATES] * repeats
    assert [backend for backend, *_ in used] == turns
    assert times == {"fused": 2 * warm_ups + repeats, "unfused": 2 * warm_ups + repeats + 1}
    _, x, counts, scores, order = used[0]
    assert counts.sum() == num_tokens * 2 and counts.max() - counts.min() <= 1
    assert len(x) == (num_tokens if gathered else num_tokens * 2)
    assert (scores is not None) == weighted and (order is not None) == gathered


def test_what_multiplies_is_said_after_a_trial(caplog):
    caplog.set_level("INFO", logger="torchtitan")
    layer, step = kernel_choice._workload(SHAPE, CPU)
    with experts.trial():
        step()
    assert not caplog.messages
    step()
    step()
    assert caplog.messages == ["experts of width 64 x 32 multiply in torch.bfloat16 by grouped GEMM"]
