"""Bringing weights to the GPU by several threads. On the CPU the same threads, buffers and jobs run, without streams."""

import copy
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.rows import CONCATENATED, INTERLEAVED, w13_rows
from gptoss_nf4.vllm import transfer as module
from gptoss_nf4.vllm.config import GptOssNf4Config
from gptoss_nf4.vllm.expert_weights import W2, W13, ExpertWeight, Part
from gptoss_nf4.vllm.kernels import tiles
from gptoss_nf4.vllm.model import GptOssForCausalLM
from gptoss_nf4.vllm.moe import Nf4MoEMethod
from gptoss_nf4.vllm.settings import Settings
from gptoss_nf4.vllm.transfer import Transfer, groups

CPU = torch.device("cpu")
EXPERTS, HIDDEN, INTERMEDIATE = 5, 192, 72


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Some experts a job, and few jobs at a time: what gpt-oss-20b's sizes give."""
    monkeypatch.setattr(module, "GROUP_BYTES", 40_000)
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 120_000)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread.name for thread in threading.enumerate() if "nf4-transfer" in thread.name]


def nibble(codes: torch.Tensor, row: int, column: int) -> int:
    """The code of a weight as a checkpoint stores it: the first of two in the high nibble; 0 beyond the last row."""
    return 0 if row >= len(codes) else int(codes[row, column // 2]) >> (0 if column % 2 else 4) & 15


@pytest.mark.parametrize(("rows", "inputs", "count"), [(16, 64, 128), (20, 64, 64), (7, 32, 96)])
def test_packed_words_hold_the_nibbles_that_the_table_in_tiles_names(rows, inputs, count):
    """Word by word from the module's docstring: lane 4g + t, word 2q + e, nibble 4h + 2r + p."""
    codes = torch.randint(0, 256, (rows, count // 2), dtype=torch.uint8)
    packed = tiles.pack_codes(codes, inputs)
    for row_tile, input_tile, lane, word in torch.cartesian_prod(*(torch.arange(size) for size in packed.shape)).tolist():
        (g, t), (q, e) = divmod(lane, 4), divmod(word, 2)
        expected = 0
        for h, r, p in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
            row, column = 16 * row_tile + 8 * r + g, inputs * input_tile + 32 * q + 8 * t + 4 * e + 2 * h + p
            expected |= nibble(codes, row, column) << 4 * (4 * h + 2 * r + p)
        assert int(packed[row_tile, input_tile, lane, word]) & 0xFFFFFFFF == expected


def weight(kind: type[ExpertWeight], order: str, tp_size: int, tp_rank: int, packed: bool) -> ExpertWeight:
    rows, columns = (2 * INTERMEDIATE // tp_size, HIDDEN) if kind is W13 else (HIDDEN, INTERMEDIATE // tp_size)
    if kind is W2:
        columns = 192 // tp_size  # 3 blocks, of which two ranks have one and a half
    settings = Settings(quant_type="nf4", blocksize=64, w13_order=order)
    return kind(rows, columns, settings=settings, tp_size=tp_size, tp_rank=tp_rank, packed=packed, prefix="layer")


def stored(part: Part, kind: type[ExpertWeight], experts: int = EXPERTS) -> torch.Tensor:
    """A tensor of the checkpoint for `part`: of all ranks, in rows of any order."""
    rows, columns = (2 * INTERMEDIATE, HIDDEN) if kind is W13 else (HIDDEN, 192)
    if part.name.endswith("_codes"):
        return torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    if part.name.endswith("_absmax"):
        return torch.rand(experts, rows, columns // 64)
    return torch.randn(experts, rows).to(torch.bfloat16)


def loaded(part: Part, tensor: torch.Tensor, threads: int, expert_map: torch.Tensor | None = None) -> torch.Tensor:
    """What the loader of `part` leaves in its parameter."""
    transfer = Transfer()
    kept = part.kept(torch.empty(part.shape, dtype=part.dtype, device="meta"))
    parameter = torch.nn.Parameter(torch.ones(kept.shape, dtype=kept.dtype), requires_grad=False)
    method = SimpleNamespace(prefix="layer", transfer=transfer)
    load = Nf4MoEMethod._loader(method, SimpleNamespace(expert_map=expert_map), part)
    with transfer.opened(CPU, threads):
        load(parameter, tensor)
    return parameter.data


@pytest.mark.parametrize("order", [INTERLEAVED, CONCATENATED])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("tp_size", "tp_rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("kind", [W13, W2])
def test_threads_leave_what_one_thread_would(kind, tp_size, tp_rank, packed, order):
    for part in weight(kind, order, tp_size, tp_rank, packed).parts(EXPERTS, torch.bfloat16):
        tensor = stored(part, kind)
        at_once = part.kept(part.of_rank(tensor))
        for threads in (0, 1, 3):
            assert torch.equal(loaded(part, tensor, threads), at_once), (part.name, threads)


def test_parts_are_those_of_the_source_rows():
    """Against rows counted by hand: gate and up of the second of two ranks, in tiles of 16 gate and 16 up rows."""
    whole = torch.arange(2 * INTERMEDIATE, dtype=torch.float32).view(1, -1, 1).repeat(1, 1, HIDDEN // 64) / 256
    part = weight(W13, CONCATENATED, 2, 1, packed=True).parts(1, torch.bfloat16)[1]
    found = loaded(part, whole[:, w13_rows(CONCATENATED, whole.shape[1])], threads=2)[0, :, 0]  # [R, 16]: rows 0, 8, 1 ...
    gate, up = range(INTERMEDIATE, 2 * INTERMEDIATE, 2), range(INTERMEDIATE + 1, 2 * INTERMEDIATE, 2)
    in_a_tile = [row for pair in zip(range(8), range(8, 16), strict=True) for row in pair]
    for tile, rows in enumerate((gate[:16], up[:16], gate[16:32], up[16:32])):
        assert found[tile].tolist() == [rows[place] for place in in_a_tile]


@pytest.mark.parametrize("order", [INTERLEAVED, CONCATENATED])
@pytest.mark.parametrize("kind", [W13, W2])
def test_ranks_together_compute_what_one_rank_does(kind, order):
    """In float64: each rank's rows of w13 beside each other, and the sums of w2 over its columns, bias and all."""
    whole = weight(kind, order, 1, 0, packed=False)
    tensors = [stored(part, kind) for part in whole.parts(EXPERTS, torch.bfloat16)]
    x = torch.randn(EXPERTS, HIDDEN, dtype=torch.float64)  # w2 has as many columns here, 192
    results = []
    for rank in (0, 1):
        each = weight(kind, order, 2, rank, packed=False)
        parts = [
            part.kept(part.of_rank(tensor))
            for part, tensor in zip(each.parts(EXPERTS, torch.bfloat16), tensors, strict=True)
        ]
        mine = x if kind is W13 else x[:, rank * each.columns : (rank + 1) * each.columns]
        results.append(product(*parts, each.blocksize, mine))
    expected = product(*tensors, 64, x)
    if kind is W13 and order == CONCATENATED:  # ranks hold them interleaved
        gate, up = expected.chunk(2, dim=-1)
        expected = torch.stack((gate, up), -1).flatten(-2)
    found = torch.cat(results, -1) if kind is W13 else results[0] + results[1]
    torch.testing.assert_close(found, expected)


def product(codes: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor, blocksize: int, x: torch.Tensor) -> torch.Tensor:
    """Of each expert [rows, columns], with the codes themselves for values, and its row of x: float64 [E, rows]."""
    values = torch.stack((codes >> 4, codes & 15), -1).flatten(-2) * absmax.double().repeat_interleave(blocksize, -1)
    return torch.einsum("erc,ec->er", values, x) + bias.double()


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 3, 5], [4, 5], [5, 0, 3], [2], []])
def test_experts_of_a_rank(numbers):
    """Consecutive ones, every second one (vLLM's round robin), any, and none."""
    expert_map = torch.full((6,), -1, dtype=torch.int32)
    expert_map[numbers] = torch.arange(len(numbers), dtype=torch.int32)
    part = weight(W2, INTERLEAVED, 1, 0, packed=False).parts(len(numbers), torch.bfloat16)[0]
    tensor = stored(part, W2, experts=6)
    assert torch.equal(loaded(part, tensor, 2, expert_map), tensor[numbers])


def test_shapes_are_checked_before_anything_is_copied():
    part = weight(W13, CONCATENATED, 2, 1, packed=True).parts(EXPERTS, torch.bfloat16)[0]
    with pytest.raises(UserError, match=r"wrong shape: layer.w13_codes: got \[5, 72, 64\], expected \[5, 72, 96\]"):
        loaded(part, stored(part, W13)[..., :64], threads=2)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -256.0, 300.0])
def test_absmax_that_float16_cannot_hold_is_refused(bad, threads):
    part = weight(W2, INTERLEAVED, 1, 0, packed=True).parts(EXPERTS, torch.bfloat16)[1]
    tensor = stored(part, W2)
    tensor[-1, -1, -1] = bad
    with pytest.raises(UserError, match=r"absmax out of range: layer.w2_absmax"):
        loaded(part, tensor, threads)


def test_absmax_in_range_is_kept():
    part = weight(W2, INTERLEAVED, 1, 0, packed=True).parts(EXPERTS, torch.bfloat16)[1]
    tensor = stored(part, W2)
    tensor[-1, -1, -1] = -255.0
    assert loaded(part, tensor, threads=2)[-1, -1, -1, -1] == -255 * 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[:, ::2], lambda t: t.transpose(0, 1), lambda t: t[3:, 5:]])
def test_a_copy_equals_any_view(dtype, view):
    tensor = view(torch.randint(0, 200, (400, 300)).to(dtype))
    transfer = Transfer()
    with transfer.opened(CPU, 3):
        copied = transfer.on_device(tensor)
        assert torch.equal(copied, tensor)  # before the end
        assert copied.data_ptr() != tensor.data_ptr()
        assert copied.is_contiguous()
    assert transfer.on_device(tensor) is tensor


def test_groups_cover_the_first_axis_once():
    tensor = torch.arange(300 * 100, dtype=torch.int32).view(300, 100)
    found = list(groups(tensor))
    assert [first for first, _ in found] == [0, 100, 200]
    assert torch.equal(torch.cat([rows for _, rows in found]), tensor)
    assert all(rows.nbytes <= module.GROUP_BYTES for _, rows in found)
    assert [len(rows) for _, rows in groups(torch.zeros(3, 1_000_000, dtype=torch.uint8))] == [1, 1, 1]
    assert list(groups(torch.zeros(0, 4))) == []


def each(transfer: Transfer, use, items: int = 40) -> None:
    """`items` jobs of one group of 40,000 bytes each."""
    transfer.each(torch.zeros(items, 40_000, dtype=torch.uint8), lambda rows: rows, use)


@pytest.mark.parametrize("ask", [lambda t: t.settle(), lambda t: each(t, lambda first, rows: None), lambda t: None])
def test_the_first_error_of_a_thread_is_raised_as_it_is(ask):
    """By the next call, or at the end."""
    error, seen = UserError("bad", where="there", got=1, expected=2, next_step="stop"), []

    def use(first: int, rows: torch.Tensor) -> None:
        seen.append(first)
        if first == 1:
            raise error

    def load() -> None:
        transfer = Transfer()
        with transfer.opened(CPU, 1):
            each(transfer, use, items=3)
            ask(transfer)

    with pytest.raises(UserError) as raised:
        load()
    assert raised.value is error
    assert seen == [0, 1]  # what waits behind an error is dropped


def test_an_error_of_the_caller_drops_what_waits():
    gate, seen = threading.Event(), []

    def use(first: int, rows: torch.Tensor) -> None:
        gate.wait(10)
        seen.append(first)

    def fail() -> None:
        with transfer.opened(CPU, 1):
            each(transfer, use, items=3)
            threading.Timer(0.1, gate.set).start()
            raise ZeroDivisionError

    transfer = Transfer()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [0]
    with transfer.opened(CPU, 1):  # and it can be opened again
        each(transfer, use, items=2)
    assert seen == [0, 0, 1]


def test_waiting_tensors_are_bounded():
    """Three groups fit into MAX_WAITING_BYTES. The fourth is taken when one is done."""
    gates, asked = [threading.Event() for _ in range(6)], []

    def tensors():
        for number in range(6):
            asked.append(number)
            yield torch.zeros(1, 40_000, dtype=torch.uint8)

    transfer = Transfer()

    def load() -> None:
        with transfer.opened(CPU, 1):
            for number, tensor in enumerate(tensors()):
                transfer.each(tensor, lambda rows: rows, lambda first, rows, gate=gates[number]: gate.wait(10))

    thread = threading.Thread(target=load)
    thread.start()
    for done in range(3):
        thread.join(0.1)
        assert asked == list(range(4 + done))  # the last one asked for waits for room
        gates[done].set()
    for gate in gates:
        gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_after_settle_a_tensor_may_change():
    tensor, found = torch.ones(9, 20_000, dtype=torch.uint8), {}
    transfer = Transfer()
    with transfer.opened(CPU, 3):
        transfer.each(tensor, lambda rows: rows, lambda first, rows: found.update({first: rows}))
        transfer.settle()
        tensor.zero_()
    assert sum(int(rows.sum()) for rows in found.values()) == tensor.numel()


class Stream:
    """One of a GPU that is not here. It notes what is asked of it."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} is done")


def test_a_job_runs_on_its_threads_stream_which_the_caller_can_wait_for(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: log.append(f"on {stream.name}") or nullcontext())
    workers = module._Workers(CPU, 2)
    for number, lane in enumerate(workers._lanes):
        lane.stream = Stream(str(number), log)
    steps = {
        workers.follow_caller: ["0 waits for caller", "1 waits for caller"],
        workers.let_caller_follow: ["caller waits for 0", "caller waits for 1"],
        workers.finish: ["0 is done", "1 is done"],
    }
    for step, expected in steps.items():
        step()
        assert log == expected
        log.clear()
    workers.submit(1, lambda lane: log.append(f"job of {lane.stream.name}"))
    workers.settle()
    assert log in (["on 0", "job of 0"], ["on 1", "job of 1"])
    workers.stop()
    with module._Lane(CPU).running():
        assert len(log) == 2


def test_the_config_that_holds_it_can_be_copied_and_sent():
    """vLLM sends its configuration to other processes."""
    config = GptOssNf4Config(Settings(quant_type="nf4", blocksize=64, w13_order=INTERLEAVED))
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.settings == config.settings
        assert other.transfer is not config.transfer


class Watched(Transfer):
    """Counts calls of `settle` by others."""

    settled = 0

    def settle(self) -> None:
        self.settled += 1
        super().settle()


@pytest.mark.parametrize(("load_format", "settled"), [("auto", 0), ("runai_streamer", 3)])
@pytest.mark.parametrize("threads", [0, 2])
def test_the_stream_is_scaled_and_the_checkpoint_is_not(monkeypatch, load_format, settled, threads):
    monkeypatch.setattr("gptoss_nf4.vllm.model.GROUP_BYTES", 10_000)
    config = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
    model = SimpleNamespace(vllm_config=config, residual_scale=2.0**-6)
    large, small = torch.randn(100, 100).to(torch.float16), torch.randn(3)
    experts = torch.rand(2, 100, 30)
    weights = {
        "model.embed_tokens.weight": large,
        "model.norm.weight": small,
        "model.layers.0.mlp.experts.w2.bias": experts,
    }
    before = {name: tensor.clone() for name, tensor in weights.items()}
    transfer = Watched()
    with transfer.opened(CPU, threads):
        found = dict(GptOssForCausalLM._arriving(model, weights.items(), transfer))
        assert transfer.settled == settled
    assert torch.equal(found["model.embed_tokens.weight"], large / 64)
    assert torch.equal(found["model.layers.0.mlp.experts.w2.bias"], experts / 64)
    assert found["model.norm.weight"] is small
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4)])
def test_bytes_are_those_of_the_values_in_their_order(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    for each in (tensor, tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor, tensor[..., ::2], tensor[::2]):
        values = torch.from_numpy(module.as_bytes(each).copy()).view(dtype)
        assert torch.equal(values, each)
    assert np.shares_memory(module.as_bytes(tensor), tensor.view(torch.uint8).numpy())
