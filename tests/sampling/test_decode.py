"""Decoding: fast decoders equal the plain inverse, chunks are exact where that is guaranteed, errors are bounded."""

import copy
import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows.tarflow import TarFlow, unpatchify
from tarflow_scale.sampling.decode import Schedule, TarFlowDecoder
from tarflow_scale.sampling.network import BlockNetwork, _checksum
from tarflow_scale.sampling.windows import OneQuery
from tests.flows.catalogue import GEMMA, STARFLOW

NAMES = ["free", "bounded", "starflow", "gemma"]
GUIDANCES = [
    None,
    Guidance(scale=1.5),
    Guidance(scale=1.5, annealed=True),
    Guidance(scale=0.8, attention_temperature=0.7, what="mean"),
    Guidance(scale=0.8, what="log_scale"),
    Guidance(scale=1.2, rule="gaussian"),
]


def flow_of(seed: int = 0, classes: int | None = 5, depth: tuple[int, ...] = (2, 1, 2), **options: object) -> TarFlow:
    torch.manual_seed(seed)
    sizes = {"patch_size": 2, "width": 32, "layers_per_block": depth, "head_width": 16}
    config = TarFlowConfig.model_validate(sizes | options)
    flow = TarFlow((3, 8, 8), classes, config)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.add_((0.01 if "proj_out" in name else 0.1) * torch.randn_like(parameter))
    return flow.eval()


def latents_of(flow: TarFlow, num: int = 6) -> tuple[Tensor, Tensor | None]:
    z = torch.randn(num, flow.num_dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = None if flow.num_classes is None else torch.tensor([0, 1, 2, 3, -1, 4] * math.ceil(num / 6))[:num]
    return z.to(next(flow.parameters())), y


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("options", [{}, {"log_scale_bound": 0.5}, STARFLOW, GEMMA], ids=NAMES)
def test_it_is_the_plain_inverse(guidance: Guidance | None, options: dict[str, object]) -> None:
    flow = flow_of(**options).double()
    z, y = latents_of(flow)
    found, reports = TarFlowDecoder(flow)(z, y, guidance)
    with torch.no_grad():
        assert (found - flow.inverse(z, y, guidance)).abs().max() < 1e-12
    assert [(report.chunk, set(report.iterations)) for report in reports] == [(1, {1})] * 3


def test_flows_without_labels_or_scales_decode_alike() -> None:
    flow = flow_of(classes=None, variant="volume_preserving").double()
    assert flow.log_std is not None
    z, y = latents_of(flow)
    with torch.no_grad():
        assert (TarFlowDecoder(flow)(z, y)[0] - flow.inverse(z, y)).abs().max() < 1e-12
    weak = Guidance(scale=1.0, attention_temperature=0.5)
    with torch.no_grad():
        assert (TarFlowDecoder(flow)(z, y, weak)[0] - flow.inverse(z, y, weak)).abs().max() < 1e-12


def test_guidance_in_the_first_block_alone_leaves_the_others_alone() -> None:
    flow = flow_of().double()
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow)
    tokens = decoder.tokens_of(z)
    for number in range(3):
        guidance = Guidance(scale=2.0) if number == 0 else None
        tokens, _ = decoder.decode_block(number, tokens, y, guidance, Schedule())
    found = decoder(z, y, Guidance(scale=2.0, blocks="first"))[0]
    assert torch.equal(found, unpatchify(tokens, 2, 8))
    assert (found - decoder(z, y, Guidance(scale=2.0))[0]).abs().max() > 1e-4
    assert (found - decoder(z, y)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("guidance", [None, Guidance(scale=1.0, annealed=True)], ids=str)
@pytest.mark.parametrize("chunk", [2, 5, 15, 100])
def test_a_chunk_of_c_tokens_is_exact_after_c_iterations(chunk: int, guidance: Guidance | None) -> None:
    """For any distance of the iterates; this guarantee makes parallel decoding safe."""
    flow = flow_of().double()
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow)
    exact = decoder(z, y, guidance)[0]
    found, reports = decoder(z, y, guidance, [Schedule(chunk, 10**6)] * 3)
    assert (found - exact).abs().max() < 1e-11
    assert sum(reports[0].iterations) == 15
    assert {report.last_move for report in reports} == {0.0}


@pytest.mark.parametrize("chunk", [8, 15])
def test_a_tolerance_saves_iterations_and_bounds_the_error(chunk: int) -> None:
    flow = flow_of(seed=3).double()
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow)
    exact = decoder(z, y)[0]
    counts, errors = [], []
    for tolerance in (1e-1, 1e-3, 1e-6):
        found, reports = decoder(z, y, None, [Schedule(chunk, 1, tolerance)] * 3)
        counts.append(sum(sum(report.iterations) for report in reports))
        errors.append(float((found - exact).abs().max()))
        assert all(report.last_move <= tolerance for report in reports)
        assert errors[-1] < 10 * tolerance
    assert counts[0] <= counts[1] < counts[2] < 45
    assert errors[0] > errors[2] > 0


class Wild(BlockNetwork):
    """A network whose scales are infinite if a token is far from its exact value."""

    exact: Tensor

    def parameters(self, tokens: Tensor, offsets: Tensor, *rest: object) -> tuple[Tensor | None, Tensor]:
        log_scale, mean = super().parameters(tokens, offsets, *rest)  # type: ignore[arg-type]
        start = rest[1]
        assert isinstance(start, int)
        off = (tokens - self.exact[:, start : start + tokens.shape[1]]).abs().amax(dim=2, keepdim=True) > 1e-6
        assert log_scale is not None
        return torch.where(off, 1000.0, log_scale), torch.where(off, float("nan"), mean)


def test_iterates_that_overflow_do_not_reach_exact_tokens() -> None:
    """The guarantee also holds if every iterate of a token that is not exact yet overflows."""
    flow = flow_of(depth=(2,)).double()
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow)
    exact, _ = decoder.decode_block(0, decoder.tokens_of(z), y, None, Schedule())
    wild = Wild(flow.blocks[0], torch.float64)  # type: ignore[arg-type]
    wild.exact = exact
    decoder.networks()[0] = wild
    found, report = decoder.decode_block(0, decoder.tokens_of(z), y, None, Schedule(15, 10**6))
    assert report.iterations == (15,)
    assert (found - exact).abs().max() < 1e-11


@pytest.mark.parametrize("chunk", [1, 5])
def test_batches_of_1_7_and_64_agree_per_image(chunk: int) -> None:
    flow = flow_of(seed=2)
    z, y = latents_of(flow, 64)
    assert y is not None
    decoder = TarFlowDecoder(flow)
    schedules = [Schedule(chunk, 10**6)] * 3
    whole = decoder(z, y, Guidance(scale=1.0), schedules)[0]
    for size in (1, 7):
        parts = [
            decoder(a, b, Guidance(scale=1.0), schedules)[0] for a, b in zip(z.split(size), y.split(size), strict=True)
        ]
        assert (torch.cat(parts) - whole).abs().max() < 1e-5


def test_what_is_decoded_encodes_back() -> None:
    flow = flow_of(seed=4)
    z, y = latents_of(flow, 16)
    with torch.no_grad():
        back, _ = flow(TarFlowDecoder(flow)(z, y)[0], y)
    assert (back - z).abs().max() < 1e-3


def test_bf16_is_near_and_keeps_scale_and_mean_wide() -> None:
    flow = flow_of(seed=5)
    z, y = latents_of(flow)
    exact = TarFlowDecoder(flow)(z, y)[0]
    found = TarFlowDecoder(flow, torch.bfloat16)(z, y)[0]
    assert found.dtype == torch.float32
    error = (found - exact).abs().max()
    assert 1e-6 < error < 0.05
    decoder = TarFlowDecoder(flow, torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert decoder.cache(4).dtype == torch.bfloat16


def test_without_a_compiler_a_cpu_keeps_the_cache_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, PyTorch's attention of one query is slower in bf16 than in fp32."""
    flow = flow_of(seed=5)
    z, y = latents_of(flow)
    expected = TarFlowDecoder(flow)(z, y)[0], TarFlowDecoder(flow, torch.bfloat16)(z, y)[0]
    monkeypatch.setenv("CC", "no-such-compiler")
    OneQuery.function.cache_clear()
    exact, narrow = TarFlowDecoder(flow), TarFlowDecoder(flow, torch.bfloat16)
    assert exact.cache(4).dtype == narrow.cache(4).dtype == torch.float32
    assert (exact(z, y)[0] - expected[0]).abs().max() < 1e-5
    assert (narrow(z, y)[0] - expected[1]).abs().max() < 0.05
    OneQuery.function.cache_clear()


def test_trained_or_moved_weights_are_laid_out_again() -> None:
    flow = flow_of(seed=6)
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow, torch.bfloat16)
    before = decoder(z, y)[0]
    with torch.no_grad():
        flow.blocks[1].proj_out.bias.add_(0.1)  # type: ignore[union-attr,operator]
    after = decoder(z, y)[0]
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(after, TarFlowDecoder(flow, torch.bfloat16)(z, y)[0])


def loaded(**options: object) -> TarFlow:
    """A flow as `tarflow_scale.load` returns it."""
    flow = flow_of(**options)  # type: ignore[arg-type]
    flow.decoder = TarFlowDecoder(flow).as_decode
    return flow


def test_eight_threads_draw_what_one_draws() -> None:
    """Without a lock threads would share the decoder's cache, and most images would be wrong."""
    flow = loaded(depth=(1, 1))

    def draw(number: int) -> Tensor:  # other numbers of rows, so that packed weights differ too
        return flow.sample(100, number % 5, seed=number, batch_size=20 + number)

    expected = [draw(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(draw, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_written_through_data_are_seen(dtype: torch.dtype | None) -> None:
    """``parameter.data.copy_``, which puts averages of weights in place, does not change a version counter."""
    flow, other = flow_of(seed=6), flow_of(seed=7)
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow, dtype)
    before = decoder(z, y)[0]
    for parameter, source in zip(flow.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(source.data)
    expected = TarFlowDecoder(other, dtype)(z, y)[0]
    assert torch.equal(decoder(z, y)[0], expected)
    assert not torch.equal(before, expected)
    one = flow.blocks[0].layers[0].qkv.bias  # type: ignore[union-attr, index]
    rows = flow.blocks[1].layers[0].mlp_in.weight  # type: ignore[union-attr, index]
    for changed, write in ((one, lambda: one.data[0].add_(0.5)), (rows, lambda: rows.data.copy_(rows.data.flip(0)))):
        kept = changed.clone()
        write()  # a single number; rows that trade places
        assert not torch.equal(changed, kept)
        assert torch.equal(decoder(z, y)[0], TarFlowDecoder(flow, dtype)(z, y)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (96, 384), (1024, 256)])
def test_a_checksum_sees_any_change_of_a_number_and_any_order(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = _checksum(weight)
    assert _checksum(weight.clone()) == before
    for place in (0, weight.numel() // 2, weight.numel() - 1):
        other = weight.clone()
        other.view(-1)[place] *= 1.01
        assert _checksum(other) != before
    for other in (weight.flip(0), weight.flip(1), weight.roll(1, 0), weight.roll(1, 1), -weight):
        assert _checksum(other) != before


def test_a_flow_that_has_sampled_can_be_copied_and_pickled() -> None:
    """Packed weights are opaque tensors, which can be neither copied nor pickled."""
    flow = loaded(seed=8)
    expected = flow.sample(3, 1, seed=0)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for again in (
        copy.deepcopy(flow),
        pickle.loads(pickle.dumps(flow)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(again.sample(3, 1, seed=0), expected)
        with torch.no_grad():
            again.blocks[0].proj_out.bias.add_(0.1)  # the copy's decoder reads the copy
        assert not torch.equal(again.sample(3, 1, seed=0), expected)
        assert torch.equal(flow.sample(3, 1, seed=0), expected)


def test_a_flow_of_inference_mode_samples_inside_and_outside() -> None:
    with torch.inference_mode():
        flow = loaded(seed=9)
        expected = flow.sample(3, 1, seed=0)
    assert torch.equal(flow.sample(3, 1, seed=0), expected)
    with torch.inference_mode():
        assert torch.equal(flow.sample(3, 1, seed=0), expected)
    normal = loaded(seed=9)
    assert torch.equal(normal.sample(3, 1, seed=0), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_in_half_precision_samples_on_a_cpu(dtype: torch.dtype) -> None:
    flow = loaded(seed=10)
    exact = flow.sample(4, 1, seed=0)
    found = flow.to(dtype).sample(4, 1, seed=0)
    assert found.isfinite().all()
    assert (found.float() - exact).abs().max() < 0.1


def test_progress_reaches_the_whole() -> None:
    flow = flow_of()
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow)
    told: list[int] = []
    decoder(z, y, schedules=[Schedule(), Schedule(4), Schedule(15)], progress=told.append)
    assert sum(told) == decoder.num_steps == 45
    shares: list[float] = []
    decoder.as_decode(shares.append)(z, y, None)
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_is_that_of_one_block(guided: bool, dtype: torch.dtype | None) -> None:
    """All blocks share the cache of the deepest block: keys and values of T tokens of width C for each row."""
    flow = flow_of(depth=(1, 3, 2))
    z, y = latents_of(flow)
    decoder = TarFlowDecoder(flow, dtype)
    decoder(z, y, Guidance(scale=1.0) if guided else None)
    rows = 12 if guided else 6
    held = decoder.cache(rows)
    assert held.data_ptr() == decoder.cache(rows).data_ptr()
    assert held.nbytes == 3 * 2 * rows * 32 * 16 * (4 if dtype is None else 2)
    assert held.nbytes <= rows * decoder.bytes_per_row() < 1.5 * held.nbytes


@torch.no_grad()
@pytest.mark.parametrize("sharp", [False, True])
def test_a_window_of_fixed_shape_computes_the_same(sharp: bool) -> None:
    """CUDA graphs replay this window, whose position is a tensor; here it runs without a graph."""
    flow = flow_of(depth=(2,)).double()
    z, y = latents_of(flow)
    network = BlockNetwork(flow.blocks[0], torch.float64)  # type: ignore[arg-type]
    offsets = network.offsets(y, len(z))
    sharpness = 0.5 * torch.ones(len(z), 1, 1, 1, dtype=torch.float64) if sharp else None
    tokens = z.view(len(z), 16, 12)
    plain, fixed = network.new_cache(len(z)), network.new_cache(len(z))
    for t in range(15):
        one = slice(t, t + 1)
        expected = network.parameters(tokens[:, one], offsets[:, one], plain, t, sharpness)
        window = network.fixed(t, 16, z.device)
        assert window.length == 16
        out = network.outputs(tokens[:, one], offsets[:, one], fixed, window, sharpness)
        log_scale, mean = network.block.parameters_of(out)
        assert (mean - expected[1]).abs().max() < 1e-12
        assert (log_scale - expected[0]).abs().max() < 1e-12  # type: ignore[operator]
    assert (plain - fixed).abs().max() < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("guidance", [None, Guidance(scale=1.0, attention_temperature=0.8)], ids=str)
def test_graphs_on_a_gpu_decode_the_same(dtype: torch.dtype | None, guidance: Guidance | None) -> None:
    flow = flow_of()
    z, y = latents_of(flow)
    assert y is not None
    expected = TarFlowDecoder(flow, dtype)(z, y, guidance)[0]
    flow = flow.cuda()
    decoder = TarFlowDecoder(flow, dtype)
    for _ in range(2):  # captured, then replayed
        found = decoder(z.cuda(), y.cuda(), guidance)[0].cpu()
        assert (found - expected).abs().max() < (1e-3 if dtype is None else 0.1)
    chunked = decoder(z.cuda(), y.cuda(), guidance, [Schedule(5, 10**6)] * 3)[0].cpu()
    assert (chunked - expected).abs().max() < (1e-3 if dtype is None else 0.1)
